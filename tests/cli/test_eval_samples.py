"""`ot-merge eval --generate`: the same beginnings for every model, readable and harmless."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from ot_merge_jax.data import tokenizers
from ot_merge_jax.io.hf import load_hf
from ot_merge_jax.models.generation import generate

HOSTILE = "[b]x[/b] \x1b[31mred \x9b2J \x07 \u202e :smile: "


@pytest.fixture(scope="module")
def called(models, text_files, cli):
    """`eval` of two models with tokenizers of their own, as JSON."""
    words = ("eval", models["llama-target"], models["qwen2-target"], "--text", text_files[1])
    found = cli(*words, "--generate", 3, "--new-tokens", 5, "--json")
    assert found.code == 0, found.err
    return found.json


def test_json(called, models, text_files):
    """Prompts begin the documents; texts are those of `generate` in the model's own tokens."""
    lines = text_files[1].read_text(encoding="utf-8").splitlines()
    assert set(called) == {"models", "pairs", "samples"}
    assert len(called["samples"]) == 3
    for line, one in zip(lines, called["samples"], strict=False):
        assert set(one) == {"prompt", "continuations"}
        assert line.startswith(one["prompt"])
        assert 0 < len(one["prompt"]) < len(line)
        for name in ("llama-target", "qwen2-target"):
            folder = models[name]
            cfg, params = load_hf(folder, dtype="float32")
            tokenizer = tokenizers.load_tokenizer(folder)
            ids = jnp.array([tokenizer(one["prompt"])["input_ids"]])
            new = np.asarray(generate(params, ids, ids >= 0, cfg=cfg, max_new_tokens=5))[0].tolist()
            end = new.index(cfg_eos) if (cfg_eos := eos_of(folder)) in new else 5
            said = one["continuations"][str(folder)]
            assert (said["tokens"], said["ended"]) == (end, end < 5)
            before = tokenizer.decode(ids[0].tolist())
            assert before + said["text"] == tokenizer.decode([*ids[0].tolist(), *new[:end]])


def eos_of(folder):
    return json.loads((folder / "generation_config.json").read_text())["eos_token_id"]


@pytest.mark.parametrize("columns", [80, 40])
def test_nothing_of_a_text_commands_the_terminal(columns, models, text_files, tmp_path, cli):
    path = tmp_path / "hostile.jsonl"
    path.write_text(json.dumps({"text": HOSTILE + " ".join(["songs"] * 99)}) + "\n")
    called = cli(
        "eval", models["llama-target"], "--text", path, "--generate", 1, "--new-tokens", 4,
        columns=columns,
    )  # fmt: skip
    assert called.code == 0, called.err
    assert all(one.isprintable() or one == "\n" for one in called.out)
    shown = "".join(called.out.split())
    for text in (r"[b]x[/b]\x1b[31mred", r"\x9b2J", r"\x07"):
        assert text in shown
    block = called.out[called.out.index("1. [b]") :]
    assert max(map(len, block.splitlines())) <= columns


def test_without_the_flag_there_are_none(models, text_files, cli):
    found = cli("eval", models["llama-target"], "--text", text_files[1], "--json")
    assert set(found.json) == {"models", "pairs"}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--generate", -1), 2, "--generate"),
        (("--generate", 1, "--new-tokens", 0), 2, "--new-tokens"),
        (("--generate", 1, "--new-tokens", 600), 3, "exceed the context of 512"),
    ],
)
def test_refused(words, code, message, models, text_files, cli):
    called = cli("eval", models["llama-target"], "--text", text_files[1], *words)
    assert called.code == code
    assert message in called.err
