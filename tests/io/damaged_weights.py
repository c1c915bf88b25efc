"""Damages to weight files and tensors, and what the message that refuses each of them must say."""

import json
import os
import re

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from checkpoints import (
    INDEX,
    NORM,
    SINGLE,
    UP,
    body,
    edit_config,
    edit_header,
    edit_tensors,
    halves,
    join_header,
    shard,
    split_header,
    store,
    write_index,
)

from ot_merge_jax.io.folder import open_folder
from ot_merge_jax.io.hf import load_hf

ROWS = {}


def row(*needles, check=load_hf, **config):
    """Registers a damage: ``needles`` must all occur in the message."""

    def register(damage):
        ROWS[damage.__name__] = (damage, needles, check, config)
        return damage

    return register


# ---- damaged files ----


def _truncated(offset):
    @pytest.mark.catalogue("corrupt-safetensors")
    @row(SINGLE, "bytes", "download", check=open_folder)
    def damage(folder):
        raw = (folder / SINGLE).read_bytes()
        (folder / SINGLE).write_bytes(raw[:offset])

    ROWS[f"truncated_at_{offset}"] = ROWS.pop("damage")


for _offset in (1, 7, 8, 9, 100, -1, -4, -5000):
    _truncated(_offset)


@pytest.mark.catalogue("corrupt-safetensors")
@row(SINGLE, "0 bytes", "download", check=open_folder)
def empty_file(folder):
    (folder / SINGLE).write_bytes(b"")


@pytest.mark.catalogue("corrupt-safetensors")
@row(SINGLE, "bytes", "download", check=open_folder)
def trailing_bytes(folder):
    with (folder / SINGLE).open("ab") as file:
        file.write(b"\0" * 4)


@pytest.mark.catalogue("lfs-pointer")
@row(SINGLE, "Git LFS pointer", "git lfs pull", check=open_folder)
def lfs_pointer(folder):
    (folder / SINGLE).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2471645608\n"
    )


@pytest.mark.catalogue("lfs-pointer")
@row(SINGLE, "web page", "download", check=open_folder)
def html_page(folder):
    (folder / SINGLE).write_text("<!DOCTYPE html><html><body>Access restricted</body></html>")


@row(SINGLE, "download", check=open_folder)
def html_page_after_a_newline(folder):
    (folder / SINGLE).write_text("\n  <html><body>Access restricted</body></html>")


@row(SINGLE, "download", check=open_folder)
def huge_header_length(folder):
    (folder / SINGLE).write_bytes((2**62).to_bytes(8, "little") + b"{}")


@pytest.mark.catalogue("corrupt-safetensors")
@row(SINGLE, "corrupt", check=open_folder)
def header_not_json(folder):
    text, data = split_header(folder / SINGLE)
    join_header(folder / SINGLE, b"?" + text[1:], data)


@row(SINGLE, "corrupt", check=open_folder)
def header_not_utf8(folder):
    text, data = split_header(folder / SINGLE)
    join_header(folder / SINGLE, text.replace(b"norm", b"\xff\xfe\xfd\xfc", 1), data)


@pytest.mark.catalogue("hostile-json")
@row(SINGLE, "corrupt", check=open_folder)
def header_deeply_nested(folder):
    join_header(folder / SINGLE, b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b"")


@pytest.mark.catalogue("duplicate-header-key")
@row(SINGLE, repr(NORM), "twice", check=open_folder)
def duplicate_header_key(folder):
    text, data = split_header(folder / SINGLE)
    entry = re.search(rb'"model\.norm\.weight":\{[^}]*\}', text)[0]
    join_header(folder / SINGLE, text.rstrip()[:-1] + b"," + entry + b"}", data)


@row(SINGLE, "download", check=open_folder)
def overlapping_tensors(folder):
    @pytest.mark.catalogue("corrupt-safetensors")
    def overlap(header):
        header[NORM]["data_offsets"] = header["model.layers.0.input_layernorm.weight"][
            "data_offsets"
        ]

    edit_header(folder, overlap)


@row(SINGLE, "download", check=open_folder)
def offsets_reversed(folder):
    edit_header(folder, lambda header: header[NORM]["data_offsets"].reverse())


@row(SINGLE, "download", check=open_folder)
def size_against_shape(folder):
    @pytest.mark.catalogue("corrupt-safetensors")
    def shrink(header):
        header[NORM]["shape"] = [23]

    edit_header(folder, shrink)


@row(SINGLE, "download", check=open_folder)
def unknown_dtype(folder):
    def rename(header):
        header[NORM]["dtype"] = "F33"

    edit_header(folder, rename)


@row("num_hidden_layers is 3", "0 tensors", check=open_folder)
def file_without_tensors(folder):
    store(folder, {})


@row(f"lm_head.weight is listed in {INDEX} but is not in model-0000", check=open_folder)
def shard_without_tensors(folder):
    shard(folder, halves(folder))
    store(folder, {}, "model-00001-of-00002.safetensors")
    store(folder, {}, "model-00002-of-00002.safetensors")


@pytest.mark.catalogue("links-and-devices")
@row(SINGLE, "not a regular file", check=open_folder)
def fifo_as_weights(folder):
    (folder / SINGLE).unlink()
    os.mkfifo(folder / SINGLE)


@row(SINGLE, "not a regular file", check=open_folder)
def folder_as_weights(folder):
    (folder / SINGLE).unlink()
    (folder / SINGLE).mkdir()


# ---- files and tensors ----


@pytest.mark.catalogue("missing-shard")
@row(
    "model-00001-of-00003.safetensors is missing",
    "model-00003-of-00003.safetensors is missing",
    "download",
    check=open_folder,
)
def two_missing_shards(folder):
    names = sorted(body(folder))
    parts = [f"model-{i}-of-00003.safetensors" for i in ("00001", "00002", "00003")]
    shard(folder, {part: names[place::3] for place, part in enumerate(parts)})
    (folder / parts[0]).unlink()
    (folder / parts[2]).unlink()


@row("model-00001-of-00002.safetensors", "bytes", "download", check=open_folder)
def truncated_shard(folder):
    shard(folder, halves(folder))
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.catalogue("missing-shard")
@row(NORM, "is not in model-00001-of-00002.safetensors", check=open_folder)
def tensor_absent_from_its_shard(folder):
    parts = halves(folder)
    shard(folder, parts)
    for name, chosen in parts.items():
        if NORM in chosen:
            tensors = dict(safetensors.numpy.load_file(folder / name))
            del tensors[NORM]
            store(folder, tensors, name)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    write_index(folder, index | {NORM: "model-00001-of-00002.safetensors"})


@row(
    NORM,
    "is in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors",
    check=open_folder,
)
def tensor_in_two_files_and_not_in_the_index(folder):
    tensor_in_two_files(folder)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    del index[NORM]
    write_index(folder, index)


@pytest.mark.catalogue("missing-shard")
@row(
    NORM, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", check=open_folder
)
def tensor_in_two_files(folder):
    norm = body(folder)[NORM]
    shard(folder, halves(folder))
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        store(folder, dict(safetensors.numpy.load_file(folder / name)) | {NORM: norm}, name)


@row(NORM, "the index says model-00001-of-00002.safetensors", check=open_folder)
def tensor_in_another_shard_than_the_index_says(folder):
    norm = body(folder)[NORM]
    shard(folder, halves(folder))
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        part = dict(safetensors.numpy.load_file(folder / name))
        part.pop(NORM, None)
        store(folder, part | ({NORM: norm} if "00002-" in name else {}), name)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    write_index(folder, index | {NORM: "model-00001-of-00002.safetensors"})


@row(UP, "is missing", check=open_folder)
def missing_tensor(folder):
    edit_tensors(folder, lambda tensors: tensors.pop(UP))


@row("model.layers.1.mlp.up_proj.bias", "unexpected", check=open_folder)
def extra_tensor(folder):
    edit_tensors(
        folder, lambda tensors: tensors.update({UP.replace("weight", "bias"): np.zeros(40, "f4")})
    )


@row("model.layers.3.input_layernorm.weight", "unexpected", check=open_folder)
def extra_layer(folder):
    name = "model.layers.{}.input_layernorm.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name.format(3): tensors[name.format(2)]}))


@row(UP, "[24, 40]", "[40, 24]", check=open_folder)
def transposed_tensor(folder):
    edit_tensors(folder, lambda tensors: tensors.update({UP: np.ascontiguousarray(tensors[UP].T)}))


@pytest.mark.catalogue("shape-against-config")
@row(
    "model.layers.1.input_layernorm.weight has shape [24] where the config says [28]",
    " more",
    check=open_folder,
)
def shapes_against_the_config(folder):
    edit_config(folder, hidden_size=28)


@row("model.layers.3.mlp.up_proj.weight is missing", check=open_folder)
def fewer_layers_than_the_config(folder):
    edit_config(folder, num_hidden_layers=4)


@pytest.mark.catalogue("tied-embeddings")
@row("lm_head.weight is missing", "tie_word_embeddings is false", check=open_folder)
def untied_without_head(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))


@row("lm_head.weight", "tie_word_embeddings", tied=True)
def tied_with_another_head(folder):
    @pytest.mark.catalogue("tied-embeddings")
    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + np.float32(1e-3)

    edit_tensors(folder, add)


@row("lm_head.weight", "tie_word_embeddings", tied=True)
def tied_with_a_head_of_another_shape(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": np.zeros((7, 3), "f4")}))


@row("lm_head.weight", "F8_E4M3", tied=True)
def tied_with_a_head_in_float8(folder):
    def add(tensors):
        table = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = table.astype(ml_dtypes.float8_e4m3fn)

    edit_tensors(folder, add)


@row(f"{UP} (3 values)", "NaN or infinite", "download")
def nan_weights(folder):
    @pytest.mark.catalogue("nan-weights")
    def spoil(tensors):
        tensors[UP][2, 5:8] = np.nan

    edit_tensors(folder, spoil)


@row(f"{UP} (1 value)", f"{NORM} (2 values)", "NaN or infinite", "download")
def infinite_weights_in_two_tensors(folder):
    @pytest.mark.catalogue("nan-weights")
    def spoil(tensors):
        tensors[UP][0, 0], tensors[NORM][:2] = np.inf, -np.inf

    edit_tensors(folder, spoil)


@row("model.embed_tokens.weight (1 value)", "NaN or infinite", tied=True)
def nan_in_a_tied_table_and_its_equal_head(folder):
    def spoil(tensors):
        tensors["model.embed_tokens.weight"][3, 3] = np.nan
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    edit_tensors(folder, spoil)


@pytest.mark.catalogue("pickle-only")
@row("pickled", "convert", check=open_folder)
def pickle_only(folder):
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


@pytest.mark.catalogue("pickle-only")
@row("pickled", "convert", check=open_folder)
def pickle_pth_only(folder):
    (folder / SINGLE).unlink()
    (folder / "consolidated.00.pth").write_bytes(b"\x80\x02}q\x00.")


@pytest.mark.catalogue("quantised")
@row("GGUF", "unquantised parent", check=open_folder)
def gguf_only(folder):
    (folder / SINGLE).unlink()
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF\x03\0\0\0")


@row("holds no weights", SINGLE, "download", check=open_folder)
def no_weights(folder):
    (folder / SINGLE).unlink()


@row("adapter", "merge it into its base", check=open_folder)
def adapter_only(folder):
    for path in folder.iterdir():
        path.unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 16}')
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    store(folder, {name: np.zeros((2, 24), "f4")}, "adapter_model.safetensors")


@pytest.mark.catalogue("quantised")
@row(UP, "F8_E4M3", "unquantised parent", check=open_folder)
def float8_tensor(folder):
    edit_tensors(
        folder, lambda tensors: tensors.update({UP: tensors[UP].astype(ml_dtypes.float8_e4m3fn)})
    )


@pytest.mark.catalogue("quantised")
@row(UP, "I32", "unquantised parent", check=open_folder)
def integer_tensor(folder):
    edit_tensors(folder, lambda tensors: tensors.update({UP: tensors[UP].astype(np.int32)}))


@row(UP, "F64", check=open_folder)
def float64_tensor(folder):
    edit_tensors(folder, lambda tensors: tensors.update({UP: tensors[UP].astype(np.float64)}))


@row(UP.replace("weight", "qweight"), "unexpected", UP, "is missing", check=open_folder)
def gptq_tensor_names(folder):
    @pytest.mark.catalogue("quantised")
    def rename(tensors):
        tensors[UP.replace("weight", "qweight")] = tensors.pop(UP).astype(np.int32)

    edit_tensors(folder, rename)
