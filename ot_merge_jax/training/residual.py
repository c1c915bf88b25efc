r"""The frozen residual: what a merge added to a target, held constant while the target trains.

.. math:: W = W_{base} + s\, R

``R`` is what the merge added, including mask and rule (for ``interpolate`` it is ``mask * (W~ -
W_target)``, fixed at the start); ``s`` is a factor, 1 for the unchanged merge. Without weight decay
this is exactly training the folded weights; the two parts stay separate so that the residual can be
rescaled, removed or audited later. Pure functions of pytrees. Imports merging.fuse, models.specs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ot_merge_jax.errors import InputError
from ot_merge_jax.merging import fuse
from ot_merge_jax.models import specs
from ot_merge_jax.models.sites import GROUPS, weight_of
from ot_merge_jax.types import Params

#: Path of a parameter -> what was added to it.
Leaves = Mapping[str, jax.Array]
#: The factors of the unchanged merge.
AS_MERGED: dict[str, float] = dict.fromkeys(GROUPS, 1.0)


def between(merged: Params, target: Params) -> dict[str, jax.Array]:
    """What a merge added to its target.

    The difference of the two folders is taken in float32, so that target plus residual is the
    merge, to the last bit of float32. What the merge lost when it was rounded to the dtype of its
    files (2^-9 of a weight in bfloat16) is lost here too.

    Args:
        merged: Parameters of the merge.
        target: Parameters of its target.

    Returns:
        Path -> difference in float32, for the leaves that differ.

    Raises:
        InputError: if a parameter differs that merges never change.

    Example:
        >>> merged, target = ({"lm_head": {"kernel": jnp.full((1, 1), x)}} for x in (3.0, 1.0))
        >>> between(merged, target)["lm_head/kernel"].tolist()
        [[2.0]]
    """
    added = {}
    for path, leaf in _leaves(merged):
        before = jnp.asarray(specs.get(target, path), jnp.float32)
        change = jnp.asarray(leaf, jnp.float32) - before
        if not np.any(np.asarray(change)):
            continue
        if weight_of(path) is None:
            raise InputError(
                f"{path} of the merge differs from its target, and no merge moves it; give the "
                "target it was made from with --target."
            )
        added[path] = change
    return added


def fold(base: Params, residual: Leaves, strength: Any) -> Params:
    """The plain parameters: base plus strength times residual.

    Args:
        base: What trains.
        residual: From `between`; a constant, its gradient is exactly 0.
        strength: A number, or a number for each group (``projections``, ``vocabulary``); each may
            also be an array of numbers for each layer ``[L]``. A constant too.

    Returns:
        New parameters in the dtype of the base; leaves without a residual are the base's own.

    Example:
        >>> base, added = {"lm_head": {"kernel": jnp.ones((1, 1))}}, jnp.ones((1, 1))
        >>> fold(base, {"lm_head/kernel": added}, 0.5)["lm_head"]["kernel"].tolist()
        [[1.5]]

    Source: Transport and Merge, section 4.3. Differs: the factor may change later.
    """
    folded = jax.tree.map(lambda leaf: leaf, base)
    for path, added in residual.items():
        parents, _, last = path.rpartition("/")
        parent = specs.get(folded, parents)
        change = jax.lax.stop_gradient(_factor(strength, path, added) * added)
        parent[last] = parent[last] + change.astype(parent[last].dtype)
    return folded


def unfold(folded: Params, residual: Leaves, strength: Any) -> Params:
    """The base of plain parameters: `fold` of it gives them back, up to one rounding.

    Example:
        >>> folded, added = {"lm_head": {"kernel": jnp.ones((1, 1))}}, jnp.ones((1, 1))
        >>> unfold(folded, {"lm_head/kernel": added}, 0.5)["lm_head"]["kernel"].tolist()
        [[0.5]]
    """
    return fold(folded, {path: -added for path, added in residual.items()}, strength)


def rescale(folded: Params, residual: Leaves, strength: Any, new: Any) -> Params:
    """Plain parameters with another strength of the residual; 0 removes it.

    Args:
        folded: Parameters that contain the residual, times ``strength``.
        residual: From `between`.
        strength: The present strength.
        new: The new strength.

    Returns:
        New parameters.

    Example:
        >>> residual = {"lm_head/kernel": jnp.ones((1, 1))}
        >>> folded = {"lm_head": {"kernel": jnp.ones((1, 1))}}
        >>> rescale(folded, residual, 0.5, 0.25)["lm_head"]["kernel"].tolist()
        [[0.75]]
    """
    return fold(unfold(folded, residual, strength), residual, new)


def _factor(strength: Any, path: str, added: jax.Array) -> jax.Array:
    """The strength of one leaf, shaped to multiply it."""
    name = weight_of(path)
    if name is None:
        raise ValueError(f"{path} is not a weight that a merge moves.")
    return fuse.scaled(fuse.strength_of(strength, name), added)


def _leaves(params: Params) -> list[tuple[str, jax.Array]]:
    """(path, leaf) of nested parameters."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return [("/".join(key.key for key in keys), leaf) for keys, leaf in flat]
