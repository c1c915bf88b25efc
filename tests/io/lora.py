"""LoRA adapters as peft writes them, made and merged with numpy and the safetensors library alone.

Names, keys and scales were compared once with peft 0.21.2: its own folders load to the weights that
its ``merge_and_unload`` saves, bit for bit, and transformers' ``load_adapter`` agrees.
"""

import json
import math
import shutil

import numpy as np
import safetensors.numpy
from checkpoints import store

FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
#: What peft writes beside what a test says.
DEFAULTS = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None,
    "auto_mapping": None, "base_model_name_or_path": "owner/base", "bias": "none",
    "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 11, "lora_bias": False,
    "lora_dropout": 0.05, "megatron_config": None, "megatron_core": "megatron.core",
    "modules_to_save": None, "peft_type": "LORA", "peft_version": "0.21.2",
    "qalora_group_size": 16, "r": 3, "rank_pattern": {}, "revision": None,
    "target_parameters": None, "task_type": "CAUSAL_LM", "trainable_token_indices": None,
    "use_dora": False, "use_qalora": False, "use_rslora": False,
}  # fmt: skip


def whole(base):
    """All tensors of a checkpoint."""
    found = {}
    for file in sorted(base.glob("*.safetensors")):
        found |= safetensors.numpy.load_file(file)
    return found


def linear(base):
    """The modules of a checkpoint that are linear layers."""
    return [
        name.removesuffix(".weight")
        for name, tensor in whole(base).items()
        if tensor.ndim == 2 and "embed_tokens" not in name
    ]


def write(folder, base, modules, *, ranks=None, seed=5, dtype=np.float32, **config):
    """An adapter of the modules in a new folder; ``ranks`` are those that are not ``r``."""
    rng = np.random.default_rng(seed)
    config = DEFAULTS | {"target_modules": sorted({one.split(".")[-1] for one in modules})} | config
    shapes, tensors = whole(base), {}
    for module in modules:
        rank = (ranks or {}).get(module, config["r"])
        d_out, d_in = shapes[f"{module}.weight"].shape
        names = ("lora_A.weight", "lora_B.weight")
        if "embed_tokens" in module:
            d_out, d_in, names = d_in, d_out, ("lora_embedding_A", "lora_embedding_B")
        for name, shape in zip(names, ((rank, d_in), (d_out, rank)), strict=True):
            tensors[f"{PREFIX}{module}.{name}"] = (0.3 * rng.standard_normal(shape)).astype(dtype)
    folder.mkdir()
    store(folder, tensors, FILE)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return folder


def merge(out, base, lora, *, scales=None):
    """A copy of the base with the adapter merged in; ``scales`` are those that are not alpha/r."""
    out = shutil.copytree(base, out)
    config = json.loads((lora / "adapter_config.json").read_text())
    factors = safetensors.numpy.load_file(lora / FILE)
    for file in out.glob("*.safetensors"):
        tensors = safetensors.numpy.load_file(file)
        for name, tensor in tensors.items():
            module = name.removesuffix(".weight")
            a = factors.get(f"{PREFIX}{module}.lora_A.weight")
            b = factors.get(f"{PREFIX}{module}.lora_B.weight")
            if a is None:
                a = factors.get(f"{PREFIX}{module}.lora_embedding_A")
                b = factors.get(f"{PREFIX}{module}.lora_embedding_B")
            if a is None:
                continue
            root = math.sqrt(len(a)) if config["use_rslora"] else len(a)
            scale = (scales or {}).get(module, config["lora_alpha"] / root)
            change = scale * (b.astype(np.float64) @ a.astype(np.float64))
            change = change.T if "embed_tokens" in name else change
            tensors[name] = (tensor.astype(np.float64) + change).astype(np.float32)
        store(out, tensors, file.name)
    return out
