"""`ParamSpec`: one row for each parameter drives init, load, save, sharding axes and fusion.

The table is the only place that knows Hugging Face tensor names.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ot_merge_jax.models.config import ModelConfig
from ot_merge_jax.models.sites import PROJECTIONS, VOCABULARY
from ot_merge_jax.types import Params

#: Where a layer's norms sit -> their names in Hugging Face checkpoints.
NORMS: dict[str, dict[str, str]] = {
    "pre": {"attention_in": "input_layernorm", "mlp_in": "post_attention_layernorm"},
    "post": {
        "attention_out": "post_attention_layernorm",
        "mlp_out": "post_feedforward_layernorm",
    },
    "both": {
        "attention_in": "input_layernorm",
        "attention_out": "post_attention_layernorm",
        "mlp_in": "pre_feedforward_layernorm",
        "mlp_out": "post_feedforward_layernorm",
    },
}
#: Tensors that hold several projections stacked by rows, where a family's files are fused.
FUSED: dict[str, tuple[str, ...]] = {
    "self_attn.qkv_proj": ("q", "k", "v"),
    "mlp.gate_up_proj": ("gate", "up"),
}


class ParamSpec(NamedTuple):
    """One parameter leaf.

    Attributes:
        path: Place in the parameters, ``/`` between keys; ``layers/...`` leaves are stacked.
        name: Hugging Face tensor name; ``{layer}`` stands for the layer number.
        shape: Our shape, the stacking axis included.
        axes: A logical axis name (or None) for each dimension, for
            `ot_merge_jax.distributed.sharding`.
        transpose: Whether the file holds the last two dimensions the other way round.
        weight: Name in a recipe (``q``, ``embed``...) whose wiring this leaf follows; None: never
            moves.
        rows: The first and last (exclusive) row of the file's tensor that the leaf is, and how many
            rows that tensor has; None: the leaf is the whole tensor.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    transpose: bool
    weight: str | None
    rows: tuple[int, int, int] | None = None

    @property
    def is_stacked(self) -> bool:
        """Whether the leading axis runs over layers."""
        return self.path.startswith("layers/")

    def tensor_names(self) -> list[str]:
        """The tensors of the file that make up this leaf, in stacking order."""
        return (
            [self.name.format(layer=i) for i in range(self.shape[0])]
            if self.is_stacked
            else [self.name]
        )

    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each of those tensors in the file."""
        shape = self.shape[1:] if self.is_stacked else self.shape
        shape = shape[::-1] if self.transpose else shape
        return shape if self.rows is None else (self.rows[2], *shape[1:])


@functools.lru_cache(maxsize=256)  # stages ask for it thousands of times
def param_specs(cfg: ModelConfig) -> tuple[ParamSpec, ...]:
    """The parameter table of a model, in the order of the forward pass.

    Args:
        cfg: The model.

    Returns:
        One `ParamSpec` for each leaf.

    Example:
        >>> from ot_merge_jax.models.config import Rope
        >>> cfg = ModelConfig("llama", 99, 64, 128, 2, 4, 1, 16, 512, 1e-5,
        ...                   Rope(1e4), True, False, "float32")
        >>> spec = next(s for s in param_specs(cfg) if s.weight == "down")
        >>> spec.path, spec.shape, spec.tensor_names()[1], spec.tensor_shape()
        ('layers/mlp/down_proj/kernel', (2, 128, 64), 'model.layers.1.mlp.down_proj.weight', (64,
        128))
    """
    hidden, inner, depth = cfg.hidden_size, cfg.intermediate_size, cfg.num_layers
    heads, kv_heads = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    widths = {
        "q": (hidden, heads, "heads"),
        "k": (hidden, kv_heads, "kv_heads"),
        "v": (hidden, kv_heads, "kv_heads"),
        "o": (heads, hidden, "heads"),
        "gate": (hidden, inner, "mlp"),
        "up": (hidden, inner, "mlp"),
        "down": (inner, hidden, "mlp"),
    }
    style = cfg.style
    biased = {"q", "k", "v"} if cfg.qkv_bias else set()
    biased |= {"o"} if style.o_bias else set()
    biased |= {"gate", "up", "down"} if style.mlp_bias else set()
    fused = (
        _fused_rows({name: width[1] for name, width in widths.items()}) if style.is_fused else {}
    )

    def norm(path: str, width: int = hidden) -> ParamSpec:
        name = f"model.{_in_file(path)}.weight"
        stack = (depth,) if path.startswith("layers/") else ()
        axes = ("layers",) * len(stack) + (None,)
        return ParamSpec(f"{path}/scale", name, (*stack, width), axes, False, None)

    table = VOCABULARY["embed"]
    specs = [
        ParamSpec(
            table, "model.embed_tokens.weight", (cfg.vocab_size, hidden), ("vocab", None), False,
            "embed",
        )
    ]  # fmt: skip
    specs += [norm(f"layers/{name}") for name in NORMS[style.norms].values()]
    if style.qk_norm:
        is_by_head = style.qk_norm == "head"
        specs += [
            norm("layers/self_attn/q_norm", cfg.head_dim if is_by_head else heads),
            norm("layers/self_attn/k_norm", cfg.head_dim if is_by_head else kv_heads),
        ]
    for weight, (d_in, d_out, axis) in widths.items():
        path, masked = PROJECTIONS[weight].path, PROJECTIONS[weight].masked
        whole, rows = fused.get(weight, (_in_file(path), None))
        name = f"model.{whole}"
        axes = ("layers", None, axis) if masked == "out" else ("layers", axis, None)
        shape = (depth, d_in, d_out)
        specs.append(ParamSpec(f"{path}/kernel", f"{name}.weight", shape, axes, True, weight, rows))
        if weight in biased:
            axes, shape = ("layers", axis if masked == "out" else None), (depth, d_out)
            specs.append(
                ParamSpec(f"{path}/bias", f"{name}.bias", shape, axes, False, weight, rows)
            )
    specs.append(norm("norm"))
    if not cfg.tie_word_embeddings:
        shape, axes = (hidden, cfg.vocab_size), (None, "vocab")
        specs.append(ParamSpec(VOCABULARY["head"], "lm_head.weight", shape, axes, True, "head"))
    return tuple(specs)


def _in_file(path: str) -> str:
    """A path of ours as Hugging Face names it, with a place for the layer's number."""
    return path.replace("layers/", "layers.{layer}.").replace("/", ".")


def _fused_rows(widths: dict[str, int]) -> dict[str, tuple[str, tuple[int, int, int]]]:
    """Projection -> the tensor that holds it, and which of its rows."""
    places = {}
    for name, members in FUSED.items():
        total, start = sum(widths[member] for member in members), 0
        for member in members:
            places[member] = (f"layers.{{layer}}.{name}", (start, start + widths[member], total))
            start += widths[member]
    return places


class LazyParams(Protocol):
    """Parameters that are not in memory: read or computed when they are asked for.

    jit does not take them; ask for the leaves that are needed, or for one layer.
    """

    def leaf(self, path: str) -> Any:
        """The leaf at a ``/`` path; for a stacked one, something whose ``[l]`` is layer ``l``."""
        ...

    def layer(self, l: int) -> Params:
        """The parameters of one layer, nested, without the stacking axis."""
        ...


def is_resident(params: Params) -> bool:
    """Whether parameters are a pytree in memory, and not `LazyParams`."""
    return not hasattr(params, "leaf")


def get(params: Params, path: str) -> Any:
    """The leaf at a ``/`` path, or in nested dicts a subtree; KeyError if there is none."""
    if not is_resident(params):
        return params.leaf(path)
    for key in path.split("/"):
        params = params[key]
    return params


def layer(params: Params, l: int) -> Params:
    """The parameters of one layer, without the stacking axis."""
    if not is_resident(params):
        return params.layer(l)
    return jax.tree.map(lambda leaf: leaf[l], params["layers"])


def has(params: Params, path: str) -> bool:
    """Whether there is a leaf (or subtree) at a ``/`` path."""
    try:
        get(params, path)
    except KeyError:
        return False
    return True


def unflatten(leaves: dict[str, Any]) -> Params:
    """Nested parameters from ``{path: leaf}``.

    Example:
        >>> unflatten({"norm/scale": 1, "embed_tokens/embedding": 2})
        {'norm': {'scale': 1}, 'embed_tokens': {'embedding': 2}}
    """
    params: Params = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return params


def abstract(cfg: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """Shapes and dtypes of all parameters, without memory."""
    return unflatten(
        {spec.path: jax.ShapeDtypeStruct(spec.shape, dtype) for spec in param_specs(cfg)}
    )


def count(cfg: ModelConfig) -> int:
    """Number of parameters; a tied head counts once."""
    return sum(math.prod(spec.shape) for spec in param_specs(cfg))


def largest_piece(cfg: ModelConfig) -> int:
    """Numbers of the largest piece that is read at once: a layer, or a vocabulary table."""
    table = param_specs(cfg)
    layer = sum(math.prod(spec.shape[1:]) for spec in table if spec.is_stacked)
    return max(layer, *(math.prod(spec.shape) for spec in table if not spec.is_stacked))


def init(
    key: jax.Array, cfg: ModelConfig, *, std: float = 0.02, dtype: Any = jnp.float32
) -> Params:
    """Random parameters as transformers makes them: normal weights, identity norms, zero biases.

    Args:
        key: PRNG key.
        cfg: The model.
        std: Standard deviation of the weights.
        dtype: Dtype of every leaf.

    Returns:
        Nested parameters.
    """
    leaves = {}
    for spec, leaf_key in zip(
        param_specs(cfg), jax.random.split(key, len(param_specs(cfg))), strict=True
    ):
        if spec.path.endswith("scale"):
            leaves[spec.path] = jnp.full(spec.shape, 1.0 - cfg.style.unit_offset, dtype)
        elif spec.path.endswith("bias"):
            leaves[spec.path] = jnp.zeros(spec.shape, dtype)
        else:
            leaves[spec.path] = (std * jax.random.normal(leaf_key, spec.shape)).astype(dtype)
    return unflatten(leaves)
