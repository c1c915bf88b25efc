"""The shipped checkpoints and texts are complete, small, disjoint and load offline."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from transformers import AutoTokenizer

from ot_merge_jax.demo import assets
from ot_merge_jax.io import hf
from ot_merge_jax.models import specs

MODELS = ("source-base", "source", "sibling", "stranger")


def _texts(name: str) -> list[str]:
    lines = assets.path(name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def test_the_assets_fit_in_20_megabytes():
    files = [path for path in assets.path(".").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20_000_000


def test_the_licence_and_the_notice_ship():
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in assets.path("LICENSE-PSF.txt").read_text()
    assert "train_demo_models.py" in assets.path("NOTICE.md").read_text()


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_holds_a_model_and_nothing_about_its_making(name):
    found = {path.name for path in assets.path(name).iterdir()}
    assert found == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_bfloat16_and_finite(name):
    _, params = hf.load_hf(assets.path(name))
    for leaf in jax.tree.leaves(params):
        assert leaf.dtype == jax.numpy.bfloat16
        assert np.isfinite(np.asarray(leaf, np.float32)).all()


def test_sizes_and_families_are_those_of_the_specification():
    configs = {name: hf.load_hf(assets.path(name))[0] for name in MODELS}
    assert configs["source"] == configs["source-base"]
    assert 2.5e6 < specs.count(configs["source"]) < 3.1e6
    assert 0.8e6 < specs.count(configs["sibling"]) < 1.2e6
    assert configs["stranger"].family == "qwen2"
    assert configs["sibling"].family == "llama"


@pytest.mark.parametrize("name", MODELS)
def test_the_tokenizer_loads_offline_and_agrees_with_the_config(name):
    tokenizer = AutoTokenizer.from_pretrained(assets.path(name), local_files_only=True)
    config = json.loads((assets.path(name) / "config.json").read_text())
    assert len(tokenizer) == config["vocab_size"]
    assert tokenizer.eos_token_id == config["eos_token_id"]
    text = _texts("heldout.jsonl")[0]
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (ids[0] == config["bos_token_id"]) == (name != "stranger")


def test_the_sibling_shares_the_tokenizer_of_the_source_and_the_stranger_does_not():
    files = {name: (assets.path(name) / "tokenizer.json").read_bytes() for name in MODELS}
    assert files["sibling"] == files["source"] == files["source-base"]
    assert files["stranger"] != files["source"]


def test_calibration_and_heldout_texts_are_disjoint_and_enough():
    calibration, heldout = _texts("calibration.jsonl"), _texts("heldout.jsonl")
    assert not set(calibration) & set(heldout)
    assert len(set(calibration)) == len(calibration) >= 300
    assert len(set(heldout)) == len(heldout) >= 150
