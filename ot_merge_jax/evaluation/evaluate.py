"""What `ot-merge eval` does: models and questions in, scores and differences out. No maths.

Texts, questions and tasks are checked before any weight is read; one model is in memory at a time,
beside the base that the others are compared with.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from ot_merge_jax.data import sources
from ot_merge_jax.data.chat import Document
from ot_merge_jax.data.documents import documents_of
from ot_merge_jax.data.tokenizers import is_same_tokenizer, tokenizer_of
from ot_merge_jax.evaluation import (
    kl,
    lm_eval_tasks,
    multiple_choice,
    nll,
    request,
    samples,
    statistics,
)
from ot_merge_jax.io import hf
from ot_merge_jax.io.folder import ModelFolder, eos_token_ids, open_folder
from ot_merge_jax.models.model import Model

_LOG = logging.getLogger(__name__)


class _Read(NamedTuple):
    """Documents, questions and tasks, checked and in memory."""

    documents: list[Document]
    questions: dict[str, list[multiple_choice.Question]]
    tasks: dict[str, Any]
    prompts: list[Document]


class _Result(NamedTuple):
    """The results of one model."""

    scores: nll.Scores | None
    divergence: dict[str, Any]
    continued: list[samples.SampledText]
    answers: dict[str, multiple_choice.Answers]
    outcomes: dict[str, lm_eval_tasks.TaskOutcome]


def evaluate(
    paths: Sequence[str],
    ask: request.EvalRequest,
    *,
    base: str | None = None,
    seed: int = 0,
    offline: bool = False,
) -> dict[str, Any]:
    """Scores models and compares every pair.

    Args:
        paths: Model folders or hub ids, as typed; they are the keys of the result.
        ask: What they are evaluated on.
        base: The model whose next-token distributions the others' are compared with; it is scored
            like them. None: the first of them.
        seed: Seed of the bootstrap.
        offline: Whether the network is forbidden; the hub's local cache is used all the same.

    Returns:
        ``{"models": {path: {documents, tokens, nll_per_token, bits_per_byte}}, "pairs": [{a, b,
        metric, difference, low, high}]}``; ``difference`` is ``a`` minus ``b``, in nats per token,
        or in bits per byte where the tokenizers differ. Models with the tokenizer of the base have
        ``kl_to_base``, nats per token, and ``kl_to_base_interval``, and ``base`` names it.
        ``samples`` (`samples.summary`), ``choices`` (`multiple_choice.summary`) and ``tasks``
        (`lm_eval_tasks.summary`) if asked for; of a model without text the entry is empty.

    Raises:
        RecipeError: if nothing is asked, a task is unknown, or the base has no text to be compared
            on.
        InputError: if a model, a text or a question cannot be used.
    """
    request.check(ask, base=base)
    names = list(dict.fromkeys([*paths, base] if base is not None else paths))
    folders = {name: open_folder(name, offline=offline) for name in names}
    tokenizers = {name: tokenizer_of(folder) for name, folder in folders.items()}
    read = _read(ask, tokenizers[names[0]], offline=offline)

    def share_tokenizer(a: str, b: str) -> bool:
        return is_same_tokenizer(tokenizers[a], tokenizers[b], read.documents)

    if len(names) > 1 and 0 < len(read.documents) < statistics.FEWEST:
        _LOG.warning(
            "the text has %d of at least %d documents, so no interval of a difference says "
            "anything: add documents, one a line", len(read.documents), statistics.FEWEST,
        )  # fmt: skip
    first = names[0] if base is None else base
    near = {
        name for name in names if name != first and read.documents and share_tokenizer(first, name)
    }
    for name in names if base is not None else ():
        if name != first and name not in near:
            _LOG.warning("%s has other tokens than the base %s: no KL, only bits", name, first)
    results: dict[str, _Result] = {}
    base_model: Model | None = None
    for name in sorted(names, key=lambda name: name != first):
        model = _load(folders[name])
        beside = base_model if name in near else None
        results[name] = _result(
            model, folders[name], tokenizers[name], read, ask, beside, seed=seed
        )
        base_model = model if name == first and near else base_model
        del model  # else two models would be in memory while the next one is read
    results = {name: results[name] for name in names}
    facts = _as_json(results, read, share_tokenizer, seed=seed)
    return facts | ({"base": first} if near else {})


def _load(folder: ModelFolder) -> Model:
    """A model in float32."""
    _LOG.info("load %s", folder.where)
    return hf.load_folder(folder, dtype=jnp.float32)


def _read(ask: request.EvalRequest, tokenizer: Any, *, offline: bool) -> _Read:
    """Reads everything that is asked for, but no weights."""
    documents: list[Document] = []
    if ask.text is not None:
        source = sources.locate(ask.text.path, offline=offline)
        documents = documents_of(ask.text, source)[: ask.limit]
    questions = {
        file: multiple_choice.read(Path(file), encoding=ask.encoding, limit=ask.limit)
        for file in dict.fromkeys(ask.questions)
    }
    named = {}
    if ask.tasks:
        named = lm_eval_tasks.load(
            ask.tasks, include_path=ask.include_path, limit=ask.limit, offline=offline
        )
    return _Read(
        documents, questions, named, samples.prompts(documents[: ask.continued], tokenizer)
    )


def _result(
    model: Model,
    folder: ModelFolder,
    tokenizer: Any,
    read: _Read,
    ask: request.EvalRequest,
    base: Model | None,
    *,
    seed: int,
) -> _Result:
    """The results of one model on everything."""
    cfg, params = model
    stop = eos_token_ids(folder)
    continued = samples.sample(
        params, cfg, tokenizer, read.prompts, stop=stop, max_new_tokens=ask.new_tokens
    )
    scores, moved = None, {}
    if read.documents:
        cut = nll.windows(read.documents, tokenizer, max_positions=cfg.max_positions)
        scores = nll.score(params, cut, cfg=cfg)
        if base is not None:
            shorter = min(cfg.max_positions, base.cfg.max_positions)
            if shorter < cfg.max_positions:
                cut = nll.windows(read.documents, tokenizer, max_positions=shorter)
            nats = kl.divergence(base, model, cut)
            value, low, high = map(float, statistics.interval(nats, cut.tokens, seed=seed))
            moved = {"kl_to_base": value, "kl_to_base_interval": [low, high]}
    answers = {
        file: multiple_choice.answer(
            params, cfg, tokenizer, questions, is_chat=ask.is_chat, what=f"questions of {file}"
        )
        for file, questions in read.questions.items()
    }
    outcomes = {}
    if read.tasks:
        outcomes = lm_eval_tasks.run(
            params, cfg, tokenizer, read.tasks, stop=stop, limit=ask.limit, is_chat=ask.is_chat
        )
    return _Result(scores, moved, continued, answers, outcomes)


def _as_json(
    results: Mapping[str, _Result], read: _Read, share_tokenizer: Any, *, seed: int
) -> dict[str, Any]:
    """The JSON values of `evaluate`."""
    scores = {name: result.scores for name, result in results.items() if result.scores is not None}
    facts: dict[str, Any] = {
        "models": {
            name: ({} if result.scores is None else result.scores.totals) | result.divergence
            for name, result in results.items()
        },
        "pairs": statistics.every_pair(scores, share_tokenizer, seed=seed),
    }
    if read.prompts:
        continued = {name: result.continued for name, result in results.items()}
        facts["samples"] = samples.summary(read.prompts, continued)
    if read.questions:
        answers = {
            file: {name: result.answers[file] for name, result in results.items()}
            for file in read.questions
        }
        facts["choices"] = multiple_choice.summary(read.questions, answers, seed=seed)
    if read.tasks:
        outcomes = {
            task: {name: result.outcomes[task] for name, result in results.items()}
            for task in read.tasks
        }
        facts["tasks"] = lm_eval_tasks.summary(outcomes, seed=seed)
    return facts
