"""Prunes a model to a smaller one of its family: the demo's sibling. Writes no index anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ot_merge_jax.models import decoder
from ot_merge_jax.models.config import ModelConfig
from ot_merge_jax.types import Batch, Params


def prune(
    params: Params,
    tokens: np.ndarray,
    *,
    cfg: ModelConfig,
    small: ModelConfig,
    layers: Sequence[int],
) -> Params:
    """Keeps some layers and the most active channels, key/value groups and MLP neurons, in order.

    Channels are chosen once for the whole residual stream; groups (with all their query heads) and
    neurons for each layer. The score of a channel is its mean absolute activation entering the MLP;
    that of a group or neuron is the same times the norm of the weights that read it.

    Args:
        params: Parameters of ``cfg``.
        tokens: ``[b, s]`` blocks to measure the activity on.
        cfg: The model.
        small: The model wanted; the same head size and query heads per key/value head.
        layers: The layers kept, as many as ``small`` has.

    Returns:
        Parameters of ``small``.
    """
    rows = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    batch = jax.tree.map(jnp.asarray, Batch(tokens, np.ones(tokens.shape, bool), rows, rows))
    sites = decoder.forward(
        params, batch, cfg=cfg, capture=frozenset({"mlp_in", "o_in", "down_in"})
    )[1]
    activity = {
        site: np.abs(np.asarray(values)).mean((1, 2)) for site, values in sites.items()
    }  # [L, d]
    group = cfg.num_heads // cfg.num_kv_heads * cfg.head_dim
    attention, mlp = params["layers"]["self_attn"], params["layers"]["mlp"]
    heads = activity["o_in"] * np.linalg.norm(attention["o_proj"]["kernel"], axis=-1)
    hidden = _top(activity["mlp_in"].mean(0), small.hidden_size)
    every = np.broadcast_to(hidden, (cfg.num_layers, small.hidden_size))
    neurons = _top(
        activity["down_in"] * np.linalg.norm(mlp["down_proj"]["kernel"], axis=-1),
        small.intermediate_size,
    )
    groups = _top(heads.reshape(cfg.num_layers, -1, group).sum(-1), small.num_kv_heads)
    wide, narrow = _spread(groups, group), _spread(groups, cfg.head_dim)
    axes = {
        "q_proj": (every, wide),
        "k_proj": (every, narrow),
        "v_proj": (every, narrow),
        "o_proj": (wide, every),
        "gate_proj": (every, neurons),
        "up_proj": (every, neurons),
        "down_proj": (neurons, every),
    }

    def kept(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        names = [entry.key for entry in path]
        if names[0] != "layers":
            return leaf[..., hidden]
        if names[-1] == "scale":
            return leaf[np.array(layers)][:, hidden]
        rows, columns = axes[names[2]]
        return jnp.stack([leaf[m][rows[m]][:, columns[m]] for m in layers])

    return jax.tree_util.tree_map_with_path(kept, params)


def _top(score: np.ndarray, k: int) -> np.ndarray:
    """Places of the ``k`` largest scores of the last axis, ascending."""
    return np.sort(np.argsort(-score, axis=-1, kind="stable")[..., :k], axis=-1)


def _spread(groups: np.ndarray, size: int) -> np.ndarray:
    """Places of all features of the chosen groups, ``[L, k * size]``."""
    return (groups[..., None] * size + np.arange(size)).reshape(len(groups), -1)
