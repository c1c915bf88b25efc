"""How far a model has moved from its base: the KL divergence on documents. Imports models, nll."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ot_merge_jax import progress
from ot_merge_jax.distributed import sharding
from ot_merge_jax.errors import NonFiniteError
from ot_merge_jax.evaluation.nll import Windows, largest_window, sequences_at_once
from ot_merge_jax.models import decoder
from ot_merge_jax.models.config import ModelConfig
from ot_merge_jax.models.model import AnyModel
from ot_merge_jax.types import BUDGET, Batch, Params


def divergence(
    base: AnyModel,
    model: AnyModel,
    cut: Windows,
    *,
    text: str = "held-out text",
    logits_at_once: int = BUDGET.logits,
) -> np.ndarray:
    r"""KL divergence of the next-token distributions, summed over the tokens of each document.

    .. math:: D = \sum_t \sum_v p(v \mid x_{<t}) \, \log \frac{p(v \mid x_{<t})}{q(v \mid x_{<t})}

    with ``p`` of the base and ``q`` of the model. It is 0 for the base itself, and counts every
    change of what a model would say, where the loss counts only the change at the token that came.

    Args:
        base: The model that the other was made from; its parameters are in memory.
        model: The other model, in memory too, with the same tokenizer. It may have another
            architecture, and more or fewer padding rows in its vocabulary: the rows that both have
            are compared, and each distribution is normalised over them.
        cut: From `nll.windows`, for the shorter of the two contexts.
        text: What the documents are, for the progress line.
        logits_at_once: How many logits of both models are in memory, at least those of one
            sequence.

    Returns:
        Nats of each document, ``[documents]`` float64; over ``cut.tokens`` they are nats per token.

    Raises:
        NonFiniteError: if a divergence is not finite.

    Source: Kullback and Leibler 1951. Differs: nothing.
    """
    mesh = sharding.mesh_of(base.params)
    parts = list(zip(cut.batches, cut.scored, cut.document, strict=True))
    nats = np.zeros(len(cut.tokens))
    for batch, scored, document in progress.track(parts, f"compare on {text} (batches)"):
        split = sharding.split_batch(batch, mesh)
        both = base.params, model.params
        sums = _sequences(
            both, split, scored, cfgs=(base.cfg, model.cfg), logits_at_once=logits_at_once
        )
        np.add.at(nats, document, np.asarray(sums, np.float64))
    if not np.isfinite(nats).all():
        raise NonFiniteError(
            f"The divergence of document {int(np.argmin(np.isfinite(nats)))} of the {text} is not "
            "finite: the weights of a model overflow there; check the checkpoints."
        )
    return nats


@functools.partial(jax.jit, static_argnames=("cfgs", "logits_at_once"))
def _sequences(
    both: tuple[Params, Params],
    batch: Batch,
    scored: Any,
    *,
    cfgs: tuple[ModelConfig, ModelConfig],
    logits_at_once: int,
) -> jax.Array:
    """Summed divergence of the scored positions of each sequence ``[b]``.

    Both models run in one program; logits are computed for a few sequences at a time, as in `nll`.
    """
    models = list(zip(cfgs, both, strict=True))
    hidden = tuple(decoder.hidden_states(params, batch, cfg=cfg)[0] for cfg, params in models)
    shared = min(cfg.vocab_size for cfg in cfgs)

    def sequence_nats(args: tuple[tuple[jax.Array, jax.Array], jax.Array]) -> jax.Array:
        last, counted = args
        p, q = (
            jax.nn.log_softmax(decoder.head(params, x[None, :-1], cfg=cfg)[0, :, :shared], -1)
            for x, (cfg, params) in zip(last, models, strict=True)
        )
        return jnp.sum(jnp.sum(jnp.exp(p) * (p - q), -1) * counted)

    size, length = batch.tokens.shape
    widest = max(cfg.vocab_size for cfg in cfgs)
    at_once = sequences_at_once(size, 2 * length * widest, logits_at_once)
    return jax.lax.map(sequence_nats, (hidden, scored), batch_size=at_once)


def peak_bytes(
    cfgs: tuple[ModelConfig, ModelConfig],
    scored: Sequence[int],
    *,
    logits_at_once: int = BUDGET.logits,
) -> int:
    """Bytes of `divergence` at its peak, without the parameters of both models.

    Args:
        cfgs: Both models.
        scored: How many tokens each document has at most.
        logits_at_once: As for `divergence`.

    Returns:
        The larger of two: the layers of both models on a batch, because one program may run them
        side by side; or, after the layers, the hidden states of the batch with, for some sequences,
        both models' logits and what is computed from them.
    """
    size, length = largest_window(min(cfgs, key=lambda cfg: cfg.max_positions), scored)
    widest = max(cfg.vocab_size for cfg in cfgs)
    at_once = sequences_at_once(size, 2 * length * widest, logits_at_once)
    steps = sum(decoder.peak_bytes(cfg, size=size, length=length) for cfg in cfgs)
    hidden = size * length * sum(cfg.hidden_size for cfg in cfgs)
    return max(4 * (3 * at_once * length * widest + hidden), steps)
