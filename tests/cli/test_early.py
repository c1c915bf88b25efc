"""What answers at once: help, the version, a typing error, a file that is not there."""

import json
import subprocess
import sys

import pytest
import yaml

from ot_merge_jax.cli import early
from ot_merge_jax.data import tokenizers
from ot_merge_jax.recipes import loading
from ot_merge_jax.runs import inputs, plan

COMMANDS = ("run", "plan", "adapt", "eval", "report", "inspect", "families", "demo")
HEAVY = {"jax", "jaxlib", "flax", "transformers", "huggingface_hub", "numpy", "matplotlib"}
#: One process for all: exit codes, and heavy modules that have been imported by then.
ALL = """
import json, sys
from ot_merge_jax.cli import main
calls, heavy = json.load(sys.stdin)
answers = []
for words in calls:
    sys.argv = ["ot-merge", *words]
    try:
        main.main()
    except SystemExit as end:
        answers.append([end.code, sorted(set(heavy) & set(sys.modules))])
sys.stderr.write(json.dumps(answers))
"""


def lines_of(calls):
    """Exit code and heavy modules after each of these calls, and standard output."""
    done = subprocess.run(
        [sys.executable, "-c", ALL], input=json.dumps([calls, sorted(HEAVY)]),
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    return json.loads(done.stderr.splitlines()[-1]), done.stdout


def test_help_and_mistakes_import_no_jax(tmp_path, text_files):
    text, gone = str(text_files[0]), str(tmp_path / "gone")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {"preset": "paper", "target": gone, "source": gone, "calibration": {"path": text}}
        )
    )
    out = ["--out", str(tmp_path / "out")]
    expected = {
        0: [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)],
        2: [
            ["rnu"], ["run", "--tarrget", "x"], ["run", f"{gone}.yaml", *out],
            ["plan", "--preset", "papier", "--target", gone, "--source", gone],
            ["adapt", gone, "--text", text, *out, "--learning-rate", "0"],
            ["run", str(recipe), *out, "--mesh", "data"],
            ["plan", str(recipe), "--memory-limit", "x"],
            ["adapt", gone, "--text", text, *out, "--memory-limit", "0"],
            ["eval", gone], ["eval", gone, "--choices", gone, "--base", gone],
        ],
        3: [
            ["run", str(recipe), *out], ["plan", str(recipe)],
            ["run", str(recipe), *out, "--calibration", gone],
            ["adapt", gone, "--text", text, *out], ["adapt", gone, "--text", gone, *out],
            ["eval", gone, "--text", text], ["eval", str(tmp_path), "--text", gone],
            ["eval", str(tmp_path), "--choices", f"{gone}.jsonl"],
            ["eval", str(tmp_path), "--tasks", "arc_easy", "--include-path", gone],
            ["inspect", gone], ["report", gone],
        ],
    }  # fmt: skip
    calls = [(words, code) for code, several in expected.items() for words in several]
    answers, shown = lines_of([words for words, _ in calls])
    for (words, code), (ended, heavy) in zip(calls, answers, strict=True):
        assert (ended, heavy) == (code, []), words
    assert "ot-merge 0." in shown
    assert not (tmp_path / "out").exists()


def missing_text(desk):
    return desk.run(calibration=desk.folder / "gone.txt")


def missing_held_out_text(desk):
    return desk.run(eval_text=desk.folder / "gone.txt")


def missing_target(desk):
    return desk.run(target=desk.folder / "gone")


def missing_base(desk):
    return desk.delta(source_base="owner/name")


def output_that_is_not_empty(desk):
    desk.out.mkdir()
    (desk.out / "mine").touch()
    return desk.run()


def output_in_an_input(desk):
    return desk.run(out=desk.target / "out")


def missing_model_of_adapt(desk):
    return ["adapt", desk.folder / "gone", "--text", desk.calibration, "--out", desk.out]


def missing_text_of_adapt(desk):
    return ["adapt", desk.target, "--text", desk.folder / "gone.txt", "--out", desk.out]


def missing_text_of_eval(desk):
    return ["eval", desk.target, "--text", desk.folder / "gone.txt"]


def missing_questions_of_eval(desk):
    return ["eval", desk.target, "--choices", desk.folder / "gone.jsonl"]


def missing_model_of_inspect(desk):
    return ["inspect", desk.folder / "gone"]


@pytest.mark.parametrize("break_", [
    missing_text, missing_held_out_text, missing_target, missing_base, output_that_is_not_empty,
    output_in_an_input, missing_model_of_adapt, missing_text_of_adapt, missing_text_of_eval,
    missing_questions_of_eval, missing_model_of_inspect,
])  # fmt: skip
def test_early_sentence_is_the_one_of_the_run(break_, desk, cli, monkeypatch):
    words = break_(desk)
    first = cli(*words)
    assert first.code == 3
    monkeypatch.setattr(early, "look_for", lambda **_: None)
    monkeypatch.setattr(early, "look_for_questions", lambda files: None)
    later = cli(*words)
    assert (first.code, first.err.splitlines()[-1]) == (later.code, later.err.splitlines()[-1])


def test_folder_of_a_finished_run_may_be_resumed(desk, cli):
    """The early check lets pass what the run would; it stops at the target."""
    desk.out.mkdir()
    (desk.out / "mine").touch()
    (desk.target / "config.json").unlink()
    assert "config.json is missing" in cli(*desk.run("--resume")).err


def test_tokenizers_are_loaded_once_where_memory_lowers_the_rows(desk, monkeypatch):
    loaded = []
    own = tokenizers.load_tokenizer

    def load(path):
        loaded.append(path)
        return own(path)

    monkeypatch.setattr(tokenizers, "load_tokenizer", load)
    recipe = loading.resolve({
        "preset": "barycentric", "target": str(desk.target), "rows": "span",
        "source": str(desk.models["qwen2-source"]), "calibration": str(desk.calibration),
    })  # fmt: skip
    monkeypatch.setattr(plan, "_FEWEST_ROWS", 16)
    whole = plan.needs(recipe, None)
    most = inputs.check(recipe, None, overwrite=False).data.rows
    loaded.clear()
    tried = []
    choose = plan._memory

    def memory(found, limit):
        tried.append(found.data.rows)
        if found.data.rows > most // 4:
            raise plan.ResourceError("Too much.")
        return choose(found, limit)

    monkeypatch.setattr(plan, "_memory", memory)
    fewer = plan.needs(recipe, None)
    assert len(tried) > 2
    assert fewer.inputs.recipe.max_rows == fewer.inputs.data.rows < whole.inputs.data.rows
    assert sorted(loaded) == sorted(folder.path for folder in whole.inputs.folders.values())
