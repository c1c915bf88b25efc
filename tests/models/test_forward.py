"""Properties of the forward pass that hold for any weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ot_merge_jax.io.hf import load_hf
from ot_merge_jax.models import decoder
from ot_merge_jax.models.decoder import forward

_forward = jax.jit(forward, static_argnames=("cfg", "capture", "unroll"))
families = pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])


@families
def test_second_call_compiles_nothing(family, tiny_checkpoint, random_batch):
    cfg, params = load_hf(tiny_checkpoint(family))
    traces = []

    def counted(params, batch, *, cfg, capture):
        traces.append(1)
        return forward(params, batch, cfg=cfg, capture=capture)

    step = jax.jit(counted, static_argnames=("cfg", "capture"))
    step(params, random_batch(cfg, seed=0), cfg=cfg, capture=frozenset({"mlp_in", "q_out"}))
    # the same model read again: equal config, equal hash; the sites in another order
    cfg_again, params_again = load_hf(tiny_checkpoint(family))
    assert cfg_again is not cfg
    step(
        params_again,
        random_batch(cfg, seed=1),
        cfg=cfg_again,
        capture=frozenset({"q_out", "mlp_in"}),
    )
    assert len(traces) == 1
    assert step._cache_size() == 1


@families
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_future_tokens_do_not_change_past_logits(family, padding, tiny_checkpoint, random_batch):
    cfg, params = load_hf(tiny_checkpoint(family))
    batch = random_batch(cfg, padding=padding, lengths=(7, 6))
    cut = 4
    tokens = batch.tokens.at[:, cut:].set((batch.tokens[:, cut:] + 11) % cfg.vocab_size)
    before = np.asarray(_forward(params, batch, cfg=cfg)[0])
    after = np.asarray(_forward(params, batch._replace(tokens=tokens), cfg=cfg)[0])
    mask = np.asarray(batch.mask)
    np.testing.assert_array_equal(before[:, :cut][mask[:, :cut]], after[:, :cut][mask[:, :cut]])
    assert np.abs(before[:, cut:] - after[:, cut:])[mask[:, cut:]].max() > 0.1


@families
def test_past_tokens_do_change_later_logits(family, tiny_checkpoint, random_batch):
    cfg, params = load_hf(tiny_checkpoint(family))
    batch = random_batch(cfg, lengths=(7, 6))
    tokens = batch.tokens.at[:, 0].set((batch.tokens[:, 0] + 11) % cfg.vocab_size)
    before, after = (
        np.asarray(_forward(params, one, cfg=cfg)[0])
        for one in (batch, batch._replace(tokens=tokens))
    )
    assert (np.abs(before - after).max(-1) > 1e-3).all()


@families
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(family, side, tiny_checkpoint, random_batch):
    """Each sequence alone gives the logits and rows that it gives in a padded batch."""
    cfg, params = load_hf(tiny_checkpoint(family))
    batch = random_batch(cfg, padding=side, lengths=(7, 4))  # every length compiles anew
    capture = frozenset({"o_in", "down_in"})
    logits, sites = _forward(params, batch, cfg=cfg, capture=capture)
    for row, mask in enumerate(np.asarray(batch.mask)):
        real = np.flatnonzero(mask)
        first = int(real[0])
        position = batch.row_position[row : row + 1]
        alone = batch._replace(
            tokens=batch.tokens[row : row + 1, real],
            mask=batch.mask[row : row + 1, real],
            row_position=jnp.where(position < 0, position, position - first),
            row_id=batch.row_id[row : row + 1],
        )
        own_logits, own_sites = _forward(params, alone, cfg=cfg, capture=capture)
        np.testing.assert_allclose(logits[row, real], own_logits[0], rtol=0, atol=1e-5)
        for site in capture:
            np.testing.assert_allclose(
                sites[site][:, row], own_sites[site][:, 0], rtol=0, atol=1e-5
            )


@families
def test_pad_token_is_irrelevant(family, tiny_checkpoint, random_batch):
    cfg, params = load_hf(tiny_checkpoint(family))
    batch = random_batch(cfg, padding="left")
    other = batch._replace(tokens=jnp.where(batch.mask, batch.tokens, 5))
    assert (other.tokens != batch.tokens).any()
    mask = np.asarray(batch.mask)
    capture = frozenset({"down_out"})
    (before, rows), (after, other_rows) = (
        _forward(params, one, cfg=cfg, capture=capture) for one in (batch, other)
    )
    np.testing.assert_array_equal(np.asarray(before)[mask], np.asarray(after)[mask])
    np.testing.assert_array_equal(rows["down_out"], other_rows["down_out"])


def test_sequence_without_tokens_stays_finite(tiny_checkpoint, random_batch):
    """The last batch of a set is filled up with empty sequences."""
    cfg, params = load_hf(tiny_checkpoint())
    batch = random_batch(cfg)
    batch = batch._replace(mask=batch.mask.at[1].set(False))
    logits, sites = _forward(params, batch, cfg=cfg, capture=frozenset({"o_in", "mlp_in"}))
    assert np.isfinite(logits).all()
    assert all(np.isfinite(rows).all() for rows in sites.values())


@families
def test_batches_do_not_mix(family, tiny_checkpoint, random_batch):
    cfg, params = load_hf(tiny_checkpoint(family))
    batch = random_batch(cfg, padding="right")
    turned = jax.tree.map(lambda leaf: leaf[::-1], batch)
    np.testing.assert_allclose(
        _forward(params, turned, cfg=cfg)[0],
        _forward(params, batch, cfg=cfg)[0][::-1],
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize("graph_mode", [True, False])
def test_both_graph_modes_of_nnx(graph_mode, tiny_checkpoint, random_batch):
    cfg, params = load_hf(tiny_checkpoint("qwen2"))
    batch = random_batch(cfg, padding="left")
    expected = _forward(params, batch, cfg=cfg)[0]
    decoder._structure.cache_clear()
    try:
        with nnx.set_graph_mode(graph_mode):
            got = jax.jit(functools.partial(forward, cfg=cfg))(params, batch)[0]
    finally:
        decoder._structure.cache_clear()
    np.testing.assert_array_equal(got, expected)


@families
def test_vmap_over_parameters(family, tiny_checkpoint, random_batch):
    """Sweeps run a stack of models; each lane is that model alone."""
    cfg, first = load_hf(tiny_checkpoint(family, seed=0))
    _, second = load_hf(tiny_checkpoint(family, seed=1))
    batch = random_batch(cfg, padding="left")
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
    step = functools.partial(forward, cfg=cfg)
    lanes = jax.jit(jax.vmap(lambda params: step(params, batch)[0]))(both)
    mask = np.asarray(batch.mask)
    for lane, params in zip(lanes, (first, second), strict=True):
        alone = _forward(params, batch, cfg=cfg)[0]
        np.testing.assert_allclose(
            np.asarray(lane)[mask], np.asarray(alone)[mask], rtol=0, atol=1e-5
        )


@families
def test_gradient_is_finite_and_reaches_every_parameter(family, tiny_checkpoint, random_batch):
    cfg, params = load_hf(tiny_checkpoint(family, layers=2))
    batch = random_batch(cfg, padding="left")

    def loss(params):
        return decoder.token_nll(forward(params, batch, cfg=cfg)[0], batch)[0].sum()

    gradient = jax.jit(jax.grad(loss))(params)
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient)[0]:
        name = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), name
        if "k_proj']['bias" in name:  # softmax does not see a constant added to all keys of a query
            continue
        assert np.abs(leaf).max() > 0, name


def test_token_nll_skips_the_first_token_after_left_padding(tiny_checkpoint, random_batch):
    """A position counts when it and its successor are real."""
    cfg, params = load_hf(tiny_checkpoint())
    batch = random_batch(cfg, padding="left", lengths=(7, 4))
    losses, weights = decoder.token_nll(_forward(params, batch, cfg=cfg)[0], batch)
    assert np.asarray(weights).sum(-1).tolist() == [6, 3]
    assert (np.asarray(losses)[np.asarray(weights) == 0] == 0).all()
    assert (np.asarray(losses)[np.asarray(weights) == 1] > 0).all()


def test_float16_runs_and_sums_in_float32(tiny_checkpoint, random_batch):
    cfg, params = load_hf(tiny_checkpoint(), dtype="float16")
    _, wide = load_hf(tiny_checkpoint())
    batch = random_batch(cfg)
    logits = _forward(params, batch, cfg=cfg)[0]
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, _forward(wide, batch, cfg=cfg)[0], rtol=0, atol=0.1)
