"""`ot-merge adapt RUN --baselines`: equal budgets; the held-out text chooses nothing."""

import json

import numpy as np
import pytest
from published import assert_nothing_is_lost, report_of, tensors

from ot_merge_jax.errors import DivergedError
from ot_merge_jax.models import specs
from ot_merge_jax.runs import baselines
from ot_merge_jax.training import initial, step, tuning

COMMON = ("--block", 24, "--batch-size", 4, "--steps", 3, "--rates", "0.003,0.03")


class Compared:
    """A finished comparison."""

    def __init__(self, out, called, batches):
        self.out, self.called, self.batches = out, called, batches
        self.report = report_of(out)

    @property
    def arms(self):
        return self.report.baselines.arms


@pytest.fixture(scope="session")
def compare(tmp_path_factory, cli, text_files):
    """``compare(model, *flags)`` -> `Compared`, with the batches that its arms were given."""

    def make(model, *flags):
        out, batches, real = tmp_path_factory.mktemp("compared") / "out", [], step.batch_of

        def batch_of(problem, index, **given):
            found = real(problem, index, **given)
            place = problem.objective.kind, problem.settings.seed, index
            batches.append((place, np.asarray(found.tokens).tobytes()))
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step, "batch_of", batch_of)
            words = ("--text", text_files[0], *COMMON, *flags, "--out", out)
            called = cli("adapt", model, *words)
        assert called.code == 0, called.err
        return Compared(out, called, batches)

    return make


@pytest.fixture(scope="session")
def merge(merged):
    return merged("delta llama<-llama")


@pytest.fixture(scope="session")
def flags(models, text_files):
    return ("--baselines", "all", "--source", models["llama-source"], "--eval-text", text_files[1])


@pytest.fixture(scope="session")
def both(compare, merge, flags):
    """Every start, both objectives."""
    return compare(merge.out, *flags)


@pytest.fixture(scope="session")
def shrunk(compare, merged, text_files):
    """Of a rule that shrinks, without a teacher, two seeds."""
    merge = merged("barycentric llama<-qwen2")
    more = ("--baselines", "shrink", "--seeds", 2, "--eval-text", text_files[1])
    return compare(merge.out, *more, "--strength", 0.2)


# ---- equal budgets ----


def test_every_arm_sees_the_same_batches_in_the_same_order(both, shrunk):
    for found in (both, shrunk):
        seen = {}
        for place, tokens in found.batches:
            seen.setdefault(place, []).append(tokens)
        assert {index for _, _, index in seen} == {0, 1, 2}
        for (_, seed, _), given in seen.items():
            assert len(given) == 3 * (1 if seed else 2)  # starts, rates
            assert len(set(given)) == 1
    assert {kind for (kind, _, _), _ in both.batches} == {"sft", "kd"}
    assert len({tokens for place, tokens in shrunk.batches if place[2] == 0}) == 2  # two seeds


def test_every_arm_tries_the_same_rates_and_keeps_the_best_on_dev(both):
    for of_start in both.arms.values():
        assert list(of_start) == ["merge", "base", "noise"]
        for arm in of_start.values():
            assert [point.rate for point in arm.tried] == [0.003, 0.03]
            best = min(arm.tried, key=lambda point: point.loss)
            assert arm.rate == best.rate
            assert arm.curve[-1] == [3, pytest.approx(best.loss, abs=1e-9)]


def test_the_held_out_text_chooses_nothing(both, compare, merge, flags, documents, tmp_path):
    """With another held-out text only what is said of it differs."""
    other = tmp_path / "other.txt"
    other.write_text("\n".join(f"{one} 1984" for one in reversed(documents[-6:])) + "\n")
    again = compare(merge.out, *flags[:-1], other)
    for name, (_, leaf) in tensors(both.out).items():
        np.testing.assert_array_equal(tensors(again.out)[name][1], leaf)
    for objective, of_start in both.arms.items():
        for name, arm in of_start.items():
            one = again.arms[objective][name]
            assert [getattr(arm, key) for key in ("rate", "tried", "curve", "merge_steps")] == [
                getattr(one, key) for key in ("rate", "tried", "curve", "merge_steps")
            ]
            assert arm.nll_per_token != one.nll_per_token
    assert both.report.baselines.best == again.report.baselines.best
    assert both.report.dev == again.report.dev


# ---- starts ----


def test_noise_has_the_norm_of_every_matrix_and_the_place_of_the_merge(merge):
    begun = initial.open_start(str(merge.out))
    parts = initial.load(begun)
    noise = baselines.starting("noise", begun, parts, seed=0)
    assert noise.keys() == parts.residual.keys()
    for path, leaf in parts.residual.items():
        axes = tuple(range(path.startswith("layers/"), leaf.ndim))
        norms = [np.sqrt(np.sum(np.square(one), axes)) for one in (leaf, noise[path])]
        np.testing.assert_allclose(*norms, rtol=1e-3)
        assert not np.any(noise[path] * (1 - baselines.update_of(path, leaf)))
    other = baselines.starting("noise", begun, parts, seed=1)
    assert all(np.any(noise[path] != other[path]) for path in noise)


def test_shrink_is_what_the_rule_leaves_without_a_source(shrunk, merged):
    begun = initial.open_start(str(merged("barycentric llama<-qwen2").out))
    parts = initial.load(begun)
    alpha = begun.merged["projections"]
    found = baselines.starting("shrink", begun, parts, seed=0)
    for path in parts.residual:
        weight = specs.get(parts.base, path)
        np.testing.assert_allclose(found[path], -alpha * weight, atol=1e-6)
    assert list(shrunk.arms["sft"]) == ["merge", "base", "shrink"]


def test_the_base_is_the_target_before_training(both, merge):
    """The first point of its curve: the dev loss of the target; of the merge that of the merge."""
    before = {name: arm.curve[0][1] for name, arm in both.arms["sft"].items()}
    assert before["merge"] == both.report.dev.before
    assert len(set(before.values())) == 3
    assert before == {name: arm.curve[0][1] for name, arm in both.arms["kd"].items()}


# ---- what is said ----


def test_the_best_merge_is_published(both, merge):
    best = both.report.baselines.best
    ends = {name: one["merge"].curve[-1][1] for name, one in both.arms.items()}
    assert best == both.report.objective == min(ends, key=ends.get)
    after = both.report.evaluation["after"].nll_per_token
    assert after == pytest.approx(both.arms[best]["merge"].nll_per_token, abs=1e-6)
    kept, begun = (initial.load(initial.open_start(str(one))) for one in (both.out, merge.out))
    for path, leaf in begun.residual.items():
        np.testing.assert_array_equal(kept.residual[path], leaf)
        assert np.any(specs.get(kept.base, path) != specs.get(begun.base, path))


def test_differences_are_those_of_the_losses(both, shrunk):
    for found in (both, shrunk):
        for of_start in found.arms.values():
            for name, arm in of_start.items():
                if name == "merge":
                    assert arm.merge_minus is None
                    continue
                change = arm.merge_minus
                wanted = of_start["merge"].nll_per_token - arm.nll_per_token
                assert change.difference == pytest.approx(wanted)
                assert change.low <= change.difference <= change.high
    seeds = shrunk.arms["sft"]["base"].merge_minus.seeds
    assert [one.seed for one in seeds] == [0, 1]
    assert seeds[0].difference != seeds[1].difference


def test_what_was_not_run_is_said(both, shrunk):
    assert both.report.baselines.not_applicable == {
        "shrink": "under rule delta it is the target itself"
    }
    assert "shrink: not applicable, under rule delta" in both.called.out
    assert shrunk.report.baselines.not_run == ["kd: it needs --source, a teacher"]
    assert "not run: kd: it needs --source" in shrunk.called.out
    assert "not run: noise" in shrunk.report.verdict or shrunk.report.outcome != "better"


def test_every_key_of_the_report_is_of_the_schema(both, shrunk):
    for found in (both, shrunk):
        assert_nothing_is_lost(found.out)


def test_the_terminal_and_the_report_show_the_arms(both, shrunk):
    for found in (both, shrunk):
        page = (found.out / "ot_merge" / "report.html").read_text()
        assert "<h2>Training</h2>" in page
        assert found.report.verdict in found.called.out.replace("\n", " ")
        for objective, of_start in found.arms.items():
            assert f"<h3>{objective}</h3>" in page
            for name, arm in of_start.items():
                [row] = [
                    one for one in found.called.out.split("\n")
                    if one.strip().startswith(f"{objective} from {name} ")
                ]  # fmt: skip
                assert f"{arm.nll_per_token:.4f}" in row
                assert f"{arm.nll_per_token:.4f}" in page
    assert "seed 1:" in page
    for warning in both.report.warnings:
        assert "widen the grid with --rates" in warning


def test_events_name_their_arm(both):
    lines = (both.out / "ot_merge" / "events.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    arms_seen = {(one["objective"], one["start"]) for one in found}
    assert arms_seen == {(kind, name) for kind, of in both.arms.items() for name in of}
    assert len(found) == 3 * len(arms_seen)
    for one in found:
        assert ("dev_loss" in one) == (one["step"] in {1, 2, 3})


# ---- runs that survive ----


def test_an_interrupted_comparison_goes_on_behind_the_last_arm(
    both, merge, flags, text_files, cli, tmp_path, monkeypatch
):
    real, tuned = tuning.tune, []

    def tune(*args, name, **given):
        tuned.append(name)
        if len(tuned) == 3:
            raise KeyboardInterrupt
        return real(*args, name=name, **given)

    monkeypatch.setattr(tuning, "tune", tune)
    words = ("--text", text_files[0], *COMMON, *flags, "--out", tmp_path / "out", "-q")
    called = cli("adapt", merge.out, *words)
    assert called.code == 130
    assert "--resume" in called.err
    called = cli("adapt", merge.out, *words, "--resume")
    assert called.code == 0, called.err
    assert tuned == [
        "sft from merge", "sft from base", "sft from noise", "sft from noise",
        "kd from merge", "kd from base", "kd from noise",
    ]  # fmt: skip
    assert report_of(tmp_path / "out") == both.report
    for name, (_, leaf) in tensors(both.out).items():
        np.testing.assert_array_equal(tensors(tmp_path / "out")[name][1], leaf)


# ---- bad input ----

ROWS = {
    "unknown": (("--baselines", "base,noize"), "Input should be 'base', 'shrink' or 'noise'"),
    "no text": (("--baselines", "all"), "give evaluation (--eval-text)"),
    "objective": (("--baselines", "all", "--eval-text", "t", "--objective", "kd", "--source", "s"),
                  "leave objective out"),
    "no steps": (("--baselines", "all", "--eval-text", "t", "--steps", 0), "equal budgets"),
    "patience": (("--baselines", "all", "--eval-text", "t", "--patience", 1), "equal budgets"),
    "rates": (("--baselines", "all", "--eval-text", "t", "--rates", "1e-4,x"), "rates.1"),
    "rate 0": (("--baselines", "all", "--eval-text", "t", "--rates", "0"), "greater than 0"),
    "alone": ((), "rates and seeds are those of baselines"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_bad_flags_are_refused(name, merge, text_files, cli, tmp_path):
    more, sentence = ROWS[name]
    words = ("--text", text_files[0], *COMMON, "--out", tmp_path / "out", "-q", *more)
    called = cli("adapt", merge.out, *words)
    assert (called.code, called.out) == (2, "")
    assert sentence in called.err
    assert called.err.count("\n") == 1


def test_what_is_no_merge_has_no_baselines(both, models, flags, text_files, cli, tmp_path):
    for model in (models["llama-target"], both.out):
        words = ("--text", text_files[0], *COMMON, *flags, "--out", tmp_path / "out", "-q")
        called = cli("adapt", model, *words)
        assert (called.code, called.out) == (2, "")
        assert "is not a folder of `ot-merge run` that moved anything; name one" in called.err


def test_a_teacher_of_other_tokens_teaches_every_start(compare, merge, models, text_files):
    """By universal distillation; both objectives read the same blocks."""
    more = ("--baselines", "base", "--source", models["qwen2-source"], "--steps", 1)
    found = compare(merge.out, *more, "--rates", 0.01, "--eval-text", text_files[1])
    assert found.report.data["universal_distillation"] is True
    assert {kind: list(arms) for kind, arms in found.arms.items()} == {
        "sft": ["merge", "base"], "kd": ["merge", "base"],
    }  # fmt: skip
    assert len({tokens for _, tokens in found.batches}) == 1


def test_a_rate_that_diverges_with_a_later_seed_is_not_the_end(
    compare, merge, text_files, monkeypatch
):
    real = tuning.tune

    def tune(problem, trainable, frozen, rates, **given):
        if problem.settings.seed == 1 and len(rates) == 1:
            raise DivergedError("The loss is nan at training step 1; lower the learning rate.")
        return real(problem, trainable, frozen, rates, **given)

    monkeypatch.setattr(tuning, "tune", tune)
    more = ("--baselines", "base", "--seeds", 2, "--steps", 1, "--eval-text", text_files[1])
    found = compare(merge.out, *more)
    assert "diverged with seed 1; all are tried" in " ".join(found.called.err.split())
    assert found.report.baselines.seeds == [0, 1]
