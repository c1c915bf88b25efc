"""Held-out documents that were learned from: found whatever their spaces and case, and left out."""

import json

import pytest

from ot_merge_jax.data import leaks, sources
from ot_merge_jax.data.chat import Chat, Turn
from ot_merge_jax.errors import InputError
from ot_merge_jax.recipes.recipe import Text

LINES = [f"line number {word} of a long enough text" for word in ("one", "two", "three", "four")]
LEARNED = ["The rain fell on the town.", "\n".join(LINES), "ok"]


@pytest.mark.parametrize(
    ("document", "is_leaked"),
    [
        ("The rain fell on the town.", True),
        ("the RAIN   fell -- on the town", True),
        ("\uff34he rain fell\non the town", True),  # NFKC; other line ends
        ("The rain fell on the town again.", False),
        ("\n".join(LINES), True),
        (
            "\n".join(
                [*LINES[:2], "something else of some length", "and one more line of the kind"]
            ),
            True,
        ),
        (
            "\n".join([LINES[0], "something else of some length", "and one more line of the kind"]),
            False,
        ),
        ("\n".join([LINES[0], "short", "shorter"]), True),  # short lines do not count
        ("ok", True),  # equal as a whole, however short
        ("ok then", False),
        ("", False),
        ("...", False),
    ],
)
def test_near_duplicates(document, is_leaked):
    assert leaks.near_duplicates([document], LEARNED) == [is_leaked]


def test_lines_of_several_documents_count_together():
    document = "\n".join(LINES)
    assert leaks.near_duplicates([document], [LINES[0], f"{LINES[2]}\nmore"]) == [True]


def test_what_a_chat_says_is_compared():
    chat = Chat((Turn("user", "The rain fell"), Turn("assistant", "on the town.")))
    assert leaks.near_duplicates([chat], LEARNED) == [True]
    assert leaks.near_duplicates(LEARNED, [chat]) == [True, False, False]


def written(path, documents):
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in documents), "utf-8")
    return Text(path=str(path)), sources.locate(path)


def test_what_leaked_is_left_out_and_counted(tmp_path):
    learned, learned_source = written(tmp_path / "learned.jsonl", LEARNED)
    text, source = written(tmp_path / "held.jsonl", ["New words.", LEARNED[0], "Others."])
    kept = leaks.held_out(
        text, source, learned=learned, learned_source=learned_source, role="calibration"
    )
    assert kept == (["New words.", "Others."], 1)


@pytest.mark.parametrize("kind", ["same path", "link", "copy"])
def test_a_text_that_is_learned_from_is_no_held_out_text(tmp_path, kind):
    learned, learned_source = written(tmp_path / "learned.jsonl", LEARNED)
    path = tmp_path / "learned.jsonl"
    if kind != "same path":
        path = tmp_path / "held.jsonl"
        if kind == "link":
            path.symlink_to(tmp_path / "learned.jsonl")
        else:
            path.write_bytes((tmp_path / "learned.jsonl").read_bytes())
    with pytest.raises(InputError) as caught:
        leaks.held_out(
            Text(path=str(path)), sources.locate(path), learned=learned,
            learned_source=learned_source, role="calibration",
        )  # fmt: skip
    assert "calibration" in str(caught.value)
    assert "held-out" in str(caught.value)
    assert str(path) in str(caught.value)
