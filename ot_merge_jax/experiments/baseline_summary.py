"""What training a merge and its baselines at equal budget showed, as a part of its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ot_merge_jax.evaluation.nll import Scores
from ot_merge_jax.experiments.summary import against
from ot_merge_jax.experiments.trial import pooled
from ot_merge_jax.experiments.verdict import Compared, of_training
from ot_merge_jax.reports import schema


class ArmOutcome(NamedTuple):
    """A start that was trained with one seed.

    Attributes:
        seed: Of the data's order and the dev split.
        rate: The learning rate that was best on the dev split.
        tried: ``(rate, dev loss at the end)`` of every rate; None if it diverged.
        losses: The minimised loss of every step at that rate.
        dev: ``(steps done, dev loss)`` at that rate.
        scores: Of the trained model on the held-out text.
    """

    seed: int
    rate: float
    tried: list[tuple[float, float | None]]
    losses: list[float]
    dev: list[tuple[int, float]]
    scores: Scores


class Comparison(NamedTuple):
    """What a comparison says in its report, each named as there."""

    verdict: str
    outcome: str
    warnings: list[str]
    objective: str
    baselines: schema.Baselines


#: Objective -> start -> an outcome for each seed.
Outcomes = Mapping[str, Mapping[str, Sequence[ArmOutcome]]]


def summary(
    arms: Outcomes,
    *,
    seed: int,
    rates: Sequence[float],
    best: str,
    missing: Sequence[str],
    not_applicable: Mapping[str, str],
) -> Comparison:
    """What the arms showed.

    Args:
        arms: Every arm, ``merge`` and ``base`` among the starts.
        seed: Of the bootstrap.
        rates: Those that every arm tried.
        best: The objective of the merge that is published.
        missing: Starts that apply and were not requested.
        not_applicable: Start -> why it does not apply.
    """
    compared = {
        objective: {
            name: against(_pairs(of_name["merge"], of_name[name]), seed=seed)
            for name in of_name
            if name != "merge"
        }
        for objective, of_name in arms.items()
    }
    steps = len(arms[best]["merge"][0].losses)
    verdict = of_training(compared, best=best, steps=steps, missing=missing)
    trained = {
        objective: {
            name: _arm(outcomes, of_name["merge"], compared[objective].get(name))
            for name, outcomes in of_name.items()
        }
        for objective, of_name in arms.items()
    }
    return Comparison(
        verdict.sentence,
        verdict.outcome,
        _warnings(arms),
        best,
        schema.Baselines(
            best=best,
            steps=steps,
            seeds=[outcome.seed for outcome in arms[best]["merge"]],
            rates=list(rates),
            not_run=[] if "kd" in arms else ["kd: it needs --source, a teacher"],
            not_applicable=dict(not_applicable),
            arms=trained,
        ),
    )


def _pairs(
    first: Sequence[ArmOutcome], second: Sequence[ArmOutcome]
) -> list[tuple[Scores, Scores]]:
    """Scores of two arms, seed by seed."""
    return [(left.scores, right.scores) for left, right in zip(first, second, strict=True)]


def _arm(
    outcomes: Sequence[ArmOutcome], merge: Sequence[ArmOutcome], compared: Compared | None
) -> schema.Trained:
    """One arm; ``compared`` is the merge minus it, None for the merge itself."""
    own, of_merge = curve(outcomes), curve(merge)
    minus = None
    if compared is not None:
        seeds = [
            schema.Difference(seed=outcome.seed, **change._asdict())
            for outcome, change in zip(outcomes, compared.seeds, strict=True)
        ]
        minus = schema.Minus(metric="nll_per_token", **compared.pooled._asdict(), seeds=seeds)
    return schema.Trained(
        **pooled([outcome.scores for outcome in outcomes]).totals,
        rate=outcomes[0].rate,
        tried=[schema.Rate(rate=rate, loss=loss) for rate, loss in outcomes[0].tried],
        curve=[list(point) for point in own],
        merge_minus=minus,
        merge_steps=None if compared is None else steps_to(of_merge, own[-1][1]),
    )


def curve(outcomes: Sequence[ArmOutcome]) -> list[tuple[int, float]]:
    """The dev loss by step, the mean over seeds."""
    means = np.mean([[loss for _, loss in outcome.dev] for outcome in outcomes], 0)
    return [(step, float(mean)) for (step, _), mean in zip(outcomes[0].dev, means, strict=True)]


def steps_to(points: Sequence[tuple[int, float]], loss: float) -> int | None:
    """Steps at the first evaluation that is at or below a loss; None if there is none.

    Example:
        >>> steps_to([(0, 3.0), (10, 2.0)], 2.5), steps_to([(0, 3.0)], 2.5)
        (10, None)
    """
    return next((step for step, reached in points if reached <= loss), None)


def _warnings(arms: Outcomes) -> list[str]:
    """Arms whose best rate lies at an edge of the grid: a better one may lie outside."""
    sentences = []
    for objective, of_name in arms.items():
        for name, (first, *_) in of_name.items():
            rates = [rate for rate, _ in first.tried]
            if len(rates) > 1 and first.rate in (min(rates), max(rates)):
                end = "highest" if first.rate == max(rates) else "lowest"
                sentences.append(
                    f"{objective} from {name} was best at the {end} rate that was tried "
                    f"({first.rate:g}); widen the grid with --rates."
                )
    return sentences
