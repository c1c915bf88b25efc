"""What an adaptation writes beside the model: card, recipe, report, events, residual, hashes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ot_merge_jax.errors import InputError, VersionError
from ot_merge_jax.evaluation.statistics import MeanDifference
from ot_merge_jax.io import arrays
from ot_merge_jax.io.folder import ModelFolder
from ot_merge_jax.reports import html, model_card, schema
from ot_merge_jax.reports.schema import Report
from ot_merge_jax.runs import artifacts, provenance
from ot_merge_jax.training import initial
from ot_merge_jax.training.initial import Parts, Start


def write(
    folder: Path,
    *,
    begun: Start,
    folders: Mapping[str, ModelFolder],
    settings: str,
    seed: int,
    parts: Parts,
    report: Report,
    events: Sequence[str],
    side: Mapping[str, Any],
    began: float,
) -> None:
    """Writes the details of an adaptation into the folder of its model.

    Of two runs with the same inputs only the times in ``events.jsonl`` and ``provenance.json``
    differ, and the peak of memory; and the lines of ``report.html`` that show them.

    Args:
        folder: Holds the model.
        begun: Where the training started.
        folders: Role -> model folder.
        settings: Of the adaptation, as YAML.
        seed: Of every random choice.
        parts: The trained base and the residual that was held constant.
        report: What ``report.json`` holds.
        events: Lines of ``events.jsonl``.
        side: ``run`` (the key), ``command``, and what `artifacts.inputs` returned.
        began: ``time.monotonic()`` when this process began.
    """
    inside = folder / "ot_merge"
    inside.mkdir()
    text = provenance.public(settings)
    command = provenance.public(side["command"])
    (inside / "recipe.yaml").write_text(text, encoding="utf-8")
    (inside / "events.jsonl").write_text("".join(events), encoding="utf-8")
    initial.save_residual(inside, begun, parts)
    (inside / "report.json").write_text(report.to_json(), encoding="utf-8")
    (folder / "README.md").write_text(
        model_card.model_card(
            name=begun.folder.name,
            models={role: (model.path, model.origin) for role, model in folders.items()},
            verdict=report.verdict,
            evaluation=model_card.losses(report.evaluation),
            command=command,
            recipe=text,
            relation="finetune",
        ),
        encoding="utf-8",
    )
    whole = {
        **side,
        "command": command,
        "recipe_sha256": provenance.sha256(inside / "recipe.yaml"),
        "seed": seed,
        "evaluation": report.to_dict()["evaluation"],
        "output": provenance.file_hashes(folder, artifacts.FILES),
        "wall_seconds": round(time.monotonic() - began, 2),
        **provenance.environment(),
    }
    arrays.save_json(inside / "provenance.json", whole)
    html.write(inside)


def read(folder: Path, run_key: str) -> Report | None:
    """The report of a published folder, if it is the unchanged result of the run of this key.

    Raises:
        VersionError: if it is, and a later version of this program wrote the report.
    """
    inside = folder / "ot_merge"
    try:
        side = arrays.load_json(inside / "provenance.json")
        if side["run"] != run_key or any(
            provenance.sha256(folder / name) != digest for name, digest in side["output"].items()
        ):
            return None
        return schema.read(inside / "report.json")
    except VersionError:
        raise
    except (InputError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # the folder may contain anything


def verdict(change: MeanDifference | None, *, steps: int) -> str:
    """One sentence about the result of an adaptation.

    Args:
        change: After minus before on held-out text, or None if there was none.
        steps: Steps that were taken.

    Returns:
        A line of plain text.

    Example:
        >>> verdict(None, steps=9)
        'adapted by 9 steps; not evaluated (no held-out text was given).'
    """
    done = f"adapted by {steps} steps" if steps else "folded without training"
    if change is None:
        return f"{done}; not evaluated (no held-out text was given)."
    amount = (
        f"{change.difference:+.4f} nats per token, 95 % interval "
        f"[{change.low:+.4f}, {change.high:+.4f}]"
    )
    if change.low > 0:
        return f"worse than before on held-out text: {amount}."
    if change.high < 0:
        return f"better than before on held-out text: {amount}; no baselines were run."
    return f"no measurable difference from before on held-out text: {amount}."
