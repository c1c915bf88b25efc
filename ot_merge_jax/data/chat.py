"""Chats: turns of a conversation, and the text that a chat template makes of them."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ot_merge_jax.errors import InputError

#: Seconds that a chat template may take for one document.
RENDER_SECONDS = 5.0


#: Given to templates that write the date: rendering must not depend on the day.
_DATE = "26 Jul 2024"


_MAX_GROWTH = 100_000


class Turn(NamedTuple):
    """One message of a chat.

    Attributes:
        role: Who speaks, in the words of the template: ``system``, ``user``, ``assistant``.
        content: Its text.
    """

    role: str
    content: str


class Chat(NamedTuple):
    """A conversation, not yet written out in the format of any model.

    Attributes:
        turns: The messages, in order.
    """

    turns: tuple[Turn, ...]


Document = str | Chat


class Rendered(NamedTuple):
    """A document as one model reads it.

    Attributes:
        text: The text to tokenise.
        contents: Character ranges ``(start, stop)`` of what all models read alike: the whole of a
            plain text; of a chat each message without white space around it, in order, one range a
            message (an empty one if the template leaves the message out).
        has_special: Whether the text writes its own special tokens (a chat), so that the tokenizer
            must not add any.
    """

    text: str
    contents: list[tuple[int, int]]
    has_special: bool


def render(document: Document, tokenizer: Any) -> Rendered:
    """Writes a document as a model reads it: a chat by the model's own template.

    A template is foreign code. transformers runs it in jinja's sandbox; it is stopped after
    `RENDER_SECONDS` by an alarm signal (in the main thread of Python; other threads cannot be
    interrupted), and one that uses ``**``, which no signal can stop, is refused before it runs. A
    template that asks for ``date_string`` (Llama 3) is given one fixed date.

    Args:
        document: A text, which stays as it is, or a chat.
        tokenizer: Of the model, by transformers.

    Returns:
        The text, where the document's own words stand in it, and whether it writes its own special
        tokens.

    Raises:
        InputError: if the model has no chat template, or the template fails or takes too long.

    Example:
        >>> render("plain text", tokenizer=None)
        Rendered(text='plain text', contents=[(0, 10)], has_special=False)
    """
    if isinstance(document, str):
        return Rendered(document, [(0, len(document))], False)
    text = _apply(document.turns, tokenizer)
    return Rendered(text, _contents(text, document.turns, tokenizer), True)


def before_answer(turns: Sequence[Turn], tokenizer: Any, *, is_begun: bool = False) -> str:
    """A chat as a model reads it before it answers, by its own template.

    Args:
        turns: The messages so far.
        tokenizer: Of the model.
        is_begun: Whether the last message is the beginning of the answer, and not what it answers.

    Returns:
        The text, special tokens written out. What `render` says about templates holds here.

    Raises:
        InputError: as `render` does.
    """
    return _apply(
        turns, tokenizer, add_generation_prompt=not is_begun, continue_final_message=is_begun
    )


def _apply(turns: Sequence[Turn], tokenizer: Any, **options: bool) -> str:
    """A chat by the template of a tokenizer."""
    where = f"The chat template of {tokenizer.name_or_path}"
    if not tokenizer.chat_template:
        raise InputError(
            f"The tokenizer of {tokenizer.name_or_path} has no chat template, so this model cannot "
            "read chats; copy the chat_template.jinja of an instruction-tuned version into its "
            "folder, or give plain texts."
        )
    try:
        _check_template(tokenizer.get_chat_template())
        with _time_limit(RENDER_SECONDS):
            text = tokenizer.apply_chat_template(
                [turn._asdict() for turn in turns], tokenize=False, date_string=_DATE, **options
            )
    except TimeoutError as error:
        raise InputError(
            f"{where} takes more than {RENDER_SECONDS:g} seconds for one chat; fix the template."
        ) from error
    except (Exception, MemoryError) as error:  # a template raises what it likes
        roles = ", ".join(turn.role for turn in turns[:6])
        reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise InputError(
            f"{where} cannot write a chat of {roles} ({reason}); fix the chat or the template."
        ) from error
    if len(text) > _MAX_GROWTH + 2 * sum(len(part) for turn in turns for part in turn):
        raise InputError(f"{where} writes far more than the chat says; fix the template.")
    return text


@functools.cache
def _check_template(template: str) -> None:
    """Refuses ``**``: constants are computed before any rendering, and no signal stops that."""
    import jinja2  # noqa: PLC0415, only chats need it

    if any(value == "**" for _, kind, value in jinja2.Environment().lex(template)  # noqa: S701, only read
           if kind == "operator"):  # fmt: skip
        raise ValueError("it uses the operator **")


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in a block that takes longer; without effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def _contents(text: str, turns: Sequence[Turn], tokenizer: Any) -> list[tuple[int, int]]:
    """Where the messages stand in a rendered chat.

    The chat is rendered once more with a marker for each message, so that a message ``user`` is not
    taken for the word in its header. If a template treats a marker differently from the
    message, each message is searched for after the one before.
    """
    markers = [f"\ue000{number}\ue001" for number in range(len(turns))]
    try:
        probe = _apply([Turn(t.role, m) for t, m in zip(turns, markers, strict=True)], tokenizer)
    except InputError:
        probe = ""
    return _between(text, turns, markers, probe) or _in_order(text, turns)


def _between(
    text: str, turns: Sequence[Turn], markers: Sequence[str], probe: str
) -> list[tuple[int, int]] | None:
    """The messages between the fixed parts of a template; None if text and probe do not agree."""
    places = [probe.find(marker) for marker in markers]
    there = [place for place in places if place >= 0]
    is_once = all(probe.count(marker) <= 1 for marker in markers)
    if not there or not is_once or there != sorted(there):
        return None
    ranges, cursor = [], there[0]
    if not text.startswith(probe[: there[0]]):
        return None
    for index, (turn, place, marker) in enumerate(zip(turns, places, markers, strict=True)):
        if place < 0:
            ranges.append((cursor, cursor))
            continue
        before = place + len(marker)
        following = min((p for p in places[index + 1 :] if p >= 0), default=len(probe))
        part = probe[before:following]
        is_last = following == len(probe)
        content = turn.content
        for variant in (content, content.strip(), content.lstrip(), content.rstrip()):
            stop = cursor + len(variant)
            if text.startswith(variant + part, cursor) and (
                not is_last or stop + len(part) == len(text)
            ):
                break
        else:
            return None
        start = cursor + len(variant) - len(variant.lstrip())
        ranges.append((start, start + len(content.strip())))
        cursor = stop + len(part)
    return ranges


def _in_order(text: str, turns: Sequence[Turn]) -> list[tuple[int, int]]:
    """The messages, each searched after the one before."""
    ranges, cursor = [], 0
    for turn in turns:
        content = turn.content.strip()
        place = text.find(content, cursor)
        start = cursor if place < 0 else place
        cursor = start if place < 0 else start + len(content)
        ranges.append((start, cursor))
    return ranges
