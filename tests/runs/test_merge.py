"""The pipeline: which texts go where, what it says, and that a run that fails leaves nothing."""

import errno
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from checkpoints import mixed, recast
from published import report_of

from ot_merge_jax import errors
from ot_merge_jax.data import calibration
from ot_merge_jax.data import documents as document_files
from ot_merge_jax.distributed import sharding
from ot_merge_jax.evaluation.statistics import MeanDifference
from ot_merge_jax.experiments import summary, verdict
from ot_merge_jax.io import hf
from ot_merge_jax.recipes import loading
from ot_merge_jax.reports import model_card, schema
from ot_merge_jax.runs import artifacts, memory, merge, plan
from ot_merge_jax.runs import inputs as run_inputs

SIZES = {"hidden": 16, "heads": 2, "kv_heads": 1, "intermediate": 24, "layers": 1}


@pytest.fixture(scope="module")
def folders(tiny_checkpoint):
    """Role -> folder; all share a tokenizer."""
    other = {**SIZES, "hidden": 20, "heads": 2, "intermediate": 32, "layers": 2}
    return {
        "target": tiny_checkpoint("llama", seed=5, **SIZES),
        "source_base": tiny_checkpoint("llama", seed=6, **other),
        "source": tiny_checkpoint("llama", seed=6, drift=0.1, **other),
    }


@pytest.fixture
def text_file(tmp_path):
    """Sixty documents of one length: every batch has one of two shapes."""
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"the river {number:02d}\n" for number in range(60)))
    return path


@pytest.fixture
def held_out_file(tmp_path):
    """Sixty other documents, as long."""
    path = tmp_path / "held_out.txt"
    path.write_text("".join(f"the market {number:02d}\n" for number in range(60)))
    return path


@pytest.fixture
def lines(text_file):
    """The same as a list."""
    return text_file.read_text().splitlines()


@pytest.fixture
def resolved(folders, text_file):
    """``resolved(**settings)`` -> recipe that moves the embedding only, which compiles quickly."""

    def make(**settings):
        given = {
            "preset": "delta",
            "weights": ["embed"],
            "strength": 1.0,
            "calibration": str(text_file),
            "controls": "none",
            "continuations": 0,
        }
        given |= {role: str(folder) for role, folder in folders.items()}
        return loading.resolve(given | settings)

    return make


@pytest.fixture
def out(tmp_path):
    """A folder that does not exist, in a parent that holds nothing else."""
    (tmp_path / "results").mkdir()
    return tmp_path / "results" / "out"


def left_in(out):
    return sorted(path.name for path in out.parent.iterdir())


# ---- texts ----


@pytest.mark.parametrize("rows", ["sample", "token"])
@pytest.mark.parametrize("seed", [0, 1])
def test_dev_split_gives_no_rows(rows, seed, resolved, out, lines, monkeypatch):
    aligned = []
    real = calibration.align
    monkeypatch.setattr(
        calibration,
        "align",
        lambda documents, *a, **k: aligned.append(documents) or real(documents, *a, **k),
    )
    inputs = run_inputs.check(resolved(rows=rows, seed=seed), out, overwrite=False)
    assert not set(inputs.texts) & set(inputs.dev)
    assert sorted(inputs.texts + inputs.dev) == sorted(lines)
    assert len(inputs.dev) == 12
    assert aligned == [inputs.texts, inputs.dev]  # rows, and the unseen rows of the diagnostics
    assert inputs.data.documents == 48
    if rows == "sample":
        assert inputs.data.rows == 48


def test_rows_are_the_tokens_of_the_row_documents(resolved, out):
    """What is really in the batches: decoded, they are the row documents and no dev document."""
    inputs = run_inputs.check(resolved(rows="sample"), out, overwrite=False)
    tokenizer = inputs.tokenizers["target"]
    decoded = [
        tokenizer.decode(tokens[mask], skip_special_tokens=True)
        for batch in inputs.data.target
        for tokens, mask in zip(np.asarray(batch.tokens), np.asarray(batch.mask), strict=True)
        if mask.any()
    ]
    assert sorted(decoded) == sorted(inputs.texts)


def test_strength_is_chosen_on_the_dev_split_and_nothing_else(resolved, out, lines, monkeypatch):
    cut = []
    real = merge.nll.windows
    monkeypatch.setattr(
        merge.nll,
        "windows",
        lambda documents, *a, **k: cut.append(documents) or real(documents, *a, **k),
    )
    result = merge.run(resolved(strength="auto"), out, command="test")
    assert cut == [document_files.split(lines, seed=0)[1]]
    assert len(result.report.strength.tried) == 7  # one group moves: no search over groups
    best = min(result.report.strength.tried, key=lambda point: point.loss)
    assert result.report.strength.chosen == best.strength


def test_held_out_text_is_only_reported(resolved, out, held_out_file, tmp_path):
    """The same files come out with and without it, and with another one."""
    other = tmp_path / "other.txt"
    other.write_text("".join(f"a market {number:02d}\n" for number in range(60)))
    digests = set()
    for place, text in enumerate((None, str(held_out_file), str(other))):
        folder = out.with_name(f"out-{place}")
        merge.run(resolved(strength="auto", evaluation=text), folder, command="test")
        digests.add((folder / "model.safetensors").read_bytes())
    assert len(digests) == 1


def test_samples_limits_the_documents_that_give_rows(resolved, out, text_file):
    settings = {"calibration": {"path": str(text_file), "samples": 20}}
    inputs = run_inputs.check(resolved(**settings), out, overwrite=False)
    assert (len(inputs.texts), len(inputs.dev)) == (20, 5)
    again = run_inputs.check(resolved(**settings), out, overwrite=False)
    assert (again.texts, again.dev) == (inputs.texts, inputs.dev)
    other = run_inputs.check(resolved(seed=1, **settings), out, overwrite=False)
    assert set(other.texts) != set(inputs.texts)


def test_check_reads_no_weights(resolved, out, monkeypatch):
    monkeypatch.setattr(hf, "load_hf", lambda *a, **k: pytest.fail("read weights"))
    run_inputs.check(resolved(), out, overwrite=False)
    assert left_in(out) == []


def test_held_out_documents_that_are_calibration_too_are_left_out(
    resolved, out, lines, held_out_file
):
    with held_out_file.open("a") as file:
        file.write(f"{lines[0]}\n{lines[7].upper()} !\n")
    result = merge.run(resolved(evaluation=str(held_out_file)), out, command="test")
    assert result.report.evaluation["merge"].documents == 60
    [warning] = [one for one in result.warnings if "left out" in one]
    assert warning.startswith("2 of 62 held-out documents also stand in the calibration text")
    assert warning in result.report.warnings


def test_the_calibration_text_is_no_held_out_text(resolved, out, text_file):
    with pytest.raises(
        errors.InputError, match=r"calibration text and the held-out text"
    ) as caught:
        merge.run(resolved(evaluation=str(text_file)), out, command="test")
    assert caught.value.exit_code == 3
    assert left_in(out) == []


# ---- verdicts ----


def test_verdict_of_a_run_is_in_report_and_result(resolved, out, held_out_file):
    result = merge.run(resolved(evaluation=str(held_out_file)), out, command="test")
    report = report_of(out)
    assert result.report == report
    assert result.out == out
    change = report.evaluation["merge"].against_target
    said = verdict.sentence_of(MeanDifference(change.difference, change.low, change.high))
    assert said in report.verdict


@pytest.mark.parametrize("is_nothing", [False, True], ids=["moved", "nothing-moved"])
def test_strict_refuses_a_measured_worsening(is_nothing, resolved, out, held_out_file, monkeypatch):
    """Also of a merge that only shrinks the target."""
    worse = MeanDifference(0.1, 0.05, 0.2)
    against = verdict.Compared(worse, [worse])
    controlled = summary.Controlled([0], schema.Difference(**worse._asdict()), [], {})
    found = verdict.judge(against, {}, missing=[]), against, controlled
    monkeypatch.setattr(summary, "outcome", lambda *a, **k: found)
    monkeypatch.setattr(verdict, "is_nothing_transferred", lambda *a: is_nothing)
    settings = resolved(evaluation=str(held_out_file))
    with pytest.raises(errors.StrictError, match=r"\+0\.1000 nats") as caught:
        merge.run(settings, out, command="test", strict=True)
    assert caught.value.exit_code == 5
    assert left_in(out) == []
    merge.run(settings, out, command="test")  # a warning to nobody, but no error
    assert left_in(out) == ["out"]


def test_mesh_gives_what_one_device_gives(resolved, out, held_out_file, monkeypatch):
    """Models and batches are spread; the merged weights are the same but for rounding."""
    settings = {"weights": ["up", "embed"], "max_rows": 200, "evaluation": str(held_out_file)}
    merge.run(resolved(**settings), out, command="test")
    split = []

    def seen(batch, mesh):
        split.append(None if mesh is None else dict(mesh.shape))
        return was(batch, mesh)

    was = sharding.split_batch
    monkeypatch.setattr(sharding, "split_batch", seen)
    mesh = sharding.make_mesh({"data": 2, "model": 4})
    other = out.with_name("mesh")
    merge.run(resolved(**settings), other, command="test", mesh=mesh)
    assert {"data": 2, "model": 4} in split
    alone, spread = (
        safetensors.numpy.load_file(folder / "model.safetensors") for folder in (out, other)
    )
    for name in alone:
        np.testing.assert_allclose(spread[name], alone[name], rtol=0, atol=1e-4, err_msg=name)


# ---- atomicity ----

LATE = [
    (merge, "_self_check"),
    (merge, "_evaluate"),
    (artifacts, "write"),
    (model_card, "model_card"),
]
each_late = pytest.mark.parametrize("place", LATE, ids=lambda place: place[1])


@each_late
@pytest.mark.parametrize(
    "problem", [ValueError("a bug"), errors.InputError("bad."), OSError(errno.EIO, "io")]
)
def test_late_failure_leaves_nothing(place, problem, resolved, out, monkeypatch):
    def fail(*a, **k):
        assert [
            name for name in left_in(out) if ".partial-" in name
        ]  # it is late: files have been written
        raise problem

    monkeypatch.setattr(*place, fail)
    with pytest.raises(type(problem)):
        merge.run(resolved(), out, command="test")
    assert left_in(out) == []


@each_late
def test_late_failure_keeps_the_folder_it_would_have_replaced(place, resolved, out, monkeypatch):
    out.mkdir()
    (out / "notes.txt").write_text("mine")

    def fail(*a, **k):
        raise ValueError("a bug")

    monkeypatch.setattr(*place, fail)
    with pytest.raises(ValueError, match="a bug"):
        merge.run(resolved(), out, command="test", overwrite=True)
    assert left_in(out) == ["out"]
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("notes.txt", "mine")]


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_that_appears_meanwhile_is_not_replaced_unasked(
    overwrite, resolved, out, monkeypatch
):
    """Two runs with one output: the second must not delete what the first has just published."""
    real = artifacts.write

    def late(*a, **k):
        out.mkdir()
        (out / "notes.txt").write_text("mine")
        return real(*a, **k)

    monkeypatch.setattr(artifacts, "write", late)
    if overwrite:
        merge.run(resolved(), out, command="test", overwrite=True)
        assert (out / "config.json").exists()
    else:
        with pytest.raises(errors.InputError, match="not empty"):
            merge.run(resolved(), out, command="test")
        assert [path.name for path in out.iterdir()] == ["notes.txt"]
    assert left_in(out) == ["out"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
@pytest.mark.parametrize("keep", [True, False])
def test_disk_that_fills_up_at_the_end_keeps_what_is_finished(
    keep, number, resolved, out, monkeypatch
):
    def fail(*a, **k):
        raise OSError(number, "full")

    with monkeypatch.context() as patch:
        patch.setattr(model_card, "model_card", fail)
        with pytest.raises(
            errors.ResourceError, match=r"The disk is full at .* \(full\); "
        ) as caught:
            merge.run(resolved(), out, command="ot-merge run x", keep=keep)
    assert caught.value.exit_code == 4
    if not keep:
        assert str(caught.value).endswith("; nothing was written.")
        assert left_in(out) == []
        return
    [partial] = left_in(out)
    kept = f"finished stages are kept in {partial}, continue with: ot-merge run x --resume"
    assert str(caught.value).endswith(kept)
    with monkeypatch.context() as patch:
        patch.setattr(hf, "write_model", lambda *a, **k: pytest.fail("the model was finished"))
        merge.run(resolved(), out, command="ot-merge run x", resume=True)
    assert left_in(out) == ["out"]


def test_full_memory_keeps_what_is_finished(resolved, out, monkeypatch):
    def fail(*a, **k):
        raise MemoryError

    monkeypatch.setattr(merge, "_self_check", fail)
    with pytest.raises(errors.ResourceError, match=r"memory is full; .* ot-merge run x --resume$"):
        merge.run(resolved(), out, command="ot-merge run x")
    [partial] = left_in(out)
    assert partial.startswith("out.partial-")


def test_inputs_that_fail_the_check_are_never_loaded(resolved, out, monkeypatch):
    monkeypatch.setattr(hf, "load_hf", lambda *a, **k: pytest.fail("read weights"))
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(errors.InputError, match="not empty"):
        merge.run(resolved(), out, command="test")


# ---- self-check ----


def corrupt(folder, change):
    """Rewrites the weights of a folder with one value changed."""
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    path.unlink()
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


def one_value(tensors):
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1


def swapped(tensors):
    q, o = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qo")
    tensors[q], tensors[o] = tensors[o], tensors[q]


def not_finite(tensors):
    tensors["model.norm.weight"][0] = np.nan


def missing(tensors):
    del tensors["lm_head.weight"]


@pytest.mark.parametrize("change", [one_value, swapped, not_finite, missing])
def test_self_check_catches_a_corrupted_write(change, resolved, out, monkeypatch):
    real = hf.write_model

    def write(folder, *a, **k):
        real(folder, *a, **k)
        corrupt(folder, change)

    monkeypatch.setattr(hf, "write_model", write)
    with pytest.raises((OSError, errors.InputError)):
        merge.run(resolved(), out, command="test")
    assert left_in(out) == []


def test_self_check_catches_a_lost_tokenizer(resolved, out, monkeypatch):
    real = hf.write_model

    def write(folder, *a, **k):
        real(folder, *a, **k)
        (folder / "tokenizer.json").unlink()

    monkeypatch.setattr(hf, "write_model", write)
    with pytest.raises(errors.InputError, match="tokenizer"):
        merge.run(resolved(), out, command="test")
    assert left_in(out) == []


def test_self_check_accepts_what_was_written(resolved, out):
    result = merge.run(resolved(), out, command="test")
    assert Path(result.out / "model.safetensors").exists()


def test_self_check_rounds_every_layer_as_its_file_does(tiny_checkpoint, writable_copy, tmp_path):
    """A stack of which one layer is BF16 and another F32, and weights that have moved."""
    like = recast(writable_copy(tiny_checkpoint()), mixed)
    cfg, params = hf.load_hf(like, dtype=jnp.float32)
    fused = jax.tree.map(lambda leaf: 1.001 * leaf, params)
    folder = tmp_path / "written"
    folder.mkdir()
    hf.write_model(folder, fused, cfg=cfg, like=like)
    merge._self_check(folder, fused)
    with pytest.raises(OSError, match="does not hold"):
        merge._self_check(folder, params)


# ---- the API itself ----


def test_output_parent_that_does_not_exist_is_made(resolved, out):
    deep = out / "deeper" / "out"
    merge.run(resolved(), deep, command="test")
    assert (deep / "config.json").exists()
    assert left_in(deep) == ["out"]


# ---- memory ----


def test_run_within_less_memory_gives_the_same_weights(
    resolved, out, tmp_path, held_out_file, monkeypatch
):
    """The source is read layer by layer, gathered, moved and scored; to rounding it is the same."""
    settings = resolved(weights=["up", "embed"], evaluation={"path": str(held_out_file)})
    whole = merge.run(settings, out, command="test")

    def choose(cfgs, data, *, limit, **more):
        assert limit == 12345
        return memory.needed(cfgs, data, offloaded=frozenset(cfgs) - {"target"}, **more)

    monkeypatch.setattr(memory, "choose", choose)
    within = tmp_path / "within"
    less = merge.run(settings, within, command="test", memory_limit=12345)
    one, other = (safetensors.numpy.load_file(path / "model.safetensors") for path in (out, within))
    for name in one:
        close = 1e-5 * np.abs(one[name]).max()
        np.testing.assert_allclose(one[name], other[name], rtol=0, atol=close)
    ours, theirs = (one.report.evaluation["source"] for one in (less, whole))
    assert ours.nll_per_token == pytest.approx(theirs.nll_per_token, rel=1e-6)


def test_rows_are_lowered_before_a_run_is_refused(resolved, out, monkeypatch, caplog):
    """As often as needed, down to the fewest; the recipe that is written says how many."""
    monkeypatch.setattr(plan, "_FEWEST_ROWS", 20)
    asked = []

    def choose(cfgs, data, **more):
        asked.append(data.rows)
        if data.rows > 50:
            raise errors.ResourceError("Too much.")
        return memory.MemoryPlan(frozenset(), {"all": 1})

    monkeypatch.setattr(memory, "choose", choose)
    shown = []
    settings = resolved(weights=["up"], rows="token")
    with caplog.at_level("INFO"):
        merge.run(settings, out, command="test", show=shown.append)
    assert len(asked) > 1
    assert asked[-1] <= 50 < asked[-2]
    assert shown[0].max_rows == asked[-1]
    assert f"max_rows is lowered to {asked[-1]}" in caplog.text
    monkeypatch.setattr(plan, "_FEWEST_ROWS", 60)
    with pytest.raises(errors.ResourceError, match="Too much"):
        merge.run(settings, out, command="test", overwrite=True)
