"""How many transport problems a merge solves, and how much arithmetic it takes, from shapes alone.

Counted are products of matrices, two FLOPs for a multiplication and an addition; the rest of the
work follows them. Seconds are not derived: they depend on the machine and on how many iterations
the problems take.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ot_merge_jax.calibration import Calibration
from ot_merge_jax.config import ModelConfig
from ot_merge_jax.models import specs
from ot_merge_jax.spaces import PROJECTIONS, VOCABULARY, site_width, sites_of
from ot_merge_jax.types import Batch, MergeSpec


class Problems(NamedTuple):
    """The neuron problems of one site, all of one shape.

    Attributes:
        count: Pairs of layers.
        target: Neurons of the target.
        source: Neurons of the source.
    """

    count: int
    target: int
    source: int


class Work(NamedTuple):
    """The work of a merge, without choosing its strength, scores and controls.

    Attributes:
        problems: Site -> its neuron problems; the layers of each site are one small problem more.
        flops: Step -> floating point operations; of an iteration, those of one of all problems.
    """

    problems: dict[str, Problems]
    flops: dict[str, int]


#: The step of which every problem takes as many as it needs.
ITERATION = "one Sinkhorn iteration of all problems"


def of_merge(
    cfgs: Mapping[str, ModelConfig],
    gathered: Sequence[Calibration],
    *,
    spec: MergeSpec,
    matched: int = 0,
) -> Work:
    """The work of one merge.

    Args:
        cfgs: Role (``target``, ``source``, ``source base``) -> configuration.
        gathered: Batches that are run for their activations; the first are coupled.
        spec: What moves and how.
        matched: Tokens that the two vocabularies share.

    Returns:
        The problems, and the FLOPs of every step that there is.

    Example:
        >>> from ot_merge_jax.config import Rope
        >>> cfg = ModelConfig("llama", 99, 8, 16, 2, 2, 1, 4, 512, 1e-5,
        ...                   Rope(1e4), True, False, "float32")
        >>> data = Calibration([], [], 0, 0, 0, 10, None, None)
        >>> work = of_merge({"target": cfg, "source": cfg}, [data], spec=MergeSpec(weights=("up",)))
        >>> work.problems["up_out"]
        Problems(count=4, target=16, source=16)
        >>> work.flops["correlation costs"] == 2 * 10 * 4 * (8 * 8 + 16 * 16)
        True
    """
    target, source = cfgs["target"], cfgs["source"]
    reference = "source base" if "source base" in cfgs else "source"
    sites, rows = sites_of(spec.weights), gathered[0].rows
    pairs = target.num_layers * source.num_layers
    problems = {
        site: Problems(pairs, site_width(site, target), site_width(site, source)) for site in sites
    }
    entries = sum(math.prod(one) for one in problems.values())
    flops = {}
    if sites:
        flops["gather the target"] = _forward(target, (one.target for one in gathered))
        flops[f"gather the {reference}"] = _forward(
            cfgs[reference], (one.source for one in gathered)
        )
        flops["correlation costs"] = 2 * rows * entries
        flops[ITERATION] = 4 * entries
        flops["carry the projections, at most"] = _carry(target, source, rows, spec)
    if tables := _tables(target, spec):
        # the cross products, their turn, the norm of the turned rows, and the rows that move
        across = matched * target.hidden_size * source.hidden_size
        turn = source.hidden_size * target.hidden_size * min(source.hidden_size, target.hidden_size)
        flops["fit and apply the vocabulary map"] = tables * 2 * (3 * across + turn)
    return Work(problems, flops)


def _forward(cfg: ModelConfig, groups: Iterable[Iterable[Batch]]) -> int:
    """FLOPs of the decoder layers over padded batches; the logits are never computed."""
    shapes = [np.shape(batch.tokens) for batches in groups for batch in batches]
    kernels = sum(
        math.prod(one.shape)
        for one in specs.param_specs(cfg)
        if one.is_stacked and one.path.endswith("/kernel")
    )
    # scores, and the sum of the values that they weigh
    attention = 4 * cfg.num_layers * cfg.num_heads * cfg.head_dim
    return sum(size * length * (2 * kernels + attention * length) for size, length in shapes)


def _carry(target: ModelConfig, source: ModelConfig, rows: int, spec: MergeSpec) -> int:
    """FLOPs of rebuilding the maps and of the products with them.

    With ``top1`` weights that read one site may take different layers there, and a map each.
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
    return pairs * total


def _tables(target: ModelConfig, spec: MergeSpec) -> int:
    """How many vocabulary tables move; a tied target has one."""
    moving = set(spec.weights) & set(VOCABULARY)
    return min(1, len(moving)) if target.tie_word_embeddings else len(moving)
