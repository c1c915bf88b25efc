"""Anderson acceleration of Sinkhorn's column scalings, a batch of problems at once. JAX only.

Near the solution the logarithm ``x`` of the column scalings moves by nearly a linear map of itself,
and the residual ``r``, the move that the textbook's update would make, falls with it. Each step is
the one that would have led to where a combination of the last residuals is smallest. At epsilon
0.1, 0.05 and 0.02 that takes 8, 16 and 48 iterations instead of the textbook's 12, 34 and over 150
(activations of the demo's models widened to 2048 and 4096 neurons).

Far from the solution it needs two guards. Where two groups of neurons are nearly separate, mass
crawls from one group to the other at the same pace for hundreds of iterations: there the
differences of residuals are mere rounding, so the step is doubled instead. And where an error
grows, the differences so far are dropped.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

#: Differences between iterations that a step combines.
_WINDOW = 5
#: A step may change a scaling by a factor of exp(+-this) beyond the textbook's.
_LONGEST = 5.0
#: An error that grows by this factor in one iteration makes its problem forget the differences.
_WORSE = 2.0
#: The error, a share of the mass, above which a residual may crawl.
_FAR = 3e-4
#: A residual crawls if it fell by less than this share of the move.
_CRAWLS = 1e-3
#: Added to the diagonal of the differences' correlations; it must exceed their rounding.
_RIDGE = 1e-5


class History(NamedTuple):
    """The last few iterations of a batch; the newest difference overwrites the oldest.

    Attributes:
        moved: The last change of ``x``.
        residual: The last residual.
        residuals: Differences of neighbouring residuals.
        targets: Differences of where the textbook's steps would have led, ``x + r``.
        is_known: Which differences there are.
        stretch: The factor of a step where the residual crawls.
        count: Iterations so far.
    """

    moved: Float[Array, "b m"]
    residual: Float[Array, "b m"]
    residuals: Float[Array, "window b m"]
    targets: Float[Array, "window b m"]
    is_known: Bool[Array, "window b"]
    stretch: Float[Array, " b"]
    count: jax.Array


def start(b: int, m: int, independent: int) -> History:
    """The history before the first iteration.

    Args:
        b: Problems.
        m: Columns.
        independent: How many differences of a problem can be independent; no more are kept.
    """
    window = max(1, min(_WINDOW, independent))
    return History(
        *jnp.zeros((2, b, m)),
        *jnp.zeros((2, window, b, m)),
        is_known=jnp.zeros((window, b), bool),
        stretch=jnp.ones((b,)),
        count=jnp.zeros((), jnp.int32),
    )


def step(
    columns: Float[Array, "b m"],
    history: History,
    *,
    error: Float[Array, " b"],
    before: Float[Array, " b"],
) -> tuple[Float[Array, "b m"], History]:
    r"""The next change of ``x``, from the columns' marginals that the present one gives.

    With the residual :math:`r = \log(1/m) - \log(\text{columns})` the change is

    .. math:: r - \sum_k \gamma_k (\Delta x_k + \Delta r_k), \qquad
        \gamma = \arg\min \lVert r - \textstyle\sum_k \gamma_k \Delta r_k \rVert

    less its mean, because a factor common to all column scalings changes no plan.

    Args:
        columns: Column marginals after an exact update of the rows.
        history: The history of the iterations before.
        error: The marginal error of ``columns``.
        before: The error an iteration ago.

    Returns:
        The change, and the history with it.

    Example:
        >>> columns, error = jnp.array([[0.8, 0.2]]), jnp.array([0.6])
        >>> moved, history = step(columns, start(1, 2, 1), error=error, before=error)
        >>> jnp.exp(moved).round(3).tolist()
        [[0.5, 2.0]]

    Source: Anderson 1965; Walker and Ni 2011, eq. 2.2. Differs: columns count by their mass, the
    norm in which Sinkhorn's linearisation is symmetric; a longest step; the two guards above.
    """
    residual = jnp.log(1 / columns.shape[1] / columns)
    newest = residual - history.residual
    has_moved = history.count > 0
    fall, length = -(history.moved * newest).sum(1), (history.moved**2).sum(1)
    crawls = has_moved & (error > _FAR) & (fall <= _CRAWLS * length)
    slot = history.count % len(history.is_known)
    history = History(
        moved=history.moved,
        residual=residual,
        residuals=history.residuals.at[slot].set(newest),
        targets=history.targets.at[slot].set(history.moved + newest),
        is_known=history.is_known.at[slot].set(has_moved & ~crawls) & (error <= _WORSE * before),
        stretch=jnp.where(crawls, 2 * history.stretch, 1.0),
        count=history.count + 1,
    )
    combined = _combined(history, columns)
    is_short = jnp.abs(combined - residual).max(1) < _LONGEST  # and not NaN
    at_most = jnp.maximum(1.0, _LONGEST / jnp.abs(residual).max(1))
    stretched = residual * jnp.minimum(history.stretch, at_most)[:, None]
    moved = jnp.where((is_short & ~crawls)[:, None], combined, stretched)
    moved = moved - moved.mean(1, keepdims=True)
    return moved, history._replace(moved=moved)


def _combined(history: History, mass: jax.Array) -> jax.Array:
    """The least-squares step ``[b, m]`` from the known differences; columns count by mass."""
    is_known, root = history.is_known[..., None], jnp.sqrt(mass)
    residuals = jnp.where(is_known, history.residuals * root, 0.0)
    norm = jnp.sqrt((residuals**2).sum(-1))
    norm = jnp.where(norm > 0, norm, 1.0)
    # scaled to length 1: their products are correlations, which do not shrink with the error; an
    # unknown difference stays 0
    units = residuals / norm[..., None]
    with jax.default_matmul_precision("highest"):
        gram = jnp.einsum("wbm,xbm->bwx", units, units)
        right = jnp.einsum("wbm,bm->bw", units, history.residual * root)
        gram = jnp.where(jnp.eye(len(is_known), dtype=bool), 1 + _RIDGE, gram)
        lower = jnp.linalg.cholesky(gram, symmetrize_input=False)
        share = jax.scipy.linalg.cho_solve((lower, True), right[..., None])[..., 0].T / norm
        targets = jnp.where(is_known, history.targets, 0.0)
        return history.residual - jnp.einsum("wb,wbm->bm", share, targets)
