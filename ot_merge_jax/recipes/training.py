"""`Adaptation`: what the user asks of a training run, checked and filled. Imports recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

import pydantic
import yaml

from ot_merge_jax.errors import RecipeError
from ot_merge_jax.recipes import loading
from ot_merge_jax.recipes.recipe import Folder, Positive, Text

Count = Annotated[int, pydantic.Field(ge=1)]
Share = Annotated[float, pydantic.Field(ge=0, le=1, allow_inf_nan=False)]
Projection = Literal["q", "k", "v", "o", "gate", "up", "down"]
Baseline = Literal["base", "shrink", "noise"]

#: Tokens of a block where the models' contexts allow it.
BLOCK = 512
#: Multiples of the learning rate that every arm of a comparison tries.
RATES = (0.3, 1.0, 3.0)


class Adaptation(pydantic.BaseModel):
    """Fully resolved settings of `ot-merge adapt`.

    What a setting means stands in its description, which is the help of its flag too. A fifth of
    the documents of ``text`` is the dev split; ``samples`` is a seeded sample with the dev split
    beside it. With 0 ``steps`` the residual is only folded in, which rescales it; it is never
    decayed. ``seq_len`` that is not given is `BLOCK`, or the smaller context; ``eval_every`` and
    ``save_every`` are a tenth of the steps; ``rates`` are `RATES` times ``learning_rate``. Of
    ``seeds``, the rate is chosen with the first. The target (``base``) is always one of
    ``baselines``.

    A ``serialization_alias`` is the name that a setting had; files that are written keep it, and
    `resolve` accepts it.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    model: Folder = pydantic.Field(
        description="Folder of `ot-merge run` (its residual stays frozen), or any model."
    )
    target: Folder | None = pydantic.Field(
        None, description="What MODEL was merged from, if it has moved."
    )
    source: Folder | None = pydantic.Field(
        None, description="Teacher of kd and mix; not used by sft."
    )
    objective: Literal["sft", "kd", "mix"] = pydantic.Field(
        "sft", description="sft (next token), kd (imitate the source) or mix."
    )
    kd_weight: Share = pydantic.Field(0.5, description="Share of the distillation in mix.")
    text: Text = pydantic.Field(
        description="What is learned from: .txt, .jsonl, .parquet, or hub:OWNER/NAME."
    )
    samples: Count | None = pydantic.Field(None, description="Documents learned from [all].")
    evaluation: Text | None = pydantic.Field(None, description="Held-out text, only reported.")
    loss_on: Literal["responses", "all"] = pydantic.Field(
        "responses", description="Of chats: responses or all."
    )
    steps: Annotated[int, pydantic.Field(ge=0)] | None = pydantic.Field(
        None, description="Optimiser steps [one epoch]."
    )
    learning_rate: Positive = pydantic.Field(1e-5, description="Peak rate.")
    batch_size: Count = pydantic.Field(8, description="Blocks of a step.")
    grad_accum_steps: Count = pydantic.Field(
        1,
        serialization_alias="accumulate",
        description="Parts a batch is computed in, to save memory.",
    )
    seq_len: Annotated[int, pydantic.Field(ge=2)] | None = pydantic.Field(
        None, serialization_alias="block", description="Tokens of a block [512, or the context]."
    )
    schedule: Literal["cosine", "linear", "constant"] = pydantic.Field(
        "cosine", description="cosine, linear or constant."
    )
    warmup: Share = pydantic.Field(0.05, description="Fraction of the steps.")
    weight_decay: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)] = pydantic.Field(
        0.0, description="Of what trains."
    )
    max_grad_norm: Positive = pydantic.Field(
        1.0, serialization_alias="clip", description="Largest gradient norm."
    )
    strength: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)] | None = pydantic.Field(
        None, description="Hold the residual at this alpha or lambda."
    )
    lora_rank: Count | None = pydantic.Field(
        None,
        serialization_alias="lora",
        description="Train adapters of this rank instead of all weights.",
    )
    lora_alpha: Positive | None = pydantic.Field(None, description="Adapters count alpha/rank.")
    lora_targets: Annotated[list[Projection], pydantic.Field(min_length=1)] = pydantic.Field(
        [*get_args(Projection)], description="Projections that get adapters, e.g. q,v,up,down."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = pydantic.Field(
        "auto", description="To compute in: float32, bfloat16, or auto (by the device)."
    )
    remat: bool = pydantic.Field(False, description="Save memory, compute layers twice.")
    eval_every: Count | None = pydantic.Field(None, description="Steps between dev evaluations.")
    save_every: Count | None = pydantic.Field(None, description="Steps between checkpoints.")
    log_every: Count = pydantic.Field(1, description="Steps between lines of events.")
    patience: Count | None = pydantic.Field(
        None, description="Stop after so many evaluations without a new best."
    )
    seed: Annotated[int, pydantic.Field(ge=0)] = pydantic.Field(
        0, description="Of every random choice."
    )
    baselines: Annotated[list[Baseline], pydantic.Field(min_length=1)] | None = pydantic.Field(
        None, description="Train other starts at equal budget too: all, or of base,shrink,noise."
    )
    rates: Annotated[list[Positive], pydantic.Field(min_length=1)] | None = pydantic.Field(
        None, description="Learning rates that each of them tries [0.3, 1 and 3 times the rate]."
    )
    seeds: Count = pydantic.Field(1, description="Seeds that each of them is trained with.")

    @pydantic.field_validator("baselines", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return list(get_args(Baseline)) if value == "all" else value

    @pydantic.model_validator(mode="after")
    def _check(self) -> Adaptation:
        if self.objective != "sft" and self.source is None:
            raise ValueError(
                f"objective {self.objective} needs source (--source), the teacher; give it or "
                "choose --objective sft"
            )
        if self.batch_size % self.grad_accum_steps:
            raise ValueError(
                f"grad_accum_steps {self.grad_accum_steps} does not divide batch_size "
                f"{self.batch_size}"
            )
        if len(set(self.lora_targets)) < len(self.lora_targets):
            raise ValueError("lora_targets names one weight twice")
        if self.baselines is None:
            if self.rates is not None or self.seeds > 1:
                raise ValueError(
                    "rates and seeds are those of baselines (--baselines); leave them out"
                )
            return self
        if self.evaluation is None:
            raise ValueError(
                "baselines are compared on held-out text; give evaluation (--eval-text)"
            )
        if self.objective != "sft":
            raise ValueError(
                "baselines train sft, and kd where source is given; leave objective out"
            )
        if self.steps == 0 or self.patience is not None:
            raise ValueError(
                "baselines have equal budgets; give at least one step, and leave patience out"
            )
        return self

    @property
    def objectives(self) -> tuple[str, ...]:
        """Everything that is minimised, one after the other."""
        if self.baselines is None:
            return (self.objective,)
        return ("sft",) if self.source is None else ("sft", "kd")

    @property
    def is_distilled(self) -> bool:
        """Whether a teacher is needed."""
        return self.objectives != ("sft",)

    @property
    def grid(self) -> list[float]:
        """The learning rates that are tried, from the lowest."""
        several = [factor * self.learning_rate for factor in RATES]
        return sorted(set(several if self.rates is None else self.rates))

    def to_dict(self) -> dict[str, Any]:
        """The settings by the names that stand in files."""
        return self.model_dump(by_alias=True)

    def to_yaml(self) -> str:
        """The settings as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def resolve(settings: Mapping[str, Any], *, where: str = "the command line") -> Adaptation:
    """Checks settings and fills what was not said.

    Args:
        settings: What the user said, by new names or old ones; None values count as unsaid.
        where: Named in messages.

    Returns:
        The settings.

    Raises:
        RecipeError: naming every unknown key or bad value.

    Example:
        >>> found = resolve({"model": "m", "text": {"path": "t.txt"}, "learning_rate": 1e-4})
        >>> found.objective, found.warmup, found.max_grad_norm
        ('sft', 0.05, 1.0)
        >>> resolve({"model": "m", "text": {"path": "t.txt"}, "learning_rate": 0})
        Traceback (most recent call last):
        ...
        ot_merge_jax.errors.RecipeError: the command line: learning_rate: Input should be greater
        than 0 (got 0).
    """
    said = loading.renamed(settings, Adaptation, where=where)
    try:
        return Adaptation.model_validate(said)
    except pydantic.ValidationError as error:
        raise RecipeError(f"{where}: {'; '.join(loading.sentences(error.errors()))}.") from error
