"""Hugging Face folder -> ours -> Hugging Face folder: every byte of every tensor, and every other file."""

import hashlib
import json
import os
import shutil
import stat

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from ot_merge_jax import sharding
from ot_merge_jax.errors import InputError, NonFiniteError, ResourceError
from ot_merge_jax.io import folder as folders
from ot_merge_jax.io import safetensors as files
from ot_merge_jax.io.hf import SIDECARS, load_hf, patched_config, save_hf
from ot_merge_jax.models import specs

FAMILIES = pytest.mark.parametrize("family", ["llama", "qwen2"])
NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def tensors(folder):
    """``{name: (dtype, shape, bytes)}`` of all files, by the library alone."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, array in safetensors.numpy.load_file(file).items():
            found[name] = (array.dtype.name, array.shape, array.tobytes())
    return found


def header(path):
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def recast(folder, choose):
    """Rewrites every file of a folder with the dtype that ``choose(name)`` says."""
    for file in folder.glob("*.safetensors"):
        values = safetensors.numpy.load_file(file)
        cast = {name: array.astype(NUMPY[choose(name)]) for name, array in values.items()}
        safetensors.numpy.save_file(cast, file, metadata={"format": "pt"})
    return folder


def mixed(name):
    """Dtypes that differ inside one stack, between leaves, and where neither holds the other (F16, BF16)."""
    if "norm" in name:
        return "F32"
    if "up_proj" in name:
        return "BF16" if ".0." in name else "F32"
    if "q_proj" in name:
        return "F16" if ".1." in name else "BF16"
    return "BF16"


DTYPES = {
    "F32": lambda name: "F32",
    "F16": lambda name: "F16",
    "BF16": lambda name: "BF16",
    "mixed": mixed,
}


@FAMILIES
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shards", [None, 12_000], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", DTYPES)
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
    np.testing.assert_array_equal(params["embed_tokens"]["embedding"], raw["model.embed_tokens.weight"])


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


# ------------------------------------------------------------------------------------------------ the other files


def test_file_set_is_the_contract_and_nothing_else(tiny_checkpoint, writable_copy, tmp_path):
    """Sidecars and licence travel; other weights, code, adapters and notes of the target do not."""
    source = writable_copy(tiny_checkpoint())
    for name in SIDECARS:
        if not (source / name).exists():
            (source / name).write_bytes(b"{}\r\n" + name.encode())
    for name in ("LICENSE.txt", "consolidated.safetensors", "pytorch_model.bin", "training_args.bin",
                 "modeling_own.py", "README.md", "optimizer.pt", "adapter_model.safetensors"):  # fmt: skip
        (source / name).write_bytes(b"not to be touched")
    (source / "LICENSE-folder").mkdir()
    cfg, params = load_hf(source)
    save_hf(tmp_path / "out", params, cfg=cfg, like=source)
    expected = {"config.json", "model.safetensors", "LICENSE", "LICENSE.txt", *SIDECARS}
    assert set(names(tmp_path / "out")) == expected
    for name in (*SIDECARS, "LICENSE", "LICENSE.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


@FAMILIES
def test_tokenizer_of_the_output_is_the_targets(family, tiny_checkpoint, tmp_path, texts):
    from transformers import AutoTokenizer

    source = tiny_checkpoint(family)
    cfg, params = load_hf(source)
    save_hf(tmp_path / "out", params, cfg=cfg, like=source)
    ours, theirs = (
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        for folder in (tmp_path / "out", source)
    )
    assert ours(texts)["input_ids"] == theirs(texts)["input_ids"]
    assert ours.chat_template == theirs.chat_template


@pytest.mark.parametrize("shards", [None, 12_000], ids=["single", "sharded"])
def test_metadata_is_exactly_format_pt(shards, tiny_checkpoint, tmp_path):
    source = tiny_checkpoint(max_shard_bytes=shards)
    cfg, params = load_hf(source)
    save_hf(tmp_path / "out", params, cfg=cfg, like=source)
    written = sorted((tmp_path / "out").glob("*.safetensors"))
    assert written
    for file in written:
        assert header(file)["__metadata__"] == {"format": "pt"}


def test_config_keeps_every_key_and_its_order(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint()
    cfg, params = load_hf(source)
    save_hf(tmp_path / "out", params, cfg=cfg, like=source)
    theirs, ours = (json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "out"))
    kept = {key: value for key, value in ours.items() if key in theirs}
    assert kept == theirs
    assert list(kept) == list(theirs)


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ({"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}),
        ({"torch_dtype": "float16"}, {"dtype": "float16"}),
        ({}, {}),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            {"rope_theta": 5e5, "rope_scaling": None},
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        ),
        ({"rope_theta": 5e5, "rope_scaling": None}, {}),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, {}),
    ],
    ids=["dtype", "torch-dtype", "no-dtype", "rope-flat", "rope-llama3", "rope-old", "rope-old-llama3"],
)
def test_config_patch_writes_both_spellings(given, added):
    base = {"model_type": "llama", "transformers_version": "4.40.1", "hidden_size": 24}
    assert patched_config(base | given) == base | given | added


@pytest.mark.parametrize("key", ["_name_or_path", "auto_map", "quantization_config"])
def test_config_patch_drops(key):
    assert patched_config({"model_type": "llama", key: "/home/someone/model"}) == {"model_type": "llama"}


def test_config_patch_leaves_the_given_dict_alone():
    given = {"dtype": "bfloat16", "_name_or_path": "x", "rope_parameters": {"rope_theta": 1e4}}
    copy = json.loads(json.dumps(given))
    patched_config(given)
    assert given == copy


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o000])
@pytest.mark.parametrize("shards", [None, 12_000], ids=["single", "sharded"])
def test_modes_follow_the_umask(umask, shards, tiny_checkpoint, tmp_path):
    source = tiny_checkpoint(max_shard_bytes=shards)
    cfg, params = load_hf(source)
    before = os.umask(umask)
    try:
        save_hf(tmp_path / "out", params, cfg=cfg, like=source)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask
    for file in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask, file.name


# ------------------------------------------------------------------------------------------------ shards


@pytest.mark.parametrize("source_shards", [None, 12_000], ids=["from-single", "from-sharded"])
@pytest.mark.parametrize("dtype", ["F32", "mixed"])
def test_resharding(source_shards, dtype, tiny_checkpoint, writable_copy, tmp_path):
    """By bytes: every shard within the limit (or one large tensor), and the index as transformers writes it."""
    source = recast(writable_copy(tiny_checkpoint(max_shard_bytes=source_shards)), DTYPES[dtype])
    cfg, params = load_hf(source)
    limit = 20_000
    out = tmp_path / "out"
    save_hf(out, params, cfg=cfg, like=source, max_shard_bytes=limit)
    assert tensors(out) == tensors(source)
    shards = sorted(out.glob("*.safetensors"))
    count = len(shards)
    assert count > 1
    assert [f.name for f in shards] == [
        f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
    ]
    for shard in shards:
        sizes = [b - a for k, v in header(shard).items() if k != "__metadata__" for a, b in [v["data_offsets"]]]
        assert sum(sizes) <= limit or len(sizes) == 1
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert list(index) == ["metadata", "weight_map"]
    stored = tensors(out)
    assert index["metadata"] == {
        "total_size": sum(len(data) for _, _, data in stored.values()),
        "total_parameters": specs.count(cfg),
    }
    assert list(index["weight_map"]) == sorted(stored)
    for name, shard in index["weight_map"].items():
        assert name in header(out / shard)


def test_resharding_to_one_file_leaves_no_index(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint(max_shard_bytes=12_000)
    cfg, params = load_hf(source)
    save_hf(tmp_path / "out", params, cfg=cfg, like=source, max_shard_bytes=10**9)
    assert [f.name for f in (tmp_path / "out").glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize("name", ["model-00001-of-00001.safetensors", "weights.safetensors"])
def test_single_shard_behind_an_index_keeps_its_index(name, tiny_checkpoint, writable_copy, tmp_path):
    """A file of another name than model.safetensors is found through the index only."""
    source = writable_copy(tiny_checkpoint())
    (source / "model.safetensors").rename(source / name)
    weight_map = dict.fromkeys((key for key in header(source / name) if key != "__metadata__"), name)
    (source / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    cfg, params = load_hf(source)
    save_hf(tmp_path / "out", params, cfg=cfg, like=source)
    assert tensors(tmp_path / "out") == tensors(source)
    jax.tree.map(np.testing.assert_array_equal, load_hf(tmp_path / "out")[1], params)


def test_shard_that_held_only_a_spare_head_leaves_a_loadable_folder(tiny_checkpoint, writable_copy, tmp_path):
    """A tied model may hold its head once more, even in a shard of its own; the output has neither."""
    source = writable_copy(tiny_checkpoint(tied=True))
    body = safetensors.numpy.load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    head = {"lm_head.weight": body["model.embed_tokens.weight"]}
    safetensors.numpy.save_file(body, source / first, metadata={"format": "pt"})
    safetensors.numpy.save_file(head, source / second, metadata={"format": "pt"})
    weight_map = dict.fromkeys(body, first) | dict.fromkeys(head, second)
    (source / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    cfg, params = load_hf(source)
    save_hf(tmp_path / "out", params, cfg=cfg, like=source)
    assert "lm_head.weight" not in tensors(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, load_hf(tmp_path / "out")[1], params)


def test_like_without_weights_uses_the_table_and_the_configs_dtype(tiny_checkpoint, writable_copy, tmp_path):
    source = writable_copy(tiny_checkpoint(dtype="bfloat16"))
    cfg, params = load_hf(source)
    (source / "model.safetensors").unlink()
    save_hf(tmp_path / "out", params, cfg=cfg, like=source)
    assert {dtype for dtype, _, _ in tensors(tmp_path / "out").values()} == {"bfloat16"}
    jax.tree.map(np.testing.assert_array_equal, load_hf(tmp_path / "out")[1], params)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("there", ["folder", "file"])
def test_existing_output_is_refused_and_unchanged(there, tiny_checkpoint, tmp_path):
    cfg, params = load_hf(tiny_checkpoint())
    out = tmp_path / "out"
    if there == "folder":
        out.mkdir()
        (out / "precious.txt").write_text("mine")
    else:
        out.write_text("mine")
    before = digests(tmp_path)
    with pytest.raises(InputError, match="out"):
        save_hf(out, params, cfg=cfg, like=tiny_checkpoint())
    assert digests(tmp_path) == before
    assert names(tmp_path) == ["out"]


def test_other_configuration_is_refused(tiny_checkpoint, tmp_path):
    cfg, params = load_hf(tiny_checkpoint())
    with pytest.raises(InputError, match="configuration differs"):
        save_hf(tmp_path / "out", params, cfg=cfg, like=tiny_checkpoint(kv_heads=4))
    assert names(tmp_path) == []


def test_misshapen_parameter_is_refused(tiny_checkpoint, tmp_path):
    cfg, params = load_hf(tiny_checkpoint())
    params["layers"]["mlp"]["up_proj"]["kernel"] = params["layers"]["mlp"]["up_proj"]["kernel"].mT
    with pytest.raises(InputError, match=r"layers/mlp/up_proj/kernel.*\(3, 40, 24\).*\(3, 24, 40\)"):
        save_hf(tmp_path / "out", params, cfg=cfg, like=tiny_checkpoint())
    assert names(tmp_path) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_parameter_that_is_not_finite_is_refused(value, tiny_checkpoint, tmp_path):
    cfg, params = load_hf(tiny_checkpoint())
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    params["layers"]["mlp"]["up_proj"]["kernel"] = kernel.at[1, 2, 3].set(value)
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        save_hf(tmp_path / "out", params, cfg=cfg, like=tiny_checkpoint())
    assert names(tmp_path) == []


def test_parameter_that_overflows_its_file_dtype_is_refused(tiny_checkpoint, writable_copy, tmp_path):
    source = recast(writable_copy(tiny_checkpoint()), DTYPES["F16"])
    cfg, params = load_hf(source, dtype="float32")
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    params["layers"]["mlp"]["up_proj"]["kernel"] = kernel.at[1, 2, 3].set(1e6)
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*F16"):
        save_hf(tmp_path / "out", params, cfg=cfg, like=source)
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("limit", [1_000, 9_000, 40_000])
def test_full_disk_is_a_resource_error_and_leaves_nothing(limit, tiny_checkpoint, tmp_path):
    """Files may not grow beyond the limit: the weights' writer fails, at several places."""
    import resource

    cfg, params = load_hf(tiny_checkpoint())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(ResourceError, match="disk is full"):
            save_hf(tmp_path / "out", params, cfg=cfg, like=tiny_checkpoint())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


def test_writer_refuses_an_existing_target_and_a_link(tmp_path, rng):
    array = {"x": rng.standard_normal((2, 3)).astype(np.float32)}
    (tmp_path / "there.safetensors").write_text("mine")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "nowhere")
    for name in ("there", "link"):
        with pytest.raises(FileExistsError, match=name):
            files.write(tmp_path / f"{name}.safetensors", array)
    assert (tmp_path / "there.safetensors").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


def test_writer_notices_a_file_that_lies(tmp_path, rng, monkeypatch):
    """Read back and compared: a writer that stores other bytes is caught."""
    real = safetensors.numpy.save_file

    def lying(tensors, path, metadata):
        real({name: array + 1 for name, array in tensors.items()}, path, metadata=metadata)

    monkeypatch.setattr(safetensors.numpy, "save_file", lying)
    with pytest.raises(OSError, match=r"'x'"):
        files.write(tmp_path / "a.safetensors", {"x": rng.standard_normal((2, 3)).astype(np.float32)})


# ------------------------------------------------------------------------------------------------ mesh


MESHES = [{"model": 8}, {"data": 2, "model": 4}, {"data": 8}]


@FAMILIES
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_load_on_a_mesh_equals_load_without(family, axes, tiny_checkpoint, writable_copy):
    source = recast(writable_copy(tiny_checkpoint(family, kv_heads=4, max_shard_bytes=12_000)), mixed)
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


# ------------------------------------------------------------------------------------------------ transformers


@pytest.mark.torch
@FAMILIES
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shards", [None, 12_000], ids=["single", "sharded"])
def test_transformers_loads_the_output_with_the_same_logits(family, tied, shards, torch_checkpoint, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    source, model = torch_checkpoint(family, tied=tied)
    cfg, params = load_hf(source)
    save_hf(tmp_path / "out", params, cfg=cfg, like=source, max_shard_bytes=shards)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True, trust_remote_code=False
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


@pytest.mark.torch
@FAMILIES
def test_transformers_stops_at_the_targets_eos(family, tiny_checkpoint, tmp_path):
    """EOS and the generation settings travel: an output whose head only says EOS stops after one token."""
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
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    out = model.generate(
        torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 3, dtype=torch.long), max_new_tokens=6, do_sample=False
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


def test_hub_snapshot_of_links_into_blobs_loads_and_saves(tiny_checkpoint, tmp_path):
    """The layout of a hub cache: every file of a snapshot is a link to ../../blobs."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(tiny_checkpoint().iterdir())):
        shutil.copyfile(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    cfg, params = load_hf(snapshot)
    save_hf(tmp_path / "out", params, cfg=cfg, like=snapshot)
    assert digests(tmp_path / "out") == digests(tiny_checkpoint())
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
