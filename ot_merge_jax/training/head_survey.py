"""What an output head predicts before it is fitted: log-sums, mean probabilities, a teacher's rest.

Positions stream in blocks; nothing of size ``[positions, vocabulary]`` is kept.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

#: Tokens with less mean probability than this, of target and teacher, stay where they are.
MIN_PROBABILITY = 2.5e-5
#: Logits of one block of positions, in entries.
BLOCK = 1 << 24
_NONE = -1
_FAR = -1e30  # in the place of a logit that does not count


class OutputHead(NamedTuple):
    """How a model makes logits from its final states.

    Attributes:
        table: ``[V, d]`` rows of the output head.
        softcap: The logits are ``softcap * tanh(x / softcap)``; None: they are ``x``.
    """

    table: jax.Array
    softcap: float | None = None


class TopTokens(NamedTuple):
    """What a source predicts at each position, over content tokens: the likeliest, and the rest.

    Attributes:
        token: ``[N, k]`` the likeliest tokens.
        probability: ``[N, k]`` their probabilities. What they lack of 1 is spread over the other
            content tokens as the target's own distribution spreads its mass over them.
    """

    token: jax.Array
    probability: jax.Array


class FinalStates(NamedTuple):
    """Positions of a text that predict a content token.

    Attributes:
        states: ``[N, d]`` final states behind the last norm, times the family's logit scale, so
            that ``states @ table.T`` are the logits (before a soft cap).
        label: ``[N]`` the next token.
    """

    states: jax.Array
    label: jax.Array


class HeadSurvey(NamedTuple):
    """Where a target's probability lies before the fit.

    Attributes:
        mean_target: ``[V]`` mean probability by the target, of content.
        mean_teacher: ``[V]`` the same by the teacher.
        content: ``[N]`` log-sum of the logits of content tokens.
        special: ``[N]`` log-sum of the logits of special tokens; -1e30 where there are none.
        spread: ``[N]`` what the teacher's rest is of the target's probability of content that the
            teacher does not name.
    """

    mean_target: jax.Array
    mean_teacher: jax.Array
    content: jax.Array
    special: jax.Array
    spread: jax.Array


def distribution(
    logits: Float[Array, "n v"], is_content: Bool[Array, " v"], *, k: int = 256
) -> TopTokens:
    """The likeliest content tokens of each position, and their probabilities among content.

    Args:
        logits: Of the source, over the target's vocabulary.
        is_content: False for special tokens and rows without a token.
        k: How many are kept; at most as many as there are content tokens.

    Example:
        >>> logits = jnp.log(jnp.array([[0.5, 0.3, 0.1, 0.1]]))
        >>> teacher = distribution(logits, jnp.array([False, True, True, True]), k=2)
        >>> teacher.token.tolist(), (100 * teacher.probability).round().tolist()
        ([[1, 2]], [[60.0, 20.0]])
    """
    logits = jnp.where(is_content, logits.astype(jnp.float32), _FAR)
    top, token = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    total = jax.nn.logsumexp(logits, -1, keepdims=True)
    return TopTokens(token.astype(jnp.int32), jnp.exp(top - total))


def survey(
    head: OutputHead, positions: FinalStates, teacher: TopTokens, is_content: Bool[Array, " v"]
) -> HeadSurvey:
    """One pass over the whole vocabulary: what may move, and what special tokens weigh.

    Args:
        head: Of the target, from which the fit starts.
        positions: Of the calibration text.
        teacher: At the same positions.
        is_content: ``[V]``.
    """
    size = block_size(len(positions.states), len(is_content))
    blocks, weight = blocked((positions.states, teacher), size)
    return _unblocked(
        _survey(blocks, weight, head.table, is_content, softcap=head.softcap),
        len(positions.states),
    )


def moving_rows(
    surveyed: HeadSurvey,
    label: Int[Array, " n"],
    is_content: Bool[Array, " v"],
    *,
    min_probability: float = MIN_PROBABILITY,
) -> np.ndarray:
    """Ids of the tokens whose rows move, ascending: likely enough by either model, or a label.

    Args:
        surveyed: From `survey`.
        label: The next tokens.
        is_content: ``[V]``; special tokens never move.
        min_probability: Of the mean over positions; 0: all content moves.
    """
    likely = np.maximum(np.asarray(surveyed.mean_target), np.asarray(surveyed.mean_teacher))
    moves = likely >= min_probability
    moves[np.asarray(label)] = True
    return np.flatnonzero(moves & np.asarray(is_content))


# ---- blocks of positions ----


def capped(logits: jax.Array, softcap: float | None) -> jax.Array:
    """Logits as the model makes them."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def block_size(count: int, width: int) -> int:
    """Positions in a block; the blocks of a text are nearly equal."""
    most = max(1, BLOCK // max(1, width))
    return -(-count // -(-count // most)) if count else 1


def blocked(arrays: Any, size: int) -> tuple[Any, jax.Array]:
    """Arrays ``[n, ...]`` as ``[blocks, size, ...]``, filled up; 1 where there is a position."""
    count = len(jax.tree.leaves(arrays)[0])
    number = max(1, -(-count // size))

    def fill(array: jax.Array) -> jax.Array:
        array = jnp.asarray(array)
        filled = jnp.pad(array, [(0, number * size - count)] + [(0, 0)] * (array.ndim - 1))
        return filled.reshape(number, size, *array.shape[1:])

    return jax.tree.map(fill, arrays), fill(jnp.ones(count))


def places_of(rows: np.ndarray, vocabulary: int) -> np.ndarray:
    """``[V]`` the place of each token among the moving rows, or -1."""
    places = np.full(vocabulary, _NONE, np.int32)
    places[rows] = np.arange(len(rows), dtype=np.int32)
    return places


def dense(
    teacher: TopTokens, before: jax.Array, content: jax.Array, spread: jax.Array
) -> jax.Array:
    """A teacher over ``[b, R]`` moving rows, the rest of its mass spread as the target's own.

    Args:
        teacher: Places among the rows, or -1.
        before: ``[b, R]`` logits of the rows before the fit.
        content: ``[b]`` log-sum of all content before the fit.
        spread: ``[b]``, as in `HeadSurvey`.
    """
    own = jnp.exp(before - content[:, None]) * spread[:, None]
    place = jnp.where(teacher.token >= 0, teacher.token, own.shape[1])  # out of range: dropped
    return own.at[jnp.arange(len(own))[:, None], place].set(teacher.probability, mode="drop")


def log_sums(
    head: OutputHead, states: Float[Array, "n d"], counts: Bool[Array, " v"]
) -> Float[Array, " n"]:
    """Log-sum of the logits of the tokens that count, at each position; -1e30 if none does."""
    blocks, _ = blocked((states,), block_size(len(states), len(counts)))
    sums = _log_sums(blocks, head.table, counts, softcap=head.softcap)
    return sums.reshape(-1)[: len(states)]


@functools.partial(jax.jit, static_argnames="softcap")
def _log_sums(blocks: Any, table: jax.Array, counts: jax.Array, *, softcap: Any) -> jax.Array:

    def log_sum(block: Any) -> jax.Array:
        (states,) = block
        logits = capped(states @ table.T.astype(jnp.float32), softcap)
        return jnp.maximum(jax.nn.logsumexp(jnp.where(counts, logits, _FAR), -1), _FAR)

    return jax.lax.map(log_sum, blocks)


def _unblocked(surveyed: HeadSurvey, count: int) -> HeadSurvey:
    return surveyed._replace(
        mean_target=surveyed.mean_target / count,
        mean_teacher=surveyed.mean_teacher / count,
        content=surveyed.content.reshape(-1)[:count],
        special=surveyed.special.reshape(-1)[:count],
        spread=surveyed.spread.reshape(-1)[:count],
    )


@functools.partial(jax.jit, static_argnames="softcap")
def _survey(
    blocks: Any, weight: jax.Array, table: jax.Array, is_content: jax.Array, *, softcap: Any
) -> HeadSurvey:
    places = jnp.where(is_content, jnp.arange(len(is_content)), _NONE)

    def step(carry: Any, block: Any) -> tuple[Any, Any]:
        (states, teacher), weight = block
        logits = capped(states @ table.T.astype(jnp.float32), softcap)
        content = jax.nn.logsumexp(jnp.where(is_content, logits, _FAR), -1)
        special = jax.nn.logsumexp(jnp.where(is_content, _FAR, logits), -1)
        logits = jnp.where(is_content, logits, _FAR)
        own = jnp.exp(logits - content[:, None])
        named = teacher._replace(token=places[teacher.token])
        nothing = named._replace(probability=jnp.zeros_like(named.probability))
        free = dense(nothing, logits, content, jnp.ones_like(content)).sum(-1)
        rest = jnp.maximum(0.0, 1 - named.probability.sum(-1))
        spread = jnp.where(free > 0, rest / jnp.where(free > 0, free, 1.0), 0.0)
        probability = dense(named, logits, content, spread)
        sums = carry[0] + weight @ own, carry[1] + weight @ probability
        return sums, (content, jnp.maximum(special, _FAR), spread)

    zero = jnp.zeros(len(is_content))
    (target, teacher), per_position = jax.lax.scan(step, (zero, zero), (blocks, weight))
    return HeadSurvey(target, teacher, *per_position)
