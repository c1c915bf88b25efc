"""Tasks of lm-evaluation-harness: checked, run, compared. Imports lm_eval_model, statistics.

A task is code and data of its author: its file may name Python functions in the same folder, which
lm-eval imports. Give only folders that you trust.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ot_merge_jax.errors import InputError, RecipeError
from ot_merge_jax.evaluation import lm_eval_model, request, statistics
from ot_merge_jax.models.config import ModelConfig
from ot_merge_jax.types import Params

_KNOWN_AT_MOST = 12  # names that a message lists
_FEWSHOT_SEED = 1234  # lm-eval's own, so that its examples are the same


class TaskOutcome(NamedTuple):
    """The results of one model on one task.

    Attributes:
        metrics: Metric -> its value, as lm-eval reports it; ``METRIC,FILTER`` where the task has
            filters.
        documents: Metric -> what each document adds to its numerator and to its denominator,
            ``[documents]`` each; only for metrics that are such ratios. For ``bits_per_byte`` these
            are bits and bytes.
        count: How many documents were asked.
    """

    metrics: dict[str, float]
    documents: dict[str, tuple[np.ndarray, np.ndarray]]
    count: int


def load(
    names: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    offline: bool = False,
) -> dict[str, Any]:
    """Loads tasks and checks their documents.

    Args:
        names: Names of tasks, groups or tags, or patterns of such names.
        include_path: A folder of task files, used instead of lm-eval's own tasks.
        limit: How many documents of a task are checked.
        offline: Whether the network is forbidden.

    Returns:
        Name -> task of lm-eval; a group is replaced by its tasks.

    Raises:
        RecipeError: if a name is unknown.
        InputError: if lm-eval or the folder is missing, or a task cannot be loaded, has no
            documents, or has a document without a right answer.
    """
    folder = request.task_folder(include_path)
    lm_eval = lm_eval_model.imported()
    import datasets  # noqa: PLC0415, lm-eval brings it
    from datasets import config as settings  # noqa: PLC0415

    settings.HF_HUB_OFFLINE = settings.HF_HUB_OFFLINE or offline
    datasets.disable_progress_bars()
    manager = lm_eval.tasks.TaskManager(
        include_path=None if folder is None else str(folder), include_defaults=folder is None
    )
    for name in names:
        if not manager.match_tasks([name]):
            raise RecipeError(_unknown(name, manager.all_tasks, folder))
    wanted = manager.match_tasks(list(names))
    try:
        loaded = manager.load(wanted)["tasks"]
    except Exception as error:  # a task may run code of its own
        raise InputError(
            f"The tasks {', '.join(wanted)} cannot be loaded ({_first(error)}); fix their files."
        ) from error
    for name, task in loaded.items():
        _check(name, task, limit)
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return dict(loaded)


def _unknown(name: str, known: Sequence[str], folder: Path | None) -> str:
    """A sentence about a task that does not exist."""
    where = "lm-evaluation-harness" if folder is None else str(folder)
    near = difflib.get_close_matches(name, known, 1)
    if near:
        return f"There is no task {name!r} in {where}; did you mean {near[0]!r}?"
    listed = ", ".join(known[:_KNOWN_AT_MOST]) or "none"
    return f"There is no task {name!r} in {where}; name one that it has (e.g. {listed})."


def _first(error: Exception) -> str:
    """The beginning of a message, on one line."""
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def _check(name: str, task: Any, limit: int | None) -> None:
    """Refuses a task that cannot be run, or whose documents cannot be scored."""
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        raise InputError(
            f"The task {name} runs what a model writes, or shows pictures, which is not done here; "
            "leave it out."
        )
    count = 0
    try:
        for index, document in task.doc_iterator(limit=limit):
            count += 1
            if problem := _problem(task, document):
                raise InputError(
                    f"Document {index + 1} of the task {name} {problem}; fix its data."
                )
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"Document {count} of the task {name} cannot be read ({_first(error)}); fix the task."
        ) from error
    if not count:
        raise InputError(f"The task {name} has 0 documents; add some.")


def _problem(task: Any, document: Any) -> str:
    """What is wrong with the right answer of a document, or nothing."""
    kind = task.OUTPUT_TYPE
    if kind == "loglikelihood_rolling":  # the document itself is what is scored
        text = task.doc_to_target(document)
        return "" if isinstance(text, str) and text else "is empty"
    if kind == "multiple_choice":
        choices = task.doc_to_choice(document)
        # tasks with a gap to fill name the right choice where others have the question
        gold = (task.doc_to_text if task.multiple_input else task.doc_to_target)(document)
        several = gold if isinstance(gold, list) else [gold]
        places = [choices.index(right) if right in choices else right for right in several]
        is_there = [isinstance(place, int) and 0 <= place < len(choices) for place in places]
        if several and all(is_there):
            return ""
        return f"has no right answer among its {len(choices)} choices (it says {gold!r:.60})"
    gold = task.doc_to_target(document)
    return "has no right answer" if gold is None or gold in ("", []) else ""


def run(
    params: Params,
    cfg: ModelConfig,
    tokenizer: Any,
    tasks: Mapping[str, Any],
    *,
    stop: Sequence[int] = (),
    limit: int | None = None,
    is_chat: bool = False,
) -> dict[str, TaskOutcome]:
    """Runs tasks on one model.

    Args:
        params: Parameters in memory, in the dtype to compute in.
        cfg: The model.
        tokenizer: The model's tokenizer.
        tasks: From `load`.
        stop: Ids that end a text.
        limit: How many documents of each task are asked.
        is_chat: Whether they are written with the model's chat template.

    Returns:
        Task -> its outcome.

    Raises:
        InputError: if a task asks for something that is not supported, or the template is missing.
    """
    evaluator = lm_eval_model.imported().evaluator
    model = lm_eval_model.model_class()(lm_eval_model.Scorer(params, cfg, tokenizer, stop))
    results = evaluator.evaluate(
        lm=model,
        task_dict={"tasks": dict(tasks), "groups": {}, "group_map": {}},
        limit=limit,
        bootstrap_iters=0,
        apply_chat_template=is_chat,
        fewshot_as_multiturn=is_chat,
        log_samples=True,
    )
    return {
        name: TaskOutcome(
            dict(_metrics(results["results"][name])),
            dict(_documents(task, results["samples"][name])),
            len({sample["doc_id"] for sample in results["samples"][name]}),
        )
        for name, task in tasks.items()
    }


def _named(metric: str, chosen: str) -> str:
    """A metric with its filter, if it has one."""
    return metric if chosen == "none" else f"{metric},{chosen}"


def _metrics(reported: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The values that lm-eval reports of a task."""
    for key, value in reported.items():
        metric, comma, chosen = key.partition(",")
        is_number = isinstance(value, int | float | np.number)
        if comma and is_number and not metric.endswith("_stderr"):
            yield _named(metric, chosen), float(value)


def _documents(
    task: Any, samples: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    """What each document adds to numerator and denominator, for metrics that are ratios of sums."""
    from lm_eval.api import metrics  # noqa: PLC0415

    means = {name for name, how in task.aggregation().items() if how is metrics.mean}
    for chosen in dict.fromkeys(sample["filter"] for sample in samples):
        filtered = sorted(
            (sample for sample in samples if sample["filter"] == chosen),
            key=lambda sample: sample["doc_id"],
        )
        for metric in filtered[0]["metrics"]:
            values = [sample[metric] for sample in filtered]
            if metric in means and all(np.isscalar(value) for value in values):
                yield _named(metric, chosen), (np.array(values, float), np.ones(len(values)))
            elif metric == "bits_per_byte":
                log, size = np.array(values, float).T
                yield _named(metric, chosen), (-log / math.log(2), size)


def summary(
    outcomes: Mapping[str, Mapping[str, TaskOutcome]], *, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Results of every model on every task, and how sure the differences are, as JSON values.

    Args:
        outcomes: Task -> model -> its outcome.
        seed: Seed of the bootstrap over documents.

    Returns:
        For each task ``{documents, models: {model: {METRIC: value}}, pairs: [{a, b, metric,
        difference, low, high, p, p_holm}]}``, where ``difference`` is ``a`` minus ``b``. Where
        every document is right or wrong, ``p`` is McNemar's, with ``only_a`` and ``only_b``; else
        it is the bootstrap's. ``p_holm`` is adjusted over the tasks.
    """
    summaries: dict[str, dict[str, Any]] = {}
    for task, models in outcomes.items():
        parts = {name: outcome.documents for name, outcome in models.items()}
        summaries[task] = {
            "documents": max(outcome.count for outcome in models.values()),
            "models": {name: outcome.metrics for name, outcome in models.items()},
            "pairs": [
                {"a": a, "b": b, "metric": metric}
                | statistics.outcomes(parts[a][metric], parts[b][metric], seed=seed)
                for a, b in statistics.name_pairs(parts)
                for metric in parts[a]
                if metric in parts[b]
            ],
        }
    pairs = statistics.adjusted({task: entry["pairs"] for task, entry in summaries.items()})
    return {task: entry | {"pairs": pairs[task]} for task, entry in summaries.items()}
