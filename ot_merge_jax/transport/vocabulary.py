"""The vocabulary map: tokens are neurons whose correspondence is known (SPEC 5.1)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ot_merge_jax.types import VocabularyMatch

#: A token is its string, or the bytes it spells where two tokenizers mark them differently.
Tokens = Mapping[str, int] | Mapping[bytes, int] | Sequence[str]


def match(target_tokens: Tokens, source_tokens: Tokens) -> VocabularyMatch:
    """Pairs the rows of two vocabularies whose tokens are equal.

    Args:
        target_tokens: Token -> row, or the tokens in row order. Leave special tokens out.
        source_tokens: The same of the source.

    Returns:
        Matched rows, ascending in the target's.

    Raises:
        ValueError: if no token is shared.

    Example:
        >>> match(["a", "b", "c"], {"c": 0, "a": 7}).source_ids.tolist()
        [7, 0]
    """

    def rows(tokens: Tokens) -> dict[Any, int]:
        if isinstance(tokens, Mapping):
            return dict(tokens)
        return {token: row for row, token in enumerate(tokens)}

    source_rows = rows(source_tokens)
    pairs = sorted(
        (row, source_rows[token])
        for token, row in rows(target_tokens).items()
        if token in source_rows
    )
    if not pairs:
        raise ValueError("The two vocabularies share no token.")
    target_ids, source_ids = np.asarray(pairs, np.int32).T
    return VocabularyMatch(jnp.asarray(target_ids), jnp.asarray(source_ids))


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
    # the cross products, the norm of the rows that are turned, and the rows that move; the turn
    across = 3 * matched * target_width * source_width
    turn = source_width * target_width * min(source_width, target_width)
    return 2 * (across + turn)
