"""Every site against a torch forward hook: picked rows, pooled rows, and rows that are to be
ignored.
"""

import jax
import numpy as np
import pytest

from ot_merge_jax.io.hf import load_hf
from ot_merge_jax.models import gather, sites
from ot_merge_jax.models.decoder import forward
from ot_merge_jax.models.families import FAMILIES

TOLERANCE = 1e-5

#: Site -> (torch module inside a layer, whether its input or its output is the site). Written from
#: the torch side,
#: independent of our wiring; a site without a row here fails.
TORCH_PLACE = {
    "attn_in": ("self_attn.q_proj", "input"),
    "q_out": ("self_attn.q_proj", "output"),
    "k_out": ("self_attn.k_proj", "output"),
    "v_out": ("self_attn.v_proj", "output"),
    "o_in": ("self_attn.o_proj", "input"),
    "o_out": ("self_attn", "output"),
    "mlp_in": ("mlp", "input"),
    "gate_out": ("mlp.gate_proj", "output"),
    "up_out": ("mlp.up_proj", "output"),
    "down_in": ("mlp.down_proj", "input"),
    "down_out": ("mlp", "output"),
}
#: Where torch keeps several projections in one module: a slice of that module's output.
FUSED_PLACE = {
    "q_out": ("self_attn.qkv_proj", slice(0, 32)),
    "k_out": ("self_attn.qkv_proj", slice(32, 48)),
    "v_out": ("self_attn.qkv_proj", slice(48, 64)),
    "gate_out": ("mlp.gate_up_proj", slice(0, 40)),
    "up_out": ("mlp.gate_up_proj", slice(40, 80)),
    "attn_in": ("self_attn.qkv_proj", None),
}
_forward = jax.jit(forward, static_argnames=("cfg", "capture"))


def torch_sites(model, batch):
    """``{site: [layers, b, s, d]}`` by hooks and pre-hooks."""
    import torch

    found = {site: [] for site in TORCH_PLACE}
    handles = []
    for layer in model.model.layers:
        for site, (name, side) in TORCH_PLACE.items():
            is_fused = model.config.model_type == "phi3" and site in FUSED_PLACE
            place, part = FUSED_PLACE[site] if is_fused else (name, slice(None))
            module = layer.get_submodule(place)
            if side == "input":
                handles.append(
                    module.register_forward_pre_hook(
                        lambda _, args, site=site: found[site].append(args[0].numpy())
                    )
                )
            else:
                handles.append(
                    module.register_forward_hook(
                        lambda _, args, out, site=site, part=part: found[site].append(
                            (out[0] if isinstance(out, tuple) else out).numpy()[..., part]
                        )
                    )
                )
    mask = np.asarray(batch.mask)
    model(
        input_ids=torch.tensor(np.asarray(batch.tokens), dtype=torch.long),
        attention_mask=torch.tensor(mask, dtype=torch.long),
        position_ids=torch.tensor(np.maximum(np.cumsum(mask, -1) - 1, 0), dtype=torch.long),
        use_cache=False,
    )
    for handle in handles:
        handle.remove()
    return {site: np.stack(values) for site, values in found.items()}


@pytest.fixture(scope="module", params=FAMILIES)
def captured(request, torch_checkpoint, random_batch, strict):
    """(cfg, params, batch with padding on both sides, torch's sites, ours)."""
    # activations of order one, so that the absolute tolerance is near the rounding of float32
    folder, model = torch_checkpoint(request.param, kv_heads=2, std=0.15)
    cfg, params = load_hf(folder)
    batch = random_batch(cfg, padding="left", lengths=(7, 4, 6), rows=3)
    other = random_batch(cfg, padding="right", lengths=(7, 5, 3), rows=3, seed=1)
    batch = jax.tree.map(lambda left, right: left.at[2].set(right[2]), batch, other)
    with strict():
        ours = _forward(params, batch, cfg=cfg, capture=frozenset(sites.SITES))[1]
    return cfg, params, batch, torch_sites(model, batch), ours


def rows_of(values, batch):
    """What the batch asks for, from the full ``[layers, b, s, d]``, in plain numpy."""
    mask, position = np.asarray(batch.mask), np.asarray(batch.row_position)
    out = np.empty((*values.shape[:1], *position.shape, values.shape[-1]), np.float32)
    for row in range(position.shape[0]):
        for place, where in enumerate(position[row]):
            out[:, row, place] = (
                values[:, row, mask[row]].mean(1) if where < 0 else values[:, row, where]
            )
    return out


@pytest.mark.torch
def test_batch_has_picked_and_pooled_rows_and_both_paddings(captured):
    _, _, batch, _, _ = captured
    mask, position = np.asarray(batch.mask), np.asarray(batch.row_position)
    assert not mask[1, 0]
    assert not mask[2, -1]
    assert (position[:, :2] >= 0).all()
    assert (position[:, 2] == -1).all()


@pytest.mark.torch
def test_every_site_is_captured_and_nothing_else(captured):
    assert captured[4].keys() == sites.SITES.keys()


@pytest.mark.torch
@pytest.mark.parametrize("site", sites.SITES)
def test_site_matches_the_hook(captured, site):
    cfg, _, batch, theirs, ours = captured
    expected = rows_of(theirs[site], batch)
    assert ours[site].dtype == np.float32
    assert ours[site].shape == (3, 3, 3, sites.site_width(site, cfg))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(ours[site], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.torch
@pytest.mark.parametrize("weight", sites.PROJECTIONS)
def test_wiring_joins_the_sites_it_names(captured, weight):
    """The weight, applied to its input site, gives its output site: the wiring table against the
    arithmetic.
    """
    cfg, params, _, _, ours = captured
    wire = sites.PROJECTIONS[weight]
    leaf = params
    for key in wire.path.split("/"):
        leaf = leaf[key]
    for layer in range(cfg.num_layers):
        given, wanted = (np.asarray(ours[site][layer]) for site in (wire.in_site, wire.out_site))
        got = given @ np.asarray(leaf["kernel"][layer])
        if "bias" in leaf:
            got = got + np.asarray(leaf["bias"][layer])
        np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("site", ["o_in", "down_out"])
def test_one_site_alone_is_the_same(site, tiny_checkpoint, random_batch):
    cfg, params = load_hf(tiny_checkpoint("qwen2"))
    batch = random_batch(cfg, padding="right")
    alone = _forward(params, batch, cfg=cfg, capture=frozenset({site}))[1]
    together = _forward(params, batch, cfg=cfg, capture=frozenset(sites.SITES))[1]
    assert list(alone) == [site]
    np.testing.assert_allclose(alone[site], together[site], rtol=0, atol=1e-6)


def test_unknown_site_raises(tiny_checkpoint, random_batch):
    cfg, params = load_hf(tiny_checkpoint())
    with pytest.raises(KeyError, match="no_such_site"):
        forward(params, random_batch(cfg), cfg=cfg, capture=frozenset({"no_such_site"}))


def test_bfloat16_captures_are_float32(tiny_checkpoint, random_batch):
    cfg, params = load_hf(tiny_checkpoint(), dtype="bfloat16")
    logits, captured = _forward(params, random_batch(cfg), cfg=cfg, capture=frozenset({"mlp_in"}))
    assert logits.dtype == np.float32
    assert captured["mlp_in"].dtype == np.float32


@pytest.mark.torch
def test_gather_drops_rows_without_an_id_and_sorts_the_others(captured):
    cfg, params, batch, theirs, _ = captured
    ids = np.array([[5, -1, 2], [-1, 0, -1], [3, 4, 1]], np.int32)
    batch = batch._replace(row_id=jax.numpy.asarray(ids))
    got = gather.gather(params, [batch], cfg=cfg, sites=("mlp_in", "k_out"))
    assert np.asarray(got.row_id).tolist() == [0, 1, 2, 3, 4, 5]
    for site in ("mlp_in", "k_out"):
        rows = rows_of(theirs[site], batch)
        expected = np.stack([rows[:, *np.argwhere(ids == row)[0]] for row in range(6)], 1)
        np.testing.assert_allclose(got.values[site], expected, rtol=0, atol=TOLERANCE)
    assert set(got.values) == {"mlp_in", "k_out"}
