"""How much host memory a run needs, known before it starts, and what makes it fit into less.

Each stage defines its own peak (``peak_bytes``) beside its code; here that is added to the models
and to what is kept between the stages. No weights are read.

The figures are arithmetic and not XLA's own count (``memory_analysis``); tests compare the two. A
compilation is shared with the later call if all its types are those of the call (jax
0.10: 0.2 s instead of 3.9 s). But ``plan`` calls none of the programs, a resumed run few of them,
and every budget that is tried is a program of its own: at the demo's sizes scoring, gathering and
one layer of the coupling take 3.9 s, 3.6 s and 6.5 s to compile on one core.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from ot_merge_jax.data.calibration import Calibration
from ot_merge_jax.errors import ResourceError
from ot_merge_jax.evaluation import kl, nll, token_bias
from ot_merge_jax.merging import diagnostics, weight_transport
from ot_merge_jax.models import gather, specs
from ot_merge_jax.models.config import ModelConfig
from ot_merge_jax.models.sites import site_width, sites_of
from ot_merge_jax.transport import coupling, sinkhorn
from ot_merge_jax.types import BUDGET, Budget, MergeSpec

#: The interpreter, its libraries and compiled programs (measured: 0.5 to 0.8 GiB).
PROCESS = 700 << 20
_FLOAT = 4
#: Fields of a budget that may be lowered without a change of results.
_BLOCKS = ("logits", "plan_block", "source_rows", "hidden", "pairs")
_CGROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class MemoryPlan(NamedTuple):
    """The memory that a run will use.

    Attributes:
        offloaded: Roles whose weights are read layer by layer and never held whole.
        stages: Stage -> bytes at its peak.
        budget: How much each stage works on at a time.
    """

    offloaded: frozenset[str]
    stages: dict[str, int]
    budget: Budget = BUDGET

    @property
    def peak(self) -> int:
        """Bytes of the largest stage."""
        return max(self.stages.values())

    def __str__(self) -> str:
        """One line for the log."""
        offloaded = (
            f", {' and '.join(sorted(self.offloaded))} layer by layer" if self.offloaded else ""
        )
        stage = max(self.stages, key=self.stages.__getitem__)
        return f"about {gib(self.peak)} at most (to {stage}){offloaded}"


def gib(size: int) -> str:
    """A size for people.

    Example:
        >>> gib(3 << 29)
        '1.5 GiB'
    """
    return f"{size / 2**30:.1f} GiB"


def of_machine(files: Iterable[str] = _CGROUP) -> int:
    """Bytes this process may use: the machine's memory, or the limit of its container.

    Args:
        files: Files that may state a container's limit.
    """
    limits = [psutil.virtual_memory().total]
    for file in files:
        if Path(file).is_file() and (limit := Path(file).read_text().strip()).isdigit():
            limits.append(int(limit))  # no limit: `max`, or more than any machine has
    return min(limits)


def choose(
    cfgs: Mapping[str, ModelConfig],
    data: Calibration,
    *,
    spec: MergeSpec,
    scored: Sequence[int],
    limit: int | None,
    controls: Sequence[str] = (),
) -> MemoryPlan:
    """Whole models if they fit, in smaller blocks if need be; otherwise source and base by layer.

    Args:
        cfgs: Role (``target``, ``source``, ``source base``) -> configuration.
        data: The calibration batches.
        spec: What moves.
        scored: Tokens, at most, of each document that is scored.
        limit: Bytes; None: those of the machine.
        controls: Kinds of control that the merge is compared with.

    Returns:
        The plan to follow.

    Raises:
        ResourceError: if nothing fits, not even the smallest blocks.
    """
    most = of_machine() if limit is None else limit
    plan = None
    for offloaded in (frozenset(), frozenset(cfgs) - {"target"}):
        of_budget = functools.partial(
            needed, cfgs, data, spec=spec, scored=scored, offloaded=offloaded, controls=controls
        )
        plan = of_budget(budget=BUDGET)
        if plan.peak > most:
            plan = _in_smaller_blocks(plan, of_budget, most, _most_pairs(cfgs, spec))
        if plan.peak <= most:
            return plan
    allowed, more = (
        ("this machine has", "set --memory-limit if you know better")
        if limit is None
        else ("--memory-limit allows", "raise it")
    )
    raise ResourceError(
        f"The run needs {plan}, in the smallest blocks, and {allowed} {gib(most)} ({plan.peak:,} "
        f"and {most:,} bytes); use fewer --max-rows, move fewer --weights, take a smaller target, "
        f"or {more}."
    )


def _in_smaller_blocks(
    plan: MemoryPlan, of_budget: Callable[..., MemoryPlan], most: int, pairs: int
) -> MemoryPlan:
    """Halves the blocks of the stages that need more than ``most``, until all fit or nothing helps.

    Args:
        plan: In the blocks to begin with.
        of_budget: Makes a plan from ``budget``.
        most: Bytes.
        pairs: Layer pairs that are solved side by side where the budget does not say.
    """
    is_lower = True
    while plan.peak > most and is_lower:
        is_lower = False
        # all of them each time: a block without effect may have one once another is smaller
        for field in _BLOCKS:
            smaller = _halved(plan, of_budget, most, field, pairs)
            if smaller is not None:
                plan, is_lower = smaller, True
            if plan.peak <= most:
                return plan
    if plan.peak > most:  # equally large parts lower the peak only together
        smallest = of_budget(budget=plan.budget._replace(**dict.fromkeys(_BLOCKS, 1)))
        plan = min(plan, smallest, key=lambda each: each.peak)
    return plan


def _halved(
    plan: MemoryPlan, of_budget: Callable[..., MemoryPlan], most: int, field: str, pairs: int
) -> MemoryPlan | None:
    """A plan with one field halved as often as it takes to lower a stage that is too large."""
    too_large = [name for name, size in plan.stages.items() if size > most]
    value = getattr(plan.budget, field) or pairs
    while value > 1:
        value //= 2
        smaller = of_budget(budget=plan.budget._replace(**{field: value}))
        if any(smaller.stages[name] < plan.stages[name] for name in too_large):
            return smaller
    return None


def _most_pairs(cfgs: Mapping[str, ModelConfig], spec: MergeSpec) -> int:
    """Layer pairs that are solved side by side at the narrowest site, by default."""
    return max((sinkhorn.pairs_at_once(*shape) for shape in _problems(cfgs, spec)), default=1)


def _problems(cfgs: Mapping[str, ModelConfig], spec: MergeSpec) -> list[tuple[int, int]]:
    """Neurons of target and source at each site."""
    return [
        (site_width(site, cfgs["target"]), site_width(site, cfgs["source"]))
        for site in sites_of(spec.weights)
    ]


def needed(
    cfgs: Mapping[str, ModelConfig],
    data: Calibration,
    *,
    spec: MergeSpec,
    scored: Sequence[int],
    offloaded: frozenset[str] = frozenset(),
    controls: Sequence[str] = (),
    budget: Budget = BUDGET,
) -> MemoryPlan:
    """Bytes of every stage.

    Args:
        cfgs: Role -> configuration.
        data: The calibration batches.
        spec: What moves.
        scored: Tokens, at most, of each document that is scored.
        offloaded: Roles that are read layer by layer.
        controls: Kinds of control that the merge is compared with.
        budget: How much each stage works on at a time.

    Returns:
        The sums, by stage.
    """
    target, source = cfgs["target"], cfgs["source"]
    weights = {
        role: 0 if role in offloaded else _FLOAT * specs.count(cfg) for role, cfg in cfgs.items()
    }
    models, moved = sum(weights.values()), weight_transport.result_bytes(target, spec)
    rows, problems = data.rows, _problems(cfgs, spec)
    plan_block, logits = budget.plan_block, budget.logits
    stages = {}
    if problems:
        for role, cfg in cfgs.items():
            batches = data.target if role == "target" else data.source
            stages[f"gather the {role}"] = models + gather.peak_bytes(
                cfg, batches, is_resident=role not in offloaded, hidden_at_once=budget.hidden
            )
        stages["couple"] = models + coupling.peak_bytes(
            problems, rows=rows, source_layers=source.num_layers,
            pairs_at_once=budget.pairs, rows_at_once=budget.source_rows,
        )  # fmt: skip
        described = diagnostics.peak_bytes(problems, rows=rows, plan_at_once=plan_block)
        stages["describe the plans"] = models + moved + described
    carried = weight_transport.peak_bytes(
        target, source, spec=spec, rows=rows, plan_at_once=plan_block
    )
    stages["transport"] = models + moved + carried
    if controls:
        # a control is aligned and carried like the merge, beside it; so is a random source
        reference = "source base" if "source base" in weights else "source"
        stranger = weights[reference] if "wrong-source" in controls else 0
        beside = 2 * moved + weights["target"] + stranger
        stages["run the controls"] = max(stages.values()) + beside
    if "unigram" in controls:
        fitted = token_bias.peak_bytes(
            target, tokens=data.target_tokens, predictions=budget.predictions
        )
        stages["fit the unigram control"] = models + fitted + weights["target"] + moved
    # the merged model beside the target it came from
    merged = models + moved + weights["target"]
    scores = nll.peak_bytes(target, scored, logits_at_once=logits)
    stages["choose the strength"] = models + 2 * moved + scores
    if controls:  # how far the merge has moved
        scores = max(scores, kl.peak_bytes((target, target), scored, logits_at_once=logits))
    stages["score the target"] = merged + scores
    stages["score the source"] = merged + nll.peak_bytes(
        source, scored,
        is_resident="source" not in offloaded, hidden_at_once=budget.hidden, logits_at_once=logits,
    )  # fmt: skip
    # the merge, the target and what moved; the file is read one piece at a time
    pieces = 3 * _FLOAT * specs.largest_piece(target)
    stages["check what was written"] = models + 2 * moved + pieces
    return MemoryPlan(offloaded, {name: PROCESS + size for name, size in stages.items()}, budget)
