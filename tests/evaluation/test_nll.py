"""Held-out loss against a log-softmax by hand over whole documents, and how windows are cut."""

import math

import jax
import numpy as np
import pytest

from ot_merge_jax.data import tokenizers
from ot_merge_jax.errors import InputError, NonFiniteError
from ot_merge_jax.evaluation import nll
from ot_merge_jax.io.hf import load_hf
from ot_merge_jax.models.decoder import forward
from ot_merge_jax.types import Batch


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def scored(request, tiny_checkpoint, texts):
    """(cfg, params, tokenizer, prefix token, documents); llama has a BOS, qwen2 an EOS alone."""
    folder = tiny_checkpoint(request.param)
    cfg, params = load_hf(folder)
    tokenizer = tokenizers.load_tokenizer(folder)
    prefix = {"llama": tokenizer.bos_token_id, "qwen2": tokenizer.eos_token_id}[request.param]
    assert prefix is not None
    return cfg, params, tokenizer, prefix, texts[:9]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return tokenizers.load_tokenizer(tokenizer_folder("bpe"))


_run = jax.jit(forward, static_argnames=("cfg",))


def by_hand(cfg, params, ids, prefix):
    """Loss of each token of one document after the prefix, float64, one sequence at a time."""
    sequence = [prefix, *ids]
    tokens = np.zeros((1, 256), np.int32)
    tokens[0, : len(sequence)] = sequence
    mask = np.arange(256)[None] < len(sequence)
    no_rows = np.zeros((1, 1), np.int32)
    logits = np.asarray(_run(params, Batch(tokens, mask, no_rows, no_rows - 1), cfg=cfg)[0])
    logits = logits[0, : len(ids)].astype(np.float64)
    top = logits.max(-1, keepdims=True)
    log_softmax = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return -log_softmax[np.arange(len(ids)), ids]


def test_loss_of_whole_documents(scored):
    cfg, params, tokenizer, prefix, documents = scored
    cut = nll.windows(documents, tokenizer, max_positions=cfg.max_positions)
    scores = nll.score(params, cut, cfg=cfg)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in documents]
    assert max(map(len, ids)) < 256
    expected = [by_hand(cfg, params, one, prefix).sum() for one in ids]
    np.testing.assert_allclose(scores.nll, expected, rtol=1e-5)
    assert scores.tokens.tolist() == [len(one) for one in ids]
    assert scores.bytes.tolist() == [len(text.encode()) for text in documents]


def test_documents_are_scored_alone(scored):
    """Neither the company nor the order of the other documents matters."""
    cfg, params, tokenizer, _, documents = scored
    together = nll.score(params, nll.windows(documents, tokenizer, max_positions=64), cfg=cfg)
    turned = nll.score(params, nll.windows(documents[::-1], tokenizer, max_positions=64), cfg=cfg)
    few = nll.score(params, nll.windows(documents[3:5], tokenizer, max_positions=64), cfg=cfg)
    np.testing.assert_allclose(turned.nll[::-1], together.nll, rtol=1e-5)
    np.testing.assert_allclose(few.nll, together.nll[3:5], rtol=1e-5)


def test_per_token_and_per_byte():
    """Sums over documents, not means of means; nats to bits."""
    scores = nll.Scores(np.array([10.0, 50.0]), np.array([4, 16]), np.array([10, 20]))
    assert scores.nll_per_token == pytest.approx(3.0)
    assert scores.bits_per_byte == pytest.approx(2 / math.log(2))


def test_bytes_are_those_of_the_utf8_text(tokenizer):
    """Not characters: most of these are more than one byte."""
    documents = ["山河", "ελιά", "a b", "naïve 🙂"]
    cut = nll.windows(documents, tokenizer, max_positions=64)
    assert cut.bytes.tolist() == [6, 8, 3, 11]


def test_a_uniform_model_costs_log_v_nats_a_token(tokenizer, tiny_checkpoint, texts):
    """All weights zero: every token of every document has probability 1/v."""
    cfg, params = load_hf(tiny_checkpoint("llama"))
    params = jax.tree.map(np.zeros_like, params)
    cut = nll.windows(texts[:9], tokenizer, max_positions=64)
    scores = nll.score(params, cut, cfg=cfg)
    np.testing.assert_allclose(scores.nll / scores.tokens, math.log(cfg.vocab_size), rtol=1e-5)
    assert scores.nll_per_token == pytest.approx(math.log(cfg.vocab_size), rel=1e-5)
    expected = math.log2(cfg.vocab_size) * scores.tokens.sum() / scores.bytes.sum()
    assert scores.bits_per_byte == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------ windows


def pieces(cut):
    """Document -> its windows in order of what they score: (sequence, scored tokens)."""
    found = {}
    for batch, scored, owner in zip(cut.batches, cut.scored, cut.document, strict=True):
        assert scored.shape == (batch.tokens.shape[0], batch.tokens.shape[1] - 1)
        for tokens, mask, counts, document in zip(
            batch.tokens, batch.mask, scored, owner, strict=True
        ):
            length = int(mask.sum())
            assert mask[:length].all()
            assert not counts[max(length - 1, 0) :].any()  # nothing beyond the last real token
            assert set(np.unique(counts)) <= {0, 1}
            if length:
                chosen = tokens[1:][counts > 0].tolist()
                found.setdefault(int(document), []).append((tokens[:length].tolist(), chosen))
    return found


@pytest.mark.parametrize("max_positions", [2, 3, 4, 7, 16, 33, 512])
def test_every_token_counts_once(tokenizer, texts, max_positions):
    documents = [*texts[:12], "a", " ".join(texts[:9])]
    cut = nll.windows(documents, tokenizer, max_positions=max_positions)
    found = pieces(cut)
    for index, text in enumerate(documents):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert cut.tokens[index] == len(ids)
        assert sum(len(chosen) for _, chosen in found[index]) == len(ids)
        for sequence, chosen in found[index]:
            assert len(sequence) <= max_positions
            assert sequence[len(sequence) - len(chosen) :] == chosen  # the end of a window counts
        starts = [sequence for sequence, _ in found[index] if sequence[0] == tokenizer.bos_token_id]
        assert starts == [[tokenizer.bos_token_id, *ids][: min(max_positions, len(ids) + 1)]]


@pytest.mark.parametrize("max_positions", [2, 3, 4, 7, 16, 33])
def test_windows_put_together_are_the_document(tokenizer, texts, max_positions):
    """Tokens in order, each with at least half a context before it, except at the start."""
    text = " ".join(texts[:3])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    [windows] = pieces(nll.windows([text], tokenizer, max_positions=max_positions)).values()
    assert len(windows) > 1
    whole = [tokenizer.bos_token_id, *ids]
    remaining = {start: [] for start in range(len(ids))}
    for sequence, chosen in windows:
        starts = [
            place for place in range(len(whole)) if whole[place : place + len(sequence)] == sequence
        ]
        assert starts, "a window is a stretch of the document"
        context = len(sequence) - len(chosen)
        assert context >= (1 if sequence[0] == whole[0] else max_positions // 2)
        for start in starts:
            first = start + context - 1
            if not remaining.get(first) and first in remaining:
                remaining[first] = chosen
    joined, place = [], 0
    while place < len(ids):
        assert remaining[place], f"token {place} starts no window"
        joined += remaining[place]
        place += len(remaining[place])
    assert joined == ids


def test_a_document_longer_than_the_context_is_scored_by_its_windows(scored):
    """Against the log-softmax by hand of every window; of each only the scored part counts."""
    cfg, params, tokenizer, _, documents = scored
    text = " ".join(documents)
    cut = nll.windows([text], tokenizer, max_positions=64)
    expected = 0.0
    for sequence, chosen in pieces(cut)[0]:
        losses = by_hand(cfg, params, sequence[1:], sequence[0])
        expected += losses[len(losses) - len(chosen) :].sum()
    scores = nll.score(params, cut, cfg=cfg)
    assert scores.tokens[0] > 128
    np.testing.assert_allclose(scores.nll[0], expected, rtol=1e-5)


def test_a_document_that_just_fits_is_one_window(tokenizer, texts):
    ids = tokenizer(texts[0], add_special_tokens=False)["input_ids"]
    for max_positions, count in ((len(ids) + 2, 1), (len(ids) + 1, 1), (len(ids), 2)):
        cut = nll.windows([texts[0]], tokenizer, max_positions=max_positions)
        assert len(pieces(cut)[0]) == count


def test_windows_have_few_shapes_of_bounded_size(tokenizer, texts):
    cut = nll.windows(texts * 3, tokenizer, max_positions=512)
    shapes = {batch.tokens.shape for batch in cut.batches}
    assert len(shapes) <= 6
    assert all(batch.tokens.size <= 4096 for batch in cut.batches)


def test_an_empty_document_costs_nothing(scored):
    cfg, params, tokenizer, _, documents = scored
    cut = nll.windows([documents[0], "", documents[1]], tokenizer, max_positions=64)
    scores = nll.score(params, cut, cfg=cfg)
    alone = nll.score(params, nll.windows(documents[:2], tokenizer, max_positions=64), cfg=cfg)
    assert scores.tokens[1] == scores.bytes[1] == scores.nll[1] == 0
    np.testing.assert_allclose(scores.nll[[0, 2]], alone.nll, rtol=1e-5)


@pytest.mark.parametrize("max_positions", [-1, 0, 1])
def test_a_context_that_holds_no_token_raises(tokenizer, max_positions):
    with pytest.raises(InputError, match="context"):
        nll.windows(["a text"], tokenizer, max_positions=max_positions)


@pytest.mark.parametrize("documents", [[], [""], ["", ""]])
def test_no_text_raises(tokenizer, documents):
    with pytest.raises(InputError, match="0 documents"):
        nll.windows(documents, tokenizer, max_positions=64)


def test_a_tokenizer_without_bos_and_eos_raises(tokenizer_folder):
    tokenizer = tokenizers.load_tokenizer(tokenizer_folder("bpe"))
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(InputError, match="neither"):
        nll.windows(["one"], tokenizer, max_positions=64)


def test_a_loss_that_is_not_finite_names_the_document(scored):
    """A token whose embedding is NaN spoils the document that holds it, and no other."""
    cfg, params, tokenizer, _, documents = scored
    documents = [documents[0], documents[1] + " 1984"]
    ids = [set(tokenizer(text)["input_ids"]) for text in documents]
    only = min(ids[1] - ids[0])
    broken = jax.tree.map(lambda leaf: leaf, params)
    table = broken["embed_tokens"]["embedding"]
    broken["embed_tokens"]["embedding"] = table.at[only].set(np.nan)
    with pytest.raises(NonFiniteError, match="document 1"):
        nll.score(broken, nll.windows(documents, tokenizer, max_positions=64), cfg=cfg)


def test_scoring_again_compiles_nothing(scored, caplog):
    cfg, params, tokenizer, _, documents = scored
    cut = nll.windows(documents, tokenizer, max_positions=64)
    nll.score(params, cut, cfg=cfg)
    other = jax.device_put(jax.tree.map(np.array, params))
    with jax.log_compiles(), caplog.at_level("WARNING"):
        nll.score(other, cut, cfg=cfg)
    assert [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()] == []
