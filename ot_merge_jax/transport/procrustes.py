"""The rotation that carries matched rows of one table onto those of another."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def procrustes(
    source_rows: Float[Array, "v d_s"],
    target_rows: Float[Array, "v d_t"],
    *,
    weights: Float[Array, " v"] | None = None,
) -> Float[Array, "d_s d_t"]:
    r"""The scaled orthogonal map from the source's embedding space to the target's.

    .. math:: R = \frac{\lVert E_t\rVert_F}{\lVert E_s U V^\top\rVert_F}\, U V^\top, \quad
        U \Sigma V^\top = E_s^\top E_t \text{ (thin SVD)}

    Args:
        source_rows: Matched rows of the source (for ``delta``: of the source base).
        target_rows: Matched rows of the target.
        weights: Importance of each row, not negative; None: all equal.

    Returns:
        ``[d_s, d_t]`` float32.

    Raises:
        ValueError: if the row counts differ.

    Example:
        >>> turn = jnp.array([[0.0, -1.0], [1.0, 0.0]])
        >>> rows = jnp.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
        >>> bool(jnp.allclose(procrustes(rows, 3 * rows @ turn), 3 * turn, atol=1e-5))
        True

    Source: Schönemann 1966, orthogonal Procrustes. Differs: one global scale restores the norm.
    """
    if source_rows.shape[0] != target_rows.shape[0]:
        raise ValueError(
            f"Matched rows must correspond, not {source_rows.shape[0]} and {target_rows.shape[0]}."
        )
    return _procrustes(source_rows, target_rows, weights)


@jax.jit
def _procrustes(
    source_rows: jax.Array, target_rows: jax.Array, weights: jax.Array | None
) -> jax.Array:
    """`procrustes` as one program."""
    with jax.default_matmul_precision("highest"):
        left, right = source_rows.astype(jnp.float32), target_rows.astype(jnp.float32)
        if weights is not None:
            root = jnp.sqrt(weights.astype(jnp.float32))[:, None]
            left, right = left * root, right * root
        u, _, vt = jnp.linalg.svd(left.T @ right, full_matrices=False)
        rotation = u @ vt
        mapped = jnp.linalg.norm(left @ rotation)
        return rotation * jnp.linalg.norm(right) / jnp.where(mapped > 0, mapped, 1.0)
