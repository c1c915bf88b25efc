"""Gathering rows: against a direct forward pass, whatever the batches, and on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_merge_jax.data import batching
from ot_merge_jax.distributed import sharding
from ot_merge_jax.errors import NonFiniteError
from ot_merge_jax.io.hf import load_hf
from ot_merge_jax.models import gather
from ot_merge_jax.models.decoder import forward
from ot_merge_jax.models.sites import SITES, site_width
from ot_merge_jax.types import Batch

TOLERANCE = 1e-5  # sums of other lengths round differently
WANTED = ("attn_in", "k_out", "down_in")


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load_hf(tiny_checkpoint("qwen2"))


@pytest.fixture(scope="module")
def documents(model):
    """Token sequences of several lengths, and the rows of each: tokens, the mean, or none."""
    rng = np.random.default_rng(0)
    lengths = (5, 12, 3, 9, 20, 7, 16)
    sequences = [rng.integers(0, model[0].vocab_size, n).tolist() for n in lengths]
    rows = [
        ([1, 3], [4, 0]),
        ([-1], [2]),
        ([], []),
        ([8], [9]),
        ([0, 19, 4], [1, 6, 3]),
        ([-1], [8]),
        ([15], [5]),
    ]
    return sequences, rows


@pytest.fixture(scope="module")
def made(documents):
    """The documents in two batches of different shapes."""
    sequences, rows = documents
    halves = slice(0, 4), slice(4, 7)
    cut = [batch for half in halves for batch in batching.batches(sequences[half], rows[half])]
    assert len({batch.tokens.shape for batch in cut}) == 2
    return cut


@pytest.fixture(scope="module")
def expected(model, documents):
    """Site -> {row id: [layers, d]}, each sequence alone, every position of it read."""
    cfg, params = model
    run = jax.jit(forward, static_argnames=("cfg", "capture"))
    found = {site: {} for site in WANTED}
    for sequence, (positions, ids) in zip(*documents, strict=True):
        everywhere = np.arange(24, dtype=np.int32)[None]  # one length: one compilation
        tokens = np.zeros((1, 24), np.int32)
        tokens[0, : len(sequence)] = sequence
        batch = Batch(
            *map(jnp.asarray, (tokens, everywhere < len(sequence), everywhere, everywhere))
        )
        sites = run(params, batch, cfg=cfg, capture=frozenset(WANTED))[1]
        for site in WANTED:
            values = np.asarray(sites[site])[:, 0, : len(sequence)]  # [layers, s, d]
            for position, row in zip(positions, ids, strict=True):
                found[site][row] = values.mean(1) if position < 0 else values[:, position]
    return found


def check(gathered, expected):
    ids = sorted(expected["attn_in"])
    assert np.asarray(gathered.row_id).tolist() == ids
    for site in WANTED:
        rows = np.stack([expected[site][row] for row in ids], 1)
        assert gathered.values[site].dtype == np.float32
        np.testing.assert_allclose(gathered.values[site], rows, rtol=0, atol=TOLERANCE)


def test_rows_are_those_of_a_direct_pass(model, made, expected):
    cfg, params = model
    check(gather.gather(params, made, cfg=cfg, sites=WANTED), expected)


def test_order_of_batches_does_not_matter(model, made):
    cfg, params = model
    one = gather.gather(params, made, cfg=cfg, sites=WANTED)
    other = gather.gather(params, made[::-1], cfg=cfg, sites=WANTED)
    np.testing.assert_array_equal(one.row_id, other.row_id)
    for site in WANTED:
        np.testing.assert_array_equal(one.values[site], other.values[site])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_matter(model, documents, expected, side):
    """Seven sequences in one batch of another length, with rubbish under the padding."""
    cfg, params = model
    sequences, rows = documents
    length, width = 24, 3
    tokens = np.random.default_rng(1).integers(0, cfg.vocab_size, (7, length)).astype(np.int32)
    mask = np.zeros((7, length), bool)
    position, row_id = np.zeros((7, width), np.int32), np.full((7, width), -1, np.int32)
    for place, (sequence, (positions, ids)) in enumerate(zip(sequences, rows, strict=True)):
        start = length - len(sequence) if side == "left" else 0
        tokens[place, start : start + len(sequence)] = sequence
        mask[place, start : start + len(sequence)] = True
        position[place, : len(ids)] = [p if p < 0 else p + start for p in positions]
        row_id[place, : len(ids)] = ids
    batch = Batch(*map(jnp.asarray, (tokens, mask, position, row_id)))
    check(gather.gather(params, [batch], cfg=cfg, sites=WANTED), expected)


@pytest.mark.parametrize("sites", [(), ("down_out", "mlp_in"), tuple(SITES)])
def test_only_the_sites_asked_for(model, made, sites):
    cfg, params = model
    found = gather.gather(params, made[:1], cfg=cfg, sites=sites)
    assert set(found.values) == set(sites)
    for site, values in found.values.items():
        assert values.shape == (cfg.num_layers, len(found.row_id), site_width(site, cfg))


def test_rows_stay_on_the_host(model, made):
    cfg, params = model
    found = gather.gather(params, made, cfg=cfg, sites=WANTED)
    assert all(type(values) is np.ndarray for values in found.values.values())


def test_no_batches_give_no_rows(model):
    cfg, params = model
    found = gather.gather(params, [], cfg=cfg, sites=["mlp_in"])
    assert found.row_id.shape == (0,)
    assert found.values["mlp_in"].shape == (cfg.num_layers, 0, cfg.hidden_size)


def test_rows_with_one_id_raise(model, made):
    cfg, params = model
    with pytest.raises(ValueError, match="row_id"):
        gather.gather(params, [*made, made[0]], cfg=cfg, sites=WANTED)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_names_site_and_layer(model, made, value):
    """The last layer's down projection breaks ``down_out`` there and nothing before it."""
    cfg, params = model
    broken = jax.tree.map(lambda leaf: leaf, params)
    kernel = broken["layers"]["mlp"]["down_proj"]["kernel"]
    broken["layers"]["mlp"]["down_proj"]["kernel"] = kernel.at[2, 0, 0].set(value)
    with pytest.raises(NonFiniteError, match=r"down_out, layer 2"):
        gather.gather(broken, made[:1], cfg=cfg, sites=["mlp_in", "down_out"])
    gather.gather(broken, made[:1], cfg=cfg, sites=WANTED)  # those are finite


def test_compiles_once_for_each_shape(model, made):
    cfg, params = model
    shapes = {tuple(leaf.shape for leaf in batch) for batch in made}
    before = gather._step._cache_size()
    for _ in range(2):
        gather.gather(params, made, cfg=cfg, sites=["v_out"])
    assert gather._step._cache_size() - before == len(shapes)


@pytest.mark.parametrize("sizes", [{"data": 2, "model": 4}, {"data": 8}], ids=str)
def test_eight_devices_equal_one(tiny_checkpoint, model, made, sizes):
    """Parameters split over ``model``, batches over ``data``; four sequences do not fit eight."""
    cfg, params = model
    made = made if "model" in sizes else made[:1]
    mesh = sharding.make_mesh(sizes)
    _, split = load_hf(tiny_checkpoint("qwen2"), mesh=mesh)
    if "model" in sizes:
        assert not split["layers"]["mlp"]["up_proj"]["kernel"].is_fully_replicated
    one = gather.gather(params, made, cfg=cfg, sites=WANTED)
    eight = gather.gather(split, made, cfg=cfg, sites=WANTED, mesh=mesh)
    np.testing.assert_array_equal(one.row_id, eight.row_id)
    for site in WANTED:
        np.testing.assert_allclose(eight.values[site], one.values[site], rtol=0, atol=TOLERANCE)
