"""A training problem without disks: what trains, what is constant, the step, the course.

`train` is what the command, and every arm of a comparison, calls: arms that share a `Problem` see
the same data in the same order. Imports the rest of adapt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ot_merge_jax import sharding
from ot_merge_jax.adapt import data, loop, lora, objectives
from ot_merge_jax.adapt import residual as residuals
from ot_merge_jax.adapt.loop import Course
from ot_merge_jax.adapt.objectives import Examples, Objective
from ot_merge_jax.adapt.settings import Adaptation
from ot_merge_jax.types import Params


class Problem(NamedTuple):
    """What is to be learned.

    Attributes:
        settings: Resolved: steps, batch size, dtype and intervals are numbers.
        objective: What is minimised.
        train: Blocks to learn from.
        dev: Blocks that choose.
    """

    settings: Adaptation
    objective: Objective
    train: data.Blocks
    dev: data.Blocks


class Constants(NamedTuple):
    """What the loss needs beside what trains.

    Attributes:
        base: The model below adapters; None where it trains itself.
        residual: Path -> what a merge added.
        factor: Group -> how much of it is held.
        source: The teacher, in the dtype to compute in; None without one.
    """

    base: Params | None
    residual: dict[str, jax.Array]
    factor: dict[str, Any]
    source: Params | None


def begin(
    problem: Problem,
    base: Params,
    residual: dict[str, jax.Array],
    factor: dict[str, Any],
    source: Params | None = None,
) -> tuple[Any, Constants]:
    """What trains, before the first step, and what stays.

    Args:
        problem: What is to be learned; with ``lora`` in its settings only adapters train.
        base: The trainable part of the weights.
        residual: The frozen part (`residual.between`); empty for a model that is no merge.
        factor: Group -> strength of the residual.
        source: The teacher's parameters.

    Returns:
        (what trains, constants).
    """
    if problem.settings.lora is None:
        return base, Constants(None, residual, factor, source)
    key = jax.random.key(problem.settings.seed)
    rank, targets = problem.settings.lora, problem.settings.lora_targets
    factors = lora.init(key, problem.objective.cfg, rank=rank, targets=targets)
    if (mesh := sharding.mesh_of(base)) is not None:
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        factors = jax.device_put(factors, whole)
    return factors, Constants(base, residual, factor, source)


def base_of(trainable: Any, constants: Constants, *, settings: Adaptation) -> Params:
    """The trained part as plain weights: adapters folded, the residual not yet."""
    if constants.base is None or settings.lora is None:
        return trainable
    alpha = settings.lora if settings.lora_alpha is None else settings.lora_alpha
    return lora.fold(constants.base, trainable, alpha / settings.lora)


def params_of(trainable: Any, constants: Constants, *, settings: Adaptation) -> Params:
    """The plain parameters, float32: everything folded."""
    base = base_of(trainable, constants, settings=settings)
    return residuals.fold(base, constants.residual, constants.factor)


def loss_of(problem: Problem) -> loop.Loss:
    """``(what trains, constants, examples) -> loss``, a pure function."""
    settings, objective = problem.settings, problem.objective

    def loss(trainable: Any, constants: Constants, examples: Examples) -> jax.Array:
        params = params_of(trainable, constants, settings=settings)
        params = jax.tree.map(lambda leaf: leaf.astype(settings.dtype), params)
        return objectives.loss(params, constants.source, examples, objective=objective)

    return loss


def step_of(problem: Problem, *, learning_rate: Any = None) -> tuple[loop.Step, Any]:
    """The pure step of a problem and its optimiser.

    Args:
        problem: What is to be learned.
        learning_rate: Instead of that of the settings; may be traced, so that rates sweep.

    Returns:
        (`loop.one_step`, the optax transformation).
    """
    s = problem.settings
    transform = loop.optimizer(
        learning_rate=s.learning_rate if learning_rate is None else learning_rate,
        steps=s.steps or 0,
        warmup=s.warmup,
        weight_decay=s.weight_decay,
        clip=s.clip,
        schedule=s.schedule,
    )
    return loop.one_step(loss_of(problem), transform, parts=s.accumulate), transform


def dev_loss_of(problem: Problem, constants: Constants) -> Callable[[Any], float]:
    """The next-token loss on the dev split, whatever the objective, so that arms compare."""
    plain = problem._replace(objective=Objective("sft", problem.objective.cfg))
    loss = jax.jit(loss_of(plain))
    blocks = problem.dev._replace(pairs=None)
    parts = data.in_order(blocks, batch_size=_part_size(problem))
    mesh = sharding.mesh_of(constants.base or constants.residual)

    def dev_loss(trainable: Any) -> float:
        found = mesh or sharding.mesh_of(trainable)
        return sum(float(loss(trainable, constants, _placed(one, found, 0))) for one in parts)

    return dev_loss


def new_course(problem: Problem, trainable: Any) -> Course:
    """A course before its first step; the caller keeps what it gave."""
    _, transform = step_of(problem)
    return Course(loop.start(trainable, transform), [], [], [])


def train(
    problem: Problem,
    course: Course,
    constants: Constants,
    *,
    after: Callable[[Course], None] = lambda course: None,
    rescue: Callable[[Course], None] = lambda course: None,
    counted: Callable[[range], Any] = lambda steps: steps,
) -> Course:
    """Trains to the end, or until early stopping.

    Args:
        problem: What is to be learned.
        course: From `new_course`, or taken up again; its arrays are taken over.
        constants: From `begin`.
        after: As in `loop.fit`.
        rescue: As in `loop.fit`.
        counted: As in `loop.fit`.

    Returns:
        The course; `loop.result` of it is what trained.

    Raises:
        DivergedError: naming the step.
    """
    s = problem.settings
    step, _ = step_of(problem)
    mesh = sharding.mesh_of(course.state.params)
    lead = int(s.accumulate > 1)

    def batch(index: int) -> Examples:
        made = data.batch_at(
            problem.train, index, batch_size=s.batch_size, seed=s.seed, parts=s.accumulate
        )
        return _placed(made, mesh, lead)

    return loop.fit(
        course,
        loop.compiled(step),
        constants,
        batch,
        steps=s.steps or 0,
        dev_loss=dev_loss_of(problem, constants),
        eval_every=s.eval_every or 1,
        patience=s.patience,
        after=after,
        rescue=rescue,
        counted=counted,
    )


def _part_size(problem: Problem) -> int:
    """Blocks that are computed at a time."""
    return max(1, problem.settings.batch_size // problem.settings.accumulate)


def _placed(examples: Examples, mesh: jax.sharding.Mesh | None, lead: int) -> Examples:
    """A batch on its devices, split along the mesh's ``data`` axis."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, examples)
    axes = (None,) * lead + ("batch", None)
    return jax.tree.map(
        lambda x: jax.device_put(x, sharding.leaf_sharding(mesh, axes, x.shape)), examples
    )
