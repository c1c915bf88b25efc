"""Every family against torch transformers: logits and every site, tied and untied, grouped heads.

One forward pass of ours gives logits and all sites at once, so that each case compiles once.
"""

import functools

import jax
import numpy as np
import pytest

from ot_merge_jax.io.hf import load_hf
from ot_merge_jax.models import decoder
from ot_merge_jax.models.families import FAMILIES
from ot_merge_jax.spaces import SITES

pytestmark = pytest.mark.torch

_forward = jax.jit(decoder.forward, static_argnames=("cfg", "capture"))
CASES = [(family, tied, kv) for family in FAMILIES for tied in (False, True) for kv in (1, 2, 4)]


def theirs(model, batch):
    """Torch's logits."""
    import torch

    mask = np.asarray(batch.mask)
    positions = np.maximum(np.cumsum(mask, -1) - 1, 0)
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(np.asarray(batch.tokens), dtype=torch.long),
            attention_mask=torch.tensor(mask, dtype=torch.long),
            position_ids=torch.tensor(positions, dtype=torch.long),
            use_cache=False,
        ).logits.numpy()


@pytest.mark.parametrize(("family", "tied", "kv_heads"), CASES)
def test_logits_equal_torch(family, tied, kv_heads, torch_checkpoint, random_batch):
    folder, model = torch_checkpoint(family, tied=tied, kv_heads=kv_heads, layers=2)
    cfg, params = load_hf(folder)
    for padding in ("none", "left", "right"):
        batch = random_batch(cfg, padding=padding)
        expected = theirs(model, batch)
        ours = np.asarray(_forward(params, batch, cfg=cfg, capture=frozenset())[0])
        mask = np.asarray(batch.mask)
        assert np.abs(expected[mask]).max() > 0.1
        np.testing.assert_allclose(ours[mask], expected[mask], rtol=0, atol=1e-4)
