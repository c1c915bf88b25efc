"""Flags are made from the models of settings: all of them, with old names, and what they mean."""

import inspect
import typing

import pydantic
import pytest
import typer
import yaml

from ot_merge_jax.cli import early, flags
from ot_merge_jax.cli.main import app
from ot_merge_jax.errors import RecipeError
from ot_merge_jax.recipes import loading, training
from ot_merge_jax.recipes.recipe import CalibrationText, Recipe, Text
from ot_merge_jax.recipes.training import Adaptation
from ot_merge_jax.runs import adapt as adaptation
from ot_merge_jax.runs import baselines, merge

#: What a user may write, by its type in the help; a change here is a change for users.
RECIPE = {
    "str": "preset target source source-base calibration eval-text field encoding weights rows "
           "layer-cost layers solver form rule strength vocabulary-weights k controls",
    "int": "samples max-rows max-length max-iterations seeds continuations seed",
    "float": "epsilon layer-epsilon threshold",
    "bool": "signed",
}  # fmt: skip
ADAPT = {
    "str": "text objective source target loss-on schedule lora-targets dtype eval-text baselines "
           "rates field encoding",
    "int": "steps batch-size grad-accum-steps seq-len lora-rank samples eval-every save-every "
           "log-every patience seeds seed",
    "float": "learning-rate kd-weight strength warmup weight-decay max-grad-norm lora-alpha",
    "bool": "remat",
}  # fmt: skip
#: Old name -> name, of flags and keys alike.
OLD = {"accumulate": "grad_accum_steps", "block": "seq_len", "clip": "max_grad_norm",
       "lora": "lora_rank"}  # fmt: skip
BASIC = {"model": "m", "text": {"path": "t.txt"}}


def own(words):
    """Flags that every command has, or that are no settings."""
    return {f"--{word}" for word in words.split()}


@pytest.mark.parametrize(("command", "table", "others"), [
    ("run", RECIPE, own("out overwrite resume strict mesh memory-limit offline no-compile-cache "
                        "json verbose quiet")),
    ("plan", RECIPE, own("out overwrite memory-limit offline json verbose quiet")),
    ("adapt", ADAPT, own("out overwrite resume mesh memory-limit offline no-compile-cache json "
                         "verbose quiet")),
])  # fmt: skip
def test_visible_flags(command, table, others):
    [callback] = [one.callback for one in app.registered_commands if command in
                  (one.name, one.callback.__name__)]  # fmt: skip
    found = {}
    for one in inspect.signature(callback).parameters.values():
        kind, (option,) = one.annotation.__origin__, one.annotation.__metadata__
        if isinstance(option, typer.models.OptionInfo) and not option.hidden:
            plain = next(iter(typing.get_args(kind)), kind)
            found[f"--{one.name.removeprefix('as_').replace('_', '-')}"] = plain.__name__
    expected = {f"--{name}": kind for kind, names in table.items() for name in names.split()}
    assert {name: kind for name, kind in found.items() if name not in others} == expected
    assert others <= found.keys()


@pytest.mark.parametrize("kind", [Recipe, Adaptation, CalibrationText, Text])
def test_every_field_says_what_it_is(kind):
    for name, field in kind.model_fields.items():
        if name != "path":
            assert field.description.endswith("."), name


class _Later(pydantic.BaseModel):
    """Settings as they may be one day."""

    text: Text = pydantic.Field(description="What is read.")
    share: float = pydantic.Field(0.5, description="Of all of it.")
    names: list[str] = pydantic.Field(["a", "b"], description="Of the things.")


def test_new_setting_is_named_once():
    found = flags.flags_of(_Later, is_whole=True)
    assert list(found) == ["text", "share", "names", "field", "encoding"]
    helps = {name: one.parameter.annotation.__metadata__[0].help for name, one in found.items()}
    assert helps["share"] == "Of all of it [0.5]."
    assert helps["names"] == "Of the things [a,b]."
    said = flags.settings(found, {"text": "t", "names": "c, d", "encoding": "latin-1"})
    assert _Later.model_validate(loading.overridden({}, said)) == _Later(
        text=Text(path="t", encoding="latin-1"), names=["c", "d"]
    )


@pytest.fixture
def asked(cli, monkeypatch):
    """``asked(words)`` -> the settings that reach a run, which does not start; or the error."""
    seen = []

    def stop(settings, *_, **__):
        seen.append(settings)
        raise RecipeError("Seen.")

    monkeypatch.setattr(merge, "run", stop)
    monkeypatch.setattr(adaptation, "adapt", stop)
    monkeypatch.setattr(baselines, "compare", stop)
    monkeypatch.setattr(early, "look_for", lambda **_: None)

    def ask(*words):
        seen.clear()
        called = cli(*words)
        assert called.code == 2, called.err
        return seen[0] if seen else called.err

    return ask


def test_texts_and_lists_of_a_run(asked):
    found = asked(
        "run", "--preset", "paper", "--target", "t", "--source", "s", "--calibration", "c.jsonl",
        "--samples", 7, "--eval-text", "e.jsonl", "--field", "prompt,response",
        "--encoding", "latin-1", "--weights", "up, down", "--controls", "all", "--signed",
        "--out", "o",
    )  # fmt: skip
    about = {"field": ["prompt", "response"], "encoding": "latin-1"}
    assert found.calibration == CalibrationText(path="c.jsonl", samples=7, **about)
    assert found.evaluation == Text(path="e.jsonl", **about)
    assert (found.weights, len(found.controls), found.signed) == (["up", "down"], 6, True)


def test_settings_of_an_adaptation(asked):
    found = asked("adapt", "m", "--text", "t", "--out", "o", "--baselines", "all", "--rates",
                  "1, 2e-3", "--lora-targets", "q,v", "--eval-text", "e")  # fmt: skip
    expected = {
        **BASIC, "text": {"path": "t"}, "baselines": ["base", "shrink", "noise"],
        "rates": [1, 2e-3], "lora_targets": ["q", "v"], "evaluation": {"path": "e"},
    }  # fmt: skip
    assert found == training.resolve(expected)


@pytest.mark.parametrize(("old", "name"), OLD.items())
def test_old_flags_stay(old, name, asked):
    words = ("adapt", "m", "--text", "t", "--out", "o")
    new = f"--{name.replace('_', '-')}"
    found = asked(*words, f"--{old}", 4)
    assert found == asked(*words, new, 4)
    assert getattr(found, name) == 4
    assert f"--{old} is another name of {new}" in asked(*words, f"--{old}", 4, new, 4)


def test_old_keys_are_read_and_written():
    old, new = dict.fromkeys(OLD, 4), dict.fromkeys(OLD.values(), 4)
    found = training.resolve(BASIC | old)
    assert found == training.resolve(BASIC | new)
    written = yaml.safe_load(found.to_yaml())
    assert written.items() >= old.items()
    assert not written.keys() & OLD.values()
    assert training.resolve(written) == found
    with pytest.raises(RecipeError, match="clip is another name of max_grad_norm"):
        training.resolve(BASIC | {"clip": 1, "max_grad_norm": 1})
