"""The cheapest adaptation there is: one bias for each token on the logits (method: Controls).

What a merge gains over its target is compared with what a bias alone gains, because much of what a
model lacks on new text is how often tokens occur there.
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
_LEAST = -80.0  # of a logit below the largest of its position; smaller ones leave float32


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
        params: Of the model, in memory.
        cut: The text, from `nll.windows`.
        cfg: The model.
        predictions: Probabilities that are held at once; where positions times vocabulary is more,
            an even part of the positions stands for all.

    Returns:
        ``[v]`` to add to the logits. Iterated as ``b += log f - log mean p`` from 0, where ``f``
        are the counts plus one half, until nothing changes by 1e-3 nats, at most 1000 times.

    Source: method: Controls; as iterative proportional fitting it is Deming and Stephan 1940.
    """
    counts, hidden = np.zeros(cfg.vocab_size), []
    total = int(cut.tokens.sum())
    stride = max(1, -(-total * cfg.vocab_size // predictions))
    seen = 0
    for batch, scored in zip(cut.batches, cut.scored, strict=True):
        places = np.argwhere(scored > 0)
        np.add.at(counts, np.asarray(batch.tokens)[places[:, 0], places[:, 1] + 1], 1)
        kept = places[(-seen) % stride :: stride]
        seen += len(places)
        if len(kept):
            hidden.append(_at(_residual(params, batch, cfg=cfg), kept))
    return _fit(params, jnp.concatenate(hidden), jnp.asarray(counts, jnp.float32), cfg=cfg)


@functools.partial(jax.jit, static_argnames="cfg")
def _residual(params: Params, batch: Batch, *, cfg: ModelConfig) -> Float[Array, "b s d"]:
    """The residual stream behind the last layer."""
    return decoder.hidden_states(params, batch, cfg=cfg)[0]


def _at(x: jax.Array, places: np.ndarray) -> jax.Array:
    """Some positions of it, picked on the host because their number is never the same."""
    return jnp.asarray(np.asarray(x)[places[:, 0], places[:, 1]])


@functools.partial(jax.jit, static_argnames="cfg")
def _fit(
    params: Params, x: Float[Array, "p d"], counts: Float[Array, " v"], *, cfg: ModelConfig
) -> Float[Array, " v"]:
    """The iteration; the predictions are made once."""
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
    """The share of a bias with the lowest loss on the dev split; of equal ones the smaller.

    Args:
        params: Of the model.
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
    """Bytes of `fit` at its peak, beside the parameters: logits and their exponentials.

    Args:
        cfg: The model.
        tokens: Of the text that the bias is fitted to.
        predictions: As for `fit`.
    """
    return 2 * 4 * min(max(predictions, cfg.vocab_size), tokens * cfg.vocab_size)
