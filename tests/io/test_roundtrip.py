"""Hugging Face folder -> ours -> Hugging Face folder: every byte of every tensor, and every other
file.
"""

import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from checkpoints import DTYPES, digests, header, mixed, names, recast, tensors

from ot_merge_jax.distributed import sharding
from ot_merge_jax.errors import InputError
from ot_merge_jax.io import folder as folders
from ot_merge_jax.io import safetensors as files
from ot_merge_jax.io.hf import load_hf, save_hf
from ot_merge_jax.models import specs
from ot_merge_jax.models.families import FAMILIES as ALL_FAMILIES

FAMILIES = pytest.mark.parametrize("family", ALL_FAMILIES)


#: Every family both ways; all combinations where names are the plain ones, and where torch keeps
#: several of our kernels in one tensor.
ROUND_TRIPS = [
    *((family, False, None, "F32") for family in ALL_FAMILIES),
    *((family, True, 12_000, "mixed") for family in ALL_FAMILIES),
    *itertools.product(("llama", "phi3"), (False, True), (None, 12_000), DTYPES),
]


@pytest.mark.parametrize(("family", "tied", "shards", "dtype"), dict.fromkeys(ROUND_TRIPS))
def test_bytes_come_back(family, tied, shards, dtype, tiny_checkpoint, writable_copy, tmp_path):
    source = writable_copy(tiny_checkpoint(family, tied=tied, max_shard_bytes=shards))
    recast(source, DTYPES[dtype])
    before = digests(source)
    cfg, params = load_hf(source)
    save_hf(tmp_path / "out", params, cfg=cfg, like=source)
    assert tensors(tmp_path / "out") == tensors(source)
    assert names(tmp_path / "out") == names(source)
    for file in source.glob("*.safetensors"):  # the same tensors in the same shard
        assert header(file).keys() == header(tmp_path / "out" / file.name).keys()
    assert digests(source) == before


def test_sharded_fixture_has_several_shards(tiny_checkpoint):
    """Or the rows above would test one file twice."""
    folder = tiny_checkpoint(max_shard_bytes=12_000)
    assert len(list(folder.glob("*.safetensors"))) >= 4
    assert (folder / "model.safetensors.index.json").exists()


def test_dtype_of_a_leaf_is_the_widest_of_its_tensors(tiny_checkpoint, writable_copy):
    _, params = load_hf(recast(writable_copy(tiny_checkpoint()), mixed))
    assert params["norm"]["scale"].dtype == jnp.float32
    assert params["layers"]["mlp"]["down_proj"]["kernel"].dtype == jnp.bfloat16
    assert params["layers"]["mlp"]["up_proj"]["kernel"].dtype == jnp.float32  # BF16 and F32
    assert params["layers"]["self_attn"]["q_proj"]["kernel"].dtype == jnp.float32  # BF16 and F16


@pytest.mark.parametrize("dtype", [jnp.bfloat16, "float32"])
def test_asked_dtype_is_that_of_every_leaf(dtype, tiny_checkpoint):
    _, params = load_hf(tiny_checkpoint(), dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}


def test_parameters_are_stacked_and_transposed(tiny_checkpoint):
    """Against the file read by the library, for a matrix that is not square."""
    folder = tiny_checkpoint("qwen2")
    raw = safetensors.numpy.load_file(folder / "model.safetensors")
    _, params = load_hf(folder)
    for layer in range(3):
        for part, name in (("mlp", "down_proj"), ("self_attn", "k_proj")):
            stored = raw[f"model.layers.{layer}.{part}.{name}.weight"]
            assert stored.shape[0] != stored.shape[1]
            np.testing.assert_array_equal(params["layers"][part][name]["kernel"][layer], stored.T)
        np.testing.assert_array_equal(
            params["layers"]["self_attn"]["k_proj"]["bias"][layer],
            raw[f"model.layers.{layer}.self_attn.k_proj.bias"],
        )
    np.testing.assert_array_equal(params["lm_head"]["kernel"], raw["lm_head.weight"].T)
    np.testing.assert_array_equal(
        params["embed_tokens"]["embedding"], raw["model.embed_tokens.weight"]
    )


def test_saved_values_are_the_given_ones_and_not_the_targets(tiny_checkpoint, tmp_path):
    cfg, params = load_hf(tiny_checkpoint())
    changed = jax.tree.map(lambda leaf: leaf + 0.5, params)
    save_hf(tmp_path / "out", changed, cfg=cfg, like=tiny_checkpoint())
    _, again = load_hf(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again, changed)


@pytest.mark.parametrize("layout", ["transposed", "strided", "fortran", "broadcast", "reversed"])
def test_writer_stores_any_memory_layout_right(layout, tmp_path, rng):
    """safetensors 0.8 writes raw memory; ours must write values."""
    base = rng.standard_normal((6, 10)).astype(np.float32)
    array = {
        "transposed": base.T,
        "strided": base[::2, 1::3],
        "fortran": np.asfortranarray(base),
        "broadcast": np.broadcast_to(base[:1], (6, 10)),
        "reversed": base[::-1],
    }[layout]
    files.write(tmp_path / "a.safetensors", {"x": array, "y": base})
    back = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(back["x"], array)
    np.testing.assert_array_equal(back["y"], base)


def test_strided_parameters_are_saved_right(tiny_checkpoint, tmp_path):
    """Numpy leaves in odd layouts, as a merge on the host may leave them."""
    cfg, params = load_hf(tiny_checkpoint())
    odd = jax.tree.map(lambda leaf: np.asfortranarray(np.asarray(leaf)), params)
    save_hf(tmp_path / "out", odd, cfg=cfg, like=tiny_checkpoint())
    assert tensors(tmp_path / "out") == tensors(tiny_checkpoint())


def test_same_parameters_make_the_same_file(tiny_checkpoint, tmp_path):
    cfg, params = load_hf(tiny_checkpoint())
    for name in ("a", "b"):
        save_hf(tmp_path / name, params, cfg=cfg, like=tiny_checkpoint())
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


# ---- mesh ----


MESHES = [{"model": 8}, {"data": 2, "model": 4}, {"data": 8}]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "phi3"])
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_load_on_a_mesh_equals_load_without(family, axes, tiny_checkpoint, writable_copy):
    source = recast(
        writable_copy(tiny_checkpoint(family, kv_heads=4, max_shard_bytes=12_000)), mixed
    )
    _, plain = load_hf(source)
    cfg, split = load_hf(source, mesh=sharding.make_mesh(axes))
    assert jax.tree.structure(plain) == jax.tree.structure(split)
    for spec in specs.param_specs(cfg):
        ours, theirs = specs.get(split, spec.path), specs.get(plain, spec.path)
        assert ours.dtype == theirs.dtype, spec.path
        assert len(ours.sharding.device_set) == 8, spec.path
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs), err_msg=spec.path)


def test_mesh_really_splits(tiny_checkpoint):
    mesh = sharding.make_mesh({"data": 2, "model": 4})
    _, params = load_hf(tiny_checkpoint(kv_heads=4), mesh=mesh)
    pieces = {
        "up": params["layers"]["mlp"]["up_proj"]["kernel"],
        "down": params["layers"]["mlp"]["down_proj"]["kernel"],
        "embed": params["embed_tokens"]["embedding"],
        "head": params["lm_head"]["kernel"],
        "norm": params["norm"]["scale"],
    }
    shapes = {name: leaf.addressable_shards[0].data.shape for name, leaf in pieces.items()}
    assert shapes == {
        "up": (3, 24, 10),
        "down": (3, 10, 24),
        "embed": (76, 24),
        "head": (24, 76),
        "norm": (24,),
    }


def test_save_from_a_mesh_is_the_same_file(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("qwen2")
    cfg, params = load_hf(source, mesh=sharding.make_mesh({"data": 2, "model": 4}))
    save_hf(tmp_path / "out", params, cfg=cfg, like=source)
    assert tensors(tmp_path / "out") == tensors(source)


def test_mesh_counts_a_broken_value_once(tiny_checkpoint, writable_copy):
    """Several devices read the same tensor; the message counts its values, not the reads."""
    source = writable_copy(tiny_checkpoint())
    body = safetensors.numpy.load_file(source / "model.safetensors")
    body["model.norm.weight"][[1, 4]] = np.nan
    body["model.layers.1.mlp.up_proj.weight"][3, :5] = np.inf
    safetensors.numpy.save_file(body, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError) as caught:
        load_hf(source, mesh=sharding.make_mesh({"data": 2, "model": 4}))
    assert "model.norm.weight (2 values)" in str(caught.value)
    assert "model.layers.1.mlp.up_proj.weight (5 values)" in str(caught.value)


# ---- transformers ----


@pytest.mark.torch
@FAMILIES
@pytest.mark.parametrize(
    ("tied", "shards"), [(False, None), (True, 12_000)], ids=["untied-single", "tied-sharded"]
)
def test_transformers_loads_the_output_with_the_same_logits(
    family, tied, shards, torch_checkpoint, tmp_path
):
    torch = pytest.importorskip("torch")
    import transformers

    source, model = torch_checkpoint(family, tied=tied)
    cfg, params = load_hf(source)
    save_hf(tmp_path / "out", params, cfg=cfg, like=source, max_shard_bytes=shards)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        attn_implementation="eager",
        output_loading_info=True,
        trust_remote_code=False,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[kind], kind
    ours, theirs = again.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    tokens = torch.arange(11)[None] * 13 % cfg.vocab_size
    with torch.no_grad():
        assert torch.equal(again.eval()(tokens).logits, model(tokens).logits)


@pytest.mark.catalogue("template-differences")
@pytest.mark.torch
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_transformers_stops_at_the_targets_eos(family, tiny_checkpoint, tmp_path):
    """EOS and the generation settings travel: an output whose head only says EOS stops after one
    token.
    """
    torch = pytest.importorskip("torch")
    import transformers

    source = tiny_checkpoint(family)
    cfg, params = load_hf(source)
    eos = json.loads((source / "generation_config.json").read_text())["eos_token_id"]
    head = jnp.zeros_like(params["lm_head"]["kernel"])
    params["norm"]["scale"] = jnp.zeros_like(params["norm"]["scale"]).at[0].set(1.0)
    params["embed_tokens"]["embedding"] = params["embed_tokens"]["embedding"].at[:, 0].set(50.0)
    params["lm_head"]["kernel"] = head.at[0, eos].set(1.0)
    save_hf(tmp_path / "out", params, cfg=cfg, like=source)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=False
    )
    out = model.generate(
        torch.tensor([[5, 6, 7]]),
        attention_mask=torch.ones(1, 3, dtype=torch.long),
        max_new_tokens=6,
        do_sample=False,
    )
    assert out[0, 3:].tolist() == [eos]


def test_folder_check_reads_no_weights(tiny_checkpoint, writable_copy):
    """`open_folder` is the preflight: NaN weights pass it, and only loading sees them."""
    source = writable_copy(tiny_checkpoint())
    body = safetensors.numpy.load_file(source / "model.safetensors")
    body["model.norm.weight"][0] = np.nan
    safetensors.numpy.save_file(body, source / "model.safetensors", metadata={"format": "pt"})
    opened = folders.open_folder(source)
    assert opened.tensors["model.norm.weight"] == files.TensorInfo("F32", (24,))
    assert set(opened.files.values()) == {"model.safetensors"}
    with pytest.raises(InputError, match=r"model\.norm\.weight"):
        load_hf(source)


@pytest.mark.catalogue("escaping-weight-map")
def test_hub_snapshot_of_links_into_blobs_loads_and_saves(tiny_checkpoint, tmp_path):
    """The layout of a hub cache: every file of a snapshot is a link to ../../blobs."""
    blobs, snapshot = (
        tmp_path / "models--a--b" / "blobs",
        tmp_path / "models--a--b" / "snapshots" / "0123",
    )
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(tiny_checkpoint().iterdir())):
        shutil.copyfile(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    cfg, params = load_hf(snapshot)
    save_hf(tmp_path / "out", params, cfg=cfg, like=snapshot)
    assert digests(tmp_path / "out") == digests(tiny_checkpoint())
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
