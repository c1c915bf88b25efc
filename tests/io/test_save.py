"""What `save_hf` leaves: file set, config, modes, shards; and what it refuses, leaving nothing."""

import json
import os
import resource
import stat

import jax
import numpy as np
import pytest
import safetensors.numpy
from checkpoints import DTYPES, digests, header, names, recast, tensors

from ot_merge_jax.errors import InputError, NonFiniteError, ResourceError
from ot_merge_jax.io import safetensors as files
from ot_merge_jax.io.hf import SIDECARS, load_hf, patched_config, save_hf
from ot_merge_jax.models import specs

FAMILIES = pytest.mark.parametrize("family", ["llama", "qwen2"])


# ---- the other files ----


def test_file_set_is_the_contract_and_nothing_else(tiny_checkpoint, writable_copy, tmp_path):
    """Sidecars and licence travel; other weights, code, adapters and notes of the target do not."""
    source = writable_copy(tiny_checkpoint())
    for name in SIDECARS:
        if not (source / name).exists():
            (source / name).write_bytes(b"{}\r\n" + name.encode())
    left = "consolidated.safetensors pytorch_model.bin training_args.bin modeling_own.py README.md"
    for name in ("LICENSE.txt", "adapter_model.safetensors", "optimizer.pt", *left.split()):
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
            {"rope_theta": 5e5},
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        ),
        ({"rope_theta": 5e5, "rope_scaling": None}, {}),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, {}),
    ],
    ids=[
        "dtype",
        "torch-dtype",
        "no-dtype",
        "rope-flat",
        "rope-llama3",
        "rope-old",
        "rope-old-llama3",
    ],
)
def test_config_patch_writes_both_spellings(given, added):
    base = {"model_type": "llama", "transformers_version": "4.40.1", "hidden_size": 24}
    assert patched_config(base | given) == base | given | added


@pytest.mark.parametrize("key", ["_name_or_path", "auto_map", "quantization_config"])
def test_config_patch_drops(key):
    assert patched_config({"model_type": "llama", key: "/home/someone/model"}) == {
        "model_type": "llama"
    }


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


# ---- shards ----


@pytest.mark.parametrize("source_shards", [None, 12_000], ids=["from-single", "from-sharded"])
@pytest.mark.parametrize("dtype", ["F32", "mixed"])
def test_resharding(source_shards, dtype, tiny_checkpoint, writable_copy, tmp_path):
    """By bytes: every shard within the limit (or one large tensor), and the index as transformers
    writes it.
    """
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
        sizes = [
            b - a
            for k, v in header(shard).items()
            if k != "__metadata__"
            for a, b in [v["data_offsets"]]
        ]
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
def test_single_shard_behind_an_index_keeps_its_index(
    name, tiny_checkpoint, writable_copy, tmp_path
):
    """A file of another name than model.safetensors is found through the index only."""
    source = writable_copy(tiny_checkpoint())
    (source / "model.safetensors").rename(source / name)
    weight_map = dict.fromkeys(
        (key for key in header(source / name) if key != "__metadata__"), name
    )
    (source / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    cfg, params = load_hf(source)
    save_hf(tmp_path / "out", params, cfg=cfg, like=source)
    assert tensors(tmp_path / "out") == tensors(source)
    jax.tree.map(np.testing.assert_array_equal, load_hf(tmp_path / "out")[1], params)


def test_shard_that_held_only_a_spare_head_leaves_a_loadable_folder(
    tiny_checkpoint, writable_copy, tmp_path
):
    """A tied model may hold its head again, even in a shard of its own; the output has neither."""
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


def test_like_without_weights_uses_the_table_and_the_configs_dtype(
    tiny_checkpoint, writable_copy, tmp_path
):
    source = writable_copy(tiny_checkpoint(dtype="bfloat16"))
    cfg, params = load_hf(source)
    (source / "model.safetensors").unlink()
    save_hf(tmp_path / "out", params, cfg=cfg, like=source)
    assert {dtype for dtype, _, _ in tensors(tmp_path / "out").values()} == {"bfloat16"}
    jax.tree.map(np.testing.assert_array_equal, load_hf(tmp_path / "out")[1], params)


# ---- refusals ----


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


def test_output_inside_the_target_is_refused(tiny_checkpoint, writable_copy):
    source = writable_copy(tiny_checkpoint())
    cfg, params = load_hf(source)
    before = names(source)
    with pytest.raises(InputError, match="inside the input"):
        save_hf(source / "out", params, cfg=cfg, like=source)
    assert names(source) == before


def test_other_configuration_is_refused(tiny_checkpoint, tmp_path):
    cfg, params = load_hf(tiny_checkpoint())
    with pytest.raises(InputError, match="configuration differs"):
        save_hf(tmp_path / "out", params, cfg=cfg, like=tiny_checkpoint(kv_heads=4))
    assert names(tmp_path) == []


def test_misshapen_parameter_is_refused(tiny_checkpoint, tmp_path):
    cfg, params = load_hf(tiny_checkpoint())
    params["layers"]["mlp"]["up_proj"]["kernel"] = params["layers"]["mlp"]["up_proj"]["kernel"].mT
    with pytest.raises(
        InputError, match=r"layers/mlp/up_proj/kernel.*\(3, 40, 24\).*\(3, 24, 40\)"
    ):
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


def test_parameter_that_overflows_its_file_dtype_is_refused(
    tiny_checkpoint, writable_copy, tmp_path
):
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
    cfg, params = load_hf(tiny_checkpoint())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(ResourceError, match="disk is full"):
            save_hf(tmp_path / "out", params, cfg=cfg, like=tiny_checkpoint())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


@pytest.mark.catalogue("links-and-devices")
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
        files.write(
            tmp_path / "a.safetensors", {"x": rng.standard_normal((2, 3)).astype(np.float32)}
        )
