"""What tests of bad input share: a private folder of good inputs, and the rows that break it."""

import json
import shutil
from pathlib import Path

import ml_dtypes  # noqa: F401  (teaches safetensors the name bfloat16)
import pytest
import safetensors.numpy

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
GATE = "model.layers.1.mlp.gate_proj.weight"
#: For processes of their own, in which nothing has been compiled yet.
FAST_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


class Desk:
    """A folder of inputs that may be broken: two models, a base, texts."""

    def __init__(self, folder, models, text_files):
        self.folder = folder
        self.models, self.out = models, folder / "out"
        self.calibration, self.heldout = (Path(shutil.copy(one, folder)) for one in text_files)
        self.parts = {
            "--preset": "barycentric", "--target": self.copy("llama-target"),
            "--source": models["llama-source"], "--calibration": self.calibration,
            "--strength": "0.1", "--out": self.out,
        }  # fmt: skip

    def copy(self, model, name="copy"):
        """A copy of a model that the row may damage."""
        return Path(shutil.copytree(self.models[model], self.folder / name))

    @property
    def target(self):
        return self.parts["--target"]

    def run(self, *more, **changes):
        """``ot-merge run``; ``changes`` replace flags (None drops one)."""
        parts = self.parts | {f"--{key.replace('_', '-')}": value for key, value in changes.items()}
        return [
            "run",
            *(word for pair in parts.items() if pair[1] is not None for word in pair),
            *more,
        ]

    def delta(self, **changes):
        """The same for preset delta, whose good form has a base."""
        given = {"preset": "delta", "source_base": self.models["llama-base"], **changes}
        return self.run(**given)

    def edit_config(self, folder=None, **changes):
        path = (folder or self.target) / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(
            json.dumps({key: value for key, value in config.items() if value is not ...})
        )

    def edit_tensors(self, change, folder=None):
        path = (folder or self.target) / SINGLE
        found = safetensors.numpy.load_file(path)
        change(found)
        safetensors.numpy.save_file(found, path, metadata={"format": "pt"})

    def write(self, name, content):
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path


ROWS = {}


def rows(names=None):
    """Rows as parameters of a test, with the marks that stand on their functions."""
    return [
        pytest.param(name, marks=getattr(ROWS[name][0], "pytestmark", ())) for name in names or ROWS
    ]


def row(code, *words, name=None):
    """Registers a row: its exit code, the words of its sentence, and a name if the function's own
    does not say it."""

    def register(function):
        ROWS[name or function.__name__.replace("_", " ")] = (function, code, words)
        return function

    return register
