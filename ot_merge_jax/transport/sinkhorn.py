"""Entropic optimal transport with uniform marginals: cost -> `Potentials`.

Potentials are kept, plans are rebuilt: ``plan(cost, potentials)``. Problems are solved in scaling
form by `transport.scaling`; where the cost spans more than `MAX_COST_OVER_EPSILON` epsilons they
are solved in the log domain by ott-jax. Which one it was is recorded in the potentials.

A list of problems is solved a few at a time, and so is one that ``vmap`` makes: its lanes become
further problems of the list (`transport.batches`), because lanes of one ``while_loop`` wait for the
slowest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jaxtyping import Array, Float

from ot_merge_jax.transport import batches, implicit, log_domain, scaling
from ot_merge_jax.types import Potentials, Solver

T = TypeVar("T")
#: Epsilons that a cost may span in scaling form. Beyond, the scalings leave float32 within a few
#: iterations, and building the kernel again each time costs what the log domain does.
MAX_COST_OVER_EPSILON = 1000.0
#: Entries of the cost matrices that are solved side by side where the cache is the limit (CPU).
_ENTRIES_IN_CACHE = 1 << 18
#: The share of a device's own memory that costs, reduced costs and kernels may take.
_SHARE = 1 / 8
#: Potentials, and which problems span too many epsilons for the scaling form.
_Solved = tuple[Potentials, jax.Array]


def pairs_at_once(n: int, m: int) -> int:
    """How many ``[n, m]`` problems to solve side by side, from the first device's own memory.

    Example:
        >>> pairs_at_once(128, 192) >= pairs_at_once(2048, 4096) >= 1
        True
    """
    own = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    entries = _ENTRIES_IN_CACHE if own is None else int(_SHARE * own) // 12
    return max(1, min(64, entries // (n * m)))


def solve(
    cost: Float[Array, "n m"] | Float[Array, "batch n m"],
    *,
    epsilon: Any,
    max_iterations: int = 2000,
    threshold: Any = 1e-6,
    solver: Solver = "auto",
    pairs_at_once: int | None = None,
) -> Potentials:
    r"""Solves one entropic transport problem with uniform marginals, or a batch of them.

    .. math:: \min_Q \langle C, Q\rangle - \epsilon H(Q), \quad Q 1 = 1/n,\; Q^\top 1 = 1/m

    It works under ``jit`` and ``vmap`` (over cost, epsilon, threshold or several at once): each
    lane spends the iterations that it spends alone. ``jax.grad`` of ``cost``, ``f``, ``g`` and of
    `plan` goes through the fixed point (`transport.implicit`), with respect to cost and epsilon;
    forward mode does not.

    Args:
        cost: ``[n, m]`` or ``[batch, n, m]``, target by source.
        epsilon: Positive, in cost units; a number, or ``[batch]``.
        max_iterations: Sinkhorn iterations at most; static.
        threshold: L1 marginal error at which to stop; a number, or ``[batch]``.
        solver: ``scaling``: in scaling form; a cost that spans more than `MAX_COST_OVER_EPSILON`
            epsilons is not attempted and comes back with ``converged`` False. ``ott``: all by
            ott-jax in the log domain. ``auto``: ``scaling``, and what it does not attempt by
            ott-jax; inside a trace, where nothing can be decided, ``auto`` is ``scaling``. Static.
        pairs_at_once: Problems that are solved side by side at most; None: `pairs_at_once`. Static.

    Returns:
        Potentials with the batch axis leading, if there is one. ``converged`` must be looked at:
        failure to converge, and a cost that is not finite, are data and not exceptions. A problem
        that has not converged has no meaningful gradient either.

    Raises:
        ValueError: if ``epsilon`` is not positive and finite, ``max_iterations`` or
            ``pairs_at_once`` is below 1, ``cost`` has not two or three axes, or ``solver`` is
            unknown.

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
    check_budgets(pairs_at_once=pairs_at_once)
    return by_solver(
        solver,
        lambda chosen: _solve(
            cost, epsilon, threshold,
            max_iterations=max_iterations, solver=chosen, size=pairs_at_once,
        ),
    )  # fmt: skip


def by_solver(solver: Solver, attempt: Callable[[Solver], tuple[T, jax.Array]]) -> T:
    """Solves in scaling form, again if a problem needs the log domain; or as ``solver`` says.

    The log domain is seldom needed and takes as long to compile as everything else, so it is
    compiled when it is. Under a trace nothing is known yet, and there is only the scaling form: a
    condition would make ``vmap`` run both forms for every lane.

    Args:
        solver: As for `solve`.
        attempt: Solves problems by `solve_batch`'s ``solver``; returns the result and which
            problems span too many epsilons for the scaling form.

    Returns:
        The result.

    Raises:
        ValueError: if ``solver`` is unknown.
    """
    if solver not in get_args(Solver):
        raise ValueError(f"solver is {', '.join(map(repr, get_args(Solver)))}, not {solver!r}.")
    result, is_too_wide = attempt("scaling" if solver == "auto" else solver)
    if solver != "auto" or isinstance(is_too_wide, core.Tracer):
        return result
    return attempt("auto")[0] if np.asarray(is_too_wide).any() else result


def check_epsilon(epsilon: Any) -> None:
    """ValueError unless every epsilon is positive and finite; a traced one cannot be checked."""
    if not isinstance(epsilon, core.Tracer):
        values = np.asarray(epsilon)
        if not (np.isfinite(values) & (values > 0)).all():
            raise ValueError(f"epsilon must be positive and finite, not {epsilon}.")


def check_budgets(**budgets: int | None) -> None:
    """ValueError if one of these, named by its keyword, is below 1; None is no budget."""
    for name, value in budgets.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}.")


@functools.partial(jax.jit, static_argnames=("max_iterations", "solver", "size"))
def _solve(
    cost: jax.Array,
    epsilon: Any,
    threshold: Any,
    *,
    max_iterations: int,
    solver: Solver,
    size: int | None,
) -> _Solved:
    """`solve` without checks, one compilation for each shape."""
    solved = solve_batch(
        cost[None] if cost.ndim == 2 else cost, epsilon, threshold,
        max_iterations=max_iterations, solver=solver, size=size,
    )  # fmt: skip
    return jax.tree.map(lambda leaf: leaf[0], solved) if cost.ndim == 2 else solved


def solve_batch(
    cost: Float[Array, "b n m"],
    epsilon: Any,
    threshold: Any,
    *,
    max_iterations: int,
    solver: Solver,
    size: int | None = None,
) -> _Solved:
    """`solve` for a batch inside a program, where nothing is checked or decided.

    Args:
        cost: Target by source.
        epsilon: A number, or one for each problem.
        threshold: L1 marginal error at which to stop; likewise.
        max_iterations: At most.
        solver: As for `solve`, but ``auto`` compiles the log domain into the program, for the
            problems that need it.
        size: Problems side by side at most; None: `pairs_at_once`.

    Returns:
        Potentials, the batch axis leading, and which problems span more than
        `MAX_COST_OVER_EPSILON` epsilons.
    """
    each = cost.shape[:1]
    return _differentiable(
        cost.astype(jnp.float32),
        jnp.broadcast_to(jnp.asarray(epsilon, jnp.float32), each),
        jnp.broadcast_to(jnp.asarray(threshold, jnp.float32), each),
        max_iterations,
        solver,
        size or pairs_at_once(*cost.shape[1:]),
    )


# custom_vjp is outermost: custom_vmap has no reverse mode of its own
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _differentiable(
    cost: jax.Array,
    epsilon: jax.Array,
    threshold: jax.Array,
    max_iterations: int,
    solver: Solver,
    size: int,
) -> _Solved:
    """`solve_batch` with its gradient."""
    return _listed(max_iterations, solver, size)(cost, None, epsilon, threshold)


def _forward(
    cost: jax.Array, epsilon: jax.Array, threshold: jax.Array, *static: Any
) -> tuple[_Solved, tuple[jax.Array, Potentials]]:
    solved: Any = _differentiable(cost, epsilon, threshold, *static)
    return solved, (cost, solved[0])


def _backward(
    max_iterations: int, solver: Solver, size: int, saved: Any, cotangents: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    del max_iterations, solver, size
    # one after the other, so that there is one plan and one linear system at a time
    cost, epsilon = jax.lax.map(
        lambda problem: implicit.pullback(*problem),
        (*saved, cotangents[0].f, cotangents[0].g, cotangents[0].cost, cotangents[0].epsilon),
    )
    return cost, epsilon, jnp.zeros_like(epsilon)


_differentiable.defvjp(_forward, _backward)


@functools.cache
def _listed(max_iterations: int, solver: Solver, size: int) -> Callable[..., _Solved]:
    """The solver of a list of problems; made once, so that all callers get the same one."""
    return batches.listed(
        functools.partial(_at_once, max_iterations=max_iterations, solver=solver), size
    )


def _at_once(
    cost: jax.Array,
    epsilon: jax.Array,
    threshold: jax.Array,
    *,
    max_iterations: int,
    solver: Solver,
) -> _Solved:
    """`solve_batch` for problems that are all in memory at once."""
    # row by row, because the solver needs the minima of the rows too
    is_too_wide = cost.max((1, 2)) - cost.min(2).min(1) > MAX_COST_OVER_EPSILON * epsilon

    def in_log_domain(problem: tuple[jax.Array, ...]) -> Potentials:
        return log_domain.solve(*problem, max_iterations=max_iterations)

    if solver == "ott":
        return jax.lax.map(in_log_domain, (cost, epsilon, threshold)), is_too_wide
    # a problem for the log domain counts as solved here, so that nobody waits for it
    solved = scaling.solve(
        cost, epsilon, jnp.where(is_too_wide, jnp.inf, threshold), max_iterations=max_iterations
    )
    solved = solved._replace(converged=solved.converged & ~is_too_wide)
    if solver == "scaling":
        return solved, is_too_wide
    return jax.lax.map(
        lambda problem: jax.lax.cond(
            problem[3], lambda: in_log_domain(problem[:3]), lambda: problem[4]
        ),
        (cost, epsilon, threshold, is_too_wide, solved),
    ), is_too_wide


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
