"""The cheapest adaptation: a bias on the logits, a number for each token (method: Controls).

The gain of a merge over its target is compared with the gain of a bias alone, because much of what
a model lacks on new text is how often tokens occur there.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ot_merge_jax.evaluation import nll
from ot_merge_jax.models import decoder
from ot_merge_jax.models.config import ModelConfig
from ot_merge_jax.types import BUDGET, Batch, Params

#: Shares of the bias that are tried on the dev split.
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
_CLOSE, _ITERATIONS = 1e-3, 1000
_LEAST = (
    -80.0
)  # smallest logit relative to the largest at its position; lower ones underflow float32


class TokenBias(NamedTuple):
    """A bias fitted on one text, and how much of it is used.

    Attributes:
        bias: ``[v]`` in nats, already times ``scale``.
        scale: The share that was best on the dev split; 0: no bias.
    """

    bias: jax.Array
    scale: float


def fit(
    params: Params, cut: nll.Windows, *, cfg: ModelConfig, predictions: int = BUDGET.predictions
) -> Float[Array, " v"]:
    """The bias that makes a model predict, on average, each token as often as it occurs.

    Args:
        params: The model's parameters, in memory.
        cut: The text, from `nll.windows`.
        cfg: The model.
        predictions: How many probabilities are in memory at once; where positions times vocabulary
            is more, evenly spaced positions stand for all.

    Returns:
        ``[v]`` to add to the logits. Iterated as ``b += log f - log mean p`` from 0, where ``f``
        are the counts plus one half, until nothing changes by 1e-3 nats, at most 1000 times.

    Source: method: Controls; as iterative proportional fitting it is Deming and Stephan 1940.
    """
    counts, hidden = np.zeros(cfg.vocab_size), []
    total = int(cut.tokens.sum())
    stride = max(1, -(-total * cfg.vocab_size // predictions))
    passed = 0
    for batch, scored in zip(cut.batches, cut.scored, strict=True):
        places = np.argwhere(scored > 0)
        np.add.at(counts, np.asarray(batch.tokens)[places[:, 0], places[:, 1] + 1], 1)
        used = places[(-passed) % stride :: stride]
        passed += len(places)
        if len(used):
            hidden.append(_at(_residual(params, batch, cfg=cfg), used))
    return _fit(params, jnp.concatenate(hidden), jnp.asarray(counts, jnp.float32), cfg=cfg)


@functools.partial(jax.jit, static_argnames="cfg")
def _residual(params: Params, batch: Batch, *, cfg: ModelConfig) -> Float[Array, "b s d"]:
    """The residual stream after the last layer."""
    return decoder.hidden_states(params, batch, cfg=cfg)[0]


def _at(x: jax.Array, places: np.ndarray) -> jax.Array:
    """Some positions of the stream, picked on the host because their number always changes."""
    return jnp.asarray(np.asarray(x)[places[:, 0], places[:, 1]])


@functools.partial(jax.jit, static_argnames="cfg")
def _fit(
    params: Params, x: Float[Array, "p d"], counts: Float[Array, " v"], *, cfg: ModelConfig
) -> Float[Array, " v"]:
    """The iteration of `fit`; the model's predictions are computed once."""
    logits = decoder.head(params, x[None], cfg=cfg)[0]
    likely = jnp.exp(jnp.maximum(logits - logits.max(1, keepdims=True), _LEAST))
    wanted = jnp.log((counts + 0.5) / (counts + 0.5).sum())

    def step(carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        bias, _, done = carry
        odds = jnp.exp(bias)
        share = odds * ((1 / (likely @ odds)) @ likely) / len(x)
        change = wanted - jnp.log(share)
        return bias + change, jnp.abs(change).max(), done + 1

    start = jnp.zeros_like(counts), jnp.asarray(jnp.inf), jnp.zeros((), jnp.int32)
    bias, _, _ = jax.lax.while_loop(
        lambda carry: (carry[1] >= _CLOSE) & (carry[2] < _ITERATIONS), step, start
    )
    return bias


def chosen(
    params: Params,
    bias: jax.Array,
    dev: nll.Windows,
    *,
    cfg: ModelConfig,
    logits_at_once: int = BUDGET.logits,
) -> TokenBias:
    """The share of a bias with the lowest loss on the dev split; of equal shares the smallest.

    Args:
        params: The model's parameters.
        bias: From `fit`.
        dev: The dev split.
        cfg: The model.
        logits_at_once: As for `nll.score`.
    """
    losses = [
        nll.score(
            params, dev, cfg=cfg, text="dev split", bias=scale * bias, logits_at_once=logits_at_once
        ).nll_per_token
        for scale in SCALES
    ]
    scale = SCALES[int(np.argmin(losses))]
    return TokenBias(scale * bias, scale)


def fitted(
    params: Params,
    train: nll.Windows,
    dev: nll.Windows,
    *,
    cfg: ModelConfig,
    predictions: int = BUDGET.predictions,
    logits_at_once: int = BUDGET.logits,
) -> TokenBias:
    """`fit` on one text, `chosen` on another."""
    bias = fit(params, train, cfg=cfg, predictions=predictions)
    return chosen(params, bias, dev, cfg=cfg, logits_at_once=logits_at_once)


def peak_bytes(cfg: ModelConfig, *, tokens: int, predictions: int = BUDGET.predictions) -> int:
    """Bytes of `fit` at its peak, without the parameters: logits and their exponentials.

    Args:
        cfg: The model.
        tokens: How many tokens the text has that the bias is fitted to.
        predictions: As for `fit`.
    """
    return 2 * 4 * min(max(predictions, cfg.vocab_size), tokens * cfg.vocab_size)
