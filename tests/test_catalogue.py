"""The catalogue of bad inputs and faults: every row is a mark on the tests that cover it.

``@pytest.mark.catalogue("disk-full")`` stands on a test, on a function that makes a bad input for
the table of a test, or on a part of the output contract; ``pytest -m catalogue`` runs them all but
those of the contract. SECURITY.md says what the tool promises.
"""

import ast
from pathlib import Path

TESTS = Path(__file__).parent

#: Row -> what it is.
CATALOGUE = {
    "corrupt-safetensors": "truncated, corrupt or empty safetensors",
    "lfs-pointer": "LFS pointer or HTML saved as safetensors",
    "duplicate-header-key": "duplicate key in header",
    "missing-shard": "missing shard; tensor absent from its shard; tensor in two files",
    "pickle-only": "only pytorch_model.bin",
    "nan-weights": "NaN or infinite weights",
    "nan-activations": "NaN activations from finite weights",
    "shape-against-config": "shape differs from config",
    "broken-config": "config.json missing, not JSON, wrong types",
    "unsupported-architecture": "unsupported architecture; encoder-decoder, vision, MoE, Mamba",
    "quantised": "quantised: fp8, bnb, gptq, awq, GGUF",
    "tied-embeddings": "tied embeddings in both directions, head missing",
    "vocabulary-padding": "vocabulary padding, more tokens than rows, added tokens",
    "no-pad-token": "tokenizer without pad token",
    "broken-tokenizer": "tokenizer missing, SentencePiece alone, slow",
    "template-differences": "BOS, EOS or template differences",
    "source-is-target": "source is the target",
    "empty-calibration": "calibration empty",
    "too-few-tokens": "one line or too few tokens",
    "huge-text": "huge file or one endless line",
    "not-utf8": "not UTF-8: latin-1, UTF-16, BOM, NUL",
    "broken-jsonl": "broken jsonl line, missing field, mixed types",
    "broken-dataset": "garbage parquet; hub dataset gated or offline",
    "disk-full": "disk full at byte N",
    "out-of-memory": "out of RAM: the preflight refuses above --memory-limit",
    "kill-and-resume": "kill -9, then resume; kill between export and rename",
    "signals": "SIGINT, SIGTERM",
    "bit-flip": "bit flip in the state of a run",
    "bad-output": "read-only parent of the output; output that is a file, in or equal to an input",
    "existing-output": "existing output; two runs with the same output",
    "escaping-weight-map": "weight_map that leaves the folder",
    "links-and-devices": "symlink loop, FIFO or device",
    "odd-output-names": "output name with newline, unicode, spaces, very long",
    "remote-code": "model that needs remote code",
    "hostile-template": "hostile chat template",
    "hostile-yaml": "YAML bomb, python tag, deep nesting",
    "odd-yaml": "duplicate or unknown YAML keys, `1e-3`, `no`",
    "hostile-json": "JSON bomb in config or index, 100 MB header",
    "hostile-names": "model name as shell, Markdown or HTML in the card",
    "secrets": "secrets in config or environment",
    "bad-numbers": "epsilon 0, negative, NaN; max_iterations 0",
    "constant-activations": "constant activations",
    "extreme-shapes": "hidden 1, heads 1, 1 layer, layers 2 against 48",
    "locks": "clock skew, locks, file systems that ignore case",
}
#: Rows whose part of the tool is still to come.
LATER = (
    "model name as HTML in the report",
    "different process counts at resume, mesh change",
    "one host of a pod dies",
)


def marked():
    """Rows that a mark in the tests names."""
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.catalogue":
                yield from (ast.literal_eval(row) for row in node.args)


def test_every_row_is_tested_and_every_mark_names_a_row():
    assert set(marked()) == CATALOGUE.keys()
