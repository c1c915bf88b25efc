"""Diagnostics of the weights that a merge moved (method: Diagnostics)."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core

from ot_merge_jax.merging import fuse, projections
from ot_merge_jax.models import specs
from ot_merge_jax.models.sites import PROJECTIONS, VOCABULARY, weight_of
from ot_merge_jax.transport import coupling as couplings
from ot_merge_jax.transport import diagnostics
from ot_merge_jax.types import (
    BUDGET,
    Alignment,
    HParams,
    MergeReport,
    MergeSpec,
    Params,
    Potentials,
    Transported,
    WeightReport,
)

#: ``|strength W~| / |W|`` below which nothing was transferred (method: Diagnostics).
NOTHING = 1e-4


def describe(
    target: Params,
    transported: Transported,
    alignment: Alignment | None,
    hparams: HParams,
    *,
    spec: MergeSpec,
    plan_at_once: int = BUDGET.plan_block,
) -> MergeReport:
    """The diagnostics of method: Diagnostics, for a strength.

    Args:
        target: Parameters of the target before the merge.
        transported: From `ot_merge_jax.merging.weight_transport.transport_weights`.
        alignment: What it was made with; None when only the vocabulary moved.
        hparams: The strength used.
        spec: What moved and how.
        plan_at_once: Entries of a plan that are rebuilt at a time, at least one row's.

    Returns:
        Norm ratios over the selected entries, and how sharp and how converged the plans were.
    """
    weights = {}
    paths = {weight_of(path): path for path in transported.weights if not path.endswith("/bias")}
    for name in (name for name in (*PROJECTIONS, *VOCABULARY) if name in paths):
        path = paths[name]
        moved = transported.weights[path]
        strength = fuse.strength_of(hparams.strength, name)
        kernel, mask = specs.get(target, path), transported.masks.get(path)
        ratios = _ratios(kernel, moved, mask, strength, rule=spec.rule)
        if name in PROJECTIONS and alignment is not None:
            plans = _plan_facts(name, alignment, spec, plan_at_once)
        else:
            ratios, plans = jax.tree.map(jnp.atleast_1d, ratios), _NO_PLAN
        weights[name] = WeightReport(*ratios, *plans)
    if alignment is None:
        return MergeReport(weights, None, 0)
    return MergeReport(weights, alignment.coupling, len(alignment.target.row_id))


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


def _plan_facts(
    name: str, alignment: Alignment, spec: MergeSpec, plan_at_once: int
) -> tuple[jax.Array, ...]:
    """Source layer, sharpness and convergence of the plans of one projection, for each layer."""
    coupling, wiring = alignment.coupling, PROJECTIONS[name]
    share = projections.layer_weights(
        coupling, in_site=wiring.in_site, out_site=wiring.out_site, spec=spec
    )
    best = share.argmax(1)
    into, out = (
        (
            _neighbours(alignment, site, best, spec, plan_at_once),
            *_worst(share, coupling.neuron_potentials[site]),
        )
        for site in (wiring.in_site, wiring.out_site)
    )
    return _joined(share, into, out)


def _neighbours(
    alignment: Alignment, site: str, best: jax.Array, spec: MergeSpec, plan_at_once: int
) -> jax.Array:
    """Effective neighbours at a site, of each target layer's plan with its best source layer."""
    xs, ys = alignment.target.values[site], alignment.source.values[site]
    if isinstance(best, core.Tracer):
        ys = jnp.asarray(ys)  # outside a trace only the layers that are used leave the host
    else:
        best = np.asarray(best)  # pyright: ignore[reportAssignmentType]
    neighbours_of = functools.partial(_neighbours_of, signed=spec.signed, plan_at_once=plan_at_once)
    potentials = alignment.coupling.neuron_potentials[site]
    rows, neighbours = diagnostics.sample(xs.shape[-1]), []
    for l, x in enumerate(xs):
        pair = jax.tree.map(lambda leaf, l=l: leaf[l, best[l]], potentials)
        neighbours.append(neighbours_of(x, ys[best[l]], pair, rows))
    return jnp.stack(neighbours)


@functools.partial(jax.jit, static_argnames=("signed", "plan_at_once"))
def _neighbours_of(
    x: jax.Array,
    y: jax.Array,
    pair: Potentials,
    rows: jax.Array,
    *,
    signed: bool,
    plan_at_once: int,
) -> jax.Array:
    """Effective neighbours of one pair, over a sample of target neurons."""
    plan = couplings.rebuild(x, y, pair, rows, signed=signed, plan_at_once=plan_at_once)
    return diagnostics.effective_neighbours(plan)


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
    """The facts of both sites of a projection, the worse where there is one figure for both."""
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


def peak_bytes(
    problems: Iterable[tuple[int, int]], *, rows: int, plan_at_once: int = BUDGET.plan_block
) -> int:
    """Bytes needed to examine a sample of a plan's rows, here and in the report.

    Args:
        problems: Neurons of target and source at each site.
        rows: Rows of activations.
        plan_at_once: As for `describe`.

    Returns:
        For the widest site: what rebuilds that part of the plan; the part twice, and a sorted copy.
    """
    return max(
        couplings.plan_bytes(n, m, rows=rows, picked=diagnostics.SAMPLE, plan_at_once=plan_at_once)
        + 4 * 4 * min(n, diagnostics.SAMPLE) * m
        for n, m in problems
    )


def is_nothing_transferred(report: MergeReport, hparams: HParams) -> bool:
    """Whether the largest ``|strength W~| / |W|`` over moved weights is below `NOTHING`."""
    largest = 0.0
    for name, weight in report.weights.items():
        strength = jnp.max(jnp.abs(jnp.asarray(fuse.strength_of(hparams.strength, name))))
        largest = max(largest, float(strength * jnp.max(weight.ratio_transported)))
    return largest < NOTHING
