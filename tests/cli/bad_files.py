"""Rows of `test_bad_input`: files made to hang, to fill the memory or to run code."""

import json
import os

import pytest
from bombs import ALIASES
from desk import INDEX, SINGLE, row

LARGE = 200_000_000

# ---- files that never end, or are far too large ----


def in_place_of(name, make):
    """A run whose target has something else in the place of a file."""

    @pytest.mark.catalogue("links-and-devices")
    def damage(desk):
        path = desk.target / name
        path.unlink()
        make(path)
        return desk.run()

    return damage


for _name in ("config.json", "tokenizer.json", "chat_template.jinja"):
    row(3, "copy", _name, "not a regular file", "download", name=f"pipe as {_name}")(
        in_place_of(_name, os.mkfifo)
    )
row(3, "tokenizer.json", "not a regular file", name="device as tokenizer.json")(
    in_place_of("tokenizer.json", lambda path: path.symlink_to("/dev/zero"))
)


@pytest.mark.catalogue("links-and-devices")
@row(3, "no text file", "texts.fifo")
def pipe_as_calibration(desk):
    os.mkfifo(desk.folder / "texts.fifo")
    return desk.run(calibration=desk.folder / "texts.fifo")


@pytest.mark.catalogue("links-and-devices")
@row(2, "no recipe", "recipe.fifo")
def pipe_as_recipe(desk):
    os.mkfifo(desk.folder / "recipe.fifo")
    return ["run", desk.folder / "recipe.fifo", "--out", desk.out]


def sparse(path, size):
    """A file of that many zero bytes, which take no room on the disk."""
    with path.open("ab") as file:
        file.truncate(size)
    return path


@pytest.mark.catalogue("hostile-json")
@row(3, "config.json", "larger than 5000000 bytes")
def config_of_200_megabytes(desk):
    sparse(desk.target / "config.json", LARGE)
    return desk.run()


@pytest.mark.catalogue("hostile-json")
@row(3, INDEX, "larger than 100000000 bytes")
def index_of_200_megabytes(desk):
    (desk.target / SINGLE).unlink()
    sparse(desk.target / INDEX, LARGE)
    return desk.run()


@pytest.mark.catalogue("hostile-json")
@row(3, SINGLE, "truncated or corrupt", "200000000 bytes")
def header_of_200_megabytes(desk):
    path = desk.target / SINGLE
    path.write_bytes((LARGE - 8).to_bytes(8, "little"))
    sparse(path, LARGE)
    return desk.run()


@row(3, "config.json", "not JSON")
def config_of_nested_lists(desk):
    (desk.target / "config.json").write_text('{"model_type": ' + "[" * 1_000_000)
    return desk.run()


@pytest.mark.catalogue("huge-text")
@row(3, "endless.txt", "line 1", "longer than 10000000 characters", "one a line")
def endless_line(desk):
    return desk.run(calibration=endless(desk.folder / "endless.txt"))


@pytest.mark.catalogue("huge-text")
@row(3, "endless.jsonl", "line 1", "longer than 10000000 characters")
def endless_line_of_jsonl(desk):
    return desk.run(calibration=endless(desk.folder / "endless.jsonl"))


def endless(path):
    """Many megabytes without the end of a line."""
    with path.open("w") as file:
        for _ in range(150):
            file.write("river " * 170_000)
    return path


@pytest.mark.catalogue("huge-text")
@row(3, "late.txt", "byte 150000000 ", "line 15001", "--encoding")
def bad_byte_late_in_a_large_text(desk):
    path = desk.folder / "late.txt"
    with path.open("wb") as file:
        for _ in range(15_000):
            file.write(b"river" * 1999 + b"word\n")
        file.write(b"\xff\n")
    return desk.run(calibration=path)


# ---- YAML ----


@pytest.mark.catalogue("hostile-yaml")
@row(2, "recipe.yaml", "not YAML", "aliases")
def recipe_that_is_an_alias_bomb(desk):
    return ["run", desk.write("recipe.yaml", ALIASES), "--out", desk.out]


@pytest.mark.catalogue("hostile-yaml")
@row(2, "recipe.yaml", "not YAML")
def recipe_of_nested_lists(desk):
    return ["run", desk.write("recipe.yaml", "a: " + "[" * 20_000), "--out", desk.out]


@pytest.mark.catalogue("hostile-yaml")
@row(2, "recipe.yaml", "larger than 1000000 bytes")
def recipe_of_200_megabytes(desk):
    return ["run", sparse(desk.folder / "recipe.yaml", LARGE), "--out", desk.out]


#: Rows that must be refused in little time and memory.
BOMBS = [
    "pipe as config.json", "pipe as tokenizer.json", "device as tokenizer.json",
    "config of 200 megabytes", "index of 200 megabytes", "header of 200 megabytes",
    "config of nested lists", "endless line", "endless line of jsonl",
    "bad byte late in a large text",
    "recipe that is an alias bomb", "recipe of nested lists", "recipe of 200 megabytes",
]  # fmt: skip

# ---- tokenizers ----


@pytest.mark.catalogue("broken-tokenizer")
@row(3, "copy", "tokenizer", "cannot be loaded")
def damaged_sentencepiece_alone(desk):
    (desk.target / "tokenizer.json").unlink()
    (desk.target / "tokenizer.model").write_bytes(b"\x0a\x05hello")
    return desk.run()


@pytest.mark.catalogue("vocabulary-padding")
@row(3, "copy", "tokens but the model has")
def added_tokens_beyond_the_rows(desk):
    path = desk.target / "tokenizer.json"
    state = json.loads(path.read_text())
    settings = dict(state["added_tokens"][0], special=False)
    state["added_tokens"] += [
        settings | {"id": 300 + number, "content": f"<added {number}>"} for number in range(20)
    ]
    path.write_text(json.dumps(state))
    return desk.run()


# ---- chat templates ----

CHAT = json.dumps(
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
)


@pytest.mark.catalogue("hostile-template")
@row(3, "chat template of", "copy", "unsafe")
def chat_template_that_reaches_for_classes(desk):
    (desk.target / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    return desk.run("--field", "messages", calibration=desk.write("chats.jsonl", f"{CHAT}\n" * 20))
