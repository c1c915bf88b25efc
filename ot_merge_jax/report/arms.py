"""What the controls of a run showed, as plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ot_merge_jax.evaluate.compare import Difference, paired_bootstrap
from ot_merge_jax.evaluate.nll import Scores
from ot_merge_jax.recipe import CONTROLS
from ot_merge_jax.report.verdict import Compared, Verdict, judge
from ot_merge_jax.trials import Trial, every_seed, pooled

_METRIC = {"metric": "nll_per_token"}  # all of them have the target's tokenizer


def against(pairs: Sequence[tuple[Scores, Scores]], *, seed: int) -> Compared:
    """First minus second of every pair, and of all of them together.

    Args:
        pairs: Scores of the same documents, a pair for each calibration seed.
        seed: Of the bootstrap.
    """
    seeds, documents = [paired_bootstrap(*one, seed=seed) for one in pairs], len(pairs[0][0].nll)
    if len(seeds) == 1:
        return Compared(seeds[0], seeds, documents)
    first, second = (pooled(side) for side in zip(*pairs, strict=True))
    return Compared(paired_bootstrap(first, second, seed=seed), seeds, documents)


def outcome(
    trials: Sequence[Trial],
    target: Scores,
    reasons: Mapping[str, str | None],
    *,
    asked: Sequence[str],
    seed: int,
) -> tuple[Verdict, Compared, dict[str, Any]]:
    """The verdict of several calibration seeds, merge minus target, and `facts`.

    Args:
        trials: Of every calibration seed.
        target: The target's scores on the held-out text.
        reasons: Every control that was asked for -> why it does not apply, or None.
        asked: The kinds of control that were asked for.
        seed: Of the bootstrap.
    """
    merge = against([(one.arms["merge"].scores, target) for one in trials], seed=seed)
    found = {name: against(pairs, seed=seed) for name, pairs in every_seed(trials).items()}
    # what does not apply cannot fail, but for the gain beyond unigram, which the rule asks for
    has_beyond = "unigram" in found
    missing = [
        name for name in CONTROLS if name not in asked or (name == "unigram" and not has_beyond)
    ]
    measured = judge(merge, found, missing=missing)
    return measured, merge, facts(trials, target, merge, found, reasons, seed=seed)


def facts(
    trials: Sequence[Trial],
    target: Scores,
    merge: Compared,
    found: Mapping[str, Compared],
    reasons: Mapping[str, str | None],
    *,
    seed: int,
) -> dict[str, Any]:
    """What several calibration seeds and the controls showed.

    Args:
        trials: Of every calibration seed.
        target: The target's scores on the held-out text.
        merge: Merge minus target.
        found: Merge minus every control.
        reasons: Every control that was asked for -> why it does not apply, or None.
        seed: Of the bootstrap.

    Returns:
        ``seeds``; ``pooled``: merge minus target over all of them; ``per_seed``: seed, strength and
        merge minus target of each; ``controls``: for every one that was asked for
        ``{"not_applicable": why}``, or totals, ``strength`` (of the first seed), ``against_target``
        (control minus target), ``merge_minus_control`` and ``seeds`` (the same of each); of
        ``unigram`` instead ``gamma`` and ``beyond``: merge and target with a bias each.
    """
    every = every_seed(trials)
    controlled: dict[str, Any] = {}
    for name, why in reasons.items():
        if why is not None:
            controlled[name] = {"not_applicable": why}
            continue
        alone = [control for _, control in every[name]]
        change = against([(one, target) for one in alone], seed=seed).pooled
        shared = {**pooled(alone).totals, "against_target": {**_METRIC, **change._asdict()}}
        of_merge = {**_METRIC, **found[name].pooled._asdict()}
        seeds = _by_seed(trials, found[name].seeds)
        if name == "unigram":
            gammas = {role: one.gamma for role, one in trials[0].biased.items()}
            beyond = {**of_merge, "seeds": seeds, "merge_gamma": gammas["merge"]}
            controlled[name] = {**shared, "gamma": gammas["target"], "beyond": beyond}
            continue
        arm = trials[0].arms[name]
        strength = {"chosen": arm.strength, "tried": arm.points}
        own = {"strength": strength, "merge_minus_control": of_merge, "seeds": seeds}
        controlled[name] = {**shared, **own}
    per_seed = [
        {**fact, "strength": one.arms["merge"].strength}
        for one, fact in zip(trials, _by_seed(trials, merge.seeds), strict=True)
    ]
    seeds = [one.seed for one in trials]
    whole = {**_METRIC, **merge.pooled._asdict()}
    return {"seeds": seeds, "pooled": whole, "per_seed": per_seed, "controls": controlled}


def _by_seed(trials: Sequence[Trial], changes: Sequence[Difference]) -> list[dict[str, Any]]:
    """The difference of every calibration seed."""
    return [
        {"seed": one.seed, **change._asdict()} for one, change in zip(trials, changes, strict=True)
    ]
