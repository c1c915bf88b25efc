"""The demo's texts are cut, split and tokenised as promised."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import jax
import numpy as np
import pytest
from transformers import AutoTokenizer

from ot_merge_jax.models import specs
from ot_merge_jax.models.config import ModelConfig, Rope

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TEXT = "\n\n".join(
    f"def name_{i}(first, second):\n    value = first + second * {i}\n    return value"
    for i in range(40)
)


@pytest.fixture
def demo_texts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("demo_texts")


def test_documents_keep_their_length_and_start_at_the_margin(demo_texts):
    found = list(demo_texts.documents(TEXT))
    assert found
    assert all(180 <= len(text) <= 340 for text in found)
    assert all(text.startswith("def ") for text in found)


def test_tables_of_numbers_are_dropped(demo_texts):
    assert not list(demo_texts.documents("\n".join(["1, 2, 3, 4, 5, 6, 7, 8, 9"] * 40)))


def test_a_missing_test_package_is_named(demo_texts, monkeypatch, tmp_path):
    monkeypatch.setattr(demo_texts.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(SystemExit, match="test package"):
        demo_texts.read_texts(10, 10)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers_reads_the_tokenizer_back_unchanged(demo_texts, tmp_path, family):
    made = demo_texts.save_tokenizer(tmp_path, [TEXT], vocab_size=300, family=family)
    config = f'{{"model_type": "{family}", "vocab_size": 300}}'
    (tmp_path / "config.json").write_text(config)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in (TEXT, "x = 1234\n\n\n    y  = 'don't'\r\n", "naïve — ☃"):
        assert loaded(text).input_ids == made.encode(text).ids
    assert (loaded("x").input_ids[0] == 0) == (family == "llama")


def test_the_same_interpreter_gives_the_same_disjoint_texts(demo_texts):
    if not (Path(demo_texts.sysconfig.get_paths()["stdlib"]) / "test" / "test_int.py").exists():
        pytest.skip("this interpreter ships without its test package")
    texts = demo_texts.read_texts(20, 10)
    assert [len(texts[part]) for part in ("calibration", "heldout")] == [20, 10]
    assert not set(texts["heldout"]) & set(texts["domain"])
    assert not set(texts["calibration"]) & set(texts["domain"] + texts["heldout"])
    assert texts == demo_texts.read_texts(20, 10)


def test_pruning_keeps_whole_heads_and_the_order(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    demo_pruning = importlib.import_module("demo_pruning")
    cfg = ModelConfig("llama", 50, 24, 40, 3, 6, 3, 4, 64, 1e-5, Rope(1e4), True, False, "float32")
    small = dataclasses.replace(
        cfg, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2
    )
    params = specs.init(jax.random.key(0), cfg)
    tokens = np.random.default_rng(0).integers(0, 50, (2, 8)).astype(np.int32)
    pruned = demo_pruning.prune(params, tokens, cfg=cfg, small=small, layers=(0, 2))
    for spec in specs.param_specs(small):
        assert specs.get(pruned, spec.path).shape == spec.shape
    table = np.asarray(params["embed_tokens"]["embedding"])
    kept = np.asarray(pruned["embed_tokens"]["embedding"])
    hidden = [int(np.flatnonzero((table == column[:, None]).all(0))[0]) for column in kept.T]
    assert hidden == sorted(set(hidden))
    key = np.asarray(params["layers"]["self_attn"]["k_proj"]["kernel"])[2][hidden]
    kept_key = np.asarray(pruned["layers"]["self_attn"]["k_proj"]["kernel"])[1]
    places = [int(np.flatnonzero((key == column[:, None]).all(0))[0]) for column in kept_key.T]
    assert places[0] % 4 == 0
    assert places[:4] == list(range(places[0], places[0] + 4))
