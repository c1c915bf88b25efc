"""The controls of a run: the trial of its own calibration seed, and of each further one."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ot_merge_jax.data.chat import Document
from ot_merge_jax.evaluation import nll
from ot_merge_jax.experiments import trial
from ot_merge_jax.runs import stages, stages_merge
from ot_merge_jax.runs.inputs import MergeInputs, reseeded
from ot_merge_jax.types import AlignedBatches, Merged

_LOG = logging.getLogger(__name__)


def every_seed(
    run: stages.RunFolder,
    inputs: MergeInputs,
    context: trial.TrialContext,
    merged: Merged,
    arm: trial.Arm,
    names: Sequence[str],
) -> list[trial.Trial]:
    """The trial of the run's own seed, then of each further one that its recipe asks for.

    Args:
        run: The run folder.
        inputs: Of the run; for a further seed they are drawn again.
        context: What all arms share.
        merged: The merge of the run's own seed.
        arm: That merge as it was published.
        names: The controls that apply.
    """
    every_trial = [
        trial.trial(context, stages_merge.keeping(run), split(inputs), merged, names, arm=arm)
    ]
    first = inputs.recipe.seed
    for seed in range(first + 1, first + inputs.recipe.seeds):
        _LOG.info("calibration seed %d", seed)
        again = split(reseeded(inputs, seed))
        stage = stages_merge.keeping(run._replace(part=f"seed-{seed}/"))
        every_trial.append(trial.again(context, stage, again, names))
    return every_trial


def split(inputs: MergeInputs) -> trial.CalibrationSplit:
    """The calibration text of a seed, ready to be used."""
    return trial.CalibrationSplit(
        inputs.recipe.seed,
        AlignedBatches(inputs.data.target, inputs.data.source),
        inputs.vocabulary,
        lambda: target_windows(inputs, inputs.texts),
        target_windows(inputs, inputs.dev) if inputs.dev else None,
    )


def target_windows(inputs: MergeInputs, documents: Sequence[Document]) -> nll.Windows:
    """Documents ready to be scored by the target, or by any merge of it."""
    longest = inputs.folders["target"].cfg.max_positions
    return nll.windows(documents, inputs.tokenizers["target"], max_positions=longest)
