"""Log-probabilities of continuations against a softmax by hand, and what is cut off."""

import jax
import numpy as np
import pytest

from ot_merge_jax.errors import NonFiniteError
from ot_merge_jax.evaluation import loglikelihood
from ot_merge_jax.evaluation.loglikelihood import Request
from ot_merge_jax.io.hf import load_hf
from ot_merge_jax.models.decoder import forward
from ot_merge_jax.types import Batch

_run = jax.jit(forward, static_argnames=("cfg",))


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load_hf(tiny_checkpoint("llama"))


def logits_of(model, tokens):
    """Logits of one sequence, float64."""
    cfg, params = model
    padded, no_rows = np.zeros((1, 64), np.int32), np.zeros((1, 1), np.int32)
    padded[0, : len(tokens)] = tokens
    batch = Batch(padded, np.arange(64)[None] < len(tokens), no_rows, no_rows - 1)
    return np.asarray(_run(params, batch, cfg=cfg)[0], np.float64)[0, : len(tokens)]


def by_hand(model, request):
    tokens, scored = request
    logits = logits_of(model, tokens)[-scored - 1 : -1]
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    end = tokens[-scored:]
    return log[range(scored), end].sum(), (logits.argmax(-1) == end).all()


def test_definition(model, rng):
    """Contexts and continuations of all lengths, some of them what the model would write."""
    cfg, _ = model
    requests = []
    for length in (1, 2, 3, 15, 16, 17, 40):
        context = rng.integers(0, cfg.vocab_size, length).tolist()
        requests += [
            Request([*context, *rng.integers(0, cfg.vocab_size, n).tolist()], n) for n in (1, 2, 7)
        ]
        best = [int(logits_of(model, context)[-1].argmax())]
        second = int(logits_of(model, context + best)[-1].argmax())
        requests += [Request([*context, *best], 1), Request([*context, *best, second], 2)]
        requests.append(Request([*context, *best, (second + 1) % cfg.vocab_size], 2))
    found = loglikelihood.score(model[1], requests, cfg=cfg)
    log, greedy = zip(*(by_hand(model, one) for one in requests), strict=True)
    np.testing.assert_allclose(found.log, log, rtol=1e-5)
    assert found.is_greedy.tolist() == [bool(one) for one in greedy]
    assert 0 < sum(found.is_greedy) < len(requests)


def test_order_and_company_do_not_matter(model, rng):
    requests = [Request(rng.integers(0, 300, n).tolist(), 2) for n in (5, 30, 9, 5, 18)]
    together = loglikelihood.score(model[1], requests, cfg=model[0])
    turned = loglikelihood.score(model[1], requests[::-1] + requests[:1], cfg=model[0])
    np.testing.assert_allclose(turned.log[:5][::-1], together.log, rtol=1e-5)
    assert turned.log[5] == turned.log[4]  # an equal request is the same number


@pytest.mark.parametrize("scored", [1, 3, 6])
def test_cut_keeps_the_end(scored):
    """Positions are needed for all tokens but the last: one more fits than the context holds."""
    tokens = list(range(7))
    found = loglikelihood.cut(tokens[:-scored], tokens[-scored:], max_positions=6)
    assert found == (tokens, scored)
    found = loglikelihood.cut(tokens[:-scored], tokens[-scored:], max_positions=4)
    assert found == (tokens[2:], min(scored, 4))


def test_a_full_context_is_not_padded_beyond_it(model):
    """513 tokens of which 512 are read: one shape of 512, and not of 1024."""
    cfg, params = model
    tokens = (np.arange(600) % 290).tolist()
    request = loglikelihood.cut(tokens[:-4], tokens[-4:], max_positions=cfg.max_positions)
    assert len(request.tokens) == cfg.max_positions + 1
    short = Request(request.tokens[300:], 4)
    found = loglikelihood.score(params, [request, short], cfg=cfg)
    assert np.isfinite(found.log).all()
    assert found.log[0] != found.log[1]


def test_no_request_is_no_score(model):
    assert loglikelihood.score(model[1], [], cfg=model[0]).log.shape == (0,)


def test_overflow_is_an_error(model):
    cfg, params = model
    broken = jax.tree.map(lambda leaf: leaf * np.nan, params)
    with pytest.raises(NonFiniteError, match="riddles"):
        loglikelihood.score(broken, [Request([1, 2, 3], 1)], cfg=cfg, what="riddles")
