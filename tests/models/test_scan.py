"""The scanned decoder equals the unrolled one, bit for bit.

XLA's fusion pass may fuse a scanned and an unrolled body differently and then rounds differently
(measured: llama the same, qwen2 with its biases 1e-6 apart). Without that pass, both programs
compute the same operations in the same order, so there the equality is exact for every family.
"""

import functools

import jax
import numpy as np
import pytest

from ot_merge_jax.io.hf import load_hf
from ot_merge_jax.models import families, specs
from ot_merge_jax.models.decoder import forward

#: Level 0 only because compiling every operation by itself is slow.
NO_FUSION = {"xla_disable_hlo_passes": "fusion", "xla_backend_optimization_level": 0}
#: These sites come from the start, the middle and the end of a
#: layer.
SITES = ("k_out", "o_in", "down_out")


def run(cfg, params, batch, unroll, options):
    step = functools.partial(forward, cfg=cfg, capture=frozenset(SITES), unroll=unroll)
    return jax.jit(step, compiler_options=options)(params, batch)


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", NO_FUSION), ("qwen2", NO_FUSION), ("llama", None)],
    ids=["llama-no-fusion", "qwen2-no-fusion", "llama-default"],
)
def test_scan_equals_unrolled(family, options, tiny_checkpoint, random_batch):
    cfg, params = load_hf(tiny_checkpoint(family, layers=2))
    batch = random_batch(cfg, padding="left")
    scanned, scanned_sites = run(cfg, params, batch, 1, options)
    unrolled, unrolled_sites = run(cfg, params, batch, cfg.num_layers, options)
    np.testing.assert_array_equal(scanned, unrolled)
    for site in SITES:
        np.testing.assert_array_equal(scanned_sites[site], unrolled_sites[site], err_msg=site)


def test_scanned_program_does_not_grow_with_depth(config_dict, random_batch):
    """The point of the scan: one body, whatever the number of layers."""
    sizes = []
    for layers in (2, 5):
        cfg = families.read(config_dict(layers=layers))
        step = jax.jit(functools.partial(forward, cfg=cfg))
        text = step.lower(specs.abstract(cfg), random_batch(cfg)).as_text()
        sizes.append(len(text.splitlines()))
    assert sizes[0] == sizes[1]
