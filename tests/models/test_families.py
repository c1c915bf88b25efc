"""What sets the families apart, each against torch: logits, rotations, written folders.

Sites are in ``test_capture.py``, tables and sizes in ``test_specs.py``.
"""

import json

import jax
import numpy as np
import pytest

from ot_merge_jax.errors import InputError
from ot_merge_jax.io.hf import load_hf, save_hf
from ot_merge_jax.models import decoder
from ot_merge_jax.models.config import LayerType
from ot_merge_jax.models.families import FAMILIES, read

pytestmark = pytest.mark.torch

_forward = jax.jit(decoder.forward, static_argnames=("cfg", "capture"))
CASES = [(family, tied, kv) for family in FAMILIES for tied in (False, True) for kv in (1, 2, 4)]


def theirs(model, batch):
    """Torch's logits."""
    import torch

    mask = np.asarray(batch.mask)
    positions = np.maximum(np.cumsum(mask, -1) - 1, 0)
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(np.asarray(batch.tokens), dtype=torch.long),
            attention_mask=torch.tensor(mask, dtype=torch.long),
            position_ids=torch.tensor(positions, dtype=torch.long),
            use_cache=False,
        ).logits.numpy()


@pytest.mark.parametrize(("family", "tied", "kv_heads"), CASES)
def test_logits_equal_torch(family, tied, kv_heads, torch_checkpoint, random_batch):
    folder, model = torch_checkpoint(family, tied=tied, kv_heads=kv_heads, layers=2)
    cfg, params = load_hf(folder)
    for padding in ("none", "left", "right"):
        batch = random_batch(cfg, padding=padding)
        expected = theirs(model, batch)
        ours = np.asarray(_forward(params, batch, cfg=cfg, capture=frozenset())[0])
        mask = np.asarray(batch.mask)
        assert np.abs(expected[mask]).max() > 0.1
        np.testing.assert_allclose(ours[mask], expected[mask], rtol=0, atol=1e-4)


ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    "yarn-all": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64,
        "beta_fast": 4.0, "beta_slow": 0.5, "mscale": 0.7, "mscale_all_dim": 0.3, "truncate": False,
    },
    "yarn-attention": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8,
        "attention_factor": 0.8,
    },
    "longrope-short": {
        "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 128,
        "short_factor": [1.0, 1.1, 1.3, 1.9], "long_factor": [2.0, 3.0, 4.0, 5.0],
    },
    "longrope-long": {
        "rope_type": "longrope", "original_max_position_embeddings": 4,
        "short_factor": [1.0, 1.1, 1.3, 1.9], "long_factor": [2.0, 3.0, 4.0, 5.0],
    },
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.5},
}  # fmt: skip
CASES_OF_ROPE = [
    (family, name)
    for name in ROPES
    for family in (
        ("phi3",)
        if name in ("partial", "longrope-short", "longrope-long")
        else ("llama", "smollm3")
    )
]


@pytest.mark.parametrize(("family", "name"), CASES_OF_ROPE)
def test_every_kind_of_rope(family, name, torch_checkpoint, random_batch):
    settings = {"rope_theta": 1e4, **ROPES[name]}
    more = {}
    if family == "phi3":  # Phi-3 keeps these two outside
        original = settings.pop("original_max_position_embeddings", 512)
        more = {"original_max_position_embeddings": original, "hidden": 32}
    folder, model = torch_checkpoint(family, layers=2, rope_parameters=settings, **more)
    cfg, params = load_hf(folder)
    assert cfg.rope.kind == settings["rope_type"]
    batch = random_batch(cfg, lengths=(11, 11))
    expected = theirs(model, batch)
    ours = np.asarray(_forward(params, batch, cfg=cfg, capture=frozenset())[0])
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)
    plain = torch_checkpoint(family, layers=2, **({"hidden": 32} if more else {}))[1]
    if name != "dynamic":  # which changes nothing within the context
        assert np.abs(theirs(plain, batch) - expected).max() > 1e-2


def test_longrope_goes_by_each_sequence_and_not_by_the_batch(torch_checkpoint, random_batch):
    """Torch takes the longest of the batch; alone, the short sequence has the short factors."""
    settings = {"rope_theta": 1e4, **ROPES["longrope-long"]}
    original = settings.pop("original_max_position_embeddings")
    folder, model = torch_checkpoint(
        "phi3", layers=2, rope_parameters=settings, hidden=32,
        original_max_position_embeddings=original,
    )  # fmt: skip
    cfg, params = load_hf(folder)
    batch = random_batch(cfg, padding="right", lengths=(11, 4))
    ours = np.asarray(_forward(params, batch, cfg=cfg, capture=frozenset())[0])
    alone = jax.tree.map(lambda leaf: leaf[1:, :4], batch)
    np.testing.assert_allclose(ours[1, :4], theirs(model, alone)[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_what_we_write(family, tiny_checkpoint, random_batch, tmp_path):
    """Ours -> files -> torch: the same logits, and no tensor is missing or left over."""
    import torch
    import transformers

    source = tiny_checkpoint(family, layers=2)
    cfg, params = load_hf(source)
    save_hf(tmp_path / "out", params, cfg=cfg, like=source)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        attn_implementation="eager",
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    batch = random_batch(cfg, padding="left")
    mask = np.asarray(batch.mask)
    ours = np.asarray(_forward(params, batch, cfg=cfg, capture=frozenset())[0])
    np.testing.assert_allclose(ours[mask], theirs(model.eval(), batch)[mask], rtol=0, atol=1e-4)


def kinds(config_dict, family, **keys):
    cfg = read(config_dict(family, **keys))
    return cfg, [(one.window, one.rope is not None) for one in cfg.layer_kinds()]


def test_patterns_of_layers(config_dict):
    assert kinds(config_dict, "llama")[0].pattern == ()
    assert kinds(config_dict, "mistral")[1] == [(5, True)] * 3
    assert kinds(config_dict, "mistral", sliding_window=None)[0].pattern == ()
    assert kinds(config_dict, "gemma2")[1] == [(5, True), (None, True), (5, True)]
    types = ["full_attention", "sliding_attention", "full_attention"]
    assert kinds(config_dict, "gemma2", layer_types=types)[1] == [
        (None, True),
        (5, True),
        (None, True),
    ]
    cfg, found = kinds(config_dict, "gemma3_text")
    assert found == [(5, True), (None, True), (5, True)]
    assert (cfg.pattern[0].rope.theta, cfg.pattern[1].rope.theta) == (1e4, 1e6)
    assert cfg.pattern[1] == LayerType(None, cfg.rope)
    assert kinds(config_dict, "smollm3")[1] == [(None, True), (None, False), (None, True)]
    assert kinds(config_dict, "smollm3", no_rope_layers=[1, 1, 1])[0].pattern == ()


def test_old_spelling_of_gemma3(config_dict):
    """As its first release wrote the rotary settings, and as transformers 5 writes them."""
    new = read(config_dict("gemma3_text"))
    old = config_dict(
        "gemma3_text", rope_parameters=None, rope_theta=1e6, rope_local_base_freq=1e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )  # fmt: skip
    assert read(old) == new


def test_what_a_file_leaves_out_is_what_transformers_assumes(config_dict):
    """Defaults of transformers that are not the plain ones."""
    for family in FAMILIES:
        files = config_dict(family)
        assert files.pop("tie_word_embeddings") is False
        files.pop("head_dim")
        assert read(files).tie_word_embeddings == (family in ("gemma2", "gemma3_text", "smollm3"))
        assert read(files).head_dim == {"qwen3": 128, "gemma2": 256, "gemma3_text": 256}.get(
            family, 6
        )


@pytest.mark.parametrize(
    ("family", "keys", "words"),
    [
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"layer_types": ["full_attention"]}, "names 1 layers"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ("gemma2", {"hidden_activation": "relu"}, "hidden_activation"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma3_text", {"rope_parameters": {"full_attention": 3}}, "must hold objects"),
        ("llama", {"attention_bias": "yes"}, "attention_bias must be true or false"),
        ("llama", {"sliding_window": 5}, "unknown key 'sliding_window'"),
        ("llama", {"layer_types": ["sliding_attention"] * 3}, "only full_attention"),
        ("granite", {"logits_scaling": 0}, "logits_scaling must be positive"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "list of 3 zeros and ones"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0],
          "long_factor": [1.0]}}, "list of 4 positive numbers"),
        ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "missing"),
        ("llama", {"rope_parameters": {"rope_type": "3d", "rope_theta": 1e4}}, "only default"),
        ("mistral", {"sliding_window": -1}, "sliding_window must be positive"),
    ],
)  # fmt: skip
def test_refused_by_name(family, keys, words, config_dict):
    with pytest.raises(InputError) as caught:
        read(config_dict(family, **keys))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_remote_code_is_ignored_only_where_we_are_the_code(config_dict):
    code = {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
    assert read(config_dict("phi3", **code)).family == "phi3"
    with pytest.raises(InputError, match="remote code"):
        read(config_dict("llama", **code))


def test_fused_tensors_are_split_where_torch_splits_them(tiny_checkpoint):
    """q, k, v and gate, up lie under each other in the file."""
    import safetensors.numpy

    folder = tiny_checkpoint("phi3", kv_heads=1)
    _, params = load_hf(folder)
    assert json.loads((folder / "config.json").read_text())["num_key_value_heads"] == 1
    file = safetensors.numpy.load_file(folder / "model.safetensors")
    fused = file["model.layers.1.self_attn.qkv_proj.weight"]
    attention = params["layers"]["self_attn"]
    parts = [np.asarray(attention[f"{name}_proj"]["kernel"][1]).T for name in "qkv"]
    assert [len(part) for part in parts] == [32, 8, 8]
    np.testing.assert_array_equal(np.concatenate(parts), fused)
