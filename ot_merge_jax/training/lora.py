r"""Low-rank adapters as two extra leaves for each weight, on plain pytrees; folded on export.

.. math:: W = W_0 + \frac{\alpha}{r}\, A B

in our orientation: ``A [d_in, r]``, ``B [r, d_out]``, stacked over layers. Imports models.specs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ot_merge_jax.models import specs
from ot_merge_jax.models.config import ModelConfig
from ot_merge_jax.types import Params

#: Path of a kernel -> its two factors ``{"a", "b"}``.
Factors = dict[str, dict[str, jax.Array]]


def init(key: jax.Array, cfg: ModelConfig, *, rank: int, targets: Sequence[str]) -> Factors:
    """Factors that do not change the model yet: ``A`` is random, ``B`` is 0.

    Args:
        key: PRNG key.
        cfg: The model.
        rank: Columns of ``A``, at most the smaller side of a weight.
        targets: Names of projections (`ot_merge_jax.models.sites.PROJECTIONS`).

    Returns:
        Float32 factors for the kernel of each projection.

    Example:
        >>> from ot_merge_jax.models.config import Rope
        >>> cfg = ModelConfig("llama", 99, 64, 128, 2, 4, 1, 16, 512, 1e-5,
        ...                   Rope(1e4), True, False, "float32")
        >>> factors = init(jax.random.key(0), cfg, rank=4, targets=["down"])
        >>> {path: (x["a"].shape, x["b"].shape) for path, x in factors.items()}
        {'layers/mlp/down_proj/kernel': ((2, 128, 4), (2, 4, 64))}

    Source: Hu et al. 2021 (arXiv 2106.09685), initialised as PEFT does: ``A`` uniform in
    ``+-1/sqrt(d_in)``. Differs: nothing.
    """
    rows = [
        spec
        for spec in specs.param_specs(cfg)
        if spec.weight in targets and spec.path.endswith("/kernel")
    ]
    factors = {}
    for spec, subkey in zip(rows, jax.random.split(key, len(rows)), strict=True):
        layers, d_in, d_out = spec.shape
        width, bound = min(rank, d_in, d_out), 1 / math.sqrt(d_in)
        a = jax.random.uniform(subkey, (layers, d_in, width), jnp.float32, -bound, bound)
        factors[spec.path] = {"a": a, "b": jnp.zeros((layers, width, d_out), jnp.float32)}
    return factors


def fold(base: Params, factors: Factors, scale: Any) -> Params:
    """The plain parameters: each weight plus ``scale`` times the product of its factors.

    Args:
        base: Parameters.
        factors: From `init`, trained.
        scale: ``alpha / rank``.

    Returns:
        New parameters in the dtype of the base; other leaves are the base's own.

    Example:
        >>> base = {"w": {"kernel": jnp.zeros((1, 1, 1))}}
        >>> ones = {"w/kernel": {"a": jnp.ones((1, 1, 2)), "b": jnp.ones((1, 2, 1))}}
        >>> fold(base, ones, 0.5)["w"]["kernel"].tolist()
        [[[1.0]]]
    """
    folded = jax.tree.map(lambda leaf: leaf, base)
    for path, pair in factors.items():
        parents, _, last = path.rpartition("/")
        parent = specs.get(folded, parents)
        change = scale * jnp.matmul(pair["a"], pair["b"])
        parent[last] = parent[last] + change.astype(parent[last].dtype)
    return folded
