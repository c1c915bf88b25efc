"""The transported weights of a merge: what the source knows, in the target's spaces.

Projections go by the neuron transport of their sites, vocabulary tables by the tokens that the two
vocabularies share (method: The transported weight, The vocabulary map).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ot_merge_jax.merging import masks as masks_module
from ot_merge_jax.merging import projections, vocabulary
from ot_merge_jax.models import specs
from ot_merge_jax.models.config import ModelConfig
from ot_merge_jax.models.model import AnyModel, Models
from ot_merge_jax.models.sites import PROJECTIONS, VOCABULARY, site_width, weight_of
from ot_merge_jax.transport import coupling as couplings
from ot_merge_jax.transport import procrustes
from ot_merge_jax.types import BUDGET, Alignment, MergeSpec, Params, Transported, VocabularyMatch


def transport_weights(
    models: Models,
    alignment: Alignment | None,
    *,
    spec: MergeSpec,
    vocabulary: VocabularyMatch | None = None,
    plan_at_once: int = BUDGET.plan_block,
) -> Transported:
    """Carries the weights of the source, or what its fine-tune changed, into the target's spaces.

    Args:
        models: The models of the merge. For rule ``delta`` the source's base is subtracted.
        alignment: From `ot_merge_jax.merging.merge.align_activations`; None when only the
            vocabulary moves.
        spec: What moves and how.
        vocabulary: Matched tokens; needed when ``embed`` or ``head`` moves.
        plan_at_once: Entries of a plan that are rebuilt at a time, at least one row's.

    Returns:
        Parameter path -> transported weight (of the delta, for rule ``delta``), and path -> mask.

    Example:
        >>> from ot_merge_jax.demo import assets
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
        selected = masks_module.selected(alignment.target, spec=spec)
        weights = _projections(
            models.target.params, moving, alignment, selected, spec=spec, plan_at_once=plan_at_once
        )
        masks = masks_module.masks(alignment.target, spec=spec)
    if vocabulary is not None and set(spec.weights) & set(VOCABULARY):
        tables, rows = _tables(
            models.target, models.source.cfg, moving, models.reference, vocabulary, spec=spec
        )
        weights, masks = weights | tables, masks | rows
    return Transported(weights, masks)


def source_delta(source: Params, base: Params) -> SourceDelta:
    """What a fine-tune changed: parameters of the source minus those of its base, float32.

    Args:
        source: Parameters of the source, in memory or lazy.
        base: Parameters of what it was fine-tuned from, of the same shapes.

    Returns:
        Lazy parameters: a leaf, or a layer of a stacked one, is subtracted when it is asked for, so
        that no third model is in memory.

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
        """A leaf, subtracted now; in a stacked one each layer when it is asked for."""
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
    plan_at_once: int,
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
                projections.ProjectionWeights(
                    wiring.out_site,
                    kernels=specs.get(moving, f"{wiring.path}/kernel"),
                    biases=specs.get(moving, bias) if has_bias else None,
                )
            )
        carried = projections.transport_projections(
            kinds, *alignment,
            in_site=in_site, spec=spec, selected=selected, plan_at_once=plan_at_once,
        )  # fmt: skip
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
        rotation = procrustes.procrustes(
            vocabulary.rows_of(_table(reference, role), matched.source_ids),
            vocabulary.rows_of(aim, matched.target_ids),
            weights=matched.weights,
        )
        table, mask = vocabulary.moved_rows(
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
    """The leaf that plays a role as ``[v, d]``."""
    return leaf.T if role == "head" and not cfg.tie_word_embeddings else leaf


def result_bytes(target: ModelConfig, spec: MergeSpec) -> int:
    """Bytes of all transported weights."""
    # a tied target has one table, which plays the head too
    names = {"embed" if x == "head" and target.tie_word_embeddings else x for x in spec.weights}
    return 4 * sum(
        math.prod(param.shape)
        for param in specs.param_specs(target)
        if weight_of(param.path) in names
    )


def peak_bytes(
    target: ModelConfig,
    source: ModelConfig,
    *,
    spec: MergeSpec,
    rows: int,
    plan_at_once: int = BUDGET.plan_block,
) -> int:
    """Bytes of `transport_weights` at its peak, beside models, activations and its result.

    Args:
        target: The target.
        source: The source.
        spec: What moves.
        rows: Rows of activations.
        plan_at_once: As for `transport_weights`.

    Returns:
        Three pieces of a model (of source, base, and their difference); for a pair the maps of both
        sites, the second computed beside the first, or the intermediate results between them.
    """
    peak = 0
    for name in set(spec.weights) & set(PROJECTIONS):
        wiring = PROJECTIONS[name]
        (n_in, m_in), (n_out, m_out) = (
            (site_width(site, target), site_width(site, source))
            for site in (wiring.in_site, wiring.out_site)
        )
        maps = n_in * m_in + n_out * m_out
        between = max(n_in * m_out, n_out * m_in) + n_in * n_out
        plans = [
            couplings.plan_bytes(*pair, rows=rows, plan_at_once=plan_at_once)
            for pair in ((n_in, m_in), (n_out, m_out))
        ]
        peak = max(peak, plans[1], 4 * n_out * m_out + plans[0], 4 * (maps + between))
    return peak + 3 * 4 * max(map(specs.largest_piece, (target, source)))


def flops(
    target: ModelConfig, source: ModelConfig, *, spec: MergeSpec, rows: int, matched: int = 0
) -> tuple[int, int]:
    """FLOPs of the projections, at most, and of the vocabulary tables.

    With ``top1``, weights that read the same site may use different layers, each with a map.

    Args:
        target: The target.
        source: The source.
        spec: What moves and how.
        rows: Rows of activations.
        matched: Tokens that the two vocabularies share.
    """
    names = [name for name in spec.weights if name in PROJECTIONS]
    masked = {PROJECTIONS[name].masked_site for name in names}
    is_soft = spec.layers == "soft"
    pairs = target.num_layers * (source.num_layers if is_soft else 1)

    def sides(site: str) -> tuple[int, int]:
        """Target neurons that are computed, and source neurons."""
        n = site_width(site, target)
        n = n if spec.k is None or site not in masked else min(n, spec.k)
        return n, site_width(site, source)

    ways = [PROJECTIONS[name] for name in names]
    into = {way.in_site for way in ways} if is_soft else [way.in_site for way in ways]
    maps = [sides(site) for site in (*into, *(way.out_site for way in ways))]
    total = sum(2 * rows * n * m for n, m in maps)
    for way in ways:
        (a, p), (b, q) = sides(way.in_site), sides(way.out_site)
        total += 2 * min(a * p * q + a * q * b, p * q * b + a * p * b)
    moving = set(spec.weights) & set(VOCABULARY)
    tables = min(1, len(moving)) if target.tie_word_embeddings else len(moving)
    one_table = vocabulary.flops(
        matched, target_width=target.hidden_size, source_width=source.hidden_size
    )
    return pairs * total, tables * one_table
