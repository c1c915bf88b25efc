"""Diagnostics of a coupling, site by site: how sharp its plans are, what they predict."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ot_merge_jax.transport import coupling as couplings
from ot_merge_jax.transport import diagnostics
from ot_merge_jax.types import BUDGET, Activations, Alignment, Potentials

_CURVE_SHARES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)


class MassCurve(NamedTuple):
    """Share of a plan's mass in its ``k`` largest entries.

    Attributes:
        k: Numbers of entries.
        share: A row for each target layer, a column for each ``k``.
    """

    k: tuple[int, ...]
    share: Sequence[np.ndarray]


class SiteDiagnostics(NamedTuple):
    """Diagnostics of a site; those of a pair of layers use the most coupled source layer.

    Attributes:
        layer_cost: ``[L, M]``.
        layer_plan: ``[L, M]``.
        mass_curve: Of every target layer.
        r2: Held-out R^2 of every target layer; None for each without held-out rows.
        r2_permuted: The same for the permuted plans.
        sorted_heat: A sorted picture of the first target layer's plan.
        largest_error: Largest marginal error of all plans.
        most_iterations: Most iterations of any plan.
        converged: Share of the plans that converged.
        in_log_form: Share of the plans that were solved in log domain.
    """

    layer_cost: jax.Array
    layer_plan: jax.Array
    mass_curve: MassCurve
    r2: Sequence[jax.Array | None]
    r2_permuted: Sequence[jax.Array | None]
    sorted_heat: np.ndarray | None
    largest_error: float
    most_iterations: int
    converged: float
    in_log_form: float


def sites(
    alignment: Alignment,
    held_out: tuple[Activations, Activations] | None,
    *,
    signed: bool,
    seed: int,
    plan_at_once: int = BUDGET.plan_block,
) -> dict[str, SiteDiagnostics]:
    """Diagnostics of every site.

    Args:
        alignment: The coupling and the rows it was made from.
        held_out: Activations of rows the plans were not fitted on, or None if there are none.
        signed: Whether the coupling was made with ``signed``.
        seed: Of the permutation the plan is compared with.
        plan_at_once: Entries of a plan that are rebuilt at a time, at least one row's.

    Returns:
        Site -> diagnostics. For a wide site a sample of target neurons stands for all
        (`diagnostics.sample`).
    """
    coupling, x, y = alignment
    result = {}
    for site, layer_plan in coupling.layer_plan.items():
        potentials = coupling.neuron_potentials[site]
        n, m = potentials.f.shape[-1], potentials.g.shape[-1]
        neurons = diagnostics.sample(n)
        ks = tuple(max(1, round(share * len(neurons) * m)) for share in _CURVE_SHARES)
        order = np.random.default_rng(seed).permutation(m)
        pairs = []
        for l, best in enumerate(np.asarray(layer_plan).argmax(1)):
            pair = jax.tree.map(lambda leaf: np.asarray(leaf)[l, best], potentials)  # noqa: B023
            rows = x.values[site][l], y.values[site][best]
            new = None
            if held_out is not None:
                new = held_out[0].values[site][l], held_out[1].values[site][best]
            plan, r2, permuted = _pair_facts(
                pair, rows, new, order, neurons, signed=signed, plan_at_once=plan_at_once
            )
            plan = np.asarray(plan)
            heat = None if pairs else diagnostics.sorted_heat(plan)
            pairs.append((diagnostics.mass_curve(plan, ks), r2, permuted, heat))
        curves, r2, permuted, heats = zip(*pairs, strict=True)
        result[site] = SiteDiagnostics(
            layer_cost=potentials.cost,
            layer_plan=layer_plan,
            mass_curve=MassCurve(ks, curves),
            r2=r2,
            r2_permuted=permuted,
            sorted_heat=heats[0],
            largest_error=float(np.max(potentials.error)),
            most_iterations=int(np.max(potentials.iterations)),
            converged=float(np.mean(potentials.converged)),
            in_log_form=float(np.mean(potentials.used_log_domain)),
        )
    return result


@functools.partial(jax.jit, static_argnames=("signed", "plan_at_once"))
def _pair_facts(
    pair: Potentials,
    rows: tuple[jax.Array, jax.Array],
    new: tuple[jax.Array, jax.Array] | None,
    order: jax.Array,
    neurons: jax.Array,
    *,
    signed: bool,
    plan_at_once: int,
) -> tuple[jax.Array | None, ...]:
    """The plan, its held-out R^2, and that of the permuted plan.

    Only the target's ``neurons`` count; their rows of the plan are a plan of their own.
    """
    share = pair.f.shape[0] / neurons.shape[0]
    rebuilt = couplings.rebuild(*rows, pair, neurons, signed=signed, plan_at_once=plan_at_once)
    plan = share * rebuilt
    rows = rows[0][:, neurons], rows[1]
    r2 = permuted = None
    if new is not None:
        new = new[0][:, neurons], new[1]
        r2, permuted = jax.lax.map(  # not written twice: it would be compiled twice
            lambda tested: diagnostics.held_out_r2(tested, rows, new),
            jnp.stack([plan, plan[:, order]]),
        )
    return plan, r2, permuted
