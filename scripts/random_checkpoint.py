"""Random Hugging Face checkpoints of any size, written a layer at a time, for benchmarks.

The tokenizer is that of the demo's target: its tokens are a part of any larger vocabulary.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
import numpy as np

from ot_merge_jax.demo import assets
from ot_merge_jax.io import safetensors
from ot_merge_jax.models import families, specs

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def config(
    *, hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int
) -> dict[str, Any]:
    """The config.json of an untied Llama with heads of ``hidden / heads``."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "max_position_embeddings": 2048,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": vocabulary,
    }


def write(folder: Path, said: dict[str, Any], *, seed: int, dtype: str = "bfloat16") -> int:
    """Writes a checkpoint, one shard for each layer; returns its number of parameters.

    Args:
        folder: Does not exist yet.
        said: From `config`.
        seed: Of the weights, which are normal with the standard deviation ``1 / sqrt(d_in)``.
        dtype: Of the file.
    """
    folder.mkdir(parents=True)
    cfg = families.read(said, where="the benchmark")
    (folder / "config.json").write_text(json.dumps({**said, "torch_dtype": dtype}, indent=2))
    for name in _TOKENIZER:
        shutil.copyfile(assets.path("sibling") / name, folder / name)
    table, count = specs.param_specs(cfg), 0
    groups = [
        *([(one, l) for one in table if one.is_stacked] for l in range(cfg.num_layers)),
        *([(one, 0)] for one in table if not one.is_stacked),
    ]
    weight_map: dict[str, str] = {}
    rng = np.random.default_rng(seed)
    for index, group in enumerate(groups):
        shard = f"model-{index + 1:05}-of-{len(groups):05}.safetensors"
        tensors = {}
        for one, l in group:
            shape = one.tensor_shape()
            noise = rng.standard_normal(shape, np.float32) / shape[-1] ** 0.5
            tensor = 1 + noise if one.path.endswith("scale") else noise
            tensors[one.tensor_names()[l]] = tensor.astype(dtype)
            count += tensor.size
        safetensors.write(folder / shard, tensors)
        weight_map |= dict.fromkeys(tensors, shard)
    index = {"metadata": {"total_parameters": count}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return count
