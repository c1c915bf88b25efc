"""The flags of settings, made from the fields of their models: a new setting is named once, there.

A field is a flag of the same name; its type, its default and its description are the flag's. A
field that is a text is a flag for its path, and what more it says of documents are flags too.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

import pydantic
import typer
from pydantic.fields import FieldInfo

from ot_merge_jax.cli import early
from ot_merge_jax.errors import RecipeError
from ot_merge_jax.recipes import loading, training
from ot_merge_jax.recipes.recipe import Recipe, Text
from ot_merge_jax.recipes.training import Adaptation

#: Fields whose flag has another name.
_NAMES = {"evaluation": "eval_text"}
#: Fields that are lists, and names that stand for several: not taken for a list of one.
_WORDS = {"controls": ("all", "none"), "baselines": ("all",)}
#: Fields that typer itself checks.
_LEAST = {"seed": 0}


class Flag(NamedTuple):
    """One flag.

    Attributes:
        parameter: What typer makes it from.
        places: The keys of the settings that it fills, one within the other.
        words: Texts that are taken as they are where ``is_list``.
        is_list: Whether the text is split at commas.
        now: The name of the flag that this one is an old name of, or None.
    """

    parameter: inspect.Parameter
    places: tuple[tuple[str, ...], ...]
    words: tuple[str, ...] = ()
    is_list: bool = False
    now: str | None = None


def flags_of(
    kind: type[pydantic.BaseModel], *, arguments: Iterable[str] = (), is_whole: bool
) -> dict[str, Flag]:
    """The flags of a model of settings, in the order of its fields.

    Args:
        kind: The model.
        arguments: Fields that are arguments and no flags.
        is_whole: Whether the command line says everything, so that what the model requires is
            required there.

    Returns:
        Name of the parameter -> flag. Old names of fields come last; help does not show them.

    Example:
        >>> flags = flags_of(Recipe, is_whole=False)
        >>> flags["max_rows"].places, flags["samples"].places
        ((('max_rows',),), (('calibration', 'samples'),))
        >>> flags["encoding"].places
        (('calibration', 'encoding'), ('evaluation', 'encoding'))
    """
    flags: dict[str, Flag] = {}
    texts: list[str] = []
    for name, field in kind.model_fields.items():
        shown = _NAMES.get(name, name)
        is_required = is_whole and field.is_required()
        text = next((member for member in _members(field.annotation) if _is_text(member)), None)
        if text is None:
            flags[shown] = _flag(
                shown, field, [(name,)], is_required=is_required, is_argument=name in arguments
            )
            continue
        texts.append(name)
        flags[shown] = _flag(shown, field, [(name, "path")], is_required=is_required)
        own = [key for key in text.model_fields if key not in Text.model_fields]
        flags |= {key: _flag(key, text.model_fields[key], [(name, key)]) for key in own}
    for key, field in Text.model_fields.items():
        if key != "path":
            flags[key] = _flag(key, field, [(name, key) for name in texts])
    for old, name in loading.aliases(kind).items():
        flags[old] = _flag(old, kind.model_fields[name], [(name,)], now=name)
    return flags


def with_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command a recipe file and the flags of `Recipe`, before its own.

    Args:
        command: Takes the resolved recipe first, then its own flags by keyword.

    Returns:
        The command as typer is to see it.
    """
    flags = flags_of(Recipe, is_whole=False)
    flags = {"preset": flags["preset"], **flags}
    file = inspect.Parameter(
        "recipe", inspect.Parameter.KEYWORD_ONLY, default=None,
        annotation=Annotated[Path | None, typer.Argument(help="Recipe file (YAML).")],
    )  # fmt: skip

    def resolved(given: dict[str, Any]) -> Recipe:
        path = given.pop("recipe")
        values = {} if path is None else loading.load(path)
        where = str(path or "the command line")
        values = loading.renamed(values, Recipe, where=where)
        values = loading.overridden(values, settings(flags, given))
        return loading.resolve(values, where=where)

    return _with(command, [file, *(flag.parameter for flag in flags.values())], resolved)


def with_adaptation(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the flags of `Adaptation`, before its own.

    Args:
        command: Takes the settings first, then its own flags by keyword.

    Returns:
        The command as typer is to see it.
    """
    flags = flags_of(Adaptation, arguments=["model"], is_whole=True)

    def resolved(given: dict[str, Any]) -> Adaptation:
        return training.resolve(loading.overridden({}, settings(flags, given)))

    return _with(command, [flag.parameter for flag in flags.values()], resolved)


def settings(flags: Mapping[str, Flag], given: Mapping[str, Any]) -> dict[str, Any]:
    """What flags say, as settings; None where a flag was not given.

    Args:
        flags: From `flags_of`.
        given: Name of a parameter -> value, as typer reads it.

    Raises:
        RecipeError: if a flag is given by its old and its new name.

    Example:
        >>> flags = flags_of(Adaptation, is_whole=True)
        >>> found = settings(flags, {"block": 8, "text": "t", "lora_targets": "q,v"})
        >>> found["seq_len"], found["text"], found["lora_targets"]
        (8, {'path': 't', 'field': None, 'encoding': None}, ['q', 'v'])
    """
    values: dict[str, Any] = {}
    for name, flag in flags.items():
        value = given.get(name)
        if flag.now is not None:
            if value is None:
                continue
            if given.get(flag.now) is not None:
                raise RecipeError(
                    f"{_spelled(name)} is another name of {_spelled(flag.now)}; give one of them."
                )
        if flag.is_list and value is not None and value not in flag.words:
            value = [item.strip() for item in value.split(",")]
        for *above, key in flag.places:
            inside = values
            for outer in above:
                inside = inside.setdefault(outer, {})
            inside[key] = value
    return values


def look_for_inputs(recipe: Recipe, out: Path | None, *, overwrite: bool) -> None:
    """Looks for the models and texts of a recipe, before anything heavy is imported.

    Raises:
        InputError: naming the first that is missing, or what is wrong with the output.
    """
    texts = (recipe.calibration, recipe.evaluation)
    early.look_for(
        models=(recipe.target, recipe.source, recipe.source_base),
        texts=[None if text is None else text.path for text in texts],
        out=out,
        overwrite=overwrite,
    )


def _with(
    command: Callable[..., None],
    parameters: list[inspect.Parameter],
    resolved: Callable[[dict[str, Any]], Any],
) -> Callable[..., None]:
    """A command whose first argument is resolved from flags that stand before its own."""
    own = list(inspect.signature(command, eval_str=True).parameters.values())
    flags = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in (*parameters, *own[1:])
    ]

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        values = {parameter.name: given.pop(parameter.name) for parameter in parameters}
        command(resolved(values), **given)

    # typer reads both
    wrapped.__signature__ = inspect.Signature(flags)  # pyright: ignore[reportAttributeAccessIssue]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in flags}
    return wrapped


def _flag(
    name: str,
    field: FieldInfo,
    places: list[tuple[str, ...]],
    *,
    is_required: bool = False,
    is_argument: bool = False,
    now: str | None = None,
) -> Flag:
    """The flag of a field."""
    members = _members(field.annotation)
    plain = members[0] if len(members) == 1 and members[0] in (bool, int, float) else str
    help_ = _with_default(field)
    if is_argument:
        option = typer.Argument(help=help_)
    else:
        option = typer.Option(help=help_, min=_LEAST.get(name), hidden=now is not None)
    parameter = inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if is_required else None,
        annotation=Annotated[plain if is_required else plain | None, option],
    )
    is_list = any(get_origin(member) is list for member in members)
    return Flag(parameter, tuple(places), _WORDS.get(name, ()), is_list, now)


def _with_default(field: FieldInfo) -> str:
    """The description of a field, and its default in brackets; a None is told by the description.

    Example:
        >>> _with_default(Recipe.model_fields["max_rows"])
        'Rows kept for token and span [8192].'
    """
    description = field.description or ""
    default = None if field.is_required() else field.default
    if default is None or isinstance(default, bool | pydantic.BaseModel):
        return description
    words = f"{default:g}" if isinstance(default, float) else f"{default}"
    if isinstance(default, list):
        words = ",".join(default)
    return f"{description.removesuffix('.')} [{words}]."


def _members(annotation: Any) -> list[Any]:
    """The types that a field may have, None left out, without their constraints."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [own for member in get_args(annotation) for own in _members(member)]
    return [] if annotation is type(None) else [annotation]


def _is_text(kind: Any) -> bool:
    """Whether a type is that of a text."""
    return isinstance(kind, type) and issubclass(kind, Text)


def _spelled(name: str) -> str:
    """A parameter as a flag."""
    return f"--{name.replace('_', '-')}"
