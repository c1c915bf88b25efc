"""Models, batches and matched vocabulary rows that the tests of merging share."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from ot_merge_jax.data import batching
from ot_merge_jax.io.hf import load_hf
from ot_merge_jax.types import AlignedBatches, VocabularyMatch

#: Sizes of the source; the target has the fixture's (hidden 24, 4 heads of 8, MLP 40).
SOURCE = {"layers": 3, "hidden": 20, "heads": 3, "kv_heads": 1, "head_dim": 10, "intermediate": 56}
TARGET = {"layers": 2}


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    """``model(role, family, **more)`` -> (cfg, params) of the target, source or (its) base."""

    @functools.cache
    def load(role, family="llama", **more):
        sizes = {**(TARGET if role == "target" else SOURCE), **more}
        drift = {"source": 0.3}.get(role, 0.0)
        seed = 0 if role == "target" else 5
        return load_hf(tiny_checkpoint(family, seed=seed, drift=drift, **sizes))

    return load


@pytest.fixture(scope="module")
def matched():
    """120 matched rows, in another order on either side."""
    rng = np.random.default_rng(1)
    target, source = (rng.permutation(n)[:120].astype(np.int32) for n in (300, 290))
    return VocabularyMatch(jnp.asarray(np.sort(target)), jnp.asarray(source))


@pytest.fixture(scope="module")
def batches():
    """Row-aligned batches, four rows of each of 16 random sequences, ids in both vocabularies."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(2, 300, 16).tolist() for _ in range(16)]
    rows = [([3, 7, 11, 15], list(range(4 * i, 4 * i + 4))) for i in range(16)]
    target = batching.batches(sequences, rows)
    source = batching.batches([s[::-1] for s in sequences[::-1]][::-1], rows)
    return AlignedBatches(target, source)
