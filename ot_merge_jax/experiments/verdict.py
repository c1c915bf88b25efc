"""One sentence that says what a run has shown, and no more (the rule of method: Controls)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from ot_merge_jax.evaluation.statistics import FEWEST, MeanDifference
from ot_merge_jax.merging import fuse
from ot_merge_jax.merging.diagnostics import NOTHING, is_nothing_transferred
from ot_merge_jax.types import HParams, MergeReport, MergeSpec

Outcome = Literal[
    "improved",
    "better",
    "no measurable difference",
    "worse",
    "unchanged",
    "nothing transferred",
    "not evaluated",
]


class Verdict(NamedTuple):
    """What a run has shown.

    Attributes:
        outcome: ``improved`` only by the whole rule; ``better`` than the target where controls are
            missing from it.
        sentence: The same with its numbers, one line.
    """

    outcome: Outcome
    sentence: str


class Compared(NamedTuple):
    """The merge minus something else.

    Attributes:
        pooled: Over all calibration seeds, by the mean loss of each document.
        seeds: Of each seed.
        documents: How many both were scored on; None: enough.
    """

    pooled: MeanDifference
    seeds: Sequence[MeanDifference]
    documents: int | None = None

    @property
    def is_better(self) -> bool:
        """Whether the pooled interval lies below 0 and every seed agrees in sign."""
        return self.pooled.high < 0 and all(change.difference < 0 for change in self.seeds)


def judge(
    against: Compared | None,
    controls: Mapping[str, Compared],
    *,
    missing: Sequence[str],
) -> Verdict:
    """The rule of method: Controls.

    Args:
        against: Merge minus target on held-out text; None if there was none.
        controls: For every control that applies and ran, merge minus control; for ``unigram`` the
            merge with its own bias minus the target with its own.
        missing: Kinds of control that were not run.

    Returns:
        The verdict, in nats per token.

    Example:
        >>> clear, unclear = MeanDifference(-0.1, -0.2, -0.05), MeanDifference(-0.1, -0.2, 0.05)
        >>> better, vague = (Compared(change, [change]) for change in (clear, unclear))
        >>> judge(better, {"unigram": better}, missing=[]).outcome
        'improved'
        >>> judge(better, {"unigram": vague}, missing=[]).outcome
        'no measurable difference'
        >>> judge(better, {}, missing=["permuted", "unigram"]).outcome
        'better'
    """
    if against is None:
        return Verdict("not evaluated", "merged; not evaluated (no held-out text was given).")
    amount = sentence_of(against.pooled)
    count = len(against.seeds)
    single = "; one calibration seed" if count == 1 else ""
    seeds = single or f"; {count} calibration seeds agree"
    if too_few := few(against.documents):
        return Verdict("no measurable difference", f"no measurable difference: {too_few}{single}.")
    if against.pooled.low > 0:
        return Verdict("worse", f"worse than the target on held-out text: {amount}{single}.")
    if against.pooled.high >= 0:
        where = "no measurable difference from the target on held-out text"
        return Verdict("no measurable difference", f"{where}: {amount}{single}.")
    if not against.is_better:
        signs = ", ".join(f"{change.difference:+.4f}" for change in against.seeds)
        return Verdict(
            "no measurable difference",
            f"the calibration seeds disagree on held-out text: {signs} nats per token.",
        )
    failed = [(name, minus.pooled) for name, minus in controls.items() if not minus.is_better]
    better = f"better than the target on held-out text: {amount}"
    if failed:
        name, change = failed[0]
        than = "gain beyond unigram" if name == "unigram" else f"difference from control {name}"
        others = f" (likewise {', '.join(name for name, _ in failed[1:])})" if failed[1:] else ""
        return Verdict(
            "no measurable difference",
            f"no measurable {than}: {sentence_of(change)}{others}; {better}{single}.",
        )
    beyond = controls.get("unigram")
    gain = f"; beyond unigram {sentence_of(beyond.pooled)}" if beyond else ""
    if missing:
        ran = "no controls were run" if not controls else f"not run: {', '.join(missing)}"
        return Verdict("better", f"{better}{gain}{seeds}; {ran}.")
    return Verdict(
        "improved", f"improved: {better}, and than every control that applies{gain}{seeds}."
    )


def of_training(
    compared: Mapping[str, Mapping[str, Compared]],
    *,
    best: str,
    steps: int,
    missing: Sequence[str],
) -> Verdict:
    """The rule of method: Controls for starts that were trained at equal budget.

    Args:
        compared: Objective -> start -> merge minus it on held-out text, after training; ``base``
            is always there.
        best: The objective whose merge is published, which decides.
        steps: Of every training.
        missing: Starts that apply and were not trained.

    Returns:
        The verdict, in nats per token.

    Example:
        >>> clear = MeanDifference(-0.1, -0.2, -0.05)
        >>> verdict = of_training({"sft": {"base": Compared(clear, [clear])}}, best="sft", steps=9,
        ...                       missing=["noise"])
        >>> verdict.outcome
        'better'
    """
    starts = compared[best]
    others = {name: minus for name, minus in starts.items() if name != "base"}
    outcome = judge(starts["base"], others, missing=missing).outcome
    than = {
        "improved": "improved: better than from every other start that applies",
        "better": "better than from the base",
        "worse": "worse than from the base",
    }.get(outcome, "no measurable difference from at least one other start")
    seeds = len(starts["base"].seeds)
    amounts = [f"{best}, {_minus(starts)}"]
    amounts += [f"{name}, {_minus(rest)}" for name, rest in compared.items() if name != best]
    not_run = [f"not run: {', '.join(missing)}"] if missing else []
    count = "one seed" if seeds == 1 else f"{seeds} seeds"
    too_few = [why] if (why := few(starts["base"].documents)) else []
    details = "; ".join([*amounts, *too_few, count, *not_run])
    return Verdict(outcome, f"trained from the merge by {steps} steps, {than}: {details}.")


def _minus(starts: Mapping[str, Compared]) -> str:
    """The merge minus every other start."""
    return ", ".join(
        f"merge minus {name} {sentence_of(change.pooled)}" for name, change in starts.items()
    )


def few(documents: int | None) -> str:
    """Why so few documents show nothing; empty if they are enough, or nobody counted them.

    Example:
        >>> few(1)
        'the held-out text has 1 document, and fewer than 6 agree by chance too often'
    """
    if documents is None or documents >= FEWEST:
        return ""
    many = f"{documents} document{'s' * (documents != 1)}"
    return f"the held-out text has {many}, and fewer than {FEWEST} agree by chance too often"


def sentence_of(change: MeanDifference) -> str:
    """A difference in words.

    Example:
        >>> sentence_of(MeanDifference(-0.1, -0.2, -0.05))
        '-0.1000 nats per token, 95 % interval [-0.2000, -0.0500]'
    """
    return (
        f"{change.difference:+.4f} nats per token, 95 % interval "
        f"[{change.low:+.4f}, {change.high:+.4f}]"
    )


def of_merge(
    measured: Verdict,
    report: MergeReport,
    hparams: HParams,
    spec: MergeSpec,
    against: Compared | None,
    *,
    is_auto: bool,
) -> Verdict:
    """The verdict of a run: what was measured, unless nothing can have been transferred.

    Args:
        measured: From `judge`.
        report: Diagnostics of the merge.
        hparams: With the strength used.
        spec: What moved and how.
        against: Merge minus target on held-out text, or None if there was none.
        is_auto: Whether the strength was chosen on the dev split.
    """
    if not fuse.is_moving(hparams.strength):
        best = " was best on the dev split" if is_auto else ""
        return Verdict("unchanged", f"strength 0{best}: the output is the target, unchanged.")
    if is_nothing_transferred(report, hparams):
        held_out = f"; the held-out change is {sentence_of(against.pooled)}" if against else ""
        why = f"nothing of the source was transferred: {_why_nothing(report, spec)}{held_out}."
        return Verdict("nothing transferred", why)
    return measured


def _why_nothing(report: MergeReport, spec: MergeSpec) -> str:
    """Why the transported weights almost vanished, and what to do."""
    if spec.form == "joint":
        return "the joint form vanishes; barycentric, and delta with a source base, do move it"
    if not any(np.max(weight.ratio_transported) > NOTHING for weight in report.weights.values()):
        same = "source and source base may be the same checkpoint"
        return same if spec.rule == "delta" else "the source's weights may be next to zero"
    return "the strength is next to zero; raise it"
