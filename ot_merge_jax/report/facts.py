"""The numbers of a run as parts of its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ot_merge_jax.evaluate import compare
from ot_merge_jax.evaluate.nll import Scores
from ot_merge_jax.io.checkpoint import plain
from ot_merge_jax.report import schema
from ot_merge_jax.types import MergeReport, Point


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
            change = compare.paired_bootstrap(of_model, scores["target"], metric=metric, seed=seed)
            difference["against_target"] = schema.Difference(metric=metric, **change._asdict())
        result[name] = schema.Entry(**of_model.totals, **difference)
    return result
