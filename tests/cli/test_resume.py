"""Real processes that are killed with SIGKILL, and `ot-merge run --resume` after them."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from desk import Desk
from published import files_of, of_a_later_version


@pytest.fixture
def desk(tmp_path, models, text_files):
    return Desk(tmp_path, models, text_files)


@pytest.fixture
def words(desk):
    """A run with every stage."""
    return desk.delta(weights="up,embed", strength="auto", eval_text=desk.heldout)


def started(words, **environment):
    """``ot-merge`` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "ot_merge_jax.cli.main", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip


@pytest.fixture
def straight(desk, words, cli):
    """What an uninterrupted run in this process publishes, moved out of the way."""
    called = cli(*words)
    assert called.code == 0, called.err
    found = files_of(desk.out)
    desk.out.rename(desk.folder / "straight")
    return found


@pytest.mark.catalogue("kill-and-resume")
def test_killed_process_is_resumed_with_the_same_bytes(desk, words, straight, cli):
    around = {path.name for path in desk.folder.iterdir()}
    killed = started(words, OT_MERGE_CRASH_AT="after moved")
    out, err = killed.communicate(timeout=300)
    assert killed.returncode == 137, err
    assert out == ""
    left = {path.name for path in desk.folder.iterdir()} - around
    [partial] = [name for name in left if name.startswith("out.partial-")]
    assert left == {partial, "out.ot-merge.lock"}
    called = cli(*words, "--resume")
    assert called.code == 0, called.err
    assert "resume: taken from" in called.err
    assert {path.name for path in desk.folder.iterdir()} == around | {"out"}
    assert files_of(desk.out) == straight
    again = cli(*words, "--resume", "--json")
    assert again.code == 0, again.err
    assert again.out.encode() == straight["ot_merge/report.json"]
    # a later program wrote the report: it is neither the result nor in the way
    of_a_later_version(desk.out)
    before = files_of(desk.out)
    refused = cli(*words, "--resume", "--json")
    assert (refused.code, refused.out) == (3, "")
    assert "report.json is a report of version 2" in refused.err.splitlines()[-1]
    assert files_of(desk.out) == before
    called = cli(*words, "--overwrite")
    assert called.code == 0, called.err
    assert files_of(desk.out)["ot_merge/report.json"] == straight["ot_merge/report.json"]


@pytest.mark.catalogue("kill-and-resume")
@pytest.mark.slow
@pytest.mark.usefixtures("every_plot")  # the processes draw them
def test_kill_at_twenty_random_moments(desk, words, straight):
    """Each time the run goes on a little; in between it is killed at any moment of its life."""
    rng = random.Random(20)
    kills, longest = 0, 0.0
    while kills < 20:
        running, began = started([*words, "--resume"]), time.monotonic()
        try:
            # the first one runs to its end, to know how long that takes
            _, err = running.communicate(timeout=rng.uniform(0.05, 0.7) * longest or 300)
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGKILL)
            running.communicate(timeout=60)
            kills += 1
            assert not desk.out.exists() or files_of(desk.out) == straight
            continue
        assert running.returncode == 0, err
        longest = longest or time.monotonic() - began
        assert files_of(desk.out) == straight
        shutil.rmtree(desk.out)  # and once more from the start
    ended = started([*words, "--resume"])
    _, err = ended.communicate(timeout=300)
    assert ended.returncode == 0, err
    assert files_of(desk.out) == straight
