"""Logical axes to mesh axes; without a mesh, everything is on one device. Imports JAX only.

Models and stages name what an axis means; this table alone says where it lives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ot_merge_jax.errors import RecipeError
from ot_merge_jax.types import Batch

#: Logical axis -> mesh axis. Axes not named here are replicated.
RULES: Mapping[str, str] = {
    "batch": "data",
    "vocab": "model",
    "heads": "model",
    "kv_heads": "model",
    "mlp": "model",
}


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """A mesh of named axes.

    Args:
        sizes: Devices along each axis, e.g. ``{"data": 2, "model": 4}``; their product must not
            exceed the devices.

    Returns:
        The mesh. Its axes are Auto: ott-jax fails on explicit ones.

    Raises:
        RecipeError: if an axis is unknown or there are too few devices.
    """
    known = set(RULES.values())
    if unknown := sorted(set(sizes) - known):
        raise RecipeError(
            f"Unknown mesh axis {unknown[0]!r}; known are {', '.join(sorted(known))}."
        )
    try:
        if min(sizes.values(), default=0) < 1:
            raise ValueError("an axis without devices")
        return jax.make_mesh(
            tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
        )
    except ValueError as error:
        raise RecipeError(
            f"A mesh {dict(sizes)} does not fit the {jax.device_count()} device(s) here."
        ) from error


def mesh_of(params: Any) -> Mesh | None:
    """The mesh that parameters live on; None if they are on one device.

    Example:
        >>> mesh_of({"scale": jax.numpy.ones(2)}) is None
        True
    """
    for leaf in jax.tree.leaves(params):
        if isinstance(place := getattr(leaf, "sharding", None), NamedSharding):
            return place.mesh if isinstance(place.mesh, Mesh) else None
    return None


def split_batch(batch: Batch, mesh: Mesh | None) -> Batch:
    """A batch split along the mesh's ``data`` axis; unchanged without a mesh."""
    if mesh is None:
        return batch
    return jax.tree.map(
        lambda x: jax.device_put(x, leaf_sharding(mesh, ("batch", None), x.shape)), batch
    )


def leaf_sharding(
    mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]
) -> NamedSharding:
    """Where a leaf lives: split along its logical axes, replicated where the mesh does not fit.

    Args:
        mesh: The mesh.
        axes: Logical axis (or None) of each dimension.
        shape: Shape of the leaf.

    Returns:
        Its sharding.

    Example:
        >>> mesh = make_mesh({"model": 1})
        >>> tuple(leaf_sharding(mesh, ("layers", None, "mlp"), (2, 8, 16)).spec)
        (None, None, 'model')
    """
    places = []
    for axis, size in zip(axes, shape, strict=True):
        place = RULES.get(axis or "")
        fits = place is not None and place in mesh.shape and size % mesh.shape[place] == 0
        places.append(place if fits else None)
    return NamedSharding(mesh, PartitionSpec(*places))
