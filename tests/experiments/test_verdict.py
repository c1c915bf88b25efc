"""The rule of method: Controls, case by case."""

import numpy as np
import pytest

from ot_merge_jax.evaluation.nll import Scores
from ot_merge_jax.evaluation.statistics import MeanDifference
from ot_merge_jax.experiments import controls, summary
from ot_merge_jax.experiments.trial import Arm, Trial, WithTokenBias
from ot_merge_jax.experiments.verdict import Compared, judge, of_merge, of_training
from ot_merge_jax.recipes.recipe import CONTROLS
from ot_merge_jax.types import HParams, MergeReport, MergeSpec, WeightReport

LESS, MORE, UNCLEAR = (
    MeanDifference(-0.2, -0.3, -0.1),
    MeanDifference(0.2, 0.1, 0.3),
    MeanDifference(-0.2, -0.5, 0.1),
)


def compared(change, seeds=None):
    return Compared(change, seeds or [change])


@pytest.mark.parametrize(
    ("against", "controls", "missing", "outcome", "words"),
    [
        (LESS, {"noise 1": LESS, "unigram": LESS}, [], "improved", "one calibration seed"),
        (LESS, {"unigram": LESS}, ["noise"], "better", "not run: noise"),
        (LESS, {}, ["noise", "unigram"], "better", "no controls were run"),
        (LESS, {"noise 1": UNCLEAR}, [], "no measurable difference", "control noise 1"),
        (LESS, {"noise 1": MORE}, [], "no measurable difference", "control noise 1"),
        (LESS, {"unigram": UNCLEAR}, [], "no measurable difference", "beyond unigram"),
        (UNCLEAR, {"unigram": LESS}, [], "no measurable difference", "from the target"),
        (MORE, {"unigram": LESS}, [], "worse", "worse than the target"),
        (MORE, {}, [], "worse", "one calibration seed"),
        (UNCLEAR, {}, [], "no measurable difference", "one calibration seed"),
        (LESS, {"unigram": UNCLEAR}, [], "no measurable difference", "one calibration seed"),
    ],
)
def test_one_seed(against, controls, missing, outcome, words):
    found = judge(
        compared(against), {name: compared(one) for name, one in controls.items()}, missing=missing
    )
    assert found.outcome == outcome
    assert words in found.sentence
    assert "\n" not in found.sentence


def test_every_seed_must_agree_in_sign():
    agree, differ = compared(LESS, [LESS, LESS]), compared(LESS, [LESS, MORE])
    assert judge(agree, {"unigram": agree}, missing=[]).outcome == "improved"
    assert "2 calibration seeds agree" in judge(agree, {}, missing=[]).sentence
    assert judge(differ, {}, missing=[]).outcome == "no measurable difference"
    assert judge(agree, {"permuted": differ}, missing=[]).outcome == "no measurable difference"


@pytest.mark.parametrize("change", [LESS, MORE])
@pytest.mark.parametrize(("documents", "is_enough"), [(1, False), (5, False), (6, True)])
def test_few_documents_show_nothing(documents, is_enough, change):
    """However clear the interval looks: of five documents all agree by chance in 1 of 16 texts."""
    against = Compared(change, [change], documents)
    found = judge(against, {"unigram": compared(LESS)}, missing=[])
    assert (found.outcome == "no measurable difference") is not is_enough
    assert (f"has {documents} document" in found.sentence) is not is_enough
    of_start = of_training({"sft": {"base": against}}, best="sft", steps=9, missing=[])
    assert (of_start.outcome == "no measurable difference") is not is_enough
    assert (f"has {documents} document" in of_start.sentence) is not is_enough


def test_without_a_dev_split_nothing_is_known_beyond_unigram():
    """So it is not `improved`, though every control that applies has been beaten."""
    count = np.full(8, 10)
    target, merge = (Scores(np.full(8, nats), count, count) for nats in (30.0, 20.0))
    arms_of = {name: Arm(1.0, [], target) for name in controls.BROKEN if name != "shrink"}
    trial = Trial(0, {"merge": Arm(1.0, [], merge), **arms_of}, {})
    spec = MergeSpec(weights=("up",), rule="delta")

    def outcome(trial, *, has_dev):
        reasons = {
            name: controls.inapplicable_reason(name, spec=spec, source_layers=3, has_dev=has_dev)
            for name in controls.arms(CONTROLS)
        }
        inapplicable = {name: why for name, why in reasons.items() if why is not None}
        return summary.outcome([trial], target, kinds=CONTROLS, inapplicable=inapplicable, seed=0)

    verdict, against, controlled = outcome(trial, has_dev=False)
    assert against.documents == 8
    assert verdict.outcome == "better", verdict.sentence
    assert "not run: unigram" in verdict.sentence
    assert controlled.controls["unigram"].model_dump(exclude_unset=True) == {
        "not_applicable": "there is no dev split to choose its share on"
    }
    with_bias = {"target": WithTokenBias(1.0, target), "merge": WithTokenBias(1.0, merge)}
    verdict, _, _ = outcome(trial._replace(biased=with_bias), has_dev=True)
    assert verdict.outcome == "improved", verdict.sentence


def test_nothing_was_evaluated():
    assert judge(None, {}, missing=[]).outcome == "not evaluated"


# ---- the verdict of a merge ----

BETTER, WORSE, SAME = (
    MeanDifference(-0.1, -0.2, -0.05),
    MeanDifference(0.1, 0.05, 0.2),
    MeanDifference(-0.01, -0.1, 0.08),
)

UNCHANGED = "strength 0: the output is the target, unchanged"
NOTHING = "nothing of the source was transferred"


def say(*, ratio=0.1, strength=0.5, is_auto=False, rule="delta", form="barycentric", change=SAME):
    """The verdict on a merge whose one weight has ``|W~| / |W| = ratio``."""
    one = np.ones(2, np.float32)
    weights = {"up": WeightReport(ratio * one, one, *[one] * 4, one, one > 0)}
    spec = MergeSpec(weights=("up",), rule=rule, form=form)
    report = MergeReport(weights, None, 2)
    against = change and compared(change)
    measured = judge(against, {}, missing=["noise"])
    return of_merge(measured, report, HParams(strength), spec, against, is_auto=is_auto).sentence


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"strength": 0.0}, UNCHANGED),
        ({"strength": 0.0, "is_auto": True}, "strength 0 was best on the dev split: the output is"),
        ({"strength": {"projections": 0.0, "vocabulary": 0.0}}, UNCHANGED),
        ({"strength": 0.0, "ratio": 0.0}, UNCHANGED),
        ({"ratio": 1e-5, "form": "joint"}, f"{NOTHING}: the joint form vanishes; barycentric, and"),
        ({"ratio": 1e-5, "form": "joint", "rule": "interpolate"}, f"{NOTHING}: the joint form"),
        ({"ratio": 0.0}, f"{NOTHING}: source and source base may be the same"),
        (
            {"ratio": 0.0, "rule": "residual"},
            f"{NOTHING}: the source's weights may be next to zero",
        ),
        ({"strength": 1e-5}, f"{NOTHING}: the strength is next to zero; raise it"),
        (
            {"strength": 1e-5, "change": WORSE},
            f"{NOTHING}: the strength is next to zero; raise it; "
            "the held-out change is +0.1000 nats",
        ),
        ({"change": None}, "merged; not evaluated"),
        ({"change": WORSE}, "worse than the target on held-out text: +0.1000 nats"),
        ({"change": BETTER}, "better than the target on held-out text: -0.1000 nats"),
        ({"change": SAME}, "no measurable difference from the target on held-out text: -0.0100"),
        ({"strength": {"projections": 0.2, "vocabulary": 0.0}, "change": BETTER}, "better than"),
    ],
)
def test_verdict_says_what_was_shown(changes, start):
    sentence = say(**changes)
    assert sentence.startswith(start)
    assert sentence.endswith(".")
    assert "\n" not in sentence


@pytest.mark.parametrize("change", [BETTER, WORSE, SAME])
def test_verdict_names_the_interval(change):
    assert f"95 % interval [{change.low:+.4f}, {change.high:+.4f}]" in say(change=change)


def test_better_admits_that_no_controls_were_run():
    assert "no controls were run" in say(change=BETTER)


@pytest.mark.parametrize("edge", [MeanDifference(-0.1, -0.2, 0.0), MeanDifference(0.1, 0.0, 0.2)])
def test_interval_that_touches_zero_is_no_difference(edge):
    assert say(change=edge).startswith("no measurable difference")
