"""What training a merge and its baselines at equal budget showed, as plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ot_merge_jax.evaluate.nll import Scores
from ot_merge_jax.report.arms import against
from ot_merge_jax.report.verdict import Compared, of_training
from ot_merge_jax.trials import pooled


class Outcome(NamedTuple):
    """A start that was trained with one seed.

    Attributes:
        seed: Of the data's order and the dev split.
        rate: The learning rate that was best on the dev split.
        tried: ``(rate, dev loss at the end)`` of every rate; None if it diverged.
        losses: Of every step at that rate, in what is minimised.
        dev: ``(steps done, dev loss)`` at that rate.
        scores: Of the trained model on the held-out text.
    """

    seed: int
    rate: float
    tried: list[tuple[float, float | None]]
    losses: list[float]
    dev: list[tuple[int, float]]
    scores: Scores


#: Objective -> start -> an outcome for each seed.
Outcomes = Mapping[str, Mapping[str, Sequence[Outcome]]]


def facts(
    found: Outcomes,
    *,
    settings: Any,
    best: str,
    missing: Sequence[str],
    not_applicable: Mapping[str, str],
) -> dict[str, Any]:
    """What the arms showed.

    Args:
        found: Every arm, ``merge`` and ``base`` among the starts.
        settings: The adaptation's.
        best: The objective of the merge that is published.
        missing: Starts that apply and were not asked for.
        not_applicable: Start -> why it does not apply.

    Returns:
        Of the report: ``verdict``, ``outcome``, ``warnings``, ``objective`` and ``baselines``. The
        last holds ``arms``: objective -> start -> totals on the held-out text, the chosen ``rate``
        and the ``tried``, the ``curve`` of the dev loss (mean over seeds), ``merge_minus`` (with
        ``seeds``), and ``merge_steps``: after how many steps the merge's curve is at or below this
        arm's last point, None if never.
    """
    compared = {
        objective: {
            name: against(_pairs(of_name["merge"], of_name[name]), seed=settings.seed)
            for name in of_name
            if name != "merge"
        }
        for objective, of_name in found.items()
    }
    steps = len(found[best]["merge"][0].losses)
    verdict = of_training(compared, best=best, steps=steps, missing=missing)
    arms = {
        objective: {
            name: _arm(outcomes, of_name["merge"], compared[objective].get(name))
            for name, outcomes in of_name.items()
        }
        for objective, of_name in found.items()
    }
    return {
        "verdict": verdict.sentence,
        "outcome": verdict.outcome,
        "objective": best,
        "warnings": _warnings(found),
        "baselines": {
            "best": best,
            "steps": steps,
            "seeds": [one.seed for one in found[best]["merge"]],
            "rates": settings.grid,
            "not_run": [] if "kd" in found else ["kd: it needs --source, a teacher"],
            "not_applicable": dict(not_applicable),
            "arms": arms,
        },
    }


def _pairs(first: Sequence[Outcome], second: Sequence[Outcome]) -> list[tuple[Scores, Scores]]:
    """Scores of two arms, seed by seed."""
    return [(one.scores, other.scores) for one, other in zip(first, second, strict=True)]


def _arm(
    outcomes: Sequence[Outcome], merge: Sequence[Outcome], compared: Compared | None
) -> dict[str, Any]:
    """One arm."""
    own, of_merge = curve(outcomes), curve(merge)
    change = None
    if compared is not None:
        seeds = [
            {"seed": one.seed, **found._asdict()}
            for one, found in zip(outcomes, compared.seeds, strict=True)
        ]
        change = {"metric": "nll_per_token", **compared.pooled._asdict(), "seeds": seeds}
    return {
        **pooled([one.scores for one in outcomes]).totals,
        "rate": outcomes[0].rate,
        "tried": [{"rate": rate, "loss": loss} for rate, loss in outcomes[0].tried],
        "curve": own,
        "merge_minus": change,
        "merge_steps": None if compared is None else steps_to(of_merge, own[-1][1]),
    }


def curve(outcomes: Sequence[Outcome]) -> list[tuple[int, float]]:
    """The dev loss by step, the mean over seeds."""
    means = np.mean([[loss for _, loss in one.dev] for one in outcomes], 0)
    return [(step, float(mean)) for (step, _), mean in zip(outcomes[0].dev, means, strict=True)]


def steps_to(points: Sequence[tuple[int, float]], loss: float) -> int | None:
    """Steps at the first evaluation that is at or below a loss; None if there is none.

    Example:
        >>> steps_to([(0, 3.0), (10, 2.0)], 2.5), steps_to([(0, 3.0)], 2.5)
        (10, None)
    """
    return next((step for step, found in points if found <= loss), None)


def _warnings(found: Outcomes) -> list[str]:
    """Arms whose best rate lies at an edge of the grid: a better one may lie outside."""
    sentences = []
    for objective, of_name in found.items():
        for name, (first, *_) in of_name.items():
            rates = [rate for rate, _ in first.tried]
            if len(rates) > 1 and first.rate in (min(rates), max(rates)):
                end = "highest" if first.rate == max(rates) else "lowest"
                sentences.append(
                    f"{objective} from {name} was best at the {end} rate that was tried "
                    f"({first.rate:g}); widen the grid with --rates."
                )
    return sentences
