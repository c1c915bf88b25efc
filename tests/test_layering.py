"""The walls of the house, read from the source: who imports whom, how large files are, what is
never used.
"""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import ot_merge_jax

ROOT = Path(ot_merge_jax.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MAX_LINES = 500

#: From the ground up; a module imports from its own storey and below. What is not listed is only
#: kept free of cycles. A module that is named itself stands apart from its room.
STOREYS = (
    ("errors", "progress", "assets", "redaction"),
    ("types", "config", "config_file", "rope_settings"),
    ("spaces", "sharding"),
    ("models", "recipe", "transport"),
    ("io",),
    ("rows", "spelling", "texts"),
    ("activations", "calibration", "fuse", "adapt"),
    ("weight_transport", "weight_diagnostics", "site_diagnostics", "arithmetic"),
    ("merge",),
    ("sweep", "evaluate", "controls"),
    ("staged", "preflight"),
    ("trials", "planning"),
    ("run_controls",),
    ("pipeline", "evaluation", "adapt.inputs", "adapt.run", "adapt.publishing"),
    ("adapt.baselines",),
    ("cli", "demo", "demo_adapt"),
)

#: What else than the schema of reports a module outside `report` may import of it.
PRESENTS = {
    "pipeline": {"arms", "facts", "verdict"},
    "adapt.baselines": {"baselines"},
    "io.details": {"html"},
    "adapt.publishing": {"html"},
    "demo": {"numbers"},
}

#: Files that may import transformers: tokenisation, and the self-check of an export.
TRANSFORMERS = {"calibration.py", "io/check.py", "io/selfcheck.py"}

#: What this project uses of NNX; the rest of it moves (STYLE section 5).
NNX = {"Module", "Param", "Rngs", "eval_shape", "split", "merge", "to_pure_dict", "vmap"}


def name_of(path):
    """Dotted module name of a file."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
each_module = pytest.mark.parametrize("name", MODULES)


def imports(name, *, lazy=True):
    """Everything a module imports, as dotted names; ``from a import b`` gives ``a.b`` and ``a``."""
    tree, found = TREES[name], set()
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if not lazy and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def roots(name, **kwargs):
    return {target.split(".")[0] for target in imports(name, **kwargs)}


def own(name, **kwargs):
    """The modules of this package that a module imports."""
    return {
        target for target in imports(name, **kwargs) if target in MODULES and target != name
    } - {"ot_merge_jax"}


def reachable(name):
    """All modules of this package that importing ``name`` executes, itself included."""
    seen, todo = set(), [name]
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo += own(module, lazy=False)
    return seen


def relative(name):
    return MODULES[name].relative_to(ROOT).as_posix()


def storey(name):
    parts = name.split(".")[1:]
    for place in (".".join(parts), *parts[:1]):
        for level, rooms in enumerate(STOREYS):
            if place in rooms:
                return level
    return None


def calls(name):
    return [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]


def called(node):
    """``f`` of ``f(...)`` and ``a.f(...)``."""
    return (
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
    )


def test_the_package_is_seen():
    assert {
        "ot_merge_jax.models.decoder",
        "ot_merge_jax.io.hf",
        "ot_merge_jax.transport.cost",
    } <= MODULES.keys()


# ---- who imports whom ----


@each_module
def test_flax_only_in_models(name):
    if not name.startswith("ot_merge_jax.models"):
        assert "flax" not in roots(name)


@each_module
def test_torch_nowhere(name):
    assert not roots(name) & {"torch", "torchvision", "tensorflow"}


@each_module
def test_transformers_only_where_listed(name):
    if relative(name) not in TRANSFORMERS:
        assert "transformers" not in roots(name)


@each_module
def test_transformers_is_imported_late(name):
    """It takes seconds, which `--help` should not."""
    assert "transformers" not in roots(name, lazy=False)


@pytest.mark.parametrize(
    "name", [one for one in MODULES if one.startswith("ot_merge_jax.transport")]
)
def test_transport_stands_alone(name):
    """Neither itself nor what it imports knows models, files or flax."""
    for module in reachable(name):
        assert not module.startswith(("ot_merge_jax.models", "ot_merge_jax.io")), module
        assert not roots(module) & {"flax", "safetensors", "huggingface_hub", "transformers"}, (
            module
        )


@each_module
def test_imports_point_downwards(name):
    level = storey(name)
    if level is not None:
        above = {
            target for target in own(name) if storey(target) is not None and storey(target) > level
        }
        assert not above


@each_module
def test_execution_knows_the_schema_of_reports_and_no_page_or_table(name):
    allowed = {"ot_merge_jax.report", "ot_merge_jax.reports.schema"}
    presents = PRESENTS.get(name.removeprefix("ot_merge_jax."), set())
    allowed |= {f"ot_merge_jax.report.{module}" for module in presents}
    if not name.startswith(("ot_merge_jax.report", "ot_merge_jax.commands")):
        reports = {one for one in own(name) if one.startswith("ot_merge_jax.report")}
        assert reports <= allowed


def test_no_cycle():
    """Imports inside functions count too: they hide a cycle, they do not solve it."""
    done, path = set(), []

    def visit(name):
        if name in done:
            return
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        path.append(name)
        for target in sorted(own(name)):
            visit(target)
        path.pop()
        done.add(name)

    for name in MODULES:
        visit(name)


def test_import_has_no_side_effect():
    """Importing everything loads neither torch nor transformers and starts no device."""
    code = (
        "import importlib, sys\n"
        f"for name in {sorted(MODULES)!r}: importlib.import_module(name)\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
        "assert 'transformers' not in sys.modules, 'transformers'\n"
        "assert 'pyarrow' not in sys.modules, 'pyarrow'\n"
        "assert 'lm_eval' not in sys.modules, 'lm_eval'\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'a device was started'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


# ---- how files look ----


@each_module
def test_file_is_short(name):
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@each_module
def test_file_is_named_by_what_it_owns(name):
    assert not {"utils", "util", "helpers", "helper", "misc", "common"} & set(name.split("."))


@each_module
def test_module_has_a_docstring(name):
    text = ast.get_docstring(TREES[name])
    assert text
    assert text.splitlines()[0].rstrip().endswith((".", ":"))


@each_module
def test_exported_names_exist_and_are_public(name):
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", ()):
        assert hasattr(module, public)
        assert not public.startswith("_")


@pytest.mark.parametrize(
    "name", [one for one, path in MODULES.items() if path.name == "__init__.py"]
)
def test_no_reexport_hides_a_module(name):
    """`ot_merge_jax.merging.fuse` is the module, not the function in it."""
    module = importlib.import_module(name)
    for child in pkgutil.iter_modules([str(MODULES[name].parent)]):
        importlib.import_module(f"{name}.{child.name}")
        assert getattr(module, child.name) is sys.modules[f"{name}.{child.name}"]


# ---- what is never used ----


@each_module
def test_no_print(name):
    assert "print" not in {node.func.id for node in calls(name) if isinstance(node.func, ast.Name)}


@each_module
def test_assert_only_narrows_types(name):
    """User errors are exceptions, and `python -O` must not change what is checked."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Assert):
            assert ast.unparse(node.test).endswith(" is not None"), node.lineno


@each_module
def test_nothing_is_executed(name):
    """No pickle, no eval: a checkpoint, a recipe or a text never runs code."""
    assert not roots(name) & {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
    plain = {called(node) for node in calls(name) if isinstance(node.func, ast.Name)}
    assert not plain & {"eval", "exec", "compile", "__import__"}
    for node in calls(name):
        function, given = ast.unparse(node.func), {key.arg: key.value for key in node.keywords}
        assert "allow_pickle" not in given, node.lineno
        assert function not in {"yaml.unsafe_load", "yaml.full_load", "yaml.load_all"}
        if function == "yaml.load":
            module = importlib.import_module(name)
            loader = eval(ast.unparse(given["Loader"]), vars(module))
            assert issubclass(loader, yaml.SafeLoader)


@each_module
def test_remote_code_is_refused_explicitly(name):
    """Unset, transformers asks on stdin whether to run a model's code."""
    for node in calls(name):
        if called(node) == "from_pretrained":
            given = {key.arg: key.value for key in node.keywords}
            assert "trust_remote_code" in given, node.lineno
            assert getattr(given["trust_remote_code"], "value", None) is False


@pytest.mark.parametrize("name", [one for one in MODULES if one.startswith("ot_merge_jax.models")])
def test_nnx_is_a_thin_shell(name):
    """Only the subset that STYLE section 5 allows."""
    used = {
        node.attr
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "nnx"
    }
    assert used <= NNX
    assert {target for target in imports(name) if target.startswith("flax")} <= {"flax", "flax.nnx"}


@each_module
def test_no_random_state_is_global(name):
    """Every draw comes from a seed that the caller gave."""
    for node in calls(name):
        text = ast.unparse(node.func)
        if re.fullmatch(r"(np|numpy)\.random\.\w+", text):
            assert text.endswith((".default_rng", ".SeedSequence", ".Generator")), text
            assert node.args or node.keywords, "without a seed"
        if re.fullmatch(r"random\.\w+", text):
            assert text == "random.Random", text
            assert node.args, "without a seed"
