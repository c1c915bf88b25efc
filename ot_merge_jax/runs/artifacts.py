"""What a run writes beside the model: README.md, and ``ot_merge/`` with report and provenance."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ot_merge_jax.data.sources import Source
from ot_merge_jax.errors import InputError, VersionError
from ot_merge_jax.io import arrays, hub, peft
from ot_merge_jax.io.folder import ModelFolder
from ot_merge_jax.reports import html, model_card, schema
from ot_merge_jax.reports.schema import Report
from ot_merge_jax.runs import provenance
from ot_merge_jax.types import Coupling, MergeReport, WeightReport

#: Every file of a model folder that decides what a run writes.
FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*")
#: Fields of a site that go into the provenance.
_TRANSPORT = ("largest_error", "most_iterations", "converged", "in_log_form")


def inputs(folders: Mapping[str, ModelFolder], sources: Mapping[str, Source]) -> dict[str, Any]:
    """Names and hashes of everything a run reads, for the provenance.

    Args:
        folders: Role -> model folder.
        sources: ``calibration`` and ``evaluation`` -> where the text comes from.
    """
    return {
        "inputs": {
            role: {
                "name": model.name,
                "hub": model.origin and model.origin._asdict(),
                "files": provenance.file_hashes(model.path, FILES),
                "adapter": model.adapter
                and {
                    "hub": model.adapter.origin and model.adapter.origin._asdict(),
                    "files": provenance.file_hashes(
                        model.adapter.path, (peft.CONFIG, peft.WEIGHTS, "README.md")
                    ),
                },
            }
            for role, model in folders.items()
        },
        "texts": {
            name: {
                "hub": text.origin and {**text.origin._asdict(), "split": text.split},
                "files": [
                    {"name": file.name, "sha256": provenance.sha256(file)} for file in text.files
                ],
            }
            for name, text in sources.items()
        },
    }


def write(
    folder: Path,
    *,
    settings: str,
    seed: int,
    folders: Mapping[str, ModelFolder],
    coupling: Coupling | None,
    report: Report,
    side: Mapping[str, Any],
    started: float,
) -> None:
    """Writes the details of a run into the folder of its model.

    Of two runs with the same inputs only ``wall_seconds`` and ``peak_memory_bytes`` in
    ``provenance.json`` differ, and the lines of ``report.html`` that show them.

    Args:
        folder: Holds the model.
        settings: The resolved recipe, as YAML.
        seed: Of every random choice.
        folders: Role -> model folder.
        coupling: Of the merge; None when only the vocabulary moved.
        report: What ``report.json`` holds.
        side: ``run`` (the key), ``command``, and what `inputs` returned.
        started: ``time.monotonic()`` when this process began.
    """
    details = folder / "ot_merge"
    details.mkdir()
    text = provenance.public(settings)
    command = provenance.public(side["command"])
    (details / "recipe.yaml").write_text(text, encoding="utf-8")
    if coupling is not None:
        arrays.save_coupling(details / "coupling", coupling)
    (details / "report.json").write_text(report.to_json(), encoding="utf-8")
    (folder / "README.md").write_text(
        model_card.model_card(
            name=" + ".join(folders[role].name for role in ("target", "source")),
            models=_by_role(folders),
            verdict=report.verdict,
            evaluation=model_card.losses(report.evaluation),
            command=command,
            recipe=text,
        ),
        encoding="utf-8",
    )
    whole = {
        **side,
        "command": command,
        "recipe_sha256": provenance.sha256(details / "recipe.yaml"),
        "calibration": report.calibration,
        "seed": seed,
        "transport": {
            site: diagnostics.model_dump(include=set(_TRANSPORT))
            for site, diagnostics in report.sites.items()
        },
        "evaluation": report.to_dict()["evaluation"],
        "output": provenance.file_hashes(folder, FILES),
        "wall_seconds": round(time.monotonic() - started, 2),
        **provenance.environment(),
    }
    arrays.save_json(details / "provenance.json", whole)
    html.write(details)


def _by_role(folders: Mapping[str, ModelFolder]) -> dict[str, tuple[Path, hub.Origin | None]]:
    """Role -> folder and origin, adapters with a role of their own."""
    models = {}
    for role, folder in folders.items():
        models[role] = (folder.path, folder.origin)
        if folder.adapter is not None:
            models[f"{role}'s adapter"] = (folder.adapter.path, folder.adapter.origin)
    return models


def read(folder: Path, run_key: str) -> tuple[Report, MergeReport] | None:
    """The report of a published folder, if it is the unchanged result of the run of this key.

    Args:
        folder: Any path; it may not exist.
        run_key: From `stages.key`.

    Returns:
        The report and the diagnostics; None if the folder is something else.

    Raises:
        VersionError: if it is that run, and a later version of this program wrote the report.
    """
    details = folder / "ot_merge"
    try:
        side = arrays.load_json(details / "provenance.json")
        if side["run"] != run_key or any(
            provenance.sha256(folder / name) != digest for name, digest in side["output"].items()
        ):
            return None
        report = schema.read(details / "report.json")
        weights = {name: _arrays(weight) for name, weight in report.weights.items()}
        has_coupling = (details / "coupling").exists()
        coupling = arrays.load_coupling(details / "coupling") if has_coupling else None
        rows = report.calibration["rows"] if has_coupling else 0
    except VersionError:
        raise
    except (InputError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # the folder may contain anything
    return report, MergeReport(weights, coupling, rows)


def _arrays(weight: schema.Weight) -> WeightReport:
    """The diagnostics of a weight; TypeError if some are missing."""
    diagnostics = weight.model_dump(exclude_unset=True)
    return WeightReport(**{key: np.array(values) for key, values in diagnostics.items()})  # pyright: ignore[reportArgumentType]
