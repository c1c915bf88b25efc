"""Sinkhorn in kernel form, near the memory's bandwidth: one blocked pass an iteration. JAX only.

The textbook update reads the kernel twice, once for the rows and once for the columns. Here a block
of rows is read, its row scalings follow, and its share of the column sums is added while it is
still in cache: one read of the kernel for both. Two things more cut the iterations and make float32
enough:

- **over-relaxation** (Thibault et al. 2021; Lehmann et al. 2022): near the solution the step is
  lengthened by a factor estimated from how fast the error falls, which leaves about the square root
  of the iterations;
- **absorption** (Schmitzer 2019): scalings that leave the range of float32 are moved into the
  potentials, and the kernel is built anew around them.

Warm starts are not used, because they did not pay: on the demo's activations (three sites, all 24
layer pairs, epsilon 0.02 to 0.1) the potentials of a neighbouring layer pair changed the iterations
by -3 to +4 %, and annealing epsilon from twice its value cost 9 to 23 % more.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ot_merge_jax.types import Potentials

#: Entries of a block of rows on CPU (4 MiB, which the last cache holds); other devices take all
#: rows at once, because a loop over blocks would leave them idle.
BLOCK = 1 << 20
#: Scalings beyond exp(+-this) are absorbed.
_DRIFT = 20.0
#: How often the relaxation is adjusted, from the error's fall over the second half of the stretch.
_STRETCH = 10
_MOST_RELAXED = 1.97
#: The error, a share of the mass, below which a step is lengthened.
_NEAR = 0.3
#: A relaxed error that falls more slowly than this per iteration starts again without relaxation.
_STALLED = 0.99


class _State(NamedTuple):
    """One batch between two iterations.

    Attributes:
        u: Row scalings ``[b, n]`` of the kernel at hand.
        v: Column scalings ``[b, m]``.
        relaxation: ``[b]``, in [1, 2).
        error: Marginal error ``[b]`` before the last update.
        middle: The error half a stretch ago ``[b]``.
        iterations: ``[b]``.
        step: Iterations of the batch, a scalar.
    """

    u: jax.Array
    v: jax.Array
    relaxation: jax.Array
    error: jax.Array
    middle: jax.Array
    iterations: jax.Array
    step: jax.Array


#: Row sums ``[b, n]``, column sums ``[b, m]`` and transport cost ``[b]`` of a plan.
_Measured = tuple[jax.Array, jax.Array, jax.Array]
#: Potentials of the reduced cost, the state, and what was measured at its end.
_Carry = tuple[jax.Array, jax.Array, _State, _Measured]


def solve(
    cost: Float[Array, "b n m"],
    epsilon: Float[Array, " b"],
    threshold: Any,
    *,
    max_iterations: int,
) -> Potentials:
    r"""Solves a batch of problems with uniform marginals; each stops when it has converged.

    With :math:`K_{ij} = e^{(f_i + g_j - C_{ij}) / \epsilon}` an iteration is

    .. math:: u \leftarrow u^{1-\omega} \Big(\frac{1/n}{K v}\Big)^{\omega}, \qquad
        v \leftarrow v^{1-\omega} \Big(\frac{1/m}{K^\top u}\Big)^{\omega}

    Args:
        cost: Target by source, float32.
        epsilon: One for each problem.
        threshold: L1 marginal error at which to stop.
        max_iterations: At most.

    Returns:
        Potentials, the batch axis leading; a problem whose cost is not finite does not converge.
        The error is taken before the potentials of the reduced cost are rounded to those of the
        cost.

    Example:
        >>> cost = jnp.array([[[0.0, 1.0], [1.0, 0.0]]])
        >>> solve(cost, jnp.array([0.1]), 1e-6, max_iterations=100).cost.round(3).tolist()
        [0.0]

    Source: Transport and Merge, eq. 8; Thibault, Chizat, Dossal, Papadakis 2021 (relaxation);
    Lehmann, von Renesse, Sambale, Uschmajew 2022 (its best value from the rate of convergence);
    Schmitzer 2019 (absorption).
    """
    b, n, m = cost.shape
    # the minima of rows and columns are taken out first: every row and column of the first kernel
    # holds a 1, so nothing underflows as a whole; and the potentials of what remains are a few
    # epsilon, not a few cost units, so their rounding does not keep the error above 1e-6
    row = cost.min(2)
    column = (cost - row[:, :, None]).min(1)
    blocks = _blocks(cost)
    reduced = _Reduced(blocks, _of_rows(row, blocks), column, epsilon)
    zero, far = jnp.zeros((b,), jnp.int32), jnp.full((b,), jnp.inf)
    start = _State(
        jnp.ones((b, n)), jnp.ones((b, m)), jnp.ones((b,)), far, far, zero, jnp.zeros((), jnp.int32)
    )

    def is_active(state: _State) -> jax.Array:
        return (state.error > threshold) & (state.iterations < max_iterations)

    def absorb(carry: _Carry) -> _Carry:
        f, g, state, _ = carry
        kernel = _kernel(reduced, f, g)
        state = state._replace(u=jnp.ones_like(state.u), v=jnp.ones_like(state.v))
        state = jax.lax.while_loop(
            lambda state: is_active(state).any() & _in_range(state),
            lambda state: _iterate(kernel, state, is_active(state), threshold),
            state,
        )
        f = f + epsilon[:, None] * jnp.log(state.u)
        g = g + epsilon[:, None] * jnp.log(state.v)
        # here, where the kernel still stands, it takes no exponentials
        return f, g, state, _measure(kernel, blocks, state)

    f, g, state, (rows, columns, total) = jax.lax.while_loop(
        lambda carry: is_active(carry[2]).any(),
        absorb,
        (jnp.zeros((b, n)), jnp.zeros((b, m)), start, (start.u, start.v, start.error)),
    )
    error = jnp.maximum(jnp.abs(rows - 1 / n).sum(1), jnp.abs(columns - 1 / m).sum(1))
    return Potentials(
        f=f + row,
        g=g + column,
        epsilon=epsilon,
        cost=total,
        error=error,
        iterations=state.iterations,
        converged=(state.error <= threshold) & jnp.isfinite(error) & jnp.isfinite(total),
        is_log=jnp.zeros((b,), bool),
    )


class _Reduced(NamedTuple):
    """A batch of costs, and the minima that are taken out of them wherever they are read.

    Attributes:
        blocks: The costs ``[blocks, b, rows, m]``.
        row: Row minima ``[blocks, b, rows]``.
        column: Column minima of what remains ``[b, m]``.
        epsilon: ``[b]``.
    """

    blocks: jax.Array
    row: jax.Array
    column: jax.Array
    epsilon: jax.Array


def _blocks(cost: jax.Array) -> jax.Array:
    """``[blocks, b, rows, m]``, padded with rows of infinite cost, whose kernel is 0."""
    b, n, m = cost.shape
    rows = min(n, max(1, BLOCK // (b * m))) if jax.default_backend() == "cpu" else n
    count = math.ceil(n / rows)
    if count * rows > n:
        added = ((0, 0), (0, count * rows - n), (0, 0))
        cost = jnp.pad(cost, added, constant_values=jnp.inf)
    return jnp.moveaxis(cost.reshape(b, count, rows, m), 1, 0)


def _of_rows(vector: jax.Array, blocks: jax.Array) -> jax.Array:
    """A vector of rows ``[b, n]`` cut like the blocks: ``[blocks, b, rows]``."""
    count, b, rows, _ = blocks.shape
    vector = jnp.pad(vector, ((0, 0), (0, count * rows - vector.shape[1])))
    return jnp.moveaxis(vector.reshape(b, count, rows), 1, 0)


def _joined(parts: jax.Array, n: int) -> jax.Array:
    """The inverse of `_of_rows`."""
    return jnp.moveaxis(parts, 0, 1).reshape(parts.shape[1], -1)[:, :n]


def _kernel(reduced: _Reduced, f: jax.Array, g: jax.Array) -> jax.Array:
    """``exp((f + g - C) / epsilon)`` in blocks, ``C`` reduced: the kernel of some potentials."""
    # all blocks in one pass: a loop over them, which XLA fuses less well, took twice as long
    # the barrier keeps XLA from holding the reduced cost beside the cost through the outer loop
    reduced, f = jax.lax.optimization_barrier((reduced, _of_rows(f, reduced.blocks)))
    # what is near 0 is subtracted first, exactly
    cost = reduced.row[..., None] + reduced.column[:, None, :] - reduced.blocks
    return jnp.exp((cost + (f[..., None] + g[:, None, :])) / reduced.epsilon[:, None, None])


def _in_range(state: _State) -> jax.Array:
    """Whether no scaling has drifted out of the range that is safe in float32."""
    low, high = math.exp(-_DRIFT), math.exp(_DRIFT)

    def within(x: jax.Array) -> jax.Array:
        return (x.min() >= low) & (x.max() <= high)

    return within(state.u) & within(state.v)


def _iterate(kernel: jax.Array, state: _State, is_active: jax.Array, threshold: Any) -> _State:
    """One update of both scalings of the problems that have not stopped."""
    n, m = state.u.shape[1], state.v.shape[1]
    omega = state.relaxation[:, None]

    def block(columns: jax.Array, one: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, tuple]:
        part, u = one
        row = u * jnp.einsum("brm,bm->br", part, state.v)
        u = jnp.where(row > 0, u * (1 / n / row) ** omega, 0.0)
        return columns + jnp.einsum("brm,br->bm", part, u), (u, row)

    columns, (u, rows) = jax.lax.scan(
        block, jnp.zeros_like(state.v), (kernel, _of_rows(state.u, kernel))
    )
    u, rows = _joined(u, n), _joined(rows, n)
    columns = state.v * columns
    v = state.v * (1 / m / columns) ** omega
    # after an unrelaxed update of the rows their marginals are exact
    of_rows = jnp.where(state.relaxation > 1, jnp.abs(rows - 1 / n).sum(1), 0.0)
    error = jnp.abs(columns - 1 / m).sum(1) + of_rows
    goes_on = is_active & (error > threshold)
    step = state.step + 1
    at_half, at_end = step % _STRETCH == _STRETCH // 2, step % _STRETCH == 0
    return _State(
        u=jnp.where(is_active[:, None], u, state.u),
        v=jnp.where(goes_on[:, None], v, state.v),
        relaxation=jnp.where(
            at_end, _relaxation(state.relaxation, state.middle, error), state.relaxation
        ),
        error=jnp.where(is_active, error, state.error),
        middle=jnp.where(at_half, error, state.middle),
        iterations=state.iterations + is_active,
        step=step,
    )


def _relaxation(omega: jax.Array, before: jax.Array, now: jax.Array) -> jax.Array:
    r"""The next relaxation, from the error's fall.

    With the observed rate :math:`\lambda` per iteration the unrelaxed rate is
    :math:`\mu = (\lambda + \omega - 1)^2 / (\lambda \omega^2)` and the best relaxation
    :math:`2 / (1 + \sqrt{1 - \mu})` (Young; Lehmann et al. 2022, section 3).
    """
    rate = (now / before) ** (2 / _STRETCH)
    unrelaxed = jnp.clip((rate + omega - 1) ** 2 / (rate * omega**2), 0.0, 1.0)
    best = jnp.clip(2 / (1 + jnp.sqrt(1 - unrelaxed)), omega, _MOST_RELAXED)
    # the rate says something only near the solution; and one below omega - 1 cannot come from the
    # relaxed slowest mode
    is_telling = (now < _NEAR) & (rate > omega - 1) & (rate < 1)
    longer = jnp.where(is_telling, best, omega)
    return jnp.where((omega > 1) & ~(rate < _STALLED), 1.0, longer)


def _measure(kernel: jax.Array, blocks: jax.Array, state: _State) -> _Measured:
    """Row sums, column sums and transport cost of the plan ``u K v``."""

    def block(
        carry: tuple[jax.Array, jax.Array], one: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        columns, total = carry
        part, cost, u = one
        mass = u[:, :, None] * part * state.v[:, None, :]
        total = total + jnp.where(part > 0, mass * cost, 0.0).sum((1, 2))  # padded: 0 * inf
        columns = columns + jnp.einsum("brm,br->bm", part, u)
        return (columns, total), u * jnp.einsum("brm,bm->br", part, state.v)

    zero = jnp.zeros_like(state.v), jnp.zeros_like(state.error)
    u = _of_rows(state.u, blocks)
    (columns, total), rows = jax.lax.scan(block, zero, (kernel, blocks, u))
    return _joined(rows, state.u.shape[1]), state.v * columns, total
