"""From a YAML file and flags to a checked `Recipe`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pydantic
import yaml

from ot_merge_jax.errors import RecipeError
from ot_merge_jax.recipes.presets import PRESETS
from ot_merge_jax.recipes.recipe import CONTROLS, CalibrationText, Recipe, Text

_MAX_RECIPE_BYTES = 1_000_000


def resolve(settings: Mapping[str, Any], *, where: str = "the recipe") -> Recipe:
    """Fills settings from their preset and checks them.

    Args:
        settings: What the user said; None values count as unsaid. ``preset`` defaults to ``delta``.
        where: Named in messages.

    Returns:
        The resolved recipe.

    Raises:
        RecipeError: naming every unknown key, with the nearest known one, or every bad value.

    Example:
        >>> recipe = resolve({"target": "t", "source": "s", "preset": "paper", "strength": 0.05,
        ...                   "calibration": {"path": "c.txt"}})
        >>> recipe.k, recipe.strength, recipe.calibration.samples
        (128, 0.05, 2000)
        >>> resolve({"tarrget": "t"})
        Traceback (most recent call last):
        ...
        ot_merge_jax.errors.RecipeError: the recipe: unknown key 'tarrget' (did you mean 'target'?).
    """
    said = renamed(settings, Recipe, where=where)
    unknown = [_unknown(key, Recipe.model_fields) for key in said if key not in Recipe.model_fields]
    for name, kind in (("calibration", CalibrationText), ("evaluation", Text)):
        if isinstance(said.get(name), str):
            said[name] = {"path": said[name]}
        if isinstance(said.get(name), Mapping):
            unknown += [
                _unknown(key, kind.model_fields)
                for key in said[name]
                if key not in kind.model_fields
            ]
    if unknown:
        raise RecipeError(f"{where}: {'; '.join(unknown)}.")
    preset = str(said.setdefault("preset", "delta"))
    if preset not in PRESETS:
        raise RecipeError(f"{where}: preset must be one of {', '.join(PRESETS)}, not {preset!r}.")
    try:
        return Recipe.model_validate({**PRESETS[preset], **said})
    except pydantic.ValidationError as error:
        raise RecipeError(f"{where}: {'; '.join(sentences(error.errors()))}.") from error


def renamed(
    settings: Mapping[str, Any], kind: type[pydantic.BaseModel], *, where: str
) -> dict[str, Any]:
    """Settings without those that are unsaid, and by the names that they have today.

    Args:
        settings: What the user said; None values count as unsaid.
        kind: What the settings are of; the old name of a field is its ``serialization_alias``.
        where: Named in messages.

    Raises:
        RecipeError: if a setting is named by its old and its new name.
    """
    old = aliases(kind)
    said: dict[str, Any] = {}
    for key, value in settings.items():
        name = old.get(key, key)
        if value is None:
            continue
        if name in said:
            former = next(before for before, now in old.items() if now == name)
            raise RecipeError(f"{where}: {former} is another name of {name}; give one of them.")
        said[name] = value
    return said


def aliases(kind: type[pydantic.BaseModel]) -> dict[str, str]:
    """Old name -> name of the settings that were renamed; both are accepted for good."""
    fields = kind.model_fields.items()
    return {field.serialization_alias: name for name, field in fields if field.serialization_alias}


def overridden(settings: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a recipe file with flags over them, key by key within a text.

    Args:
        settings: From `load`.
        flags: What was said on the command line; None values count as unsaid. Of a text, ``field``
            and ``encoding`` alone say nothing where there is no such text.

    Returns:
        Settings for `resolve`.

    Example:
        >>> overridden({"calibration": {"path": "a.txt", "samples": 9}, "seed": 1},
        ...            {"calibration": {"path": "b.txt", "samples": None}, "seed": None})
        {'calibration': {'path': 'b.txt', 'samples': 9}, 'seed': 1}
    """
    said = dict(settings)
    for key, value in flags.items():
        if not isinstance(value, Mapping):
            said |= {} if value is None else {key: value}
            continue
        inside = {name: item for name, item in value.items() if item is not None}
        known = said.get(key)
        known = {"path": known} if isinstance(known, str) else known
        if inside and (known or inside.keys() & {"path", "samples"}):
            said[key] = {**known, **inside} if isinstance(known, Mapping) else inside
    return said


def text(path: str, *, field: str | None = None, encoding: str | None = None) -> Text:
    """A text that is named by flags alone.

    Raises:
        RecipeError: if the field is not usable.

    Example:
        >>> text("c.jsonl", field="prompt,response").field
        ['prompt', 'response']
    """
    said = {"path": path, "field": field, "encoding": encoding}
    try:
        return Text.model_validate({key: item for key, item in said.items() if item is not None})
    except pydantic.ValidationError as error:
        raise RecipeError(f"the command line: {'; '.join(sentences(error.errors()))}.") from error


def load(path: Path) -> dict[str, Any]:
    """Reads a recipe file into settings for `resolve`.

    Raises:
        RecipeError: if the file is missing, too large, not a YAML mapping or names a key twice.
    """
    if not path.is_file():
        raise RecipeError(f"There is no recipe {path}; give a YAML file or flags.")
    if path.stat().st_size > _MAX_RECIPE_BYTES:
        raise RecipeError(f"{path} is larger than {_MAX_RECIPE_BYTES} bytes; this is not a recipe.")
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506, a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        detail = " ".join(str(error).split())[:200]
        raise RecipeError(f"{path} is not YAML ({detail}); fix it.") from error
    if not isinstance(settings, dict):
        raise RecipeError(
            f"{path} is not a mapping of settings; see docs/quick-start.md for an example."
        )
    return {str(key): value for key, value in settings.items()}


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key named twice and aliases, which can grow without bound."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not used in recipes")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := {str(key) for key in keys if keys.count(key) > 1}:
            raise yaml.YAMLError(f"key {sorted(twice)[0]!r} is named twice")
        return super().construct_mapping(node, deep)


def _unknown(key: Any, known: Mapping[str, Any]) -> str:
    """'unknown key ... (did you mean ...?)'."""
    near = difflib.get_close_matches(str(key), known, n=1)
    return f"unknown key {key!r}" + (f" (did you mean {near[0]!r}?)" if near else "")


_UNIONS = {
    "strength": (
        "must be auto, a number of at least 0, or a mapping from projections and vocabulary"
    ),
    "k": "must be all, or an integer of at least 1",
    "controls": f"must be all, none, or some of {', '.join(CONTROLS)}",
}


def sentences(errors: Iterable[Any]) -> list[str]:
    """Pydantic errors as 'key: what is wrong', one for each key."""
    problems: dict[str, str] = {}
    for error in errors:
        key = str(error["loc"][0]) if error["loc"] else ""
        place = ".".join(str(part) for part in error["loc"])
        message = _UNIONS.get(key, str(error["msg"]).removeprefix("Value error, "))
        if error["type"] == "missing":
            problems[place] = f"{place} is missing"
        elif not key:
            problems[key] = message
        else:
            name = key if key in _UNIONS else place
            problems[name] = f"{name}: {message} (got {error['input']!r})"
    return list(problems.values())
