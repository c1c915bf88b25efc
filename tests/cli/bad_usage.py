"""Rows of `test_bad_input`: flags and recipes that cannot be used."""

import ml_dtypes  # noqa: F401  (teaches safetensors the name bfloat16)
import yaml
from desk import row

# ---- usage ----


@row(2, "delta", "source_base", "barycentric")
def delta_without_a_source_base(desk):
    return desk.delta(source_base=None)


@row(2, "recipe.yaml", "'epsilom'", "did you mean 'epsilon'")
def unknown_recipe_key(desk):
    recipe = desk.write(
        "recipe.yaml", yaml.safe_dump({"target": "a", "source": "b", "epsilom": 0.1})
    )
    return ["run", recipe, "--out", desk.out]


@row(2, "recipe.yaml", "'pat'", "did you mean 'path'")
def unknown_key_of_the_calibration(desk):
    recipe = desk.write("recipe.yaml", yaml.safe_dump({"calibration": {"pat": "x"}}))
    return ["run", recipe, "--out", desk.out]


@row(2, "no recipe", "nowhere.yaml")
def recipe_that_does_not_exist(desk):
    return ["run", desk.folder / "nowhere.yaml", "--out", desk.out]


@row(2, "recipe.yaml", "not YAML", "fix")
def recipe_that_is_not_yaml(desk):
    return ["run", desk.write("recipe.yaml", "a: [1\nb: 2"), "--out", desk.out]


@row(2, "recipe.yaml", "not YAML", "named twice")
def recipe_with_a_key_twice(desk):
    return ["run", desk.write("recipe.yaml", "seed: 1\nseed: 2\n"), "--out", desk.out]


@row(2, "recipe.yaml", "not YAML", "python")
def recipe_with_a_python_tag(desk):
    tag = f"target: !!python/object/apply:os.mkdir ['{desk.folder / 'ran'}']\n"
    return ["run", desk.write("recipe.yaml", tag), "--out", desk.out]


@row(2, "target is missing", "source is missing", "calibration is missing")
def flags_that_say_too_little(desk):
    return ["run", "--preset", "paper", "--out", desk.out]


#: One flag with a value that cannot be: name of the row -> (flag, value, words of the sentence).
VALUES = {
    "epsilon of zero": ("epsilon", "0", "epsilon", "greater than 0"),
    "negative epsilon": ("epsilon", "-0.1", "epsilon", "greater than 0"),
    "epsilon that is not a number": ("epsilon", "nan", "epsilon"),
    "layer epsilon of zero": ("layer_epsilon", "0", "layer_epsilon", "greater than 0"),
    "no iterations": ("max_iterations", "0", "max_iterations"),
    "negative strength": ("strength", "-1", "strength"),
    "strength above one": ("strength", "1.5", "strength", "[0, 1]"),
    "unknown preset": ("preset", "papier", "preset", "paper, barycentric, delta", "'papier'"),
    "unknown weight": ("weights", "down,dwon", "weights", "'dwon'"),
    "missing out": ("out", None, "--out"),
    "nonsense mesh": ("mesh", "two by four", "--mesh", "data=2,model=4"),
    "mesh with an unknown axis": ("mesh", "pipeline=2", "mesh axis", "'pipeline'", "data, model"),
    "mesh larger than the machine": ("mesh", "data=64", "mesh", "does not fit"),
    "mesh of zero": ("mesh", "data=0", "mesh"),
    "size that is none": ("memory_limit", "plenty", "--memory-limit", "8GiB"),
    "negative mesh": ("mesh", "data=-2", "mesh"),
}


def with_value(flag, value):
    """A run in which one flag has that value (None: it is not given)."""
    return lambda desk: desk.run(**{flag: value})


for _name, (_flag, _value, *_words) in VALUES.items():
    row(2, *_words, name=_name)(with_value(_flag, _value))


@row(4, "GiB", "--memory-limit allows", "--max-rows")
def run_that_does_not_fit(desk):
    return desk.run(memory_limit="64MiB")
