"""A plain optax next-token loop. Imports models and types.

The step is one jitted pure function; the loop around it only feeds batches, so the same seed, data
and steps give the same parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from ot_merge_jax.config import ModelConfig
from ot_merge_jax.errors import NonFiniteError
from ot_merge_jax.models.decoder import forward, token_nll
from ot_merge_jax.types import Batch, Params


class TrainState(NamedTuple):
    """What a training run carries from step to step.

    Attributes:
        params: Float32 parameters.
        optimizer: State of the optax transformation.
        step: Steps done.
    """

    params: Any
    optimizer: optax.OptState
    step: int


def pack(documents: Sequence[Sequence[int]], length: int) -> Int[np.ndarray, "blocks length"]:
    """Concatenates tokenised documents and cuts the stream into blocks; an incomplete tail goes.

    Args:
        documents: Token ids of each document, its BOS or EOS included.
        length: Tokens of a block.

    Returns:
        ``[blocks, length]`` int32.

    Raises:
        ValueError: if there are fewer than ``length`` tokens.

    Example:
        >>> pack([[1, 2, 3], [4, 5]], 2).tolist()
        [[1, 2], [3, 4]]
    """
    stream = np.fromiter((token for document in documents for token in document), np.int32)
    if len(stream) < length:
        raise ValueError(
            f"{len(stream)} tokens do not fill one block of {length}; give more text "
            "or shorter blocks."
        )
    return stream[: len(stream) // length * length].reshape(-1, length)


def shuffled_batches(
    blocks: Int[np.ndarray, "n s"], *, batch_size: int, seed: int
) -> Iterator[Int[np.ndarray, "b s"]]:
    """Endless batches of blocks, a new seeded order each epoch, incomplete batches skipped.

    Args:
        blocks: Packed token blocks.
        batch_size: Blocks in a batch; lowered to the number of blocks.
        seed: Seed of the order.

    Yields:
        ``[batch_size, s]`` int32.
    """
    rng = np.random.default_rng(seed)
    batch_size = min(batch_size, len(blocks))
    while True:
        order = rng.permutation(len(blocks))
        for start in range(0, len(blocks) - batch_size + 1, batch_size):
            yield blocks[order[start : start + batch_size]]


def optimizer(
    *,
    learning_rate: float,
    steps: int,
    warmup: float = 0.05,
    weight_decay: float = 0.0,
    clip: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW with linear warm-up, cosine decay to zero and gradient clipping.

    Args:
        learning_rate: Peak rate.
        steps: Length of the schedule.
        warmup: Fraction of the steps that warm up.
        weight_decay: Decoupled weight decay, on every parameter.
        clip: Largest global gradient norm.

    Returns:
        An optax transformation.
    """
    rise = max(1, math.ceil(warmup * steps))
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, rise, max(steps, rise + 1))
    return optax.chain(
        optax.clip_by_global_norm(clip), optax.adamw(schedule, b2=0.95, weight_decay=weight_decay)
    )


def next_token_loss(
    params: Params, tokens: Int[Array, "b s"], *, cfg: ModelConfig
) -> Float[Array, ""]:
    """Mean next-token loss of full blocks, in nats per token."""
    b, s = tokens.shape
    batch = Batch(
        tokens,
        jnp.ones((b, s), bool),
        jnp.zeros((b, 1), jnp.int32),
        jnp.full((b, 1), -1, jnp.int32),
    )
    losses, weights = token_nll(forward(params, batch, cfg=cfg)[0], batch)
    return losses.sum() / weights.sum()


def train(
    params: Params,
    batches: Iterator[Int[np.ndarray, "b s"]],
    *,
    cfg: ModelConfig,
    steps: int,
    transform: optax.GradientTransformation,
    on_step: Callable[[int, float], None] | None = None,
) -> tuple[Params, Float[np.ndarray, " steps"]]:
    """Trains all parameters on the next token.

    Args:
        params: Start; cast to float32.
        batches: Blocks of tokens, all of one shape.
        cfg: The model.
        steps: Optimiser steps.
        transform: From `optimizer`, or any optax transformation.
        on_step: Called with the step number and its loss, for progress.

    Returns:
        The trained parameters and the loss of every step, in nats per token.

    Raises:
        NonFiniteError: at the first step whose loss is not finite.

    Example:
        >>> from ot_merge_jax.config import Rope
        >>> from ot_merge_jax.models import specs
        >>> cfg = ModelConfig("llama", 8, 16, 32, 1, 2, 1, 8, 16, 1e-5,
        ...                   Rope(1e4), True, False, "float32")
        >>> blocks = pack([[1, 2, 3, 4] * 8], 8)
        >>> data = shuffled_batches(blocks, batch_size=4, seed=0)
        >>> start = specs.init(jax.random.key(0), cfg)
        >>> adamw = optimizer(learning_rate=0.02, steps=30)
        >>> _, losses = train(start, data, cfg=cfg, steps=30, transform=adamw)
        >>> bool(losses[-1] < 0.5 * losses[0])
        True
    """

    def one_step(state: TrainState, tokens: jax.Array) -> tuple[TrainState, jax.Array]:
        loss, gradient = jax.value_and_grad(next_token_loss)(state.params, tokens, cfg=cfg)
        updates, optimizer_state = transform.update(gradient, state.optimizer, state.params)
        return TrainState(
            optax.apply_updates(state.params, updates), optimizer_state, state.step + 1
        ), loss

    step = jax.jit(one_step, donate_argnums=0)
    # copies: the first step donates its input, and the caller keeps what it gave us
    params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params)
    state = TrainState(params, transform.init(params), 0)
    losses = np.zeros(steps, np.float32)
    for index in range(steps):
        state, loss = step(state, jnp.asarray(next(batches)))
        losses[index] = float(loss)
        if not np.isfinite(losses[index]):
            raise NonFiniteError(
                f"The loss is {losses[index]} at training step {index + 1}; lower the "
                "learning rate."
            )
        if on_step is not None:
            on_step(index + 1, float(losses[index]))
    return state.params, losses
