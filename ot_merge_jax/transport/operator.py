"""The transported weight: source weights carried into the target's spaces by the plans (SPEC 5)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jaxtyping import Array, Float

from ot_merge_jax import progress
from ot_merge_jax.transport import coupling as couplings
from ot_merge_jax.types import Activations, Coupling, MergeSpec, Potentials


class Pair(NamedTuple):
    """One site, seen from one target layer and one source layer: what rebuilds their plan.

    Attributes:
        x: Target activations ``[t, n]`` of the layer.
        y: Source activations ``[t, m]`` of the layer.
        potentials: Those of the pair.
        std_target: ``[n]``.
        std_source: ``[m]``.
    """

    x: Float[Array, "t n"]
    y: Float[Array, "t m"]
    potentials: Potentials
    std_target: Float[Array, " n"]
    std_source: Float[Array, " m"]


def _pair(
    coupling: Coupling, target: Activations, source: Activations, site: str, l: int, m: int
) -> Pair:
    """The `Pair` of one site; only these two layers' rows are moved to the device."""
    x, y = jax.device_put((target.values[site][l], source.values[site][m]))
    stacks = coupling.feature[site], coupling.std_target[site], coupling.std_source[site]
    return Pair(x, y, *_facts_of(*stacks, l, m))


@jax.jit
def _facts_of(
    potentials: Potentials, std_target: jax.Array, std_source: jax.Array, l: Any, m: Any
) -> tuple[Potentials, jax.Array, jax.Array]:
    """What stacked arrays say of one pair."""
    return jax.tree.map(lambda leaf: leaf[l, m], potentials), std_target[l], std_source[m]


def layer_weights(
    coupling: Coupling, *, in_site: str, out_site: str, spec: MergeSpec
) -> Float[Array, "L M"]:
    """How much of each source layer enters each target layer.

    Args:
        coupling: From `couple`.
        in_site: Space the weight reads.
        out_site: Space it writes.
        spec: ``form`` and ``layers`` are used.

    Returns:
        ``[L, M]``: ``P_eff = sqrt(P_in P_out)`` for the joint form; its rows normalised, or one-hot
        for ``top1``, for the barycentric form.

    Source: Transport and Merge, eq. 13. Differs: normalised rows are ours.
    """
    return _layer_weights(coupling.layer[in_site], coupling.layer[out_site], spec=spec)


@functools.partial(jax.jit, static_argnames=("spec",))
def _layer_weights(
    into: Float[Array, "L M"], out: Float[Array, "L M"], *, spec: MergeSpec
) -> Float[Array, "L M"]:
    """`layer_weights` of two layer plans."""
    # the root of each, because their product may be too small for float32 where they disagree
    effective = jnp.sqrt(into) * jnp.sqrt(out)
    if spec.layers == "top1":
        one_hot = jax.nn.one_hot(effective.argmax(1), effective.shape[1])
        return one_hot if spec.form == "barycentric" else one_hot * effective
    return effective / effective.sum(1, keepdims=True) if spec.form == "barycentric" else effective


def _plan(pair: Pair, spec: MergeSpec) -> Float[Array, "n_t n_s"]:
    """The (signed) plan of a pair."""
    return couplings.rebuild(pair.x, pair.y, pair.potentials, signed=spec.signed)


def _map_out(pair: Pair, spec: MergeSpec) -> Float[Array, "n_t n_s"]:
    """``Phi_out``: the barycentric out-map uses the TARGET marginal and restores the units."""
    plan = _plan(pair, spec)
    if spec.form == "joint":
        return plan
    return pair.std_target[:, None] * (plan.shape[0] * plan) / pair.std_source[None, :]


def _map_in(pair: Pair, spec: MergeSpec) -> Float[Array, "n_s n_t"]:
    """``Phi_in``: the barycentric in-map uses the SOURCE marginal and restores the units."""
    plan = _plan(pair, spec).T
    if spec.form == "joint":
        return plan
    return pair.std_source[:, None] * (plan.shape[0] * plan) / pair.std_target[None, :]


@functools.partial(jax.jit, static_argnames=("spec",))
def _add_kernel(
    total: Float[Array, "d_in_t d_out_t"],
    share: Float[Array, ""],
    kernel: Float[Array, "d_in d_out"],
    into: Pair,
    out: Pair,
    *,
    spec: MergeSpec,
) -> Float[Array, "d_in_t d_out_t"]:
    """``total + share Phi_in^T K Phi_out^T``."""
    # the cheaper order of the two products is chosen by their FLOPs
    carried = jnp.linalg.multi_dot(
        [_map_in(into, spec).T, kernel.astype(jnp.float32), _map_out(out, spec).T],
        precision=jax.lax.Precision.HIGHEST,
    )
    return total + share * carried


@functools.partial(jax.jit, static_argnames=("spec",))
def _add_bias(
    total: Float[Array, " d_out_t"],
    share: Float[Array, ""],
    bias: Float[Array, " d_out"],
    out: Pair,
    *,
    spec: MergeSpec,
) -> Float[Array, " d_out_t"]:
    """``total + share Phi_out b``."""
    carried = jnp.matmul(
        _map_out(out, spec), bias.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    return total + share * carried


def _used(share: Float[Array, "L M"]) -> list[tuple[int, list[int]]]:
    """Which target layers each source layer enters; all of them where that is traced."""
    if isinstance(share, core.Tracer):
        return [(m, list(range(share.shape[0]))) for m in range(share.shape[1])]
    return [(m, np.flatnonzero(column).tolist()) for m, column in enumerate(np.asarray(share).T)]


def transported(
    weights: Any,
    coupling: Coupling,
    target: Activations,
    source: Activations,
    *,
    in_site: str,
    out_site: str,
    spec: MergeSpec,
) -> Float[Array, "L d_in_t d_out_t"]:
    r"""Carries one kind of kernel from all source layers to all target layers.

    .. math:: \tilde W_l = \sum_m w_{lm}\, \Phi^{out}_{lm} W_m \Phi^{in}_{lm}

    in torch orientation; kernels here are transposed. ``joint``: the maps are the plans, which have
    total mass 1, so the result all but vanishes. ``barycentric``: rows of both maps sum to 1 before
    the units (standard deviations) of each space are restored.

    Args:
        weights: Source kernels, ``[d_in, d_out]`` each, for rule ``delta`` the source minus its
            base; an array, or anything else that gives layer ``m`` as ``weights[m]``. One is asked
            for at a time, and only those that some target layer uses.
        coupling: From `couple`.
        target: The target activations it was made from.
        source: The source activations it was made from.
        in_site: Space the weight reads.
        out_site: Space the weight writes.
        spec: ``form``, ``layers`` and ``signed`` are used.

    Returns:
        ``[L, d_in, d_out]`` float32 in the target's widths.

    Example:
        >>> import numpy as np
        >>> from ot_merge_jax.types import HParams
        >>> x = np.random.default_rng(0).normal(size=(1, 200, 3)).astype(np.float32)
        >>> acts = Activations({"mlp_in": x, "up_out": x[..., ::-1]}, np.arange(200))
        >>> spec = MergeSpec(weights=("up",))
        >>> coupling = couplings.couple(acts, acts, HParams(1.0), spec=spec)
        >>> kernel = jnp.arange(9.0).reshape(1, 3, 3)  # the plans are identities: it comes back
        >>> moved = transported(kernel, coupling, acts, acts,
        ...                     in_site="mlp_in", out_site="up_out", spec=spec)
        >>> bool(jnp.allclose(moved, kernel, atol=1e-3))
        True

    Source: Transport and Merge, eq. 14. Differs: ``barycentric`` is ours (SPEC section 5).
    """
    share = layer_weights(coupling, in_site=in_site, out_site=out_site, spec=spec)
    shape = tuple(target.values[site].shape[-1] for site in (in_site, out_site))
    moved = [jnp.zeros(shape)] * share.shape[0]
    for m, layers in progress.track(_used(share), f"transport {in_site} -> {out_site} (layers)"):
        kernel = jnp.asarray(weights[m]) if layers else None
        for l in layers:
            into, out = (
                _pair(coupling, target, source, site, l, m) for site in (in_site, out_site)
            )
            moved[l] = _add_kernel(moved[l], share[l, m], kernel, into, out, spec=spec)
            jax.block_until_ready(moved[l])  # or the rows of all pairs would wait in memory
    return jnp.stack(moved)


def transported_bias(
    biases: Any,
    coupling: Coupling,
    target: Activations,
    source: Activations,
    *,
    in_site: str,
    out_site: str,
    spec: MergeSpec,
) -> Float[Array, "L d_out_t"]:
    """Carries the biases of one kind of weight; the out-map alone applies (SPEC section 5).

    Args:
        biases: Source biases of all layers, as the ``weights`` of `transported`.
        coupling: From `couple`.
        target: The target activations it was made from.
        source: The source activations it was made from.
        in_site: Space the weight reads; it shares in the layer weights.
        out_site: Space the weight writes.
        spec: ``form``, ``layers`` and ``signed`` are used.

    Returns:
        ``[L, d_out]`` float32 in the target's widths.
    """
    share = layer_weights(coupling, in_site=in_site, out_site=out_site, spec=spec)
    moved = [jnp.zeros(target.values[out_site].shape[-1])] * share.shape[0]
    for m, layers in _used(share):
        bias = jnp.asarray(biases[m]) if layers else None
        for l in layers:
            out = _pair(coupling, target, source, out_site, l, m)
            moved[l] = _add_bias(moved[l], share[l, m], bias, out, spec=spec)
    return jnp.stack(moved)
