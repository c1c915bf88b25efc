"""Reading, sampling and splitting of documents, and what damaged text says."""

import json
import random

import numpy as np
import pytest

from ot_merge_jax.data.documents import read_documents, sample, split
from ot_merge_jax.errors import InputError


def write(tmp_path, content, name="texts.txt"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path, **kw):
    return list(read_documents(path, **kw))


# ------------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    "content",
    ["one\ntwo three\n山 river\n", "one\r\ntwo three\r\n山 river\r\n", "one\ntwo three\n山 river"],
    ids=["unix", "windows", "no last newline"],
)
def test_a_text_file_has_one_document_a_line(tmp_path, content):
    assert read(write(tmp_path, content)) == ["one", "two three", "山 river"]


@pytest.mark.catalogue("empty-calibration")
def test_blank_lines_are_skipped(tmp_path):
    assert read(write(tmp_path, "\n  \none\n\t\n\n two \n\u3000\n")) == ["one", "two"]


@pytest.mark.catalogue("not-utf8")
def test_a_byte_order_mark_is_dropped(tmp_path):
    assert read(write(tmp_path, b"\xef\xbb\xbfone\ntwo\n")) == ["one", "two"]
    marked = b'\xef\xbb\xbf{"text": "one"}\n'
    assert read(write(tmp_path, marked, "texts.jsonl")) == ["one"]


def test_unicode_line_separators_do_not_cut(tmp_path):
    """Only newlines end a document: U+2028 and U+0085 are inside of them."""
    assert read(write(tmp_path, "one\u2028still one\u0085and\nnext\n")) == [
        "one\u2028still one\u0085and",
        "next",
    ]


def test_json_lines(tmp_path):
    lines = [{"text": "one"}, {"text": " two\nlines ", "other": 1}, {"text": "山"}]
    content = "\n".join(json.dumps(line) for line in lines) + "\n\n"
    assert read(write(tmp_path, content, "texts.jsonl")) == ["one", " two\nlines ", "山"]


def test_empty_json_texts_are_skipped(tmp_path):
    assert read(write(tmp_path, '{"text": ""}\n{"text": "  "}\n{"text": "a"}', "t.jsonl")) == ["a"]


def test_the_field_can_be_named(tmp_path):
    path = write(tmp_path, '{"body": "one", "text": "no"}\n', "texts.jsonl")
    assert read(path, field="body") == ["one"]


def test_a_text_file_that_looks_like_json_is_text(tmp_path):
    assert read(write(tmp_path, '{"text": "one"}\n')) == ['{"text": "one"}']


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "cp1252"])
def test_other_encodings(tmp_path, encoding):
    path = write(tmp_path, "naïve\ncafé\n".encode(encoding))
    assert read(path, encoding=encoding) == ["naïve", "café"]


@pytest.mark.catalogue("not-utf8")
@pytest.mark.parametrize("name", ["texts.txt", "texts.jsonl"])
def test_wrong_encoding_names_byte_line_and_flag(tmp_path, name):
    """The first bad byte of the file, not of a read buffer."""
    good = '{"text": "good"}\n' if name.endswith("l") else "good\n"
    content = (good * 3000).encode() + '{"text": "caf\xe9"}\n'.encode("latin-1")
    offset = content.index(b"\xe9")
    path = write(tmp_path, content, name)
    with pytest.raises(InputError, match=rf"byte {offset} \(line 3001\).*--encoding") as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "utf-8" in str(caught.value)


@pytest.mark.catalogue("not-utf8")
def test_an_unknown_encoding_raises(tmp_path):
    with pytest.raises(InputError, match="'klingon'"):
        read(write(tmp_path, "one\n"), encoding="klingon")


@pytest.mark.catalogue("not-utf8")
@pytest.mark.parametrize("name", ["texts.txt", "texts.jsonl"])
def test_a_nul_byte_names_its_line(tmp_path, name):
    good = '{"text": "good"}\n' if name.endswith("l") else "good\n"
    with pytest.raises(InputError, match=r"line 3.*NUL"):
        read(write(tmp_path, good * 2 + "bad\0bytes\n", name))


@pytest.mark.catalogue("broken-jsonl")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "one"', "not JSON"),
        ("plain", "not JSON"),
        ('["one"]', "no field 'text'"),
        ('"text"', "no field 'text'"),
        ("3", "no field 'text'"),
        ('{"body": "one"}', "no field 'text'"),
        ('{"text": 3}', "not a string"),
        ('{"text": null}', "not a string"),
        ('{"text": ["one"]}', "not a string"),
        ("[" * 100_000, "not JSON"),
        ('{"text": ' + "9" * 5000 + "}", "line 2"),
    ],
    ids=["cut", "text", "list", "string", "number", "other field", "int", "null", "nested",
         "deep", "long number"],
)  # fmt: skip
def test_a_bad_json_line_is_named(tmp_path, line, message):
    path = write(tmp_path, '{"text": "good"}\n' + line + "\n", "texts.jsonl")
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert "line 2" in str(caught.value)


@pytest.mark.parametrize("what", ["missing", "folder"])
def test_a_missing_file_raises(tmp_path, what):
    path = tmp_path if what == "folder" else tmp_path / "nowhere.txt"
    with pytest.raises(InputError, match="no text file"):
        read(path)


def test_an_empty_file_has_no_documents(tmp_path):
    assert read(write(tmp_path, "")) == []


@pytest.mark.catalogue("huge-text")
def test_reading_is_lazy(tmp_path):
    """A large file is not read before its documents are asked for."""
    path = write(tmp_path, "one\n" + "x" * 100 + "\0\n")
    assert next(read_documents(path)) == "one"


# ------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("count", [0, 1, 7, 50, 51])
def test_a_sample_keeps_the_order_and_never_doubles(count):
    documents = [str(i) for i in range(50)]
    kept = sample(iter(documents), count=count, seed=3)
    assert len(kept) == min(count, 50)
    assert [int(d) for d in kept] == sorted({int(d) for d in kept})


def test_a_sample_follows_its_seed_alone():
    documents = [str(i) for i in range(50)]
    random.seed(99)
    first = sample(iter(documents), count=10, seed=1)
    random.seed(98)
    assert sample(iter(documents), count=10, seed=1) == first
    assert sample(iter(documents), count=10, seed=2) != first


def test_every_document_is_as_likely():
    """400 draws of 5 from 20: each is expected 100 times, standard deviation 8.7."""
    counts = np.zeros(20)
    for seed in range(400):
        for document in sample(map(str, range(20)), count=5, seed=seed):
            counts[int(document)] += 1
    assert counts.sum() == 2000
    assert np.abs(counts - 100).max() < 45


# ------------------------------------------------------------------------ splitting


@pytest.mark.parametrize("count", [1, 2, 3, 5, 10, 101])
def test_a_split_is_disjoint_and_complete(count):
    documents = [f"document {i}" for i in range(count)]
    rows, dev = split(documents, seed=0)
    assert sorted([*rows, *dev]) == sorted(documents)
    assert not set(rows) & set(dev)
    assert len(dev) == round(0.2 * count)
    assert rows


def test_a_split_keeps_the_order_and_follows_its_seed():
    documents = [str(i) for i in range(100)]
    for part in split(documents, seed=0):
        assert [int(d) for d in part] == sorted(int(d) for d in part)
    assert split(documents, seed=0) == split(documents, seed=0)
    assert split(documents, seed=0) != split(documents, seed=1)
