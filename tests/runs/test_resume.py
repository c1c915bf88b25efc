"""A merge that dies at any commit point, or whose state is damaged, publishes the same bytes."""

import logging
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from published import files_of

from ot_merge_jax import errors
from ot_merge_jax.evaluation import nll
from ot_merge_jax.experiments import sweep
from ot_merge_jax.io import arrays, hf
from ot_merge_jax.merging import merge as merge_params
from ot_merge_jax.models import gather
from ot_merge_jax.recipes import loading
from ot_merge_jax.runs import artifacts, merge, stages
from ot_merge_jax.runs import inputs as run_inputs
from ot_merge_jax.transport import coupling

SIZES = {"hidden": 16, "heads": 2, "kv_heads": 1, "intermediate": 24, "layers": 2}
OTHER = {"hidden": 20, "heads": 2, "kv_heads": 1, "intermediate": 32, "layers": 3}
STAGES = [
    "rows-target", "rows-source", "coupling", "moved", "sweep", "model", "unseen-target",
    "unseen-source", "sites", "evaluation", "divergence", "arm-permuted", "samples", "details",
]  # fmt: skip
POINTS = [f"{side} {stage}" for stage in (*STAGES, "publish") for side in ("before", "after")]


class Killed(BaseException):
    """Stands in for kill -9."""


@pytest.fixture(scope="module")
def resolved(tiny_checkpoint, tmp_path_factory):
    """A recipe with every stage: projections and vocabulary, a chosen strength, held-out text."""
    folder = tmp_path_factory.mktemp("texts")
    # as many held-out documents as there are in the dev split: one shape of batch less to compile
    for name, word, count in (("calibration", "river", 40), ("heldout", "market", 8)):
        lines = [f"the {word} {number:02d}\n" for number in range(count)]
        (folder / f"{name}.txt").write_text("".join(lines))
    return loading.resolve(
        {
            "preset": "delta",
            "weights": ["up", "embed"],
            "target": str(tiny_checkpoint("llama", seed=5, **SIZES)),
            "source": str(tiny_checkpoint("llama", seed=6, drift=0.1, **OTHER)),
            "source_base": str(tiny_checkpoint("llama", seed=6, **OTHER)),
            "calibration": str(folder / "calibration.txt"),
            "evaluation": str(folder / "heldout.txt"),
            "controls": ["permuted"],
            "continuations": 1,
        }
    )


class Straight(NamedTuple):
    """An uninterrupted run: its result, its files, and its state just before it was published."""

    result: merge.RunResult
    files: dict
    state: Path


@pytest.fixture(scope="module")
def uninterrupted(resolved, tmp_path_factory):
    """`Straight`; the state is shared, so copy it."""
    folder, seen = tmp_path_factory.mktemp("straight"), []

    def point(name):
        seen.append(name)
        if name == "before publish":
            [partial] = folder.glob("out.partial-*")
            shutil.copytree(partial, folder / "kept" / partial.name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "_commit_point", point)
        result = merge.run(resolved, folder / "out", command="test")
    assert seen == POINTS
    [state] = (folder / "kept").iterdir()
    return Straight(result, files_of(folder / "out"), state)


@pytest.fixture(scope="module")
def straight(uninterrupted):
    """What an uninterrupted run publishes."""
    return uninterrupted.files


@pytest.fixture
def state(uninterrupted, out):
    """The run folder of a run that died just before it published."""
    return Path(shutil.copytree(uninterrupted.state, out.with_name(uninterrupted.state.name)))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def until(resolved, out, monkeypatch):
    """``until(point)`` runs, resuming, and dies at that commit point; None: to the end."""

    def run(place):
        def point(here):
            if here == place:
                raise Killed

        monkeypatch.setattr(stages, "_commit_point", point)
        if place is None:
            return merge.run(resolved, out, command="test", resume=True)
        with pytest.raises(Killed):
            merge.run(resolved, out, command="test", resume=True)
        return None

    return run


@pytest.mark.catalogue("kill-and-resume")
def test_kill_at_every_commit_point_in_turn(until, out, straight):
    """One run that dies 24 times and is resumed 24 times."""
    for place in POINTS:
        assert not out.exists()
        until(place)
    until(None)
    assert files_of(out) == straight
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("place", POINTS)
def test_kill_at_one_commit_point(place, until, out, straight):
    until(place)
    until(None)
    assert files_of(out) == straight
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.usefixtures("state")
def test_finished_stages_compute_nothing(until, out, straight, resolved, monkeypatch):
    for module, name in (
        (gather, "_step"), (coupling, "couple"), (merge_params, "transport_weights"),
        (sweep, "sweep"), (nll, "score"), (hf, "write_model"), (merge_params, "gather"),
        (artifacts, "write"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("it was finished"))
    loaded, load = [], hf.load_folder
    monkeypatch.setattr(
        hf, "load_folder", lambda folder, **k: loaded.append(folder.path) or load(folder, **k)
    )
    until(None)
    assert files_of(out) == straight
    assert loaded == [Path(resolved.target)]  # nobody asks for the source, nor for its base


@pytest.mark.usefixtures("state")
def test_resume_of_a_finished_run_returns_its_result(until, out, uninterrupted, monkeypatch):
    until(None)
    first = uninterrupted.result
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    monkeypatch.setattr(hf, "load_hf", lambda *a, **k: pytest.fail("it was finished"))
    again = until(None)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert again.report == first.report
    assert again.warnings == first.warnings
    assert again.merge.rows == first.merge.rows
    assert again.merge.weights.keys() == first.merge.weights.keys()
    for name, one in first.merge.weights.items():
        for a, b in zip(one, again.merge.weights[name], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_array_equal(
        again.merge.coupling.layer_plan["up_out"], first.merge.coupling.layer_plan["up_out"]
    )


@pytest.mark.usefixtures("state")
def test_changed_result_is_not_taken_for_the_finished_run(until, out):
    until(None)
    path = out / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(errors.InputError, match="--overwrite"):
        until(None)
    assert path.read_bytes() == bytes(content)


@pytest.mark.catalogue("bit-flip")
@pytest.mark.parametrize(
    "file",
    ["state/rows-target/up_out.npy", "state/coupling/layer.up_out/0.0",
     "state/sweep/value.json", "model/model.safetensors"],
)  # fmt: skip
def test_flipped_byte_is_redone_and_never_used(file, state, until, out, straight, caplog):
    content = bytearray((state / file).read_bytes())
    content[-2] ^= 4
    (state / file).write_bytes(content)
    until(None)
    assert files_of(out) == straight
    [line] = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert file in line


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"epsilon": 0.03}, {"strength": 0.5}, {"max_length": 64}]
)
def test_other_settings_never_use_the_state(change, state, out, resolved, caplog):
    def die(name):
        if name == "after rows-target":
            raise Killed

    with caplog.at_level(logging.INFO), pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "_commit_point", die)
        with pytest.raises(Killed):
            other = resolved.model_copy(update=change)
            merge.run(other, out, command="test", resume=True)
    assert "resume: there is nothing to resume" in caplog.text
    assert f"have left {state.name};" in caplog.text
    assert len([path for path in out.parent.iterdir() if ".partial-" in path.name]) == 2


def test_other_inputs_never_use_the_state(out, resolved, tmp_path):
    """The same paths, another text in the file."""
    text = tmp_path / "calibration.txt"
    text.write_bytes(Path(resolved.calibration.path).read_bytes())
    given = resolved.calibration.model_copy(update={"path": str(text)})
    mine = resolved.model_copy(update={"calibration": given})
    seen = []

    def die(name):
        seen.append(name)
        if name == "after rows-target":
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "_commit_point", die)
        for change in ("", "one more river 77\n"):
            text.write_text(text.read_text() + change)
            with pytest.raises(Killed):
                merge.run(mine, out, command="test", resume=True)
    assert seen == ["before rows-target", "after rows-target"] * 2


def test_activations_are_memory_mapped_and_the_same_as_in_memory(resolved, tmp_path):
    inputs = run_inputs.check(resolved, tmp_path / "out", overwrite=False)
    cfg, params = hf.load_hf(inputs.folders["target"].path)
    settings = {"cfg": cfg, "sites": ["mlp_in", "up_out"]}
    held = gather.gather(params, inputs.data.target, **settings)
    rows = gather.gather(
        params, inputs.data.target, allocate=arrays.allocator(tmp_path), **settings
    )
    arrays.save_row_ids(tmp_path, rows)
    read = arrays.load_activations(tmp_path)
    assert set(read.values) == {"mlp_in", "up_out"}
    np.testing.assert_array_equal(read.row_id, held.row_id)
    for site, values in held.values.items():
        assert not isinstance(values, np.memmap)
        assert isinstance(rows.values[site], np.memmap)
        assert isinstance(read.values[site], np.memmap)
        assert not read.values[site].flags.writeable
        np.testing.assert_array_equal(read.values[site], values)
