"""One calibration seed of a run: the merge and its controls, treated alike, scored on one text.

Every arm gets the same strengths to try, the same dev split to choose on and the same rounding to
the dtypes of the file (method: Controls). No maths: `controls` breaks, `sweep` chooses, `nll`
scores.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ot_merge_jax.evaluation import nll, saved_scores, token_bias
from ot_merge_jax.experiments import controls, sweep
from ot_merge_jax.io import arrays
from ot_merge_jax.merging import fuse
from ot_merge_jax.merging.merge import Stage, given, merge
from ot_merge_jax.models import specs
from ot_merge_jax.models.model import Models
from ot_merge_jax.types import (
    BUDGET,
    AlignedBatches,
    Budget,
    Choice,
    HParams,
    Merged,
    MergeSpec,
    Params,
    Point,
    Transported,
    VocabularyMatch,
)

_LOG = logging.getLogger(__name__)


class Arm(NamedTuple):
    """A merge, or a control of it, at the strength that was best for it.

    Attributes:
        strength: A number, or one for each group.
        points: Every strength tried on the dev split; empty if the recipe gives the strength.
        scores: On the held-out text.
    """

    strength: Any
    points: list[Point]
    scores: nll.Scores


class WithTokenBias(NamedTuple):
    """A model with its own fitted bias for each token.

    Attributes:
        scale: Share of the bias that was best on the dev split.
        scores: On the held-out text.
    """

    scale: float
    scores: nll.Scores


class Trial(NamedTuple):
    """What one calibration seed showed.

    Attributes:
        seed: Of the calibration sample, the split and every control.
        arms: ``merge``, then every control that applies.
        biased: ``target`` and ``merge``, each with its own bias; empty if that control did not run.
    """

    seed: int
    arms: dict[str, Arm]
    biased: dict[str, WithTokenBias]


class CalibrationSplit(NamedTuple):
    """The calibration text of one seed, ready to be used.

    Attributes:
        seed: Of the sample and the split.
        batches: Row-aligned batches.
        vocabulary: Matched tokens; None if the vocabulary does not move.
        train: Makes the windows of the documents that give rows, for the target.
        dev: The dev split, for the target; None if there is none, and nothing to choose on it.
    """

    seed: int
    batches: AlignedBatches
    vocabulary: VocabularyMatch | None
    train: Callable[[], nll.Windows]
    dev: nll.Windows | None


class TrialContext(NamedTuple):
    """What all arms of all seeds share.

    Attributes:
        models: Target, source and base.
        hparams: As the recipe says; the strength counts only if it is not chosen.
        spec: What moves and how.
        is_chosen: Whether every arm chooses its strength on the dev split.
        held_out: The held-out text, for the target.
        target: The target's scores on it.
        dtypes: Parameter path -> dtype in the files of the target, to which an arm is rounded.
        budget: How much each step takes up at a time.
    """

    models: Models
    hparams: HParams
    spec: MergeSpec
    is_chosen: bool
    held_out: nll.Windows
    target: nll.Scores
    dtypes: Mapping[str, Any]
    budget: Budget = BUDGET


def trial(
    context: TrialContext,
    stage: Stage,
    split: CalibrationSplit,
    merged: Merged,
    names: Sequence[str],
    *,
    arm: Arm | None = None,
) -> Trial:
    """Runs the controls of a merge, and scores the merge itself unless that is done.

    Args:
        context: What all arms share.
        stage: Keeps every arm, e.g. `ot_merge_jax.merging.merge.call`.
        split: Of the seed.
        merged: The merge of this seed; its parameters are not needed if ``arm`` is given.
        names: The controls that apply, of `controls.arms`.
        arm: The merge, if it was scored already.

    Returns:
        All arms.
    """
    arms = {"merge": arm or _arm(context, stage, "merge", lambda: merged)}
    choose = None
    if context.is_chosen and split.dev is not None:
        choose = functools.partial(_sweep, context, split.dev)
    for name in names:
        if name == "unigram":
            continue
        _LOG.info("control %s (seed %d)", name, split.seed)
        make = functools.partial(
            controls.remade, name, merged, context.models, split.batches, context.hparams,
            spec=context.spec, vocabulary=split.vocabulary, seed=split.seed,
            stage=stage, choose=choose, budget=context.budget,
        )  # fmt: skip
        arms[name] = _arm(context, stage, name, make)
    biased = {}
    if "unigram" in names:
        _LOG.info("control unigram (seed %d)", split.seed)
        target, strength = context.models.target, arms["merge"].strength
        params = {
            "target": lambda: target.params,
            "merge": lambda: _as_stored_merge(context, merged.transported, strength),
        }
        plain = {"target": context.target, "merge": arms["merge"].scores}
        biased = {
            name: _with_token_bias(context, stage, split, name, params[name], plain[name])
            for name in params
        }
    return Trial(split.seed, arms, biased)


def again(
    context: TrialContext, stage: Stage, split: CalibrationSplit, names: Sequence[str]
) -> Trial:
    """The trial of a further calibration seed: its merge and the controls of that merge.

    Args:
        context: What all arms share.
        stage: Keeps what belongs to this seed.
        split: Of this seed.
        names: The controls that apply.
    """
    choose = None
    if context.is_chosen and split.dev is not None:
        choose = sweep.chooser(
            stage, context.models.target, split.dev, context.hparams,
            spec=context.spec, logits_at_once=context.budget.logits,
        )  # fmt: skip
    merged = merge(
        context.models, split.batches, context.hparams,
        spec=context.spec, vocabulary=split.vocabulary, choose=choose, budget=context.budget,
        stage=given({"report": None}, stage),  # nobody reads its diagnostics
    )  # fmt: skip
    return trial(context, stage, split, merged, names)


def _sweep(context: TrialContext, dev: nll.Windows, transported: Transported) -> Choice:
    """The best strength on the dev split."""
    return sweep.sweep(
        context.models.target, transported, dev, context.hparams,
        spec=context.spec, logits_at_once=context.budget.logits,
    )  # fmt: skip


def _arm(context: TrialContext, stage: Stage, name: str, make: Callable[[], Merged]) -> Arm:
    """Scores what ``make`` returns, as a stage."""

    def compute() -> Arm:
        merged = make()
        strength = merged.choice.hparams.strength
        scores = context.target  # at strength 0 it is the target, bit for bit
        if fuse.is_moving(strength):
            params = as_stored(merged.params, context.dtypes)
            scores = nll.score(
                params, context.held_out,
                cfg=context.models.target.cfg, logits_at_once=context.budget.logits,
            )  # fmt: skip
        return Arm(strength, merged.choice.tried, scores)

    def save(folder: Path, compute: Callable[[], Arm]) -> None:
        arm = compute()
        summary = {"strength": arm.strength, "points": arm.points}
        arrays.save_json(folder / "arm.json", summary)
        saved_scores.save(folder / "scores", {"arm": arm.scores})

    def load(folder: Path) -> Arm:
        summary = arrays.load_json(folder / "arm.json")
        points = [Point(**point) for point in summary["points"]]
        return Arm(summary["strength"], points, saved_scores.load(folder / "scores")["arm"])

    return stage(f"arm-{name.replace(' ', '-')}", compute, save, load, needs=["moved"])


def _as_stored_merge(context: TrialContext, transported: Transported, strength: Any) -> Params:
    """The merged parameters as a file would hold them, in float32."""
    fused = fuse.fuse(
        context.models.target.params, transported.weights, strength,
        spec=context.spec, mask=transported.masks,
    )  # fmt: skip
    return as_stored(fused, context.dtypes)


def as_stored(params: Params, dtypes: Mapping[str, Any]) -> Params:
    """Parameters rounded to the dtypes of files, in their own dtypes.

    Args:
        params: Parameters.
        dtypes: Path -> dtype in the files, from `ot_merge_jax.io.hf.stored_dtypes`.
    """
    return specs.unflatten(
        {
            path: specs.get(params, path).astype(dtype).astype(specs.get(params, path).dtype)
            for path, dtype in dtypes.items()
        }
    )


def _with_token_bias(
    context: TrialContext,
    stage: Stage,
    split: CalibrationSplit,
    name: str,
    params: Callable[[], Params],
    plain: nll.Scores,
) -> WithTokenBias:
    """A model with the bias that is fitted to it."""

    def compute() -> WithTokenBias:
        cfg, model, budget = context.models.target.cfg, params(), context.budget
        assert split.dev is not None  # noqa: S101, for the type
        fitted = token_bias.fitted(
            model, split.train(), split.dev,
            cfg=cfg, predictions=budget.predictions, logits_at_once=budget.logits,
        )  # fmt: skip
        scores = plain
        if fitted.scale:
            scores = nll.score(
                model, context.held_out,
                cfg=cfg, bias=fitted.bias, logits_at_once=budget.logits,
            )  # fmt: skip
        return WithTokenBias(fitted.scale, scores)

    def save(folder: Path, compute: Callable[[], WithTokenBias]) -> None:
        biased = compute()
        arrays.save_json(folder / "gamma.json", biased.scale)
        saved_scores.save(folder / "scores", {"arm": biased.scores})

    def load(folder: Path) -> WithTokenBias:
        scale = arrays.load_json(folder / "gamma.json")
        return WithTokenBias(scale, saved_scores.load(folder / "scores")["arm"])

    return stage(f"bias-{name}", compute, save, load, needs=["moved"])


def pooled(scores: Sequence[nll.Scores]) -> nll.Scores:
    """Scores of one arm over several seeds: the mean loss of each document.

    Example:
        >>> count = np.array([2])
        >>> pooled([nll.Scores(np.array([x]), count, count) for x in (1.0, 3.0)]).nll
        array([2.])
    """
    return scores[0]._replace(nll=np.mean([of_seed.nll for of_seed in scores], 0))


def every_seed(trials: Sequence[Trial]) -> Mapping[str, Sequence[tuple[nll.Scores, nll.Scores]]]:
    """For each control that ran, (merge, control) of every seed; in ``unigram`` each has a bias."""
    pairs = {
        name: [(of_seed.arms["merge"].scores, of_seed.arms[name].scores) for of_seed in trials]
        for name in trials[0].arms
        if name != "merge"
    }
    if trials[0].biased:
        pairs["unigram"] = [
            (of_seed.biased["merge"].scores, of_seed.biased["target"].scores) for of_seed in trials
        ]
    return pairs
