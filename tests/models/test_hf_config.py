"""`ModelConfig` from ``config.json``: every key handled, known to be inert, or refused by name."""

import copy
import dataclasses
import json

import jax
import pytest

from ot_merge_jax.errors import InputError
from ot_merge_jax.models import families
from ot_merge_jax.models.config import ModelConfig, Rope
from ot_merge_jax.models.families import FAMILIES, read

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def refused(config):
    with pytest.raises(InputError) as caught:
        read(config, where="some/config.json")
    message = str(caught.value)
    assert message.startswith("some/config.json")
    assert "\n" not in message
    assert message.endswith(".")
    return message


# ---- what is read ----


def test_every_field(config_dict):
    assert read(config_dict("qwen2", tied=True, vocab_size=77, dtype="bfloat16")) == ModelConfig(
        family="qwen2",
        vocab_size=77,
        hidden_size=24,
        intermediate_size=40,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_positions=512,
        rms_norm_eps=1e-6,
        rope=Rope(1e6),
        tie_word_embeddings=True,
        qkv_bias=True,
        dtype="bfloat16",
    )


def test_families_differ_in_their_biases(config_dict):
    assert not read(config_dict("llama")).qkv_bias
    assert read(config_dict("qwen2")).qkv_bias


def test_config_is_hashable_and_equal_by_value(config_dict):
    first, again, other = (read(config_dict(kv_heads=heads)) for heads in (2, 2, 4))
    assert first is not again
    assert first == again
    assert hash(first) == hash(again)
    assert first != other
    assert len({first, again, other}) == 2


def test_config_is_frozen(config_dict):
    cfg = read(config_dict())
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.hidden_size = 3


def test_config_is_static_in_jit(config_dict):
    traces = []

    def double(x, cfg):
        traces.append(cfg)
        return x * cfg.hidden_size

    step = jax.jit(double, static_argnames="cfg")
    assert step(2, cfg=read(config_dict())) == 48
    assert step(3, cfg=read(config_dict())) == 72
    assert len(traces) == 1


def test_order_of_keys_does_not_matter(config_dict):
    config = config_dict()
    assert read(dict(reversed(config.items()))) == read(config)


def test_reading_does_not_change_the_dict(config_dict):
    config = config_dict(rope_parameters={"rope_theta": 1e4} | LLAMA3)
    before = copy.deepcopy(config)
    read(config)
    assert config == before


def test_head_dim_is_taken_and_not_computed(config_dict):
    assert read(config_dict(head_dim=10)).head_dim == 10


def test_absent_head_dim_follows_from_the_width(config_dict):
    assert read(config_dict(head_dim=None)).head_dim == 6


def test_absent_kv_heads_means_all(config_dict):
    assert read(config_dict(num_key_value_heads=None)).num_kv_heads == 4


def test_null_is_absent(config_dict):
    config = config_dict() | {
        "head_dim": None,
        "num_key_value_heads": None,
        "hidden_act": None,
        "rope_scaling": None,
    }
    cfg = read(config)
    assert (cfg.head_dim, cfg.num_kv_heads) == (6, 4)


def test_absent_tie_means_untied(config_dict):
    assert read(config_dict(tie_word_embeddings=None)).tie_word_embeddings is False


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": None, "torch_dtype": "float16"}, "float16"),
        ({"dtype": "float16", "torch_dtype": "float32"}, "float16"),
        ({"dtype": None}, "float32"),
    ],
)
def test_both_spellings_of_the_dtype(keys, expected, config_dict):
    assert read(config_dict(**keys)).dtype == expected


def test_integer_eps_and_theta_become_floats(config_dict):
    cfg = read(config_dict(rms_norm_eps=1, rope_parameters=None, rope_theta=10000))
    assert isinstance(cfg.rms_norm_eps, float)
    assert isinstance(cfg.rope.theta, float)


# ---- RoPE, new and old ----


ROPES = {
    "flat": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, Rope(5e5)),
    "flat-without-type": ({"rope_parameters": {"rope_theta": 5e5}}, Rope(5e5)),
    "old": ({"rope_theta": 5e5}, Rope(5e5)),
    "old-with-null": ({"rope_theta": 5e5, "rope_scaling": None}, Rope(5e5)),
    "both": (
        {
            "rope_theta": 5e5,
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        },
        Rope(5e5),
    ),
    "before-the-key": ({}, Rope(1e4)),
    "llama3": (
        {"rope_parameters": {"rope_theta": 5e5} | LLAMA3},
        Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192),
    ),
    "llama3-old": (
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192),
    ),
    "llama3-type": (
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}},
        Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192),
    ),
    "llama3-both": (
        {
            "rope_theta": 5e5,
            "rope_scaling": LLAMA3,
            "rope_parameters": {"rope_theta": 5e5} | LLAMA3,
        },
        Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192),
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_is_read(name, config_dict):
    keys, expected = ROPES[name]
    assert read(config_dict(rope_parameters=None) | keys).rope == expected


@pytest.mark.torch
@pytest.mark.parametrize("name", ROPES)
def test_rope_is_what_transformers_reads(name, config_dict):
    pytest.importorskip("torch")
    import transformers

    keys, expected = ROPES[name]
    config = config_dict(rope_parameters=None) | keys
    config = copy.deepcopy(config | {"max_position_embeddings": 131072})  # transformers changes it
    theirs = transformers.LlamaConfig(**config).rope_parameters
    assert theirs["rope_theta"] == expected.theta
    assert theirs["rope_type"] == expected.kind
    if expected.kind == "llama3":
        ours = (
            expected.factor,
            expected.low_freq_factor,
            expected.high_freq_factor,
            expected.original_positions,
        )
        assert tuple(theirs[key] for key in list(LLAMA3)[1:]) == ours


@pytest.mark.parametrize("kind", ["proportional", "su", 3])
def test_other_rope_is_refused(kind, config_dict):
    message = refused(
        config_dict(rope_parameters={"rope_type": kind, "rope_theta": 1e4, "factor": 2.0})
    )
    assert f"RoPE type {kind!r} is not supported" in message


def test_old_spelling_of_a_scaling(config_dict):
    config = config_dict(
        rope_parameters=None, rope_theta=1e4, rope_scaling={"type": "linear", "factor": 4.0}
    )
    assert read(config).rope == Rope(1e4, "linear", 4.0)


@pytest.mark.parametrize(
    ("kind", "key"), [("linear", "factor"), ("dynamic", "factor"), ("longrope", "long_factor")]
)
def test_incomplete_scaling_is_refused(kind, key, config_dict):
    message = refused(config_dict(rope_parameters={"rope_type": kind, "rope_theta": 1e4}))
    assert "missing" in message
    assert key in message


def test_yarn_without_its_old_context_stretches_the_declared_one(config_dict):
    settings = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    assert read(config_dict(rope_parameters=settings)).rope.original_positions == 512


@pytest.mark.parametrize("key", list(LLAMA3)[1:])
def test_incomplete_llama3_rope_is_refused(key, config_dict):
    rope = {"rope_theta": 1e4} | LLAMA3
    del rope[key]
    message = refused(config_dict(rope_parameters=rope))
    assert "missing" in message
    assert key in message


def test_unknown_rope_setting_is_refused(config_dict):
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    assert "partial_rotary_factor" in refused(config_dict(rope_parameters=rope))


def test_nested_rope_is_refused(config_dict):
    rope = {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e4}}
    assert "full_attention" in refused(config_dict(rope_parameters=rope))


@pytest.mark.parametrize(
    "value",
    [0, -1.0, float("nan"), float("inf"), "10000", True, [1e4], pytest.param(10**400, id="1e400")],
)
def test_bad_theta_is_refused(value, config_dict):
    message = refused(config_dict(rope_parameters={"rope_type": "default", "rope_theta": value}))
    assert "rope_theta must be a positive number" in message


def test_llama3_bands_in_the_wrong_order_are_refused(config_dict):
    rope = {"rope_theta": 1e4} | LLAMA3 | {"low_freq_factor": 4.0}
    assert "low_freq_factor" in refused(config_dict(rope_parameters=rope))


# ---- what is refused ----


NUMBERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", ["64", 2.5, True, [64], {}])
def test_ill_typed_number_is_refused(key, value, config_dict):
    assert f"{key} must be an integer, not {value!r}" in refused(config_dict() | {key: value})


@pytest.mark.parametrize("key", [*NUMBERS, "num_key_value_heads", "head_dim", "rms_norm_eps"])
@pytest.mark.parametrize("value", [0, -1])
def test_number_that_is_not_positive_is_refused(key, value, config_dict):
    assert f"{key} must be positive" in refused(config_dict() | {key: value})


@pytest.mark.parametrize("key", [*NUMBERS, "rms_norm_eps"])
def test_missing_number_is_refused(key, config_dict):
    config = config_dict()
    del config[key]
    assert f"{key} is missing" in refused(config)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1e-5", True])
def test_bad_eps_is_refused(value, config_dict):
    assert "rms_norm_eps must be" in refused(config_dict() | {"rms_norm_eps": value})


@pytest.mark.parametrize(
    ("changes", "needle"),
    [
        (
            {"num_key_value_heads": 3},
            "num_attention_heads 4 is not a multiple of num_key_value_heads 3",
        ),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        (
            {"hidden_size": 26, "head_dim": None},
            "hidden_size 26 is not a multiple of num_attention_heads 4",
        ),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, not 'yes'"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported for llama (only 'silu')"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder=True"),
        (
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "sliding_attention",
        ),
        ({"sliding_window": 4096}, "unknown key 'sliding_window'"),
    ],
)
def test_what_is_not_built_is_refused_for_llama(changes, needle, config_dict):
    config = config_dict() | changes
    assert needle in refused({key: value for key, value in config.items() if value is not None})


@pytest.mark.parametrize(
    ("changes", "needle"),
    [
        (
            {"use_sliding_window": True},
            "use_sliding_window=True is not supported for qwen2 (only False)",
        ),
        ({"use_mrope": True}, "use_mrope=True"),
        ({"attention_bias": False}, "unknown key 'attention_bias'"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_attention"),
    ],
)
def test_what_is_not_built_is_refused_for_qwen2(changes, needle, config_dict):
    assert needle in refused(config_dict("qwen2") | changes)


def test_uniform_layer_types_and_inert_windows_are_accepted(config_dict):
    config = config_dict("qwen2")
    more = {"layer_types": ["full_attention"] * 3, "sliding_window": 4096, "max_window_layers": 28}
    assert read(config | more | {"use_sliding_window": False, "use_mrope": False}) == read(config)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("num_hidden_layer", "num_hidden_layers"),
        ("rms_norm_epsilon", "rms_norm_eps"),
        ("tie_word_embedding", "tie_word_embeddings"),
    ],
)
def test_misspelt_key_gets_a_suggestion(wrong, right, config_dict):
    message = refused(config_dict(**{right: None}) | {wrong: 3})
    assert f"unknown key {wrong!r} (did you mean {right!r}?)" in message


def test_unknown_key_without_a_neighbour_gets_none(config_dict):
    message = refused(config_dict() | {"zzz": 3})
    assert "unknown key 'zzz'" in message
    assert "did you mean" not in message


def test_all_problems_are_listed_at_once(config_dict):
    config = config_dict() | {
        "hidden_size": "x",
        "logit_scale": 2.0,
        "mlp_bias": 3,
        "dtype": "int8",
    }
    del config["vocab_size"]
    message = refused(config)
    for needle in ("hidden_size", "logit_scale", "mlp_bias", "int8", "vocab_size is missing"):
        assert needle in message


def test_long_values_are_cut_in_the_message(config_dict):
    assert len(refused(config_dict() | {"hidden_size": "9" * 100_000})) < 400


@pytest.mark.parametrize(
    "key", ["_name_or_path", "transformers_version", "use_cache", "pad_token_id", "pretraining_tp"]
)
def test_inert_keys_change_nothing(key, config_dict):
    config = config_dict()
    assert read(config | {key: 1}) == read({k: v for k, v in config.items() if k != key})


# ---- whole kinds ----


@pytest.mark.torch  # transformers imports it
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_defaults_of_each_family_are_understood(family):
    """No key that transformers writes today is unknown to us."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(family).to_dict()
    config["architectures"] = [FAMILIES[family].architecture]
    cfg = read(json.loads(json.dumps(config)))
    assert cfg.family == family


@pytest.mark.parametrize("family", FAMILIES)
def test_row_of_the_table_is_filed_under_its_name(family):
    assert FAMILIES[family].model_type == family


def test_absent_architectures_are_accepted(config_dict):
    assert read(config_dict(architectures=None)).family == "llama"


@pytest.mark.parametrize(
    "value", [["LlamaModel"], ["LlamaForCausalLM", "Other"], "LlamaForCausalLM", {"a": 1}]
)
def test_other_architectures_are_refused(value, config_dict):
    assert "'LlamaForCausalLM'" in refused(config_dict() | {"architectures": value})


def test_reasons_name_real_model_types():
    """Each reason is found for a model type that contains its key, and none for a supported one."""
    for part in families._REASONS:
        with pytest.raises(InputError, match=r"\("):
            read({"model_type": f"x{part}x"})
        assert not any(part in family for family in FAMILIES)


def test_adapter_config_is_refused():
    assert "LORA adapter; merge it into its base" in refused({"peft_type": "LORA", "r": 8})
