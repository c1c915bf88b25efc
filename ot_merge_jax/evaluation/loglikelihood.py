"""How likely a model finds the end of a sequence, given its beginning. Imports models.

Multiple-choice questions and the tasks of other harnesses need one number for each request;
`nll` scores whole texts instead.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ot_merge_jax import progress
from ot_merge_jax.data import batching
from ot_merge_jax.distributed import sharding
from ot_merge_jax.errors import NonFiniteError
from ot_merge_jax.evaluation.nll import sequences_at_once
from ot_merge_jax.models import decoder
from ot_merge_jax.models.config import ModelConfig
from ot_merge_jax.types import BUDGET, Batch, Params


class Request(NamedTuple):
    """A sequence whose end is scored.

    Attributes:
        tokens: Context and continuation.
        scored: How many tokens at the end are the continuation; the first token never is.
    """

    tokens: list[int]
    scored: int


class Likelihoods(NamedTuple):
    """An entry for each request.

    Attributes:
        log: Log-probability of the continuation, in nats, float64.
        is_greedy: Whether each of its tokens is the likeliest, so that greedy generation would have
            written it.
    """

    log: np.ndarray
    is_greedy: np.ndarray


def cut(context: Sequence[int], continuation: Sequence[int], *, max_positions: int) -> Request:
    """A request that fits the context of a model: if it is too long, its beginning is cut off.

    Args:
        context: At least one token.
        continuation: At least one token.
        max_positions: Positions of the model; the last token of the continuation needs none.

    Returns:
        The request; if the continuation is longer than the model's context, only its end is scored.

    Example:
        >>> cut([1, 2, 3], [4, 5], max_positions=3)
        Request(tokens=[2, 3, 4, 5], scored=2)
    """
    tokens = [*context, *continuation][-(max_positions + 1) :]
    return Request(tokens, min(len(continuation), len(tokens) - 1))


def score(
    params: Params, requests: Sequence[Request], *, cfg: ModelConfig, what: str = "continuations"
) -> Likelihoods:
    """Scores the ends of sequences, in batches of few shapes.

    Args:
        params: Parameters in memory, in the dtype to compute in.
        requests: From `cut`; equal requests are computed once.
        cfg: The model.
        what: What is scored, for the progress line.

    Returns:
        Log-probabilities and whether they are greedy.

    Raises:
        NonFiniteError: if a log-probability is not finite.
    """
    places: dict[tuple[tuple[int, ...], int], int] = {}
    index = [
        places.setdefault((tuple(request.tokens), request.scored), len(places))
        for request in requests
    ]
    distinct = list(places)
    # the last token is only predicted, never read
    read, owners = (
        [tokens[:-1] for tokens, _ in distinct],
        [([-1], [n]) for n in range(len(places))],
    )
    mesh = sharding.mesh_of(params)
    log, is_greedy = np.zeros(len(places)), np.zeros(len(places), bool)
    batches = batching.batches(read, owners)
    for batch in progress.track(batches, f"score {what} (batches)"):
        owner = np.asarray(batch.row_id)[:, 0]
        following, counted = (
            np.zeros(batch.tokens.shape, np.int32),
            np.zeros(batch.tokens.shape, bool),
        )
        rows = np.flatnonzero(owner >= 0)  # the last batch is filled up
        for row in rows:
            tokens, scored = distinct[owner[row]]
            following[row, : len(tokens) - 1] = tokens[1:]
            counted[row, len(tokens) - 1 - scored : len(tokens) - 1] = True
        split = sharding.split_batch(batch, mesh)
        outputs = _sequences(params, split, following, counted, cfg=cfg)
        log[owner[rows]], is_greedy[owner[rows]] = (np.asarray(output)[rows] for output in outputs)
    if not np.isfinite(log).all():
        raise NonFiniteError(
            f"The log-probability of one of the {what} is not finite: the model's weights overflow "
            "there; check the checkpoint."
        )
    return Likelihoods(log[index], is_greedy[index])


@functools.partial(jax.jit, static_argnames=("cfg",))
def _sequences(
    params: Params, batch: Batch, following: Any, counted: Any, *, cfg: ModelConfig
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of the counted tokens of each sequence, and whether all are the likeliest.

    Logits are computed for a few sequences at a time, as in `nll`.
    """

    def sequence_likelihood(
        args: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        x, following, counted = args
        logits = decoder.head(params, x[None], cfg=cfg)[0]  # [s, v]
        chosen = jnp.take_along_axis(logits, following[:, None], -1)[:, 0]
        log = (chosen - jax.nn.logsumexp(logits, -1)) * counted
        return jnp.sum(log), jnp.all((jnp.argmax(logits, -1) == following) | ~counted)

    x = decoder.hidden_states(params, batch, cfg=cfg)[0]
    size, length = batch.tokens.shape
    at_once = sequences_at_once(size, length * cfg.vocab_size, BUDGET.logits)
    return jax.lax.map(sequence_likelihood, (x, following, counted), batch_size=at_once)
