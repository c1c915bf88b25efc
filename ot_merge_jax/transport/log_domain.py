"""Sinkhorn in the log domain, by ott-jax: for costs that span more epsilons than float32 scales."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from ot_merge_jax.types import Potentials

#: Iterations between two looks at the marginal error.
_CHECK_EVERY = 10


def solve(cost: jax.Array, epsilon: Any, threshold: Any, *, max_iterations: int) -> Potentials:
    """One problem by ott-jax.

    Row and column minima are taken out before the solve and put back into the potentials after: the
    potentials of what remains are a few epsilon, not a few cost units, and their rounding no longer
    keeps the marginal error above 1e-6.

    Args:
        cost: ``[n, m]`` float32, target by source.
        epsilon: In cost units.
        threshold: L1 marginal error at which to stop.
        max_iterations: At most; static.

    Returns:
        Potentials without batch axes.
    """
    # three seconds of imports for a form that is seldom needed
    from ott.geometry import geometry  # noqa: PLC0415
    from ott.problems.linear import linear_problem  # noqa: PLC0415
    from ott.solvers.linear import sinkhorn  # noqa: PLC0415

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
        used_log_domain=jnp.ones((), bool),
    )
