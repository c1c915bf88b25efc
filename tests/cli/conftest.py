"""What the tests of the command line share: two sizes of models, texts of one length, merges.

Compiling is nearly all of the time of a tiny merge, so there are only two sizes (`TARGET` and
`SOURCE`, different in everything) and all documents fall into one bucket of lengths: after the
first run of a preset the next ones take a second or two.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
from desk import Desk
from published import report_of
from tokenizers import Tokenizer
from typer.testing import CliRunner

from ot_merge_jax.cli.main import app

#: Other depth, width, heads, groups and MLP; the vocabularies differ by the families' tokenizers.
TARGET = {"hidden": 24, "heads": 4, "kv_heads": 2, "intermediate": 40, "layers": 2}
SOURCE = {"hidden": 36, "heads": 6, "kv_heads": 3, "intermediate": 56, "layers": 3}


class Counts(NamedTuple):
    """Documents of the shared texts."""

    rows: int = 32
    dev: int = 8
    held_out: int = 8


COUNTS = Counts()


class Called(NamedTuple):
    """What one call of the command line did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be JSON alone."""
        return json.loads(self.out)


def call(*arguments, columns=80) -> Called:
    """Calls ``ot-merge`` in this process; fails on anything but an exit code."""
    words = [str(one) for one in arguments]
    with (
        mock.patch.object(sys, "argv", ["ot-merge", *words]),
        mock.patch.dict(os.environ, COLUMNS=str(columns)),
    ):
        result = CliRunner().invoke(app, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"ot-merge {words} ended in a traceback") from result.exception
    return Called(result.exit_code, result.stdout, result.stderr)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder; kinds of everything else."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="session")
def cli():
    """``cli(*arguments, columns=80)`` -> `Called`."""
    return call


@pytest.fixture(scope="session")
def hashes():
    """``hashes(folder)`` -> SHA-256 of every file below it, by relative name."""
    return digests


@pytest.fixture(scope="session")
def counts():
    """Documents that give rows, of the dev split, of the held-out text."""
    return COUNTS


@pytest.fixture(scope="session")
def documents(texts, tokenizer_folder):
    """Documents of 17 to 31 tokens for both kinds of tokenizer: all batches have one length."""
    readers = [
        Tokenizer.from_file(str(tokenizer_folder(kind) / "tokenizer.json"))
        for kind in ("bpe", "qwen")
    ]
    found, words = [], []
    for word in " ".join(texts).split():
        words.append(word)
        lengths = [len(one.encode(" ".join(words)).ids) for one in readers]
        if max(lengths) > 28:
            words = []
        elif min(lengths) > 17:
            found.append(" ".join(words))
            words = []
    found = list(dict.fromkeys(found))
    assert len(found) >= sum(COUNTS)
    return found


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Folder of the inputs that all tests share; read-only."""
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture(scope="session")
def text_files(place, documents):
    """(calibration, held-out): two files without a common document."""
    calibration, heldout = place / "calibration.txt", place / "heldout.txt"
    rows = COUNTS.rows + COUNTS.dev
    calibration.write_text("\n".join(documents[:rows]) + "\n", encoding="utf-8")
    heldout.write_text("\n".join(documents[rows : rows + COUNTS.held_out]) + "\n", encoding="utf-8")
    return calibration, heldout


@pytest.fixture(scope="session")
def models(place, tiny_checkpoint):
    """Name -> folder. The targets are a single float32 file untied, and bfloat16 shards tied."""
    made = {
        "llama-target": tiny_checkpoint("llama", seed=1, **TARGET),
        "qwen2-target": tiny_checkpoint(
            "qwen2", seed=2, tied=True, dtype="bfloat16", max_shard_bytes=20_000, **TARGET
        ),
        "llama-base": tiny_checkpoint("llama", seed=3, **SOURCE),
        "llama-source": tiny_checkpoint("llama", seed=3, drift=0.1, **SOURCE),
        "qwen2-source": tiny_checkpoint("qwen2", seed=4, **SOURCE),
        "qwen2-tuned": tiny_checkpoint("qwen2", seed=4, drift=0.1, **SOURCE),
    }
    for name, folder in made.items():
        shutil.copytree(folder, place / name)
    return {name: place / name for name in made}


@pytest.fixture(scope="session")
def calls(models, text_files):
    """Name of a merge -> its arguments without ``--out``."""
    calibration, heldout = text_files
    texts = ("--calibration", calibration, "--eval-text", heldout)
    # they are tests/test_trials.py's matter, and every merge here would run them
    texts += ("--controls", "none", "--continuations", "0")

    def one(preset, target, source, *more):
        return (
            "run",
            "--preset",
            preset,
            "--target",
            models[target],
            "--source",
            models[source],
            *texts,
            *more,
        )

    base = ("--source-base", models["llama-base"])
    return {
        "paper llama<-qwen2": one("paper", "llama-target", "qwen2-source"),
        "paper qwen2<-llama": one("paper", "qwen2-target", "llama-source"),
        "barycentric llama<-qwen2": one("barycentric", "llama-target", "qwen2-source"),
        "barycentric qwen2<-llama": one("barycentric", "qwen2-target", "llama-source"),
        "delta llama<-llama": one("delta", "llama-target", "llama-source", *base),
        "delta qwen2<-llama": one("delta", "qwen2-target", "llama-source", *base),
        "delta llama<-qwen2": one(
            "delta", "llama-target", "qwen2-tuned", "--source-base", models["qwen2-source"]
        ),
    }


class Merged(NamedTuple):
    """A finished merge."""

    out: Path
    target: Path
    source: Path
    called: Called
    report: dict[str, Any]
    arguments: tuple


@pytest.fixture(scope="session")
def merged(tmp_path_factory, calls, place, models, text_files):
    """``merged(name)`` -> `Merged`, run once; the folder is shared, so do not write into it."""
    made = {}

    def make(name):
        if name not in made:
            out = tmp_path_factory.mktemp("merged") / "out"
            before = digests(place)
            called = call(*calls[name], "--out", out)
            assert called.code == 0, called.err
            assert digests(place) == before, "a run changed its inputs"
            arguments = calls[name]
            report = report_of(out)
            target, source = (
                Path(arguments[arguments.index(flag) + 1]) for flag in ("--target", "--source")
            )
            made[name] = Merged(out, target, source, called, report, arguments)
        return made[name]

    return make


@pytest.fixture
def desk(tmp_path, models, text_files):
    """A private folder of good inputs that the test may break."""
    return Desk(tmp_path, models, text_files)


@pytest.fixture(scope="session", autouse=True)
def _heeds_interrupts():
    """A test run that was started in the background ignores SIGINT, and so would its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
