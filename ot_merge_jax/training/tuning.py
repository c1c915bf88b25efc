"""One arm of a comparison: a start trained at several learning rates, the best chosen on dev.

Arms that share a `Problem` see the same batches in the same order. Rates train together under
``vmap`` where the model is small, otherwise one after the other, with the same results. No files.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ot_merge_jax import progress
from ot_merge_jax.distributed import sharding
from ot_merge_jax.errors import DivergedError
from ot_merge_jax.training import loop
from ot_merge_jax.training import step as train_step
from ot_merge_jax.training.loop import StepMetrics, TrainingDivergedError, TrainState
from ot_merge_jax.training.losses import Examples
from ot_merge_jax.training.step import Frozen, OptimizerHParams, Problem, StepConfig

#: Bytes that rates which train together may use on an accelerator. On CPU it is 0, because batched
#: products, each with its own weights, are not faster there (the demo's sibling, 3 rates: 1.2 times
#: the CPU time of a loop).
TOGETHER = 1 << 30


class TriedRate(NamedTuple):
    """The training at one learning rate.

    Attributes:
        rate: The peak.
        losses: The minimised loss of every step; fewer than there are steps if it diverged.
        dev: ``(steps done, next-token loss on the dev split)`` of every evaluation.
        loss: The last dev loss; infinite if it diverged.
    """

    rate: float
    losses: tuple[float, ...]
    dev: tuple[tuple[int, float], ...]
    loss: float


class TunedStart(NamedTuple):
    """A trained start.

    Attributes:
        tried: Every rate, in order.
        best: The rate with the lowest dev loss at the end; of equal rates the first.
        trained: What trains, after training at the best rate.
    """

    tried: list[TriedRate]
    best: TriedRate
    trained: Any


def budget() -> int:
    """Bytes that rates which train together may use on this machine."""
    return 0 if jax.default_backend() == "cpu" else TOGETHER


def tune(
    problem: Problem,
    trainable: Any,
    frozen: Frozen,
    rates: Sequence[float],
    *,
    name: str = "arm",
    is_together: bool | None = None,
) -> TunedStart:
    """Trains one start at every rate and takes the best on the dev split.

    A rate that diverges is not chosen, and does not end the run.

    Args:
        problem: What is to be learned; its own rate is not used.
        trainable: What trains, from `training.begin`; it is not donated.
        frozen: What does not train, from `training.begin`.
        rates: Peak learning rates.
        name: Shown with the progress.
        is_together: Whether the rates train under one ``vmap``; None: if there are several, on one
            device, and all lanes (`training.lane_bytes`) fit into `budget`.

    Returns:
        The rates that were tried, and what the best one trained.

    Raises:
        DivergedError: if every rate diverged.
    """
    if is_together is None:
        is_together = (
            len(rates) > 1
            and sharding.mesh_of(trainable) is None
            and len(rates) * train_step.lane_bytes(problem, trainable) <= budget()
        )
    train = _together if is_together else _one_by_one
    tried, trained = train(problem, trainable, frozen, rates, name)
    best = _best(tried)
    if not math.isfinite(best.loss):
        raise DivergedError(
            f"Every learning rate of {name} ({', '.join(f'{rate:g}' for rate in rates)}) diverged; "
            "lower --rates or --learning-rate."
        )
    return TunedStart(tried, best, trained)


def _best(tried: Sequence[TriedRate]) -> TriedRate:
    """The lowest dev loss at the end."""
    return min(tried, key=lambda trial: trial.loss)


def _one_by_one(
    problem: Problem, trainable: Any, frozen: Frozen, rates: Sequence[float], name: str
) -> tuple[list[TriedRate], Any]:
    """Every rate in the loop of `ot-merge adapt`; only parameters of the best stay in memory."""
    tried, trained = [], None
    for rate in rates:
        with_rate = frozen._replace(rates=frozen.rates._replace(learning_rate=rate))
        history = train_step.new_history(problem, trainable)
        loss, result = math.inf, None
        try:
            history = train_step.train(
                problem,
                history,
                with_rate,
                progress_of=lambda steps, rate=rate: _shown(steps, name, [rate]),
            )
            loss, result = _finite(history.dev[-1][1]), loop.result(history)
        except TrainingDivergedError as error:
            history = error.history
        tried.append(TriedRate(rate, history.losses, history.dev, loss))
        if _best(tried) is tried[-1]:
            trained = result
    return tried, trained


def _together(
    problem: Problem, trainable: Any, frozen: Frozen, rates: Sequence[float], name: str
) -> tuple[list[TriedRate], Any]:
    """All rates in one program, a lane for each."""
    s, config, lanes = problem.settings, train_step.step_config(problem), range(len(rates))
    states = jax.tree.map(
        lambda leaf: jnp.stack([leaf] * len(rates)),
        train_step.new_history(problem, trainable).state,
    )
    swept = frozen._replace(rates=frozen.rates._replace(learning_rate=jnp.array(rates)))
    losses: list[list[float]] = [[] for _ in lanes]
    dev: list[list[tuple[int, float]]] = [[] for _ in lanes]
    alive = set(lanes)

    def evaluate(done: int) -> None:
        for lane in sorted(alive):
            value = train_step.dev_loss(_lane(states.params, lane), frozen, problem)
            dev[lane].append((done, value))

    evaluate(0)
    for index in _shown(range(config.steps), name, rates):
        batch = train_step.batch_of(problem, index)
        states, metrics = _steps(states, swept, batch, config=config)
        for lane, loss, norm in zip(lanes, *(values.tolist() for values in metrics), strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                alive.discard(lane)  # its state has stopped moving
            elif lane in alive:
                losses[lane].append(loss)
        done = index + 1
        if done % (s.eval_every or 1) == 0 or done == config.steps:
            evaluate(done)
    tried = [
        TriedRate(
            rate,
            tuple(losses[lane]),
            tuple(dev[lane]),
            _finite(dev[lane][-1][1] if lane in alive else None),
        )
        for lane, rate in enumerate(rates)
    ]
    return tried, _lane(states.params, tried.index(_best(tried)))


@functools.partial(jax.jit, static_argnames="config", donate_argnums=0)
def _steps(
    states: TrainState, frozen: Frozen, examples: Examples, *, config: StepConfig
) -> tuple[TrainState, StepMetrics]:
    """One step of every lane; only states and learning rates have lanes."""
    axes = Frozen(None, None, None, None, OptimizerHParams(0, None, None))  # pyright: ignore[reportArgumentType]
    step = functools.partial(train_step.step, config=config)
    return jax.vmap(step, in_axes=(0, axes, None))(states, frozen, examples)


def _lane(tree: Any, lane: int) -> Any:
    """The part of a tree that belongs to one lane."""
    return jax.tree.map(lambda leaf: leaf[lane], tree)


def _finite(loss: float | None) -> float:
    """A loss, infinite where there is none."""
    return loss if loss is not None and math.isfinite(loss) else math.inf


def _shown(steps: range, name: str, rates: Sequence[float]) -> Any:
    """The steps with their progress."""
    what = f"rate {rates[0]:g}" if len(rates) == 1 else f"{len(rates)} rates together"
    return progress.track(steps, f"adapt {name}, {what} (steps)")
