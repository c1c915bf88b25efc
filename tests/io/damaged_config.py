"""Damages to config.json, the index and links; rows of the same table as `damaged_weights`."""

import json
import shutil

import pytest
from checkpoints import INDEX, NORM, SINGLE, body, edit_config, index_only, store, write_index
from damaged_weights import ROWS, row

from ot_merge_jax.io.folder import open_folder

# ---- config.json ----


@pytest.mark.catalogue("broken-config")
@row("config.json", "is missing", check=open_folder)
def config_missing(folder):
    (folder / "config.json").unlink()


@pytest.mark.catalogue("broken-config")
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


@pytest.mark.catalogue("broken-config")
@row("config.json", "hidden_size must be an integer, not '64'", check=open_folder)
def config_number_as_text(folder):
    edit_config(folder, hidden_size="64")


@pytest.mark.catalogue("broken-config")
@row(
    "config.json", "hidden_size", "num_hidden_layers is missing", "rms_norm_eps", check=open_folder
)
def config_with_several_faults_lists_all(folder):
    edit_config(folder, hidden_size=-3, num_hidden_layers=..., rms_norm_eps="small")


@row("config.json", "unknown key 'hiden_size'", "did you mean 'hidden_size'", check=open_folder)
def config_misspelt_key(folder):
    edit_config(folder, hidden_size=..., hiden_size=24)


@row("config.json", "unknown key 'logit_softcapping'", check=open_folder)
def config_unknown_key(folder):
    edit_config(folder, logit_softcapping=30.0)


def _unsupported(model_type, *needles):
    @pytest.mark.catalogue("unsupported-architecture")
    @row(
        "config.json",
        repr(model_type),
        "supported are",
        "llama",
        "qwen2",
        *needles,
        check=open_folder,
    )
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


def _unsupported_by_its_keys(what, **keys):
    """A model of a name that nobody knows, and of a kind that its keys give away."""

    @pytest.mark.catalogue("unsupported-architecture")
    @row("config.json", repr(keys.get("model_type", "made_up")), what, check=open_folder)
    def damage(folder):
        edit_config(folder, **({"model_type": "made_up", "architectures": ["Other"]} | keys))

    ROWS[f"{what}_by_its_keys"] = ROWS.pop("damage")


_unsupported_by_its_keys("experts", n_routed_experts=64)
_unsupported_by_its_keys("vision", model_type="gemma3", vision_config={"depth": 2})
_unsupported_by_its_keys("state-space", state_size=16)
_unsupported_by_its_keys("two stacks", is_encoder_decoder=True)


@pytest.mark.catalogue("unsupported-architecture")
@row("config.json", "architectures", "LlamaForSequenceClassification", check=open_folder)
def other_head(folder):
    edit_config(folder, architectures=["LlamaForSequenceClassification"])


def _quantised(method, config):
    @pytest.mark.catalogue("quantised")
    @row("config.json", "quantised", method, "unquantised parent", check=open_folder)
    def damage(folder):
        edit_config(folder, quantization_config=config)

    ROWS[f"quantised_{method}"] = ROWS.pop("damage")


_quantised("bitsandbytes", {"quant_method": "bitsandbytes", "load_in_4bit": True})
_quantised("gptq", {"quant_method": "gptq", "bits": 4, "group_size": 128})
_quantised("awq", {"quant_method": "awq", "bits": 4, "zero_point": True})
_quantised("fp8", {"quant_method": "fp8", "activation_scheme": "dynamic"})
_quantised(
    "compressed-tensors", {"quant_method": "compressed-tensors", "format": "float-quantized"}
)


@row("config.json", "auto_map", "never run", check=open_folder)
def remote_code(folder):
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    (folder / "modeling_evil.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('marker').write_text('ran')\n"
    )


# ---- index.json ----


@row(INDEX, "not JSON", "download", check=open_folder)
def index_is_text(folder):
    index_only(folder)
    (folder / INDEX).write_text("hello")


@row(INDEX, "weight_map", "download", check=open_folder)
def index_without_map(folder):
    index_only(folder)
    (folder / INDEX).write_text('{"metadata": {}}')


@row(INDEX, "weight_map", "download", check=open_folder)
def index_with_empty_map(folder):
    index_only(folder)
    write_index(folder, {})


@row(INDEX, "larger than", check=open_folder)
def index_too_large(folder):
    index_only(folder)
    with (folder / INDEX).open("wb") as file:
        file.truncate(200_000_000)  # sparse


def _escaping(label, value, shown):
    @pytest.mark.catalogue("escaping-weight-map")
    @row(INDEX, shown, "inside the folder", check=open_folder)
    def damage(folder):
        store(folder.parent, body(folder), "outside.safetensors")
        (folder / "sub").mkdir()
        store(folder / "sub", body(folder))
        index_only(folder)
        write_index(folder, json.loads((folder / INDEX).read_text())["weight_map"] | {NORM: value})

    ROWS[f"weight_map_{label}"] = ROWS.pop("damage")


_escaping("parent", "../outside.safetensors", "'../outside.safetensors'")
_escaping("absolute", "/etc/outside.safetensors", "'/etc/outside.safetensors'")
_escaping("subfolder", "sub/model.safetensors", "'sub/model.safetensors'")
_escaping("backslash", "..\\outside.safetensors", "outside.safetensors")
_escaping("empty", "", "''")
_escaping("nul", "weights.safetensors\0.safetensors", "weights.safetensors")
_escaping("newline", "weights\n.safetensors", "weights")
_escaping("other_suffix", "pytorch_model.bin", "'pytorch_model.bin'")
_escaping("number", 7, "'7'")
_escaping("null", None, "None")
_escaping("list", ["weights.safetensors"], "weights.safetensors")
_escaping("very_long", "a" * 3_000_000 + ".safetensors", "aaaa")
_escaping("longer_than_a_file_name", "a" * 300 + ".safetensors", "aaaa")


@pytest.mark.catalogue("escaping-weight-map")
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


@pytest.mark.catalogue("links-and-devices")
@row(SINGLE, "link", check=open_folder)
def link_loop(folder):
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to(SINGLE)


@pytest.mark.catalogue("links-and-devices")
@row(SINGLE, "link", check=open_folder)
def dangling_link(folder):
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to("nowhere")
