"""The work of a merge, counted from shapes: against XLA's own count, and against formulas."""

import pytest

from ot_merge_jax.data import batching, calibration
from ot_merge_jax.io.hf import load_hf
from ot_merge_jax.models import families, gather
from ot_merge_jax.runs import flops
from ot_merge_jax.types import MergeSpec

SITES = frozenset({"mlp_in"})


@pytest.fixture(scope="module")
def models(tiny_checkpoint):
    """Wide enough that products of matrices are nearly all of the work; one layer: XLA counts the
    body of a loop once.
    """
    sizes = {"hidden": 128, "intermediate": 320, "layers": 1, "heads": 8, "head_dim": 16}
    return load_hf(tiny_checkpoint("llama", seed=11, **sizes))


@pytest.fixture
def gathered():
    """32 sequences of 64 tokens, one row each."""
    parts = batching.batches([list(range(64))] * 32, [([-1], [one]) for one in range(32)])
    return calibration.Calibration(parts, parts, 32, 2048, 2048, 32, None, None)


def test_forward_is_what_xla_counts(models, gathered):
    cfg, params = models
    work = flops.of_merge(
        {"target": cfg, "source": cfg}, [gathered], spec=MergeSpec(weights=("up",))
    )
    counted = sum(
        gather._step.lower(params, batch, cfg=cfg, sites=SITES).cost_analysis()["flops"]
        for batch in gathered.target
    )
    assert work.flops["gather the target"] == pytest.approx(counted, rel=0.15)
    assert work.flops["gather the target"] < counted


@pytest.mark.parametrize(
    ("layers", "k", "pairs", "kept"), [("top1", None, 2, 40), ("soft", None, 6, 40),
                                       ("top1", 7, 2, 7), ("top1", 1000, 2, 40)]
)  # fmt: skip
def test_carrying_up_counts_maps_and_products(layers, k, pairs, kept, config_dict, gathered):
    """A layer of the target takes one layer of the source, or all; the mask leaves ``k`` rows."""
    target = families.read(config_dict("llama", layers=2), where="target")
    source = families.read(
        config_dict("llama", layers=3, hidden=32, intermediate=56), where="source"
    )
    spec = MergeSpec(weights=("up",), layers=layers, k=k)
    work = flops.of_merge({"target": target, "source": source}, [gathered], spec=spec)
    maps = 2 * 32 * (24 * 32 + kept * 56)
    # [24, 32] @ [32, 56] @ [56, kept], in the cheaper order
    product = 2 * min(24 * 32 * 56 + 24 * 56 * kept, 32 * 56 * kept + 24 * 32 * kept)
    assert work.flops["carry the projections, at most"] == pairs * (maps + product)
    assert work.flops[flops.ITERATION] == 4 * 6 * (24 * 32 + 40 * 56)


@pytest.mark.parametrize(("tied", "tables"), [(True, 1), (False, 2)])
def test_a_tied_target_moves_one_table(tied, tables, config_dict, gathered):
    cfg = families.read(config_dict("llama", tied=tied), where="target")
    spec = MergeSpec(weights=("embed", "head"))
    work = flops.of_merge({"target": cfg, "source": cfg}, [gathered], spec=spec, matched=100)
    assert work.problems == {}
    table = 2 * (3 * 100 * 24**2 + 24**3)
    assert work.flops == {"fit and apply the vocabulary map": tables * table}
