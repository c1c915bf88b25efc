"""Lists of problems that are solved a few at a time, under ``vmap`` too. Imports JAX only."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap


def in_batches(
    solve_batch: Callable[[Any], Any], problems: Any, size: int, *, groups: int = 1
) -> Any:
    """Maps over the leading axis of a pytree, ``size`` entries at a time, as one program.

    The last batch of a group is filled up with the group's last problem, so that all have one
    shape.

    Args:
        solve_batch: From leaves ``[size, ...]`` to leaves ``[size, ...]``.
        problems: Leaves ``[count, ...]``.
        size: Entries at a time.
        groups: The entries form this many groups of equal length; no batch mixes two groups.

    Returns:
        Leaves ``[count, ...]``.

    Example:
        >>> in_batches(lambda x: 2 * x, jnp.arange(5), 2).tolist()
        [0, 2, 4, 6, 8]
    """
    count = len(jax.tree.leaves(problems)[0]) // groups
    size = min(size, count)
    batches = math.ceil(count / size)
    if groups * batches == 1:
        return solve_batch(problems)
    places = np.minimum(np.arange(batches * size), count - 1)
    places = jnp.asarray((count * np.arange(groups)[:, None] + places).reshape(-1, size))
    results = jax.lax.map(
        lambda chosen: solve_batch(jax.tree.map(lambda leaf: leaf[chosen], problems)), places
    )

    def unfilled(leaf: jax.Array) -> jax.Array:
        shape = leaf.shape[2:]
        return leaf.reshape(groups, batches * size, *shape)[:, :count].reshape(-1, *shape)

    return jax.tree.map(unfilled, results)


def listed(solve_batch: Callable[..., Any], size: int, *, groups: int = 1) -> Callable[..., Any]:
    """The solver of a list of problems, whose lanes under ``vmap`` become problems of the list.

    Lanes of one ``while_loop`` wait for the slowest. Lanes that differ in epsilon or threshold
    differ in iterations; so such lanes are solved one after the other, and only the problems of
    one lane side by side. Lanes that differ in cost alone are solved side by side.

    Args:
        solve_batch: From costs ``[b, n, m]``, epsilon ``[b]`` and threshold ``[b]`` to a pytree of
            leaves ``[b, ...]``.
        size: Problems side by side at most.
        groups: How many stretches of the list are solved one after the other.

    Returns:
        A function of costs ``[c, n, m]``, the index of each problem's cost ``[p]`` (None: each
        group has one problem for each cost, in their order), epsilon ``[p]`` and threshold ``[p]``.
        A cost that many problems share is not copied before their turn. It has no gradient.

    Example:
        >>> solve = listed(lambda cost, epsilon, threshold: cost.sum((1, 2)) * epsilon, 2)
        >>> costs, ones = jnp.ones((3, 1, 2)), jnp.ones(3)
        >>> jax.vmap(lambda epsilon: solve(costs, None, epsilon * ones, ones))(jnp.arange(2.0))
        Array([[0., 0., 0.],
               [2., 2., 2.]], dtype=float32)
    """

    @custom_vmap
    def run(
        costs: jax.Array, which: jax.Array | None, epsilon: jax.Array, threshold: jax.Array
    ) -> Any:
        def batch(problems: tuple[jax.Array, ...]) -> Any:
            chosen, *numbers = problems
            return solve_batch(chosen if which is None else costs[chosen], *numbers)

        if which is None and groups > 1:
            if len(costs) <= size:  # nothing to choose, nothing to copy
                numbers = (epsilon.reshape(groups, -1), threshold.reshape(groups, -1))
                results = jax.lax.map(lambda group: solve_batch(costs, *group), numbers)
                return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), results)
            which = jnp.tile(jnp.arange(len(costs)), groups)
        problems = (costs if which is None else which, epsilon, threshold)
        return in_batches(batch, problems, size, groups=groups)

    @run.def_vmap
    def fold(lanes: int, is_batched: Any, *problems: Any) -> tuple[Any, Any]:
        costs, which, epsilon, threshold = problems
        cost_is_batched, which_is_batched, *numbers_are_batched = is_batched
        count = epsilon.shape[-1]
        # lanes become groups, [lane, group, problem], or further problems of the existing groups,
        # [group, lane, problem]
        is_apart = any(numbers_are_batched)

        def swapped(leaf: jax.Array) -> jax.Array:
            return leaf if is_apart else jnp.swapaxes(leaf, 0, 1)

        def flat(leaf: jax.Array, has_lanes: bool) -> jax.Array:
            leaf = leaf if has_lanes else jnp.broadcast_to(leaf, (lanes, count))
            return swapped(leaf.reshape(lanes, groups, -1)).reshape(-1)

        def unflat(leaf: jax.Array) -> jax.Array:
            first = (lanes, groups) if is_apart else (groups, lanes)
            leaf = swapped(leaf.reshape(*first, -1, *leaf.shape[1:]))
            return leaf.reshape(lanes, count, *leaf.shape[3:])

        if which is None and (cost_is_batched or not is_apart):
            which = jnp.tile(jnp.arange(costs.shape[-3]), groups)
        if cost_is_batched:
            which = which + costs.shape[1] * jnp.arange(lanes)[:, None]
            costs = costs.reshape(-1, *costs.shape[2:])
        results = listed(solve_batch, size, groups=groups * (lanes if is_apart else 1))(
            costs,
            None if which is None else flat(which, cost_is_batched or bool(which_is_batched)),
            *map(flat, (epsilon, threshold), numbers_are_batched),
        )
        return jax.tree.map(unflat, results), jax.tree.map(lambda _: True, results)

    return run
