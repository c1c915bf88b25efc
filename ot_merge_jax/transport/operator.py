"""The transported weight: source weights carried into the target's spaces by the plans (SPEC 5)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ot_merge_jax import progress
from ot_merge_jax.transport import coupling as couplings
from ot_merge_jax.types import Activations, Coupling, MergeSpec, Potentials


class Space(NamedTuple):
    """One site, seen from one target layer: what is needed to rebuild its plans.

    Attributes:
        x: Target activations ``[t, n]`` of the layer.
        ys: Source activations ``[M, t, m]`` of all layers.
        potentials: Their potentials, leading axis ``[M]``.
        std_target: ``[n]``.
        std_source: ``[M, m]``.
    """

    x: Float[Array, "t n"]
    ys: Float[Array, "M t m"]
    potentials: Potentials
    std_target: Float[Array, " n"]
    std_source: Float[Array, "M m"]


def spaces(
    coupling: Coupling, target: Activations, source: Activations, site: str
) -> Iterator[Space]:
    """The `Space` of one site for each target layer; the source's rows are moved only once."""
    ys = jnp.asarray(source.values[site])
    for l, x in enumerate(target.values[site]):
        potentials, std = _layer_of((coupling.feature[site], coupling.std_target[site]), l)
        yield Space(jnp.asarray(x), ys, potentials, std, coupling.std_source[site])


@jax.jit
def _layer_of(tree: Any, l: jax.Array | int) -> Any:
    """One layer of stacked arrays."""
    return jax.tree.map(lambda leaf: leaf[l], tree)


@functools.partial(jax.jit, static_argnames=("in_site", "out_site", "spec"))
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
    # the root of each, because their product may be too small for float32 where they disagree
    effective = jnp.sqrt(coupling.layer[in_site]) * jnp.sqrt(coupling.layer[out_site])
    if spec.layers == "top1":
        one_hot = jax.nn.one_hot(effective.argmax(1), effective.shape[1])
        return one_hot if spec.form == "barycentric" else one_hot * effective
    return effective / effective.sum(1, keepdims=True) if spec.form == "barycentric" else effective


def _map_out(space: Space, m: jax.Array, spec: MergeSpec) -> Float[Array, "n_t n_s"]:
    """``Phi_out``: the barycentric out-map uses the TARGET marginal and restores the units."""
    plan = _plan(space, m, spec)
    if spec.form == "joint":
        return plan
    return space.std_target[:, None] * (plan.shape[0] * plan) / space.std_source[m][None, :]


def _map_in(space: Space, m: jax.Array, spec: MergeSpec) -> Float[Array, "n_s n_t"]:
    """``Phi_in``: the barycentric in-map uses the SOURCE marginal and restores the units."""
    plan = _plan(space, m, spec).T
    if spec.form == "joint":
        return plan
    return space.std_source[m][:, None] * (plan.shape[0] * plan) / space.std_target[None, :]


def _plan(space: Space, m: jax.Array, spec: MergeSpec) -> Float[Array, "n_t n_s"]:
    """The (signed) plan between the space's target layer and source layer ``m``."""
    potentials = jax.tree.map(lambda leaf: leaf[m], space.potentials)
    return couplings.rebuild(space.x, space.ys[m], potentials, signed=spec.signed)


@functools.partial(jax.jit, static_argnames=("spec",))
def _kernel_of_layer(
    weights: Float[Array, "M d_in d_out"],
    into: Space,
    out: Space,
    share: Float[Array, " M"],
    *,
    spec: MergeSpec,
) -> Float[Array, "d_in_t d_out_t"]:
    """``sum_m share[m] Phi_in^T K[m] Phi_out^T``, one source layer in memory at a time."""

    def moved(m: jax.Array) -> jax.Array:
        phi_in, phi_out = _map_in(into, m, spec), _map_out(out, m, spec)
        kernel = weights[m].astype(jnp.float32)
        # the cheaper order of the two products is chosen by their FLOPs
        return jnp.linalg.multi_dot(
            [phi_in.T, kernel, phi_out.T], precision=jax.lax.Precision.HIGHEST
        )

    return _over_layers(moved, share, (into.x.shape[1], out.x.shape[1]), spec)


@functools.partial(jax.jit, static_argnames=("spec",))
def _bias_of_layer(
    biases: Float[Array, "M d_out"], out: Space, share: Float[Array, " M"], *, spec: MergeSpec
) -> Float[Array, " d_out_t"]:
    """``sum_m share[m] Phi_out b[m]``."""

    def moved(m: jax.Array) -> jax.Array:
        phi_out = _map_out(out, m, spec)
        return jnp.matmul(
            phi_out, biases[m].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
        )

    return _over_layers(moved, share, (out.x.shape[1],), spec)


def _over_layers(moved, share: jax.Array, shape: tuple[int, ...], spec: MergeSpec) -> jax.Array:
    """Sums over source layers; with ``top1`` only the one that counts is computed."""
    if spec.layers == "top1":
        m = share.argmax()
        return share[m] * moved(m)

    def add(total: jax.Array, m: jax.Array) -> tuple[jax.Array, None]:
        return total + share[m] * moved(m), None

    return jax.lax.scan(add, jnp.zeros(shape), jnp.arange(len(share)))[0]


def transported(
    weights: Float[Array, "M d_in_s d_out_s"],
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
        weights: Source kernels, ``[d_in, d_out]`` each; for rule ``delta`` the source minus its
            base.
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
    into = spaces(coupling, target, source, in_site)
    out = spaces(coupling, target, source, out_site)
    pairs = zip(share, into, out, strict=True)
    layers = [
        _kernel_of_layer(weights, one_in, one_out, one_share, spec=spec)
        for one_share, one_in, one_out in progress.track(
            pairs, f"transport {in_site} -> {out_site} (layers)", total=len(share)
        )
    ]
    return jnp.stack(layers)


def transported_bias(
    biases: Float[Array, "M d_out_s"],
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
        biases: Source biases of all layers.
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
    outs = spaces(coupling, target, source, out_site)
    rows = [
        _bias_of_layer(biases, out, one, spec=spec) for one, out in zip(share, outs, strict=True)
    ]
    return jnp.stack(rows)
