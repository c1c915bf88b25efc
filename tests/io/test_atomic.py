"""A published folder is whole or absent, whatever happens in between."""

import errno
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ot_merge_jax.errors import InputError, ResourceError
from ot_merge_jax.io import atomic
from ot_merge_jax.io.atomic import atomic_folder, check_output, locked


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class Stop(Exception):
    """Whatever goes wrong in the middle of the work."""


# ---- atomic_folder ----


def test_success_publishes_everything_and_nothing_else(tmp_path):
    with atomic_folder(tmp_path / "out") as partial:
        assert not (tmp_path / "out").exists()
        assert partial.parent == tmp_path
        assert re.fullmatch(r"out\.partial-[0-9a-f]+", partial.name)
        (partial / "deep" / "er").mkdir(parents=True)
        (partial / "deep" / "er" / "a.txt").write_text("whole")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "deep" / "er" / "a.txt").read_text() == "whole"


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, SystemExit, OSError, MemoryError])
def test_failure_leaves_nothing_and_passes_the_error_on(error, tmp_path):
    with pytest.raises(error), atomic_folder(tmp_path / "out") as partial:
        (partial / "a.txt").write_text("half")
        raise error
    assert names(tmp_path) == []


def test_failure_leaves_no_parents_either(tmp_path):
    with pytest.raises(Stop), atomic_folder(tmp_path / "new" / "deeper" / "out"):
        raise Stop
    assert names(tmp_path) == []


def test_parents_are_made(tmp_path):
    with atomic_folder(tmp_path / "new" / "deeper" / "out") as partial:
        (partial / "a.txt").write_text("whole")
    assert names(tmp_path / "new" / "deeper") == ["out"]


def test_folder_mode_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "out"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


def test_everything_is_flushed_before_the_rename(tmp_path, monkeypatch):
    """A crash after the rename must not find empty files: fsync of each file and folder comes
    first.
    """
    done = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(handle):
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def noted_rename(self, target):
        done.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    with atomic_folder(tmp_path / "out") as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "a.txt").write_text("x")
    before = done[: done.index("rename")]
    assert {"a.txt", "sub", partial.name} <= set(before)


# ---- overwrite ----


@pytest.fixture
def old(tmp_path):
    """An output folder of an earlier run."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    return tmp_path / "out"


def test_existing_folder_is_refused_and_unchanged(old, tmp_path):
    with pytest.raises(InputError, match=r"not empty.*--overwrite"), atomic_folder(old):
        pytest.fail("the block must not run")
    assert names(tmp_path) == ["out"]
    assert (old / "old.txt").read_text() == "old"


def test_existing_empty_folder_is_used(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as partial:
        (partial / "a.txt").write_text("whole")
    assert names(tmp_path / "out") == ["a.txt"]
    assert names(tmp_path) == ["out"]


def test_overwrite_replaces_whole_and_keeps_the_old_until_then(old, tmp_path):
    with atomic_folder(old, overwrite=True) as partial:
        (partial / "new.txt").write_text("new")
        assert (old / "old.txt").read_text() == "old"
    assert names(old) == ["new.txt"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, OSError])
def test_failed_overwrite_keeps_the_old(error, old, tmp_path):
    with pytest.raises(error), atomic_folder(old, overwrite=True) as partial:
        (partial / "new.txt").write_text("new")
        raise error
    assert names(tmp_path) == ["out"]
    assert names(old) == ["old.txt"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), KeyboardInterrupt()])
def test_failure_between_the_two_renames_brings_the_old_back(error, old, tmp_path, monkeypatch):
    """The old folder has been moved aside, the new one is not there yet."""
    rename = Path.rename

    def failing(self, target):
        if ".partial-" in self.name:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(type(error)), atomic_folder(old, overwrite=True) as partial:
        (partial / "new.txt").write_text("new")
    assert names(tmp_path) == ["out"]
    assert names(old) == ["old.txt"]


# ---- full disk ----


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_is_a_resource_error(code, tmp_path):
    with (
        pytest.raises(ResourceError, match=f"disk is full.*{os.strerror(code)}"),
        atomic_folder(tmp_path / "out") as partial,
    ):
        (partial / "a.txt").write_text("half")
        raise OSError(code, os.strerror(code))
    assert names(tmp_path) == []


def test_other_system_errors_are_not_called_a_full_disk(tmp_path):
    with pytest.raises(PermissionError), atomic_folder(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "no")
    assert names(tmp_path) == []


@pytest.mark.catalogue("disk-full")
@pytest.mark.parametrize("limit", [1, 4096, 10_000])
def test_file_size_limit_stands_in_for_a_full_disk(limit, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with (
            pytest.raises(ResourceError, match="disk is full"),
            atomic_folder(tmp_path / "out") as partial,
        ):
            (partial / "fits.txt").write_bytes(b"")
            (partial / "large.bin").write_bytes(b"x" * 20_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


@pytest.mark.parametrize("limit", [1, 4096])
def test_full_disk_while_overwriting_keeps_the_old(limit, old, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(ResourceError), atomic_folder(old, overwrite=True) as partial:
            (partial / "large.bin").write_bytes(b"x" * 20_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["out"]
    assert (old / "old.txt").read_text() == "old"


def test_killed_process_leaves_no_output(tmp_path):
    """Not even Python gets a last word: OUT is absent, only the partial folder remains."""
    code = f"""
        import os, pathlib, signal
        from ot_merge_jax.io.atomic import atomic_folder
        with atomic_folder(pathlib.Path({str(tmp_path)!r}) / "out") as partial:
            (partial / "a.txt").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert all(name.startswith("out.partial-") for name in names(tmp_path))


# ---- check_output ----


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


@pytest.mark.catalogue("bad-output")
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("out", "needle"),
    [
        ("model", "is also an input"),
        ("model/", "is also an input"),
        ("sub/../model", "is also an input"),
        ("model/out", "lies inside the input"),
        ("model/a/b/out", "lies inside the input"),
        (".", "contains the input"),
        ("alias", "is also an input"),
        ("alias/out", "lies inside the input"),
    ],
)
def test_output_that_touches_an_input_is_refused(out, needle, overwrite, model, tmp_path):
    """--overwrite does not help: it would delete what is being read."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "alias").symlink_to(model)
    with pytest.raises(InputError, match=f"{needle}.*choose another"):
        check_output(tmp_path / out, inputs=[model], overwrite=overwrite)
    assert names(model) == ["config.json"]


def test_any_of_several_inputs_counts(model, tmp_path):
    text = tmp_path / "texts.txt"
    text.write_text("a")
    with pytest.raises(InputError, match="is also an input"):
        check_output(model, inputs=[text, model], overwrite=True)
    with pytest.raises(InputError, match=r"also an input"):
        check_output(text, inputs=[model, text], overwrite=True)


def test_neighbour_with_a_longer_name_is_allowed(model, tmp_path):
    """model-merged is not inside model."""
    check_output(tmp_path / "model-merged", inputs=[model])


@pytest.mark.catalogue("bad-output")
@pytest.mark.parametrize("overwrite", [False, True])
def test_output_that_is_a_file_is_refused(overwrite, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        check_output(tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.catalogue("bad-output")
def test_output_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="cannot be created"):
        check_output(tmp_path / "file" / "out")


@pytest.mark.parametrize("depth", ["out", "new/deeper/out"])
def test_unwritable_parent_is_refused_by_name(depth, tmp_path, monkeypatch):
    """Access is simulated: the tests may run as root, who may write anywhere."""
    asked = []

    def denied(path, mode):
        asked.append((Path(path), mode))
        return False

    monkeypatch.setattr(atomic.os, "access", denied)
    with pytest.raises(InputError, match=f"{re.escape(str(tmp_path))} is not writable"):
        check_output(tmp_path / depth)
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_parent_is_refused_for_real(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="is not writable"):
        check_output(tmp_path / "out")


@pytest.mark.catalogue("odd-output-names")
@pytest.mark.parametrize(
    "name", ["with space", "ümlaut-模型", "new\nline", "-dash", "a.b.c", "x" * 200]
)
def test_odd_names_work(name, tmp_path):
    with atomic_folder(tmp_path / name) as partial:
        (partial / "a.txt").write_text("whole")
    assert names(tmp_path) == [name]


@pytest.mark.catalogue("odd-output-names")
@pytest.mark.parametrize("length", [240, 255, 300, 5000])
def test_name_too_long_is_an_input_error(length, tmp_path):
    """The partial folder's name is longer than the output's, so 240 is too long already."""
    with pytest.raises(InputError, match="too long"), atomic_folder(tmp_path / ("x" * length)):
        pass
    assert names(tmp_path) == []


def test_check_writes_nothing(tmp_path):
    check_output(tmp_path / "new" / "out", inputs=[tmp_path / "elsewhere"])
    assert names(tmp_path) == []


# ---- locked ----


def test_lock_names_host_and_process_and_is_gone_at_the_end(tmp_path):
    with locked(tmp_path / "out"):
        who = f"process {os.getpid()} on {os.uname().nodename}"
        with pytest.raises(InputError, match=who), locked(tmp_path / "out"):
            pytest.fail("two runs at once")
        with locked(tmp_path / "other"):
            pass
    assert names(tmp_path) == []
    with locked(tmp_path / "out"):
        pass


@pytest.mark.catalogue("locks")
def test_lock_of_a_process_that_was_killed_is_no_obstacle(tmp_path):
    script = (
        "import pathlib, sys\n"
        "from ot_merge_jax.io.atomic import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"process {other.pid} on"), locked(tmp_path / "out"):
            pytest.fail("two runs at once")
        other.kill()
    assert names(tmp_path) == ["out.ot-merge.lock"]
    with locked(tmp_path / "out"):
        pass
    assert names(tmp_path) == []


def test_lock_makes_and_removes_parents(tmp_path):
    with pytest.raises(Stop), locked(tmp_path / "new" / "deeper" / "out"):
        assert names(tmp_path / "new" / "deeper") == ["out.ot-merge.lock"]
        raise Stop
    assert names(tmp_path) == []
