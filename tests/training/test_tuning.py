"""One arm: rates that train together give what the loop gives; the dev split chooses."""

import math

import jax
import pytest

from ot_merge_jax.errors import DivergedError
from ot_merge_jax.training import step as train_step
from ot_merge_jax.training import tuning

#: The last one ends in numbers that are not finite.
RATES = [0.003, 0.01, 1e38]


@pytest.fixture(scope="module")
def tuned(student, teacher, residual, problem):
    """``tuned(kind, is_together, rates)`` -> the arm, trained once."""
    made = {}

    def make(kind, is_together, rates=RATES):
        key = (kind, is_together, *rates)
        if key not in made:
            task = problem(kind, clip=1e30, schedule="constant")
            factor = {"projections": 1.0, "vocabulary": 1.0}
            source = teacher[1] if kind == "kd" else None
            begun = train_step.begin(task, student[1], residual, factor, source)
            made[key] = tuning.tune(task, *begun, rates, is_together=is_together)
        return made[key]

    return make


@pytest.mark.parametrize("kind", ["sft", "kd"])
def test_rates_together_are_rates_one_by_one(kind, tuned, close):
    one, other = (tuned(kind, is_together) for is_together in (False, True))
    assert one.best.rate == other.best.rate
    for loop, lane in zip(one.tried, other.tried, strict=True):
        assert loop.rate == lane.rate
        close(loop.losses, lane.losses, 1e-5)
        assert [step for step, _ in loop.dev] == [step for step, _ in lane.dev]
        close([loss for _, loss in loop.dev], [loss for _, loss in lane.dev], 1e-5)
    close(one.trained, other.trained, 1e-5)


@pytest.mark.parametrize("is_together", [False, True])
def test_a_rate_that_diverges_is_a_bad_rate(is_together, tuned):
    arm = tuned("sft", is_together)
    assert [math.isfinite(one.loss) for one in arm.tried] == [True, True, False]
    assert len(arm.tried[2].losses) < len(arm.tried[0].losses) == 4
    with pytest.raises(DivergedError, match=r"of arm \(1e\+38\) diverged; lower --rates"):
        tuned("sft", is_together, RATES[2:])


def test_the_lowest_dev_loss_at_the_end_is_taken(tuned):
    arm = tuned("sft", False)
    assert arm.best.loss == arm.best.dev[-1][1] == min(one.loss for one in arm.tried)


def test_rates_train_together_where_they_fit(student, problem, monkeypatch):
    task, seen = problem(), []
    need = train_step.lane_bytes(task, student[1])
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(student[1]))
    assert need > 6 * weights + 4 * 9 * student[0].vocab_size * 4  # batch, length
    for name in ("_together", "_one_by_one"):
        found = [tuning.TriedRate(0.1, [], [], 1.0)], None
        monkeypatch.setattr(
            tuning, name, lambda *_, name=name, found=found: seen.append(name) or found
        )
    begun = train_step.begin(task, student[1], {}, {})
    for most, rates in ((2 * need, [0.1, 0.2]), (2 * need - 1, [0.1, 0.2]), (2 * need, [0.1])):
        monkeypatch.setattr(tuning, "budget", lambda most=most: most)
        tuning.tune(task, *begun, rates)
    assert seen == ["_together", "_one_by_one", "_one_by_one"]
