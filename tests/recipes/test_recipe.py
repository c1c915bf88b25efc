"""Recipes: what the presets say, what a typo says, and YAML that is out to get us."""

import math

import pytest
import yaml

from ot_merge_jax.errors import RecipeError
from ot_merge_jax.recipes import loading, presets
from ot_merge_jax.types import HParams, MergeSpec

BASICS = {"target": "t", "source": "s", "calibration": {"path": "c.txt"}}
WITH_BASE = {**BASICS, "source_base": "b"}


def resolve(preset="barycentric", **said):
    return loading.resolve({**WITH_BASE, "preset": preset, **said})


def write(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def load(tmp_path, content):
    return loading.load(write(tmp_path, content))


# ------------------------------------------------------------------------ presets

#: method: Presets, and the defaults of sections 2 to 6.
PRESETS = {
    "paper": {
        "spec": MergeSpec(
            ("q", "k", "v", "o"), "joint", "interpolate", "soft", "plain", 128, False, 200,
        ),
        "hparams": HParams(0.1, 0.1, 0.1, 1e-6),
        "rows": "sample",
        "strength": 0.1,
    },
    "barycentric": {
        "spec": MergeSpec(
            ("q", "k", "v", "o", "gate", "up", "down"),
            "barycentric", "interpolate", "top1", "median", None, False, 2000,
        ),
        "hparams": HParams(0.0, 0.02, 0.1, 1e-6),
        "rows": "sample",
        "strength": "auto",
    },
    "delta": {
        "spec": MergeSpec(
            ("gate", "up", "down", "embed", "head"),
            "barycentric", "delta", "top1", "median", None, False, 2000,
        ),
        "hparams": HParams(0.0, 0.02, 0.1, 1e-6),
        "rows": "auto",
        "strength": "auto",
    },
}  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset):
    found = resolve(preset)
    expected = PRESETS[preset]
    assert found.spec() == expected["spec"]
    assert found.hparams() == expected["hparams"]
    assert found.rows == expected["rows"]
    assert found.strength == expected["strength"]
    assert found.calibration.samples == 2000
    assert found.max_rows == 8192
    assert found.seed == 0


def test_every_preset_is_tested():
    assert set(presets.PRESETS) == set(PRESETS)


def test_delta_is_the_default_preset():
    assert loading.resolve(WITH_BASE) == resolve("delta")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weights", ["up"]),
        ("rows", "token"),
        ("epsilon", 0.5),
        ("layer_epsilon", 0.3),
        ("layer_cost", "median"),
        ("layers", "top1"),
        ("max_iterations", 7),
        ("threshold", 1e-4),
        ("solver", "ott"),
        ("signed", True),
        ("form", "barycentric"),
        ("rule", "residual"),
        ("strength", 0.7),
        ("k", 5),
        ("max_rows", 11),
        ("max_length", 64),
        ("vocabulary_weights", "frequency"),
        ("seed", 9),
    ],
)
def test_any_setting_overrides_its_preset(key, value):
    plain, changed = resolve("paper").model_dump(), resolve("paper", **{key: value}).model_dump()
    assert changed.pop(key) == value
    assert plain.pop(key) != value
    assert changed == plain


def test_what_is_not_said_does_not_override():
    """Flags that the user left out arrive as None."""
    assert resolve("paper", k=None, strength=None, epsilon=None) == resolve("paper")


def test_weights_come_in_the_order_of_the_forward_pass():
    spec = resolve(weights=["head", "down", "q", "embed", "up"]).spec()
    assert spec.weights == ("q", "up", "down", "embed", "head")


def test_the_solver_reaches_the_spec():
    assert resolve().spec().solver == "auto"
    assert resolve(solver="ott").spec().solver == "ott"


def test_spec_is_hashable():
    assert hash(resolve().spec()) == hash(resolve().spec())


@pytest.mark.parametrize(
    ("strength", "expected"),
    [
        ("auto", 0.0),
        (0, 0.0),
        (0.3, 0.3),
        ({"projections": 1.2, "vocabulary": 0.4}, {"projections": 1.2, "vocabulary": 0.4}),
    ],
)
def test_strengths(strength, expected):
    assert resolve("delta", strength=strength).hparams().strength == expected


def test_a_text_may_be_its_path_alone():
    found = resolve(calibration="c.jsonl", evaluation="e.txt")
    assert (found.calibration.path, found.calibration.field) == ("c.jsonl", "text")
    assert found.evaluation.path == "e.txt"


# ------------------------------------------------------------------------ refusals


def refused(*words, **said):
    """The message with which a recipe is refused; it holds these words."""
    with pytest.raises(RecipeError) as caught:
        resolve(**said)
    message = str(caught.value)
    for word in words:
        assert word in message
    return message


@pytest.mark.parametrize(
    ("key", "meant"), [("tarrget", "target"), ("epsilonn", "epsilon"), ("layer", "layers")]
)
def test_an_unknown_key_names_the_nearest(key, meant):
    refused(f"unknown key '{key}'", f"did you mean '{meant}'", **{key: 1})


def test_an_unknown_key_without_a_neighbour_is_named():
    assert "did you mean" not in refused("unknown key 'zzzzzz'", zzzzzz=1)


def test_a_key_that_is_not_a_string_is_named(tmp_path):
    with pytest.raises(RecipeError, match="unknown key '3'; unknown key 4"):
        loading.resolve(load(tmp_path, "3: x\ncalibration: {4: y}\n"))


@pytest.mark.parametrize("name", ["calibration", "evaluation"])
def test_an_unknown_nested_key_names_the_nearest(name):
    refused("unknown key 'feild'", "did you mean 'field'", **{name: {"path": "c", "feild": "x"}})


def test_all_unknown_keys_are_named_at_once():
    refused("'tarrget'", "'feild'", tarrget=1, calibration={"path": "c", "feild": "x"})


@pytest.mark.parametrize("preset", ["papper", "", 3, ["paper"], {"a": 1}])
def test_an_unknown_preset_lists_the_known(preset):
    refused("preset", "paper, barycentric, delta", preset=preset)


@pytest.mark.catalogue("bad-numbers")
@pytest.mark.parametrize("key", ["epsilon", "layer_epsilon", "threshold"])
@pytest.mark.parametrize("value", [0, -0.1, math.nan, math.inf, "much", [0.1]])
def test_epsilons_must_be_positive_and_finite(key, value):
    refused(key, **{key: value})


@pytest.mark.parametrize("value", [0, -1, 1.5, "some", "0", [1], True])
def test_k_is_all_or_at_least_one(value):
    refused("k: must be all, or an integer of at least 1", k=value)


@pytest.mark.parametrize(
    "value", [-0.1, math.nan, math.inf, "full", [0.1], {"others": 0.1}, True, {"projections": True}]
)
def test_strength_is_auto_a_number_or_one_for_each_group(value):
    refused("strength: must be auto", strength=value)


@pytest.mark.parametrize("value", [1.01, 5, {"projections": 1.5}, {"projections": 2}])
def test_interpolate_cannot_exceed_one(value):
    refused("[0, 1]", preset="barycentric", strength=value)


@pytest.mark.parametrize("rule", ["delta", "residual"])
def test_other_rules_can_exceed_one(rule):
    assert resolve("delta", rule=rule, strength=1.2).strength == 1.2


def test_a_strength_for_each_moving_group():
    refused("no value for vocabulary", preset="delta", strength={"projections": 0.5})
    refused("no value for projections", preset="delta", strength={"vocabulary": 0.5})
    assert resolve("barycentric", strength={"projections": 0.5}).strength == {"projections": 0.5}


@pytest.mark.parametrize("preset", ["delta", "barycentric"])
def test_delta_needs_a_source_base(preset):
    with pytest.raises(RecipeError, match="source_base"):
        loading.resolve({**BASICS, "preset": preset, "rule": "delta"})


@pytest.mark.parametrize("missing", ["target", "source", "calibration"])
def test_a_missing_setting_is_named(missing):
    said = {key: value for key, value in WITH_BASE.items() if key != missing}
    with pytest.raises(RecipeError, match=f"{missing} is missing"):
        loading.resolve(said)


def test_a_missing_path_is_named():
    refused("calibration.path is missing", calibration={"field": "x"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weights", []),
        ("weights", ["up", "up"]),
        ("weights", ["up", "norm"]),
        ("weights", "up"),
        ("rows", "tokens"),
        ("max_rows", 1),
        ("max_length", 0),
        ("max_iterations", 0),
        ("max_iterations", 10.5),
        ("form", "exact"),
        ("rule", "replace"),
        ("layers", "all"),
        ("layer_cost", "mean"),
        ("solver", "scaling"),
        ("signed", "perhaps"),
        ("seed", -1),
        ("seed", 1.5),
        ("target", 3),
        ("target", ["t"]),
        ("source_base", {"a": 1}),
        ("calibration", 3),
        ("calibration", {"path": "c", "samples": 1}),
        ("calibration", {"path": 3}),
        ("vocabulary_weights", "some"),
    ],
)
def test_a_bad_value_names_its_key(key, value):
    refused(key, **{key: value})


def test_all_bad_values_are_named_at_once():
    refused("epsilon", "rows", "max_rows", epsilon=-1, rows="none", max_rows=0)


def test_the_place_is_named():
    with pytest.raises(RecipeError, match=r"^my\.yaml: "):
        loading.resolve({}, where="my.yaml")


# ------------------------------------------------------------------------ YAML

FILE = """\
# ot-merge run recipe.yaml
target: t
source: s
source_base: b
calibration: {path: c.txt, samples: 10}
preset: delta
"""


def test_load(tmp_path):
    assert load(tmp_path, FILE) == {**WITH_BASE, "calibration": {"path": "c.txt", "samples": 10},
                                    "preset": "delta"}  # fmt: skip


@pytest.mark.catalogue("odd-yaml")
@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "'0.001'"])
def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path, text):
    """YAML 1.1 takes 1e-3 for a string."""
    found = loading.resolve(load(tmp_path, FILE + f"epsilon: {text}\nthreshold: {text}\n"))
    assert found.epsilon == found.threshold == 0.001


@pytest.mark.parametrize(
    "key", ["epsilon", "layer_epsilon", "threshold", "strength", "k", "seed", "max_rows"]
)
@pytest.mark.parametrize("word", ["yes", "no", "on", "off"])
def test_words_that_yaml_reads_as_booleans_are_no_numbers(tmp_path, key, word):
    """Without care, ``k: yes`` is 1 and ``strength: off`` is 0."""
    with pytest.raises(RecipeError, match=f"{key}: must"):
        loading.resolve(load(tmp_path, FILE + f"{key}: {word}\n"))


def test_strength_written_as_1e_3_is_a_number(tmp_path):
    assert loading.resolve(load(tmp_path, FILE + "strength: 1e-3\n")).strength == 0.001


@pytest.mark.catalogue("odd-yaml")
@pytest.mark.parametrize("answer", ["yes", "on", "true", "True"])
def test_yaml_booleans(tmp_path, answer):
    assert loading.resolve(load(tmp_path, FILE + f"signed: {answer}\n")).signed is True


@pytest.mark.catalogue("odd-yaml")
@pytest.mark.parametrize("key", ["target", "preset", "calibration"])
def test_a_key_named_twice_is_refused(tmp_path, key):
    with pytest.raises(RecipeError, match=f"'{key}' is named twice"):
        load(tmp_path, FILE + f"{key}: again\n")


def test_a_nested_key_named_twice_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="'path' is named twice"):
        load(tmp_path, "calibration: {path: a, path: b}\n")


@pytest.mark.parametrize(
    "content",
    [
        "target: &a t\nsource: *a\n",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
        "base: &base {target: t}\nother: {<<: *base}\n",
        "a: &a [*a]\n",
    ],
    ids=["plain", "bomb", "merge key", "cycle"],
)
def test_aliases_are_refused(tmp_path, content):
    with pytest.raises(RecipeError, match="aliases"):
        load(tmp_path, content)


@pytest.mark.catalogue("hostile-yaml")
@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch {}']",
        "!!python/name:os.system",
        "!!python/object/new:os.system ['touch {}']",
        "!own thing",
    ],
)
def test_tags_are_refused(tmp_path, tag):
    victim = tmp_path / "ran"
    with pytest.raises(RecipeError, match="not YAML"):
        load(tmp_path, f"target: {tag.format(victim)}\n")
    assert not victim.exists()


def test_a_huge_file_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="larger than 1000000 bytes"):
        load(tmp_path, "#" * 1_000_001)


def test_just_below_the_limit_is_read(tmp_path):
    assert load(tmp_path, FILE + "#" * (1_000_000 - len(FILE)))["target"] == "t"


@pytest.mark.parametrize("content", ["[" * 20_000, "a: " + "[" * 5000 + "]" * 5000, "{a: " * 3000])
def test_deep_nesting_is_refused(tmp_path, content):
    with pytest.raises(RecipeError, match="not YAML"):
        load(tmp_path, content)


@pytest.mark.parametrize(
    "content",
    ["target: [t\n", "target: t: u\n", "\ttarget: t\n", b"target: \xff\n", b"target: \x00\n",
     "? {a: b}\n: c\n"],
    ids=["open bracket", "two colons", "tab", "latin-1", "nul", "mapping as key"],
)  # fmt: skip
def test_damaged_yaml_is_refused(tmp_path, content):
    path = write(tmp_path, content)
    with pytest.raises(RecipeError, match="not YAML") as caught:
        loading.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "# nothing\n", "- a\n- b\n", "text\n", "3\n"])
def test_what_is_not_a_mapping_is_refused(tmp_path, content):
    with pytest.raises(RecipeError, match="not a mapping"):
        load(tmp_path, content)


@pytest.mark.parametrize("content", ["a: 1\n---\nb: 2\n"])
def test_several_documents_are_refused(tmp_path, content):
    with pytest.raises(RecipeError, match="not YAML"):
        load(tmp_path, content)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="no recipe"):
        loading.load(tmp_path / "nowhere.yaml")
    with pytest.raises(RecipeError, match="no recipe"):
        loading.load(tmp_path)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"strength": {"projections": 0.5, "vocabulary": 0.1}, "weights": ["up", "head"]},
        {"target": "dir with: colon # and hash", "source": "ünï/山", "k": 3, "threshold": 1e-9},
        {"evaluation": {"path": "e.jsonl", "field": "body", "encoding": "latin-1"}},
    ],
    ids=["plain", "groups", "odd strings", "evaluation"],
)
def test_a_recipe_survives_its_file(tmp_path, preset, more):
    """to_yaml -> load -> resolve, and the file is one that another YAML reader understands."""
    first = resolve(preset, **more)
    path = write(tmp_path, first.to_yaml())
    assert loading.resolve(loading.load(path)) == first
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["target"] == first.target


def test_flags_override_the_file(tmp_path):
    settings = {**load(tmp_path, FILE + "epsilon: 0.5\n"), "epsilon": 0.25, "preset": "paper"}
    found = loading.resolve(settings)
    assert (found.epsilon, found.preset, found.form) == (0.25, "paper", "joint")


# ---- flags over a file ----


@pytest.mark.parametrize(
    ("file", "flags", "expected"),
    [
        (
            {"calibration": "a.txt"},
            {"encoding": "latin-1"},
            {"path": "a.txt", "encoding": "latin-1"},
        ),
        (
            {"calibration": {"path": "a.txt", "samples": 60, "field": "body"}},
            {"path": "b.txt"},
            {"path": "b.txt", "samples": 60, "field": "body"},
        ),
        ({"calibration": {"path": "a.txt"}}, {"samples": 9}, {"path": "a.txt", "samples": 9}),
        ({}, {"path": "b.txt", "field": "body"}, {"path": "b.txt", "field": "body"}),
        ({"calibration": "a.txt"}, {}, "a.txt"),
    ],
)
def test_flags_win_key_by_key(file, flags, expected):
    flags = {"path": None, "field": None, "encoding": None, "samples": None} | flags
    assert loading.overridden(file, {"calibration": flags})["calibration"] == expected


def test_field_alone_makes_no_text():
    said = loading.overridden({}, {"evaluation": {"path": None, "field": "body"}, "seed": None})
    assert said == {}
