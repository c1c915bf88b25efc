"""The numbers of a run, and what its controls showed, as parts of its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ot_merge_jax.evaluation.nll import Scores
from ot_merge_jax.evaluation.statistics import paired_bootstrap
from ot_merge_jax.experiments import controls
from ot_merge_jax.experiments.trial import Trial, every_seed, pooled
from ot_merge_jax.experiments.verdict import Compared, Verdict, judge
from ot_merge_jax.io.arrays import plain
from ot_merge_jax.recipes.recipe import CONTROLS
from ot_merge_jax.reports import schema
from ot_merge_jax.types import MergeReport, Point

_METRIC = "nll_per_token"  # all of them have the target's tokenizer


def weights(report: MergeReport) -> dict[str, schema.Weight]:
    """Diagnostics of every moved weight, an entry for each layer."""
    return {
        name: schema.Weight.model_validate(plain(weight)) for name, weight in report.weights.items()
    }


def tried(points: Sequence[Point]) -> list[schema.Tried]:
    """The strengths that were tried on the dev split."""
    return [schema.Tried(strength=point.strength, loss=point.loss) for point in points]


def compared(
    scores: Mapping[str, Scores],
    *,
    has_one_tokenizer: Mapping[str, bool],
    seed: int,
) -> dict[str, schema.Entry]:
    """Loss of every model on the held-out text, and its difference from the target.

    Args:
        scores: Name -> scores; must hold ``target``.
        has_one_tokenizer: Name -> whether its tokenizer is the target's; if not, only bits per byte
            are compared.
        seed: Of the bootstrap.
    """
    result = {}
    for name, of_model in scores.items():
        difference: dict[str, Any] = {}
        if name != "target":
            metric = "nll_per_token" if has_one_tokenizer[name] else "bits_per_byte"
            change = paired_bootstrap(of_model, scores["target"], metric=metric, seed=seed)
            difference["against_target"] = schema.Difference(metric=metric, **change._asdict())
        result[name] = schema.Entry(**of_model.totals, **difference)
    return result


class Controlled(NamedTuple):
    """What several calibration seeds and the controls showed, each named as in the report.

    Attributes:
        seeds: Of the calibration.
        pooled: Merge minus target over all of them.
        per_seed: Seed, strength and merge minus target of each.
        controls: Every one that was requested. ``strength`` is that of the first seed,
            ``against_target`` is control minus target, ``seeds`` is merge minus control for each
            seed; for ``unigram``, ``beyond`` is merge minus target, each with its own bias.
    """

    seeds: list[int]
    pooled: schema.Difference
    per_seed: list[schema.Difference]
    controls: dict[str, schema.Entry]


def against(pairs: Sequence[tuple[Scores, Scores]], *, seed: int) -> Compared:
    """First minus second of every pair, and of all of them together.

    Args:
        pairs: Scores of the same documents, a pair for each calibration seed.
        seed: Of the bootstrap.
    """
    seeds, documents = [paired_bootstrap(*pair, seed=seed) for pair in pairs], len(pairs[0][0].nll)
    if len(seeds) == 1:
        return Compared(seeds[0], seeds, documents)
    first, second = (pooled(side) for side in zip(*pairs, strict=True))
    return Compared(paired_bootstrap(first, second, seed=seed), seeds, documents)


def outcome(
    trials: Sequence[Trial],
    target: Scores,
    *,
    kinds: Sequence[str],
    inapplicable: Mapping[str, str],
    seed: int,
) -> tuple[Verdict, Compared, Controlled]:
    """The verdict of several calibration seeds, merge minus target, and what the controls showed.

    Args:
        trials: Of every calibration seed.
        target: The target's scores on the held-out text.
        kinds: The controls that were requested, as a recipe names them.
        inapplicable: Control -> why it does not apply.
        seed: Of the bootstrap.
    """
    merge = against([(trial.arms["merge"].scores, target) for trial in trials], seed=seed)
    changes = {name: against(pairs, seed=seed) for name, pairs in every_seed(trials).items()}
    # what does not apply cannot fail, except the gain beyond unigram, which the rule requires
    has_beyond = "unigram" in changes
    missing = [
        name for name in CONTROLS if name not in kinds or (name == "unigram" and not has_beyond)
    ]
    entries = {
        name: schema.Entry(not_applicable=inapplicable[name])
        if name in inapplicable
        else _control(name, trials, target, changes[name], seed=seed)
        for name in controls.arms(kinds)
    }
    per_seed = [
        schema.Difference(
            seed=trial.seed, **change._asdict(), strength=trial.arms["merge"].strength
        )
        for trial, change in zip(trials, merge.seeds, strict=True)
    ]
    pooled_change = schema.Difference(metric=_METRIC, **merge.pooled._asdict())
    shown = Controlled([trial.seed for trial in trials], pooled_change, per_seed, entries)
    return judge(merge, changes, missing=missing), merge, shown


def _control(
    name: str, trials: Sequence[Trial], target: Scores, of_merge: Compared, *, seed: int
) -> schema.Entry:
    """A control that applies; ``of_merge`` is the merge minus it."""
    own = [control for _, control in every_seed(trials)[name]]
    change = against([(scores, target) for scores in own], seed=seed).pooled
    shared: dict[str, Any] = {
        **pooled(own).totals,
        "against_target": schema.Difference(metric=_METRIC, **change._asdict()),
    }
    minus = {"metric": _METRIC, **of_merge.pooled._asdict()}
    seeds = [
        schema.Difference(seed=trial.seed, **change._asdict())
        for trial, change in zip(trials, of_merge.seeds, strict=True)
    ]
    if name == "unigram":
        gamma = {role: biased.scale for role, biased in trials[0].biased.items()}
        beyond = schema.Beyond(**minus, seeds=seeds, merge_gamma=gamma["merge"])
        return schema.Entry(**shared, gamma=gamma["target"], beyond=beyond)
    arm = trials[0].arms[name]
    return schema.Entry(
        **shared,
        strength=schema.Strength(chosen=arm.strength, tried=tried(arm.points)),
        merge_minus_control=schema.Difference(**minus),
        seeds=seeds,
    )
