"""Entropic optimal transport with uniform marginals: cost -> `Potentials`.

Potentials are kept, plans are rebuilt: ``plan(cost, potentials)``. Problems are solved in kernel
form by `transport.scaling`; where the cost spans more than `WIDEST` epsilons they are solved in log
form by ott-jax. Which one it was is recorded in the potentials.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jaxtyping import Array, Float

from ot_merge_jax.transport import scaling
from ot_merge_jax.types import Potentials

T = TypeVar("T")
#: Epsilons that a cost may span in kernel form. Beyond, the scalings leave float32 within a few
#: iterations, and building the kernel again each time costs what the log form does.
WIDEST = 1000.0
#: Entries of the cost matrices that are solved side by side where the cache is the limit (CPU).
_ENTRIES_IN_CACHE = 1 << 18
#: Of a device with memory of its own, the share that costs, reduced costs and kernels may take.
_SHARE = 1 / 8
_CHECK_EVERY = 10


def pairs_at_once(n: int, m: int) -> int:
    """How many ``[n, m]`` problems to solve side by side, from the first device's own memory.

    Example:
        >>> pairs_at_once(128, 192) >= pairs_at_once(2048, 4096) >= 1
        True
    """
    own = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    entries = _ENTRIES_IN_CACHE if own is None else int(_SHARE * own) // 12
    return max(1, min(64, entries // (n * m)))


def in_batches(solve_batch: Callable[[Any], Any], problems: Any, size: int) -> Any:
    """Maps over the leading axis of a pytree, ``size`` entries at a time, as one program.

    The last batch is filled up with the last problem, so that all have one shape.

    Args:
        solve_batch: From leaves ``[size, ...]`` to leaves ``[size, ...]``.
        problems: Leaves ``[count, ...]``.
        size: Entries at a time.

    Returns:
        Leaves ``[count, ...]``.

    Example:
        >>> in_batches(lambda x: 2 * x, jnp.arange(5), 2).tolist()
        [0, 2, 4, 6, 8]
    """
    count = len(jax.tree.leaves(problems)[0])
    size = min(size, count)
    batches = math.ceil(count / size)
    if batches == 1:
        return solve_batch(problems)
    places = jnp.minimum(jnp.arange(batches * size), count - 1).reshape(batches, size)
    found = jax.lax.map(
        lambda chosen: solve_batch(jax.tree.map(lambda leaf: leaf[chosen], problems)), places
    )
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count], found)


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

    Source: Transport and Merge, eq. 8; see `scaling.solve`. Differs: the tolerance is the L1
    marginal error, not the change of a scaling vector.
    """
    if cost.ndim not in (2, 3):
        raise ValueError(f"A cost has axes [n, m] or [batch, n, m], not {cost.shape}.")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, not {max_iterations}.")
    check_epsilon(epsilon)
    return in_both_forms(
        lambda may_be_log: _solve(
            cost, epsilon, threshold, max_iterations=max_iterations, may_be_log=may_be_log
        ),
        lambda found: found.is_log,
    )


def in_both_forms(attempt: Callable[[bool], T], flags: Callable[[T], jax.Array]) -> T:
    """Solves in kernel form, and again with both forms if some problem needs the log form.

    The log form is seldom needed and takes as long to compile as everything else, so it is compiled
    when it is. Under a trace nothing is known yet, and both are.

    Args:
        attempt: Solves problems; its argument is `solve_batch`'s ``may_be_log``.
        flags: Where ``is_log`` is in what it returns.
    """
    found = attempt(False)
    is_log = flags(found)
    if isinstance(is_log, core.Tracer) or np.asarray(is_log).any():
        return attempt(True)
    return found


def check_epsilon(epsilon: Any) -> None:
    """ValueError unless every epsilon is positive and finite; a traced one cannot be checked."""
    if not isinstance(epsilon, core.Tracer):
        values = np.asarray(epsilon)
        if not (np.isfinite(values) & (values > 0)).all():
            raise ValueError(f"epsilon must be positive and finite, not {epsilon}.")


@functools.partial(jax.jit, static_argnames=("max_iterations", "may_be_log"))
def _solve(
    cost: jax.Array, epsilon: Any, threshold: Any, *, max_iterations: int, may_be_log: bool
) -> Potentials:
    """`solve` without checks, one compilation for each shape."""
    costs = cost[None] if cost.ndim == 2 else cost
    found = in_batches(
        lambda one: solve_batch(
            one[0], one[1], threshold, max_iterations=max_iterations, may_be_log=may_be_log
        ),
        (costs, jnp.broadcast_to(jnp.asarray(epsilon, jnp.float32), costs.shape[:1])),
        pairs_at_once(*costs.shape[1:]),
    )
    return jax.tree.map(lambda leaf: leaf[0], found) if cost.ndim == 2 else found


def solve_batch(
    cost: Float[Array, "b n m"],
    epsilon: Float[Array, " b"],
    threshold: Any,
    *,
    max_iterations: int,
    may_be_log: bool = True,
) -> Potentials:
    """`solve` of problems that are all held at once, each in the form that suits it.

    Args:
        cost: Target by source.
        epsilon: One for each problem.
        threshold: L1 marginal error at which to stop.
        max_iterations: At most.
        may_be_log: Whether the log form is part of the program. If not, a problem that needs it
            comes back flagged and not solved.

    Returns:
        Potentials, the batch axis leading.
    """
    cost = cost.astype(jnp.float32)
    # the minima of rows are needed again
    is_log = cost.max((1, 2)) - cost.min(2).min(1) > WIDEST * epsilon
    # a problem for the log form counts as solved here
    in_kernel_form = scaling.solve(
        cost, epsilon, jnp.where(is_log, jnp.inf, threshold), max_iterations=max_iterations
    )
    solved = in_kernel_form._replace(is_log=is_log)
    if not may_be_log:
        return solved

    def in_log_form() -> Potentials:
        return jax.lax.map(
            lambda one: jax.lax.cond(
                one[2].is_log,
                lambda: _log_form(one[0], one[1], threshold, max_iterations),
                lambda: one[2],
            ),
            (cost, epsilon, solved),
        )

    return jax.lax.cond(is_log.any(), in_log_form, lambda: solved)


def _log_form(cost: jax.Array, epsilon: Any, threshold: Any, max_iterations: int) -> Potentials:
    """One problem by ott-jax.

    Row and column minima are taken out before the solve and put back into the potentials after: the
    potentials of what remains are a few epsilon, not a few cost units, and their rounding no longer
    keeps the marginal error above 1e-6.
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
        is_log=jnp.ones((), bool),
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
