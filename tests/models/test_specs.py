"""The parameter table against the module tree, transformers and published sizes."""

import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ot_merge_jax.models import decoder, families, sites, specs
from ot_merge_jax.types import Batch

#: ``config.json`` as published on the hub, and the number of parameters its files add up to.
PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())
#: Every family tied and untied; the number of heads matters to plain and to fused tensors.
SMALL = [
    *((family, tied, 2) for family in families.FAMILIES for tied in (False, True)),
    *((family, False, kv_heads) for family in ("llama", "phi3") for kv_heads in (1, 4)),
]
small = pytest.mark.parametrize(("family", "tied", "kv_heads"), SMALL)


def small_config(config_dict, family, tied, kv_heads):
    return families.read(config_dict(family, tied=tied, kv_heads=kv_heads))


def published_config(name):
    return families.read(PUBLISHED[name]["config"])


@small
def test_shapes_equal_the_module_tree(family, tied, kv_heads, config_dict):
    cfg = small_config(config_dict, family, tied, kv_heads)
    state = nnx.split(nnx.eval_shape(lambda: decoder.Block(cfg)))[1]
    tree = {
        "layers/" + "/".join(path): (cfg.num_layers, *leaf.shape)
        for path, leaf in jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))[0]
        for path in [[key.key for key in path]]
    }
    table = {spec.path: spec.shape for spec in specs.param_specs(cfg)}
    assert tree == {path: shape for path, shape in table.items() if path.startswith("layers/")}
    outside = {"embed_tokens/embedding": (cfg.vocab_size, 24), "norm/scale": (24,)}
    outside |= {} if tied else {"lm_head/kernel": (24, cfg.vocab_size)}
    assert {path: shape for path, shape in table.items() if path not in tree} == outside


@pytest.mark.torch
@small
def test_tensor_names_and_shapes_equal_those_of_transformers(family, tied, kv_heads, config_dict):
    torch = pytest.importorskip("torch")
    import transformers

    files = config_dict(family, tied=tied, kv_heads=kv_heads)
    cfg = families.read(files)
    architecture = files.pop("architectures")[0]
    kind = transformers.AutoConfig.for_model(files.pop("model_type"), **files)
    with torch.device("meta"):
        model = getattr(transformers, architecture)(kind)
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:  # torch lists the shared table under both names; a file holds it once
        assert theirs.pop("lm_head.weight") == theirs["model.embed_tokens.weight"]
    ours = {
        name: spec.tensor_shape() for spec in specs.param_specs(cfg) for name in spec.tensor_names()
    }
    assert ours == theirs


@small
def test_each_tensor_name_occurs_once(family, tied, kv_heads, config_dict):
    cfg = small_config(config_dict, family, tied, kv_heads)
    names = [(name, spec.rows) for spec in specs.param_specs(cfg) for name in spec.tensor_names()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_count(name):
    assert specs.count(published_config(name)) == PUBLISHED[name]["parameters"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_abstract_parameters_add_up_to_the_published_count(name):
    leaves = jax.tree.leaves(specs.abstract(published_config(name), jnp.bfloat16))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}
    assert sum(math.prod(leaf.shape) for leaf in leaves) == PUBLISHED[name]["parameters"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_forward_of_published_sizes_by_shape(name):
    cfg = published_config(name)
    shape = jax.ShapeDtypeStruct
    batch = Batch(
        shape((2, 33), jnp.int32),
        shape((2, 33), bool),
        shape((2, 5), jnp.int32),
        shape((2, 5), jnp.int32),
    )
    step = functools.partial(decoder.forward, cfg=cfg, capture=frozenset(sites.SITES))
    logits, captured = jax.eval_shape(step, specs.abstract(cfg, jnp.bfloat16), batch)
    assert logits.shape == (2, 33, cfg.vocab_size)
    assert logits.dtype == jnp.float32
    for site in sites.SITES:
        assert captured[site].shape == (cfg.num_layers, 2, 5, sites.site_width(site, cfg))
        assert captured[site].dtype == jnp.float32


@small
def test_weights_follow_the_wiring(family, tied, kv_heads, config_dict):
    """Kernels are ``[in site, out site]``, biases live on the out site, and every wired weight has
    a kernel.
    """
    cfg = small_config(config_dict, family, tied, kv_heads)
    table = specs.param_specs(cfg)
    kernels = {spec.weight: spec for spec in table if spec.path.endswith("/kernel")}
    assert sites.PROJECTIONS.keys() <= kernels.keys()
    for weight, wire in sites.PROJECTIONS.items():
        spec = kernels[weight]
        assert spec.path == f"{wire.path}/kernel"
        assert spec.shape == (
            cfg.num_layers,
            sites.site_width(wire.in_site, cfg),
            sites.site_width(wire.out_site, cfg),
        )
        assert spec.transpose
    for spec in table:
        if spec.path.endswith("/bias"):
            wire = sites.PROJECTIONS[spec.weight]
            assert spec.path == f"{wire.path}/bias"
            assert spec.shape == (cfg.num_layers, sites.site_width(wire.out_site, cfg))
        if spec.path.endswith("/scale"):
            assert spec.weight is None


@small
def test_vocabulary_tables_follow_the_wiring(family, tied, kv_heads, config_dict):
    cfg = small_config(config_dict, family, tied, kv_heads)
    tables = {
        spec.weight: spec.path for spec in specs.param_specs(cfg) if spec.weight in sites.VOCABULARY
    }
    expected = dict(sites.VOCABULARY)
    if tied:
        del expected["head"]
    assert tables == expected


def test_biases_are_those_of_the_family(config_dict):
    def biased(family):
        table = specs.param_specs(families.read(config_dict(family)))
        return {spec.weight for spec in table if spec.path.endswith("/bias")}

    assert biased("qwen2") == {"q", "k", "v"}
    assert not any(biased(family) for family in families.FAMILIES if family != "qwen2")


def test_biases_that_the_file_asks_for(config_dict):
    def biased(**keys):
        table = specs.param_specs(families.read(config_dict(**keys)))
        return {spec.weight for spec in table if spec.path.endswith("/bias")}

    assert biased(attention_bias=True) == {"q", "k", "v", "o"}
    assert biased(mlp_bias=True) == {"gate", "up", "down"}


def test_fused_tensors_are_shared_without_gaps(config_dict):
    table = specs.param_specs(families.read(config_dict("phi3")))
    parts = {}
    for spec in table:
        if spec.rows:
            parts.setdefault(spec.name, []).append(spec.rows)
    assert parts == {
        "model.layers.{layer}.self_attn.qkv_proj.weight": [(0, 32, 64), (32, 48, 64), (48, 64, 64)],
        "model.layers.{layer}.mlp.gate_up_proj.weight": [(0, 40, 80), (40, 80, 80)],
    }


def test_masked_axis_is_the_sharded_one(config_dict):
    """Rows of q, k, v, gate, up and columns of o, down: the masked site is the wide, split one."""
    for spec in specs.param_specs(families.read(config_dict("qwen2"))):
        if spec.weight in sites.PROJECTIONS and spec.path.endswith("/kernel"):
            out = sites.PROJECTIONS[spec.weight].masked == "out"
            assert (spec.axes[2] is not None) == out
            assert (spec.axes[1] is not None) != out


@pytest.mark.parametrize("weight", sites.PROJECTIONS)
def test_masked_site_is_one_of_the_two(weight):
    wire = sites.PROJECTIONS[weight]
    expected = wire.in_site if weight in ("o", "down") else wire.out_site
    assert wire.masked_site == expected


def test_init_is_what_transformers_makes(config_dict):
    """Normal weights of the asked width, unit norms, zero biases, every leaf its own stream."""
    cfg = families.read(config_dict("qwen2", tied=True, hidden=64, intermediate=96, layers=2))
    params = jax.jit(lambda key: specs.init(key, cfg, std=0.05, dtype=jnp.float32))(
        jax.random.key(3)
    )
    seen = []
    for spec in specs.param_specs(cfg):
        leaf = np.asarray(specs.get(params, spec.path))
        assert leaf.shape == spec.shape
        if spec.path.endswith("scale"):
            assert (leaf == 1).all()
        elif spec.path.endswith("bias"):
            assert (leaf == 0).all()
        else:
            assert leaf.std() == pytest.approx(0.05, rel=0.05)
            assert abs(leaf.mean()) < 0.003
            seen.append(leaf.ravel()[:50].tobytes())
    assert len(set(seen)) == len(seen)


def test_init_is_a_function_of_the_key(config_dict):
    cfg = families.read(config_dict())
    # one leaf: the compiler drops the others, which cost seconds
    draw = jax.jit(lambda key: specs.init(key, cfg)["layers"]["mlp"]["up_proj"]["kernel"])
    first, again, other = (np.asarray(draw(jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not (first == other).any()


def test_get_and_has():
    params = {"norm": {"scale": 3}}
    assert specs.get(params, "norm/scale") == 3
    assert specs.has(params, "norm/scale")
    assert specs.has(params, "norm")
    assert not specs.has(params, "norm/bias")
    assert not specs.has(params, "lm_head/kernel")
    with pytest.raises(KeyError):
        specs.get(params, "lm_head/kernel")
