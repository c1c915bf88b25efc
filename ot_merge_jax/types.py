"""The glossary of letters, and the few types that travel between stages. Imports JAX only.

Letters, used in annotations, einsums and comments:

=========  ==================================================================
``l L``    a target layer, their number
``m M``    a source layer, their number
``b s``    batch, sequence position
``r``      row (one sample of activations) inside a batch
``t T``    rows (samples) over the whole calibration set
``d``      features of a site; ``n`` target features, ``m`` source features in a plan
``h k``    query heads, key/value heads
``v``      vocabulary entries
=========  ==================================================================

A cost, a plan and a layer coupling are always ``[target, source]``. Kernels are stored ``[d_in,
d_out]`` (the transpose of the torch orientation that the papers' formulas use); stacked layers
lead: ``[L, d_in, d_out]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
from jaxtyping import Bool, Float, Int

#: Nested dict of arrays, of which leaves under ``layers`` are stacked over the layers; or lazy
#: parameters (`ot_merge_jax.models.specs.LazyParams`), made when they are asked for.
Params = Any
#: How transport problems are solved; see `ot_merge_jax.transport.sinkhorn.solve`.
Solver = Literal["auto", "scaling", "ott"]


class Batch(NamedTuple):
    """Padded token sequences of one model, and the rows of activations wanted from them.

    Attributes:
        tokens: Token ids, padded with any valid id.
        mask: True where a token is real, False at padding (either side).
        row_position: Token index each row is read at; ``-1``: the mean over the mask.
        row_id: Place of the row in the whole calibration set; ``-1``: no row, ignored.
    """

    tokens: Int[jax.Array, "b s"]
    mask: Bool[jax.Array, "b s"]
    row_position: Int[jax.Array, "b r"]
    row_id: Int[jax.Array, "b r"]


class Activations(NamedTuple):
    """Activations of one model, rows sorted by ``row_id`` so that two models' rows correspond.

    Attributes:
        values: For each site ``[layers, rows, d]`` float32.
        row_id: ``[rows]`` ids, ascending.
    """

    values: dict[str, Float[jax.Array, "layers rows d"]]
    row_id: Int[jax.Array, " rows"]


class AlignedBatches(NamedTuple):
    """Batches of two models whose rows correspond by ``row_id``.

    Attributes:
        target: Batches of the target.
        source: Batches of the source, and of its base, which shares its tokenizer.
    """

    target: Sequence[Batch]
    source: Sequence[Batch]


class Potentials(NamedTuple):
    """Dual solution of an entropic transport problem with uniform marginals, or of a batch.

    The plan is ``exp((f_i + g_j - C_ij) / epsilon)``: the potentials include the marginals, so it
    sums to 1.

    Attributes:
        f: Target potential ``[..., n]``, in units of the cost.
        g: Source potential ``[..., m]``, in units of the cost.
        epsilon: Regularisation ``[...]``, in units of the cost.
        cost: Transport cost ``<C, Q>``, without the entropy.
        error: L1 error of the marginals of the plan, the larger of the two sides.
        iterations: Sinkhorn iterations spent.
        converged: Whether the solver's error reached the threshold. Callers must look at it.
        used_log_domain: Whether it was solved in the log domain by ott-jax: because epsilon is very
            small for the cost, or because the solver is ``ott``.
    """

    f: Float[jax.Array, "... n"]
    g: Float[jax.Array, "... m"]
    epsilon: Float[jax.Array, "..."]
    cost: Float[jax.Array, "..."]
    error: Float[jax.Array, "..."]
    iterations: Int[jax.Array, "..."]
    converged: Bool[jax.Array, "..."]
    used_log_domain: Bool[jax.Array, "..."]


class Coupling(NamedTuple):
    """Which layer and which neuron of the source corresponds to which of the target, at every site.

    Attributes:
        layer_plan: For each site the layer plan ``P [L, M]``, summing to 1.
        neuron_potentials: For each site the neuron potentials of all layer pairs, leading axes
            ``[L, M]``.
        std_target: For each site the per-neuron standard deviation ``[L, d]``; 0 counts as 1.
        std_source: The same for the source, ``[M, d]``.
    """

    layer_plan: dict[str, Float[jax.Array, "L M"]]
    neuron_potentials: dict[str, Potentials]
    std_target: dict[str, Float[jax.Array, "L d"]]
    std_source: dict[str, Float[jax.Array, "M d"]]


class Alignment(NamedTuple):
    """A coupling and the activations it was made from, which rebuild its plans.

    Attributes:
        coupling: Which layer and neuron corresponds to which.
        target: Activations of the target.
        source: Activations of the source, or of its base; same row ids.
    """

    coupling: Coupling
    target: Activations
    source: Activations


class Transported(NamedTuple):
    """What the source adds to the target, before the strength.

    Attributes:
        weights: Parameter path -> transported weight (of the delta, for rule ``delta``).
        masks: Parameter path -> mask, broadcastable to the leaf; a path without one moves whole.
    """

    weights: dict[str, jax.Array]
    masks: dict[str, jax.Array]


class VocabularyMatch(NamedTuple):
    """Rows of two vocabularies that stand for the same token.

    Attributes:
        target_ids: Row in the target's table.
        source_ids: The matching row in the source's table.
        weights: Importance of each match when the map is fitted; None: all equal.
    """

    target_ids: Int[jax.Array, " v"]
    source_ids: Int[jax.Array, " v"]
    weights: Float[jax.Array, " v"] | None = None


class HParams(NamedTuple):
    """Numbers that trace: they sweep under ``vmap`` without a new compilation.

    Attributes:
        strength: alpha (``interpolate``, ``residual``) or lambda (``delta``); one number for all
            moved weights, or one for each group: ``{"projections": ..., "vocabulary": ...}``.
        epsilon: Entropic regularisation of the neuron plans, in cost units.
        layer_epsilon: Entropic regularisation of the layer plan (the papers' eta).
        threshold: L1 marginal error at which the solver stops.
    """

    strength: Any
    epsilon: Any = 0.02
    layer_epsilon: Any = 0.1
    threshold: Any = 1e-6


class Point(NamedTuple):
    """One strength that was tried.

    Attributes:
        strength: A number, or one for each group.
        loss: On the dev split, in nats per token.
    """

    strength: Any
    loss: float


class Choice(NamedTuple):
    """The hyperparameters that were chosen, and what they were chosen from.

    Attributes:
        hparams: The chosen ones.
        tried: Every strength that was tried; empty if there was nothing to choose.
    """

    hparams: HParams
    tried: list[Point]


class MergeSpec(NamedTuple):
    """Choices that fix the program; hashable, so they are static in jit. Made by `Recipe.spec`.

    Attributes:
        weights: What moves: names of `ot_merge_jax.models.sites.PROJECTIONS` and ``VOCABULARY``.
        form: ``joint`` or ``barycentric`` (method: The transported weight).
        rule: ``interpolate``, ``residual`` or ``delta`` (method: Fusion rules).
        layers: ``soft`` or ``top1``.
        layer_cost: ``plain`` or ``median``.
        k: Neurons kept by the mask in each layer; None: all.
        signed: Whether anti-correlated neurons may match, with their sign.
        max_iterations: Of each neuron transport problem.
        solver: Of neuron and layer transport: ``auto``, ``scaling`` or ``ott``.
    """

    weights: tuple[str, ...] = ("gate", "up", "down")
    form: Literal["joint", "barycentric"] = "barycentric"
    rule: Literal["interpolate", "residual", "delta"] = "delta"
    layers: Literal["soft", "top1"] = "top1"
    layer_cost: Literal["plain", "median"] = "median"
    k: int | None = None
    signed: bool = False
    max_iterations: int = 2000
    solver: Solver = "auto"


class Budget(NamedTuple):
    """How much each stage takes up at a time; results depend on it by rounding alone.

    At least one piece is taken, however small a number is: one pair, one layer's rows, one row of a
    plan, one sequence's logits, one batch's hidden states.

    Attributes:
        pairs: Layer pairs solved side by side at most; None: as many as
            `ot_merge_jax.transport.sinkhorn.pairs_at_once` says, by the width of the site.
        source_rows: Entries of the source's rows on the device (256 MiB).
        plan_block: Entries of a plan that are rebuilt at a time (64 MiB).
        logits: Logits in memory (256 MiB): those of a whole batch are gigabytes where vocabularies
            are large.
        hidden: Bytes of hidden states of a model that is read layer by layer; its layers are read
            again for the next ones.
        predictions: Probabilities that the control ``unigram`` is fitted to (512 MiB). The one
            number that results depend on: where positions times vocabulary is more, an even part of
            the positions stands for all. `ot_merge_jax.runs.memory` never lowers it.
    """

    pairs: int | None = None
    source_rows: int = 1 << 26
    plan_block: int = 1 << 24
    logits: int = 1 << 26
    hidden: int = 1 << 30
    predictions: int = 1 << 27

    def __str__(self) -> str:
        """In words, for the log.

        Example:
            >>> print(Budget(pairs=2))
            2 layer pairs, 67108864 entries of source rows, 16777216 of a plan, 67108864 logits, \
1073741824 bytes of hidden states
        """
        pairs = "layer pairs by their width" if self.pairs is None else f"{self.pairs} layer pairs"
        return (
            f"{pairs}, {self.source_rows} entries of source rows, {self.plan_block} of a plan, "
            f"{self.logits} logits, {self.hidden} bytes of hidden states"
        )


#: What every stage takes unless it is told otherwise.
BUDGET = Budget()


class WeightReport(NamedTuple):
    """Diagnostics of one moved weight, an entry for each layer (one for a table).

    Attributes:
        ratio_transported: ``|W~| / |W|``, Frobenius over the selected entries.
        ratio_change: ``|dW| / |W|``, Frobenius over the selected entries.
        source_layer: The source layer with the largest weight; ``-1`` for a vocabulary table.
        neighbours_out: Effective neighbours ``exp(H(row))`` of the output plan, mean over rows.
        neighbours_in: The same of the input plan.
        error: Largest L1 marginal error of the plans used.
        iterations: Most Sinkhorn iterations of the plans used.
        converged: Whether all plans used converged.
    """

    ratio_transported: Float[jax.Array, " L"]
    ratio_change: Float[jax.Array, " L"]
    source_layer: Int[jax.Array, " L"]
    neighbours_out: Float[jax.Array, " L"]
    neighbours_in: Float[jax.Array, " L"]
    error: Float[jax.Array, " L"]
    iterations: Int[jax.Array, " L"]
    converged: Bool[jax.Array, " L"]


class MergeReport(NamedTuple):
    """What a merge leaves besides the parameters.

    Attributes:
        weights: For each moved weight (``q``, ``up``, ``embed``...) its diagnostics.
        coupling: The coupling used; None when only the vocabulary moved.
        rows: Number of activation rows used; 0 when only the vocabulary moved.
    """

    weights: Mapping[str, WeightReport]
    coupling: Coupling | None
    rows: int


class Merged(NamedTuple):
    """The result of a merge.

    Attributes:
        params: The fused parameters, in the target's dtypes.
        transported: What the source adds to the target, before the strength.
        alignment: The coupling and the activations; None when only the vocabulary moved.
        choice: The strength taken, and those that were tried.
        report: Diagnostics.
    """

    params: Params
    transported: Transported
    alignment: Alignment | None
    choice: Choice
    report: MergeReport
