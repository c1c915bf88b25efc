"""`ot-merge run` end to end: two folders in, one out that transformers loads, nothing else."""

import getpass
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from desk import FAST_TO_COMPILE
from published import ALL, CROSS, assert_nothing_is_lost, moved, tensors

from ot_merge_jax.data import documents
from ot_merge_jax.reports.schema import Report
from ot_merge_jax.runs import provenance

NOTHING = "nothing of the source was transferred"
DIAGNOSTICS = {
    "ratio_transported", "ratio_change", "source_layer", "neighbours_out", "neighbours_in", "error",
    "iterations", "converged",
}  # fmt: skip


# ---- the report ----


@pytest.mark.parametrize("name", ALL)
def test_report_has_verdict_controls_and_diagnostics_of_every_weight(name, merged, counts):
    merge = merged(name)
    report, settings = merge.report, merge.report.settings
    assert isinstance(report.verdict, str)
    assert set(report.controls) == {"target", "source"}
    assert set(report.weights) == set(settings["weights"])
    layers = 2
    for weight, found in report.weights.items():
        assert found.model_fields_set == DIAGNOSTICS
        length = 1 if weight in ("embed", "head") else layers
        for key, values in found:
            assert len(values) == length, (weight, key)
            assert None not in values, (weight, key)
    for site, found in report.sites.items():
        assert np.shape(found.layer_plan) == np.shape(found.layer_cost) == (layers, 3), site
        assert np.isclose(np.sum(found.layer_plan), 1, atol=1e-4), site
        assert len(found.r2) == len(found.r2_permuted) == layers
        assert 0 <= found.converged <= 1
    stopped = {weight for weight, found in report.weights.items() if not all(found.converged)}
    assert {one.split(":")[0] for one in report.warnings if "converge" in one} == stopped
    assert report.calibration["documents"] == counts.rows
    assert report.calibration["dev_documents"] == counts.dev


@pytest.mark.parametrize("name", ALL)
def test_every_key_of_the_report_is_of_the_schema(name, merged):
    assert_nothing_is_lost(merged(name).out)


@pytest.mark.parametrize("name", ALL)
def test_plans_of_ordinary_models_converge(name, merged):
    assert not any("converge" in one for one in merged(name).report.warnings)


@pytest.mark.parametrize("name", CROSS)
def test_rows_are_samples(name, merged, counts):
    assert merged(name).report.calibration["rows"] == counts.rows


def test_rows_are_tokens_without_special_ones(merged, counts):
    found = merged("delta llama<-llama").report.calibration
    assert found["rows_are"] == "token"
    assert found["rows"] == found["target_tokens"] - counts.rows  # one BOS in each document


@pytest.mark.parametrize("name", ALL)
def test_only_the_weights_of_the_recipe_move(name, merged):
    merge = merged(name)
    tables = {"embed_tokens": "embed", "lm_head": "head"}
    kinds = set()
    for tensor in moved(merge):
        kind = re.search(r"(\w+)_proj|embed_tokens|lm_head", tensor)
        assert kind, f"{tensor} moved"
        kinds.add(kind[1] or tables[kind[0]])
    chosen = merge.report.strength.chosen
    if isinstance(chosen, dict):
        groups = {"vocabulary": {"embed", "head"}, "projections": {"gate", "up", "down"}}
        expected = set().union(*(groups[group] for group, value in chosen.items() if value))
    else:
        expected = set(merge.report.settings["weights"]) if chosen else set()
    assert kinds == expected


@pytest.mark.parametrize("name", ["paper llama<-qwen2", "paper qwen2<-llama"])
def test_paper_only_shrinks(name, merged):
    """The published formula: W~ vanishes, so the selected weights are (1 - alpha) W."""
    merge = merged(name)
    before, after = tensors(merge.target), tensors(merge.out)
    assert moved(merge)
    for tensor in sorted(moved(merge)):
        if tensor.endswith("o_proj.bias"):
            continue
        old, new = (one[tensor][1].astype("float32") for one in (before, after))
        scale = np.abs(old).max()
        shrunk = np.isclose(new, 0.9 * old, atol=1e-2 * scale) | np.isclose(
            new, old, atol=1e-2 * scale
        )
        if not tensor.endswith(".bias"):
            assert shrunk.all(), tensor


@pytest.mark.parametrize("columns", [40, 80])
def test_paper_says_on_one_line_that_nothing_moved_and_what_would(columns, calls, tmp_path, cli):
    called = cli(*calls["paper llama<-qwen2"], "--out", tmp_path / "out", columns=columns)
    [line] = [line for line in called.out.splitlines() if NOTHING in line]
    assert "delta" in line
    assert "barycentric" in line
    assert max(map(len, called.out.splitlines())) > columns or columns == 80


@pytest.mark.parametrize(
    "name", ["barycentric llama<-qwen2", "barycentric qwen2<-llama", "delta llama<-llama"]
)
def test_other_presets_do_not_say_so(name, merged):
    assert NOTHING not in merged(name).called.out


def test_recipe_is_printed_and_saved_resolved(merged):
    for name in ("paper llama<-qwen2", "delta llama<-llama"):
        merge = merged(name)
        saved = yaml.safe_load((merge.out / "ot_merge" / "recipe.yaml").read_text())
        assert saved == merge.report.settings
        printed = merge.called.err.split("seed: 0")[0] + "seed: 0"
        assert yaml.safe_load(printed) == saved
        assert saved["epsilon"] == (0.1 if "paper" in name else 0.02)
        assert saved["samples" if "samples" in saved else "calibration"]["samples"] == 2000


@pytest.mark.parametrize("columns", [80, 120])
def test_table_has_a_whole_row_for_every_weight(columns, calls, tmp_path, cli):
    called = cli(
        *calls["delta llama<-llama"], "--strength", "1", "--out", tmp_path / "out", columns=columns
    )
    table = called.out.split("Held-out text")[0]
    assert "…" not in called.out, "numbers or names are cut off"
    assert max(map(len, table.splitlines())) <= columns
    for weight in ("gate", "up", "down", "embed", "head"):
        [row] = [line for line in table.splitlines() if re.match(rf"\W*{weight}\b", line)]
        assert len(re.findall(r"\d\.\d+e[+-]\d\d", row)) >= 2, row  # |W~|/|W|, |dW|/|W|
    for name in ("|W~|/|W|", "|dW|/|W|", "iterations"):
        assert name in table


def test_evaluation_table_is_printed(merged, counts):
    out = merged("delta llama<-llama").called.out
    assert f"Held-out text ({counts.held_out} documents)" in out
    for model in ("target", "merge", "source"):
        [row] = [line for line in out.splitlines() if re.match(rf"\W*{model}\b.*\d\.\d{{4}}", line)]
        assert ("[" in row) is (model != "target"), row


def test_json_is_alone_on_stdout_and_is_the_report(calls, tmp_path, cli):
    called = cli(*calls["paper llama<-qwen2"], "--out", tmp_path / "out", "--json")
    assert called.out == (tmp_path / "out" / "ot_merge" / "report.json").read_text()
    assert "verdict" in called.json


def test_json_and_quiet_print_the_json_and_nothing_else(calls, tmp_path, cli):
    called = cli(*calls["paper llama<-qwen2"], "--out", tmp_path / "out", "--json", "--quiet")
    assert called.err == ""
    assert called.json["verdict"]


# ---- evaluation, strength ----


@pytest.mark.parametrize("name", ["delta llama<-llama", "barycentric qwen2<-llama"])
def test_eval_text_is_scored_before_and_after(name, merged, text_files, cli, counts):
    merge = merged(name)
    found = cli(
        "eval", merge.target, merge.out, merge.source, "--text", text_files[1], "--json"
    ).json
    for role, folder in (("target", merge.target), ("merge", merge.out), ("source", merge.source)):
        expected = found["models"][str(folder)]
        reported = merge.report.evaluation[role]
        assert reported.nll_per_token == pytest.approx(expected["nll_per_token"], abs=1e-6)
        assert reported.bits_per_byte == pytest.approx(expected["bits_per_byte"], abs=1e-6)
        assert reported.documents == expected["documents"] == counts.held_out
    change = merge.report.evaluation["merge"].against_target
    assert change.metric == "nll_per_token"
    expected = found["pairs"][0]  # target minus merge
    assert change.difference == pytest.approx(-expected["difference"], abs=1e-9)
    assert change.low <= change.difference <= change.high


def test_source_with_another_tokenizer_is_compared_in_bits_per_byte(merged):
    evaluation = merged("barycentric qwen2<-llama").report.evaluation
    assert evaluation["source"].against_target.metric == "bits_per_byte"
    evaluation = merged("delta llama<-llama").report.evaluation
    assert evaluation["source"].against_target.metric == "nll_per_token"


@pytest.mark.parametrize(
    "name", ["delta llama<-llama", "barycentric llama<-qwen2", "barycentric qwen2<-llama"]
)
def test_auto_takes_the_best_strength_of_the_dev_split(
    name, merged, text_files, tmp_path, cli, counts
):
    merge = merged(name)
    found = merge.report.strength
    grid = (
        [0, 0.2, 0.4, 0.6, 0.8, 1, 1.2]
        if "delta" in name
        else [0, 0.01, 0.03, 0.05, 0.1, 0.15, 0.2]
    )
    assert [point.strength for point in found.tried[: len(grid)]] == grid
    best = min(found.tried, key=lambda point: point.loss)
    assert found.chosen == best.strength
    if "delta" in name:
        assert isinstance(found.tried[-1].strength, dict)  # then one for each group
    # the dev split, and no other text: the loss at 0 is the target's on those documents
    dev = documents.split(text_files[0].read_text().splitlines(), seed=0)[1]
    (tmp_path / "dev.txt").write_text("\n".join(dev) + "\n")
    scored = cli("eval", merge.target, "--text", tmp_path / "dev.txt", "--json").json
    expected = scored["models"][str(merge.target)]
    assert expected["documents"] == counts.dev
    assert found.tried[0].loss == pytest.approx(expected["nll_per_token"], abs=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_strength_zero_returns_the_target_bit_for_bit(name, calls, merged, tmp_path, cli):
    called = cli(*calls[name], "--strength", "0", "--out", tmp_path / "out", "--json")
    assert called.code == 0, called.err
    before, after = tensors(merged(name).target), tensors(tmp_path / "out")
    assert all(before[key][1].tobytes() == after[key][1].tobytes() for key in before)
    assert "unchanged" in called.json["verdict"]
    assert "dev split" not in called.json["verdict"]  # nothing was chosen: the user said 0


@pytest.mark.catalogue("source-is-target")
def test_delta_of_a_source_that_is_its_base_is_the_target(
    calls, models, merged, tmp_path, cli, hashes
):
    words = [
        models["llama-base"] if one == models["llama-source"] else one
        for one in calls["delta llama<-llama"]
    ]
    called = cli(*words, "--strength", "1", "--out", tmp_path / "out", "--json")
    assert (
        hashes(tmp_path / "out")["model.safetensors"]
        == hashes(models["llama-target"])["model.safetensors"]
    )
    assert NOTHING in called.json["verdict"]


# ---- the recipe ----


@pytest.mark.parametrize(
    "name", ["barycentric llama<-qwen2", "paper qwen2<-llama", "delta llama<-llama"]
)
def test_saved_recipe_gives_the_same_bytes(name, merged, tmp_path, cli, hashes):
    merge = merged(name)
    called = cli("run", merge.out / "ot_merge" / "recipe.yaml", "--out", tmp_path / "again")
    assert called.code == 0, called.err
    first, again = hashes(merge.out), hashes(tmp_path / "again")
    files = [file for file in first if file.endswith(".safetensors")]
    assert files
    assert all(first[file] == again[file] for file in files)
    assert first["ot_merge/recipe.yaml"] == again["ot_merge/recipe.yaml"]
    assert first["ot_merge/report.json"] == again["ot_merge/report.json"]


def test_flags_win_over_the_recipe(merged, tmp_path, cli):
    merge = merged("paper llama<-qwen2")
    recipe = tmp_path / "recipe.yaml"
    said = yaml.safe_load((merge.out / "ot_merge" / "recipe.yaml").read_text())
    recipe.write_text(yaml.safe_dump({**said, "strength": 0.05, "seed": 0}))
    words = ("run", recipe, "--json", "-q")
    kept = cli(*words, "--out", tmp_path / "kept").json["settings"]
    won = cli(*words, "--strength", "0.2", "--samples", "1000", "--out", tmp_path / "won").json[
        "settings"
    ]
    assert (kept["strength"], won["strength"]) == (0.05, 0.2)
    assert won["calibration"] == {**kept["calibration"], "samples": 1000}
    same = set(kept) - {"strength", "calibration"}
    assert all(kept[key] == won[key] for key in same)


def test_eval_text_of_the_recipe_may_be_left_out(merged, tmp_path, cli):
    merge = merged("paper llama<-qwen2")
    said = yaml.safe_load((merge.out / "ot_merge" / "recipe.yaml").read_text())
    said["evaluation"] = None
    said["strength"] = 1.0  # so large that something is said about it
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(said))
    called = cli("run", tmp_path / "recipe.yaml", "--out", tmp_path / "out", "--json")
    report = Report.model_validate(called.json)
    assert report.evaluation == {}
    assert report.controls == {}


def test_relative_paths_and_an_empty_out_folder(calls, place, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(place)
    out = tmp_path / "out"
    out.mkdir()
    words = [
        one.relative_to(place) if isinstance(one, Path) else one
        for one in calls["paper llama<-qwen2"]
    ]
    called = cli(*words, "--out", os.path.relpath(out))
    assert called.code == 0, called.err
    assert (
        yaml.safe_load((out / "ot_merge" / "recipe.yaml").read_text())["target"] == "llama-target"
    )


# ---- privacy ----


def test_outputs_name_neither_the_home_folder_nor_the_user(
    calls, place, tmp_path, monkeypatch, cli, hashes
):
    home = tmp_path / "zaphod"
    shutil.copytree(place, home / "models")
    shutil.copytree(
        home / "models", tmp_path / "zaphod-two" / "models"
    )  # begins like the home folder
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    words = [home / "models" / one.relative_to(place) if isinstance(one, Path) else one
             for one in calls["paper llama<-qwen2"]]  # fmt: skip
    out = home / "models" / "merged"
    called = cli(*words, "--out", out, "--json")
    assert called.code == 0, called.err
    for path in out.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"zaphod" not in content, path
            assert b"hf_secret" not in content, path
            if path.suffix in (".json", ".yaml", ".md") and path.name != "tokenizer.json":
                assert not re.search(rb"\b" + os.uname().nodename.encode() + rb"\b", content), path
                assert getpass.getuser() == "root" or getpass.getuser().encode() not in content, (
                    path
                )
    recipe = yaml.safe_load((out / "ot_merge" / "recipe.yaml").read_text())
    assert recipe["target"] == "~/models/llama-target"
    again = cli("run", out / "ot_merge" / "recipe.yaml", "--out", tmp_path / "again")
    assert again.code == 0, again.err
    assert hashes(tmp_path / "again")["model.safetensors"] == hashes(out)["model.safetensors"]


@pytest.mark.parametrize(
    ("home", "path", "written"),
    [
        ("/home/ada", "/home/ada/models/m", "~/models/m"),
        ("/home/ada", "/home/adamant/m", "/home/adamant/m"),
        ("/home/ada", "/home/ada", "~"),
        (
            "/home/ada",
            "target: /home/ada/m\nsource: '/home/ada/n'\n",
            "target: ~/m\nsource: '~/n'\n",
        ),
        ("/", "/models/m", "/models/m"),
    ],
)
def test_home_folder_is_written_as_a_tilde(home, path, written, monkeypatch):
    monkeypatch.setenv("HOME", home)
    assert provenance.without_home(path) == written


# ---- torch ----


def test_the_tool_runs_where_torch_cannot_be_imported(calls, text_files, tmp_path):
    """In a process of its own whose every import of torch fails, as on a machine without it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class WithoutTorch(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        is_torch = name.split('.')[0] == 'torch'\n"
        "        return None if is_torch else super().find_spec(name, path, target)\n"
        "sys.meta_path = [WithoutTorch if one is PathFinder else one for one in sys.meta_path]\n"
    )
    words = [str(one) for one in calls["delta llama<-llama"]]
    place = words.index("--eval-text")
    words[place : place + 2] = [
        "--weights",
        "down,embed,head",
        "--strength",
        "1",
        "--rows",
        "sample",
        "--out",
        str(tmp_path / "out"),
    ]
    script = (
        "import json, sys\n"
        "from typer.testing import CliRunner\n"
        "from ot_merge_jax.cli.main import app\n"
        f"out, text = {str(tmp_path / 'out')!r}, {str(text_files[1])!r}\n"
        f"calls = [{words!r}, ['eval', out, '--text', text, '--json'],\n"
        "         ['inspect', out], ['families'], ['--help']]\n"
        "codes = [CliRunner().invoke(app, one).exit_code for one in calls]\n"
        "import importlib.util\n"
        "is_absent = importlib.util.find_spec('torch') is None and 'torch' not in sys.modules\n"
        "print(json.dumps([codes, is_absent]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "XLA_FLAGS": FAST_TO_COMPILE},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[0, 0, 0, 0, 0], True]
