"""The unigram control: the bias does what it says, on models where the answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_merge_jax.data import tokenizers
from ot_merge_jax.evaluation import nll, token_bias
from ot_merge_jax.io.hf import load_hf
from ot_merge_jax.models import decoder


@pytest.fixture(scope="module")
def model(tiny_checkpoint, texts):
    """(cfg, params, windows of the texts)."""
    folder = tiny_checkpoint("llama", layers=2)
    cfg, params = load_hf(folder)
    cut = nll.windows(texts, tokenizers.load_tokenizer(folder), max_positions=cfg.max_positions)
    return cfg, params, cut


def frequencies(cut, vocabulary):
    """How often each token is to be predicted, as `token_bias.fit` smooths it."""
    counts = np.full(vocabulary, 0.5)
    for batch, scored in zip(cut.batches, cut.scored, strict=True):
        np.add.at(counts, np.asarray(batch.tokens)[:, 1:][scored > 0], 1)
    return counts / counts.sum()


def mean_prediction(model, bias):
    """The mean predicted distribution over all scored positions, written out."""
    cfg, params, cut = model
    total, count = np.zeros(cfg.vocab_size), 0
    for batch, scored in zip(cut.batches, cut.scored, strict=True):
        logits = decoder.forward(params, jax.device_put(batch), cfg=cfg)[0][:, :-1]
        likely = np.asarray(jax.nn.softmax(logits + bias))[np.asarray(scored) > 0]
        total, count = total + likely.sum(0), count + len(likely)
    return total / count


def test_the_mean_prediction_becomes_the_frequency(model):
    cfg, params, cut = model
    bias = token_bias.fit(params, cut, cfg=cfg)
    wanted = frequencies(cut, cfg.vocab_size)
    assert np.abs(np.log(mean_prediction(model, 0.0) / wanted)).max() > 1
    assert np.abs(np.log(mean_prediction(model, bias) / wanted)).max() < 3 * token_bias._CLOSE


def test_part_of_the_positions_stands_for_all(model, monkeypatch):
    cfg, params, cut = model
    whole = token_bias.fit(params, cut, cfg=cfg)
    third = int(cut.tokens.sum()) * cfg.vocab_size // 3
    part = token_bias.fit(params, cut, cfg=cfg, predictions=third)
    assert float(np.corrcoef(whole, part)[0, 1]) > 0.95
    assert np.abs(whole - part).max() > 0


def test_a_bias_is_added_to_the_logits(model):
    cfg, params, cut = model
    bias = jnp.zeros(cfg.vocab_size).at[7].set(50.0)  # token 7 becomes certain
    found = nll.score(params, cut, cfg=cfg, bias=bias)
    sevens = sum(
        int(((np.asarray(batch.tokens)[:, 1:] == 7) & (scored > 0)).sum())
        for batch, scored in zip(cut.batches, cut.scored, strict=True)
    )
    plain = nll.score(params, cut, cfg=cfg)
    assert found.nll_per_token > plain.nll_per_token + 20 * (1 - sevens / cut.tokens.sum())
    zero = nll.score(params, cut, cfg=cfg, bias=jnp.zeros(cfg.vocab_size))
    np.testing.assert_allclose(zero.nll, plain.nll, rtol=1e-6)


def test_the_share_is_chosen_on_the_dev_split(model):
    cfg, params, cut = model
    bias = token_bias.fit(params, cut, cfg=cfg)
    found = token_bias.chosen(params, bias, cut, cfg=cfg)
    assert found.scale == 1.0  # on the text it was fitted to
    np.testing.assert_array_equal(found.bias, bias)
    assert token_bias.chosen(params, 50 * bias[::-1], cut, cfg=cfg).scale == 0.0
