"""The vocabulary map: tokens are neurons whose correspondence is known."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ot_merge_jax.types import VocabularyMatch


@jax.jit
def rows_of(table: Float[Array, "v d"], ids: Int[Array, " k"]) -> Float[Array, "k d"]:
    """Some rows of a table."""
    return table[ids]


@functools.partial(jax.jit, static_argnames="size")
def moved_rows(
    rows: Float[Array, "v_s d_s"],
    rotation: Float[Array, "d_s d_t"],
    matched: VocabularyMatch,
    *,
    size: int,
) -> tuple[Float[Array, "v_t d_t"], Float[Array, "v_t 1"]]:
    """Carries matched rows of a source table (or of its delta) into a table of the target's size.

    Args:
        rows: Source table; for ``delta`` the source minus its base.
        rotation: From `procrustes`.
        matched: Which rows correspond.
        size: Rows of the target's table.

    Returns:
        The table, zero where nothing matches, and the mask of matched rows (1 or 0), both float32.
    """
    carried = jnp.matmul(
        rows[matched.source_ids].astype(jnp.float32), rotation, precision=jax.lax.Precision.HIGHEST
    )
    table = jnp.zeros((size, rotation.shape[1])).at[matched.target_ids].set(carried)
    return table, jnp.zeros((size, 1)).at[matched.target_ids].set(1.0)


def flops(matched: int, *, target_width: int, source_width: int) -> int:
    """FLOPs of `procrustes` and `moved_rows` of one table with so many matched rows."""
    # the cross products, the norm of the rotated rows and the rows that move; then the rotation
    across = 3 * matched * target_width * source_width
    turn = source_width * target_width * min(source_width, target_width)
    return 2 * (across + turn)
