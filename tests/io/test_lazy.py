"""Parameters that stay on disk: the same values, and the same activations layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_merge_jax.data import tokenizers
from ot_merge_jax.errors import InputError
from ot_merge_jax.evaluation import nll
from ot_merge_jax.io.hf import load_hf
from ot_merge_jax.io.lazy import open_lazy
from ot_merge_jax.merging import merge
from ot_merge_jax.models import specs
from ot_merge_jax.models.families import FAMILIES
from ot_merge_jax.models.gather import gather
from ot_merge_jax.models.model import Models
from ot_merge_jax.models.sites import PROJECTIONS, SITES, VOCABULARY
from ot_merge_jax.types import AlignedBatches, HParams, MergeSpec, VocabularyMatch


def batches_of(cfg, random_batch):
    """Two batches, one padded left, one right, with rows of their own."""
    made = [
        random_batch(cfg, padding=side, seed=seed) for seed, side in enumerate(("left", "right"))
    ]
    ids = np.arange(made[0].row_id.size, dtype=np.int32).reshape(made[0].row_id.shape)
    return [one._replace(row_id=ids + place * ids.size) for place, one in enumerate(made)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_leaf_and_layer_is_the_loaded_one(family, tiny_checkpoint):
    folder = tiny_checkpoint(family, max_shard_bytes=12_000)
    cfg, loaded = load_hf(folder)
    same, stored = open_lazy(folder)
    assert same == cfg
    for spec in specs.param_specs(cfg):
        leaf = specs.get(stored, spec.path)
        leaf = np.stack(list(leaf)) if spec.is_stacked else leaf
        np.testing.assert_array_equal(leaf, specs.get(loaded, spec.path))
        assert specs.has(stored, spec.path)
    assert not specs.has(stored, "layers/mlp/no_such")
    for l in range(cfg.num_layers):
        ours, theirs = stored.layer(l), specs.layer(loaded, l)
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


#: One kind of layer with and without biases, fused tensors, windows, layers without rotation.
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma3_text", "smollm3"])
def test_layer_by_layer_gathers_the_same(family, tiny_checkpoint, random_batch):
    folder = tiny_checkpoint(family)
    cfg, loaded = load_hf(folder)
    batches = batches_of(cfg, random_batch)
    whole = gather(loaded, batches, cfg=cfg, sites=SITES)
    layered = gather(open_lazy(folder)[1], batches, cfg=cfg, sites=SITES)
    np.testing.assert_array_equal(layered.row_id, whole.row_id)
    for site in SITES:
        assert np.abs(whole.values[site]).max() > 0.1
        # of the largest: float32 rounds in proportion, and the two programs fuse differently
        largest = np.abs(whole.values[site]).max()
        np.testing.assert_allclose(
            layered.values[site] / largest, whole.values[site] / largest, rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("tied", [False, True])
def test_layer_by_layer_scores_the_same(tied, tiny_checkpoint, texts):
    folder = tiny_checkpoint("gemma2", tied=tied)
    cfg, loaded = load_hf(folder)
    tokenizer = tokenizers.load_tokenizer(folder)
    cut = nll.windows(texts[:6], tokenizer, max_positions=32)
    whole = nll.score(loaded, cut, cfg=cfg)
    layered = nll.score(open_lazy(folder).params, cut, cfg=cfg)
    np.testing.assert_allclose(layered.nll, whole.nll, rtol=1e-6)


@pytest.mark.parametrize("rule", ["interpolate", "delta"])
def test_merging_from_disk_is_merging_from_memory(rule, tiny_checkpoint, random_batch):
    """Projections with biases, both vocabulary tables, and only one source layer at a time."""
    spec = MergeSpec(weights=(*PROJECTIONS, *VOCABULARY), rule=rule)
    folders = [tiny_checkpoint("qwen2", seed=s, drift=d) for s, d in ((1, 0), (2, 0.3), (2, 0))]
    target, source, base = (load_hf(folder) for folder in folders)
    stored = [open_lazy(folder) for folder in folders[1:]]
    batches = batches_of(target.cfg, random_batch)
    ids = jnp.arange(50)
    given = {"spec": spec, "vocabulary": VocabularyMatch(ids, ids)}
    both = AlignedBatches(batches, batches)
    whole = merge.merge(Models(target, source, base), both, HParams(0.5), **given)
    layered = merge.merge(Models(target, *stored), both, HParams(0.5), **given)
    for spec in specs.param_specs(target.cfg):
        ours, theirs = (np.asarray(specs.get(one.params, spec.path)) for one in (layered, whole))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_a_leaf_is_read_when_it_is_asked_for_and_not_before(tiny_checkpoint, monkeypatch):
    from ot_merge_jax.io import hf

    reads = []
    was = hf.read_leaf
    monkeypatch.setattr(
        hf, "read_leaf", lambda f, o, spec, *a: reads.append(spec.path) or was(f, o, spec, *a)
    )
    cfg, stored = open_lazy(tiny_checkpoint())
    kernels = specs.get(stored, "layers/mlp/up_proj/kernel")
    assert (len(kernels), reads) == (cfg.num_layers, [])
    _ = kernels[1]
    assert reads == ["layers/mlp/up_proj/kernel"]


def test_weights_that_are_not_finite_are_refused_when_read(tiny_checkpoint, writable_copy):
    import safetensors.numpy

    folder = writable_copy(tiny_checkpoint())
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _, stored = open_lazy(folder)
    stored.layer(0)
    with pytest.raises(InputError, match="NaN or infinite"):
        stored.layer(1)
