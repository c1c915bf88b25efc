"""How many transport problems a merge solves, and how much arithmetic it takes, from shapes alone.

Each stage defines its own count (``flops``) beside its code. Only products of matrices are counted,
two FLOPs for a multiplication and an addition. Seconds are not derived: they depend on the machine
and on how many iterations the problems take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ot_merge_jax.data.calibration import Calibration
from ot_merge_jax.merging import weight_transport
from ot_merge_jax.models import gather
from ot_merge_jax.models.config import ModelConfig
from ot_merge_jax.models.sites import site_width, sites_of
from ot_merge_jax.transport import coupling
from ot_merge_jax.types import MergeSpec


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
        problems: Site -> its neuron problems; the layers of each site are one more, small problem.
        flops: Step -> floating point operations; for `ITERATION`, of one iteration of each problem.
    """

    problems: dict[str, Problems]
    flops: dict[str, int]


#: The step that every problem repeats as often as it needs.
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
        The problems, and the FLOPs of every step of this merge.

    Example:
        >>> from ot_merge_jax.models.config import Rope
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
    rows, pairs = gathered[0].rows, target.num_layers * source.num_layers
    problems = {
        site: Problems(pairs, site_width(site, target), site_width(site, source))
        for site in sites_of(spec.weights)
    }
    projections, tables = weight_transport.flops(
        target, source, spec=spec, rows=rows, matched=matched
    )
    flops = {}
    if problems:
        flops["gather the target"] = sum(gather.flops(target, data.target) for data in gathered)
        flops[f"gather the {reference}"] = sum(
            gather.flops(cfgs[reference], data.source) for data in gathered
        )
        widths = [(site.target, site.source) for site in problems.values()]
        flops["correlation costs"], flops[ITERATION] = coupling.flops(
            widths, rows=rows, pairs=pairs
        )
        flops["carry the projections, at most"] = projections
    if tables:
        flops["fit and apply the vocabulary map"] = tables
    return Work(problems, flops)
