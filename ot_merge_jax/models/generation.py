"""Text from a model: greedy or sampled continuation, batched, with a cache of keys and values."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ot_merge_jax.models import decoder
from ot_merge_jax.models.config import ModelConfig
from ot_merge_jax.models.layers import Cache
from ot_merge_jax.types import Params


def generate(
    params: Params,
    tokens: Int[Array, "b s"],
    mask: Bool[Array, "b s"],
    *,
    cfg: ModelConfig,
    max_new_tokens: int,
    stop: Sequence[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
) -> Int[Array, "b n"]:
    """Continues prompts.

    Args:
        params: Parameters, in the dtype to compute in.
        tokens: Prompts, padded on the LEFT so that all continue at the same place.
        mask: True where a token is real.
        cfg: The model.
        max_new_tokens: Tokens to add at most.
        stop: Ids that end a text (its EOS); the one that ends it is repeated to the end.
        temperature: 0 takes the likeliest token; else logits are divided by it and sampled.
        top_p: Only the likeliest tokens that together have this probability are sampled.
        key: PRNG key; needed to sample.

    Returns:
        The new tokens alone, ``max_new_tokens`` for each prompt.

    Raises:
        ValueError: if prompt and continuation exceed the context, a prompt is padded on the right,
            or sampling has no key.

    Example:
        >>> from ot_merge_jax.demo import assets
        >>> from ot_merge_jax.io.hf import load_hf
        >>> cfg, params = load_hf(assets.path("sibling"), dtype="float32")
        >>> prompt = jnp.array([[1, 50, 60]])
        >>> new = generate(params, prompt, prompt > 0, cfg=cfg, max_new_tokens=4)
        >>> new.shape
        (1, 4)
    """
    total = tokens.shape[1] + max_new_tokens
    if total > cfg.max_positions:
        raise ValueError(
            f"{tokens.shape[1]} tokens of prompt and {max_new_tokens} new ones exceed the context "
            f"of {cfg.max_positions}."
        )
    if not bool(jnp.all(mask[:, -1])):
        raise ValueError("Prompts must be padded on the left.")
    if temperature and key is None:
        raise ValueError("Sampling needs a key.")
    key = jax.random.key(0) if key is None else key
    return _generate(
        params, tokens, mask, jnp.array(list(stop), jnp.int32), temperature, top_p, key,
        cfg=cfg, count=max_new_tokens, is_greedy=temperature == 0,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("cfg", "count", "is_greedy"))
def _generate(
    params: Params,
    tokens: jax.Array,
    mask: jax.Array,
    stop: jax.Array,
    temperature: Any,
    top_p: Any,
    key: jax.Array,
    *,
    cfg: ModelConfig,
    count: int,
    is_greedy: bool,
) -> jax.Array:
    """`generate` as one program: the prompt at once, then a token at a time."""
    b, s = tokens.shape
    shape = (cfg.num_layers, b, s + count, cfg.num_kv_heads, cfg.head_dim)
    dtype = params["embed_tokens"]["embedding"].dtype
    caches = (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    positions = decoder.positions_of(mask)
    key_mask = jnp.concatenate([mask, jnp.ones((b, count), bool)], 1)
    lengths = positions[:, -1] + 1

    def choose(logits: jax.Array, step: Any) -> jax.Array:
        if is_greedy:
            return jnp.argmax(logits, -1).astype(jnp.int32)
        return _sample(logits / temperature, top_p, jax.random.fold_in(key, step))

    def is_stop(chosen: jax.Array) -> jax.Array:
        return (chosen[:, None] == stop[None]).any(-1)

    logits, caches = _extend(params, tokens, positions, key_mask, caches, 0, cfg=cfg)
    first = choose(logits, 0)
    new = jnp.zeros((b, count), jnp.int32).at[:, 0].set(first)

    def is_running(state: Any) -> jax.Array:
        step, _, _, done, _ = state
        return (step < count) & ~done.all()

    def add_token(state: Any) -> Any:
        step, last, new, done, caches = state
        where = (lengths + step - 1)[:, None]
        logits, caches = _extend(
            params, last[:, None], where, key_mask, caches, s + step - 1, cfg=cfg
        )
        chosen = jnp.where(done, last, choose(logits, step))
        return step + 1, chosen, new.at[:, step].set(chosen), done | is_stop(chosen), caches

    start = (jnp.int32(1), first, new, is_stop(first), caches)
    step, last, new, _, _ = jax.lax.while_loop(is_running, add_token, start)
    return jnp.where(jnp.arange(count)[None] < step, new, last[:, None])


def _extend(
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    key_mask: jax.Array,
    caches: tuple[jax.Array, jax.Array],
    start: Any,
    *,
    cfg: ModelConfig,
) -> tuple[Float[Array, "b v"], tuple[jax.Array, jax.Array]]:
    """Reads more tokens into the caches; logits of the last one."""
    contexts = decoder.attention_contexts(positions, key_mask, start=start, cfg=cfg)

    def step(x: jax.Array, stacked: Any) -> tuple[jax.Array, Any]:
        layer_params, kind, keys, values = stacked
        cache = Cache(keys, values, start)
        x, _, cache = decoder.layer(
            layer_params, x, *decoder.of_kind(contexts, kind), cfg=cfg, cache=cache
        )
        return x, (cache.keys, cache.values)

    x = decoder.embed(params, tokens, cfg=cfg)
    x, caches = jax.lax.scan(step, x, (params["layers"], contexts.kind, *caches))
    return decoder.head(params, x[:, -1:], cfg=cfg)[:, 0], caches


def _sample(logits: Float[Array, "b v"], top_p: Any, key: jax.Array) -> Int[Array, " b"]:
    """A token drawn from the likeliest ones that together have probability ``top_p``."""
    ordered = jnp.sort(jax.nn.softmax(logits, -1), -1)[:, ::-1]
    before = jnp.cumsum(ordered, -1) - ordered
    least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), -1, keepdims=True)
    allowed = jnp.where(jax.nn.softmax(logits, -1) >= least, logits, -jnp.inf)
    return jax.random.categorical(key, allowed, -1).astype(jnp.int32)
