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

    ``path`` is a .txt, .jsonl or .parquet file, or ``hub:OWNER/NAME[@REVISION][:[CONFIG/]SPLIT]``;
    ``field`` holds the text or the messages of a chat, or two fields the prompt and the response.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    path: str
    field: str | list[str] = pydantic.Field(
        "text", description="Field of a record that is a text, or messages; or PROMPT,RESPONSE."
    )
    encoding: str = pydantic.Field("utf-8", description="Encoding of the text files.")

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

    samples: Annotated[int, pydantic.Field(ge=2)] = pydantic.Field(
        2000, description="Documents that give rows."
    )


class Recipe(pydantic.BaseModel):
    """A fully resolved recipe.

    What a setting means stands in its description, which is the help of its flag too. ``target``,
    ``source`` and ``source_base`` are folders, hub ids as ``OWNER/NAME@REVISION``, or either with a
    LoRA adapter, ``BASE+ADAPTER``. ``rows`` (SPEC section 2) that are ``auto`` are decided once the
    tokenizers are loaded: ``token`` for equal ones, ``span`` otherwise. ``strength`` is chosen on a
    dev split if it is ``auto``, and may be a number for each group. ``vocabulary_weights`` says how
    much a token counts for the vocabulary map: all alike, or by its frequency in the calibration
    text. The merge of the first of several ``seeds`` is published, all of them are compared.
    ``controls`` are those of SPEC section 10.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    target: Folder = pydantic.Field(
        description="Folder of the target (it is kept), OWNER/NAME@REVISION, or BASE+LORA."
    )
    source: Folder = pydantic.Field(description="Folder of the source, likewise.")
    source_base: Folder | None = pydantic.Field(
        None, description="Folder of what the source was fine-tuned from."
    )
    calibration: CalibrationText = pydantic.Field(
        description="Unlabelled text: .txt, .jsonl, .parquet, or hub:OWNER/NAME."
    )
    evaluation: Text | None = pydantic.Field(None, description="Held-out text, only reported.")
    preset: Literal["paper", "barycentric", "delta"] = pydantic.Field(
        description="paper, barycentric or delta (default)."
    )
    weights: Annotated[list[Weight], pydantic.Field(min_length=1)] = pydantic.Field(
        description="What moves, e.g. gate,up,down,embed."
    )
    rows: Literal["sample", "token", "span", "auto"] = pydantic.Field(
        description="sample, token, span or auto (token or span)."
    )
    max_rows: Annotated[int, pydantic.Field(ge=2)] = pydantic.Field(
        8192, description="Rows kept for token and span."
    )
    max_length: Annotated[int, pydantic.Field(ge=2)] = pydantic.Field(
        512, description="Tokens read of a document."
    )
    epsilon: Positive = pydantic.Field(description="Of the neuron plans, cost units.")
    layer_epsilon: Positive = pydantic.Field(0.1, description="Of the layer plan, cost units.")
    layer_cost: Literal["plain", "median"] = pydantic.Field(description="plain or median.")
    layers: Literal["soft", "top1"] = pydantic.Field(description="soft or top1.")
    max_iterations: Annotated[int, pydantic.Field(ge=1)] = pydantic.Field(
        description="Sinkhorn iterations at most."
    )
    threshold: Positive = pydantic.Field(1e-6, description="L1 marginal error to stop at.")
    solver: Literal["auto", "ott"] = pydantic.Field(
        "auto", description="auto, or ott (all by ott-jax: slow, a check)."
    )
    signed: bool = pydantic.Field(False, description="Let neurons match their negative.")
    form: Literal["joint", "barycentric"] = pydantic.Field(description="joint or barycentric.")
    rule: Literal["interpolate", "residual", "delta"] = pydantic.Field(
        description="interpolate, residual or delta."
    )
    strength: Literal["auto"] | Strength | dict[Literal["projections", "vocabulary"], Strength] = (
        pydantic.Field(description="alpha or lambda; or auto.")
    )
    vocabulary_weights: Literal["uniform", "frequency"] = pydantic.Field(
        "uniform", description="uniform or frequency."
    )
    k: Literal["all"] | Annotated[int, pydantic.Field(ge=1)] = pydantic.Field(
        description="Neurons kept in each layer; or all."
    )
    controls: list[Control] = pydantic.Field(
        ["shrink", "permuted", "unigram"], description="all, none, or e.g. noise,unigram."
    )
    seeds: Annotated[int, pydantic.Field(ge=1)] = pydantic.Field(
        1, description="Calibration seeds to compare."
    )
    continuations: Annotated[int, pydantic.Field(ge=0)] = pydantic.Field(
        3, description="Held-out documents continued for the report."
    )
    seed: Annotated[int, pydantic.Field(ge=0)] = pydantic.Field(
        0, description="Of every random choice."
    )

    @pydantic.field_validator(
        "epsilon", "layer_epsilon", "threshold", "strength", "k", "seed",
        "max_rows", "max_length", "max_iterations", "seeds", "continuations", mode="before",
    )  # fmt: skip
    @classmethod
    def _check_number(cls, value: Any) -> Any:
        # YAML reads yes, no, on and off as booleans, and pydantic would read those as 1 and 0
        values = value.values() if isinstance(value, dict) else [value]
        if any(isinstance(number, bool) for number in values):
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
