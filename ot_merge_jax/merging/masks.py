"""Which neurons move: the masks of the weights."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from ot_merge_jax.models.sites import PROJECTIONS
from ot_merge_jax.transport import cost
from ot_merge_jax.types import Activations, MergeSpec


def largest(values: Float[Any, "layers t d"], k: int) -> Int[np.ndarray, "layers k"]:
    """The ``k`` neurons of each layer with the largest mean absolute activation, in order of index.

    Args:
        values: Target activations of one site, on the host; read one layer at a time.
        k: How many neurons are kept; among equals the first ones.

    Returns:
        ``[layers, k]``; all of them if ``k`` is more than there are.

    Example:
        >>> largest(np.array([[[1.0, -3.0, 2.0]]]), 2).tolist()
        [[1, 2]]

    Source: Transport and Merge, A.5. Differs: nothing.
    """
    strengths = (np.abs(np.asarray(layer)).mean(0, dtype=np.float64) for layer in values)
    return np.stack([np.sort(np.argsort(-means, kind="stable")[:k]) for means in strengths])


def selected(target: Activations, *, spec: MergeSpec) -> dict[str, Int[np.ndarray, "L k"]]:
    """Site -> neurons that the top-k mask of some weight keeps there; empty without a mask.

    Args:
        target: Target activations.
        spec: ``weights`` and ``k`` are used.

    Returns:
        For each masked site ``[L, k]``.
    """
    if spec.k is None:
        return {}
    sites = {PROJECTIONS[name].masked_site for name in spec.weights if name in PROJECTIONS}
    return {site: largest(target.values[site], spec.k) for site in sorted(sites)}


def masks(target: Activations | None, *, spec: MergeSpec) -> dict[str, jax.Array]:
    """The masks of all projections that move, by parameter path, broadcastable to their leaves.

    Rows of q, k, v, gate and up are masked by their output site; columns of o and down by their
    INPUT site. A bias follows the rows of its weight; the biases of o and down move with ``k`` None
    only. A layer whose activations never change at a site of the weight says nothing about
    its neurons, so nothing moves there.

    Args:
        target: Target activations; None if no projection moves.
        spec: ``weights`` and ``k`` are used.

    Returns:
        Path -> ``[L, 1, d]`` or ``[L, d, 1]`` for kernels, ``[L, d]`` for biases.
    """
    by_path = {}
    top = {} if target is None else selected(target, spec=spec)
    for name in spec.weights:
        if name not in PROJECTIONS or target is None:
            continue
        wiring = PROJECTIONS[name]
        varies = [
            cost.is_nonconstant(target.values[site]) for site in (wiring.in_site, wiring.out_site)
        ]
        layers, _, width = target.values[wiring.masked_site].shape
        chosen = np.full((layers, width), float(spec.k is None), np.float32)
        if spec.k is not None:
            np.put_along_axis(chosen, top[wiring.masked_site], 1.0, axis=1)
        chosen[~(varies[0] & varies[1])] = 0
        is_row_mask = wiring.masked == "out"
        by_path[f"{wiring.path}/kernel"] = chosen[:, None, :] if is_row_mask else chosen[:, :, None]
        bias = chosen if is_row_mask else chosen.max(1, keepdims=True) * float(spec.k is None)
        by_path[f"{wiring.path}/bias"] = bias
    return jax.device_put(by_path)
