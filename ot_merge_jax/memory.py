"""How much host memory a run needs, said before it starts, and whether models must stay on disk.

Sums of the arrays that are alive together in each stage; no weights are read. Constants are named
and measured, everything else follows from shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

from ot_merge_jax.calibration import TOKENS_PER_BATCH, Calibration
from ot_merge_jax.config import ModelConfig
from ot_merge_jax.errors import RecipeError, ResourceError
from ot_merge_jax.evaluate.nll import LOGITS_AT_ONCE, LONGEST_WINDOW
from ot_merge_jax.evaluate.unigram import PREDICTIONS
from ot_merge_jax.models import specs
from ot_merge_jax.models.streamed import HIDDEN_AT_ONCE
from ot_merge_jax.spaces import PROJECTIONS, site_width, sites_of, weight_of
from ot_merge_jax.transport.coupling import PLAN_AT_ONCE, ROWS_AT_ONCE
from ot_merge_jax.transport.diagnostics import SAMPLE
from ot_merge_jax.transport.solve import pairs_at_once
from ot_merge_jax.types import Batch, MergeSpec

#: The interpreter, its libraries and compiled programs (measured: 0.5 to 0.8 GiB).
PROCESS = 700 << 20
_FLOAT = 4
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_CGROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class Plan(NamedTuple):
    """What a run will hold.

    Attributes:
        on_disk: Roles whose weights are read layer by layer and never held whole.
        stages: Stage -> bytes at its peak.
    """

    on_disk: frozenset[str]
    stages: dict[str, int]

    @property
    def peak(self) -> int:
        """Bytes of the largest stage."""
        return max(self.stages.values())

    def __str__(self) -> str:
        """One line for the log."""
        held = f", {' and '.join(sorted(self.on_disk))} layer by layer" if self.on_disk else ""
        stage = max(self.stages, key=self.stages.__getitem__)
        return f"about {gib(self.peak)} at most (to {stage}){held}"


def gib(size: int) -> str:
    """A size for people.

    Example:
        >>> gib(3 << 29)
        '1.5 GiB'
    """
    return f"{size / 2**30:.1f} GiB"


def parse(text: str) -> int:
    """Bytes of a size as people write it; units are powers of 1024.

    Raises:
        RecipeError: if it is not a size.

    Example:
        >>> parse("8GiB") == parse("8 G") == 8 << 30
        True
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise RecipeError(f"--memory-limit {text!r} is not a size; write it as in 8GiB.")
    return int(float(found[1]) * 2 ** _UNITS[found[2].upper()])


def of_machine(files: Iterable[str] = _CGROUP) -> int:
    """Bytes this process may use: the machine's memory, or the limit of its container.

    Args:
        files: Where a container's limit may stand.
    """
    limits = [psutil.virtual_memory().total]
    for file in files:
        if Path(file).is_file() and (said := Path(file).read_text().strip()).isdigit():
            limits.append(int(said))  # without a limit it says `max`, or more than any machine has
    return min(limits)


def choose(
    cfgs: Mapping[str, ModelConfig],
    data: Calibration,
    *,
    spec: MergeSpec,
    scored: Sequence[int],
    limit: int | None,
    controls: Sequence[str] = (),
) -> Plan:
    """Whole models if they fit, otherwise the source and its base layer by layer.

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
        ResourceError: if neither fits.
    """
    most = of_machine() if limit is None else limit
    whole = needed(cfgs, data, spec=spec, scored=scored, controls=controls)
    if whole.peak <= most:
        return whole
    on_disk = frozenset(cfgs) - {"target"}
    layered = needed(cfgs, data, spec=spec, scored=scored, on_disk=on_disk, controls=controls)
    if layered.peak > most:
        allowed, more = (
            ("this machine has", "say --memory-limit if you know better")
            if limit is None
            else ("--memory-limit allows", "raise it")
        )
        raise ResourceError(
            f"The run needs {layered}, and {allowed} {gib(most)}; use fewer --max-rows, move fewer "
            f"--weights, take a smaller target, or {more}."
        )
    return layered


def needed(
    cfgs: Mapping[str, ModelConfig],
    data: Calibration,
    *,
    spec: MergeSpec,
    scored: Sequence[int],
    on_disk: frozenset[str] = frozenset(),
    controls: Sequence[str] = (),
) -> Plan:
    """Bytes of every stage.

    Args:
        cfgs: Role -> configuration.
        data: The calibration batches.
        spec: What moves.
        scored: Tokens, at most, of each document that is scored.
        on_disk: Roles that are read layer by layer.
        controls: Kinds of control that the merge is compared with.

    Returns:
        The sums, by stage.
    """
    target, source = cfgs["target"], cfgs["source"]
    batches = {role: data.target if role == "target" else data.source for role in cfgs}
    sites = sites_of(spec.weights)
    held = {role: 0 if role in on_disk else _weights(cfg) for role, cfg in cfgs.items()}
    moved = moved_bytes(target, spec)
    largest = max(_largest(cfg) for cfg in cfgs.values())
    models = sum(held.values())
    stages = {
        f"gather the {role}": models + _gather(cfg, batches[role], role in on_disk)
        for role, cfg in cfgs.items()
        if sites
    }
    rows = [data.rows * site_width(site, cfg) for site in sites for cfg in (target, source)]
    pairs = [(site_width(site, target), site_width(site, source)) for site in sites]
    if sites:
        # cost and kernel of the pairs solved, in log form a reduced cost too, beside the rows of a
        # block of layers
        solving = max(3 * n * m * pairs_at_once(n, m) for n, m in pairs)
        blocks = max(
            min(source.num_layers * data.rows * m, max(ROWS_AT_ONCE, data.rows * m)) + data.rows * n
            for n, m in pairs
        )
        stages["couple"] = models + _FLOAT * (blocks + 3 * max(rows) + solving)
        # two plans and a sorted copy, of a sample of the target's neurons
        looked_at = max(4 * min(n, SAMPLE) * m for n, m in pairs)
        stages["describe the plans"] = models + moved + _FLOAT * (looked_at + 3 * max(rows))
    carrying = _FLOAT * (_maps(target, source, spec) + 3 * max(rows, default=0))
    stages["transport"] = models + moved + 3 * largest + carrying
    if controls:
        # what is broken is aligned and carried like the merge, beside it; so is a random source
        reference = "source base" if "source base" in held else "source"
        beside = 2 * moved + held["target"] + ("wrong-source" in controls) * held[reference]
        stages["run the controls"] = max(stages.values()) + beside
    if "unigram" in controls:
        predicted = min(PREDICTIONS, data.target_tokens * target.vocab_size)
        fitting = 3 * _FLOAT * predicted + held["target"] + moved
        stages["fit the unigram control"] = models + fitting
    stages["choose the strength"] = models + 2 * moved + _scoring(target, scored)
    for role, cfg in {"target": target, "source": source}.items():
        hidden = min(HIDDEN_AT_ONCE, 2 * _FLOAT * cfg.hidden_size * sum(scored))  # padded
        streaming = hidden + 2 * _largest(cfg) if role in on_disk else 0
        # the merged model is read back beside the target it came from
        held_too = moved + held["target"] + streaming
        stages[f"score the {role}"] = models + held_too + _scoring(cfg, scored)
    # the merge beside the target and what moved; of the file one piece at a time
    stages["check what was written"] = models + 2 * moved + 3 * _largest(target)
    return Plan(on_disk, {name: PROCESS + size for name, size in stages.items()})


def moved_bytes(target: ModelConfig, spec: MergeSpec) -> int:
    """Bytes of everything that is carried into a target, in float32."""
    # a tied target has one table, which plays the head too
    names = {"embed" if x == "head" and target.tie_word_embeddings else x for x in spec.weights}
    return _FLOAT * sum(
        math.prod(one.shape) for one in specs.param_specs(target) if weight_of(one.path) in names
    )


def _maps(target: ModelConfig, source: ModelConfig, spec: MergeSpec) -> int:
    """Entries of the two maps of a pair, of a block of a plan, and of what is between the maps."""
    most = block = 0
    for name in set(spec.weights) & set(PROJECTIONS):
        wiring = PROJECTIONS[name]
        (n_in, m_in), (n_out, m_out) = (
            (site_width(site, target), site_width(site, source))
            for site in (wiring.in_site, wiring.out_site)
        )
        between = max(n_in * m_out, n_out * m_in)
        most = max(most, n_in * m_in + n_out * m_out + between)
        block = max(block, min(PLAN_AT_ONCE, max(n_in * m_in, n_out * m_out)))
    return most + 3 * block


def _weights(cfg: ModelConfig) -> int:
    """Bytes of a whole model in float32."""
    return _FLOAT * sum(math.prod(one.shape) for one in specs.param_specs(cfg))


def _largest(cfg: ModelConfig) -> int:
    """Bytes of the largest piece that is read at once: a layer, or a vocabulary table."""
    table = specs.param_specs(cfg)
    layer = sum(math.prod(one.shape[1:]) for one in table if one.is_stacked)
    return _FLOAT * max(layer, *(math.prod(one.shape) for one in table if not one.is_stacked))


def _scoring(cfg: ModelConfig, scored: Sequence[int]) -> int:
    """Bytes of scoring a batch of the longest windows, beside the weights."""
    most = min(cfg.max_positions, LONGEST_WINDOW, max(scored, default=0) + 1)
    length = 1 << max(0, most - 1).bit_length()
    size = max(1, TOKENS_PER_BATCH // length)
    logits = cfg.vocab_size * max(length, min(LOGITS_AT_ONCE // cfg.vocab_size, size * length))
    return 3 * _FLOAT * logits + _step(cfg, (size, length))


def _largest_batch(batches: Iterable[Batch]) -> tuple[int, int]:
    """Sequences and length of the batch with most tokens."""
    size, length = max((np.shape(one.tokens) for one in batches), key=math.prod)
    return size, length


def _gather(cfg: ModelConfig, batches: Iterable[Batch], is_on_disk: bool) -> int:
    """Bytes of a forward pass beside the weights; activations themselves go to disk."""
    batches = list(batches)
    step = _step(cfg, _largest_batch(batches))
    if not is_on_disk:
        return step
    tokens = sum(math.prod(np.shape(one.tokens)) for one in batches)
    hidden = min(HIDDEN_AT_ONCE, _FLOAT * cfg.hidden_size * tokens)
    return step + hidden + 2 * _largest(cfg)


def _step(cfg: ModelConfig, shape: tuple[int, int]) -> int:
    """Bytes of one layer's work on one batch: wide MLP arrays, narrow ones, attention scores."""
    tokens, (size, length) = math.prod(shape), shape
    wide = 3 * tokens * cfg.intermediate_size + 8 * tokens * cfg.hidden_size
    return _FLOAT * (wide + 2 * size * cfg.num_heads * length * length)
