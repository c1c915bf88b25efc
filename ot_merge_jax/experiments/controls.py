"""What a merge must beat (method: Controls): the same merge with one thing broken.

Each function breaks one thing that a merge is made from and leaves everything else as it is: mask,
units, strengths that are tried. The control `unigram` breaks nothing and lives in
`ot_merge_jax.evaluation.token_bias`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ot_merge_jax.io.lazy import LazyFolder
from ot_merge_jax.merging import fuse
from ot_merge_jax.merging.merge import Stage, call, gather_rows, given, merge, steps_of
from ot_merge_jax.models import specs
from ot_merge_jax.models.config import ModelConfig
from ot_merge_jax.models.model import Model, Models
from ot_merge_jax.models.sites import sites_of
from ot_merge_jax.types import (
    BUDGET,
    Activations,
    AlignedBatches,
    Budget,
    Choice,
    Coupling,
    HParams,
    Merged,
    MergeSpec,
    Params,
    Transported,
    VocabularyMatch,
)

#: Gaussian updates that a merge is compared with (method: Controls).
NOISE_SEEDS = 5
NOISE = tuple(f"noise {number + 1}" for number in range(NOISE_SEEDS))
#: Every control but `unigram`, in the order of method: Controls.
BROKEN = ("shrink", *NOISE, "permuted", "wrong-layer", "wrong-source")


def arms(kinds: Sequence[str]) -> list[str]:
    """The controls that some kinds (as a recipe names them) stand for, in order.

    Example:
        >>> arms(["unigram", "noise"])
        ['noise 1', 'noise 2', 'noise 3', 'noise 4', 'noise 5', 'unigram']
    """
    return [name for name in (*BROKEN, "unigram") if name.split(" ")[0] in kinds]


def inapplicable_reason(
    name: str, *, spec: MergeSpec, source_layers: int, has_dev: bool = True
) -> str | None:
    """Why a control does not apply to a merge; None if it does.

    Args:
        name: One of `BROKEN`, or ``unigram``.
        spec: What the merge moves and how.
        source_layers: Of the source.
        has_dev: Whether there is a dev split.

    Example:
        >>> inapplicable_reason("shrink", spec=MergeSpec(rule="delta"), source_layers=4)
        'under rule delta it is the target itself'
    """
    if name == "shrink" and spec.rule != "interpolate":
        return f"under rule {spec.rule} it is the target itself"
    if name == "wrong-layer" and not sites_of(spec.weights):
        return "no weight moves by a layer coupling"
    if name == "wrong-layer" and source_layers == 1:
        return "the source has one layer"
    if name == "unigram" and not has_dev:
        return "there is no dev split to choose its share on"
    return None


def inapplicable_reasons(
    kinds: Sequence[str], *, spec: MergeSpec, source_layers: int, has_dev: bool
) -> dict[str, str]:
    """Control -> why it does not apply, of the controls that some kinds stand for."""
    reasons = {
        name: inapplicable_reason(name, spec=spec, source_layers=source_layers, has_dev=has_dev)
        for name in arms(kinds)
    }
    return {name: why for name, why in reasons.items() if why is not None}


def remade(
    name: str,
    merged: Merged,
    models: Models,
    batches: AlignedBatches,
    hparams: HParams,
    *,
    spec: MergeSpec,
    vocabulary: VocabularyMatch | None,
    seed: int,
    stage: Stage = call,
    choose: Callable[[Transported], Choice] | None = None,
    budget: Budget = BUDGET,
) -> Merged:
    """A merge made again by `ot_merge_jax.merging.merge.merge`, with one thing broken.

    What is not broken is taken from the merge; diagnostics are not computed.

    Args:
        name: One of `BROKEN`.
        merged: The merge.
        models: The models it was made of.
        batches: What they read.
        hparams: As for the merge.
        spec: As for the merge.
        vocabulary: As for the merge.
        seed: Of what is drawn.
        stage: Keeps the activations of the random source of ``wrong-source``.
        choose: As for the merge.
        budget: As for the merge.

    Returns:
        The control; its ``report`` is that of the merge.
    """
    steps, alignment, transported = steps_of(merged), merged.alignment, merged.transported
    target = models.target.params
    if name == "shrink":
        steps["moved"] = transported._replace(weights=shrink(transported.weights))
    elif name in NOISE:
        number = seed * NOISE_SEEDS + NOISE.index(name)
        drawn = noise(target, *transported, spec=spec, seed=number)
        steps["moved"] = transported._replace(weights=drawn)
    else:
        del steps["moved"]
    if name == "permuted":
        if alignment is not None:
            steps["coupling"], steps["rows-source"] = permuted(
                alignment.coupling, alignment.source, seed=seed
            )
        vocabulary = vocabulary and permuted_tokens(vocabulary, seed=seed)
    if name == "wrong-layer" and alignment is not None:
        steps["coupling"] = wrong_layers(alignment.coupling, seed=seed)
    if name == "wrong-source":
        cfg, params = models.reference.cfg, models.reference.params
        stranger = random_source(cfg, seed=seed, is_resident=specs.is_resident(params))
        models = models._replace(stand_in=Model(cfg, stranger))
        if alignment is not None:
            del steps["coupling"]
            steps["rows-source"] = gather_rows(
                "rows-random", models.reference, batches.source,
                sites=sites_of(spec.weights), role=models.reference_role, stage=stage,
                hidden_at_once=budget.hidden,
            )  # fmt: skip
    return merge(
        models, batches, hparams,
        spec=spec, vocabulary=vocabulary, stage=given(steps), choose=choose, budget=budget,
    )  # fmt: skip


def shrink(moved: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Transported weights of 0: what the target's own weights become without a source.

    Example:
        >>> shrink({"embed_tokens/embedding": jnp.ones((2, 2))})["embed_tokens/embedding"].sum()
        Array(0., dtype=float32)
    """
    return {path: jnp.zeros_like(leaf) for path, leaf in moved.items()}


def noise(
    target: Params,
    moved: Mapping[str, jax.Array],
    masks: Mapping[str, jax.Array],
    *,
    spec: MergeSpec,
    seed: int,
) -> dict[str, jax.Array]:
    """Gaussian numbers with the Frobenius norm of the update of every matrix, in its mask.

    Args:
        target: Parameters of the target.
        moved: Path -> transported weight.
        masks: Path -> mask.
        spec: ``rule`` says what the update is.
        seed: Of the numbers.

    Returns:
        Path -> what stands in for the transported weight, so that the rule makes that update.

    Example:
        >>> params, moved = {"w": jnp.zeros((2, 2))}, {"w": jnp.full((2, 2), 3.0)}
        >>> drawn = noise(params, moved, {}, spec=MergeSpec(rule="delta"), seed=0)["w"]
        >>> round(float(jnp.linalg.norm(drawn)), 3)
        6.0
    """
    stand_ins = {}
    for path, leaf in moved.items():
        rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
        drawn = jnp.asarray(rng.standard_normal(leaf.shape, dtype=np.float32))
        weight, mask = specs.get(target, path), masks.get(path)
        update = fuse.update(weight, leaf, mask, rule=spec.rule)
        drawn = drawn if mask is None else mask * drawn
        axes = tuple(range(path.startswith("layers/"), leaf.ndim))  # a stack is many matrices
        size = jnp.sqrt(jnp.sum(drawn * drawn, axes, keepdims=True))
        wanted = jnp.sqrt(jnp.sum(update * update, axes, keepdims=True))
        step = drawn * wanted / jnp.where(size > 0, size, 1.0)
        stand_ins[path] = step + weight.astype(jnp.float32) if spec.rule == "interpolate" else step
    return stand_ins


class _Permuted:
    """Stacked rows ``[M, t, m]`` with their neurons in another order, read a layer at a time."""

    def __init__(self, values: Any, order: np.ndarray):
        """The rows, and the old place of each neuron."""
        self._values, self._order = values, order
        self.shape = values.shape

    def __getitem__(self, m: Any) -> Any:
        """One layer."""
        return np.asarray(self._values[m])[..., self._order]

    def __len__(self) -> int:
        """How many layers there are."""
        return len(self._values)


def permuted(coupling: Coupling, source: Activations, *, seed: int) -> tuple[Coupling, Activations]:
    """Plans whose columns are permuted, one permutation of the source's neurons for each site.

    The plan of a pair is rebuilt from potentials and rows, so both are permuted; the units
    (standard deviations) are not.

    Args:
        coupling: From `ot_merge_jax.transport.coupling.couple`.
        source: The source's activations it was made from.
        seed: Of the permutations.

    Returns:
        The coupling and the activations, for an `Alignment`.
    """
    feature, values = dict(coupling.neuron_potentials), dict(source.values)
    for site, potentials in coupling.neuron_potentials.items():
        order = _order(potentials.g.shape[-1], seed, site)
        feature[site] = potentials._replace(g=potentials.g[..., order])
        values[site] = _Permuted(source.values[site], order)  # pyright: ignore[reportArgumentType]
    return coupling._replace(neuron_potentials=feature), source._replace(values=values)


def permuted_tokens(matched: VocabularyMatch, *, seed: int) -> VocabularyMatch:
    """A vocabulary match whose source rows are permuted.

    Example:
        >>> matched = VocabularyMatch(jnp.arange(9), jnp.arange(9))
        >>> sorted(permuted_tokens(matched, seed=0).source_ids.tolist()) == list(range(9))
        True
    """
    order = _order(len(matched.source_ids), seed, "vocabulary")
    return matched._replace(source_ids=matched.source_ids[order])


def wrong_layers(coupling: Coupling, *, seed: int) -> Coupling:
    """A coupling whose source layers are shuffled, alike at every site; none keeps its place.

    Neurons still correspond by the transport of the layers that are now paired.

    Args:
        coupling: Of at least two source layers.
        seed: Of the shuffle.
    """
    count = next(iter(coupling.layer_plan.values())).shape[1]
    # a random cycle: every layer goes to another one's place
    cycle = np.random.default_rng(seed).permutation(count)
    order = np.empty(count, np.int64)
    order[cycle] = np.roll(cycle, 1)
    return coupling._replace(
        layer_plan={site: plan[:, order] for site, plan in coupling.layer_plan.items()}
    )


def _order(count: int, seed: int, name: str) -> np.ndarray:
    """A seeded permutation of its own for each name."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(count)


def random_source(
    cfg: ModelConfig, *, seed: int, std: float = 0.02, is_resident: bool = True
) -> Params:
    """Parameters of a model that has learned nothing, as transformers makes them.

    Args:
        cfg: Of the source (of the source base, for rule ``delta``).
        seed: Of the weights.
        std: Their standard deviation.
        is_resident: Whether all of them are made at once; otherwise each when it is asked for.

    Returns:
        Nested parameters, float32.

    Example:
        >>> from ot_merge_jax.demo import assets
        >>> from ot_merge_jax.io.folder import open_folder
        >>> cfg = open_folder(assets.path("sibling")).cfg
        >>> whole, lazy = (random_source(cfg, seed=0, is_resident=now) for now in (True, False))
        >>> bool((whole["layers"]["mlp"]["up_proj"]["kernel"][1]
        ...       == lazy.leaf("layers/mlp/up_proj/kernel")[1]).all())
        True
    """

    def leaf(spec: specs.ParamSpec, l: int | None) -> np.ndarray:
        shape = spec.shape if l is None else spec.shape[1:]
        if spec.path.endswith("scale"):
            return np.full(shape, 1.0 - cfg.style.unit_offset, np.float32)
        if spec.path.endswith("bias"):
            return np.zeros(shape, np.float32)
        drawn = np.random.default_rng([seed, zlib.crc32(spec.path.encode()), l or 0])
        return np.float32(std) * drawn.standard_normal(shape, dtype=np.float32)

    table = {spec.path: spec for spec in specs.param_specs(cfg)}
    if not is_resident:
        return LazyFolder(leaf, table)
    return specs.unflatten(
        {
            path: jnp.asarray(
                np.stack([leaf(spec, l) for l in range(spec.shape[0])])
                if spec.is_stacked
                else leaf(spec, None)
            )
            for path, spec in table.items()
        }
    )
