r"""Gradients through entropic transport's fixed point: one linear solve instead of all iterations.

At the solution :math:`Q_{ij} = e^{L_{ij} / \epsilon}` with :math:`L = f_i + g_j - C_{ij}` has its
marginals, whatever the cost and epsilon. Differentiated, that is a linear system for the change of
the potentials; its matrix is symmetric, so the same system pulls cotangents back.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ot_merge_jax.types import Potentials


def pullback(
    cost: Float[Array, "n m"],
    potentials: Potentials,
    f: Float[Array, " n"],
    g: Float[Array, " m"],
    transported: Float[Array, ""],
    epsilon: Float[Array, ""],
) -> tuple[Float[Array, "n m"], Float[Array, ""]]:
    r"""Cotangents of cost and epsilon, from those of one problem's solution.

    With :math:`\bar f' = \bar f + \bar t\,(Q \odot C) 1 / \epsilon`, likewise :math:`\bar g'` with
    columns, and

    .. math:: \begin{pmatrix} \mathrm{diag}(Q 1) & Q \\ Q^\top & \mathrm{diag}(Q^\top 1)
        \end{pmatrix} \begin{pmatrix} x \\ y \end{pmatrix} =
        \begin{pmatrix} \bar f' \\ \bar g' \end{pmatrix}

    they are, with :math:`S_{ij} = x_i + y_j`,

    .. math:: \bar C = \bar t\,(Q - Q \odot C / \epsilon) + Q \odot S, \qquad
        \bar\epsilon + \sum (Q \odot S \odot L) / \epsilon
        - \bar t \sum (Q \odot C \odot L) / \epsilon^2

    The potentials are determined up to a constant that goes from ``f`` to ``g``. Derivatives are
    those of potentials for which the sum of ``f`` less that of ``g`` does not change.

    Args:
        cost: Target by source.
        potentials: Its solution. If it has not converged, the result is computed from the
            plan as it is, and is not a derivative of anything.
        f: Cotangent of ``potentials.f``.
        g: Cotangent of ``potentials.g``.
        transported: Cotangent of ``potentials.cost``.
        epsilon: Cotangent of ``potentials.epsilon``.

    Returns:
        Cotangents of the cost and of epsilon. If all that come in are 0, so are these, even where
        a problem has failed: a ``where`` over ``converged`` keeps such a problem out of a gradient.

    Example:
        >>> from ot_merge_jax.transport import sinkhorn
        >>> cost = jnp.array([[0.0, 1.0], [1.0, 0.0]])
        >>> zero = (jnp.zeros(2), jnp.zeros(2))
        >>> potentials = sinkhorn.solve(cost, epsilon=0.1)
        >>> of_cost, _ = pullback(cost, potentials, *zero, jnp.array(1.0), jnp.array(0.0))
        >>> of_cost.diagonal().round(2).tolist()  # the plan's
        [0.5, 0.5]

    Source: Cuturi et al. 2022 (arXiv 2202.00666), implicit differentiation in ott-jax. Differs:
    the smaller Schur complement is built and solved directly; the marginals are those of ``Q``.
    """
    eps = potentials.epsilon
    exponent = potentials.f[:, None] + potentials.g - cost
    plan = jnp.exp(exponent / eps)
    weighted = plan * cost
    right_f = f + transported * weighted.sum(1) / eps
    right_g = g + transported * weighted.sum(0) / eps
    x, y = _solve(plan, right_f, right_g)
    spread = plan * (x[:, None] + y)
    of_cost = transported * (plan - weighted / eps) + spread
    of_epsilon = (spread * exponent).sum() / eps
    of_epsilon = of_epsilon - transported * (weighted * exponent).sum() / eps**2
    has_cotangent = (f != 0).any() | (g != 0).any() | (transported != 0)
    return (
        jnp.where(has_cotangent, of_cost, 0.0),
        epsilon + jnp.where(has_cotangent, of_epsilon, 0.0),
    )


def _solve(plan: jax.Array, right_f: jax.Array, right_g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``x`` and ``y`` of `pullback`, by the Schur complement of the longer side."""
    n, m = plan.shape
    if n > m:
        y, x = _solve(plan.T, right_g, right_f)
        return x, y
    # the matrix is singular along (1, -1); the right side's part along it is dropped
    gauge = (right_f.sum() - right_g.sum()) / (n + m)
    right_f, right_g = right_f - gauge, right_g + gauge
    row, column = jnp.sqrt(plan.sum(1)), jnp.sqrt(plan.sum(0))
    with jax.default_matmul_precision("highest"):
        # its spectral norm is 1, reached at `unit`: there the complement is 0, and 1 is added
        scaled = plan / row[:, None] / column
        unit = row / jnp.linalg.norm(row)
        right = (right_f - plan @ (right_g / column**2)) / row
        right = right - unit * (unit @ right)
        factors = jax.scipy.linalg.lu_factor(jnp.eye(n) - scaled @ scaled.T + jnp.outer(unit, unit))
        x = jax.scipy.linalg.lu_solve(factors, right)
        # one step of refinement undoes the rounding of the product
        rest = right - (x - scaled @ (x @ scaled) + unit * (unit @ x))
        x = (x + jax.scipy.linalg.lu_solve(factors, rest)) / row
        return x, (right_g - x @ plan) / column**2
