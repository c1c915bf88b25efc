"""The one mechanism of resuming: what is finished is used, what is damaged never."""

import errno
import logging
import shutil

import pytest

from ot_merge_jax.errors import InputError, ResourceError
from ot_merge_jax.runs import stages

KEY = "0123abcd"


class Killed(BaseException):
    """Stands in for kill -9: nothing but the state on disk may matter afterwards."""


class Work:
    """Three stages: ``b`` needs ``a``; ``c`` stands alone and shares the published folder."""

    def __init__(self, folder):
        self.out, self.made = folder / "out", []

    @property
    def partial(self):
        return self.out.with_name(f"out.partial-{KEY}")

    def run(self, *, until=None, key=KEY, **settings):
        """Runs the stages; ``until`` is an error raised before the last one."""
        self.made = []

        def maker(name, *files):
            def make(folder):
                self.made.append(name)
                for file in files:
                    (folder / file).parent.mkdir(exist_ok=True)
                    (folder / file).write_text(f"{name} made {file}")

            return make

        def reader(*files):
            return lambda folder: [(folder / file).read_text() for file in files]

        with stages.run_folder(self.out, key, command="ot-merge x", **settings) as run:
            a = stages.stage(run, "a", maker("a", "1.txt", "2.txt"), reader("1.txt", "2.txt"))
            b = stages.stage(
                run, "b", maker("b", "w.txt"), reader("w.txt"), needs=["a"], folder="model"
            )
            if until is not None:
                raise until
            c = stages.stage(run, "c", maker("c", "sub/r.txt"), reader("sub/r.txt"), folder="model")
        assert [*a, *b, *c] == ["a made 1.txt", "a made 2.txt", "b made w.txt", "c made sub/r.txt"]


@pytest.fixture
def work(tmp_path):
    return Work(tmp_path)


@pytest.fixture
def half(work):
    """The same after a kill: ``a`` and ``b`` are finished."""
    with pytest.raises(Killed):
        work.run(until=Killed())
    return work


@pytest.fixture
def dies_at(monkeypatch):
    """``dies_at(name)``: the next run dies at that commit point; None: it does not."""

    def choose(name):
        def point(here):
            if here == name:
                raise Killed

        monkeypatch.setattr(stages, "_commit_point", point)

    return choose


def whole(work):
    """Whether ``out`` holds what the stages say, and nothing else is left."""
    found = {
        path.relative_to(work.out).as_posix(): path.read_text()
        for path in work.out.rglob("*")
        if path.is_file()
    }
    assert found == {"w.txt": "b made w.txt", "sub/r.txt": "c made sub/r.txt"}
    return [path.name for path in work.out.parent.iterdir()] == ["out"]


def test_straight_run_publishes_the_model_folder_alone(work):
    work.run()
    assert work.made == ["a", "b", "c"]
    assert whole(work)


def test_finished_stages_are_not_made_again(half):
    half.run(resume=True)
    assert half.made == ["c"]
    assert whole(half)


def test_without_resume_the_run_starts_afresh(half):
    half.run()
    assert half.made == ["a", "b", "c"]
    assert whole(half)


def test_resume_of_nothing_says_so_and_runs(work, caplog):
    with caplog.at_level(logging.INFO):
        work.run(resume=True)
    assert "there is nothing to resume" in caplog.text
    assert whole(work)


def flip(path, place=0):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def to_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [flip, cut, to_folder, lambda path: path.unlink()])
@pytest.mark.parametrize(
    ("file", "again"), [("state/a/2.txt", ["a", "b", "c"]), ("model/w.txt", ["b", "c"])]
)
def test_damage_is_redone_with_all_that_depends_on_it(damage, file, again, half, caplog):
    damage(half.partial / file)
    half.run(resume=True)
    assert half.made == again
    assert whole(half)
    [line] = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert file in line
    assert f"done again: {', '.join(again[:-1])}" in line


def test_what_does_not_depend_on_the_damage_is_kept(work, dies_at):
    dies_at("before publish")
    with pytest.raises(Killed):
        work.run()
    dies_at(None)
    flip(work.partial / "state/a/1.txt")
    work.run(resume=True)
    assert work.made == ["a", "b"]
    assert whole(work)


def test_every_byte_of_the_manifest_counts(half, tmp_path):
    """Whatever one byte of it becomes, the result is right; nothing wrong is ever believed."""
    size = len((half.partial / "manifest.json").read_bytes())
    shutil.copytree(half.partial, tmp_path / "kept")
    for place in range(0, size, 23):
        shutil.rmtree(half.partial, ignore_errors=True)
        shutil.rmtree(half.out, ignore_errors=True)
        shutil.copytree(tmp_path / "kept", half.partial)
        flip(half.partial / "manifest.json", place)
        half.run(resume=True)
        assert half.made in (["a", "b", "c"], ["c"])  # the latter for white space
        whole(half)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1", b'{"sha256": "0", "stages": []}', b"\xff"])
def test_damaged_manifest_starts_anew(content, half, caplog):
    (half.partial / "manifest.json").write_bytes(content)
    half.run(resume=True)
    assert half.made == ["a", "b", "c"]
    assert whole(half)
    assert "manifest.json is damaged" in caplog.text


def test_leftovers_of_an_unfinished_stage_are_never_published(half):
    (half.partial / "model" / "sub" / "deep").mkdir(parents=True)
    (half.partial / "model" / "sub" / "half.txt").write_text("half")
    half.run(resume=True)
    assert whole(half)
    assert not (half.out / "sub" / "deep").exists()


def test_links_in_the_state_are_not_followed(half, tmp_path):
    """A run folder is untrusted: what it links to outside is neither used nor deleted."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (half.partial / "state" / "link").symlink_to(tmp_path / "mine")
    (half.partial / "state" / "file").symlink_to(tmp_path / "mine" / "notes.txt")
    half.run(resume=True)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_other_keys_are_mentioned_and_left(half, caplog):
    with caplog.at_level(logging.INFO):
        half.run(key="ffffffff", resume=True)
    assert half.made == ["a", "b", "c"]
    [line] = [one.getMessage() for one in caplog.records if "have left" in one.getMessage()]
    assert half.partial.name in line
    assert half.partial.exists()


# ---- deaths ----


POINTS = [f"{side} {stage}" for stage in ("a", "b", "c", "publish") for side in ("before", "after")]


@pytest.mark.parametrize("place", POINTS[:-1])
def test_kill_at_every_commit_point(place, work, dies_at):
    dies_at(place)
    with pytest.raises(Killed):
        work.run()
    assert not work.out.exists()
    dies_at(None)
    work.run(resume=True)
    done = POINTS.index(place) + 1  # a stage is finished from its "after" on
    assert work.made == ["a", "b", "c"][done // 2 :]
    assert whole(work)


def test_kill_after_publishing_leaves_the_whole_folder(work, dies_at):
    dies_at("after publish")
    with pytest.raises(Killed):
        work.run()
    assert not whole(work)  # the state is still beside it
    stages.clear(work.out, KEY)
    assert whole(work)


@pytest.mark.catalogue("kill-and-resume")
def test_kill_between_the_two_renames_brings_the_old_folder_back(half):
    """What `--overwrite` moved aside is there again, whatever the next run does."""
    half.out.with_name(f"out.replaced-{KEY}").mkdir()
    (half.out.with_name(f"out.replaced-{KEY}") / "old.txt").write_text("old")
    with pytest.raises(InputError, match="--overwrite"):
        half.run(resume=True)
    assert (half.out / "old.txt").read_text() == "old"
    half.run(resume=True, overwrite=True)
    assert half.made == ["c"]
    assert whole(half)


# ---- errors ----


@pytest.mark.parametrize("error", [ValueError("bug"), InputError("bad."), OSError(errno.EIO, "io")])
def test_other_errors_leave_nothing(error, work):
    with pytest.raises(type(error)):
        work.run(until=error)
    assert list(work.out.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "kind", "start"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, "interrupted; "),
        (OSError(errno.ENOSPC, "No space"), ResourceError, "The disk is full at "),
        (MemoryError(), ResourceError, "The memory is full; "),
        (ResourceError("Too large."), ResourceError, "Too large"),
    ],
)
@pytest.mark.parametrize("keep", [True, False])
def test_interrupts_and_lack_of_room_keep_the_stages_and_say_so(keep, error, kind, start, work):
    with pytest.raises(kind) as caught:
        work.run(until=error, keep=keep)
    said = str(caught.value)
    assert said.startswith(start)
    assert work.partial.exists() is keep
    if keep:
        kept = f"finished stages are kept in {work.partial.name}"
        assert said.endswith(f"; {kept}, continue with: ot-merge x --resume")
        work.run(resume=True)
        assert work.made == ["c"]
    elif not isinstance(error, ResourceError):
        assert said.endswith("; nothing was written.")


def test_nothing_is_kept_when_nothing_is_finished(work):
    with (
        pytest.raises(KeyboardInterrupt, match=r"^interrupted; nothing was written\.$"),
        stages.run_folder(work.out, KEY, command="x"),
    ):
        raise KeyboardInterrupt
    assert list(work.out.parent.iterdir()) == []


def test_interrupt_while_the_state_is_checked_keeps_it(half, monkeypatch):
    def stopped(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages.provenance, "sha256", stopped)
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            half.run(resume=True)
    half.run(resume=True)
    assert half.made == ["c"]


def test_key_changes_with_every_part():
    parts = {"recipe": "a: 1", "versions": ["1", "2"], "inputs": {"target": {"x": "00"}}}
    keys = {
        stages.key(parts),
        stages.key(parts | {"recipe": "a: 2"}),
        stages.key(parts | {"versions": ["1", "3"]}),
        stages.key(parts | {"inputs": {"target": {"x": "01"}}}),
    }
    assert len(keys) == 4
    assert stages.key(dict(reversed(parts.items()))) == stages.key(parts)
