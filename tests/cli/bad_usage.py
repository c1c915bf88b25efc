"""Rows of `test_bad_input`: flags and recipes that cannot be used."""

import ml_dtypes  # noqa: F401  (teaches safetensors the name bfloat16)
import pytest
import yaml
from desk import row

# ---- usage ----


@row(2, "delta", "source_base", "barycentric")
def delta_without_a_source_base(desk):
    return desk.delta(source_base=None)


@pytest.mark.catalogue("odd-yaml")
@row(2, "recipe.yaml", "'epsilom'", "did you mean 'epsilon'")
def unknown_recipe_key(desk):
    recipe = desk.write(
        "recipe.yaml", yaml.safe_dump({"target": "a", "source": "b", "epsilom": 0.1})
    )
    return ["run", recipe, "--out", desk.out]


@row(2, "no recipe", "nowhere.yaml")
def recipe_that_does_not_exist(desk):
    return ["run", desk.folder / "nowhere.yaml", "--out", desk.out]


@pytest.mark.catalogue("hostile-yaml")
@row(2, "recipe.yaml", "not YAML", "python")
def recipe_with_a_python_tag(desk):
    tag = f"target: !!python/object/apply:os.mkdir ['{desk.folder / 'ran'}']\n"
    return ["run", desk.write("recipe.yaml", tag), "--out", desk.out]


@row(2, "target is missing", "source is missing", "calibration is missing")
def flags_that_say_too_little(desk):
    return ["run", "--preset", "paper", "--out", desk.out]


#: One flag with a value that cannot be: name of the row -> (flag, value, words of the sentence).
#: What a recipe says of its values is `tests/recipes`' matter; these are seen on the way there.
VALUES = {
    "epsilon that is not a number": ("epsilon", "nan", "epsilon"),
    "unknown weight": ("weights", "down,dwon", "weights", "'dwon'"),
    "missing out": ("out", None, "--out"),
    "nonsense mesh": ("mesh", "two by four", "--mesh"),
    "mesh larger than the machine": ("mesh", "data=64", "mesh", "does not fit"),
    "mesh of zero": ("mesh", "data=0", "mesh"),
    "negative mesh": ("mesh", "data=-2", "mesh"),
    "size that is none": ("memory_limit", "plenty", "--memory-limit"),
}


def with_value(flag, value):
    """A run in which one flag has that value (None: it is not given)."""

    @pytest.mark.catalogue("bad-numbers")
    def change(desk):
        return desk.run(**{flag: value})

    return change


for _name, (_flag, _value, *_words) in VALUES.items():
    row(2, *_words, name=_name)(with_value(_flag, _value))


@pytest.mark.catalogue("out-of-memory")
@row(4, "GiB", "--memory-limit allows", "--max-rows")
def run_that_does_not_fit(desk):
    return desk.run(memory_limit="64MiB")
