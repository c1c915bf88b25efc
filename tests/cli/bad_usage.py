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


@row(2, "recipe.yaml", "not YAML", "mend")
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


@row(2, "epsilon", "greater than 0")
def epsilon_of_zero(desk):
    return desk.run(epsilon="0")


@row(2, "epsilon", "greater than 0")
def negative_epsilon(desk):
    return desk.run(epsilon="-0.1")


@row(2, "epsilon")
def epsilon_that_is_not_a_number(desk):
    return desk.run(epsilon="nan")


@row(2, "layer_epsilon", "greater than 0")
def layer_epsilon_of_zero(desk):
    return desk.run(layer_epsilon="0")


@row(2, "max_iterations")
def no_iterations(desk):
    return desk.run(max_iterations="0")


@row(2, "strength")
def negative_strength(desk):
    return desk.run(strength="-1")


@row(2, "strength", "[0, 1]")
def strength_above_one(desk):
    return desk.run(strength="1.5")


@row(2, "preset", "paper, barycentric, delta", "'papier'")
def unknown_preset(desk):
    return desk.run(preset="papier")


@row(2, "weights", "'dwon'")
def unknown_weight(desk):
    return desk.run(weights="down,dwon")


@row(2, "--out")
def missing_out(desk):
    return desk.run(out=None)


@row(2, "--mesh", "data=2,model=4")
def nonsense_mesh(desk):
    return desk.run(mesh="two by four")


@row(2, "mesh axis", "'pipeline'", "data, model")
def mesh_with_an_unknown_axis(desk):
    return desk.run(mesh="pipeline=2")


@row(2, "mesh", "does not fit")
def mesh_larger_than_the_machine(desk):
    return desk.run(mesh="data=64")


@row(2, "mesh")
def mesh_of_zero(desk):
    return desk.run(mesh="data=0")


@row(2, "mesh")
def negative_mesh(desk):
    return desk.run(mesh="data=-2")
