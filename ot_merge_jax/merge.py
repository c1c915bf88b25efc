"""The stages composed: activations -> coupling -> transported weights -> fused parameters.

`merge` is the one call; `prepare` is everything before the strength matters, so that strengths can
be swept without doing it again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import core

from ot_merge_jax import fuse
from ot_merge_jax.activations import gather
from ot_merge_jax.config import ModelConfig
from ot_merge_jax.errors import InputError, RecipeError
from ot_merge_jax.models import specs
from ot_merge_jax.spaces import PROJECTIONS, VOCABULARY, sites_of, weight_of
from ot_merge_jax.transport import coupling as couplings
from ot_merge_jax.transport import diagnostics, operator
from ot_merge_jax.transport import vocabulary as vocabularies
from ot_merge_jax.types import (
    Activations,
    Batch,
    Coupling,
    HParams,
    MergeReport,
    MergeSpec,
    Params,
    Potentials,
    VocabularyMatch,
    WeightReport,
)

Model = tuple[ModelConfig, Params]
#: ``|strength W~| / |W|`` below which nothing was transferred (SPEC section 13).
NOTHING = 1e-4


class Prepared(NamedTuple):
    """A merge up to the strength.

    Attributes:
        moved: Parameter path -> transported weight (of the delta, for rule ``delta``).
        masks: Parameter path -> mask.
        coupling: None when only the vocabulary moves.
        target: Activations of the target; None when only the vocabulary moves.
        source: Activations the coupling was made with; None when only the vocabulary moves.
    """

    moved: dict[str, jax.Array]
    masks: dict[str, jax.Array]
    coupling: Coupling | None
    target: Activations | None
    source: Activations | None


def merge(
    target: Model,
    source: Model,
    batches: tuple[Sequence[Batch], Sequence[Batch]],
    hparams: HParams,
    *,
    spec: MergeSpec,
    source_base: Model | None = None,
    vocabulary: VocabularyMatch | None = None,
) -> tuple[Params, MergeReport]:
    """Merges the source into the target.

    Args:
        target: Configuration and parameters of the target; its shapes are the result's.
        source: The same of the source, of any other width, depth or family.
        batches: Row-aligned batches of target and source (`calibration.align`).
        hparams: Strength, epsilons and threshold; its numbers may be traced.
        spec: What moves and how.
        source_base: What the source was fine-tuned from; needed by rule ``delta``, and if given,
            what the source is aligned by.
        vocabulary: Matched tokens; needed when ``embed`` or ``head`` moves.

    Returns:
        The fused parameters, in the target's dtypes, and the diagnostics.

    Raises:
        RecipeError: if the spec needs a source base or a vocabulary that is not given.
        InputError: if source and source base have different shapes.
        NonFiniteError: if activations are not finite.

    Example:
        >>> from ot_merge_jax import assets, calibration, texts
        >>> from ot_merge_jax.io.hf import load_hf
        >>> names = ("sibling", "source", "source-base")
        >>> target, source, base = (load_hf(assets.path(name)) for name in names)
        >>> tokenizer = calibration.load_tokenizer(assets.path("sibling"))
        >>> documents = list(texts.read_documents(assets.path("calibration.jsonl")))[:8]
        >>> data = calibration.align(documents, tokenizer, tokenizer, rows="token", max_rows=100)
        >>> params, report = merge(target, source, (data.target, data.source), HParams(0.8),
        ...                        spec=MergeSpec(weights=("down",)), source_base=base)
        >>> report.weights["down"].source_layer.shape == (target[0].num_layers,)
        True

    Source: Transport and Merge, arXiv 2602.05495, sections 4 and 5. Differs: see `MergeSpec`.
    """
    prepared = prepare(
        target,
        source,
        batches,
        hparams,
        spec=spec,
        source_base=source_base,
        vocabulary=vocabulary,
    )
    fused = fuse.fuse(target[1], prepared.moved, hparams.strength, spec=spec, mask=prepared.masks)
    return fused, describe(target, prepared, hparams, spec=spec)


def prepare(
    target: Model,
    source: Model,
    batches: tuple[Sequence[Batch], Sequence[Batch]],
    hparams: HParams,
    *,
    spec: MergeSpec,
    source_base: Model | None = None,
    vocabulary: VocabularyMatch | None = None,
) -> Prepared:
    """Everything of `merge` that does not depend on the strength; same arguments."""
    reference = source_base or source
    check_needs(source, source_base, vocabulary, spec=spec)
    found = rows = None
    if sites := sites_of(spec.weights):
        role = "source base" if source_base else "source"
        rows = (
            gather(target[1], batches[0], cfg=target[0], sites=sites, model="target"),
            gather(reference[1], batches[1], cfg=reference[0], sites=sites, model=role),
        )
        found = couplings.couple(*rows, hparams, spec=spec)
    moved, masks = move(
        target, source, found, rows, spec=spec, source_base=source_base, vocabulary=vocabulary
    )
    return Prepared(moved, masks, found, *(rows or (None, None)))


def check_needs(
    source: Model,
    source_base: Model | None,
    vocabulary: VocabularyMatch | None,
    *,
    spec: MergeSpec,
) -> None:
    """Refuses a spec that needs a source base or matched tokens that are not given."""
    if spec.rule == "delta" and source_base is None:
        raise RecipeError(
            "rule: delta needs source_base, the checkpoint the source was fine-tuned from; "
            "give it or choose the preset barycentric."
        )
    check_base(source, source_base)
    if set(spec.weights) & set(VOCABULARY) and vocabulary is None:
        raise RecipeError("Moving embed or head needs the matched tokens of the two vocabularies.")


def move(
    target: Model,
    source: Model,
    coupling: Coupling | None,
    rows: tuple[Activations, Activations] | None,
    *,
    spec: MergeSpec,
    source_base: Model | None = None,
    vocabulary: VocabularyMatch | None = None,
    aligned_with: Model | None = None,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The transported weights and their masks, by parameter path.

    Args:
        target: Configuration and parameters of the target.
        source: The same of the source.
        coupling: From `couplings.couple`; None when only the vocabulary moves.
        rows: The activations the coupling was made with; None when only the vocabulary moves.
        spec: What moves and how.
        source_base: What the source was fine-tuned from; its weights are subtracted for ``delta``.
        vocabulary: Matched tokens; needed when ``embed`` or ``head`` moves.
        aligned_with: The model whose tables the vocabulary map is fitted on; None: the source base
            if there is one, else the source.

    Returns:
        Path -> transported weight (of the delta, for rule ``delta``), and path -> mask.

    Raises:
        RecipeError: if the spec needs a source base or a vocabulary that is not given.
    """
    check_needs(source, source_base, vocabulary, spec=spec)

    def carried(path: str) -> Any:
        """What of a leaf of the source is carried over; a stacked one is indexed by layer."""
        of_source = specs.get(source[1], path)
        if spec.rule != "delta" or source_base is None:
            return of_source
        change = _Change(of_source, specs.get(source_base[1], path))
        return change if path.startswith("layers/") else change[...]

    moved: dict[str, jax.Array] = {}
    masks: dict[str, jax.Array] = {}
    if coupling is not None and rows is not None:
        selected = fuse.selected(rows[0], spec=spec)
        moved = _projections(target[1], source[1], carried, coupling, *rows, selected, spec=spec)
        masks = fuse.masks(rows[0], spec=spec)
    if vocabulary is not None and set(spec.weights) & set(VOCABULARY):
        reference = aligned_with or source_base or source
        tables, kept = _tables(target, source[0], carried, reference, vocabulary, spec=spec)
        moved, masks = moved | tables, masks | kept
    return moved, masks


@dataclass(frozen=True)
class _Change:
    """What the fine-tune changed in a leaf, float32; of a stacked leaf one layer at a time."""

    source: Any
    base: Any

    def __getitem__(self, index: Any) -> jax.Array:
        return _difference(self.source[index], self.base[index])


@jax.jit
def _difference(source: jax.Array, base: jax.Array) -> jax.Array:
    """Source minus base, float32."""
    return source.astype(jnp.float32) - base.astype(jnp.float32)


def check_base(source: Model, source_base: Model | None) -> None:
    """Refuses a source base that is not of the source's shapes."""
    if source_base is None:
        return
    shapes = [
        {spec.path: spec.shape for spec in specs.param_specs(cfg)}
        for cfg, _ in (source, source_base)
    ]
    if shapes[0] != shapes[1]:
        differing = sorted(path for path in shapes[0].keys() | shapes[1].keys()
                           if shapes[0].get(path) != shapes[1].get(path))  # fmt: skip
        raise InputError(
            "The source base is not what the source was fine-tuned from: "
            f"{', '.join(differing[:4])} differ in shape; give the right checkpoint."
        )


def _projections(
    target: Params,
    source: Params,
    carried: Callable[[str], Any],
    found: Coupling,
    rows_target: Activations,
    rows_source: Activations,
    selected: Mapping[str, np.ndarray],
    *,
    spec: MergeSpec,
) -> dict[str, jax.Array]:
    """Transported kernels and, where both models have them, biases."""
    moved = {}
    chosen = [wiring for name, wiring in PROJECTIONS.items() if name in spec.weights]
    for in_site in dict.fromkeys(wiring.in_site for wiring in chosen):
        wirings = [wiring for wiring in chosen if wiring.in_site == in_site]
        kinds = []
        for wiring in wirings:
            bias = f"{wiring.path}/bias"
            has_bias = specs.has(source, bias) and specs.has(target, bias)
            kinds.append(
                operator.Kind(
                    wiring.out_site,
                    kernels=carried(f"{wiring.path}/kernel"),
                    biases=carried(bias) if has_bias else None,
                )
            )
        found_here = operator.carry(
            kinds, found, rows_target, rows_source, in_site=in_site, spec=spec, selected=selected
        )
        for wiring, (kernel, bias) in zip(wirings, found_here, strict=True):
            moved[f"{wiring.path}/kernel"] = kernel
            if bias is not None:
                moved[f"{wiring.path}/bias"] = bias
    return moved


def _tables(
    target: Model,
    source: ModelConfig,
    carried: Callable[[str], Any],
    reference: Model,
    matched: VocabularyMatch,
    *,
    spec: MergeSpec,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Moved vocabulary tables and the masks of their matched rows.

    A tied target's one table plays the head's role: it moves once, by the head's map and delta.
    """
    moved, masks = {}, {}
    is_tied = target[0].tie_word_embeddings
    roles = {"head" if is_tied else name for name in spec.weights if name in VOCABULARY}
    for role in sorted(roles):
        aim = _table(target, role)
        rotation = vocabularies.procrustes(
            vocabularies.rows_of(_table(reference, role), matched.source_ids),
            vocabularies.rows_of(aim, matched.target_ids),
            weights=matched.weights,
        )
        table, mask = vocabularies.moved_rows(
            _oriented(carried(_place(source, role)), role, source),
            rotation,
            matched,
            size=aim.shape[0],
        )
        is_head = role == "head" and not is_tied
        path = VOCABULARY["head" if is_head else "embed"]
        moved[path], masks[path] = (table.T, mask.T) if is_head else (table, mask)
    return moved, masks


def _table(model: Model, role: str) -> jax.Array:
    """The table ``[v, d]`` that plays a role; a tied table plays both."""
    cfg, params = model
    return _oriented(specs.get(params, _place(cfg, role)), role, cfg)


def _place(cfg: ModelConfig, role: str) -> str:
    """Where the table that plays a role lives."""
    return VOCABULARY["embed" if cfg.tie_word_embeddings else role]


def _oriented(leaf: jax.Array, role: str, cfg: ModelConfig) -> jax.Array:
    """That leaf as ``[v, d]``."""
    return leaf.T if role == "head" and not cfg.tie_word_embeddings else leaf


def describe(
    target: Model, prepared: Prepared, hparams: HParams, *, spec: MergeSpec
) -> MergeReport:
    """The diagnostics of SPEC section 13, for a strength.

    Args:
        target: Configuration and parameters of the target before the merge.
        prepared: From `prepare`.
        hparams: The strength used.
        spec: What moved and how.

    Returns:
        Norm ratios over the selected entries, and how sharp and how converged the plans were.
    """
    weights = {}
    paths = {weight_of(path): path for path in prepared.moved if not path.endswith("/bias")}
    for name in (name for name in (*PROJECTIONS, *VOCABULARY) if name in paths):
        path = paths[name]
        moved = prepared.moved[path]
        strength = fuse.strength_of(hparams.strength, name)
        kernel, mask = specs.get(target[1], path), prepared.masks.get(path)
        ratios = _ratios(kernel, moved, mask, strength, rule=spec.rule)
        if name in PROJECTIONS:
            plans = _plan_facts(name, prepared, spec)
        else:
            ratios, plans = jax.tree.map(jnp.atleast_1d, ratios), _NO_PLAN
        weights[name] = WeightReport(*ratios, *plans)
    rows = 0 if prepared.target is None else len(prepared.target.row_id)
    return MergeReport(weights, prepared.coupling, rows)


@functools.partial(jax.jit, static_argnames="rule")
def _ratios(
    weight: jax.Array, moved: jax.Array, mask: jax.Array | None, strength: Any, *, rule: str
) -> tuple[jax.Array, jax.Array]:
    """``|W~| / |W|`` and ``|dW| / |W|`` over the selected entries, for each layer of a stack."""

    def norm(x: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.sum(x * x, (-2, -1)))

    weight = weight.astype(jnp.float32)
    change = fuse.scaled(strength, moved) * fuse.update(weight, moved, mask, rule=rule)
    selected = jnp.ones(()) if mask is None else mask
    size = norm(selected * weight)
    size = jnp.where(size > 0, size, 1.0)
    return norm(selected * moved) / size, norm(change) / size


def _plan_facts(name: str, prepared: Prepared, spec: MergeSpec) -> tuple[jax.Array, ...]:
    """Source layer, sharpness and convergence of the plans of one projection, for each layer."""
    found, wiring = prepared.coupling, PROJECTIONS[name]
    assert found is not None
    share = operator.layer_weights(
        found, in_site=wiring.in_site, out_site=wiring.out_site, spec=spec
    )
    best = share.argmax(1)
    into, out = (
        (_neighbours(prepared, site, best, spec), *_worst(share, found.feature[site]))
        for site in (wiring.in_site, wiring.out_site)
    )
    return _joined(share, into, out)


def _neighbours(prepared: Prepared, site: str, best: jax.Array, spec: MergeSpec) -> jax.Array:
    """Effective neighbours at a site, of each target layer's plan with its best source layer."""
    assert prepared.coupling is not None
    assert prepared.target is not None
    assert prepared.source is not None
    xs, ys = prepared.target.values[site], prepared.source.values[site]
    if isinstance(best, core.Tracer):
        ys = jnp.asarray(ys)  # of concrete ones only the layers that are used leave the host
    else:
        best = np.asarray(best)  # pyright: ignore[reportAssignmentType]
    rows, found = diagnostics.sample(xs.shape[-1]), []
    for l, x in enumerate(xs):
        pair = jax.tree.map(lambda leaf: leaf[l, best[l]], prepared.coupling.feature[site])  # noqa: B023
        found.append(_neighbours_of(x, ys[best[l]], pair, rows, signed=spec.signed))
    return jnp.stack(found)


@functools.partial(jax.jit, static_argnames="signed")
def _neighbours_of(
    x: jax.Array, y: jax.Array, pair: Potentials, rows: jax.Array, *, signed: bool
) -> jax.Array:
    """Effective neighbours of one pair, over a sample of target neurons."""
    return diagnostics.effective_neighbours(couplings.rebuild(x, y, pair, rows, signed=signed))


@jax.jit
def _worst(share: jax.Array, potentials: Potentials) -> tuple[jax.Array, ...]:
    """Largest error, most iterations and convergence at one site, over the pairs that are used."""
    is_used = share > 0
    return (
        jnp.where(is_used, potentials.error, 0).max(1),
        jnp.where(is_used, potentials.iterations, 0).max(1),
        (potentials.converged | ~is_used).all(1),
    )


@jax.jit
def _joined(
    share: jax.Array, into: tuple[jax.Array, ...], out: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    """The facts of both sites of a projection, the worse of the two where there is one figure."""
    worse = jnp.maximum(into[1], out[1]), jnp.maximum(into[2], out[2])
    return share.argmax(1), out[0], into[0], *worse, into[3] & out[3]


#: Stands in for the facts of plans where tokens are matched one to one.
_NO_PLAN = (
    np.array([-1]),
    np.ones(1, np.float32),
    np.ones(1, np.float32),
    np.zeros(1, np.float32),
    np.zeros(1, np.int32),
    np.ones(1, bool),
)


def is_nothing_transferred(report: MergeReport, hparams: HParams) -> bool:
    """Whether the largest ``|strength W~| / |W|`` over moved weights is below `NOTHING`."""
    largest = 0.0
    for name, weight in report.weights.items():
        strength = jnp.max(jnp.abs(jnp.asarray(fuse.strength_of(hparams.strength, name))))
        largest = max(largest, float(strength * jnp.max(weight.ratio_transported)))
    return largest < NOTHING
