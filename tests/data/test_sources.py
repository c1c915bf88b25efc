"""Parquet files, and which files of a hub dataset are a split; from a cache, never a network."""

import builtins
import json

import huggingface_hub
import pyarrow as pa
import pytest
from bombs import ALIASES
from hub_cache import COMMIT, fill, jsonl
from pyarrow import parquet

from ot_merge_jax.data import sources
from ot_merge_jax.data.chat import Chat, Turn
from ot_merge_jax.data.documents import read_documents
from ot_merge_jax.errors import InputError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    return folder


def table(path, columns, **options):
    parquet.write_table(pa.table(columns), path, **options)
    return path


# ---- parquet ----


def test_parquet_of_several_row_groups(tmp_path):
    words = [f"text {i}" for i in range(1000)]
    path = table(tmp_path / "t.parquet", {"text": words, "id": range(1000)}, row_group_size=77)
    assert parquet.ParquetFile(path).num_row_groups == 13
    assert list(read_documents(path)) == words


def test_parquet_is_read_lazily(tmp_path):
    """A later row group that is damaged is not seen before it is reached."""
    path = table(
        tmp_path / "t.parquet", {"text": [f"{i} " + "x" * 900 for i in range(4000)]},
        row_group_size=1000, compression="none", use_dictionary=False, write_page_checksum=True,
    )  # fmt: skip
    group = parquet.ParquetFile(path).metadata.row_group(3).column(0)
    content = bytearray(path.read_bytes())
    content[group.data_page_offset + group.total_compressed_size // 2] ^= 1
    path.write_bytes(content)
    documents = read_documents(path)
    assert next(documents).startswith("0 x")
    with pytest.raises(InputError, match=r"parquet after record [23]\d\d\d.*download") as caught:
        list(documents)
    assert str(path) in str(caught.value)


def test_parquet_holds_chats(tmp_path):
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = table(tmp_path / "t.parquet", {"m": [said, []], "q": ["x", ""], "r": ["y", ""]})
    [chat] = read_documents(path, field="m")
    assert chat == Chat((Turn("user", "a"), Turn("assistant", "b")))
    assert list(read_documents(path, field=["q", "r"])) == [
        Chat((Turn("user", "x"), Turn("assistant", "y")))
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2], "record 1: field 'text' is not a string"),
        (["a", None], "record 2: field 'text' is not a string"),
        ([b"a", b"b"], "record 1: field 'text' is not a string"),
        (["a", "b\0"], "record 2: field 'text' holds a NUL"),
    ],
)
def test_parquet_of_other_types_names_the_record(tmp_path, values, message):
    path = table(tmp_path / "t.parquet", {"text": values})
    with pytest.raises(InputError, match=message) as caught:
        list(read_documents(path))
    assert str(path) in str(caught.value)


def test_other_types_of_strings(tmp_path):
    large = pa.array(["a", "b"], pa.large_string())
    coded = pa.array(["a", "b"]).dictionary_encode()
    for column in (large, coded, pa.array(["a", "b"], pa.string_view())):
        assert list(read_documents(table(tmp_path / "t.parquet", {"text": column}))) == ["a", "b"]


def test_a_missing_column_names_those_there_are(tmp_path):
    path = table(tmp_path / "t.parquet", {"body": ["a"], "id": [1]})
    with pytest.raises(InputError, match=r"no field 'text'.*it has body, id"):
        list(read_documents(path))


@pytest.mark.catalogue("broken-dataset")
@pytest.mark.parametrize("content", [b"", b"garbage", b"PAR1" + b"\xff" * 300 + b"PAR1"])
def test_garbage_is_no_parquet(tmp_path, content):
    path = tmp_path / "t.parquet"
    path.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as parquet") as caught:
        list(read_documents(path))
    assert str(path) in str(caught.value)


def test_without_pyarrow_parquet_says_what_to_install(tmp_path, monkeypatch):
    path = table(tmp_path / "t.parquet", {"text": ["a"]})
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r'pip install "ot_merge_jax\[data\]"'):
        list(read_documents(path))


# ---- hub datasets ----

CARD = """---
configs:
- config_name: ms
  default: true
  data_files:
  - split: train
    path: ms/part-*
  - split: test
    path: [ms/held.jsonl]
- config_name: en
  data_files: en/*.jsonl
- config_name: dir
  data_dir: en
- config_name: out
  data_files: [../../../secret.jsonl, /etc/passwd.jsonl, https://example.com/a.jsonl]
---
# A dataset
"""
CARDED = {
    "README.md": CARD.encode(),
    "ms/part-1.jsonl": jsonl("a", "b"),
    "ms/part-2.jsonl": jsonl("c"),
    "ms/held.jsonl": jsonl("d"),
    "en/x.jsonl": jsonl("e"),
}
BOMB = f"---\n{ALIASES}configs: [{{config_name: *i}}]\n---\n".encode()
NAMED = {
    "README.md": b"# no configs\n",
    "data/train-00000-of-00002.jsonl": jsonl("a"),
    "data/train-00001-of-00002.jsonl": jsonl("b"),
    "data/test-00000-of-00001.jsonl": jsonl("c"),
    "script-train.py": b"raise SystemExit",
}


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        (CARDED, "", "abc"),
        (CARDED, ":train", "abc"),
        (CARDED, ":test", "d"),
        (CARDED, ":ms/test", "d"),
        (CARDED, ":en/train", "e"),
        (CARDED, ":dir/train", "e"),
        (NAMED, "", "ab"),
        (NAMED, ":test", "c"),
        (NAMED, ":data/test", "c"),
        ({"texts.jsonl": jsonl("a")}, "", "a"),
        ({"train.json": jsonl("a"), "dev.json": jsonl("b")}, "", "a"),
        ({"en/train/0.jsonl": jsonl("a"), "ms/train/0.jsonl": jsonl("b")}, ":ms/train", "b"),
        ({"train.txt": b"a\nb\n"}, "", "ab"),
    ],
)
def test_a_split_is_what_the_card_or_the_names_say(cache, files, split, expected):
    fill(cache, "own-er/na.me", files, kind="dataset")
    assert "".join(read_documents(f"hub:own-er/na.me{split}")) == expected


def test_the_commit_is_known(cache):
    fill(cache, "o/n", CARDED, kind="dataset", revision="refs/convert/parquet")
    for revision in ("refs/convert/parquet", COMMIT):
        found = sources.locate(f"hub:o/n@{revision}:ms/test", offline=True)
        assert found.origin == ("o/n", revision, COMMIT)
        assert found.split == "ms/test" or found.split == "test"
        assert [file.name for file in found.files] == ["held.jsonl"]


@pytest.mark.catalogue("broken-dataset", "hostile-yaml")
@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        (CARDED, "hub:o/n:validation", "train, test; name one, as in hub:o/n@main:ms/train"),
        (CARDED, "hub:o/n:fr/train", r"configurations ms, en, dir, out; name one"),
        (CARDED, "hub:o/n:out/train", "belongs to the split train"),
        (NAMED, "hub:o/n:validation", "belongs to the split validation"),
        ({"a.csv": b"text\na\n"}, "hub:o/n", "@refs/convert/parquet"),
        ({"train.jsonl": b"{}\n"}, "hub:o/n", "line 1, has no field 'text'"),
        ({"train.jsonl": b'{"text": "a"}\n{"text": 3}\n'}, "hub:o/n", "line 2.*not a string"),
        ({"en/train.jsonl": b"", "ms/train.jsonl": b""}, "hub:o/n", "in en, ms; name one"),
        ({"README.md": b"---\nconfigs: 3\n---\n"}, "hub:o/n", "card .* cannot be understood"),
        ({"README.md": b"---\nconfigs: [{data_files: a}]\n---\n"}, "hub:o/n", "cannot be underst"),
        ({"README.md": b"---\na: [\n---\n"}, "hub:o/n", "card .* cannot be understood"),
        ({"README.md": BOMB}, "hub:o/n", "card .* cannot be understood"),
        (CARDED, "hub:o/n@v2", r"local hub cache does not hold the dataset o/n at revision v2"),
        (CARDED, "hub:o/other", "local hub cache does not hold"),
        (CARDED, "hub:n", r"write hub:OWNER/NAME\[@REVISION\]"),
        (CARDED, "hub:o/n@../../x", "write hub:OWNER/NAME"),
        (CARDED, "hub:o/n@/etc/passwd", "write hub:OWNER/NAME"),
        (CARDED, "o/n", "no text file o/n; .*hub:OWNER/NAME"),
    ],
)  # fmt: skip
def test_what_is_no_dataset_is_told(cache, files, name, message):
    fill(cache, "o/n", files, kind="dataset")
    with pytest.raises(InputError, match=message) as caught:
        list(read_documents(name))
    assert "\n" not in str(caught.value)


def test_a_link_out_of_the_snapshot_is_refused(cache, tmp_path):
    snapshot = fill(cache, "o/n", {"README.md": b""}, kind="dataset")
    (tmp_path / "secret.jsonl").write_text(json.dumps({"text": "secret"}))
    (snapshot / "train.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(InputError, match="leaves the folder"):
        list(read_documents("hub:o/n"))


def test_a_file_named_like_a_hub_id_needs_a_path(cache, tmp_path, monkeypatch):
    """The spelling alone decides: ``hub:`` is the hub, and everything else is a path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hub:o").mkdir()
    (tmp_path / "hub:o" / "n").write_text("a\n")
    assert list(read_documents("./hub:o/n")) == ["a"]
    with pytest.raises(InputError, match="hub cache"):
        list(read_documents("hub:o/n"))
