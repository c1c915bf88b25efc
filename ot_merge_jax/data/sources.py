"""Files and hub datasets as records, one after the other. Imports errors and io.

Files are read line by line, parquet by batches of a row group, so a file of any size fits into
memory. Only parquet needs a package that is not always there: pyarrow, the extra ``data``.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ot_merge_jax.errors import InputError
from ot_merge_jax.io import hub
from ot_merge_jax.io.resolve import link_problems

_JSON_LINES = (".jsonl", ".ndjson", ".json")
_READABLE = (".parquet", *_JSON_LINES, ".txt")
_PARQUET_COPY = "try the hub's parquet copy, @refs/convert/parquet"
_SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval")
_RECORDS_PER_BATCH = 256
#: A longer line is not a document, but a file without line ends.
_MAX_LINE = 10_000_000
_MAX_CARD_BYTES = 5_000_000


class Source(NamedTuple):
    """Where records come from.

    Attributes:
        files: The files, in order.
        origin: The hub dataset they belong to; None for a file of the user.
        split: Which split of the dataset the files are, as ``[CONFIG/]SPLIT``; empty for a file.
    """

    files: tuple[Path, ...]
    origin: hub.Origin | None = None
    split: str = ""


def locate(path: str | Path, *, offline: bool = False) -> Source:
    """The files behind a path or ``hub:OWNER/NAME[@REVISION][:[CONFIG/]SPLIT]``.

    What a split is comes from the dataset's card; without one, from the names of its files, as the
    hub does it. Only the files of the split are downloaded.

    Args:
        path: A file, or a dataset of the hub. A path is never taken for a hub id.
        offline: Whether the network is forbidden; the hub's local cache is used all the same.

    Returns:
        At least one file.

    Raises:
        InputError: if there is no such file, dataset, configuration or split.
    """
    wanted = hub.dataset_id(str(path))
    if wanted is not None:
        return _dataset(wanted, offline=offline)
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(
            f"There is no text file {file}; give a .txt, .jsonl or .parquet file, or a dataset of "
            "the hub as hub:OWNER/NAME."
        )
    return Source((file,))


def questions(path: str | Path) -> Path:
    """The file of multiple-choice questions at a path.

    Raises:
        InputError: if there is none, or it is not one of JSON lines.
    """
    file = Path(path).expanduser()
    if file.suffix.lower() not in _JSON_LINES or not file.is_file():
        what = "is not a .jsonl file" if file.is_file() else "does not exist"
        raise InputError(f"{file} {what}; give questions as .jsonl, one object a line.")
    return file


def _dataset(wanted: hub.DatasetId, *, offline: bool) -> Source:
    """The files of one split of a hub dataset."""

    def fetch(*patterns: str) -> tuple[Path, hub.Origin]:
        return hub.snapshot(
            wanted.repo, revision, kind="dataset", patterns=patterns, offline=offline
        )

    revision = wanted.revision
    folder, origin = fetch("README.md")
    revision = origin.commit  # the branch may move between two requests
    patterns = _card_patterns(folder / "README.md", wanted)
    prefix = f"{wanted.config}/" if wanted.config else ""
    if patterns is not None:
        folder, _ = fetch("README.md", *patterns)
        matching = {file for pattern in patterns for file in _files(folder, pattern)}
    else:
        folder, _ = fetch("README.md", *(f"{prefix}*{wanted.split}*{end}" for end in _READABLE))
        matching = set(_named(folder, prefix, (wanted.split,)))
        if not matching and wanted.split == "train":
            # files without the name of any split are train
            folder, _ = fetch("README.md", *(f"{prefix}*{end}" for end in _READABLE))
            matching = {*_files(folder, f"{prefix}**/*")} - {*_named(folder, prefix, _SPLITS)}
    files = tuple(sorted(matching))
    names = [file.relative_to(folder).as_posix() for file in files]
    name = f"the dataset {wanted.repo} at revision {wanted.revision}"
    if not files:
        raise InputError(
            f"No {', '.join(_READABLE)} file of {name} belongs to the split {wanted.split}; name "
            f"it as hub:OWNER/NAME@REVISION:[CONFIG/]SPLIT, or {_PARQUET_COPY}."
        )
    if patterns is None and not prefix and len(tops := {path.split("/")[0] for path in names}) > 1:
        folders = sorted(top for top in tops if top not in names)
        if folders:
            raise InputError(
                f"{name} has the split {wanted.split} in {', '.join(folders)[:500]}; name one, as "
                f"in hub:{wanted.repo}@{wanted.revision}:{folders[0]}/{wanted.split}."
            )
    if leaving := [why for path in names for why in link_problems(folder, path)]:
        raise InputError(f"{name} cannot be used: {leaving[0]}; download it again.")
    origin = origin._replace(revision=wanted.revision)
    return Source(files, origin, prefix + wanted.split)


def _files(folder: Path, pattern: str) -> list[Path]:
    """The data files of a snapshot that match; nothing for a pattern that leaves it."""
    if pattern.startswith("/") or ".." in Path(pattern).parts:
        return []
    readable = (file for file in folder.glob(pattern) if file.suffix.lower() in _READABLE)
    return [file for file in readable if file.is_file()]


def _named(folder: Path, prefix: str, splits: Sequence[str]) -> list[Path]:
    """The data files below a prefix whose path names one of these splits."""
    word = re.compile(rf"(^|[/._-])({'|'.join(map(re.escape, splits))})([/._-]|$)")
    return [
        file
        for file in _files(folder, f"{prefix}**/*")
        if word.search(file.relative_to(folder).as_posix().removeprefix(prefix))
    ]


def _card_patterns(card: Path, wanted: hub.DatasetId) -> list[str] | None:
    """The file patterns of a split by the dataset's card; None if the card says nothing.

    The ``configs`` of the YAML in front of the card: a list of ``config_name``, ``data_files`` (a
    pattern, patterns, or a list of ``split`` and ``path``), ``data_dir`` and ``default``.
    """
    where = f"The card of the dataset {wanted.repo}"
    text = ""
    if card.is_file():
        with card.open(encoding="utf-8", errors="replace") as file:
            text = file.read(_MAX_CARD_BYTES)
    front = re.match(r"\s*---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    try:
        settings = yaml.safe_load(front[1]) if front else {}
        configs = {_word(config["config_name"]): config for config in settings.get("configs") or ()}
        splits = {name: _splits(config) for name, config in configs.items()}
        default = [name for name, config in configs.items() if config.get("default")]
    except (yaml.YAMLError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{where} cannot be understood; {_PARQUET_COPY}.") from error
    if not configs:
        return None
    if len(configs) == 1 or "default" in configs:
        default.append("default" if "default" in configs else next(iter(configs)))
    name = wanted.config or next(iter(default), None)
    if name not in splits:
        raise InputError(
            f"{where} has the configurations {', '.join(splits)[:500]}; name one, as in "
            f"hub:{wanted.repo}@{wanted.revision}:{next(iter(splits))}/{wanted.split}."
        )
    if wanted.split not in splits[name]:
        raise InputError(
            f"{where} has the splits {', '.join(splits[name])[:500]}; name one, as in "
            f"hub:{wanted.repo}@{wanted.revision}:{name}/{next(iter(splits[name]))}."
        )
    return splits[name][wanted.split]


def _splits(config: dict[str, Any]) -> dict[str, list[str]]:
    """Split -> file patterns of one configuration of a card."""
    base = f"{_word(config['data_dir'])}/" if config.get("data_dir") else ""
    files = config.get("data_files") or "**/*"
    splits: dict[str, list[str]] = {}
    for entry in [files] if isinstance(files, str) else files:
        split, paths = (
            ("train", entry) if isinstance(entry, str) else (entry["split"], entry["path"])
        )
        paths = [paths] if isinstance(paths, str) else paths
        splits.setdefault(_word(split), []).extend(f"{base}{_word(path)}" for path in paths)
    return splits


def _word(value: Any) -> str:
    """A scalar of a card as text; TypeError if nested, for aliases could expand to terabytes."""
    if not isinstance(value, str | int | float):
        raise TypeError("not a name")
    return str(value)


def read(path: Path, *, fields: Sequence[str], encoding: str) -> Iterator[tuple[str, Any]]:
    """Yields the records of a file, one after the other; blank lines are skipped.

    Args:
        path: ``.jsonl`` (or ``.json``: one object a line all the same), ``.parquet``, or a text
            file.
        fields: The fields that are read; other columns of a parquet file stay unread.
        encoding: Of a file of lines; a byte order mark is dropped. Parquet is always UTF-8.

    Yields:
        Where the record stands (``FILE, line N``), and the record: a string of a text file, else a
        mapping that has the fields.

    Raises:
        InputError: naming the byte, line or record that cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet(path, fields)
        return
    for where, line in _lines(path, encoding):
        if suffix not in _JSON_LINES:
            yield where, line.strip()
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}, is not JSON ({error}); fix the line.") from error
        _check_fields(record if isinstance(record, dict) else (), fields, f"{where},")
        yield where, record


def _check_fields(there: Iterable[str], fields: Sequence[str], where: str) -> None:
    """Refuses a record or file that lacks a field."""
    there = list(there)
    if missing := [name for name in fields if name not in there]:
        has = f" (it has {', '.join(there)[:200]})" if there else ""
        raise InputError(
            f"{where} has no field {missing[0]!r}; name the field that holds the text{has}."
        )


def _lines(path: Path, encoding: str) -> Iterator[tuple[str, str]]:
    """The lines of a file that are not blank."""
    try:
        name = codecs.lookup(encoding).name
    except LookupError as error:
        raise InputError(
            f"There is no encoding {encoding!r}; give one that Python knows."
        ) from error
    try:
        with path.open(encoding="utf-8-sig" if name == "utf-8" else encoding) as file:
            for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE + 1), ""), 1):
                if len(line) > _MAX_LINE:
                    raise InputError(
                        f"{path}, line {number}, is longer than {_MAX_LINE} characters; break it "
                        "into documents, one a line."
                    )
                if "\0" in line:
                    raise InputError(f"{path}, line {number}, holds a NUL byte; this is not text.")
                if line.strip():
                    yield f"{path}, line {number}", line
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not {encoding} {_first_bad_byte(path, encoding)}; pass --encoding."
        ) from error


def _first_bad_byte(path: Path, encoding: str) -> str:
    """Where a file stops being text in this encoding."""
    decoder = codecs.getincrementaldecoder(encoding)()
    before, lines = 0, 1  # of the block that is being decoded
    with path.open("rb") as file:
        while True:
            block = file.read(1 << 20)
            pending = decoder.getstate()[0]  # the start of a character whose end is in this block
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                start = before - len(pending) + error.start
                return f"at byte {start} (line {lines + error.object[: error.start].count(10)})"
            if not block:
                return "text"
            before, lines = before + len(block), lines + block.count(10)


def _parquet(path: Path, fields: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """The rows of a parquet file, a batch of one row group in memory at a time."""
    try:
        import pyarrow  # noqa: PLC0415, an extra; texts of other kinds must run without it
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        raise InputError(
            f'{path} is parquet, which needs pyarrow; run pip install "ot_merge_jax[data]".'
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            _check_fields(file.schema_arrow.names, fields, str(path))
            for batch in file.iter_batches(_RECORDS_PER_BATCH, columns=list(fields)):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, record {number}", record
    except pyarrow.ArrowNotImplementedError as error:
        raise InputError(f"{path} holds {_first(error)}, which is not read; convert it.") from error
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # missing rights
        raise InputError(
            f"{path} cannot be read as parquet after record {number} ({_first(error)}); download "
            "it again."
        ) from error


def _first(error: Exception) -> str:
    """The first line of a message, without its full stop."""
    return str(error).strip().split("\n")[0].rstrip(".")[:200]
