"""AdamW, and the loop around one pure step: any loss, any parameters.

The step is one jitted pure function; the loop around it only feeds batches, so the same seed, data
and steps give the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ot_merge_jax.errors import DivergedError


class TrainState(NamedTuple):
    """What a training run carries from step to step.

    Attributes:
        params: Float32 parameters.
        optimizer: State of the optax transformation.
        step: Steps done.
    """

    params: Any
    optimizer: optax.OptState
    step: Any


class StepMetrics(NamedTuple):
    """What one step saw.

    Attributes:
        loss: Of the batch, before the step.
        norm: Global norm of the gradient, before clipping.
    """

    loss: Any
    norm: Any


class TrainHistory(NamedTuple):
    """A training run so far; a checkpoint holds all of it.

    Attributes:
        state: Parameters and optimiser.
        losses: Loss of every step.
        norms: Gradient norm of every step.
        dev: ``(steps done, dev loss)`` of every evaluation.
        best: Parameters of the best evaluation; None unless early stopping wants them.
    """

    state: TrainState
    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    dev: tuple[tuple[int, float], ...] = ()
    best: Any = None


class TrainingDivergedError(DivergedError):
    """Training diverged.

    Attributes:
        history: The run until then; its parameters may be broken already.
    """

    def __init__(self, message: str, history: TrainHistory) -> None:
        """The sentence for the user, and the history."""
        super().__init__(message)
        self.history = history


Loss = Callable[[Any, Any, Any], jax.Array]
Step = Callable[[TrainState, Any, Any], tuple[TrainState, StepMetrics]]


def start(params: Any, transform: optax.GradientTransformation) -> TrainState:
    """The state before the first step: a float32 copy, since the first step donates its input."""
    params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params)
    return TrainState(params, transform.init(params), jnp.zeros((), jnp.int32))


def one_step(loss: Loss, transform: optax.GradientTransformation, *, parts: int = 1) -> Step:
    """One step of training as a pure function, to be jitted (`compiled`) or swept with ``vmap``.

    A step whose loss or gradient is not finite changes nothing, so the last good state survives.

    Args:
        loss: ``(what trains, frozen, batch) -> scalar``; the losses of the parts of a batch are
            summed.
        transform: An optax transformation.
        parts: Parts a batch is computed in, one after the other, their gradients added up
            (gradient accumulation); if more than 1, batches have a leading axis of that size.

    Returns:
        ``(state, frozen, batch) -> (state, metrics)``.

    Example:
        >>> square = lambda x, target, batch: jnp.sum((x - target) ** 2 * batch)
        >>> halve = one_step(square, optax.sgd(0.25))
        >>> state, metrics = halve(start(jnp.ones(()), optax.sgd(0.25)), 0.0, jnp.ones(()))
        >>> float(state.params), float(metrics.loss)
        (0.5, 1.0)
    """

    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, StepMetrics]:
        value_and_gradient = jax.value_and_grad(loss)
        if parts == 1:
            value, gradient = value_and_gradient(state.params, frozen, batch)
        else:
            nothing = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params)
            value, gradient = jax.lax.scan(
                lambda total, part: (
                    jax.tree.map(jnp.add, total, value_and_gradient(state.params, frozen, part)),
                    None,
                ),
                nothing,
                batch,
            )[0]
        norm = optax.tree.norm(gradient)

        def move(state: TrainState) -> TrainState:
            updates, moved = transform.update(gradient, state.optimizer, state.params)
            return TrainState(optax.apply_updates(state.params, updates), moved, state.step + 1)

        is_finite = jnp.isfinite(value) & jnp.isfinite(norm)
        return jax.lax.cond(is_finite, move, lambda state: state, state), StepMetrics(value, norm)

    return step


def compiled(step: Step) -> Step:
    """A jitted step; its state is donated, everything else stays the caller's."""
    return jax.jit(step, donate_argnums=0)


def fit(
    history: TrainHistory,
    step: Step,
    frozen: Any,
    batch_at: Callable[[int], Any],
    *,
    steps: int,
    dev_loss: Callable[[Any], float],
    eval_every: int,
    patience: int | None = None,
    on_step: Callable[[TrainHistory], None] = lambda history: None,
    on_divergence: Callable[[TrainHistory], None] = lambda history: None,
    progress_of: Callable[[range], Any] = lambda steps: steps,
) -> TrainHistory:
    """Trains from where a history stands to the last step.

    Args:
        history: A new one has `start` of the parameters as its state; the state is donated.
        step: From `compiled`.
        frozen: What the loss needs besides what trains.
        batch_at: The batch of a step by its number: the position in the data is that number.
        steps: Optimiser steps in all.
        dev_loss: The loss of what trains, on the dev split.
        eval_every: Steps between evaluations; the start and the end are always evaluated.
        patience: Evaluations without a new best after which training stops and the best parameters
            are kept; None: never.
        on_step: Called with the history after every step and evaluation, for events and
            checkpoints. An error that it raises ends the training.
        on_divergence: Called before the error of a step that diverged, with the history before
            that step. Its parameters may be broken already, by the previous update.
        progress_of: Wraps the numbers of the steps to come, to show progress.

    Returns:
        The finished history; `result` takes the parameters out of it.

    Raises:
        TrainingDivergedError: naming the step, if a loss, also on dev, or a gradient is not finite.

    Example:
        >>> square = lambda x, target, batch: jnp.sum((x - target) ** 2 * batch)
        >>> halve = compiled(one_step(square, optax.sgd(0.25)))
        >>> new = TrainHistory(start(jnp.ones(()), optax.sgd(0.25)))
        >>> done = fit(new, halve, 0.0, lambda step: jnp.ones(()), steps=4, eval_every=2,
        ...            dev_loss=lambda x: float(x))
        >>> done.dev, done.losses[-1]
        (((0, 1.0), (2, 0.25), (4, 0.0625)), 0.015625)
    """

    def evaluated(history: TrainHistory) -> TrainHistory:
        done = len(history.losses)
        if history.dev and history.dev[-1][0] == done:
            return history  # evaluated already, before the checkpoint that the run resumes from
        value = dev_loss(history.state.params)
        is_best = all(value < loss for _, loss in history.dev)
        history = history._replace(dev=(*history.dev, (done, value)))
        if not np.isfinite(value):
            when, rest = "before training", "use --dtype float32"
            if done:
                when, rest = f"after training step {done}", "lower the learning rate"
            raise TrainingDivergedError(f"The dev loss is {value} {when}; {rest}.", history)
        if patience is None or not is_best:
            return history
        # a copy: the next step donates the state
        best = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), history.state.params)
        return history._replace(best=best)

    if not history.losses:
        history = evaluated(history)
    for index in progress_of(range(len(history.losses), steps)):
        if should_stop_early(history.dev, patience):
            break
        state, metrics = step(history.state, frozen, batch_at(index))
        history = history._replace(state=state)
        loss, norm = float(metrics.loss), float(metrics.norm)
        if not np.isfinite(loss) or not np.isfinite(norm):
            what = f"loss is {loss}" if not np.isfinite(loss) else f"gradient's norm is {norm}"
            on_divergence(history)
            raise TrainingDivergedError(
                f"The {what} at training step {index + 1}; lower the learning rate.", history
            )
        history = history._replace(losses=(*history.losses, loss), norms=(*history.norms, norm))
        if (index + 1) % eval_every == 0 or index + 1 == steps:
            history = evaluated(history)
        on_step(history)
    return history


def should_stop_early(dev: Sequence[tuple[int, float]], patience: int | None) -> bool:
    """Whether as many evaluations as ``patience`` have brought no new best.

    Example:
        >>> should_stop_early([(0, 3.0), (2, 2.0), (4, 2.1)], 1)
        True
        >>> should_stop_early([(0, 3.0), (2, 2.0)], 1)
        False
    """
    if patience is None or not dev:
        return False
    best = min(range(len(dev)), key=lambda place: dev[place][1])
    return len(dev) - 1 - best >= patience


def result(history: TrainHistory) -> Any:
    """The parameters a history ends with: with early stopping, the best on the dev split."""
    return history.state.params if history.best is None else history.best
