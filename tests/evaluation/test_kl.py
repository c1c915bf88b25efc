"""KL to the base against the definition in float64, and what must be 0."""

import dataclasses

import jax
import numpy as np
import pytest

from ot_merge_jax.data import tokenizers
from ot_merge_jax.errors import NonFiniteError
from ot_merge_jax.evaluation import kl, nll
from ot_merge_jax.io.hf import load_hf
from ot_merge_jax.models.decoder import forward
from ot_merge_jax.models.model import Model

_run = jax.jit(forward, static_argnames=("cfg",))


@pytest.fixture(scope="module")
def base(tiny_checkpoint):
    return load_hf(tiny_checkpoint("llama"))


@pytest.fixture(scope="module")
def other(tiny_checkpoint):
    """Another architecture with the same tokenizer, and more padding rows."""
    return load_hf(tiny_checkpoint("qwen3", seed=2, tokenizer="bpe", layers=2, vocab_size=336))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return tokenizers.load_tokenizer(tokenizer_folder("bpe"))


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def by_hand(base, model, cut):
    """Sum of p (log p - log q) over the scored positions, by document."""
    rows = min(base[0].vocab_size, model[0].vocab_size)
    found = np.zeros(len(cut.tokens))
    for batch, scored, owner in zip(cut.batches, cut.scored, cut.document, strict=True):
        p, q = (
            log_softmax(np.asarray(_run(params, batch, cfg=cfg)[0])[:, :-1, :rows])
            for cfg, params in (base, model)
        )
        each = (np.exp(p) * (p - q)).sum(-1)
        np.add.at(found, owner, (each * scored).sum(-1))
    return found


@pytest.mark.parametrize("max_positions", [512, 24])
def test_definition(max_positions, base, other, tokenizer, texts):
    """Two architectures, documents in one window and in several."""
    cut = nll.windows(texts[:7], tokenizer, max_positions=max_positions)
    found = kl.divergence(base, other, cut)
    assert (found > 0).all()
    np.testing.assert_allclose(found, by_hand(base, other, cut), rtol=2e-4)


def test_it_is_not_symmetric(base, other, tokenizer, texts):
    cut = nll.windows(texts[:4], tokenizer, max_positions=64)
    there = kl.divergence(base, other, cut)
    back = kl.divergence(other, base, cut)
    np.testing.assert_allclose(back, by_hand(other, base, cut), rtol=2e-4)
    assert (np.abs(there / back - 1) > 1e-3).any()


def test_the_base_has_not_moved(base, tokenizer, texts):
    cut = nll.windows(texts[:4], tokenizer, max_positions=64)
    assert (kl.divergence(base, base, cut) == 0).all()


def test_it_grows_with_the_distance(base, tokenizer, texts, tiny_checkpoint):
    cut = nll.windows(texts[:4], tokenizer, max_positions=64)
    near, far = (
        kl.divergence(base, load_hf(tiny_checkpoint("llama", drift=drift)), cut).sum()
        for drift in (0.01, 0.05)
    )
    assert 0 < near < far


def test_padding_rows_of_one_model_do_not_count(base, tokenizer, texts):
    """They are nobody's token; here they would get most of the probability."""
    cfg, params = base
    rows = cfg.vocab_size + 16
    kernel = np.asarray(params["lm_head"]["kernel"])
    wider = dict(params)
    wider["lm_head"] = {"kernel": np.pad(kernel, [(0, 0), (0, 16)], constant_values=0.3)}
    table = np.asarray(params["embed_tokens"]["embedding"])
    wider["embed_tokens"] = {"embedding": np.pad(table, [(0, 16), (0, 0)])}
    cut = nll.windows(texts[:4], tokenizer, max_positions=64)
    found = kl.divergence(base, Model(dataclasses.replace(cfg, vocab_size=rows), wider), cut)
    np.testing.assert_allclose(found, 0, atol=1e-4)


def test_models_that_overflow_are_named(base, tokenizer, texts):
    cfg, params = base
    broken = jax.tree.map(lambda leaf: leaf, params)
    broken["norm"]["scale"] = broken["norm"]["scale"] * np.nan
    cut = nll.windows(texts[:2], tokenizer, max_positions=64)
    with pytest.raises(NonFiniteError, match="document 0"):
        kl.divergence(base, Model(cfg, broken), cut)


def test_again_compiles_nothing(base, other, tokenizer, texts, caplog):
    cut = nll.windows(texts[:4], tokenizer, max_positions=64)
    kl.divergence(base, other, cut)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        kl.divergence(base, other, cut)
    assert [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()] == []
