"""Trouble on the way: full disks, interrupts, odd names, early stops; nothing is lost."""

import ast
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes  # noqa: F401  (teaches safetensors the name bfloat16)
import numpy as np
import pytest
import safetensors.numpy
import yaml
from desk import FAST_TO_COMPILE, GATE, SINGLE
from published import report_of

from ot_merge_jax.io import atomic, hub
from ot_merge_jax.runs import inputs as run_inputs
from ot_merge_jax.runs import merge


@pytest.fixture
def everything(desk, hashes):
    """What lies on the desk and in the shared inputs."""
    return lambda: (
        hashes(desk.folder),
        {name: hashes(folder) for name, folder in desk.models.items()},
    )


@pytest.mark.parametrize(
    ("problem", "code", "words"),
    [
        (PermissionError(13, "Permission denied", "m/model.safetensors"), 3, "m/model.safetensors"),
        (OSError(5, "Input/output error", "m/model.safetensors"), 4, "m/model.safetensors"),
        (OSError("out does not hold the merged parameters; check the disk."), 4, "check the disk"),
        (MemoryError(), 4, "out of memory"),
    ],
)
def test_trouble_with_files_and_memory_is_one_sentence(
    problem, code, words, desk, cli, monkeypatch
):
    def fail(*a, **k):
        raise problem

    monkeypatch.setattr(run_inputs, "check", fail)
    called = cli(*desk.run("--quiet"))
    assert (called.code, called.out) == (code, "")
    [sentence] = called.err.splitlines()
    assert re.fullmatch(r"error: .+\.", sentence)
    assert words in sentence


def test_error_with_json_leaves_stdout_empty(desk, cli):
    called = cli(*desk.run("--json", target=desk.folder / "nowhere"))
    assert (called.code, called.out) == (3, "")
    assert called.err.splitlines()[-1].startswith("error: ")


def test_verbose_shows_where_an_error_came_from(desk, cli):
    called = cli(*desk.run("--verbose", target=desk.folder / "nowhere"))
    assert called.code == 3
    assert "InputError" in called.err
    assert called.err.splitlines()[-1].startswith("error: ")


def test_sentence_is_one_line_on_a_narrow_screen(desk, cli):
    called = cli(*desk.run("--quiet", target=desk.folder / "nowhere"), columns=30)
    assert len(called.err.splitlines()) == 1


@pytest.mark.parametrize(
    "words",
    [
        "run --no-such-flag",
        "run --epsilon small",
        "run --seed -1",
        "eval",
        "no-such-command",
    ],
)
def test_usage_errors_exit_with_2(words, cli):
    called = cli(*words.split())
    assert (called.code, called.out) == (2, "")
    assert "Error" in called.err


def test_path_is_never_looked_up_on_the_hub(desk, cli, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    assert cli(*desk.run(target="gpt2", source="Qwen/Qwen2.5-0.5B")).code == 3
    assert cli("eval", "gpt2", "--text", desk.heldout).code == 3


@pytest.mark.catalogue("bad-output")
def test_output_whose_parent_is_not_writable(desk, cli, everything, monkeypatch):
    parent = desk.folder / "parent"
    parent.mkdir()
    if os.geteuid() == 0:  # permissions do not bind root, so say what a user would be told
        access = os.access
        monkeypatch.setattr(
            os, "access", lambda path, mode, **k: Path(path) != parent and access(path, mode, **k)
        )
    else:
        parent.chmod(0o555)
    before = everything()
    called = cli(*desk.run("--quiet", out=parent / "sub" / "out"))
    parent.chmod(0o755)
    assert called.code == 3
    assert "not writable" in called.err
    assert everything() == before


@pytest.mark.catalogue("odd-output-names")
@pytest.mark.parametrize(
    "name", ["x" * 300, "two\nlines", "übung 河流", "-rf", "a'b\"c;$(touch x)`y`"]
)
def test_output_names(name, desk, cli):
    """Odd names work, or are refused like any other bad input; the card stays readable."""
    called = cli(*desk.run(out=desk.folder / "sub" / name))
    if len(name) > 255:
        assert called.code == 3
        assert called.err.splitlines()[-1].startswith("error: ")
        assert not (desk.folder / "sub").exists()
        return
    assert called.code == 0, called.err
    front = (desk.folder / "sub" / name / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    assert yaml.safe_load(front)["base_model_relation"] == "merge"


# ---- what is not bad input ----


@pytest.mark.catalogue("constant-activations")
def test_constant_neurons_are_fine(desk, cli):
    """A neuron that never changes, in both models, is uncorrelated with everything."""
    source = desk.copy("llama-source", "source")

    def change(tensors):
        for name in (GATE, GATE.replace("gate", "up"), "model.layers.0.mlp.up_proj.weight"):
            tensors[name][:3] = 0

    for model in (desk.target, source):
        desk.edit_tensors(change, model)
    called = cli(*desk.run("--json", source=source))
    assert called.code == 0, called.err
    report = called.json
    assert None not in report["weights"]["down"]["ratio_transported"]
    found = safetensors.numpy.load_file(desk.out / SINGLE)
    assert all(np.isfinite(one).all() for one in found.values())


def test_model_without_any_signal_in_a_layer_is_fine(desk, cli):
    def change(tensors):
        for name in (GATE, "model.layers.1.mlp.down_proj.weight"):
            tensors[name][:] = 0

    desk.edit_tensors(change)
    called = cli(*desk.run("--json"))
    assert called.code == 0, called.err
    found = safetensors.numpy.load_file(desk.out / SINGLE)
    assert all(np.isfinite(one).all() for one in found.values())


@pytest.mark.catalogue("not-utf8")
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_other_encodings_are_read_when_named(encoding, desk, cli):
    text = desk.write("other.txt", desk.calibration.read_text().encode(encoding, "replace"))
    mark = () if encoding == "utf-8-sig" else ("--encoding", encoding)
    assert cli(*desk.run(*mark, calibration=text)).code == 0


# ---- convergence and --strict ----


def test_solver_that_stops_early_is_a_warning(desk, cli):
    called = cli(*desk.run(preset="paper", max_iterations="1"))
    assert called.code == 0, called.err
    said = [line for line in called.out.splitlines() if line.startswith("warning: ")]
    assert len(said) == 4
    for sentence in said:
        assert "did not converge in 2 of 2 layers" in sentence
        assert "max_iterations" in sentence
    report = report_of(desk.out)
    assert report.warnings == [sentence.removeprefix("warning: ") for sentence in said]
    assert not any(any(weight.converged) for weight in report.weights.values())


def test_an_epsilon_that_float32_kernels_cannot_hold_is_solved_in_log_form(desk, cli):
    """Recorded in the report and in the provenance, for every pair of every site."""
    called = cli(*desk.run(preset="paper", epsilon="1e-5", max_iterations="20"))
    assert called.code == 0, called.err
    provenance = json.loads((desk.out / "ot_merge" / "provenance.json").read_text())
    assert {site.in_log_form for site in report_of(desk.out).sites.values()} == {1.0}
    assert {site["in_log_form"] for site in provenance["transport"].values()} == {1.0}


def test_strict_refuses_a_solver_that_stops_early(desk, cli, everything):
    before = everything()
    called = cli(*desk.run("--strict", "--quiet", preset="paper", max_iterations="1"))
    assert (called.code, called.out) == (5, "")
    assert "did not converge" in called.err
    assert everything() == before


def test_strict_lets_a_good_run_pass(desk, cli):
    assert cli(*desk.run("--strict")).code == 0


# ---- overwriting ----


@pytest.mark.catalogue("existing-output")
def test_overwrite_replaces_the_folder_and_leaves_nothing_else(desk, cli):
    desk.out.mkdir()
    desk.write("out/notes.txt", "mine")
    desk.write("out/consolidated.safetensors", "stale")
    around = {path.name for path in desk.folder.iterdir()}
    called = cli(*desk.run("--overwrite"))
    assert called.code == 0, called.err
    assert not (desk.out / "notes.txt").exists()
    assert not (desk.out / "consolidated.safetensors").exists()
    assert (desk.out / SINGLE).exists()
    assert {path.name for path in desk.folder.iterdir()} == around


def test_overwrite_keeps_the_old_folder_when_the_run_fails(desk, cli, everything):
    desk.out.mkdir()
    desk.write("out/notes.txt", "mine")
    before = everything()
    called = cli(*desk.run("--overwrite", "--strict", preset="paper", max_iterations="1"))
    assert called.code == 5
    assert everything() == before


# ---- a full disk, Ctrl-C: real processes ----


def process(script, *arguments):
    """Starts Python on a script that has imported the command line."""
    head = (
        "import os, resource, signal, sys\n"
        "from ot_merge_jax.cli import main as cli\n"
        "from ot_merge_jax.runs import merge as pipeline\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", head + script, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "XLA_FLAGS": FAST_TO_COMPILE},
    )  # fmt: skip


@pytest.mark.catalogue("disk-full")
def test_full_disk_is_a_resource_error_and_keeps_finished_stages_alone(desk, everything):
    """A limit on the size of files stands in for a full disk, until it is just large enough.

    At the first two nothing can be finished, so nothing is left; at the third the model does not
    fit but the stages before it do, and the last continues with them.
    """
    limits = (
        0,
        4096,
        (desk.target / SINGLE).stat().st_size - 1,
        (desk.target / SINGLE).stat().st_size,
    )
    script = (
        "import pathlib\n"
        # transformers may import torch, whose import writes files
        f"pipeline.tokenizers.load_tokenizer(pathlib.Path({str(desk.target)!r}))\n"
        "hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
        "codes, left = [], []\n"
        f"for limit in {limits}:\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))\n"
        "    more = ['--resume'] if codes else []\n"
        "    try: cli.app([*sys.argv[1:], *more])\n"
        "    except SystemExit as stop: codes.append(stop.code)\n"
        f"    left.append(sorted(os.listdir({str(desk.folder)!r})))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))\n"
        "print([codes, left])\n"
    )
    before = sorted(path.name for path in desk.folder.iterdir())
    inputs = everything()[1], everything()[0]["copy/" + SINGLE]
    started = process(script, *desk.delta(weights="embed", strength="1"), "--quiet")
    out, err = started.communicate(timeout=300)
    codes, left = ast.literal_eval(out.splitlines()[-1])
    assert codes == [4, 4, 4, 0], err
    partial = next(name for name in left[2] if ".partial-" in name)
    assert left == [before, before, sorted([*before, partial]), sorted([*before, "out"])]
    nothing, again, kept = err.splitlines()
    sentence = r"error: The disk is full at .*; "
    for line in (nothing, again):
        assert re.fullmatch(sentence + r"nothing was written\.", line)
    assert re.fullmatch(
        sentence + rf"finished stages are kept in {partial}, continue with: ot-merge .* --resume",
        kept,
    )
    assert (everything()[1], everything()[0]["copy/" + SINGLE]) == inputs


@pytest.fixture
def interrupted(desk, everything):
    """Checks what an interrupt left, continues with the command it printed, checks the rest."""

    def check(before, sentence, cli):
        start = "interrupted; finished stages are kept in "
        assert sentence.startswith(start), sentence
        partial, _, command = sentence.removeprefix(start).partition(", continue with: ")
        now = everything()
        assert now[1] == before[1]
        assert {name for name in now[0] if name.split("/")[0] != partial} == set(before[0])
        program, *words = shlex.split(command)
        assert (program, words[-1]) == ("ot-merge", "--resume")
        assert cli(*words).code == 0
        names = {path.name for path in desk.folder.iterdir()}
        assert names == {name for name in before[0] if "/" not in name} | {"out"}

    return check


def test_interrupt_when_the_folder_is_nearly_done(desk, everything, cli, monkeypatch, interrupted):
    """SIGINT, as from Ctrl-C, while everything but the report lies in the partial folder."""

    def stopped(*a, **k):
        assert list(desk.folder.glob("out.partial-*/model/*.safetensors"))
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    before = everything()
    with monkeypatch.context() as patch:
        patch.setattr(merge, "_evaluate", stopped)
        called = cli(*desk.run("--quiet"))
    assert (called.code, called.out) == (130, "")
    [sentence] = called.err.splitlines()
    interrupted(before, sentence, cli)


@pytest.mark.catalogue("signals")
def test_interrupt_before_anything_is_finished(desk, everything, cli, monkeypatch):
    def stopped(*a, **k):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    before = everything()
    monkeypatch.setattr(merge, "_load", stopped)
    called = cli(*desk.run("--quiet"))
    assert (called.code, called.out) == (130, "")
    assert called.err.splitlines() == ["interrupted; nothing was written."]
    assert everything() == before


@pytest.mark.catalogue("signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_interrupt_from_outside(desk, everything, number, cli, interrupted):
    """A signal that another process sends while the tool works, once a stage is finished."""
    before = everything()
    script = (
        "import time\n"
        "load, loaded = pipeline._load, []\n"
        "def slow(*a):\n"
        "    loaded.append(a)\n"
        # the target's activations are there, and the source base is read
        "    if len(loaded) == 2:\n"
        "        print('ready', file=sys.stderr, flush=True)\n"
        "        time.sleep(300)\n"
        "    return load(*a)\n"
        "pipeline._load = slow\n"
        "cli.main()\n"
    )
    started = process(script, *desk.delta(weights="up,embed", strength="1"))
    assert "ready\n" in iter(started.stderr.readline, "")
    started.send_signal(number)
    out, err = started.communicate(timeout=300)
    assert started.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    interrupted(before, err.splitlines()[-1], cli)


@pytest.mark.catalogue("existing-output")
def test_second_run_to_the_same_folder_is_refused(desk, everything, cli):
    before = everything()
    with atomic.locked(desk.out):
        called = cli(*desk.run("--quiet"))
    assert (called.code, called.out) == (3, "")
    [sentence] = called.err.splitlines()
    assert sentence.startswith("error: Another run, process ")
    assert f"process {os.getpid()} on {os.uname().nodename}," in sentence
    assert everything() == before
