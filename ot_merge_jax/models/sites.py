"""The wiring: named feature spaces (sites) and the weights that connect them. Imports config only.

A weight is a map between two sites. Fusion reads this table and never a parameter's name, so
whatever is captured, transported and masked is decided here (method: Activations, The transported
weight, Which neurons move).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from ot_merge_jax.models.config import ModelConfig

#: Site -> what it is. Every site exists once per decoder layer.
SITES: dict[str, str] = {
    "attn_in": "normalised residual entering q, k, v",
    "q_out": "query projection before RoPE, bias included",
    "k_out": "key projection before RoPE, bias included",
    "v_out": "value projection, bias included",
    "o_in": "attention heads, concatenated",
    "o_out": "output of the attention branch",
    "mlp_in": "normalised residual entering gate and up",
    "gate_out": "gate projection before the activation",
    "up_out": "up projection before the product",
    "down_in": "act(gate) * up",
    "down_out": "output of the MLP branch",
}


class Projection(NamedTuple):
    """One kind of weight inside a decoder layer.

    Attributes:
        path: Where it lives in the parameters, without the leaf name.
        in_site: Space it reads.
        out_site: Space it writes.
        masked: Which of its axes a top-k mask selects; the site on that axis ranks the neurons.
    """

    path: str
    in_site: str
    out_site: str
    masked: Literal["out", "in"]

    @property
    def masked_site(self) -> str:
        """The site whose neurons the top-k mask selects."""
        return self.out_site if self.masked == "out" else self.in_site


#: Weight name in a recipe -> its wiring.
PROJECTIONS: dict[str, Projection] = {
    "q": Projection("layers/self_attn/q_proj", "attn_in", "q_out", "out"),
    "k": Projection("layers/self_attn/k_proj", "attn_in", "k_out", "out"),
    "v": Projection("layers/self_attn/v_proj", "attn_in", "v_out", "out"),
    "o": Projection("layers/self_attn/o_proj", "o_in", "o_out", "in"),
    "gate": Projection("layers/mlp/gate_proj", "mlp_in", "gate_out", "out"),
    "up": Projection("layers/mlp/up_proj", "mlp_in", "up_out", "out"),
    "down": Projection("layers/mlp/down_proj", "down_in", "down_out", "in"),
}

#: Weight name in a recipe -> the vocabulary table it means.
VOCABULARY: dict[str, str] = {"embed": "embed_tokens/embedding", "head": "lm_head/kernel"}

#: Groups that may have a strength of their own.
GROUPS: dict[str, frozenset[str]] = {
    "projections": frozenset(PROJECTIONS),
    "vocabulary": frozenset(VOCABULARY),
}


def weight_of(path: str) -> str | None:
    """The recipe's name of the weight a parameter path belongs to; None if it never moves.

    Example:
        >>> weight_of("layers/self_attn/q_proj/bias"), weight_of("norm/scale")
        ('q', None)
    """
    whole = {where: name for name, where in VOCABULARY.items()}
    whole |= {projection.path: name for name, projection in PROJECTIONS.items()}
    return whole.get(path, whole.get(path.rpartition("/")[0]))


def group_of(weight: str) -> str:
    """The group whose strength applies to a weight."""
    return next(group for group, members in GROUPS.items() if weight in members)


def site_width(site: str, cfg: ModelConfig) -> int:
    """Number of features of a site.

    Example:
        >>> from ot_merge_jax.models.config import Rope
        >>> cfg = ModelConfig("llama", 99, 64, 256, 2, 4, 1, 16, 512, 1e-5,
        ...                   Rope(1e4), True, False, "float32")
        >>> site_width("down_in", cfg), site_width("k_out", cfg)
        (256, 16)
    """
    heads, kv_heads = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    widths = {"q_out": heads, "o_in": heads, "k_out": kv_heads, "v_out": kv_heads}
    widths |= dict.fromkeys(("gate_out", "up_out", "down_in"), cfg.intermediate_size)
    return widths.get(site, cfg.hidden_size)


def sites_of(weights: Iterable[str]) -> tuple[str, ...]:
    """The sites that transporting these weights needs, in the order of `SITES`, each once.

    Example:
        >>> sites_of(["gate", "up", "embed"])
        ('mlp_in', 'gate_out', 'up_out')
    """
    needed = {site for name in weights if name in PROJECTIONS for site in PROJECTIONS[name][1:3]}
    return tuple(site for site in SITES if site in needed)
