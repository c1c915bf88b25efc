"""Merges with a known answer: a model with itself, and with one it was pruned from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_merge_jax.io.hf import load_hf
from ot_merge_jax.merging import merge, projections
from ot_merge_jax.models import gather, specs
from ot_merge_jax.models.model import Models
from ot_merge_jax.models.sites import PROJECTIONS, sites_of
from ot_merge_jax.transport import coupling as couplings
from ot_merge_jax.types import AlignedBatches, HParams, MergeSpec


@pytest.mark.catalogue("source-is-target")
def test_a_model_merged_with_itself_finds_itself(model, batches):
    """Layers and neurons match themselves; W~ tends to W as epsilon falls (plans blur at first)."""
    target = model("target")
    spec = MergeSpec(weights=("v", "down"), rule="interpolate")
    errors = []
    for epsilon in (0.5, 0.1, 0.02, 0.005):
        twice = AlignedBatches(batches.target, batches.target)
        merged = merge.merge(Models(target, target), twice, HParams(1.0, epsilon), spec=spec)
        alignment = merged.alignment
        errors.append({})
        for name in spec.weights:
            path = f"{PROJECTIONS[name].path}/kernel"
            weight = specs.get(target.params, path)
            moved = merged.transported.weights[path]
            errors[-1][name] = float(jnp.linalg.norm(moved - weight) / jnp.linalg.norm(weight))
            wiring = PROJECTIONS[name]
            for site in (wiring.in_site, wiring.out_site):
                np.testing.assert_array_equal(
                    alignment.coupling.layer_plan[site].argmax(1), np.arange(target.cfg.num_layers)
                )
                for l in range(target.cfg.num_layers):
                    plan = couplings.plan(*alignment, site=site, l=l, m=l)
                    is_active = alignment.target.values[site][l].std(0) > 0
                    assert is_active.any()
                    np.testing.assert_array_equal(
                        np.asarray(plan).argmax(1)[is_active], np.flatnonzero(is_active)
                    )
    for name in spec.weights:
        blurred, soft, sharp, sharpest = (error[name] for error in errors)
        assert blurred > 0.3, name
        assert blurred > 3 * soft > 9 * sharp, name
        assert max(sharp, sharpest) < 1e-3, name  # both are down to the rounding


KEPT_LAYERS = [0, 2, 3]


@pytest.fixture(scope="module")
def pruned(tiny_checkpoint):
    """(target, source, neurons): the target is the source without layer 1 and some FFN neurons."""
    cfg, source = load_hf(tiny_checkpoint("llama", seed=9, layers=4, intermediate=56))
    smaller, _ = load_hf(tiny_checkpoint("llama", seed=9, layers=3, intermediate=40))
    rng = np.random.default_rng(2)
    neurons = np.stack([rng.permutation(56)[:40] for _ in KEPT_LAYERS])
    target = jax.tree.map(lambda leaf: leaf, source)
    target["layers"] = jax.tree.map(lambda leaf: leaf[jnp.array(KEPT_LAYERS)], source["layers"])
    mlp = target["layers"]["mlp"]
    for name, axis in (("gate_proj", 2), ("up_proj", 2), ("down_proj", 1)):
        index = neurons[:, None, :] if axis == 2 else neurons[:, :, None]
        mlp[name]["kernel"] = jnp.take_along_axis(mlp[name]["kernel"], index, axis)
    for leaf in specs.param_specs(smaller):
        assert specs.get(target, leaf.path).shape == leaf.shape
    return (smaller, target), (cfg, source), neurons


@pytest.fixture(scope="module")
def unpruned(pruned, batches):
    """(spec, coupling, target and source activations)."""
    spec = MergeSpec(weights=("gate", "up", "down"), rule="interpolate")
    target, source, _ = pruned
    rows = [
        gather.gather(params, batches.target, cfg=cfg, sites=sites_of(spec.weights))
        for cfg, params in (target, source)
    ]
    return spec, couplings.couple(*rows, HParams(0.1), spec=spec), rows


@pytest.mark.parametrize("name", ["gate", "up", "down"])
def test_the_layers_of_a_pruned_model_are_recovered(unpruned, name):
    spec, coupling, _ = unpruned
    wiring = PROJECTIONS[name]
    share = projections.layer_weights(
        coupling, in_site=wiring.in_site, out_site=wiring.out_site, spec=spec
    )
    assert share.argmax(1).tolist() == KEPT_LAYERS


@pytest.mark.parametrize("site", ["gate_out", "up_out", "down_in"])
def test_the_neurons_of_a_pruned_model_are_recovered(pruned, unpruned, site):
    """In the first layer, which reads what the source's reads: exactly."""
    _, coupling, rows = unpruned
    plan = couplings.plan(coupling, *rows, site=site, l=0, m=0)
    np.testing.assert_array_equal(np.asarray(plan).argmax(1), pruned[2][0])
