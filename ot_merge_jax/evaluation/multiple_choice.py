"""Multiple-choice questions by the likelihood of the whole answer. Imports models and data.

A gain in accuracy is often a letter bias: a model that says "A" more often is right more often
where A is right. So the text of each answer is scored; where options are listed by letter, every
option is listed under every letter once, and the letters chosen are counted.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ot_merge_jax.data import chat, sources
from ot_merge_jax.errors import InputError
from ot_merge_jax.evaluation import loglikelihood, nll, statistics
from ot_merge_jax.models.config import ModelConfig
from ot_merge_jax.types import Params

#: How an option is chosen. ``plain``: by its text after the question alone. ``lettered``: by its
#: text after the question and the lettered options. ``letter``: by its letter after the same.
#: ``per_byte``: by the log-probability per byte of its text, since short answers win otherwise.
SCORINGS = ("plain", "plain_per_byte", "lettered", "lettered_per_byte", "letter")
_LISTED = ("lettered", "letter")
_LETTERS = string.ascii_uppercase


class Question(NamedTuple):
    """A multiple-choice question.

    Attributes:
        text: The question.
        choices: The options.
        answer: Index of the right option.
    """

    text: str
    choices: tuple[str, ...]
    answer: int


class Answers(NamedTuple):
    """What one model chooses.

    Attributes:
        chosen: Scoring -> the option chosen for each question, ``[questions]``.
        letters: ``lettered`` and ``letter`` -> how often the option under each letter was chosen,
            ``[letters]``, over all questions and all orders of their options.
    """

    chosen: dict[str, np.ndarray]
    letters: dict[str, np.ndarray]


def read(path: str | Path, *, encoding: str = "utf-8", limit: int | None = None) -> list[Question]:
    """Reads questions, one JSON object a line: ``{question, choices, answer}``.

    Args:
        path: A ``.jsonl`` file; ``answer`` is the index of the right choice, or its letter.
        encoding: Encoding of the file.
        limit: How many questions are read at most.

    Returns:
        The questions.

    Raises:
        InputError: naming file and line of a question that cannot be used, or if there is none.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "q.jsonl"
        >>> _ = path.write_text('{"question": "1 + 1?", "choices": ["1", "2"], "answer": "B"}')
        >>> read(path)
        [Question(text='1 + 1?', choices=('1', '2'), answer=1)]
    """
    file = sources.questions(path)
    questions: list[Question] = []
    for where, record in sources.read(file, fields=(), encoding=encoding):
        if limit is not None and len(questions) >= limit:
            break
        questions.append(_question(record, where))
    if not questions:
        raise InputError(f"{file} has 0 questions; add some.")
    return questions


def _question(record: Any, where: str) -> Question:
    """The question that a record holds, checked."""
    fields = record if isinstance(record, dict) else {}
    text, choices, answer = (fields.get(key) for key in ("question", "choices", "answer"))
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: there is no 'question' that is a text; fix the line.")
    is_list = isinstance(choices, list) and all(isinstance(x, str) and x.strip() for x in choices)
    if not is_list or not 2 <= len(choices) <= len(_LETTERS):  # pyright: ignore[reportArgumentType]
        raise InputError(
            f"{where}: 'choices' is not a list of 2 to {len(_LETTERS)} texts; fix the line."
        )
    if answer is None:
        raise InputError(f"{where}: there is no 'answer'; give the index or letter of the choice.")
    letters = _LETTERS[: len(choices)]  # pyright: ignore[reportArgumentType]
    if isinstance(answer, str) and len(answer.strip()) == 1:
        answer = letters.find(answer.strip().upper())
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(letters):
        raise InputError(
            f"{where}: 'answer' is {str(fields['answer'])[:60]!r} and not an index from 0 to "
            f"{len(letters) - 1} or a letter from A to {letters[-1]}; fix the line."
        )
    return Question(text, tuple(choices), answer)  # pyright: ignore[reportArgumentType]


def answer(
    params: Params,
    cfg: ModelConfig,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    is_chat: bool = False,
    what: str = "questions",
) -> Answers:
    """Lets a model answer.

    Options are listed in every cyclic order, so that each is under each letter once, and the mean
    of the log-probabilities over the orders decides. Of equally likely options the first is chosen.

    Args:
        params: Parameters in memory, in the dtype to compute in.
        cfg: The model.
        tokenizer: The model's tokenizer.
        questions: From `read`.
        is_chat: Whether the question is written with the model's chat template.
        what: What the questions are, for the progress line.

    Returns:
        The choices, and how often each letter was chosen.

    Raises:
        InputError: if the tokenizer cannot begin a text, or a chat template is needed and missing.
    """
    prefix = nll.prefix_token(tokenizer)
    requests: list[loglikelihood.Request] = []
    for question in questions:
        for prompt, answers in _prompts(question):
            requests += _requests(prompt, answers, tokenizer, prefix, cfg, is_chat=is_chat)
    log = iter(loglikelihood.score(params, requests, cfg=cfg, what=what).log)
    chosen: dict[str, list[int]] = {name: [] for name in SCORINGS}
    letters = {name: np.zeros(len(_LETTERS), int) for name in _LISTED}
    for question in questions:
        count = len(question.choices)
        size = np.array([len(choice.encode()) for choice in question.choices])
        plain = np.array([next(log) for _ in range(count)])
        # [order, place]: first the log-probabilities of the texts listed there, then of the letters
        listed = np.array([[next(log) for _ in range(2 * count)] for _ in range(count)])
        text, letter = listed[:, :count], listed[:, count:]
        by_option = {"plain": plain, "lettered": _mean(text), "letter": _mean(letter)}
        for name, values in by_option.items():
            chosen[name].append(int(np.argmax(values)))
            if name != "letter":
                chosen[f"{name}_per_byte"].append(int(np.argmax(values / size)))
        for name, values in (("lettered", text), ("letter", letter)):
            letters[name][:count] += np.bincount(values.argmax(1), minlength=count)
    widest = max(len(question.choices) for question in questions)
    return Answers(
        {name: np.array(indices) for name, indices in chosen.items()},
        {name: counts[:widest] for name, counts in letters.items()},
    )


def _prompts(question: Question) -> Iterator[tuple[str, list[str]]]:
    """Prompts and the answers scored after them: the plain question, then each order."""
    yield f"Question: {question.text}\nAnswer:", list(question.choices)
    count = len(question.choices)
    for first in range(count):
        order = [question.choices[(first + place) % count] for place in range(count)]
        lines = [f"{letter}. {choice}" for letter, choice in zip(_LETTERS, order, strict=False)]
        prompt = "\n".join([f"Question: {question.text}", *lines, "Answer:"])
        yield prompt, [*order, *_LETTERS[:count]]


def _mean(by_place: np.ndarray) -> np.ndarray:
    """Mean over orders, by option; ``[order, place]`` holds option ``order + place``."""
    count = len(by_place)
    return np.array([
        np.mean([by_place[first, (option - first) % count] for first in range(count)])
        for option in range(count)
    ])  # fmt: skip


def _requests(
    prompt: str,
    answers: Sequence[str],
    tokenizer: Any,
    prefix: int,
    cfg: ModelConfig,
    *,
    is_chat: bool,
) -> list[loglikelihood.Request]:
    """One prompt with each of its answers.

    The context is the tokens that all answers and the prompt alone begin with: a token that reaches
    over the end of the prompt counts as part of the answer, in all answers alike.
    """
    context, space = prompt, " "
    if is_chat:
        context, space = chat.before_answer([chat.Turn("user", prompt)], tokenizer), ""
    alone, *whole = (
        tokenizer(context + end, add_special_tokens=False)["input_ids"]
        for end in ("", *(f"{space}{text}" for text in answers))
    )
    shared = min(min(_common(alone, ids), len(ids) - 1) for ids in whole)
    # a template may write the prefix itself
    before = [] if is_chat and alone[:1] == [prefix] else [prefix]
    return [
        loglikelihood.cut([*before, *ids[:shared]], ids[shared:], max_positions=cfg.max_positions)
        for ids in whole
    ]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens at the beginning of two sequences are equal."""
    differs = (place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differs, min(len(a), len(b)))


def is_right(questions: Sequence[Question], chosen: np.ndarray) -> np.ndarray:
    """Whether each choice has the text of the right one, ``[questions]`` bool.

    Example:
        >>> is_right([Question("?", ("yes", "no", "yes"), 2)], np.array([0]))
        array([ True])
    """
    return np.array([
        question.choices[index] == question.choices[question.answer]
        for question, index in zip(questions, chosen, strict=True)
    ])  # fmt: skip


def summary(
    questions: Mapping[str, Sequence[Question]],
    answers: Mapping[str, Mapping[str, Answers]],
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracies of every model on every file, and how sure their differences are, as JSON values.

    Args:
        questions: File -> its questions.
        answers: File -> model -> its answers.
        seed: Seed of the bootstrap over questions.

    Returns:
        For each file ``{questions, models: {model: {SCORING: {accuracy, low, high}, letters:
        {lettered, letter: {A: times, ...}}}}, pairs: [{a, b, scoring, difference, low, high,
        only_a, only_b, p, p_holm}]}``: accuracy of ``a`` minus that of ``b``, ``p`` by McNemar's
        test, and ``p_holm`` adjusted over the files.
    """
    summaries: dict[str, Any] = {}
    for file, its_questions in questions.items():
        each = np.ones(len(its_questions))
        right = {
            model: {name: is_right(its_questions, reply.chosen[name]) for name in SCORINGS}
            for model, reply in answers[file].items()
        }
        summaries[file] = {
            "questions": len(its_questions),
            "models": {
                model: {name: _accuracy(values, seed) for name, values in scorings.items()}
                | {"letters": _letters(answers[file][model])}
                for model, scorings in right.items()
            },
            "pairs": [
                {"a": a, "b": b, "scoring": name}
                | statistics.outcomes((right[a][name], each), (right[b][name], each), seed=seed)
                for a, b in statistics.name_pairs(right)
                for name in SCORINGS
            ],
        }
    pairs = statistics.adjusted({file: entry["pairs"] for file, entry in summaries.items()})
    return {file: entry | {"pairs": pairs[file]} for file, entry in summaries.items()}


def _accuracy(right: np.ndarray, seed: int) -> dict[str, float]:
    """Share of right answers with its interval."""
    estimate = statistics.interval(right.astype(float), np.ones(len(right)), seed=seed)
    return dict(zip(("accuracy", "low", "high"), map(float, estimate), strict=True))


def _letters(answers: Answers) -> dict[str, dict[str, int]]:
    """How often each letter was chosen."""
    return {
        name: dict(zip(_LETTERS, map(int, counts), strict=False))
        for name, counts in answers.letters.items()
    }
