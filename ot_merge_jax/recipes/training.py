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

    Attributes:
        model: What is trained: a folder that `ot-merge run` or `adapt` wrote, whose residual stays
            frozen, or any other model folder or hub id.
        target: What the merge was made from, if it is no longer where the run's recipe says.
        source: The teacher; not used by ``sft``.
        objective: ``sft``, ``kd`` or ``mix``.
        kd_weight: Share of the distillation in ``mix``.
        text: What is learned from; a fifth of its documents is the dev split.
        samples: Documents learned from, a seeded sample with the dev split beside it; None: all.
        evaluation: Held-out text that is reported and chooses nothing.
        loss_on: Of chats: ``responses`` (what the assistant says) or ``all`` tokens.
        steps: Optimiser steps; None: one epoch. 0 only folds, which rescales a residual.
        learning_rate: Peak rate.
        batch_size: Blocks of a step.
        accumulate: Parts a batch is computed in, to save memory.
        block: Tokens of a block; None: `BLOCK`, or the smaller context.
        schedule: How the rate falls.
        warmup: Fraction of the steps that warm up.
        weight_decay: Of what trains; the residual is never decayed.
        clip: Largest global norm of a gradient.
        strength: alpha or lambda at which the residual is held; None: as it was merged.
        lora: Rank of the adapters; None: all parameters train.
        lora_alpha: The product of the factors counts ``alpha / rank``; None: the rank.
        lora_targets: Projections that get adapters.
        dtype: What is computed in; masters are float32. ``auto``: float32 on CPU, else bfloat16.
        remat: Whether memory is saved by computing layers twice.
        eval_every: Steps between evaluations on the dev split; None: a tenth of the steps.
        save_every: Steps between checkpoints; None: a tenth of the steps.
        log_every: Steps between lines of ``events.jsonl``.
        patience: Evaluations without a new best that end the training; None: never.
        seed: Of the order of the data, the dev split and the adapters.
        baselines: Other starts that are trained at equal budget, ``base`` (the target) always among
            them; None: none.
        rates: Learning rates that each of them tries; None: `RATES` times ``learning_rate``.
        seeds: Seeds that each of them is trained with, from ``seed`` on; the rate is chosen with
            the first.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    model: Folder
    target: Folder | None = None
    source: Folder | None = None
    objective: Literal["sft", "kd", "mix"] = "sft"
    kd_weight: Share = 0.5
    text: Text
    samples: Count | None = None
    evaluation: Text | None = None
    loss_on: Literal["responses", "all"] = "responses"
    steps: Annotated[int, pydantic.Field(ge=0)] | None = None
    learning_rate: Positive = 1e-5
    batch_size: Count = 8
    accumulate: Count = 1
    block: Annotated[int, pydantic.Field(ge=2)] | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Share = 0.05
    weight_decay: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)] = 0.0
    clip: Positive = 1.0
    strength: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)] | None = None
    lora: Count | None = None
    lora_alpha: Positive | None = None
    lora_targets: Annotated[list[Projection], pydantic.Field(min_length=1)] = [
        *get_args(Projection)
    ]
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: bool = False
    eval_every: Count | None = None
    save_every: Count | None = None
    log_every: Count = 1
    patience: Count | None = None
    seed: Annotated[int, pydantic.Field(ge=0)] = 0
    baselines: Annotated[list[Baseline], pydantic.Field(min_length=1)] | None = None
    rates: Annotated[list[Positive], pydantic.Field(min_length=1)] | None = None
    seeds: Count = 1

    @pydantic.model_validator(mode="after")
    def _check(self) -> Adaptation:
        if self.objective != "sft" and self.source is None:
            raise ValueError(
                f"objective {self.objective} needs source (--source), the teacher; give it or "
                "choose --objective sft"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate {self.accumulate} does not divide batch_size {self.batch_size}"
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

    def to_yaml(self) -> str:
        """The settings as YAML."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


def resolve(settings: Mapping[str, Any], *, where: str = "the command line") -> Adaptation:
    """Checks settings and fills what was not said.

    Args:
        settings: What the user said; None values count as unsaid.
        where: Named in messages.

    Returns:
        The settings.

    Raises:
        RecipeError: naming every unknown key or bad value.

    Example:
        >>> found = resolve({"model": "m", "text": {"path": "t.txt"}, "learning_rate": 1e-4})
        >>> found.objective, found.warmup, found.clip
        ('sft', 0.05, 1.0)
        >>> resolve({"model": "m", "text": {"path": "t.txt"}, "learning_rate": 0})
        Traceback (most recent call last):
        ...
        ot_merge_jax.errors.RecipeError: the command line: learning_rate: Input should be greater
        than 0 (got 0).
    """
    said = {key: value for key, value in settings.items() if value is not None}
    try:
        return Adaptation.model_validate(said)
    except pydantic.ValidationError as error:
        raise RecipeError(f"{where}: {'; '.join(loading.sentences(error.errors()))}.") from error
