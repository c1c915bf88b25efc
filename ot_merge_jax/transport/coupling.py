"""Which neuron and which layer corresponds to which: all sites, all layer pairs.

Potentials are kept for every pair; costs and plans exist for one group of pairs at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ot_merge_jax import progress
from ot_merge_jax.transport import batches, cost, sinkhorn
from ot_merge_jax.types import BUDGET, Activations, Coupling, HParams, MergeSpec, Potentials, Solver

#: The paper's iteration limit for the layer problem (Transport and Merge, A.3).
LAYER_ITERATIONS = 1000
#: Numbers kept for each problem beside its two potentials: the other fields of `Potentials`.
_NUMBERS = len(Potentials._fields) - 2


def couple(
    target: Activations,
    source: Activations,
    hparams: HParams,
    *,
    spec: MergeSpec,
    sites: Iterable[str] | None = None,
    pairs_at_once: int | None = None,
    rows_at_once: int = BUDGET.source_rows,
) -> Coupling:
    """Solves the neuron transport of every layer pair at every site, then the layer transport.

    Args:
        target: Activations of the target.
        source: Activations of the source (of the source base, for rule ``delta``); same row ids.
        hparams: ``epsilon``, ``layer_epsilon`` and ``threshold`` are used.
        spec: ``layer_cost``, ``signed``, ``max_iterations``,
            ``solver``. Under a trace a pair whose cost spans too many epsilons for the scaling form
            comes back not converged, unless the solver is ``ott``.
        sites: The sites to couple; None: all of the target's activations.
        pairs_at_once: Layer pairs solved side by side at most; None: `sinkhorn.pairs_at_once`.
        rows_at_once: Entries of the source's rows on the device at a time, at least one layer's.

    Returns:
        The coupling of the sites.

    Raises:
        ValueError: if the rows of the two models do not correspond, or are fewer than 2; if an
            epsilon is not positive and finite, a budget is below 1 or the solver is unknown.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> rows, x = np.arange(50), rng.normal(size=(2, 50, 4)).astype(np.float32)
        >>> target = Activations({"mlp_in": x, "up_out": x}, rows)
        >>> source = Activations({"mlp_in": x[::-1], "up_out": x[::-1]}, rows)
        >>> coupling = couple(target, source, HParams(1.0), spec=MergeSpec(weights=("up",)))
        >>> coupling.layer_plan["up_out"].argmax(1).tolist()  # the layers were swapped
        [1, 0]

    Source: Transport and Merge, arXiv 2602.05495, eq. 7-13. Differs: all layer pairs are solved;
    ``layer_cost="median"`` and ``signed`` are ours.
    """
    if not np.array_equal(target.row_id, source.row_id) or len(target.row_id) < 2:
        raise ValueError(
            f"Rows of target and source must correspond one to one and be at least 2, "
            f"not {len(target.row_id)} and {len(source.row_id)}."
        )
    sinkhorn.check_budgets(pairs_at_once=pairs_at_once, rows_at_once=rows_at_once)
    sites = tuple(target.values) if sites is None else tuple(sites)
    total = sum(
        len(target.values[site]) * len(_blocks(source.values[site].shape, rows_at_once))
        for site in sites
    )
    for epsilon in (hparams.epsilon, hparams.layer_epsilon):
        sinkhorn.check_epsilon(epsilon)
    steps = iter(progress.track(range(total), "neuron transport (layers x sites)"))
    feature, layer, std_target, std_source = {}, {}, {}, {}
    for site in sites:
        blocks = []
        for part in _blocks(source.values[site].shape, rows_at_once):
            ys, solved = jax.device_put(source.values[site][part]), []
            for x in target.values[site]:
                next(steps)
                one_layer = functools.partial(
                    _one_layer, jax.device_put(x), ys, hparams.epsilon, hparams.threshold,
                    max_iterations=spec.max_iterations, signed=spec.signed, size=pairs_at_once,
                )  # fmt: skip
                solved.append(
                    sinkhorn.by_solver(
                        spec.solver, lambda chosen, run=one_layer: run(solver=chosen)
                    )
                )
            blocks.append(solved)
        feature[site], std_target[site], std_source[site] = _stacked(
            blocks, layers=source.values[site].shape[0]
        )
        layer[site] = layer_plan(
            feature[site].cost,
            epsilon=hparams.layer_epsilon,
            layer_cost=spec.layer_cost,
            solver=spec.solver,
        )
    next(steps, None)
    return Coupling(layer, feature, std_target, std_source)


def peak_bytes(
    problems: Iterable[tuple[int, int]],
    *,
    rows: int,
    source_layers: int,
    pairs_at_once: int | None = None,
    rows_at_once: int = BUDGET.source_rows,
) -> int:
    """Bytes of `couple` at its peak, beside the activations and the potentials.

    Args:
        problems: Neurons of target and source at each site.
        rows: Rows of activations.
        source_layers: Of the source.
        pairs_at_once: As for `couple`.
        rows_at_once: As for `couple`.

    Returns:
        The most that a site needs: the rows of one target layer and of a block of source layers;
        the target layer's rows standardised, and transposed for the product; for each pair being
        solved its rows, standardised and, where not all pairs are solved at once, copied; its cost,
        reduced cost and kernel, and intermediate results.
    """
    peak = 0
    for n, m in problems:
        block = _blocks((source_layers, rows, m), rows_at_once)[0]
        layers = block.stop - block.start
        pairs = min(layers, pairs_at_once or sinkhorn.pairs_at_once(n, m))
        copies = 1 + (pairs < layers)
        entries = rows * (3 * n + layers * m) + pairs * (copies * rows * m + 4 * n * m)
        peak = max(peak, 4 * entries)
    return peak


def result_bytes(problems: Iterable[tuple[int, int]], *, layers: tuple[int, int]) -> int:
    """Bytes of a `Coupling`: potentials of all pairs, layer plans and standard deviations.

    Args:
        problems: Neurons of target and source at each site.
        layers: Of target and source.
    """
    pairs = math.prod(layers)
    return 4 * sum(
        pairs * (n + m + _NUMBERS + 1) + layers[0] * n + layers[1] * m for n, m in problems
    )


def flops(problems: Iterable[tuple[int, int]], *, rows: int, pairs: int) -> tuple[int, int]:
    """FLOPs of the costs of all layer pairs, and of one iteration of all their problems.

    Args:
        problems: Neurons of target and source at each site.
        rows: Rows of activations.
        pairs: Of layers.
    """
    entries = pairs * sum(n * m for n, m in problems)
    return 2 * rows * entries, 4 * entries


def _blocks(shape: tuple[int, ...], rows_at_once: int) -> list[slice]:
    """Stretches of source layers ``[M, t, m]`` whose rows stay within so many entries.

    All have the same length, so that one program solves them; the last may overlap the one before
    it, and what it solves again is dropped.
    """
    layers, at_once = shape[0], max(1, rows_at_once // (shape[1] * shape[2]))
    count = math.ceil(layers / at_once)
    size = math.ceil(layers / count)
    starts = [min(start, layers - size) for start in range(0, layers, size)]
    return [slice(start, start + size) for start in starts]


@functools.partial(jax.jit, static_argnames="layers")
def _stacked(
    blocks: list[list[tuple[Potentials, jax.Array, jax.Array]]], *, layers: int
) -> tuple[Potentials, jax.Array, jax.Array]:
    """The results of `_one_layer`, target layers leading, blocks of source layers joined."""
    parts = []
    for solved in blocks:
        potentials, _, std_source = zip(*solved, strict=True)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves, 1), *potentials)
        parts.append((stacked, std_source[0]))  # the source's are the same in all
    joined = jax.tree.map(lambda *leaves: _joined(leaves, layers), *parts)
    potentials = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), joined[0])
    return potentials, jnp.stack([std for _, std, _ in blocks[0]]), joined[1]


def _joined(blocks: tuple[jax.Array, ...], layers: int) -> jax.Array:
    """Blocks of source layers joined; the last one without its overlap with the one before."""
    *whole, last = blocks
    return jnp.concatenate([*whole, last[sum(map(len, blocks)) - layers :]])


@functools.partial(jax.jit, static_argnames=("max_iterations", "signed", "solver", "size"))
def _one_layer(
    x: Float[Array, "t n"],
    ys: Float[Array, "M t m"],
    epsilon: Any,
    threshold: Any,
    *,
    max_iterations: int,
    signed: bool,
    solver: Solver,
    size: int | None,
) -> tuple[tuple[Potentials, Float[Array, " n"], Float[Array, "M m"]], Bool[Array, " M"]]:
    """One target layer against all source layers, a few pairs at a time.

    Also the standard deviations of both, and which pairs need the log domain. The source's rows are
    standardised again for each target layer, which costs little beside the solve and keeps no
    second copy of them.
    """
    units, std = cost.standardize(x)
    size = size or sinkhorn.pairs_at_once(x.shape[1], ys.shape[2])

    def pairs(chosen: jax.Array) -> tuple[Potentials, jax.Array, jax.Array]:
        others, stds = jax.vmap(cost.standardize)(chosen)
        costs = jax.vmap(lambda other: cost.cost_from_standardized(units, other, signed=signed))(
            others
        )
        potentials, is_too_wide = sinkhorn.solve_batch(
            costs, epsilon, threshold, max_iterations=max_iterations, solver=solver, size=size
        )
        return potentials, stds, is_too_wide

    potentials, std_source, is_too_wide = batches.in_batches(pairs, ys, size)
    return (potentials, std, std_source), is_too_wide


def layer_plan(
    costs: Float[Array, "L M"],
    *,
    epsilon: Any,
    layer_cost: Literal["plain", "median"] = "median",
    solver: Solver = "auto",
) -> Float[Array, "L M"]:
    """Transport plan between layers, from the transport cost of each layer pair.

    Args:
        costs: ``[L, M]`` transport cost ``<C, Q>`` of each pair.
        epsilon: Entropic regularisation (the papers' eta), in units of the scaled cost. It grows
            in proportion if the largest cost exceeds 1000.
        layer_cost: ``plain`` takes the costs as they are. ``median`` subtracts the smallest and
            divides by the median (0 counts as 1), because the costs of a real model differ by a
            few hundredths and eta 0.1 would give a flat plan.
        solver: As for `sinkhorn.solve`.

    Returns:
        ``[L, M]``, summing to 1; rows sum to 1/L and columns to 1/M. NaN where costs span too many
        epsilons for the scaling form and no other is allowed, under a trace or by ``solver``.

    Raises:
        ValueError: for an unknown ``layer_cost`` or ``solver``, or an epsilon that is not positive
            and finite.

    Example:
        >>> costs = jnp.array([[0.80, 0.83], [0.83, 0.80]])
        >>> layer_plan(costs, epsilon=0.1, layer_cost="plain").round(2)
        Array([[0.29, 0.21],
               [0.21, 0.29]], dtype=float32)
        >>> layer_plan(costs, epsilon=0.1).round(2)
        Array([[0.5, 0. ],
               [0. , 0.5]], dtype=float32)

    Source: Transport and Merge, eq. 10-13. Differs: ``median`` is ours; solved to 1e-6 in float32,
    because the paper's 1e-9 cannot be reached there.
    """
    if layer_cost not in ("plain", "median"):
        raise ValueError(f"layer_cost is 'plain' or 'median', not {layer_cost!r}.")
    sinkhorn.check_epsilon(epsilon)
    return sinkhorn.by_solver(
        solver,
        lambda chosen: _layer_plan(costs, epsilon, layer_cost=layer_cost, solver=chosen),
    )


@functools.partial(jax.jit, static_argnames=("layer_cost", "solver"))
def _layer_plan(
    costs: jax.Array, epsilon: Any, *, layer_cost: str, solver: Solver
) -> tuple[jax.Array, jax.Array]:
    """`layer_plan` as one program, and whether the problem needs the log domain."""
    if layer_cost == "median":
        shifted = costs - costs.min()
        middle = jnp.median(shifted)
        costs = shifted / jnp.where(middle > 0, middle, 1.0)
    epsilon = jnp.asarray(epsilon, jnp.float32) * jnp.maximum(1.0, costs.max() / 1000)
    solved = sinkhorn.solve_batch(
        costs[None], epsilon, 1e-6, max_iterations=LAYER_ITERATIONS, solver=solver
    )
    potentials, is_too_wide = jax.tree.map(lambda leaf: leaf[0], solved)
    plan = sinkhorn.plan(costs, potentials)
    if solver == "scaling":  # a plan has no flag to say that it was not solved
        plan = jnp.where(is_too_wide, jnp.nan, plan)
    return plan, is_too_wide


def plan(
    coupling: Coupling,
    target: Activations,
    source: Activations,
    *,
    site: str,
    l: int,
    m: int,
    signed: bool = False,
    plan_at_once: int = BUDGET.plan_block,
) -> Float[Array, "n_t n_s"]:
    """Rebuilds one neuron plan from its potentials and the activations.

    Args:
        coupling: From `couple`.
        target: The target activations it was made from.
        source: The source activations it was made from.
        site: Site.
        l: Target layer.
        m: Source layer.
        signed: Whether the coupling was made with ``signed``; the plan then carries the sign of
            the correlation.
        plan_at_once: As for `rebuild`.

    Returns:
        ``[n_t, n_s]``; non-negative and summing to 1 unless ``signed``.
    """
    potentials = jax.tree.map(lambda leaf: leaf[l, m], coupling.neuron_potentials[site])
    x, y = jnp.asarray(target.values[site][l]), jnp.asarray(source.values[site][m])
    return rebuild(x, y, potentials, signed=signed, plan_at_once=plan_at_once)


@functools.partial(jax.jit, static_argnames=("signed", "plan_at_once"))
def rebuild(
    x: Float[Array, "t n"],
    y: Float[Array, "t m"],
    potentials: Potentials,
    rows: Int[Array, " k"] | None = None,
    *,
    signed: bool = False,
    plan_at_once: int = BUDGET.plan_block,
) -> Float[Array, "k m"]:
    """The plan of one layer pair from its activations and potentials, in blocks of rows.

    Args:
        x: Target activations.
        y: Source activations.
        potentials: Those of the pair.
        rows: Target neurons whose rows are wanted; None: all.
        signed: Whether the coupling was made with ``signed``.
        plan_at_once: Entries of the plan that are computed at a time, at least one row's; static.

    Returns:
        Rows of the plan; those of all neurons sum to 1.
    """
    f = potentials.f
    if rows is not None:
        x, f = x[:, rows], f[rows]
    units, others = cost.standardize(x)[0], cost.standardize(y)[0]
    at_once = max(1, plan_at_once // y.shape[1])

    def block(chosen: jax.Array) -> jax.Array:
        rho = cost.correlation_from_standardized(units[:, chosen], others)
        mass = sinkhorn.plan(
            1.0 - (jnp.abs(rho) if signed else rho), potentials._replace(f=f[chosen])
        )
        return mass * jnp.sign(rho) if signed else mass

    return batches.in_batches(block, jnp.arange(len(f)), at_once)


def plan_bytes(
    n: int,
    m: int,
    *,
    rows: int,
    picked: int | None = None,
    plan_at_once: int = BUDGET.plan_block,
) -> int:
    """Bytes of `rebuild` at its peak.

    Args:
        n: Target neurons.
        m: Source neurons.
        rows: Rows of activations.
        picked: Target neurons whose rows of the plan are wanted; None: all.
        plan_at_once: As for `rebuild`.

    Returns:
        The plan, and its correlations or its blocks before they are joined; for one block, if
        there are several, its correlations and its part of the plan; both layers' activations,
        standardised and not.
    """
    k = n if picked is None else min(n, picked)
    at_once = min(k, max(1, plan_at_once // m))
    activations = rows * (n + m) + rows * (k * (1 + (k < n)) + m)
    block = 2 * at_once * m if at_once < k else 0
    return 4 * (2 * k * m + activations + block)
