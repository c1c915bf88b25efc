"""The demo's texts and tokenizers, made from the running interpreter's own standard library.

Domain: the unit tests (``test/**/test_*.py``). General: every other library module. Files, not
documents, are split, so no held-out document comes from a file that anything was trained on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

_LOG = logging.getLogger(__name__)
#: Folders that are tests, data tables or not part of the library.
_SKIPPED = frozenset(
    {"test", "tests", "idle_test", "encodings", "pydoc_data"}
    | {"site-packages", "dist-packages", "_bundled"}
)
_LOW, _HIGH = 180, 340  # characters of a document: about 60 to 120 tokens
_PER_FILE = 15  # held-back documents of one file, about
#: For each family, the token that opens a document (id 0) and, last, the one that ends a text.
SPECIAL = {"llama": ("<s>", "</s>"), "qwen2": ("<|endoftext|>",)}
#: The pre-tokenizer of this family.
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
Texts = dict[str, list[str]]


def read_texts(calibration: int, heldout: int) -> Texts:
    """Reads, splits and deduplicates all texts; the same interpreter always gives the same result.

    Args:
        calibration: Documents wanted in ``calibration``.
        heldout: Documents wanted in ``heldout`` and in ``general_heldout``.

    Returns:
        ``general``, ``general_heldout``, ``domain``, ``calibration``, ``heldout``: the documents.
        The three held-back parts are small samples; they leave out every file that carries a
        copyright notice of its own.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    if not any((root / "test").glob("test_*.py")):
        raise SystemExit(
            "This interpreter has no test package (Lib/test), whose files are the demo's domain."
        )
    parts = ("general", "general_heldout", "domain", "calibration", "heldout")
    found: Texts = {part: [] for part in parts}
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root)
        is_domain = name.parts[0] == "test" and name.name.startswith("test_")
        # files that describe the machine rather than the library hold its paths
        is_local = name.name.startswith("_sysconfigdata") or name.parts[0].startswith("config-")
        if is_local or (not is_domain and _SKIPPED & set(name.parts)):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        draw = int(hashlib.sha256(name.as_posix().encode()).hexdigest(), 16) % 100
        if is_domain:
            part = "heldout" if draw < 8 else "calibration" if draw < 18 else "domain"
        else:
            part = "general_heldout" if draw < 5 else "general"
        if part not in ("general", "domain") and "copyright" in text.lower():
            continue
        pieces = list(documents(text))
        if part not in ("general", "domain"):
            # no large file dominates a small sample
            pieces = pieces[:: 1 + len(pieces) // _PER_FILE]
        for document in pieces:
            if document not in seen:
                seen.add(document)
                found[part].append(document)
    sizes = {"calibration": calibration, "heldout": heldout, "general_heldout": heldout}
    for seed, (part, size) in enumerate(sizes.items()):
        chosen = np.random.default_rng(seed).permutation(len(found[part]))[:size]
        found[part] = [found[part][i] for i in chosen]
    for part, texts in found.items():
        _LOG.info("%s: %d documents, %d characters", part, len(texts), sum(map(len, texts)))
    return found


def documents(text: str) -> Iterator[str]:
    """Cuts a source file at blank lines (long paragraphs: at line ends) into dedented pieces."""
    piece = ""
    for paragraph in text.expandtabs(8).split("\n\n"):
        lines = paragraph.strip("\n").splitlines(keepends=True)
        units = [paragraph.strip("\n") + "\n"] if len(paragraph) <= _HIGH else lines
        for i, unit in enumerate(units):
            joined = piece + ("\n" if piece and i == 0 else "") + unit
            if len(joined) > _HIGH:
                yield from _kept(piece)
                joined = unit
            piece = joined
    yield from _kept(piece)


def _kept(piece: str) -> Iterator[str]:
    """Drops pieces that are too short, not ASCII, or mostly data rather than words."""
    piece = textwrap.dedent(piece).strip("\n").rstrip()
    is_text = piece.isascii() and sum(map(str.isalpha, piece)) > 0.5 * len(piece)
    if is_text and _LOW <= len(piece) <= _HIGH:
        yield piece


def save_tokenizer(
    folder: Path, texts: Iterable[str], *, vocab_size: int, family: str
) -> tokenizers.Tokenizer:
    """Trains a byte-level BPE and saves it in Hugging Face form; ``llama``: texts open with BOS."""
    special = SPECIAL[family]
    made = tokenizers.Tokenizer(models.BPE())
    if family == "qwen2":
        # transformers rebuilds a qwen2 tokenizer from its merges, with these two parts
        made.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(tokenizers.Regex(_QWEN2), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    else:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(special),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    roles = {"eos_token": special[-1], "pad_token": special[-1]}
    if family == "llama":
        made.post_processor = processors.TemplateProcessing(
            single=f"{special[0]} $A",
            pair=f"{special[0]} $A {special[0]} $B",
            special_tokens=[(special[0], 0)],
        )
        roles = {"bos_token": special[0], **roles}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **roles, "model_max_length": 512}
    config["clean_up_tokenization_spaces"] = False
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    for name, data in {"tokenizer_config.json": config, "special_tokens_map.json": roles}.items():
        (folder / name).write_text(json.dumps(data, indent=2) + "\n")
    return made


def write_jsonl(path: Path, texts: Iterable[str]) -> None:
    """Writes one ``{"text": ...}`` line per document."""
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    path.write_text("".join(lines), encoding="utf-8")


def licence() -> str:
    """The licence text of the interpreter, which the documents fall under."""
    for folder in (Path(sysconfig.get_paths()["stdlib"]), Path(sys.base_prefix)):
        for name in ("LICENSE.txt", "LICENSE"):
            if (folder / name).is_file():
                return (folder / name).read_text(encoding="utf-8")
    raise SystemExit(
        "The interpreter's LICENSE.txt was not found; the demo's texts cannot ship without it."
    )


def notice(losses: dict[str, dict[str, float]]) -> str:
    """What the assets are, where they come from and how to make them again."""
    table = "".join(
        f"| {name} | {loss['heldout']:.3f} | {loss['general_heldout']:.3f} |\n"
        for name, loss in losses.items()
    )
    return f"""# NOTICE

The texts, tokenizers and weights in this folder are derived from the source files of the Python
{sys.version.split()[0]} standard library, copyright Python Software Foundation and its
contributors; its licence is `LICENSE-PSF.txt`. No other text was used.

- `calibration.jsonl`, `heldout.jsonl`: pieces of unit tests (`test/**/test_*.py`), the demo's
  domain. They come from files that nothing was trained on, and from different files; files with a
  copyright notice of their own are left out.
- `source-base`: a small Llama-type model trained on all other modules ("general text").
- `source`: `source-base` fine-tuned on the remaining unit tests.
- `sibling`: `source-base` with layers, channels, heads and neurons removed, then trained briefly
  on the general text.
- `stranger`: a Qwen2-type model with its own tokenizer, trained from scratch on the general text.

Both tokenizers were trained on the general text and the remaining unit tests together.

Nats per token on held-out text, each document alone after its opening token (`stranger` counts
its own tokens):

| model | unit tests | general |
|---|---|---|
{table}
Rebuild with `python scripts/train_demo_models.py`, which needs an interpreter that ships its test
package; another Python version gives other texts.
"""
