"""Preset ``delta`` between models whose tokenizers differ: llama and qwen2, tied and untied."""

import json

import ml_dtypes  # noqa: F401  (teaches safetensors the name bfloat16)
import numpy as np
import pytest
import safetensors.numpy
import yaml

from ot_merge_jax.data import tokenizers as tokenizers_module
from ot_merge_jax.data import vocabulary

NAMES = ["delta llama<-qwen2", "delta qwen2<-llama"]


def table(folder, name):
    """A tensor of a folder as float32, or None."""
    for path in folder.glob("*.safetensors"):
        tensors = safetensors.numpy.load_file(path)
        if name in tensors:
            return tensors[name].astype(np.float32)
    return None


@pytest.fixture(params=NAMES)
def merge(request, merged):
    return merged(request.param)


def test_rows_are_spans_by_themselves(merge, counts):
    report = merge.report
    assert report.settings["rows"] == "span"
    found = report.calibration
    assert found["rows_are"] == "span"
    # every row is an ordinary token of both; llama puts a BOS before each document, qwen2 nothing
    for role, path in (("target", merge.target), ("source", merge.source)):
        kind = json.loads((path / "config.json").read_text())["model_type"]
        ordinary = found[f"{role}_tokens"] - counts.rows * (kind == "llama")
        assert found[f"{role}_matched"] == pytest.approx(found["rows"] / ordinary)
    assert found["target_matched"] != found["source_matched"]


def test_printed_and_saved_recipe_hold_the_decision(merge):
    saved = yaml.safe_load((merge.out / "ot_merge" / "recipe.yaml").read_text())
    printed = yaml.safe_load(merge.called.err.split("seed: 0")[0] + "seed: 0")
    assert printed == saved
    assert saved["rows"] == "span"


def test_equal_tokenizers_give_token_rows(merged):
    report = merged("delta llama<-llama").report
    assert report.settings["rows"] == report.calibration["rows_are"] == "token"
    assert report.calibration["target_matched"] == 1
    assert "matched 100.0 % of the target's tokens" in " ".join(
        merged("delta llama<-llama").called.err.split()
    )


def test_matched_rows_move_and_no_others(merge, cli, tmp_path):
    """With a strength of its own, so that the choice on random models does not matter."""
    words = [*merge.arguments, "--strength", "1", "--out", tmp_path / "out", "--json"]
    called = cli(*words)
    assert called.code == 0, called.err
    tokenizers = [tokenizers_module.load_tokenizer(path) for path in (merge.target, merge.source)]
    sizes = [
        json.loads((path / "config.json").read_text())["vocab_size"]
        for path in (merge.target, merge.source)
    ]
    matched = vocabulary.matched_vocabulary(
        *tokenizers, target_size=sizes[0], source_size=sizes[1], is_one=False
    )
    expected = np.asarray(matched.target_ids).tolist()
    assert called.json["calibration"]["vocabulary_matched"] == len(expected) >= 256
    is_tied = json.loads((merge.target / "config.json").read_text())["tie_word_embeddings"]
    names = ["model.embed_tokens.weight"] + ["lm_head.weight"] * (not is_tied)
    for name in names:
        before, after = (table(path, name) for path in (merge.target, tmp_path / "out"))
        assert np.flatnonzero((before != after).any(1)).tolist() == expected, name
    assert (table(tmp_path / "out", "lm_head.weight") is None) == is_tied


@pytest.mark.catalogue("tied-embeddings")
def test_both_sides_of_tying_occur(merged):
    ties = [
        json.loads((merged(name).target / "config.json").read_text())["tie_word_embeddings"]
        for name in NAMES
    ]
    assert ties == [False, True]


def test_source_is_compared_in_bits_per_byte(merge):
    assert merge.report.evaluation["source"].against_target.metric == "bits_per_byte"
    assert merge.report.evaluation["merge"].against_target.metric == "nll_per_token"
