"""A target and a source with adapters through a whole run, and in `eval` and `inspect`."""

import hashlib
import json

import lora
import numpy as np
import pytest
import safetensors.numpy
import yaml


@pytest.fixture(scope="module")
def named(models, tmp_path_factory):
    """(target, source, adapter of the target, its merge by hand)."""
    folder, base = tmp_path_factory.mktemp("adapters"), models["llama-target"]
    ours = lora.write(folder / "ours", base, lora.linear(base))
    table = ["model.embed_tokens"]
    theirs = lora.write(folder / "theirs", models["llama-base"], table)
    (ours / "README.md").write_text("---\nlicense: mit\n---\n")
    merged = lora.merge(folder / "merged", base, ours)
    return f"{base}+{ours}", f"{models['llama-base']}+{theirs}", ours, merged


def test_a_run(named, models, text_files, tmp_path, cli, hashes):
    """The source is a fine-tune of its base by its adapter; what does not move is base + adapter,
    under the base's names, config and tokenizer."""
    target, source, ours, merged = named
    out = tmp_path / "out"
    called = cli(
        "run", "--preset", "delta", "--weights", "embed", "--strength", "0.5", "--target", target,
        "--source", source, "--source-base", models["llama-base"],
        "--calibration", text_files[0], "--out", out,
    )  # fmt: skip
    assert called.code == 0, called.err
    assert "nothing of the source" not in called.out
    written, plain = (
        safetensors.numpy.load_file(one / "model.safetensors") for one in (out, merged)
    )
    assert written.keys() == plain.keys()
    for name, tensor in plain.items():
        close = np.allclose(written[name], tensor, rtol=0, atol=1e-6)
        assert close == ("embed_tokens" not in name), name
    base = models["llama-target"]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    found = json.loads((out / "ot_merge" / "provenance.json").read_text())["inputs"]
    assert found["target"]["name"] == "llama-target+ours"
    assert found["target"]["files"].items() <= hashes(base).items()
    assert found["target"]["adapter"]["hub"] is None
    assert found["target"]["adapter"]["files"] == {
        name: hashlib.sha256((ours / name).read_bytes()).hexdigest()
        for name in ("adapter_config.json", "adapter_model.safetensors", "README.md")
    }
    assert found["source"]["adapter"]["files"]
    assert found["source base"]["adapter"] is None
    card = (out / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == [
        "llama-target", "ours", "llama-base", "theirs", "llama-base",
    ]  # fmt: skip
    assert "| target's adapter | ours | mit |" in card


def test_an_adapter_that_changed_is_not_the_same_run(named, models, text_files, tmp_path, cli):
    """`--resume` looks at the adapter's file too."""
    _, _, ours, _ = named
    base = models["llama-target"]
    copy = lora.write(tmp_path / "lora", base, lora.linear(base))
    words = (
        "run", "--preset", "barycentric", "--weights", "embed", "--strength", "0.1",
        "--target", f"{base}+{copy}", "--source", models["llama-source"],
        "--calibration", text_files[0], "--out", tmp_path / "out", "--resume",
    )  # fmt: skip
    assert cli(*words).code == 0
    assert "is finished" in " ".join(cli(*words).err.split())
    (copy / lora.FILE).unlink()
    tensors = safetensors.numpy.load_file(ours / lora.FILE)
    lora.store(copy, {name: 2 * one for name, one in tensors.items()}, lora.FILE)
    called = cli(*words)
    assert called.code == 3
    assert "exists and is not empty" in called.err


def test_eval_and_inspect(named, text_files, cli, models):
    target, _, _, merged = named
    found = cli("eval", target, merged, "--text", text_files[1], "--json")
    assert found.code == 0, found.err
    assert list(found.json["models"]) == [target, str(merged)]
    [pair] = found.json["pairs"]
    assert abs(pair["difference"]) < 1e-5
    assert (
        cli("inspect", target, "--json").json["parameters"]
        == (cli("inspect", models["llama-target"], "--json").json["parameters"])
    )


def test_refusals(named, models, text_files, tmp_path, cli):
    target, source, ours, _ = named
    words = ("--calibration", text_files[0], "--strength", "0.1", "--preset", "barycentric")
    sources = ("--source", models["llama-source"])
    alone = cli("run", "--target", ours, *sources, *words, "--out", tmp_path / "out")
    assert alone.code == 3
    assert f"write BASE+{ours}" in alone.err
    inside = cli("run", "--target", target, *sources, *words, "--out", ours / "out")
    assert inside.code == 3
    assert "lies inside the input" in inside.err
    assert not list(ours.glob("out*"))
    bad = cli("eval", f"{models['llama-target']}+{source.split('+')[1]}", "--text", text_files[1])
    assert bad.code == 3
    assert "where base and rank say [24, 3]" in bad.err
