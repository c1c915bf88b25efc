"""`Recipe`: what the user asks for, from YAML or flags, filled by a preset and checked.

A recipe becomes a `MergeSpec` (static) and `HParams` (traced) for the stages. Imports no jax, so
that `ot-merge --help` and a wrong recipe answer at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import pydantic
import yaml

from ot_merge_jax.models.sites import GROUPS, PROJECTIONS, VOCABULARY

if TYPE_CHECKING:
    from ot_merge_jax.types import HParams, MergeSpec

Weight = Literal["q", "k", "v", "o", "gate", "up", "down", "embed", "head"]
Control = Literal["shrink", "noise", "permuted", "wrong-layer", "wrong-source", "unigram"]
#: Every control of method: Controls.
CONTROLS: list[str] = list(get_args(Control))
Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
Folder = Annotated[str, pydantic.Field(min_length=1)]
Strength = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]


class Text(pydantic.BaseModel):
    """Where documents come from.

    Attributes:
        path: A .txt, .jsonl or .parquet file, or ``hub:OWNER/NAME[@REVISION][:[CONFIG/]SPLIT]``.
        field: The field of a record that holds the text or the messages of a chat; or two, the
            prompt and the response (also written ``prompt,response``).
        encoding: Of a file of lines.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    path: str
    field: str | list[str] = "text"
    encoding: str = "utf-8"

    @pydantic.field_validator("field", mode="before")
    @classmethod
    def _check_field(cls, value: Any) -> Any:
        names = value.split(",") if isinstance(value, str) else value
        is_named = isinstance(names, list) and all(isinstance(x, str) and x for x in names)
        if not is_named or len(names) not in (1, 2):
            raise ValueError("must name one field, or a prompt and a response field")
        return names if len(names) == 2 else names[0]


class CalibrationText(Text):
    """The calibration text, and how many documents of it give rows."""

    samples: Annotated[int, pydantic.Field(ge=2)] = 2000


class Recipe(pydantic.BaseModel):
    """A fully resolved recipe.

    Attributes:
        target: Folder of the target, or its hub id as ``OWNER/NAME@REVISION``; or either with a
            LoRA adapter, ``BASE+ADAPTER``.
        source: The same of the source.
        source_base: The same of what the source was fine-tuned from.
        calibration: The calibration text.
        evaluation: Held-out text that is reported and chooses nothing.
        preset: Where unset settings come from.
        weights: What moves.
        rows: ``sample``, ``token`` or ``span``; ``auto`` means ``token`` for equal
            tokenizers and ``span`` otherwise, known once they are loaded.
        max_rows: Rows kept for ``token`` and ``span``.
        max_length: Tokens of a calibration document that are read.
        epsilon: Regularisation of the neuron plans, in cost units.
        layer_epsilon: Regularisation of the layer plan, in cost units.
        layer_cost: ``plain`` or ``median``.
        layers: ``soft`` or ``top1``.
        max_iterations: Sinkhorn iterations at most.
        threshold: L1 marginal error at which the solver stops.
        solver: ``auto``, or ``ott`` for all transport by ott-jax in the log domain, a check of the
            built-in solver that takes several times as long.
        signed: Whether anti-correlated neurons may match.
        form: ``joint`` or ``barycentric``.
        rule: ``interpolate``, ``residual`` or ``delta``.
        strength: alpha or lambda; ``auto`` chooses it on a dev split; or one for each group.
        vocabulary_weights: How much a token counts for the vocabulary map: all alike, or by its
            frequency in the calibration text.
        k: Neurons kept in each layer, or ``all``.
        controls: What the merge is compared with on the held-out text (method: Controls): ``all``,
            ``none``, or some of their names.
        seeds: Calibration seeds; the first one's merge is published, all of them are compared.
        continuations: Held-out documents whose beginning target and merge continue, for the report.
        seed: Of every random choice; with several seeds, the first.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    target: Folder
    source: Folder
    source_base: Folder | None = None
    calibration: CalibrationText
    evaluation: Text | None = None
    preset: Literal["paper", "barycentric", "delta"]
    weights: Annotated[list[Weight], pydantic.Field(min_length=1)]
    rows: Literal["sample", "token", "span", "auto"]
    max_rows: Annotated[int, pydantic.Field(ge=2)] = 8192
    max_length: Annotated[int, pydantic.Field(ge=2)] = 512
    epsilon: Positive
    layer_epsilon: Positive = 0.1
    layer_cost: Literal["plain", "median"]
    layers: Literal["soft", "top1"]
    max_iterations: Annotated[int, pydantic.Field(ge=1)]
    threshold: Positive = 1e-6
    solver: Literal["auto", "ott"] = "auto"
    signed: bool = False
    form: Literal["joint", "barycentric"]
    rule: Literal["interpolate", "residual", "delta"]
    strength: Literal["auto"] | Strength | dict[Literal["projections", "vocabulary"], Strength]
    vocabulary_weights: Literal["uniform", "frequency"] = "uniform"
    k: Literal["all"] | Annotated[int, pydantic.Field(ge=1)]
    controls: list[Control] = pydantic.Field(default=["shrink", "permuted", "unigram"])
    seeds: Annotated[int, pydantic.Field(ge=1)] = 1
    continuations: Annotated[int, pydantic.Field(ge=0)] = 3
    seed: Annotated[int, pydantic.Field(ge=0)] = 0

    @pydantic.field_validator(
        "epsilon", "layer_epsilon", "threshold", "strength", "k", "seed",
        "max_rows", "max_length", "max_iterations", "seeds", "continuations", mode="before",
    )  # fmt: skip
    @classmethod
    def _check_number(cls, value: Any) -> Any:
        # YAML reads yes, no, on and off as booleans, and pydantic would read those as 1 and 0
        values = value.values() if isinstance(value, dict) else [value]
        if any(isinstance(one, bool) for one in values):
            raise ValueError("must be a number, not true or false")
        return value

    @pydantic.field_validator("controls", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        named = {"all": CONTROLS, "none": []}
        return named.get(value, value) if isinstance(value, str) else value

    @pydantic.model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.rule == "delta" and self.source_base is None:
            raise ValueError(
                "rule delta needs source_base (--source-base), the checkpoint the source was "
                "fine-tuned from; "
                "give it or choose preset barycentric"
            )
        if len(set(self.weights)) < len(self.weights):
            raise ValueError("weights names one weight twice")
        said = self.strength.values() if isinstance(self.strength, dict) else [self.strength]
        if self.rule == "interpolate" and any(x != "auto" and float(x) > 1 for x in said):
            raise ValueError("strength must lie in [0, 1] for rule interpolate")
        if isinstance(self.strength, dict):
            moving = {group for group, names in GROUPS.items() if names & set(self.weights)}
            if missing := sorted(moving - set(self.strength)):
                raise ValueError(f"strength has no value for {', '.join(missing)}")
        return self

    def spec(self) -> MergeSpec:
        """The static choices of the stages, weights in the order of the forward pass."""
        from ot_merge_jax.types import MergeSpec  # noqa: PLC0415, it imports jax

        order = [*PROJECTIONS, *VOCABULARY]
        return MergeSpec(
            weights=tuple(sorted(self.weights, key=order.index)),
            form=self.form,
            rule=self.rule,
            layers=self.layers,
            layer_cost=self.layer_cost,
            k=None if self.k == "all" else self.k,
            signed=self.signed,
            max_iterations=self.max_iterations,
            solver=self.solver,
        )

    def hparams(self) -> HParams:
        """The traced numbers of the stages; strength 0 where it is still to be chosen."""
        from ot_merge_jax.types import HParams  # noqa: PLC0415, it imports jax

        strength = 0.0 if self.strength == "auto" else self.strength
        return HParams(strength, self.epsilon, self.layer_epsilon, self.threshold)

    def to_yaml(self) -> str:
        """The recipe as YAML that `load` reads back."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)
