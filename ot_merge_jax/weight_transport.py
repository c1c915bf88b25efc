"""The transported weights of a merge: what the source knows, in the target's spaces.

Projections go by the neuron transport of their sites, vocabulary tables by the tokens that the two
vocabularies share (SPEC sections 5 and 5.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ot_merge_jax import fuse
from ot_merge_jax.config import ModelConfig
from ot_merge_jax.models import specs
from ot_merge_jax.models.model import AnyModel, Models
from ot_merge_jax.spaces import PROJECTIONS, VOCABULARY
from ot_merge_jax.transport import operator
from ot_merge_jax.transport import vocabulary as vocabularies
from ot_merge_jax.types import (
    Alignment,
    MergeSpec,
    Params,
    Transported,
    VocabularyMatch,
)


def transport_weights(
    models: Models,
    alignment: Alignment | None,
    *,
    spec: MergeSpec,
    vocabulary: VocabularyMatch | None = None,
) -> Transported:
    """Carries the weights of the source, or what its fine-tune changed, into the target's spaces.

    Args:
        models: The models of the merge. For rule ``delta`` the source's base is subtracted.
        alignment: From `ot_merge_jax.merge.align_activations`; None when only the vocabulary moves.
        spec: What moves and how.
        vocabulary: Matched tokens; needed when ``embed`` or ``head`` moves.

    Returns:
        Parameter path -> transported weight (of the delta, for rule ``delta``), and path -> mask.

    Example:
        >>> from ot_merge_jax import assets
        >>> from ot_merge_jax.io.hf import load_hf
        >>> from ot_merge_jax.models.model import Models
        >>> names = ("sibling", "source", "source-base")
        >>> models = Models(*(load_hf(assets.path(name)) for name in names))
        >>> ids = jnp.arange(models.target.cfg.vocab_size)
        >>> moved = transport_weights(models, None, spec=MergeSpec(weights=("embed",)),
        ...                           vocabulary=VocabularyMatch(ids, ids))
        >>> moved.weights["embed_tokens/embedding"].shape == (
        ...     models.target.cfg.vocab_size, models.target.cfg.hidden_size)
        True

    Source: Transport and Merge, eq. 14. Differs: ``delta`` and the vocabulary map are ours.
    """
    moving = models.source.params
    if spec.rule == "delta" and models.base is not None:
        moving = source_delta(moving, models.base.params)
    weights: dict[str, jax.Array] = {}
    masks: dict[str, jax.Array] = {}
    if alignment is not None:
        selected = fuse.selected(alignment.target, spec=spec)
        weights = _projections(models.target.params, moving, alignment, selected, spec=spec)
        masks = fuse.masks(alignment.target, spec=spec)
    if vocabulary is not None and set(spec.weights) & set(VOCABULARY):
        tables, rows = _tables(
            models.target, models.source.cfg, moving, models.reference, vocabulary, spec=spec
        )
        weights, masks = weights | tables, masks | rows
    return Transported(weights, masks)


def source_delta(source: Params, base: Params) -> SourceDelta:
    """What a fine-tune changed: parameters of the source minus those of its base, float32.

    Args:
        source: Parameters of the source, held or lazy.
        base: Parameters of what it was fine-tuned from, of the same shapes.

    Returns:
        Lazy parameters: a leaf, or a layer of a stacked one, is subtracted when it is asked for, so
        that no third model stands in memory.

    Example:
        >>> tuned, base = ({"norm": {"scale": jnp.full(2, x)}} for x in (3.0, 1.0))
        >>> source_delta(tuned, base).leaf("norm/scale").tolist()
        [2.0, 2.0]
    """
    return SourceDelta(source, base)


class SourceDelta(NamedTuple):
    """Lazy parameters (`ot_merge_jax.models.specs.LazyParams`): source minus base.

    Attributes:
        source: Parameters of the source.
        base: Parameters of its base.
    """

    source: Params
    base: Params

    def leaf(self, path: str) -> Any:
        """A leaf, subtracted now; of a stacked one each layer when it is asked for."""
        leaf = _LeafDelta(specs.get(self.source, path), specs.get(self.base, path))
        return leaf if path.startswith("layers/") else leaf[...]

    def layer(self, l: int) -> Params:
        """The parameters of one layer, without the stacking axis."""
        return jax.tree.map(_difference, specs.layer(self.source, l), specs.layer(self.base, l))


class _LeafDelta:
    """A stacked leaf of `SourceDelta`, subtracted one layer at a time."""

    def __init__(self, source: Any, base: Any):
        """The leaves of both."""
        self._source, self._base = source, base

    def __getitem__(self, index: Any) -> jax.Array:
        """One layer, or all of the leaf."""
        return _difference(self._source[index], self._base[index])


@jax.jit
def _difference(source: jax.Array, base: jax.Array) -> jax.Array:
    """Source minus base, float32."""
    return source.astype(jnp.float32) - base.astype(jnp.float32)


def _projections(
    target: Params,
    moving: Params,
    alignment: Alignment,
    selected: Mapping[str, np.ndarray],
    *,
    spec: MergeSpec,
) -> dict[str, jax.Array]:
    """Transported kernels and, where both models have them, biases."""
    weights = {}
    chosen = [wiring for name, wiring in PROJECTIONS.items() if name in spec.weights]
    for in_site in dict.fromkeys(wiring.in_site for wiring in chosen):
        wirings = [wiring for wiring in chosen if wiring.in_site == in_site]
        kinds = []
        for wiring in wirings:
            bias = f"{wiring.path}/bias"
            has_bias = specs.has(moving, bias) and specs.has(target, bias)
            kinds.append(
                operator.Kind(
                    wiring.out_site,
                    kernels=specs.get(moving, f"{wiring.path}/kernel"),
                    biases=specs.get(moving, bias) if has_bias else None,
                )
            )
        carried = operator.carry(kinds, *alignment, in_site=in_site, spec=spec, selected=selected)
        for wiring, (kernel, bias) in zip(wirings, carried, strict=True):
            weights[f"{wiring.path}/kernel"] = kernel
            if bias is not None:
                weights[f"{wiring.path}/bias"] = bias
    return weights


def _tables(
    target: AnyModel,
    source: ModelConfig,
    moving: Params,
    reference: AnyModel,
    matched: VocabularyMatch,
    *,
    spec: MergeSpec,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Moved vocabulary tables and the masks of their matched rows.

    A tied target's one table plays the head's role: it moves once, by the head's map and delta.
    """
    moved, masks = {}, {}
    is_tied = target.cfg.tie_word_embeddings
    roles = {"head" if is_tied else name for name in spec.weights if name in VOCABULARY}
    for role in sorted(roles):
        aim = _table(target, role)
        rotation = vocabularies.procrustes(
            vocabularies.rows_of(_table(reference, role), matched.source_ids),
            vocabularies.rows_of(aim, matched.target_ids),
            weights=matched.weights,
        )
        table, mask = vocabularies.moved_rows(
            _oriented(specs.get(moving, _place(source, role)), role, source),
            rotation,
            matched,
            size=aim.shape[0],
        )
        is_head = role == "head" and not is_tied
        path = VOCABULARY["head" if is_head else "embed"]
        moved[path], masks[path] = (table.T, mask.T) if is_head else (table, mask)
    return moved, masks


def _table(model: AnyModel, role: str) -> jax.Array:
    """The table ``[v, d]`` that plays a role; a tied table plays both."""
    return _oriented(specs.get(model.params, _place(model.cfg, role)), role, model.cfg)


def _place(cfg: ModelConfig, role: str) -> str:
    """Where the table that plays a role lives."""
    return VOCABULARY["embed" if cfg.tie_word_embeddings else role]


def _oriented(leaf: jax.Array, role: str, cfg: ModelConfig) -> jax.Array:
    """That leaf as ``[v, d]``."""
    return leaf.T if role == "head" and not cfg.tie_word_embeddings else leaf
