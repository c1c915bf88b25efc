"""The public names: imported late, all there, and what the type checker is told is true."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import ot_merge_jax


def fresh(code):
    """Standard output of Python code in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def told():
    """Public name -> (module, its name there), as the type checker reads it."""
    tree = ast.parse(Path(ot_merge_jax.__file__).read_text(encoding="utf-8"))
    [block] = [
        node for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]  # fmt: skip
    return {
        alias.asname or alias.name: (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_import_loads_no_heavy_library():
    heavy = "jax jaxlib flax transformers numpy pydantic huggingface_hub rich"
    code = f"import sys, ot_merge_jax; print(*set('{heavy}'.split()) & set(sys.modules))"
    assert fresh(code) == []


def test_dir_lists_every_name_before_it_is_imported():
    code = "import sys, ot_merge_jax; print(*dir(ot_merge_jax)); assert 'jax' not in sys.modules"
    assert set(ot_merge_jax.__all__) <= set(fresh(code))


def test_type_checker_is_told_about_every_name():
    assert told().keys() == set(ot_merge_jax.__all__)


@pytest.mark.parametrize("name", ot_merge_jax.__all__)
def test_name_is_what_the_type_checker_is_told(name):
    module, own = told()[name]
    assert getattr(ot_merge_jax, name) is getattr(importlib.import_module(module), own)


def test_old_names_stay():
    assert ot_merge_jax.load is ot_merge_jax.load_hf
    assert ot_merge_jax.save is ot_merge_jax.save_hf


def test_unknown_name():
    with pytest.raises(AttributeError, match="'ot_merge_jax' has no attribute 'lode'"):
        ot_merge_jax.lode  # noqa: B018
