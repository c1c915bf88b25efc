"""What of the walls no lint says. The others stand in pyproject.toml: import-linter (who imports
whom, no cycle, flax, torch, transformers), ruff (pickle, eval, print, assert, docstrings).
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import ot_merge_jax

ROOT = Path(ot_merge_jax.__file__).parent
MAX_LINES = 500

#: What this project uses of NNX; the rest of it moves (STYLE section 5).
NNX = {"Module", "Param", "Rngs", "eval_shape", "split", "merge", "to_pure_dict", "vmap"}

#: Names that say nothing of what a file owns.
DRAWERS = {"utils", "util", "helpers", "helper", "misc", "common"}

IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
import ot_merge_jax
for found in pkgutil.walk_packages(ot_merge_jax.__path__, "ot_merge_jax."):
    importlib.import_module(found.name)
    parent, _, child = found.name.rpartition(".")
    # `ot_merge_jax.merging.fuse` is the module, not the function in it
    assert getattr(sys.modules[parent], child) is sys.modules[found.name], found.name
late = {"torch", "transformers", "pyarrow", "lm_eval"} & set(sys.modules)
assert not late, late
assert "ot_merge_jax.models.decoder" in sys.modules
from jax._src import xla_bridge
assert not xla_bridge._backends, "a device was started"
"""


def test_files_are_short_and_named_by_what_they_own():
    files = list(ROOT.rglob("*.py"))
    assert len(files) > 100
    long = [path for path in files if len(path.read_text("utf-8").splitlines()) > MAX_LINES]
    drawers = [
        path for path in files if DRAWERS & set(path.relative_to(ROOT).with_suffix("").parts)
    ]
    assert (long, drawers) == ([], [])


def test_import_has_no_side_effect():
    """Importing everything loads neither torch nor transformers and starts no device."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_nothing_is_called_that_moves_runs_foreign_code_or_draws_without_a_seed():
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "nnx":
                assert node.attr in NNX, (path, node.lineno)
            if not isinstance(node, ast.Call):
                continue
            name, given = ast.unparse(node.func), {key.arg: key.value for key in node.keywords}
            where = (path, node.lineno, name)
            assert "allow_pickle" not in given, where
            if name.endswith("from_pretrained"):  # unset, transformers asks on stdin
                assert getattr(given.get("trust_remote_code"), "value", None) is False, where
            if re.fullmatch(r"((np|numpy)\.)?random\.\w+", name):
                makers = (".default_rng", ".SeedSequence", ".Generator", ".Random")
                assert name.endswith(makers), where
                assert node.args or given, where
