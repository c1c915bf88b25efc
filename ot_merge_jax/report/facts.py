"""The numbers of a run as plain JSON values: diagnostics of weights and sites (SPEC 13)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ot_merge_jax.evaluate.compare import paired_bootstrap
from ot_merge_jax.evaluate.nll import Scores
from ot_merge_jax.io.checkpoint import plain
from ot_merge_jax.transport import coupling as couplings
from ot_merge_jax.transport import diagnostics
from ot_merge_jax.types import BUDGET, Activations, Alignment, MergeReport, MergeSpec, Potentials

_CURVE_SHARES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)


def weights(report: MergeReport) -> dict[str, Any]:
    """Diagnostics of every moved weight, an entry for each layer."""
    return {name: plain(one) for name, one in report.weights.items()}


def sites(
    alignment: Alignment | None,
    held_out: tuple[Activations, Activations] | None,
    *,
    spec: MergeSpec,
    seed: int,
    plan_at_once: int = BUDGET.plan_block,
) -> dict[str, Any]:
    """Diagnostics of every site: layer plan and cost, how sharp the plans are, what they predict.

    Args:
        alignment: From `merge.align_activations`; None if only the vocabulary moved.
        held_out: Activations of rows the plans have not seen, or None if there are none.
        spec: What moved and how.
        seed: Of the permutation the plan is compared with.
        plan_at_once: Entries of a plan that are rebuilt at a time, at least one row's.

    Returns:
        For each site: ``layer_cost`` and ``layer_plan`` ``[L, M]``; for the most coupled source
        layer of each target layer ``mass_curve``, ``r2`` and ``r2_permuted``; a sorted picture of
        of the first of those plans; totals of iterations, error, convergence, and how many were
        solved in log form. Of a wide site a sample of target neurons stands for all
        (`diagnostics.sample`).
    """
    if alignment is None:
        return {}
    found, x, y = alignment
    result = {}
    for site, layer in found.layer.items():
        potentials = found.feature[site]
        n, m = potentials.f.shape[-1], potentials.g.shape[-1]
        seen = diagnostics.sample(n)
        ks = tuple(max(1, round(share * len(seen) * m)) for share in _CURVE_SHARES)
        order = np.random.default_rng(seed).permutation(m)
        pairs = []
        for l, best in enumerate(np.asarray(layer).argmax(1)):
            pair = jax.tree.map(lambda leaf: np.asarray(leaf)[l, best], potentials)  # noqa: B023
            rows = x.values[site][l], y.values[site][best]
            new = None
            if held_out is not None:
                new = held_out[0].values[site][l], held_out[1].values[site][best]
            plan, *known = _pair_facts(
                pair, rows, new, order, seen, signed=spec.signed, plan_at_once=plan_at_once
            )
            plan = np.asarray(plan)
            heat = None if pairs else diagnostics.sorted_heat(plan)
            pairs.append((diagnostics.mass_curve(plan, ks), *known, heat))
        curves, r2, permuted, heats = zip(*pairs, strict=True)
        result[site] = plain(
            {
                "layer_cost": potentials.cost,
                "layer_plan": layer,
                "mass_curve": {"k": ks, "share": curves},
                "r2": r2,
                "r2_permuted": permuted,
                "sorted_heat": heats[0],
                "largest_error": np.max(potentials.error),
                "most_iterations": np.max(potentials.iterations),
                "converged": np.mean(potentials.converged),
                "in_log_form": np.mean(potentials.is_log),
            }
        )
    return result


@functools.partial(jax.jit, static_argnames=("signed", "plan_at_once"))
def _pair_facts(
    pair: Potentials,
    rows: tuple[jax.Array, jax.Array],
    new: tuple[jax.Array, jax.Array] | None,
    order: jax.Array,
    seen: jax.Array,
    *,
    signed: bool,
    plan_at_once: int,
) -> tuple[jax.Array | None, ...]:
    """The plan, its held-out R^2, and that of the permuted plan.

    Of the target's neurons that are ``seen``; their rows of the plan are a plan of their own.
    """
    share = pair.f.shape[0] / seen.shape[0]
    made = couplings.rebuild(*rows, pair, seen, signed=signed, plan_at_once=plan_at_once)
    plan = share * made
    rows = rows[0][:, seen], rows[1]
    r2 = permuted = None
    if new is not None:
        new = new[0][:, seen], new[1]
        r2, permuted = jax.lax.map(  # not written twice: it would be compiled twice
            lambda one: diagnostics.held_out_r2(one, rows, new), jnp.stack([plan, plan[:, order]])
        )
    return plan, r2, permuted


def compared(
    scores: dict[str, Scores], *, has_one_tokenizer: dict[str, bool], seed: int
) -> dict[str, Any]:
    """Loss of every model on the held-out text, and its difference from the target.

    Args:
        scores: Name -> scores; must hold ``target``.
        has_one_tokenizer: Name -> whether its tokenizer is the target's; if not, only bits per byte
            are compared.
        seed: Of the bootstrap.

    Returns:
        JSON values.
    """
    result: dict[str, Any] = {}
    for name, one in scores.items():
        result[name] = dict(one.totals)
        if name != "target":
            metric = "nll_per_token" if has_one_tokenizer[name] else "bits_per_byte"
            change = paired_bootstrap(one, scores["target"], metric=metric, seed=seed)
            result[name]["against_target"] = {"metric": metric, **change._asdict()}
    return result
