"""`ot-merge adapt`: a merge with its residual frozen, teachers, adapters, bad input, trouble."""

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import output_contract
import pytest
import yaml
from published import tensors

from ot_merge_jax import load_hf
from ot_merge_jax.adapt import residual, run, start, state
from ot_merge_jax.io import checkpoint
from ot_merge_jax.models import specs

#: What no two runs share.
OF_THE_PROCESS = ("wall_seconds", "peak_memory_bytes", "command", "run")
COMMON = ("--block", 24, "--batch-size", 4, "--steps", 4, "--learning-rate", 0.01)


class Adapted:
    """A finished adaptation."""

    def __init__(self, out, called):
        self.out, self.called = out, called
        self.report = json.loads((out / "ot_merge" / "report.json").read_text())

    def settings(self):
        return yaml.safe_load((self.out / "ot_merge" / "recipe.yaml").read_text())


@pytest.fixture(scope="session")
def adapted(tmp_path_factory, cli, text_files):
    """``adapted(model, *flags)`` -> `Adapted`, run once."""
    made = {}

    def make(model, *flags):
        key = (str(model), *map(str, flags))
        if key not in made:
            out = tmp_path_factory.mktemp("adapted") / "out"
            called = cli("adapt", model, "--text", text_files[0], *COMMON, *flags, "--out", out)
            assert called.code == 0, called.err
            made[key] = Adapted(out, called)
        return made[key]

    return make


@pytest.fixture(scope="session")
def merge(merged):
    return merged("delta llama<-llama")


@pytest.fixture(scope="session")
def of_a_merge(adapted, merge, models, text_files):
    """A merge adapted by a teacher, with held-out text."""
    teacher = ("--objective", "mix", "--source", models["llama-source"])
    return adapted(merge.out, *teacher, "--eval-text", text_files[1])


# ---- what it writes ----


def test_it_is_a_plain_folder_of_the_merge_s_form(of_a_merge, merge, models):
    folders = output_contract.Folders(of_a_merge.out, merge.out, models["llama-source"])
    for check in (
        output_contract.has_tensors_of_the_names_shapes_and_dtypes_of_the_target,
        output_contract.has_one_key_of_metadata,
        output_contract.has_the_shards_of_the_target_and_a_complete_index,
        output_contract.has_all_other_files_byte_for_byte,
        output_contract.has_modes_that_follow_the_umask,
    ):
        kept = folders._replace(target=models["llama-target"])
        check(kept)
    inside = {path.name for path in (of_a_merge.out / "ot_merge").iterdir()}
    assert inside == {"recipe.yaml", "report.json", "provenance.json", "events.jsonl", "residual"}
    assert not list(of_a_merge.out.parent.glob("out.*"))


@pytest.mark.torch
def test_transformers_loads_it_and_gives_our_logits(of_a_merge):
    torch = pytest.importorskip("torch")
    import jax
    import transformers

    from ot_merge_jax import forward
    from ot_merge_jax.types import Batch

    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        of_a_merge.out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    cfg, params = load_hf(of_a_merge.out, dtype=jnp.float32)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, 16)).astype(np.int32)
    row = np.zeros((1, 1), np.int32)
    batch = Batch(tokens, np.ones(tokens.shape, bool), row, row)
    ours = jax.jit(forward, static_argnames="cfg")(params, batch, cfg=cfg)[0]
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(np.asarray(ours), expected, rtol=0, atol=1e-4)


def test_the_report_says_what_happened(of_a_merge):
    found = of_a_merge.report
    assert found["steps"] == len(found["losses"]) == 4
    assert found["dev"]["curve"][0] == [0, found["dev"]["before"]]
    assert found["dev"]["curve"][-1][0] == 4
    assert found["dev"]["after"] == pytest.approx(found["dev"]["curve"][-1][1], abs=1e-5)
    held_out = found["evaluation"]
    assert set(held_out) == {"before", "after", "target"}
    change = held_out["after"]["against_before"]
    assert change["difference"] == pytest.approx(
        held_out["after"]["nll_per_token"] - held_out["before"]["nll_per_token"]
    )
    assert change["low"] < change["difference"] < change["high"]
    assert found["verdict"] in " ".join(of_a_merge.called.out.split("\n"))
    assert found["data"]["universal_distillation"] is False


def test_held_out_losses_are_those_of_eval(of_a_merge, merge, text_files, cli):
    called = cli("eval", merge.target, merge.out, of_a_merge.out, "--text", text_files[1], "--json")
    losses = [one["nll_per_token"] for one in called.json["models"].values()]
    ours = [
        of_a_merge.report["evaluation"][x]["nll_per_token"] for x in ("target", "before", "after")
    ]
    np.testing.assert_allclose(ours, losses, atol=1e-5)


def test_events_are_one_line_of_json_for_each_step(of_a_merge):
    lines = (of_a_merge.out / "ot_merge" / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert [one["step"] for one in events] == [1, 2, 3, 4]
    assert [one["loss"] for one in events] == of_a_merge.report["losses"]
    assert all(one["tokens_per_second"] > 0 for one in events)
    assert events[-1]["dev_loss"] == of_a_merge.report["dev"]["curve"][-1][1]


def test_the_card_says_what_was_done(of_a_merge, merge):
    _, front, body = (of_a_merge.out / "README.md").read_text().split("---\n", 2)
    found = yaml.safe_load(front)
    assert found["base_model_relation"] == "finetune"
    assert found["base_model"][0] == merge.out.name
    assert "ot-merge adapt" in body
    assert "Merged across" not in body


def test_provenance_hashes_everything_that_was_read(of_a_merge):
    found = json.loads((of_a_merge.out / "ot_merge" / "provenance.json").read_text())
    assert set(found["inputs"]) == {"model", "target", "source"}
    assert set(found["texts"]) == {"text", "evaluation"}
    for name, digest in found["output"].items():
        assert output_contract.sha256(of_a_merge.out / name) == digest


# ---- the residual ----


def test_the_residual_is_the_merge_minus_its_target(of_a_merge, merge):
    kept = checkpoint.load_arrays(of_a_merge.out / "ot_merge" / "residual")
    target, merged = (load_hf(one, dtype=jnp.float32)[1] for one in (merge.target, merge.out))
    assert kept.keys() == residual.between(merged, target).keys()
    for path, leaf in kept.items():
        np.testing.assert_array_equal(leaf, specs.get(merged, path) - specs.get(target, path))


def test_no_steps_and_another_strength_rescale_the_merge(adapted, merge):
    """0 takes the merge back, and the strength it was merged at leaves it alone."""
    chosen = merge.report["strength"]["chosen"]
    target, merged = (load_hf(one, dtype=jnp.float32)[1] for one in (merge.target, merge.out))
    flags = ("--steps", 0)
    none = load_hf(adapted(merge.out, *flags, "--strength", 0).out, dtype=jnp.float32)[1]
    for path in residual.between(merged, target):
        np.testing.assert_array_equal(specs.get(none, path), specs.get(target, path))
    same = adapted(merge.out, *flags)
    assert same.report["residual"]["held_at"] == {"projections": 1.0, "vocabulary": 1.0}
    for name, (_, one) in tensors(merge.out).items():
        np.testing.assert_array_equal(tensors(same.out)[name][1], one)
    assert set(same.report["residual"]["merged_at"]) == {"projections", "vocabulary"}
    assert chosen is not None


def test_an_adapted_folder_can_be_taken_apart_again(of_a_merge, merge, adapted):
    begun = start.open_start(str(of_a_merge.out))
    parts = start.load(begun)
    written = load_hf(of_a_merge.out, dtype=jnp.float32)[1]
    folded = residual.fold(parts.base, parts.residual, parts.factor)
    for path, leaf in parts.residual.items():
        np.testing.assert_allclose(specs.get(folded, path), specs.get(written, path), atol=1e-6)
        assert np.any(leaf)
    again = adapted(of_a_merge.out, "--steps", 0, "--strength", 0)
    removed = load_hf(again.out, dtype=jnp.float32)[1]
    for path in parts.residual:
        np.testing.assert_allclose(specs.get(removed, path), specs.get(parts.base, path), atol=1e-6)


def test_another_target_than_the_merged_one_is_refused(merge, models, text_files, tmp_path, cli):
    other = shutil.copytree(models["llama-target"], tmp_path / "other")
    changed = tensors(other)
    import safetensors.numpy

    arrays = {name: one + 1 for name, (_, one) in changed.items()}
    safetensors.numpy.save_file(arrays, other / "model.safetensors", metadata={"format": "pt"})
    words = ("--text", text_files[0], *COMMON, "--out", tmp_path / "out")
    called = cli("adapt", merge.out, *words, "--target", other)
    assert called.code == 3
    assert "are not those that out was merged from" in called.err


# ---- ways to train ----


def test_sft_ignores_the_source(adapted, models):
    one = adapted(models["llama-target"])
    other = adapted(models["llama-target"], "--source", "/nowhere")
    assert tensors(one.out).keys() == tensors(other.out).keys()
    for name, (_, leaf) in tensors(one.out).items():
        np.testing.assert_array_equal(tensors(other.out)[name][1], leaf)


def test_a_teacher_with_another_vocabulary_distils_universally(adapted, models):
    found = adapted(
        models["llama-target"], "--objective", "kd", "--source", models["qwen2-source"],
        "--learning-rate", 0.02,
    ).report  # fmt: skip
    assert found["data"]["universal_distillation"] is True
    assert 0.3 < found["data"]["target_matched"] <= 1
    assert found["losses"][-1] < found["losses"][0]
    assert found["dev"]["after"] < found["dev"]["before"]


def test_adapters_change_their_targets_alone_and_are_folded(adapted, models):
    found = adapted(models["llama-target"], "--lora", 4, "--lora-targets", "v,up")
    before, after = tensors(models["llama-target"]), tensors(found.out)
    changed = {name.split(".")[-2] for name in before if np.any(before[name][1] != after[name][1])}
    assert changed == {"v_proj", "up_proj"}


def test_one_epoch_is_the_default_and_json_alone_is_on_stdout(models, cli, text_files, tmp_path):
    words = ("--text", text_files[0], "--block", 24, "--batch-size", 8, "--out", tmp_path / "out")
    called = cli("adapt", models["llama-target"], *words, "--json")
    assert called.json["steps"] == called.json["data"]["blocks"] // 8
    assert called.json == json.loads((tmp_path / "out" / "ot_merge" / "report.json").read_text())


def test_rounded_files_are_what_is_reported(adapted, models):
    """bfloat16 shards: the dev loss after is that of the files."""
    found = adapted(models["qwen2-target"])
    assert {kind for kind, _ in tensors(found.out).values()} == {"bfloat16"}
    dev = found.report["dev"]
    assert dev["after"] != dev["curve"][-1][1]
    assert dev["after"] == pytest.approx(dev["curve"][-1][1], abs=0.02)


# ---- bad input ----


@pytest.fixture
def words(desk):
    """A good call, to be spoilt; later flags win."""
    return lambda *more: (
        "adapt", desk.target, "--text", desk.calibration, "--out", desk.out, *COMMON, *more
    )  # fmt: skip


ROWS = {
    "rate 0": (("--learning-rate", 0), 2, "learning_rate: Input should be greater than 0"),
    "rate below 0": (("--learning-rate", -1), 2, "learning_rate: Input should be greater than 0"),
    "rate nan": (("--learning-rate", "nan"), 2, "learning_rate: Input should be a finite number"),
    "objective": (("--objective", "kl"), 2, "objective: Input should be 'sft', 'kd' or 'mix'"),
    "no teacher": (("--objective", "kd"), 2, "objective kd needs source (--source)"),
    "block": (("--block", 4096), 2, "--block 4096 is longer than the context of the student, 512"),
    "parts": (("--accumulate", 3), 2, "accumulate 3 does not divide batch_size 4"),
    "strength": (("--strength", 1), 2, "--strength is that of a merge, and copy has no residual"),
    "target": (("--target", "x"), 2, "is no folder of `ot-merge run`; leave it out"),
    "memory": (("--memory-limit", "1MiB"), 4, "use --lora, --accumulate, --remat or a smaller"),
    "mesh": (("--mesh", "data=two"), 2, "is not like data=2,model=4"),
    "nowhere": (("--objective", "kd", "--source", "/nowhere"), 3, "There is no directory /nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_bad_settings_are_refused_before_any_work(name, words, desk, cli):
    more, code, sentence = ROWS[name]
    called = cli(*words(*more, "-q"))
    assert (called.code, called.out) == (code, "")
    assert sentence in called.err
    assert called.err.count("\n") == 1
    assert not desk.out.exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has 0 documents; add text"),
        ("one\n", "too few documents (1) for a dev split"),
        ("a river\n" * 5, "tokens to learn from, and one block has 24; give more text"),
    ],
)
def test_text_that_is_empty_or_too_short_is_refused(text, sentence, words, desk, cli):
    called = cli(*words("--text", desk.write("short.txt", text), "-q"))
    assert called.code == 3
    assert sentence in called.err
    assert not list(desk.folder.glob("out*"))


def test_a_loss_that_is_not_finite_ends_at_its_step_and_keeps_the_state(words, desk, cli):
    rising = ("--learning-rate", 1e38, "--clip", 1e30, "--warmup", 0.25, "--steps", 40)
    called = cli(*words(*rising, "--save-every", 1, "--schedule", "constant"))
    assert called.code == 5
    [sentence] = [line for line in called.err.splitlines() if line.startswith("error: ")]
    found = json.loads(
        next(desk.folder.glob("out.partial-*/state/step-*/history.json")).read_text()
    )
    step = len(found["losses"]) + 1
    assert f"at training step {step}; lower the learning rate; the state before that" in sentence
    assert not desk.out.exists()


# ---- runs that survive ----


def published(folder):
    """Every file of a folder, but for what belongs to the process alone."""
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("events.jsonl", "README.md")
    }
    side = json.loads(found["ot_merge/provenance.json"])
    side["output"].pop("README.md")
    found["ot_merge/provenance.json"] = {k: v for k, v in side.items() if k not in OF_THE_PROCESS}
    return found


@pytest.fixture
def long(words):
    """A run long enough to be killed."""
    return words("--steps", 120, "--save-every", 25, "--eval-every", 60, "-q")


def killed_at(words, desk, step):
    """The command in a process of its own, ended by SIGKILL once it has done a step."""
    running = subprocess.Popen(
        [sys.executable, "-m", "ot_merge_jax.cli", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ,
    )  # fmt: skip
    while running.poll() is None:
        seen = [one.read_text().count("\n") for one in desk.folder.glob("out.part*/events.jsonl")]
        if seen and seen[0] >= step:
            running.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    _, err = running.communicate(timeout=120)
    return running.returncode, err


def in_place_of(words, desk, out):
    """The same command with another output folder."""
    return [out if word == desk.out else word for word in words]


def test_a_killed_run_gives_the_bytes_of_a_straight_one(long, desk, cli, tmp_path):
    straight = tmp_path / "straight"
    assert cli(*in_place_of(long, desk, straight)).code == 0
    step = random.Random(os.getpid()).randrange(1, 100)
    code, err = killed_at(long, desk, step)
    assert code == -signal.SIGKILL, err
    called = cli(*long, "--resume")
    assert called.code == 0, called.err
    assert published(desk.out) == published(straight), step
    assert not list(desk.folder.glob("out.*"))
    again = cli(*long, "--resume", "--json")
    assert again.json == json.loads((desk.out / "ot_merge" / "report.json").read_text())


@pytest.mark.slow
def test_kills_at_many_random_moments(long, desk, cli, tmp_path):
    straight = tmp_path / "straight"
    assert cli(*in_place_of(long, desk, straight)).code == 0
    rng, kills = random.Random(8), 0
    while kills < 8:
        code, err = killed_at((*long, "--resume"), desk, rng.randrange(1, 120))
        kills += code != 0
        assert code in (0, -signal.SIGKILL), err
        if code == 0:
            assert published(desk.out) == published(straight)
            shutil.rmtree(desk.out)
    assert cli(*long, "--resume").code == 0
    assert published(desk.out) == published(straight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_for_the_step_saves_and_says_how_to_resume(
    number, words, desk, cli, monkeypatch, tmp_path
):
    """Between checkpoints, inside of a step."""
    real = run._event

    def event(course, rate, *, is_dev):
        if len(course.losses) == 3:
            signal.raise_signal(number)
        return real(course, rate, is_dev=is_dev)

    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        patch.setattr(run, "_event", event)
        called = cli(*words("--save-every", 100, "-q"))
    assert called.code == 130
    assert handlers == [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    said = r"interrupted; finished stages are kept in out\.partial-\w+, continue with: "
    assert re.search(rf"{said}ot-merge adapt .* --resume$", called.err.rstrip())
    resumed = cli(*words("--save-every", 100, "--resume"))
    assert resumed.code == 0
    assert "3 of 4 steps are done" in resumed.err
    straight = tmp_path / "straight"
    assert cli(*in_place_of(words("--save-every", 100), desk, straight)).code == 0
    assert published(desk.out) == published(straight)


def interrupt(monkeypatch, step):
    """Lets training be interrupted behind a step, in this process."""
    saved = state.save

    def save(folder, course, events):
        saved(folder, course, events)
        if len(course.losses) >= step:
            raise KeyboardInterrupt

    monkeypatch.setattr(state, "save", save)


def test_resume_with_other_settings_is_refused_by_name(words, desk, cli, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        assert cli(*words("--save-every", 1)).code == 130
    called = cli(*words("--save-every", 1, "--learning-rate", 0.5, "--steps", 9, "--resume", "-q"))
    assert called.code == 2
    assert "learning_rate (was 0.01, now 0.5)" in called.err
    assert "steps (was 4, now 9)" in called.err
    assert "seed" not in called.err
    [kept] = desk.folder.glob("out.partial-*")
    assert list((kept / "state").glob("step-*"))
    desk.calibration.write_text(desk.calibration.read_text() + "more text of rivers\n")
    called = cli(*words("--save-every", 1, "--resume", "-q"))
    assert called.code == 2
    assert "texts text" in called.err


def test_a_flipped_bit_in_a_checkpoint_is_noticed(words, desk, cli, monkeypatch, tmp_path):
    assert cli(*in_place_of(words(), desk, tmp_path / "straight")).code == 0
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        assert cli(*words("--save-every", 1)).code == 130
    [folder] = desk.folder.glob("out.partial-*/state/step-*/arrays")
    file = max((one for one in folder.rglob("*") if one.is_file()), key=lambda x: x.stat().st_size)
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    called = cli(*words("--save-every", 1, "--resume"))
    assert called.code == 0
    assert "not what was written; done again: step-" in " ".join(called.err.split())
    assert tensors(desk.out).keys() == tensors(tmp_path / "straight").keys()
    for name, (_, one) in tensors(tmp_path / "straight").items():
        np.testing.assert_array_equal(tensors(desk.out)[name][1], one)


@pytest.fixture
def full_disk():
    """A disk that has no room for a file of more than some bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.filterwarnings(  # Orbax drops coroutines of its own where a write fails
    "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_a_disk_that_fills_up_leaves_the_checkpoint_before(
    words, desk, cli, monkeypatch, full_disk, tmp_path
):
    """The second checkpoint does not fit; the run goes on from the first when there is room."""
    saved, unlimited = state.save, resource.getrlimit(resource.RLIMIT_FSIZE)[0]

    def save(folder, course, events):
        if len(course.losses) == 2:
            full_disk(3000)
        try:
            saved(folder, course, events)
        finally:
            full_disk(unlimited)

    with monkeypatch.context() as patch:
        patch.setattr(state, "save", save)
        called = cli(*words("--save-every", 1))
    assert called.code == 4, called.err
    assert "The disk is full at" in called.err
    assert os.strerror(errno.EFBIG) in called.err
    [kept] = desk.folder.glob("out.partial-*")
    names = {entry["stage"] for entry in json.loads((kept / "manifest.json").read_text())["stages"]}
    assert names == {"settings", "before", "step-00000001"}
    assert cli(*in_place_of(words(), desk, tmp_path / "straight")).code == 0
    called = cli(*words("--save-every", 1, "--resume"))
    assert called.code == 0, called.err
    assert "1 of 4 steps are done" in called.err
    for name, (_, one) in tensors(tmp_path / "straight").items():
        np.testing.assert_array_equal(tensors(desk.out)[name][1], one)
