"""`ot-merge plan`: what it says is what a run does, and it refuses what a run could not finish."""

import inspect
import shutil
from collections import namedtuple

import jax
import numpy as np
import pytest

from ot_merge_jax.cli.plan import plan
from ot_merge_jax.cli.run import run
from ot_merge_jax.errors import InputError
from ot_merge_jax.io import arrays
from ot_merge_jax.runs import merge

NAME = "paper llama<-qwen2"


def test_it_takes_the_flags_of_run():
    of_run, of_plan = (set(inspect.signature(one).parameters) for one in (run, plan))
    assert of_run - of_plan == {"resume", "strict", "mesh", "no_compile_cache"}
    assert of_plan <= of_run


def test_disk_is_what_a_run_has_made(desk, cli, monkeypatch):
    """To the byte, but for the headers of files; and the plan itself writes nothing."""
    out, made = desk.out, {}
    words = desk.run("--weights", "v", "--json", preset="paper", source=desk.models["qwen2-source"])
    before = sorted(out.parent.iterdir())
    planned = cli("plan", *words[1:])
    assert planned.code == 0, planned.err
    assert sorted(out.parent.iterdir()) == before

    def measure(*_, **__):
        [folder] = out.parent.glob("out.partial-*")
        state, model = folder / "state", folder / "model"
        rows = [path for path in state.glob("*/*.npy") if path.stem != "row_id"]
        made["activations"] = sum(np.load(path, mmap_mode="r").nbytes for path in rows)
        made["moved"] = (state / "moved" / "moved" / "arrays.safetensors").stat().st_size
        made["model"] = (model / "model.safetensors").stat().st_size
        leaves = jax.tree.leaves(arrays.load_coupling(state / "coupling"))
        made["coupling"] = sum(leaf.nbytes for leaf in leaves)
        raise InputError("Seen.")  # scores and controls would follow

    monkeypatch.setattr(merge, "_silent", measure)
    assert cli(*words).err.endswith("error: Seen.\n")
    said = planned.json["disk"]["parts"]
    assert said["activations"] == made["activations"] > 0
    # converged and used_log_domain of each problem are bytes and not words; and it is published
    # once more
    spare = 6 * planned.json["transport"]["neuron_problems"]
    assert said["coupling"] == 2 * (made["coupling"] + spare)
    assert 0 <= made["moved"] - said["transported weights"] < 2000
    assert 0 <= made["model"] - said["model"] < 10_000
    assert planned.json["disk"]["needed"] == sum(said.values())


def test_every_further_seed_needs_its_own_activations(calls, cli):
    parts = [
        cli("plan", *calls[NAME][1:], "--seeds", seeds, "--json").json["disk"]["parts"]
        for seeds in (1, 2, 3)
    ]
    once = parts[1]["activations"] - parts[0]["activations"]
    assert parts[2]["activations"] - parts[1]["activations"] == once > 0
    assert parts[1]["transported weights"] == 2 * parts[0]["transported weights"]
    assert parts[1]["model"] == parts[0]["model"]


def test_it_is_said_in_words(calls, cli):
    called = cli("plan", *calls[NAME][1:], columns=200)
    assert called.code == 0, called.err
    for words in ("strength: 0.1", "memory: about", "disk: about", "6 of layers",
                  "time: not estimated"):  # fmt: skip
        assert words in called.out


def test_too_little_memory_is_refused_with_what_is_needed(calls, cli):
    called = cli("plan", *calls[NAME][1:], "--memory-limit", "0.1GiB", "--json")
    assert called.code == 4
    assert called.out == ""
    assert "needs about 0.7 GiB" in called.err
    assert "allows 0.1 GiB" in called.err


def test_too_little_disk_is_refused_with_what_is_needed(calls, cli, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000, 0, 1000))
    called = cli("plan", *calls[NAME][1:], "--json")
    assert called.code == 4
    assert called.out == ""
    assert "of disk (activations" in called.err
    assert "0.0 GiB are free" in called.err


@pytest.mark.parametrize("flag", ["--out", "--target"])
def test_what_a_run_would_refuse_is_refused(flag, calls, cli, models):
    """An output that is an input, a model that is not there."""
    wrong = {"--out": models["llama-target"], "--target": "nowhere"}[flag]
    called = cli("plan", *calls[NAME][1:], flag, wrong)
    assert called.code == 3
    assert called.out == ""
