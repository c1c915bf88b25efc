"""Every module, every layer and the logits against torch transformers (eager, float32).

Modules get the very input torch's module got, so an error shows where it is made. Only real tokens
are compared: what a padded position holds means nothing.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ot_merge_jax.io.hf import load_hf
from ot_merge_jax.models import decoder, layers
from ot_merge_jax.models import rope as rotary
from ot_merge_jax.models.config import ModelConfig, Rope
from ot_merge_jax.types import Batch

pytestmark = pytest.mark.torch

MODULE, LOGITS = 1e-5, 1e-4
PADDINGS = ("none", "left", "right")
CASES = [
    (family, tied, kv_heads)
    for family in ("llama", "qwen2")
    for tied in (False, True)
    for kv_heads in (1, 2, 4)
]
LAYERS = range(3)
PROJECTIONS = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}


class Run(NamedTuple):
    """One forward pass of torch: inputs and outputs of every module by name, and the logits."""

    batch: Batch
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    logits: np.ndarray


class Pair(NamedTuple):
    """The same checkpoint on both sides, and torch's runs by kind of padding."""

    cfg: ModelConfig
    params: dict
    model: object
    runs: dict[str, Run]


def record(model, batch):
    """Runs torch with a hook on every module."""
    import torch

    inputs, outputs = {}, {}

    def hook(name):
        def keep(module, args, kwargs, output):
            given = args[0] if args else kwargs.get("hidden_states")
            if isinstance(given, torch.Tensor):
                inputs[name] = given.numpy()
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, torch.Tensor):
                outputs[name] = output.numpy()

        return keep

    handles = [
        module.register_forward_hook(hook(name), with_kwargs=True)
        for name, module in model.named_modules()
    ]
    logits = model(
        input_ids=torch.tensor(np.asarray(batch.tokens), dtype=torch.long),
        attention_mask=torch.tensor(np.asarray(batch.mask), dtype=torch.long),
        position_ids=torch.tensor(positions(batch), dtype=torch.long),
        use_cache=False,
    ).logits.numpy()
    for handle in handles:
        handle.remove()
    return Run(batch, inputs, outputs, logits)


def positions(batch):
    """Position of each real token among the real tokens."""
    return np.maximum(np.cumsum(np.asarray(batch.mask), -1) - 1, 0)


@pytest.fixture(
    scope="module", params=CASES, ids=lambda case: f"{case[0]}-tied{case[1]:d}-kv{case[2]}"
)
def pair(request, torch_checkpoint, random_batch):
    family, tied, kv_heads = request.param
    folder, model = torch_checkpoint(family, tied=tied, kv_heads=kv_heads, seed=kv_heads)
    cfg, params = load_hf(folder)
    runs = {padding: record(model, random_batch(cfg, padding=padding)) for padding in PADDINGS}
    return Pair(cfg, params, model, runs)


def bind(make, params):
    """A module of ours with these parameters."""
    return nnx.merge(nnx.split(nnx.eval_shape(make))[0], params)


def layer_params(params, index):
    return jax.tree.map(lambda leaf: leaf[index], params["layers"])


def assert_close(ours, theirs, batch, tolerance):
    """Equal on the real tokens, and not because both are next to nothing."""
    mask = np.asarray(batch.mask)
    assert ours.shape == theirs.shape
    assert np.abs(theirs[mask]).max() > 0.1
    np.testing.assert_allclose(np.asarray(ours)[mask], theirs[mask], rtol=0, atol=tolerance)


def tables_and_visible(cfg, batch):
    tables = rotary.rope_tables(jnp.asarray(positions(batch), jnp.int32), cfg.rope, cfg.head_dim)
    length = batch.tokens.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return tables, causal[None, None] & batch.mask[:, None, None, :]


def test_parity_config_reads_what_transformers_wrote(pair):
    theirs = pair.model.config
    assert pair.cfg.family == theirs.model_type
    assert pair.cfg.num_kv_heads == theirs.num_key_value_heads
    assert pair.cfg.head_dim == 8
    assert pair.cfg.tie_word_embeddings == theirs.tie_word_embeddings
    assert pair.cfg.rope.theta == theirs.rope_parameters["rope_theta"]
    assert pair.cfg.rms_norm_eps == theirs.rms_norm_eps


def test_embedding(pair):
    run = pair.runs["left"]
    ours = pair.params["embed_tokens"]["embedding"][run.batch.tokens]
    np.testing.assert_array_equal(ours, run.outputs["model.embed_tokens"])


@pytest.mark.parametrize("name", ["input_layernorm", "post_attention_layernorm"])
def test_layer_norm(pair, name, strict):
    run = pair.runs["left"]
    for index in LAYERS:
        ours = bind(
            lambda: layers.RMSNorm(pair.cfg.hidden_size, pair.cfg.rms_norm_eps),
            layer_params(pair.params, index)[name],
        )
        with strict():
            got = ours(jnp.asarray(run.inputs[f"model.layers.{index}.{name}"]))
        assert_close(got, run.outputs[f"model.layers.{index}.{name}"], run.batch, MODULE)


def test_final_norm(pair, strict):
    run = pair.runs["left"]
    ours = bind(
        lambda: layers.RMSNorm(pair.cfg.hidden_size, pair.cfg.rms_norm_eps), pair.params["norm"]
    )
    with strict():
        got = ours(jnp.asarray(run.inputs["model.norm"]))
    assert_close(got, run.outputs["model.norm"], run.batch, MODULE)


def test_norm_of_tiny_input_uses_the_eps_of_the_config(strict):
    """At a mean square near eps the constant decides the result."""
    import torch
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x = np.linspace(-2e-3, 3e-3, 24, dtype=np.float32).reshape(1, 1, 24)
    results = {}
    for eps in (1e-5, 1e-6):
        ours = bind(lambda eps=eps: layers.RMSNorm(24, eps), {"scale": jnp.ones(24)})
        with strict():
            results[eps] = np.asarray(ours(jnp.asarray(x)))
        theirs = LlamaRMSNorm(24, eps)(torch.tensor(x)).detach().numpy()
        np.testing.assert_allclose(results[eps], theirs, rtol=0, atol=MODULE)
    assert np.abs(results[1e-5] - results[1e-6]).max() > 0.1


def test_rope_tables(pair, strict):
    import torch

    run = pair.runs["left"]
    where = positions(run.batch)
    cos, sin = pair.model.model.rotary_emb(torch.zeros(1), torch.tensor(where))
    with strict():
        ours = rotary.rope_tables(jnp.asarray(where, jnp.int32), pair.cfg.rope, pair.cfg.head_dim)
    np.testing.assert_allclose(ours[0][:, :, 0], cos.numpy(), rtol=0, atol=MODULE)
    np.testing.assert_allclose(ours[1][:, :, 0], sin.numpy(), rtol=0, atol=MODULE)


@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
def test_default_rope_frequencies(theta, head_dim):
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        hidden_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    theirs, scaling = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    ours = rotary.rope_frequencies(Rope(theta), head_dim)
    assert scaling == 1.0
    assert ours.shape == (head_dim // 2,)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6, atol=0)


#: As published for Llama 3.1 and 3.2, and one where the three bands have other places.
LLAMA3 = [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (4.0, 2.0, 6.0, 500)]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("factor", "low", "high", "original"), LLAMA3)
def test_llama3_rope_frequencies(factor, low, high, original, head_dim):
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(
        hidden_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        },
    )
    theirs, scaling = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    ours = rotary.rope_frequencies(Rope(5e5, "llama3", factor, low, high, original), head_dim)
    plain = rotary.rope_frequencies(Rope(5e5), head_dim)
    assert scaling == 1.0
    # all three bands occur: untouched, in between, fully slowed
    assert (ours == plain).any()
    assert np.isclose(ours, plain / factor, rtol=1e-6).any()
    assert ((ours < 0.99 * plain) & (ours > 1.01 * plain / factor)).any()
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_projection(pair, name, strict):
    run = pair.runs["left"]
    for index in LAYERS:
        parent = PROJECTIONS[name]
        values = layer_params(pair.params, index)[parent][name]
        has_bias = pair.cfg.family == "qwen2" and name in ("q_proj", "k_proj", "v_proj")
        assert ("bias" in values) == has_bias
        ours = bind(
            lambda values=values: layers.Linear(*values["kernel"].shape, bias="bias" in values),
            values,
        )
        full = f"model.layers.{index}.{parent}.{name}"
        with strict():
            got = ours(jnp.asarray(run.inputs[full]))
        assert_close(got, run.outputs[full], run.batch, MODULE)


@pytest.mark.parametrize("padding", PADDINGS)
def test_attention(pair, padding, strict):
    run = pair.runs[padding]
    tables, visible = tables_and_visible(pair.cfg, run.batch)
    for index in LAYERS:
        name = f"model.layers.{index}.self_attn"
        ours = bind(
            lambda: layers.Attention(pair.cfg), layer_params(pair.params, index)["self_attn"]
        )
        with strict():
            got, *_ = ours(jnp.asarray(run.inputs[f"{name}.q_proj"]), tables, visible)
        assert_close(got, run.outputs[name], run.batch, MODULE)


def test_mlp(pair, strict):
    run = pair.runs["left"]
    for index in LAYERS:
        name = f"model.layers.{index}.mlp"
        ours = bind(lambda: layers.MLP(pair.cfg), layer_params(pair.params, index)["mlp"])
        with strict():
            got, _ = ours(jnp.asarray(run.inputs[name]))
        assert_close(got, run.outputs[name], run.batch, MODULE)


@pytest.mark.parametrize("padding", PADDINGS)
def test_hidden_state_of_every_layer(pair, padding, strict):
    """Carried on our own stream from layer to layer, not restarted from torch's."""
    run = pair.runs[padding]
    tables, visible = tables_and_visible(pair.cfg, run.batch)
    x = pair.params["embed_tokens"]["embedding"][run.batch.tokens]
    for index in LAYERS:
        block = bind(lambda: decoder.Block(pair.cfg), layer_params(pair.params, index))
        with strict():
            x, *_ = block(x, tables, visible)
        assert_close(x, run.outputs[f"model.layers.{index}"], run.batch, MODULE)


_forward = jax.jit(decoder.forward, static_argnames=("cfg", "capture", "unroll"))


@pytest.mark.parametrize("padding", PADDINGS)
def test_logits(pair, padding, strict):
    run = pair.runs[padding]
    with strict():
        logits, captured = _forward(pair.params, run.batch, cfg=pair.cfg)
    assert captured == {}
    assert logits.dtype == jnp.float32
    assert_close(logits, run.logits, run.batch, LOGITS)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_logits_where_head_dim_follows_from_the_hidden_size(family, torch_checkpoint, random_batch):
    folder, model = torch_checkpoint(family, head_dim=None)
    cfg, params = load_hf(folder)
    assert cfg.head_dim == 6
    run = record(model, random_batch(cfg, padding="left"))
    assert_close(_forward(params, run.batch, cfg=cfg)[0], run.logits, run.batch, LOGITS)


def test_logits_with_llama3_rope(torch_checkpoint, random_batch):
    """The original context is shorter than the text, so the scaling changes the logits."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 6,
    }
    folder, model = torch_checkpoint("llama", rope_parameters=rope)
    cfg, params = load_hf(folder)
    assert cfg.rope == Rope(10000.0, "llama3", 8.0, 1.0, 4.0, 6)
    run = record(model, random_batch(cfg, padding="left", lengths=(12, 9, 5)))
    assert_close(_forward(params, run.batch, cfg=cfg)[0], run.logits, run.batch, LOGITS)
    plain = dataclasses.replace(cfg, rope=Rope(10000.0))
    unscaled = np.asarray(_forward(params, run.batch, cfg=plain)[0])
    assert np.abs(unscaled - run.logits).max() > 0.01


def test_token_nll_is_the_cross_entropy_of_torch(pair, strict):
    import torch

    run = pair.runs["right"]
    with strict():
        losses, weights = decoder.token_nll(jnp.asarray(run.logits), run.batch)
    mask = np.asarray(run.batch.mask)
    np.testing.assert_array_equal(weights, mask[:, 1:])
    theirs = torch.nn.functional.cross_entropy(
        torch.tensor(run.logits[:, :-1]).transpose(1, 2),
        torch.tensor(np.asarray(run.batch.tokens[:, 1:]), dtype=torch.long),
        reduction="none",
    ).numpy()
    np.testing.assert_allclose(losses, theirs * mask[:, 1:], rtol=0, atol=MODULE)
