"""`ot-merge adapt` in trouble: bad input, kills, signals, damage, a full disk."""

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

import numpy as np
import pytest
from published import tensors

from ot_merge_jax.errors import RecipeError
from ot_merge_jax.io import arrays
from ot_merge_jax.runs import adapt, adapt_checkpoint
from ot_merge_jax.training import step as train_step

#: A process that is killed draws them.
pytestmark = pytest.mark.usefixtures("every_plot")
COMMON = ("--block", 24, "--batch-size", 4, "--steps", 4, "--learning-rate", 0.01)
#: What no two runs share.
OF_THE_PROCESS = ("wall_seconds", "peak_memory_bytes", "command", "run")


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
    "block": (("--block", 4096), 2, "--seq-len 4096 is longer than the context of the student"),
    "parts": (("--accumulate", 3), 2, "grad_accum_steps 3 does not divide batch_size 4"),
    "strength": (("--strength", 1), 2, "--strength is that of a merge, and copy has no residual"),
    "target": (("--target", "x"), 2, "is not a folder of `ot-merge run`; leave it out"),
    "memory": (("--memory-limit", "1MiB"), 4, "use --lora-rank, --grad-accum-steps, --remat"),
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


def diverged(called, desk):
    """The sentence, and the losses of the one checkpoint that is kept."""
    assert called.code == 5, called.err
    assert not desk.out.exists()
    [sentence] = [line for line in called.err.splitlines() if line.startswith("error: ")]
    [kept] = desk.folder.glob("out.partial-*/state/step-*")
    assert f"lower the learning rate; what was good before is kept in {kept.parents[1].name}." in (
        sentence
    )
    assert all(np.isfinite(one).all() for one in arrays.load_tree(kept / "arrays").values()), (
        "no number of the state is broken"
    )
    return sentence, len(json.loads((kept / "history.json").read_text())["losses"])


#: The first step of the warm-up has rate 0, the second one breaks the weights.
RISING = ("--learning-rate", 1e38, "--clip", 1e30, "--warmup", 0.1, "--steps", 10, "-q")


def test_a_loss_that_is_not_finite_ends_at_its_step_and_keeps_the_good_state(words, desk, cli):
    """Not the weights that gave it, though every one of them is finite."""
    called = cli(*words(*RISING, "--save-every", 1, "--eval-every", 10))
    sentence, kept = diverged(called, desk)
    assert "at training step 3;" in sentence
    assert kept == 1


def test_a_gradient_that_is_not_finite_keeps_the_state_before_it(words, desk, cli, monkeypatch):
    """Between checkpoints: the weights give finite losses, so they are saved."""
    real = train_step._step

    def step(state, *given, **more):
        place = int(state.step)
        state, seen = real(state, *given, **more)
        return state, seen._replace(norm=np.inf) if place == 2 else seen

    monkeypatch.setattr(train_step, "_step", step)
    sentence, kept = diverged(cli(*words("--save-every", 100, "-q")), desk)
    assert "The gradient's norm is inf at training step 3;" in sentence
    assert kept == 2


def test_weights_that_the_last_step_breaks_are_not_published(words, desk, cli):
    called = cli(*words(*RISING, "--steps", 2, "--save-every", 1))
    sentence, kept = diverged(called, desk)
    assert "after training step 2;" in sentence
    assert kept == 1


# ---- runs that survive ----


def published(folder):
    """Every file of a folder, but for what belongs to the process alone."""
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("events.jsonl", "README.md", "report.html")
    }
    side = json.loads(found["ot_merge/provenance.json"])
    side["output"].pop("README.md")
    found["ot_merge/provenance.json"] = {k: v for k, v in side.items() if k not in OF_THE_PROCESS}
    return found


@pytest.fixture
def long(words):
    """A run long enough to be killed."""
    return words("--steps", 120, "--save-every", 25, "--eval-every", 60, "-q")


#: The command, killed as it is about to rename a file of this name, the so-manieth time.
DIES = """
import os, signal, sys
from ot_merge_jax.cli import main as cli
name, left = sys.argv.pop(1), [int(sys.argv.pop(1))]
def hear(event, given):
    if event == "os.rename" and name in str(given[0]):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hear)
cli.main()
"""


def killed_in_a_save(words, name, number):
    """The command in a process of its own, ended by SIGKILL before its so-manieth renaming."""
    given = [sys.executable, "-c", DIES, name, number, *words]
    done = subprocess.run(
        [*map(str, given)], capture_output=True, text=True, check=False, timeout=120
    )
    return done.returncode, done.stderr


def killed_at(words, desk, step):
    """The command in a process of its own, ended by SIGKILL once it has done a step."""
    running = subprocess.Popen(
        [sys.executable, "-m", "ot_merge_jax.cli.main", *map(str, words)],
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
    step = random.Random(os.getpid()).randrange(1, 50)
    code, err = killed_at(long, desk, step)
    assert code == -signal.SIGKILL, err
    code, err = killed_in_a_save((*long, "--resume"), "orbax-checkpoint-tmp", 2)
    assert code == -signal.SIGKILL, err
    assert list(desk.folder.glob("out.partial-*/state/step-*/*.orbax-checkpoint-tmp*"))
    called = cli(*long, "--resume")
    assert called.code == 0, called.err
    assert published(desk.out) == published(straight), step
    assert not list(desk.folder.glob("out.*"))
    again = cli(*long, "--resume", "--json")
    assert again.out == (desk.out / "ot_merge" / "report.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["orbax-checkpoint-tmp", "manifest.json.new"])
def test_kills_in_every_save(name, long, desk, cli, tmp_path):
    """Before a checkpoint has its name, and before the manifest knows it or forgets the old one."""
    straight = tmp_path / "straight"
    assert cli(*in_place_of(long, desk, straight)).code == 0
    kills = 0
    for number in range(1, 40):
        code, err = killed_in_a_save((*long, "--resume"), name, number)
        assert code in (0, -signal.SIGKILL), err
        if code == 0:
            break
        kills += 1
        shutil.rmtree(next(desk.folder.glob("out.partial-*"))) if number % 3 == 0 else None
    assert kills >= 3
    assert published(desk.out) == published(straight)


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
    real = adapt._event

    def event(history, rate, *, is_dev):
        if len(history.losses) == 3:
            signal.raise_signal(number)
        return real(history, rate, is_dev=is_dev)

    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        patch.setattr(adapt, "_event", event)
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


@pytest.mark.parametrize(("step", "done"), [(2, 3), (4, 4)])
def test_a_signal_while_saving_waits_a_step_and_is_heeded_at_the_end(
    step, done, words, desk, cli, monkeypatch, tmp_path
):
    given, saved, sent = words("--save-every", 1), adapt_checkpoint.save, []

    def save(folder, history, events):
        if len(history.losses) == step and not sent:
            sent.append(step)
            signal.raise_signal(signal.SIGTERM)
        saved(folder, history, events)

    with monkeypatch.context() as patch:
        patch.setattr(adapt_checkpoint, "save", save)
        assert cli(*given).code == 130
    assert sent
    assert not desk.out.exists()
    resumed = cli(*given, "--resume")
    assert resumed.code == 0, resumed.err
    assert f"{done} of 4 steps are done" in resumed.err
    assert cli(*in_place_of(given, desk, tmp_path / "straight")).code == 0
    assert published(desk.out) == published(tmp_path / "straight")


def interrupt(monkeypatch, step):
    """Lets training be interrupted behind a step, in this process."""
    saved = adapt_checkpoint.save

    def save(folder, history, events):
        saved(folder, history, events)
        if len(history.losses) >= step:
            raise KeyboardInterrupt

    monkeypatch.setattr(adapt_checkpoint, "save", save)


#: What else a checkpoint has to hold: name -> merge to start from, teacher, flags.
WAYS = {
    "the best weights": (None, None, ("--patience", 3, "--eval-every", 1, "--learning-rate", 0.3)),
    "adapters": (None, None, ("--lora", 3, "--lora-targets", "q,down", "--weight-decay", 0.1)),
    "a merge, taught in parts": (
        "delta llama<-llama", "llama-source", ("--objective", "mix", "--accumulate", 2),
    ),
    "a teacher of other tokens": (None, "qwen2-source", ("--objective", "kd")),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_train_resumes_to_the_same_bytes(
    way, words, desk, models, merged, cli, monkeypatch, tmp_path
):
    merge, teacher, flags = WAYS[way]
    taught = ("--source", models[teacher]) if teacher else ()
    command, start, *rest = words("--save-every", 1, *flags, *taught)
    given = [command, merged(merge).out if merge else start, *rest]
    assert cli(*in_place_of(given, desk, tmp_path / "straight")).code == 0
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        assert cli(*given).code == 130
    called = cli(*given, "--resume")
    assert called.code == 0, called.err
    assert "2 of 4 steps are done" in called.err
    assert published(desk.out) == published(tmp_path / "straight")


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


def test_other_settings_are_found_whatever_the_folder_is_called(tmp_path):
    out = tmp_path / "m[1]*"
    kept = tmp_path / f"{out.name}.partial-abc" / "state" / "settings" / "settings.json"
    kept.parent.mkdir(parents=True)
    kept.write_text('{"adapt": {"seed": 1}}')
    decided = {"adapt": {"seed": 2}, "inputs": {}, "texts": {}, "versions": {}}
    with pytest.raises(RecipeError, match=r"differs in seed \(was 1, now 2\)"):
        adapt._refuse_others(out, "def", decided)


def test_a_flipped_bit_in_a_checkpoint_is_noticed(words, desk, cli, monkeypatch, tmp_path):
    assert cli(*in_place_of(words(), desk, tmp_path / "straight")).code == 0
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        assert cli(*words("--save-every", 1)).code == 130
    [folder] = desk.folder.glob("out.partial-*/state/step-00000002/arrays")
    file = max((one for one in folder.rglob("*") if one.is_file()), key=lambda x: x.stat().st_size)
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    called = cli(*words("--save-every", 1, "--resume"))
    assert called.code == 0
    said = " ".join(called.err.split())
    assert "not what was written; done again: step-00000002" in said
    assert "resume: 1 of 4 steps are done" in said  # from the checkpoint before
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
    saved, unlimited = adapt_checkpoint.save, resource.getrlimit(resource.RLIMIT_FSIZE)[0]

    def save(folder, history, events):
        if len(history.losses) == 2:
            full_disk(3000)
        try:
            saved(folder, history, events)
        finally:
            full_disk(unlimited)

    with monkeypatch.context() as patch:
        patch.setattr(adapt_checkpoint, "save", save)
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
