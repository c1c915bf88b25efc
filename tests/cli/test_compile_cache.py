"""Compiled programs on disk: used again, healed where they are truncated, and never in the way."""

import json
import os
import subprocess
import sys
import zlib

import numpy as np
import pytest

from ot_merge_jax.cli import compile_cache

#: With which the tests have a cache of their own.
OF_THE_TESTS = (
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES",
)
WHOLE = zlib.compress(np.random.default_rng(0).bytes(3000))
#: A run in a process of its own: the bits of a number, and how many entries it read and wrote.
RUN = """
import logging, sys
logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, format="%(name)s %(message)s")
for name in ("jax", "asyncio"):
    logging.getLogger(name).setLevel(logging.ERROR)
import jax
from jax._src import monitoring
from ot_merge_jax.cli import compile_cache
hits = []
monitoring.register_event_listener(lambda name, **_: hits.append(name))
compile_cache.enable(is_wanted="off" not in sys.argv)
if "damage" in sys.argv:  # behind the back of the check, as another process that is writing does
    for file in compile_cache.folder().glob("*-cache"):
        file.write_bytes(file.read_bytes()[:100])
value = jax.jit(lambda x: jax.numpy.sin(x).sum() ** 2)(jax.numpy.linspace(0.0, 1.0, 77))
print(float(value).hex(), sum("cache_hits" in name for name in hits))
"""


@pytest.fixture
def run(tmp_path):
    """``run(*words, **environment)`` -> (the number, entries read, standard error)."""

    def go(*words, **environment):
        own = {"XDG_CACHE_HOME": str(tmp_path)}
        tests = {key: one for key, one in os.environ.items() if key not in OF_THE_TESTS}
        done = subprocess.run(
            [sys.executable, "-c", RUN, *words], env=tests | own | environment,
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        value, hits = done.stdout.split()
        return value, int(hits), done.stderr

    return go


def entries(folder):
    return {file: file.stat().st_size for file in sorted(folder.rglob("*-cache"))}


def test_second_run_reads_what_the_first_compiled_and_finds_the_same(run, tmp_path):
    plain, hits, _ = run("off")
    assert hits == 0
    assert entries(tmp_path) == {}
    first, hits, stderr = run()
    made = entries(tmp_path)
    assert (first, hits, stderr) == (plain, 0, "")
    assert made
    second, hits, stderr = run()
    assert (second, hits, stderr) == (plain, len(made), "")
    assert {file.parent.stat().st_mode & 0o777 for file in made} == {0o700}

    # as a run leaves them that was killed while it wrote: removed, and compiled again
    for file, size in made.items():
        os.truncate(file, size // 2)
    third, hits, stderr = run()
    assert (third, hits) == (plain, 0)
    assert len(stderr.splitlines()) == len(made)
    assert "is not whole" in stderr
    assert entries(tmp_path).keys() == made.keys()
    assert run() == (plain, len(made), "")

    # as a run sees them that reads while another writes: a miss without a word
    assert run("damage") == (plain, 0, "")
    assert run()[:2] == (plain, 0)
    assert run() == (plain, len(made), "")
    assert entries(tmp_path).keys() == made.keys()


def test_folder_that_cannot_be_made_is_one_line_of_debugging(run, tmp_path):
    (tmp_path / "file").touch()
    _, hits, stderr = run(XDG_CACHE_HOME=str(tmp_path / "file"))
    assert hits == 0
    [line] = stderr.splitlines()
    assert "compiled programs are not kept" in line


def test_folder_of_the_user_is_taken_as_it_is(run, tmp_path):
    own = tmp_path / "own"
    run(JAX_COMPILATION_CACHE_DIR=str(own), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1")  # fmt: skip
    assert entries(own)
    assert not (tmp_path / "ot_merge_jax").exists()


@pytest.mark.parametrize("length", [0, 1, 2, 100, len(WHOLE) // 2, len(WHOLE) - 1])
def test_truncated_entry_is_removed(length, tmp_path):
    for name, content in {"whole": WHOLE, "cut": WHOLE[:length]}.items():
        (tmp_path / f"{name}-cache").write_bytes(content)
    compile_cache.tidy(tmp_path)
    assert [file.name for file in entries(tmp_path)] == ["whole-cache"]


def test_entries_are_checked_once(tmp_path, monkeypatch):
    seen = []
    own = compile_cache._is_whole

    def is_whole(entry):
        seen.append(entry)
        return own(entry)

    monkeypatch.setattr(compile_cache, "_is_whole", is_whole)
    (tmp_path / "a-cache").write_bytes(WHOLE)
    compile_cache.tidy(tmp_path)
    (tmp_path / "b-cache").write_bytes(WHOLE)
    compile_cache.tidy(tmp_path)
    assert len(seen) == 2
    (tmp_path / "a-cache").write_bytes(WHOLE[:-1])
    compile_cache.tidy(tmp_path)
    assert [file.name for file in entries(tmp_path)] == ["b-cache"]
    (tmp_path / "checked.json").write_text("[" * 10)
    compile_cache.tidy(tmp_path)
    assert json.loads((tmp_path / "checked.json").read_text()).keys() == {"b-cache"}
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["b-cache", "checked.json"]


def test_oldest_entries_make_room(tmp_path):
    for age, name in enumerate("abcd"):
        file = tmp_path / f"{name}-cache"
        file.write_bytes(WHOLE)
        os.utime(file, (1e9 - age, 1e9 - age))
    compile_cache.tidy(tmp_path, max_bytes=2 * len(WHOLE))
    assert [file.name for file in entries(tmp_path)] == ["a-cache", "b-cache"]


def test_tests_leave_the_cache_of_the_user_alone():
    import jax

    before = jax.config.values["jax_compilation_cache_dir"]
    compile_cache.enable()
    assert jax.config.values["jax_compilation_cache_dir"] == before
    assert before not in (None, str(compile_cache.folder()))
