"""The folder that a run leaves, as the reports read it: report, provenance and recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ot_merge_jax.errors import InputError
from ot_merge_jax.reports import schema
from ot_merge_jax.reports.schema import Number, Part, Report


class OriginRecord(Part):
    """Where on the hub something comes from."""

    repo: str
    revision: str | None = None
    commit: str | None = None
    split: str | None = None


class AdapterRecord(Part):
    """Weights that were merged into a model when it was read."""

    hub: OriginRecord | None = None
    files: Mapping[str, str] = {}


class ModelRecord(AdapterRecord):
    """A model folder that the run read."""

    name: str
    adapter: AdapterRecord | None = None


class TextFile(Part):
    """A file of texts."""

    name: str
    sha256: str


class Texts(Part):
    """Texts that the run read."""

    hub: OriginRecord | None = None
    files: Sequence[TextFile] = []


class Provenance(Part):
    """``provenance.json``."""

    run: str = ""
    command: str = ""
    inputs: Mapping[str, ModelRecord] = {}
    texts: Mapping[str, Texts] = {}
    seed: int | None = None
    output: Mapping[str, str] = {}
    packages: Mapping[str, str] = {}
    python: str = ""
    devices: Sequence[str] = []
    precision: str = ""
    wall_seconds: Number = None
    peak_memory_bytes: Number = None


class RunRecord(NamedTuple):
    """A run as read from its folder."""

    report: Report
    provenance: Provenance
    recipe: str


def details_of(folder: Path) -> Path:
    """The folder with the details of a run.

    Args:
        folder: What the run wrote, or the ``ot_merge`` inside it.

    Returns:
        The folder that holds ``report.json``.

    Raises:
        InputError: if there is no run.
    """
    for details in (folder / "ot_merge", folder):
        if (details / "report.json").is_file():
            return details
    raise InputError(
        f"{folder} is not a run: there is no ot_merge/report.json in it; name a folder that "
        "`ot-merge run` wrote."
    )


def read(details: Path) -> RunRecord:
    """Reads the details of a run.

    Args:
        details: Holds ``report.json``, ``provenance.json`` and ``recipe.yaml``.

    Raises:
        InputError: if a file is missing, damaged, or of another shape.
        VersionError: if the report is of a later version.
    """
    provenance = details / "provenance.json"
    return RunRecord(
        schema.read(details / "report.json"),
        schema.checked(provenance, schema.parsed(provenance), Provenance),
        schema.text_of(details / "recipe.yaml"),
    )
