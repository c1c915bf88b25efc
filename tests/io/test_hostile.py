"""One row for each kind of bad folder: refused with `InputError`, named, with advice, and nothing left behind."""

import hashlib
import json
import os
import re
import shutil
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ot_merge_jax.errors import InputError
from ot_merge_jax.io import safetensors as files
from ot_merge_jax.io.folder import open_folder, resolve
from ot_merge_jax.io.hf import load_hf

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"

#: Every message must tell the reader what to do next.
ADVICE = re.compile(r"download|git lfs pull|use the unquantised parent|convert|merge it into|mend|supported|give the folder|must|is missing|corrupt|is not|twice|did you mean")  # fmt: skip


def snapshot(folder):
    """Everything in a folder: names, kinds and contents."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = path.stat().st_mode
    return found


def body(folder):
    return dict(safetensors.numpy.load_file(folder / SINGLE))


def store(folder, tensors, name=SINGLE):
    safetensors.numpy.save_file(tensors, folder / name, metadata={"format": "pt"})


def edit_tensors(folder, change):
    tensors = body(folder)
    change(tensors)
    store(folder, tensors)


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def split_header(path):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return raw[8 : 8 + length], raw[8 + length :]


def join_header(path, text, data):
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit_header(folder, change):
    text, data = split_header(folder / SINGLE)
    header = json.loads(text)
    change(header)
    join_header(folder / SINGLE, json.dumps(header).encode(), data)


def shard(folder, parts):
    """Replaces the single file by shards ``{file: [tensor names]}`` and an honest index."""
    tensors = body(folder)
    (folder / SINGLE).unlink()
    for name, chosen in parts.items():
        store(folder, {key: tensors[key] for key in chosen}, name)
    write_index(folder, {key: name for name, chosen in parts.items() for key in chosen})


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def halves(folder):
    names = sorted(body(folder))
    first, second = names[::2], names[1::2]
    return {"model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": second}


ROWS = {}


def row(*needles, check=load_hf, **config):
    """Registers a damage: ``needles`` must all occur in the message."""

    def register(damage):
        ROWS[damage.__name__] = (damage, needles, check, config)
        return damage

    return register


# ---------------------------------------------------------------------------------------- damaged files


def _truncated(offset):
    @row(SINGLE, "bytes", "download", check=open_folder)
    def damage(folder):
        raw = (folder / SINGLE).read_bytes()
        (folder / SINGLE).write_bytes(raw[:offset] if offset >= 0 else raw[:offset])

    ROWS[f"truncated_at_{offset}"] = ROWS.pop("damage")


for _offset in (1, 7, 8, 9, 100, -1, -4, -5000):
    _truncated(_offset)


@row(SINGLE, "0 bytes", "download", check=open_folder)
def empty_file(folder):
    (folder / SINGLE).write_bytes(b"")


@row(SINGLE, "bytes", "download", check=open_folder)
def trailing_bytes(folder):
    with (folder / SINGLE).open("ab") as file:
        file.write(b"\0" * 4)


@row(SINGLE, "Git LFS pointer", "git lfs pull", check=open_folder)
def lfs_pointer(folder):
    (folder / SINGLE).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2471645608\n"
    )


@row(SINGLE, "web page", "download", check=open_folder)
def html_page(folder):
    (folder / SINGLE).write_text("<!DOCTYPE html><html><body>Access restricted</body></html>")


@row(SINGLE, "download", check=open_folder)
def html_page_after_a_newline(folder):
    (folder / SINGLE).write_text("\n  <html><body>Access restricted</body></html>")


@row(SINGLE, "download", check=open_folder)
def huge_header_length(folder):
    (folder / SINGLE).write_bytes((2**62).to_bytes(8, "little") + b"{}")


@row(SINGLE, "corrupt", check=open_folder)
def header_not_json(folder):
    text, data = split_header(folder / SINGLE)
    join_header(folder / SINGLE, b"?" + text[1:], data)


@row(SINGLE, "corrupt", check=open_folder)
def header_not_utf8(folder):
    text, data = split_header(folder / SINGLE)
    join_header(folder / SINGLE, text.replace(b"norm", b"\xff\xfe\xfd\xfc", 1), data)


@row(SINGLE, "corrupt", check=open_folder)
def header_deeply_nested(folder):
    join_header(folder / SINGLE, b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b"")


@row(SINGLE, repr(NORM), "twice", check=open_folder)
def duplicate_header_key(folder):
    text, data = split_header(folder / SINGLE)
    entry = re.search(rb'"model\.norm\.weight":\{[^}]*\}', text)[0]
    join_header(folder / SINGLE, text.rstrip()[:-1] + b"," + entry + b"}", data)


@row(SINGLE, "download", check=open_folder)
def overlapping_tensors(folder):
    def overlap(header):
        header[NORM]["data_offsets"] = header["model.layers.0.input_layernorm.weight"]["data_offsets"]

    edit_header(folder, overlap)


@row(SINGLE, "download", check=open_folder)
def offsets_reversed(folder):
    edit_header(folder, lambda header: header[NORM]["data_offsets"].reverse())


@row(SINGLE, "download", check=open_folder)
def size_against_shape(folder):
    def shrink(header):
        header[NORM]["shape"] = [23]

    edit_header(folder, shrink)


@row(SINGLE, "download", check=open_folder)
def unknown_dtype(folder):
    def rename(header):
        header[NORM]["dtype"] = "F33"

    edit_header(folder, rename)


@row("model.embed_tokens.weight is missing", UP, check=open_folder)
def file_without_tensors(folder):
    store(folder, {})


@row("model.embed_tokens.weight is missing", check=open_folder)
def shard_without_tensors(folder):
    shard(folder, halves(folder))
    store(folder, {}, "model-00001-of-00002.safetensors")
    store(folder, {}, "model-00002-of-00002.safetensors")


@row(SINGLE, "not a regular file", check=open_folder)
def fifo_as_weights(folder):
    (folder / SINGLE).unlink()
    os.mkfifo(folder / SINGLE)


@row(SINGLE, "not a regular file", check=open_folder)
def folder_as_weights(folder):
    (folder / SINGLE).unlink()
    (folder / SINGLE).mkdir()


# ---------------------------------------------------------------------------------------- files and tensors


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


@row(NORM, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", check=open_folder)
def tensor_in_two_files(folder):
    norm = body(folder)[NORM]
    shard(folder, halves(folder))
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        store(folder, dict(safetensors.numpy.load_file(folder / name)) | {NORM: norm}, name)


@row(NORM, "the index says model-00001-of-00002.safetensors", check=open_folder)
def tensor_in_another_shard_than_the_index_says(folder):
    norm = body(folder)[NORM]
    shard(folder, halves(folder))
    tensors = [dict(safetensors.numpy.load_file(folder / name)) for name in sorted(p.name for p in folder.glob("*.safetensors"))]  # fmt: skip
    for part in tensors:
        part.pop(NORM, None)
    tensors[1][NORM] = norm
    for name, part in zip(("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), tensors, strict=True):  # fmt: skip
        store(folder, part, name)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    write_index(folder, index | {NORM: "model-00001-of-00002.safetensors"})


@row(UP, "is missing", check=open_folder)
def missing_tensor(folder):
    edit_tensors(folder, lambda tensors: tensors.pop(UP))


@row("model.layers.1.mlp.up_proj.bias", "unexpected", check=open_folder)
def extra_tensor(folder):
    edit_tensors(folder, lambda tensors: tensors.update({UP.replace("weight", "bias"): np.zeros(40, "f4")}))


@row("model.layers.3.input_layernorm.weight", "unexpected", check=open_folder)
def extra_layer(folder):
    name = "model.layers.{}.input_layernorm.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name.format(3): tensors[name.format(2)]}))


@row(UP, "[24, 40]", "[40, 24]", check=open_folder)
def transposed_tensor(folder):
    edit_tensors(folder, lambda tensors: tensors.update({UP: np.ascontiguousarray(tensors[UP].T)}))


@row(UP, NORM, "[28]", check=open_folder)
def shapes_against_the_config(folder):
    edit_config(folder, hidden_size=28)


@row("model.layers.3.mlp.up_proj.weight is missing", check=open_folder)
def fewer_layers_than_the_config(folder):
    edit_config(folder, num_hidden_layers=4)


@row("lm_head.weight is missing", "tie_word_embeddings is false", check=open_folder)
def untied_without_head(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))


@row("lm_head.weight", "tie_word_embeddings", "mend", tied=True)
def tied_with_another_head(folder):
    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + np.float32(1e-3)

    edit_tensors(folder, add)


@row("lm_head.weight", "tie_word_embeddings", "mend", tied=True)
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
    def spoil(tensors):
        tensors[UP][2, 5:8] = np.nan

    edit_tensors(folder, spoil)


@row(f"{UP} (1 values)", f"{NORM} (2 values)", "NaN or infinite", "download")
def infinite_weights_in_two_tensors(folder):
    def spoil(tensors):
        tensors[UP][0, 0], tensors[NORM][:2] = np.inf, -np.inf

    edit_tensors(folder, spoil)


@row("model.embed_tokens.weight (1 values)", "NaN or infinite", tied=True)
def nan_in_a_tied_table_and_its_equal_head(folder):
    def spoil(tensors):
        tensors["model.embed_tokens.weight"][3, 3] = np.nan
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    edit_tensors(folder, spoil)


@row("pickled", "convert", check=open_folder)
def pickle_only(folder):
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


@row("pickled", "convert", check=open_folder)
def pickle_pth_only(folder):
    (folder / SINGLE).unlink()
    (folder / "consolidated.00.pth").write_bytes(b"\x80\x02}q\x00.")


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
    store(folder, {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": np.zeros((2, 24), "f4")}, "adapter_model.safetensors")  # fmt: skip


# ---------------------------------------------------------------------------------------- config.json


@row("config.json", "is missing", check=open_folder)
def config_missing(folder):
    (folder / "config.json").unlink()


@row("config.json", "not JSON", "download", check=open_folder)
def config_is_text(folder):
    (folder / "config.json").write_text("hello")


@row("config.json", "not JSON", "download", check=open_folder)
def config_is_binary(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00{")


@row("config.json", "not JSON", "download", check=open_folder)
def config_deeply_nested(folder):
    (folder / "config.json").write_text("[" * 100_000)


@row("config.json", "not a JSON object", "download", check=open_folder)
def config_is_a_list(folder):
    (folder / "config.json").write_text("[1, 2]")


@row("config.json", "larger than", check=open_folder)
def config_too_large(folder):
    with (folder / "config.json").open("r+b") as file:
        file.truncate(10_000_000)


@row("config.json", "hidden_size must be an integer, not '64'", check=open_folder)
def config_number_as_text(folder):
    edit_config(folder, hidden_size="64")


@row("config.json", "hidden_size", "num_hidden_layers is missing", "rms_norm_eps", check=open_folder)
def config_with_several_faults_lists_all(folder):
    edit_config(folder, hidden_size=-3, num_hidden_layers=..., rms_norm_eps="small")


@row("config.json", "unknown key 'hiden_size'", "did you mean 'hidden_size'", check=open_folder)
def config_misspelt_key(folder):
    edit_config(folder, hidden_size=..., hiden_size=24)


@row("config.json", "unknown key 'logit_softcapping'", check=open_folder)
def config_unknown_key(folder):
    edit_config(folder, logit_softcapping=30.0)


def _unsupported(model_type, *needles):
    @row("config.json", repr(model_type), "supported are", "llama", "qwen2", *needles, check=open_folder)
    def damage(folder):
        edit_config(folder, model_type=model_type, architectures=["Other"])

    ROWS[f"model_type_{model_type}"] = ROWS.pop("damage")


_unsupported("mamba", "state-space")
_unsupported("mixtral", "experts")
_unsupported("qwen2_moe", "experts")
_unsupported("t5", "two stacks")
_unsupported("bert", "predict no next token")
_unsupported("qwen2_vl", "vision")
_unsupported("llamma", "nearest: llama")
_unsupported("made-up-9000")
_unsupported(None)
_unsupported(17)


@row("config.json", "model_type", "supported are", check=open_folder)
def model_type_is_a_list(folder):
    edit_config(folder, model_type=["llama"])


@row("config.json", "architectures", "LlamaForSequenceClassification", check=open_folder)
def other_head(folder):
    edit_config(folder, architectures=["LlamaForSequenceClassification"])


def _quantised(method, config):
    @row("config.json", "quantised", method, "unquantised parent", check=open_folder)
    def damage(folder):
        edit_config(folder, quantization_config=config)

    ROWS[f"quantised_{method}"] = ROWS.pop("damage")


_quantised("bitsandbytes", {"quant_method": "bitsandbytes", "load_in_4bit": True})
_quantised("gptq", {"quant_method": "gptq", "bits": 4, "group_size": 128})
_quantised("awq", {"quant_method": "awq", "bits": 4, "zero_point": True})
_quantised("fp8", {"quant_method": "fp8", "activation_scheme": "dynamic"})
_quantised("compressed-tensors", {"quant_method": "compressed-tensors", "format": "float-quantized"})


@row(UP, "F8_E4M3", "unquantised parent", check=open_folder)
def float8_tensor(folder):
    edit_tensors(folder, lambda tensors: tensors.update({UP: tensors[UP].astype(ml_dtypes.float8_e4m3fn)}))


@row(UP, "I32", "unquantised parent", check=open_folder)
def integer_tensor(folder):
    edit_tensors(folder, lambda tensors: tensors.update({UP: tensors[UP].astype(np.int32)}))


@row(UP, "F64", check=open_folder)
def float64_tensor(folder):
    edit_tensors(folder, lambda tensors: tensors.update({UP: tensors[UP].astype(np.float64)}))


@row(UP.replace("weight", "qweight"), "unexpected", UP, "is missing", check=open_folder)
def gptq_tensor_names(folder):
    def rename(tensors):
        tensors[UP.replace("weight", "qweight")] = tensors.pop(UP).astype(np.int32)

    edit_tensors(folder, rename)


@row("config.json", "auto_map", "never run", check=open_folder)
def remote_code(folder):
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    (folder / "modeling_evil.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('marker').write_text('ran')\n"
    )


# ---------------------------------------------------------------------------------------- index.json


@row(INDEX, "not JSON", "download", check=open_folder)
def index_is_text(folder):
    (folder / INDEX).write_text("hello")


@row(INDEX, "weight_map", "download", check=open_folder)
def index_without_map(folder):
    (folder / INDEX).write_text('{"metadata": {}}')


@row(INDEX, "weight_map", "download", check=open_folder)
def index_with_empty_map(folder):
    write_index(folder, {})


@row(INDEX, "larger than", check=open_folder)
def index_too_large(folder):
    with (folder / INDEX).open("wb") as file:
        file.truncate(200_000_000)  # sparse


def _escaping(label, value, shown):
    @row(INDEX, shown, "inside the folder", check=open_folder)
    def damage(folder):
        store(folder.parent, body(folder), "outside.safetensors")
        (folder / "sub").mkdir()
        store(folder / "sub", body(folder))
        write_index(folder, dict.fromkeys(body(folder), SINGLE) | {NORM: value})

    ROWS[f"weight_map_{label}"] = ROWS.pop("damage")


_escaping("parent", "../outside.safetensors", "'../outside.safetensors'")
_escaping("absolute", "/etc/outside.safetensors", "'/etc/outside.safetensors'")
_escaping("subfolder", "sub/model.safetensors", "'sub/model.safetensors'")
_escaping("backslash", "..\\outside.safetensors", "outside.safetensors")
_escaping("empty", "", "''")
_escaping("nul", "model.safetensors\0.safetensors", "model.safetensors")
_escaping("newline", "model\n.safetensors", "model")
_escaping("other_suffix", "pytorch_model.bin", "'pytorch_model.bin'")
_escaping("number", 7, "'7'")
_escaping("null", None, "None")
_escaping("list", ["model.safetensors"], "model.safetensors")
_escaping("very_long", "a" * 3_000_000 + ".safetensors", "aaaa")
_escaping("longer_than_a_file_name", "a" * 300 + ".safetensors", "aaaa")


@row("shard.safetensors", "leaves the folder", check=open_folder)
def link_out_of_the_folder(folder):
    tensors = body(folder)
    (folder / SINGLE).unlink()
    store(folder.parent, tensors, "outside.safetensors")
    (folder / "shard.safetensors").symlink_to("../outside.safetensors")
    write_index(folder, dict.fromkeys(tensors, "shard.safetensors"))


@row(SINGLE, "leaves the folder", check=open_folder)
def single_file_links_out_of_the_folder(folder):
    shutil.move(folder / SINGLE, folder.parent / "outside.safetensors")
    (folder / SINGLE).symlink_to(folder.parent / "outside.safetensors")


@row(SINGLE, "link", check=open_folder)
def link_loop(folder):
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to(SINGLE)


@row(SINGLE, "link", check=open_folder)
def dangling_link(folder):
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to("nowhere")


# ---------------------------------------------------------------------------------------- the test


@pytest.fixture
def victim(tiny_checkpoint, writable_copy):
    return lambda **config: writable_copy(tiny_checkpoint(**config))


@pytest.mark.parametrize("name", ROWS)
def test_bad_folder_is_refused(name, victim):
    damage, needles, check, config = ROWS[name]
    folder = victim(**config)
    damage(folder)
    before = snapshot(folder.parent)
    with pytest.raises(InputError) as caught:
        check(folder)
    message = str(caught.value)
    assert type(caught.value) is InputError
    for needle in needles:
        assert needle in message
    assert str(folder) in message or folder.name in message
    assert ADVICE.search(message)
    assert len(message) < 6000
    assert snapshot(folder.parent) == before


@pytest.mark.parametrize("name", ROWS)
def test_bad_folder_is_refused_when_loading_too(name, victim):
    """`load_hf` is the door everyone uses; a header fault must not become another exception there."""
    damage, _, _, config = ROWS[name]
    folder = victim(**config)
    damage(folder)
    with pytest.raises(InputError):
        load_hf(folder)


def test_undamaged_folder_is_accepted(victim):
    """Or every row above would pass for another reason."""
    for config in ({}, {"tied": True}):
        shutil.rmtree(victim(**config))


# ---------------------------------------------------------------------------------------- accepted on purpose


def test_tied_with_an_equal_head_is_accepted(victim):
    folder = victim(tied=True)
    edit_tensors(
        folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].copy()})
    )
    cfg, params = load_hf(folder)
    assert cfg.tie_word_embeddings
    assert "lm_head" not in params


def test_old_rotary_buffers_are_ignored(victim):
    folder = victim()
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda tensors: tensors.update({name: np.ones(4, "f4")}))
    _, params = load_hf(folder)
    assert "rotary_emb" not in params["layers"]["self_attn"]


def test_link_inside_the_folder_is_accepted(victim):
    folder = victim()
    (folder / SINGLE).rename(folder / "real.safetensors")
    (folder / SINGLE).symlink_to("real.safetensors")
    load_hf(folder)


def test_folder_reached_through_a_link_is_accepted(victim, tmp_path):
    folder = victim()
    (tmp_path / "alias").symlink_to(folder)
    load_hf(tmp_path / "alias")


def test_header_whose_length_looks_like_html_is_accepted(victim):
    """A length of 60 modulo 256 starts with '<'; the format does not forbid it."""
    folder = victim()
    text, data = split_header(folder / SINGLE)
    text = text.rstrip()
    text += b" " * ((60 - len(text)) % 256)
    join_header(folder / SINGLE, text, data)
    assert (folder / SINGLE).read_bytes()[:1] == b"<"
    load_hf(folder)


def test_null_quantisation_and_auto_map_are_accepted(victim):
    folder = victim()
    edit_config(folder, quantization_config=None, auto_map=None)
    load_hf(folder)


def test_weights_in_the_file_transformers_would_take(victim):
    """Both a single file and an index: transformers reads the single file."""
    folder = victim()
    tensors = body(folder)
    store(folder, {name: value + 1 for name, value in tensors.items()}, "shard.safetensors")
    write_index(folder, dict.fromkeys(tensors, "shard.safetensors"))
    _, params = load_hf(folder)
    np.testing.assert_array_equal(params["norm"]["scale"], tensors[NORM])


# ---------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("name", ["gpt2", "meta-llama/Llama-3.2-1B", "no/such/folder", ""])
def test_path_that_does_not_exist_is_never_a_hub_id(name, tmp_path, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("asked the hub")

    monkeypatch.setattr("ot_merge_jax.io.folder.snapshot_download", forbidden)
    monkeypatch.chdir(tmp_path)
    where = name or str(tmp_path / "nothing")
    for check in (load_hf, open_folder, resolve):
        with pytest.raises(InputError, match=f"no directory {re.escape(where)}"):
            check(where)


def test_file_in_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "model").write_text("x")
    with pytest.raises(InputError, match="no directory"):
        load_hf(tmp_path / "model")


def test_hub_failure_is_an_input_error_of_one_line(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("long trace\nwith hf_secretToken")

    monkeypatch.setattr("ot_merge_jax.io.folder.snapshot_download", fail)
    with pytest.raises(InputError, match=r"some/model at revision main") as caught:
        load_hf("some/model", revision="main")
    assert "\n" not in str(caught.value)
    assert "hf_secret" not in str(caught.value)


def test_hub_id_with_a_revision_asks_for_that_revision_without_pickles(victim, monkeypatch):
    asked = {}

    def answer(name, *, revision, allow_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(folder)

    folder = victim()
    monkeypatch.setattr("ot_merge_jax.io.folder.snapshot_download", answer)
    load_hf("some/model", revision="v1.2")
    assert (asked["name"], asked["revision"]) == ("some/model", "v1.2")
    assert not {"*", "*.bin", "*.pt", "*.py"} & set(asked["patterns"])


def test_nothing_is_imported_from_the_folder(victim):
    folder = victim()
    remote_code(folder)
    before = set(sys.modules)
    with pytest.raises(InputError):
        load_hf(folder)
    assert not {name for name in set(sys.modules) - before if "evil" in name}
    assert not (folder / "marker").exists()


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "generation_config.json"])
def test_sidecar_that_links_out_of_the_folder_is_not_copied_into_the_output(name, victim, tmp_path):
    """A downloaded folder could otherwise publish any file of this machine."""
    from ot_merge_jax.io.hf import save_hf

    folder = victim()
    secret = tmp_path / "secret"
    secret.write_text("private key")
    (folder / name).unlink()
    (folder / name).symlink_to(secret)
    with pytest.raises(InputError, match=re.escape(name)):
        cfg, params = load_hf(folder)
        save_hf(tmp_path / "out", params, cfg=cfg, like=folder)
    assert not (tmp_path / "out").exists()


def test_many_duplicate_names_are_refused_quickly(tmp_path):
    """The duplicate check must not be quadratic: a hostile header has room for a million names."""
    import time

    entry = b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = b"{" + b",".join(entry % (i % 100_000) for i in range(100_001)) + b"}"
    join_header(tmp_path / SINGLE, text, b"")
    start = time.process_time()
    with pytest.raises(InputError, match="'t0' twice"):
        files.read_header(tmp_path / SINGLE)
    assert time.process_time() - start < 10


@pytest.mark.parametrize("value", [10**9, 10**400, 2**63])
@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "num_attention_heads"])
def test_absurd_size_is_refused_without_building_it(key, value, victim):
    folder = victim()
    edit_config(folder, **{key: value})
    with pytest.raises(InputError, match=key if key == "num_hidden_layers" else ""):
        open_folder(folder)


# ---------------------------------------------------------------------------------------- any bytes

_SETTINGS = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}


@pytest.fixture
def one_layer(tiny_checkpoint, writable_copy):
    return writable_copy(tiny_checkpoint(layers=1, hidden=6, heads=2, head_dim=4, intermediate=5))


def accepts_or_refuses(folder):
    """Success or InputError; anything else is a traceback for the user and fails the test."""
    try:
        load_hf(folder)
    except InputError as error:
        assert str(error)
        return False
    return True


@given(data=st.data())
@settings(max_examples=150, **_SETTINGS)
def test_header_bytes_mutated(one_layer, tiny_checkpoint, data):
    """Any bytes of the header replaced, inserted or removed, with and without mending the length."""
    original = tiny_checkpoint(layers=1, hidden=6, heads=2, head_dim=4, intermediate=5) / SINGLE
    text, rest = split_header(original)
    start = data.draw(st.integers(0, len(text)))
    removed = data.draw(st.integers(0, 12))
    inserted = data.draw(st.binary(max_size=12))
    changed = text[:start] + inserted + text[start + removed :]
    length = len(changed) if data.draw(st.booleans()) else data.draw(st.integers(0, 2**64 - 1))
    (one_layer / SINGLE).write_bytes(length.to_bytes(8, "little") + changed + rest)
    accepts_or_refuses(one_layer)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
@settings(max_examples=150, **_SETTINGS)
def test_header_fields_mutated(one_layer, tiny_checkpoint, data):
    """Valid JSON, wrong content: one field of one tensor is any JSON value."""
    original = tiny_checkpoint(layers=1, hidden=6, heads=2, head_dim=4, intermediate=5) / SINGLE
    text, rest = split_header(original)
    header = json.loads(text)
    name = data.draw(st.sampled_from(sorted(header)))
    value = data.draw(_JSON)
    if name == "__metadata__" or data.draw(st.booleans()):
        header[name] = value
    else:
        header[name][data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = value
    join_header(one_layer / SINGLE, json.dumps(header).encode(), rest)
    accepts_or_refuses(one_layer)


@given(key=st.sampled_from(["hidden_size", "num_hidden_layers", "head_dim", "rope_parameters", "rope_scaling",
       "rope_theta", "layer_types", "architectures", "model_type", "dtype", "torch_dtype", "tie_word_embeddings",
       "rms_norm_eps", "vocab_size", "num_key_value_heads", "num_attention_heads", "quantization_config",
       "auto_map", "hidden_act", "attention_bias", "max_position_embeddings", "bos_token_id"]), value=_JSON)  # fmt: skip
@settings(max_examples=200, **_SETTINGS)
@example(key="model_type", value=["llama"])
@example(key="model_type", value={})
@example(key="layer_types", value=3)
@example(key="layer_types", value=[["full_attention"]])
@example(key="layer_types", value=[None, "x"])
@example(key="rope_scaling", value=4.0)
@example(key="rope_scaling", value="linear")
@example(key="rope_parameters", value=[1])
@example(key="rope_parameters", value={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 2.0, "original_max_position_embeddings": 64})  # fmt: skip
@example(key="rope_parameters", value={"rope_type": ["default"]})
@example(key="rope_parameters", value={"rope_theta": None})
@example(key="dtype", value=["float32"])
@example(key="vocab_size", value=10**400)
@example(key="rms_norm_eps", value=10**400)
@example(key="rope_theta", value=10**400)
@example(key="num_attention_heads", value=0)
def test_config_values_mutated(one_layer, tiny_checkpoint, key, value):
    original = tiny_checkpoint(layers=1, hidden=6, heads=2, head_dim=4, intermediate=5) / "config.json"
    config = json.loads(original.read_text())
    config[key] = value
    (one_layer / "config.json").write_text(json.dumps(config))
    accepts_or_refuses(one_layer)


@given(weight_map=st.dictionaries(st.sampled_from([NORM, "x", "lm_head.weight"]) | st.text(max_size=5), _JSON | st.sampled_from([SINGLE, "config.json", ".", "..", "~.safetensors", "model.safetensors/"]), max_size=4))  # fmt: skip
@settings(max_examples=100, **_SETTINGS)
def test_weight_map_mutated(one_layer, weight_map):
    write_index(one_layer, weight_map)
    accepts_or_refuses(one_layer)
