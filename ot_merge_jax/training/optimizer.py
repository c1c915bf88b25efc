"""The optimiser of training."""

from __future__ import annotations

import math
from typing import Any, Literal

import optax

Schedule = Literal["cosine", "linear", "constant"]


def optimizer(
    *,
    learning_rate: Any,
    steps: int,
    warmup: float = 0.05,
    weight_decay: Any = 0.0,
    max_grad_norm: Any = 1.0,
    schedule: Schedule = "cosine",
) -> optax.GradientTransformation:
    """AdamW with linear warm-up from 0, decay to 0 and gradient clipping.

    Args:
        learning_rate: Peak rate. It, ``weight_decay`` and ``max_grad_norm`` may be traced, so that
            they sweep under ``vmap``.
        steps: Length of the schedule.
        warmup: Fraction of the steps that warm up, rounded up; never all steps, so that at least
            one trains.
        weight_decay: Decoupled weight decay, on every parameter.
        max_grad_norm: Largest global gradient norm.
        schedule: How the rate falls after the warm-up.

    Returns:
        An optax transformation.

    Example:
        >>> import jax.numpy as jnp
        >>> transform = optimizer(learning_rate=0.1, steps=10)
        >>> state = transform.init(jnp.zeros(()))
        >>> updates, state = transform.update(jnp.ones(()), state, jnp.zeros(()))
        >>> float(updates)  # the first step of the warm-up has rate 0
        -0.0
    """
    rise = max(0, min(math.ceil(warmup * steps), steps - 1))
    fall = max(1, steps - rise)
    after = {
        "cosine": optax.cosine_decay_schedule(1.0, fall),
        "linear": optax.linear_schedule(1.0, 0.0, fall),
        "constant": optax.constant_schedule(1.0),
    }
    up = optax.linear_schedule(0.0, 1.0, max(1, rise))
    shape = optax.join_schedules([up, after[schedule]], [rise])
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(lambda count: learning_rate * shape(count), b2=0.95, weight_decay=weight_decay),
    )
