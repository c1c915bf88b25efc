"""A training problem, without files: what trains, what is constant, the step, the history.

The command, and every arm of a comparison, calls `train`: arms that share a `Problem` see the same
data in the same order. Imports the rest of training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ot_merge_jax.distributed import sharding
from ot_merge_jax.models import specs
from ot_merge_jax.models.config import ModelConfig
from ot_merge_jax.recipes.training import Adaptation
from ot_merge_jax.training import loop, lora, losses, optimizer, packing
from ot_merge_jax.training import residual as residuals
from ot_merge_jax.training.loop import StepMetrics, TrainHistory, TrainState
from ot_merge_jax.training.losses import Examples, Objective
from ot_merge_jax.types import Params


class Problem(NamedTuple):
    """What is to be learned.

    Attributes:
        settings: Resolved: steps, batch size, dtype and intervals are numbers.
        objective: What is minimised.
        train: Blocks to learn from.
        dev: Blocks of the dev split, by which choices are made.
    """

    settings: Adaptation
    objective: Objective
    train: packing.Blocks
    dev: packing.Blocks


class OptimizerHParams(NamedTuple):
    """Traced numbers of the optimiser: ``vmap`` sweeps them without compiling anew.

    Attributes:
        learning_rate: The peak rate.
        weight_decay: Weight decay of what trains.
        max_grad_norm: Largest global norm of a gradient.
    """

    learning_rate: Any
    weight_decay: Any
    max_grad_norm: Any


class Frozen(NamedTuple):
    """What the loss needs besides what trains.

    Attributes:
        base: The model below adapters; None where it trains itself.
        residual: Path -> what a merge added.
        factor: Group -> how much of the residual is added.
        source: The teacher, in the dtype to compute in; None without one.
        rates: Numbers of the optimiser.
    """

    base: Params | None
    residual: dict[str, jax.Array]
    factor: dict[str, Any]
    source: Params | None
    rates: OptimizerHParams


class StepConfig(NamedTuple):
    """What fixes the program of a step; hashable, so static in jit.

    Attributes:
        objective: What is minimised.
        dtype: What is computed in.
        parts: Parts a batch is computed in.
        lora_scale: How much the product of adapters counts.
        steps: Length of the schedule.
        schedule: How the rate falls.
        warmup: Fraction of the steps that warm up.
    """

    objective: Objective
    dtype: str
    parts: int
    lora_scale: float
    steps: int
    schedule: optimizer.Schedule
    warmup: float


def step_config(problem: Problem) -> StepConfig:
    """The static part of a problem."""
    s = problem.settings
    scale = 1.0 if s.lora_rank is None or s.lora_alpha is None else s.lora_alpha / s.lora_rank
    return StepConfig(
        problem.objective, s.dtype, s.grad_accum_steps, scale, s.steps or 0, s.schedule, s.warmup
    )


def begin(
    problem: Problem,
    base: Params,
    residual: dict[str, jax.Array],
    factor: dict[str, Any],
    source: Params | None = None,
) -> tuple[Any, Frozen]:
    """What trains, before the first step, and what stays.

    Args:
        problem: What is to be learned; with ``lora_rank`` in its settings only adapters train.
        base: The trainable part of the weights.
        residual: The frozen part (`residual.between`); empty for a model that is not a merge.
        factor: Group -> strength of the residual.
        source: The teacher's parameters.

    Returns:
        (what trains, frozen).
    """
    rates = optimizer_hparams(problem)
    if problem.settings.lora_rank is None:
        return base, Frozen(None, residual, factor, source, rates)
    key = jax.random.key(problem.settings.seed)
    rank, targets = problem.settings.lora_rank, problem.settings.lora_targets
    factors = lora.init(key, problem.objective.cfg, rank=rank, targets=targets)
    if (mesh := sharding.mesh_of(base)) is not None:
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        factors = jax.device_put(factors, whole)
    return factors, Frozen(base, residual, factor, source, rates)


def base_of(trainable: Any, frozen: Frozen, *, config: StepConfig) -> Params:
    """The trained part as plain weights: adapters folded, the residual not yet."""
    if frozen.base is None:
        return trainable
    return lora.fold(frozen.base, trainable, config.lora_scale)


def params_of(trainable: Any, frozen: Frozen, *, config: StepConfig) -> Params:
    """The plain parameters, float32: everything folded."""
    base = base_of(trainable, frozen, config=config)
    return residuals.fold(base, frozen.residual, frozen.factor)


def loss_of(config: StepConfig) -> loop.Loss:
    """``(what trains, frozen, examples) -> loss``, a pure function."""

    def loss(trainable: Any, frozen: Frozen, examples: Examples) -> jax.Array:
        params = _cast(params_of(trainable, frozen, config=config), config.dtype)
        return losses.loss(params, frozen.source, examples, objective=config.objective)

    return loss


def optimizer_hparams(problem: Problem) -> OptimizerHParams:
    """The numbers of the optimiser, from the settings."""
    s = problem.settings
    return OptimizerHParams(s.learning_rate, s.weight_decay, s.max_grad_norm)


def transform_of(config: StepConfig, rates: OptimizerHParams) -> optax.GradientTransformation:
    """The optimiser that a config asks for; its state does not depend on the rates."""
    return optimizer.optimizer(
        steps=config.steps, warmup=config.warmup, schedule=config.schedule, **rates._asdict()
    )


def step(
    state: TrainState, frozen: Frozen, examples: Examples, *, config: StepConfig
) -> tuple[TrainState, StepMetrics]:
    """One step of training, a pure function.

    Of its arguments only ``config`` is static: arms that differ in their start, their teacher's
    weights, their data or their rates share one program, and rates sweep under ``vmap``.

    Args:
        state: What trains; a jitted step donates it.
        frozen: What does not train.
        examples: From `packing.batch_at`.
        config: What fixes the program.

    Returns:
        The next state, and the loss and gradient norm of the step.
    """
    transform = transform_of(config, frozen.rates)
    return loop.one_step(loss_of(config), transform, parts=config.parts)(state, frozen, examples)


_step = jax.jit(step, static_argnames="config", donate_argnums=0)
_folded = jax.jit(params_of, static_argnames="config")


@functools.partial(jax.jit, static_argnames=("objective", "dtype"))
def _plain_loss(
    params: Params, examples: Examples, *, objective: Objective, dtype: str
) -> jax.Array:
    """The loss of plain parameters."""
    return losses.loss(_cast(params, dtype), None, examples, objective=objective)


def _cast(params: Params, dtype: str) -> Params:
    """Parameters in the dtype to compute in."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def next_token_loss(params: Params, problem: Problem) -> float:
    """The next-token loss of plain parameters on the dev split, in nats per counted token.

    It does not depend on the objective of a problem, so that arms can be compared.
    """
    config = step_config(problem)
    objective = Objective("sft", config.objective.cfg, remat=config.objective.remat)
    size = max(1, problem.settings.batch_size // config.parts)
    mesh = sharding.mesh_of(params)
    return sum(
        float(
            _plain_loss(params, _placed(examples, mesh, 0), objective=objective, dtype=config.dtype)
        )
        for examples in packing.in_order(problem.dev, batch_size=size)
    )


def dev_loss(trainable: Any, frozen: Frozen, problem: Problem) -> float:
    """`next_token_loss` of what trains, folded."""
    return next_token_loss(_folded(trainable, frozen, config=step_config(problem)), problem)


def batch_of(problem: Problem, index: int, *, mesh: jax.sharding.Mesh | None = None) -> Examples:
    """The batch of a step, on its devices; only the seed and the number of the step decide it."""
    s = problem.settings
    examples = packing.batch_at(
        problem.train, index, batch_size=s.batch_size, seed=s.seed, parts=s.grad_accum_steps
    )
    return _placed(examples, mesh, int(s.grad_accum_steps > 1))


def new_history(problem: Problem, trainable: Any) -> TrainHistory:
    """A history before its first step; it has a copy of ``trainable``."""
    transform = transform_of(step_config(problem), optimizer_hparams(problem))
    return TrainHistory(loop.start(trainable, transform))


def train(
    problem: Problem,
    history: TrainHistory,
    frozen: Frozen,
    *,
    on_step: Callable[[TrainHistory], None] = lambda history: None,
    on_divergence: Callable[[TrainHistory], None] = lambda history: None,
    progress_of: Callable[[range], Any] = lambda steps: steps,
) -> TrainHistory:
    """Trains to the end, or until early stopping.

    Args:
        problem: What is to be learned.
        history: From `new_history` or from a checkpoint; its arrays are donated.
        frozen: From `begin`.
        on_step: As in `loop.fit`.
        on_divergence: As in `loop.fit`.
        progress_of: As in `loop.fit`.

    Returns:
        The history; `loop.result` of it is what trained.

    Raises:
        DivergedError: naming the step.
    """
    s, config = problem.settings, step_config(problem)
    mesh = sharding.mesh_of(history.state.params)
    return loop.fit(
        history,
        functools.partial(_step, config=config),
        frozen,
        lambda index: batch_of(problem, index, mesh=mesh),
        steps=config.steps,
        dev_loss=lambda trainable: dev_loss(trainable, frozen, problem),
        eval_every=s.eval_every or 1,
        patience=s.patience,
        on_step=on_step,
        on_divergence=on_divergence,
        progress_of=progress_of,
    )


def _placed(examples: Examples, mesh: jax.sharding.Mesh | None, lead: int) -> Examples:
    """A batch on its devices, split along the mesh's ``data`` axis."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, examples)
    axes = (None,) * lead + ("batch", None)
    return jax.tree.map(
        lambda x: jax.device_put(x, sharding.leaf_sharding(mesh, axes, x.shape)), examples
    )


def peak_bytes(problem: Problem, *, residuals: int = 0, source: ModelConfig | None = None) -> int:
    """The least bytes that a step needs: arrays that are in memory together, without activations.

    Args:
        problem: What is to be learned.
        residuals: How many residuals, each as large as the model, are in memory: that of the start
            (1), or that of a baseline too (2).
        source: The teacher; None without one.

    Returns:
        Base, folded and residual weights; what trains, its gradient, two moments, and the best of
        early stopping; three times the logits of a part of a batch; the teacher and its logits.
    """
    s, cfg = problem.settings, problem.objective.cfg
    count = trained = specs.count(cfg)
    if s.lora_rank is not None:
        adapted = (spec for spec in specs.param_specs(cfg) if spec.weight in s.lora_targets)
        trained = sum(s.lora_rank * spec.shape[0] * sum(spec.shape[1:]) for spec in adapted)
    weights = 4 * (count * (2 + residuals) + trained * (4 + (s.patience is not None)))
    length = problem.train.tokens.shape[1]
    tokens = length if s.remat else max(1, s.batch_size // s.grad_accum_steps) * length
    logits = 3 * 4 * tokens
    peak = weights + logits * cfg.vocab_size
    if source is not None:
        width = jnp.dtype(s.dtype).itemsize
        peak += specs.count(source) * width + logits * source.vocab_size
    return peak


def lane_bytes(problem: Problem, trainable: Any) -> int:
    """Bytes that each of several rates needs, with activations, without what all of them share.

    What trains, its gradient and moments; folded weights; activations. Counted as float32, whatever
    the dtype to compute in.
    """
    s, cfg = problem.settings, problem.objective.cfg
    trained = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    tokens = s.batch_size // s.grad_accum_steps * problem.train.tokens.shape[1]
    layer = 16 * cfg.hidden_size + 4 * cfg.intermediate_size
    activations = tokens * (3 * cfg.vocab_size + cfg.num_layers * layer)
    return 4 * (4 * trained + 2 * specs.count(cfg) + activations)
