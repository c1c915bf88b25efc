"""`ot-merge inspect` and `ot-merge families`."""

import json

import pytest
import safetensors

from ot_merge_jax.models.families import FAMILIES


def count(folder):
    """Values in the files."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safetensors.safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                size = 1
                for length in file.get_slice(name).get_shape():
                    size *= length
                total += size
    return total


@pytest.mark.parametrize(
    ("name", "family", "dtype", "tied"),
    [("llama-target", "llama", "F32", False), ("qwen2-target", "qwen2", "BF16", True)],
)
def test_inspect_says_what_is_in_the_folder(name, family, dtype, tied, models, cli):
    folder = models[name]
    found = cli("inspect", folder, "--json").json
    config = json.loads((folder / "config.json").read_text())
    assert found["parameters"] == count(folder)
    assert found["dtypes"] == [dtype]
    assert found["shards"] == sorted(path.name for path in folder.glob("*.safetensors"))
    assert found["config"]["family"] == family
    assert found["config"]["num_layers"] == config["num_hidden_layers"]
    assert found["config"]["tie_word_embeddings"] is tied
    moves = {row["weight"] for row in found["table"]} - {None}
    assert moves == {
        "q",
        "k",
        "v",
        "o",
        "gate",
        "up",
        "down",
        "embed",
        *(() if tied else ("head",)),
    }
    assert all(row["weight"] is None for row in found["table"] if "norm" in row["path"])


@pytest.mark.parametrize("columns", [80, 120])
def test_inspect_prints_every_parameter_whole(columns, models, cli):
    called = cli("inspect", models["qwen2-target"], columns=columns)
    assert called.code == 0
    assert "qwen2" in called.out
    assert "BF16" in called.out
    assert f"{count(models['qwen2-target']):,}" in called.out
    assert "…" not in called.out, "names are cut off"


def test_inspect_reads_headers_and_no_weights(models, writable_copy, cli):
    """A file of the same size and header, with a hole where the weights were, tells the same."""
    folder = writable_copy(models["llama-target"])
    path = folder / "model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        file.truncate(8 + length)
        file.truncate(size)
    expected = cli("inspect", models["llama-target"], "--json").json
    assert cli("inspect", folder, "--json").json == expected


def test_inspect_expands_the_home_folder(models, tmp_path, monkeypatch, cli):
    (tmp_path / "model").symlink_to(models["llama-target"])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli("inspect", "~/model").code == 0


def test_families_names_those_that_can_be_merged(cli):
    called = cli("families")
    assert called.code == 0
    for name in ("llama", "LlamaForCausalLM", "qwen2", "Qwen2ForCausalLM"):
        assert name in called.out


def test_families_as_json(cli):
    found = {one["model_type"]: one for one in cli("families", "--json").json}
    assert set(found) >= {"llama", "qwen2"}
    assert found["gemma2"]["only"] == {"hidden_activation": "gelu_pytorch_tanh"}
    assert found["llama"]["only"] == {}
    assert found["llama"]["architecture"] == "LlamaForCausalLM"


def test_families_are_those_that_are_accepted(cli):
    assert [one["model_type"] for one in cli("families", "--json").json] == list(FAMILIES)


@pytest.mark.parametrize("command", ["run", "eval", "inspect", "families", "demo"])
def test_help_of_every_command(command, cli):
    called = cli(command, "--help")
    assert called.code == 0
    assert "--json" in called.out
    assert command in cli("--help").out
