"""The schema of ``report.json``: every writer fills these models, every reader reads them.

A writer sets what it means and nothing else: what was never set is not written, a None that was set
is written as null. What an older run does not have is optional; what is there must be of the right
kind. Keys that are not named here are left out. Imports errors and redaction only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    WrapValidator,
    model_validator,
)

from ot_merge_jax.errors import InputError, VersionError
from ot_merge_jax.io.redaction import visible

#: Of the reports that this program writes. A key that is added needs no new version; one that is
#: renamed, removed or means something else does. Reports without a version are older than 1.
VERSION = 1
_MAX_BYTES = 200_000_000
_T = TypeVar("_T", bound="Part")


def _as_it_stands(value: Any, as_float: Callable[[Any], float]) -> int | float:
    """A number that a float can hold; an integer stays one, so that it is written as it was."""
    number = as_float(value)
    return value if type(value) is int else number


def _finite(value: Any) -> Any:
    """None for a float that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rectangular(rows: list[list[Any]]) -> list[list[Any]]:
    """Rows of one length, and at least one value."""
    if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError("is not a table of at least one value")
    return rows


# written by its own type, not as a float
Real = Annotated[SerializeAsAny[float], WrapValidator(_as_it_stands)]
Number = Annotated[Real | None, BeforeValidator(_finite)]
Grid = Annotated[list[list[Number]], AfterValidator(_rectangular)]
#: One number, or one for each group of weights.
Strengths = Real | dict[str, Real]


class Part(BaseModel):
    """A JSON object; a null is dropped, except where the default is None."""

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        may_be_null = {key for key, field in cls.model_fields.items() if field.default is None}
        return {key: part for key, part in value.items() if part is not None or key in may_be_null}


class Difference(Part):
    """A difference with its 95 % interval; ``seed`` if it is that of one calibration seed."""

    metric: str = "nll_per_token"
    difference: Number = None
    low: Number = None
    high: Number = None
    seed: int | None = None
    strength: Strengths | None = None


class Beyond(Difference):
    """What a merge gains when it and the target each have their own bias for every token."""

    seeds: list[Difference] = []
    merge_gamma: Number = None


class Tried(Part):
    """One strength and the loss on the dev split."""

    strength: Strengths
    loss: Number = None


class Split(Part):
    """Where the strengths were compared."""

    train_documents: int | None = None
    dev_documents: int | None = None
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
    against_before: Difference | None = None
    against_target: Difference | None = None
    kl_to_base: Number = None
    gamma: Number = None
    strength: Strength | None = None
    merge_minus_control: Difference | None = None
    seeds: list[Difference] = []
    beyond: Beyond | None = None

    @property
    def has_own_tokens(self) -> bool:
        """Whether it has other tokens than the target, so that losses per token do not compare."""
        return self.against_target is not None and self.against_target.metric == "bits_per_byte"


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

    layer_cost: Grid | None = None
    layer_plan: Grid
    mass_curve: Curve | None = None
    r2: list[Number] = []
    r2_permuted: list[Number] = []
    sorted_heat: Grid | None = None
    largest_error: Number = None
    most_iterations: Number = None
    converged: Number = None
    in_log_form: Number = None


class Continuation(Part):
    """What a model wrote."""

    text: str
    tokens: int | None = None
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
    best_step: int | None = None


class Residual(Part):
    """What a merge added to its target, for each group; ``merged_at`` is null without one."""

    merged_at: Mapping[str, Number] | None = None
    held_at: Mapping[str, Number] = {}


class Trained(Learning):
    """A start that was trained, and its held-out loss.

    ``merge_steps``: after how many steps the curve of the merge is at or below the last point of
    this one; null if never.
    """

    documents: int | None = None
    tokens: int | None = None
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
    rates: list[Number] = []
    not_run: list[str] = []
    not_applicable: dict[str, str] = {}
    arms: dict[str, dict[str, Trained]] = {}


class Report(Part):
    """``report.json``, of a merge or of a training.

    ``pooled``: merge minus target over all calibration ``seeds``; ``per_seed``: the same of each.
    ``controls``: models and controls on the held-out text, merge and target differences of each.
    ``calibration`` and ``data`` are shown as they stand, key by key.
    """

    version: Annotated[int, Field(ge=1, le=VERSION)] | None = None
    verdict: str
    outcome: str | None = None
    warnings: list[str] = []
    seeds: list[int] = []
    pooled: Difference | None = None
    per_seed: list[Difference] = []
    controls: dict[str, Entry] = {}
    objective: str = ""
    steps: int | None = None
    losses: list[Number] = []
    dev: Dev | None = None
    evaluation: dict[str, Entry] = {}
    data: dict[str, Any] = {}
    residual: Residual | None = None
    strength: Strength = Strength()
    samples: list[Sample] = []
    weights: dict[str, Weight] = {}
    sites: dict[str, Site] = {}
    calibration: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    baselines: Baselines | None = None

    @property
    def is_training(self) -> bool:
        """Whether it is the report of an adaptation, with or without baselines."""
        return self.dev is not None or self.baselines is not None

    def to_json(self) -> str:
        """The text of ``report.json``, also printed with ``--json``."""
        return self.model_dump_json(indent=1, exclude_unset=True) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """The values of `to_json`."""
        return self.model_dump(mode="json", exclude_unset=True)


def read(path: Path) -> Report:
    """Reads a ``report.json``, of this version or an older one.

    Raises:
        VersionError: if it is of a later version.
        InputError: if it is missing, damaged, or of another shape.
    """
    value = parsed(path)
    version = value.get("version") if isinstance(value, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise VersionError(
            f"{path} is a report of version {version}, and this ot-merge reads versions up to "
            f"{VERSION}; install a newer ot-merge-jax, or run again with this one."
        )
    return checked(path, value, Report)


def text_of(path: Path) -> str:
    """A file of a run as text.

    Raises:
        InputError: if it is missing, too large, or not UTF-8.
    """
    if not path.is_file():
        raise InputError(
            f"{path} is missing or not a file; the run is incomplete, so run it again."
        )
    if path.stat().st_size > _MAX_BYTES:
        raise InputError(f"{path} is larger than any run writes; restore it or run again.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is damaged: byte {error.start} is not UTF-8; restore it or run again."
        ) from error


def parsed(path: Path) -> Any:
    """The value of a JSON file of a run.

    Raises:
        InputError: from `text_of`, or if the file is not JSON.
    """
    try:
        return json.loads(text_of(path))
    except json.JSONDecodeError as error:
        problem = f"it is not JSON, from line {error.lineno} ({error.msg})"
    except (ValueError, RecursionError):  # a number of too many digits, a nesting too deep
        problem = "it is not JSON that can be read"
    raise _damaged(path, problem)


def checked(path: Path, value: Any, kind: type[_T]) -> _T:
    """Validates a JSON value as one of the models.

    Args:
        path: Where it was read, for the message.
        value: From `parsed`.
        kind: The model.

    Raises:
        InputError: if it is of another shape.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "the whole"
    raise _damaged(path, f"{place}: {first['msg'].removeprefix('Value error, ')}")


def _damaged(path: Path, problem: str) -> InputError:
    """The error for a file whose content no run writes."""
    return InputError(f"{path} is damaged: {visible(problem)}; restore it or run again.")
