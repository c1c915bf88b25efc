"""What a run folder tells: the shape of its JSON files, read and checked. Imports errors only.

What an older run does not have is optional; what is there must be of the right kind. Keys that
nobody here reads are left out.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ValidationError,
    model_validator,
)

from ot_merge_jax.errors import InputError
from ot_merge_jax.redaction import visible

_MAX_BYTES = 200_000_000
_T = TypeVar("_T", bound="Part")


def _finite(value: Any) -> Any:
    """A float that is not finite is no value."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rectangular(rows: list[list[Any]]) -> list[list[Any]]:
    """Rows of one length, and at least one value."""
    if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError("is not a table of at least one value")
    return rows


Number = Annotated[float | None, BeforeValidator(_finite)]
Grid = Annotated[list[list[Number]], AfterValidator(_rectangular)]
#: One number, or one for each group of weights.
Strengths = float | dict[str, float]


class Part(BaseModel):
    """A JSON object; a key without a value is a key that is not there."""

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: one for key, one in value.items() if one is not None}
        return value


class Difference(Part):
    """A difference with its 95 % interval; ``seed`` if it is that of one calibration seed."""

    metric: str = "nll_per_token"
    difference: Number = None
    low: Number = None
    high: Number = None
    seed: int | None = None
    strength: Strengths | None = None


class Beyond(Difference):
    """What a merge gains when both it and the target have a bias of their own for each token."""

    merge_gamma: Number = None
    seeds: list[Difference] = []


class Tried(Part):
    """One strength and the loss on the dev split."""

    strength: Strengths
    loss: Number = None


class Split(Part):
    """Where the strengths were compared."""

    dev_documents: int | None = None
    train_documents: int | None = None
    fraction: Number = None
    seed: int | None = None


class Strength(Part):
    """The strengths that were compared, and the one that was taken."""

    chosen: Strengths | None = None
    tried: list[Tried] = []
    split: Split | None = None


class Entry(Part):
    """A model or a control on the held-out text."""

    not_applicable: str | None = None
    documents: int | None = None
    tokens: int | None = None
    nll_per_token: Number = None
    bits_per_byte: Number = None
    kl_to_base: Number = None
    gamma: Number = None
    strength: Strength | None = None
    against_target: Difference | None = None
    against_before: Difference | None = None
    merge_minus_control: Difference | None = None
    seeds: list[Difference] = []
    beyond: Beyond | None = None


class Weight(Part):
    """Diagnostics of a moved weight, a value for each layer; of a vocabulary table only one."""

    ratio_transported: list[Number] = []
    ratio_change: list[Number] = []
    source_layer: list[int] = []
    neighbours_out: list[Number] = []
    neighbours_in: list[Number] = []
    error: list[Number] = []
    iterations: list[Number] = []
    converged: list[bool] = []

    @property
    def is_by_token(self) -> bool:
        """Whether it moved by the vocabulary map: no layer of the source stands behind it."""
        return not any(layer >= 0 for layer in self.source_layer)


class Curve(Part):
    """Share of a plan's mass in its ``k`` largest entries, a row for each target layer."""

    k: list[int]
    share: Grid

    @model_validator(mode="after")
    def _check(self) -> Curve:
        if len(self.k) != len(self.share[0]) or min(self.k) < 1:
            raise ValueError("k and share do not belong together")
        return self


class Site(Part):
    """Diagnostics of a site: rows are target layers, columns source layers."""

    layer_plan: Grid
    mass_curve: Curve | None = None
    r2: list[Number] = []
    r2_permuted: list[Number] = []
    sorted_heat: Grid | None = None


class Continuation(Part):
    """What a model wrote."""

    text: str
    ended: bool = False


class Sample(Part):
    """A prompt, and what every model made of it."""

    prompt: str
    continuations: dict[str, Continuation] = {}


class Minus(Difference):
    """The merge minus another start, both trained."""

    seeds: list[Difference] = []


class Rate(Part):
    """One learning rate and the loss on the dev split."""

    rate: Number = None
    loss: Number = None


class Learning(Part):
    """A training; ``curve`` has rows of steps done and dev loss."""

    curve: Grid

    @model_validator(mode="after")
    def _check(self) -> Learning:
        if len(self.curve[0]) != 2:
            raise ValueError("a curve is rows of a step and a loss")
        return self


class Dev(Learning):
    """The dev loss of a training; ``after`` is that of the files it wrote."""

    before: Number = None
    after: Number = None


class Trained(Learning):
    """A start that was trained, and its held-out loss."""

    documents: int | None = None
    nll_per_token: Number = None
    bits_per_byte: Number = None
    rate: Number = None
    tried: list[Rate] = []
    merge_minus: Minus | None = None
    merge_steps: int | None = None


class Baselines(Part):
    """A merge and other starts, trained at equal budget: objective -> start."""

    best: str = ""
    steps: int | None = None
    seeds: list[int] = []
    not_run: list[str] = []
    not_applicable: dict[str, str] = {}
    arms: dict[str, dict[str, Trained]] = {}


class Report(Part):
    """``report.json``."""

    verdict: str
    outcome: str | None = None
    warnings: list[str] = []
    seeds: list[int] = []
    controls: dict[str, Entry] = {}
    evaluation: dict[str, Entry] = {}
    strength: Strength = Strength()
    pooled: Difference | None = None
    per_seed: list[Difference] = []
    samples: list[Sample] = []
    weights: dict[str, Weight] = {}
    sites: dict[str, Site] = {}
    calibration: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    objective: str = ""
    steps: int | None = None
    dev: Dev | None = None
    data: dict[str, Any] = {}
    baselines: Baselines | None = None

    @property
    def is_training(self) -> bool:
        """Whether it is that of an adaptation, with or without baselines."""
        return self.dev is not None or self.baselines is not None


class Origin(Part):
    """Where on the hub something comes from."""

    repo: str
    revision: str | None = None
    commit: str | None = None
    split: str | None = None


class Adapter(Part):
    """Weights that were merged into a model when it was read."""

    hub: Origin | None = None
    files: dict[str, str] = {}


class Model(Adapter):
    """A model folder that the run read."""

    name: str
    adapter: Adapter | None = None


class TextFile(Part):
    """A file of texts."""

    name: str
    sha256: str


class Texts(Part):
    """Texts that the run read."""

    hub: Origin | None = None
    files: list[TextFile] = []


class Provenance(Part):
    """``provenance.json``."""

    run: str = ""
    command: str = ""
    inputs: dict[str, Model] = {}
    texts: dict[str, Texts] = {}
    seed: int | None = None
    output: dict[str, str] = {}
    packages: dict[str, str] = {}
    python: str = ""
    devices: list[str] = []
    precision: str = ""
    wall_seconds: Number = None
    peak_memory_bytes: Number = None


class Run(NamedTuple):
    """A run as its folder tells it."""

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
        f"{folder} is no run: there is no ot_merge/report.json in it; name a folder that "
        "`ot-merge run` wrote."
    )


def read(details: Path) -> Run:
    """Reads the details of a run.

    Args:
        details: Holds ``report.json``, ``provenance.json`` and ``recipe.yaml``.

    Raises:
        InputError: if a file is missing, damaged, or of another shape.
    """
    return Run(
        _parsed(details / "report.json", Report),
        _parsed(details / "provenance.json", Provenance),
        _text(details / "recipe.yaml"),
    )


def _text(path: Path) -> str:
    """A file of the run as text."""
    if not path.is_file():
        raise InputError(f"{path} is missing or no file; the run is incomplete, so run it again.")
    if path.stat().st_size > _MAX_BYTES:
        raise InputError(f"{path} is larger than any run writes; restore it or run again.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is damaged: byte {error.start} is not UTF-8; restore it or run again."
        ) from error


def _parsed(path: Path, kind: type[_T]) -> _T:
    """A JSON file of the run."""
    try:
        return kind.model_validate(json.loads(_text(path)))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole"
        problem = f"{place}: {first['msg'].removeprefix('Value error, ')}"
    except json.JSONDecodeError as error:
        problem = f"it is no JSON at line {error.lineno} ({error.msg})"
    except (ValueError, RecursionError):  # a number of too many digits, a nesting too deep
        problem = "it is no JSON that can be read"
    raise InputError(f"{path} is damaged: {visible(problem)}; restore it or run again.")
