"""Entropic optimal transport with uniform marginals, by ott-jax: cost -> `Potentials`.

Potentials are kept, plans are rebuilt: ``plan(cost, potentials)``. The log form of Sinkhorn is
used throughout: it is safe at every epsilon and, in ott-jax 0.6 on CPU, 3 to 6 times faster per
iteration than the kernel form (measured at 320 x 512 and 1024 x 2048).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jaxtyping import Array, Float
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn

from ot_merge_jax.types import Potentials

#: Entries of the cost matrices that are solved side by side; more lanes wait for the slowest.
_ENTRIES_AT_ONCE = 2**18
_CHECK_EVERY = 10


def pairs_at_once(n: int, m: int) -> int:
    """How many ``[n, m]`` problems to solve side by side.

    Example:
        >>> pairs_at_once(128, 192), pairs_at_once(2048, 4096)
        (10, 1)
    """
    return max(1, min(64, _ENTRIES_AT_ONCE // (n * m)))


def solve(
    cost: Float[Array, "n m"] | Float[Array, "batch n m"],
    *,
    epsilon: Any,
    max_iterations: int = 2000,
    threshold: Any = 1e-6,
) -> Potentials:
    r"""Solves one entropic transport problem with uniform marginals, or a batch of them.

    .. math:: \min_Q \langle C, Q\rangle - \epsilon H(Q), \quad Q 1 = 1/n,\; Q^\top 1 = 1/m

    Args:
        cost: ``[n, m]`` or ``[batch, n, m]``, target by source.
        epsilon: Positive, in cost units; a number, or ``[batch]``.
        max_iterations: Sinkhorn iterations at most; static.
        threshold: L1 marginal error at which to stop.

    Returns:
        Potentials with the batch axis leading, if there is one. ``converged`` must be looked at:
        failure to converge, and a cost that is not finite, are data and not exceptions.

    Raises:
        ValueError: if ``epsilon`` is not positive and finite, ``max_iterations`` is below 1 or
            ``cost`` has not two or three axes.

    Example:
        >>> cost = jnp.array([[0.0, 1.0], [1.0, 0.0]])
        >>> potentials = solve(cost, epsilon=0.1)
        >>> bool(potentials.converged), plan(cost, potentials).round(3).tolist()
        (True, [[0.5, 0.0], [0.0, 0.5]])

    Source: Transport and Merge, eq. 8; ott-jax `Sinkhorn`. Differs: the tolerance is the L1
    marginal error, not the change of a scaling vector.
    """
    if cost.ndim not in (2, 3):
        raise ValueError(f"A cost has axes [n, m] or [batch, n, m], not {cost.shape}.")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, not {max_iterations}.")
    check_epsilon(epsilon)
    return _solve(cost, epsilon, threshold, max_iterations=max_iterations)


def check_epsilon(epsilon: Any) -> None:
    """ValueError unless every epsilon is positive and finite; a traced one cannot be checked."""
    if not isinstance(epsilon, core.Tracer):
        values = np.asarray(epsilon)
        if not (np.isfinite(values) & (values > 0)).all():
            raise ValueError(f"epsilon must be positive and finite, not {epsilon}.")


@functools.partial(jax.jit, static_argnames=("max_iterations",))
def _solve(cost: jax.Array, epsilon: Any, threshold: Any, *, max_iterations: int) -> Potentials:
    """`solve` without checks, one compilation for each shape."""
    epsilon = jnp.asarray(epsilon, jnp.float32)
    if cost.ndim == 2:
        return _solve_one(cost, epsilon, threshold, max_iterations)
    epsilon = jnp.broadcast_to(epsilon, cost.shape[:1])
    return jax.lax.map(
        lambda one: _solve_one(one[0], one[1], threshold, max_iterations),
        (cost, epsilon),
        batch_size=pairs_at_once(*cost.shape[1:]),
    )


def _solve_one(cost: jax.Array, epsilon: Any, threshold: Any, max_iterations: int) -> Potentials:
    """One problem, in float32 at the highest matmul precision.

    Row and column minima are taken out before the solve and put back into the potentials after: the
    potentials of what remains are a few epsilon, not a few cost units, and their rounding no longer
    keeps the marginal error above 1e-6 (at epsilon 0.02: 20 to 50 iterations instead of 2000
    without convergence).
    """
    cost = cost.astype(jnp.float32)
    row = cost.min(1)
    column = (cost - row[:, None]).min(0)
    reduced = cost - row[:, None] - column
    with jax.default_matmul_precision("highest"):
        solver = sinkhorn.Sinkhorn(
            lse_mode=True,
            threshold=threshold,
            norm_error=1,
            inner_iterations=math.gcd(_CHECK_EVERY, max_iterations),  # ott runs whole rounds
            max_iterations=max_iterations,
            implicit_diff=None,
        )
        output = solver(linear_problem.LinearProblem(geometry.Geometry(reduced, epsilon=epsilon)))
    coupled = jnp.exp((output.f[:, None] + output.g - reduced) / epsilon)
    n, m = cost.shape
    error = jnp.maximum(
        jnp.abs(coupled.sum(1) - 1 / n).sum(), jnp.abs(coupled.sum(0) - 1 / m).sum()
    )
    total = jnp.sum(coupled * cost)
    return Potentials(
        f=output.f + row,
        g=output.g + column,
        epsilon=epsilon,
        cost=total,
        error=error,
        iterations=jnp.asarray(output.n_iters, jnp.int32),
        converged=jnp.asarray(output.converged) & jnp.isfinite(error) & jnp.isfinite(total),
    )


def plan(cost: Float[Array, "n m"], potentials: Potentials) -> Float[Array, "n m"]:
    """The transport plan of one problem, rebuilt from its potentials.

    Args:
        cost: ``[n, m]``, the cost that was solved.
        potentials: Its potentials, without batch axes.

    Returns:
        ``[n, m]`` non-negative, summing to 1.
    """
    exponent = potentials.f[:, None] + potentials.g[None, :] - cost
    return jnp.exp(exponent / potentials.epsilon)
