"""Which neurons move, and how far: masks and the three fusion rules."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ot_merge_jax.errors import RecipeError
from ot_merge_jax.models import specs
from ot_merge_jax.models.sites import group_of, weight_of
from ot_merge_jax.types import MergeSpec, Params

Leaves = Mapping[str, jax.Array]


def strength_of(strength: Any, weight: str) -> Any:
    """The strength that applies to a weight: the one for all, or that of its group.

    Raises:
        RecipeError: if a mapping has no strength for the weight's group.
    """
    if not isinstance(strength, Mapping):
        return strength
    group = group_of(weight)
    if group not in strength:
        raise RecipeError(f"There is no strength for {group} ({weight}); give one for each group.")
    return strength[group]


def is_moving(strength: Any) -> bool:
    """Whether a strength (a number, or a mapping from group to number) is anything but 0.

    Example:
        >>> is_moving(0.0), is_moving({"projections": 0.0, "vocabulary": 0.2})
        (False, True)
    """
    values = strength.values() if isinstance(strength, Mapping) else [strength]
    return any(bool(np.any(np.asarray(value))) for value in values)


def fuse(
    target_params: Params, transported: Leaves, strength: Any, *, spec: MergeSpec, mask: Leaves
) -> Params:
    r"""Moves the target's weights towards, or by, the transported ones.

    .. math:: W \leftarrow W + \alpha\, M \odot (\tilde W - W) \quad\text{(interpolate)}, \qquad
        W \leftarrow W + \alpha\, M \odot \tilde W \quad\text{(residual, delta)}

    Args:
        target_params: Parameters of the target.
        transported: Path -> transported weight, of the shape of the target's leaf.
        strength: alpha or lambda: a number, one for each layer ``[L]``, or a mapping from group
            (``projections``, ``vocabulary``) to either. Traced: it sweeps under ``vmap``.
        spec: ``rule`` is used.
        mask: Path -> mask, broadcastable to the leaf; a path without a mask moves whole.

    Returns:
        New parameters in the dtypes of the target's, rounded once; leaves that do not move are the
        target's own buffers. Strength 0 returns the target bit for bit.

    Raises:
        ValueError: if a transported weight does not have the shape of its leaf.

    Example:
        >>> params = {"embed_tokens": {"embedding": jnp.ones((2, 2))}}
        >>> moved = {"embed_tokens/embedding": jnp.full((2, 2), 4.0)}
        >>> rows = {"embed_tokens/embedding": jnp.array([[1.0], [0.0]])}
        >>> fused = fuse(params, moved, 0.5, spec=MergeSpec(rule="delta"), mask=rows)
        >>> fused["embed_tokens"]["embedding"].tolist()
        [[3.0, 3.0], [1.0, 1.0]]

    Source: Transport and Merge, eq. 14-18 and 22. Differs: ``delta`` is ours.
    """
    fused = jax.tree.map(lambda leaf: leaf, target_params)  # new dicts, same buffers
    for path, moved in transported.items():
        parents, _, last = path.rpartition("/")
        parent, name = specs.get(fused, parents), weight_of(path)
        if name is None or moved.shape != parent[last].shape:
            raise ValueError(
                f"{path} is {parent[last].shape}, but {moved.shape} was transported into it."
            )
        parent[last] = _fuse_leaf(
            parent[last], moved, strength_of(strength, name), mask.get(path), rule=spec.rule
        )
    return fused


def update(weight: jax.Array, moved: jax.Array, mask: jax.Array | None, *, rule: str) -> jax.Array:
    """What strength 1 would add to a weight, float32."""
    step = moved - weight.astype(jnp.float32) if rule == "interpolate" else moved
    return step if mask is None else mask * step


def scaled(strength: Any, moved: jax.Array) -> jax.Array:
    """A strength (a number, or one for each layer) shaped to multiply a leaf.

    Raises:
        ValueError: if it is neither.
    """
    strength = jnp.asarray(strength, jnp.float32)
    if strength.ndim > 1 or (strength.ndim == 1 and len(strength) != len(moved)):
        raise ValueError(f"A strength of shape {strength.shape} does not fit {moved.shape}.")
    return strength.reshape(strength.shape + (1,) * (moved.ndim - strength.ndim))


@functools.partial(jax.jit, static_argnames="rule")
def _fuse_leaf(
    weight: jax.Array, moved: jax.Array, strength: Any, mask: jax.Array | None, *, rule: str
) -> jax.Array:
    """One leaf, accumulated in float32 and rounded once."""
    change = scaled(strength, moved) * update(weight, moved, mask, rule=rule)
    summed = (weight.astype(jnp.float32) + change).astype(weight.dtype)
    return jnp.where(change == 0, weight, summed)  # adding 0 would turn -0.0 into 0.0
