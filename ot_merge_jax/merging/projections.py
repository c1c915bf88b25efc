"""The transported weight: source weights carried into the target's spaces by the plans."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jaxtyping import Array, Float, Int

from ot_merge_jax import progress
from ot_merge_jax.transport import coupling as couplings
from ot_merge_jax.transport import sinkhorn
from ot_merge_jax.types import BUDGET, Activations, Coupling, MergeSpec, Potentials


class LayerPair(NamedTuple):
    """One site of one target layer and one source layer: what rebuilds their plan.

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


def _layer_pair(
    coupling: Coupling, target: Activations, source: Activations, site: str, l: int, m: int
) -> LayerPair:
    """The `LayerPair` of one site; only these two layers' rows are moved to the device."""
    x, y = jax.device_put((target.values[site][l], source.values[site][m]))
    stacks = coupling.neuron_potentials[site], coupling.std_target[site], coupling.std_source[site]
    return LayerPair(x, y, *_values_of_pair(*stacks, l, m))


@jax.jit
def _values_of_pair(
    potentials: Potentials, std_target: jax.Array, std_source: jax.Array, l: Any, m: Any
) -> tuple[Potentials, jax.Array, jax.Array]:
    """The entries of stacked arrays for one pair."""
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
    return _layer_weights(coupling.layer_plan[in_site], coupling.layer_plan[out_site], spec=spec)


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


@functools.partial(jax.jit, static_argnames=("side", "spec", "plan_at_once"))
def _map(
    pair: LayerPair,
    rows: Int[Array, " k"] | None,
    *,
    side: Literal["in", "out"],
    spec: MergeSpec,
    plan_at_once: int,
) -> Float[Array, "k n_s"]:
    """``Phi_out``, or ``Phi_in`` transposed, for the target neurons ``rows`` (None: all).

    The barycentric out-map uses the TARGET marginal, the in-map the SOURCE marginal; both restore
    the units.
    """
    plan = couplings.rebuild(
        pair.x, pair.y, pair.potentials, rows, signed=spec.signed, plan_at_once=plan_at_once
    )
    if spec.form == "joint":
        return plan
    std_target = pair.std_target if rows is None else pair.std_target[rows]
    if side == "out":
        return std_target[:, None] * (pair.x.shape[1] * plan) / pair.std_source[None, :]
    return pair.std_source[None, :] * (pair.y.shape[1] * plan) / std_target[:, None]


def apply_maps(
    kernel: Float[Array, "d_in d_out"],
    into: Float[Array, "k_in d_in"],
    out: Float[Array, "k_out d_out"],
) -> Float[Array, "k_in k_out"]:
    """``Phi_in^T K Phi_out^T``, in the order that takes fewer FLOPs."""
    return jnp.linalg.multi_dot(
        [into, kernel.astype(jnp.float32), out.T], precision=jax.lax.Precision.HIGHEST
    )


def _add_kernel(
    total: Float[Array, "L d_in_t d_out_t"],
    l: Any,
    share: Float[Array, ""],
    kernel: Float[Array, "d_in d_out"],
    into: Float[Array, "k_in d_in"],
    out: Float[Array, "k_out d_out"],
    rows: tuple[jax.Array | None, jax.Array | None],
) -> Float[Array, "L d_in_t d_out_t"]:
    """``total[l] + share Phi_in^T K Phi_out^T`` at the selected neurons of both sides."""
    carried = apply_maps(kernel, into, out)
    into_rows, out_rows = rows
    if into_rows is not None and out_rows is not None:
        into_rows = into_rows[:, None]
    places = tuple(slice(None) if side is None else side for side in (into_rows, out_rows))
    return total.at[l].set(total[l].at[places].add(share * carried))


def _add_bias(
    total: Float[Array, "L d_out_t"],
    l: Any,
    share: Float[Array, ""],
    bias: Float[Array, " d_out"],
    out: Float[Array, "k_out d_out"],
    rows: jax.Array | None,
) -> Float[Array, "L d_out_t"]:
    """``total[l] + share Phi_out b`` at the selected neurons."""
    carried = jnp.matmul(out, bias.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return total.at[l].set(total[l].at[slice(None) if rows is None else rows].add(share * carried))


#: The same in the total's own memory; a tracer has none to give.
_add_kernel_in_place, _add_bias_in_place = (
    jax.jit(function, donate_argnums=0) for function in (_add_kernel, _add_bias)
)


class ProjectionWeights(NamedTuple):
    """One kind of weight to carry; either part may be missing.

    Attributes:
        out_site: Space it writes.
        kernels: Source kernels ``[d_in, d_out]``: an array, or anything that gives layer ``m`` as
            ``kernels[m]``. They are read one at a time, and only where a target layer uses them.
        biases: Source biases ``[d_out]``, likewise.
    """

    out_site: str
    kernels: Any = None
    biases: Any = None


def _uses(share: Float[Array, "L M"]) -> np.ndarray:
    """Whether a source layer enters a target layer ``[L, M]``; all do if that is traced."""
    return np.ones(share.shape, bool) if isinstance(share, core.Tracer) else np.asarray(share) > 0


def transport_projections(
    kinds: Sequence[ProjectionWeights],
    coupling: Coupling,
    target: Activations,
    source: Activations,
    *,
    in_site: str,
    spec: MergeSpec,
    selected: Mapping[str, Int[np.ndarray, "L k"]] | None = None,
    plan_at_once: int = BUDGET.plan_block,
) -> list[tuple[jax.Array | None, jax.Array | None]]:
    """Carries all kinds of weights that read one site; a pair's in-map is computed once.

    Only pairs with a layer weight, and only selected neurons, are computed. The maps of one pair
    are alive at a time, and the kernels of one source layer.

    Args:
        kinds: What to carry.
        coupling: From `couple`.
        target: The target activations it was made from.
        source: The source activations it was made from.
        in_site: Space that all of them read.
        spec: ``form``, ``layers`` and ``signed`` are used.
        selected: Site -> target neurons to compute in each layer, each once; other entries of the
            result are 0. A site that is missing is computed whole.
        plan_at_once: Entries of a plan that are rebuilt at a time, at least one row's.

    Returns:
        For each kind its kernels ``[L, d_in, d_out]`` and biases ``[L, d_out]`` in the target's
        widths, float32; None for a part that is missing.

    Source: Transport and Merge, eq. 14; see `transported`.
    """
    sinkhorn.check_budgets(plan_at_once=plan_at_once)
    selected = selected or {}
    make_map = functools.partial(_map, spec=spec, plan_at_once=plan_at_once)
    shares = [
        layer_weights(coupling, in_site=in_site, out_site=kind.out_site, spec=spec)
        for kind in kinds
    ]
    uses = [_uses(share) for share in shares]
    is_traced = isinstance(shares[0], core.Tracer)
    add_kernel = _add_kernel if is_traced else _add_kernel_in_place
    add_bias = _add_bias if is_traced else _add_bias_in_place
    count, width = target.values[in_site].shape[0], target.values[in_site].shape[-1]
    widths = [target.values[kind.out_site].shape[-1] for kind in kinds]
    kernels: list[Any] = [
        None if kind.kernels is None else jnp.zeros((count, width, out))
        for kind, out in zip(kinds, widths, strict=True)
    ]
    biases: list[Any] = [
        None if kind.biases is None else jnp.zeros((count, out))
        for kind, out in zip(kinds, widths, strict=True)
    ]

    def rows_of(site: str, l: int) -> jax.Array | None:
        return jax.device_put(selected[site][l]) if site in selected else None

    def read(kind: ProjectionWeights, m: int) -> tuple[jax.Array | None, jax.Array | None]:
        return tuple(None if x is None else jnp.asarray(x[m]) for x in (kind.kernels, kind.biases))  # pyright: ignore[reportReturnType]

    sites = ", ".join(kind.out_site for kind in kinds)
    entering = [m for m in range(uses[0].shape[1]) if any(used[:, m].any() for used in uses)]
    for m in progress.track(entering, f"transport {in_site} -> {sites} (source layers)"):
        source_weights = [
            read(kind, m) if used[:, m].any() else (None, None)
            for kind, used in zip(kinds, uses, strict=True)
        ]
        for l in np.flatnonzero(np.any([used[:, m] for used in uses], 0)).tolist():
            into, into_rows = None, rows_of(in_site, l)
            for index, kind in enumerate(kinds):
                if not uses[index][l, m]:
                    continue
                (kernel, bias), share = source_weights[index], shares[index][l, m]
                out_rows = rows_of(kind.out_site, l)
                pair = _layer_pair(coupling, target, source, kind.out_site, l, m)
                out = make_map(pair, out_rows, side="out")
                if kernel is not None:
                    if into is None:
                        pair = _layer_pair(coupling, target, source, in_site, l, m)
                        into = make_map(pair, into_rows, side="in")
                    chosen = (into_rows, out_rows)
                    kernels[index] = add_kernel(kernels[index], l, share, kernel, into, out, chosen)
                if bias is not None:
                    biases[index] = add_bias(biases[index], l, share, bias, out, out_rows)
                # otherwise the maps of all pairs would wait in memory
                jax.block_until_ready((kernels[index], biases[index]))
    return list(zip(kernels, biases, strict=True))


def transported(
    weights: Any,
    coupling: Coupling,
    target: Activations,
    source: Activations,
    *,
    in_site: str,
    out_site: str,
    spec: MergeSpec,
    plan_at_once: int = BUDGET.plan_block,
) -> Float[Array, "L d_in_t d_out_t"]:
    r"""Carries one kind of kernel from all source layers to all target layers.

    .. math:: \tilde W_l = \sum_m w_{lm}\, \Phi^{out}_{lm} W_m \Phi^{in}_{lm}

    in torch orientation; kernels here are transposed. ``joint``: the maps are the plans, which have
    total mass 1, so the result almost vanishes. ``barycentric``: rows of both maps sum to 1 before
    the units (standard deviations) of each space are restored.

    Args:
        weights: Source kernels, for rule ``delta`` the source minus its base; as in
            `ProjectionWeights`.
        coupling: From `couple`.
        target: The target activations it was made from.
        source: The source activations it was made from.
        in_site: Space the weight reads.
        out_site: Space the weight writes.
        spec: ``form``, ``layers`` and ``signed`` are used.
        plan_at_once: As for `transport_projections`.

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

    Source: Transport and Merge, eq. 14. Differs: ``barycentric`` is ours (method.md).
    """
    kinds = [ProjectionWeights(out_site, kernels=weights)]
    return transport_projections(  # pyright: ignore[reportReturnType]
        kinds, coupling, target, source, in_site=in_site, spec=spec, plan_at_once=plan_at_once
    )[0][0]


def transported_bias(
    biases: Any,
    coupling: Coupling,
    target: Activations,
    source: Activations,
    *,
    in_site: str,
    out_site: str,
    spec: MergeSpec,
    plan_at_once: int = BUDGET.plan_block,
) -> Float[Array, "L d_out_t"]:
    """Carries the biases of one kind of weight; the out-map alone applies.

    Args:
        biases: Source biases of all layers, as the ``weights`` of `transported`.
        coupling: From `couple`.
        target: The target activations it was made from.
        source: The source activations it was made from.
        in_site: Space the weight reads; its layer plan enters the layer weights.
        out_site: Space the weight writes.
        spec: ``form``, ``layers`` and ``signed`` are used.
        plan_at_once: As for `transport_projections`.

    Returns:
        ``[L, d_out]`` float32 in the target's widths.
    """
    kinds = [ProjectionWeights(out_site, biases=biases)]
    return transport_projections(  # pyright: ignore[reportReturnType]
        kinds, coupling, target, source, in_site=in_site, spec=spec, plan_at_once=plan_at_once
    )[0][1]
