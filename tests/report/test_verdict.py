"""The rule of SPEC section 10, case by case."""

import pytest

from ot_merge_jax.evaluate.compare import Difference
from ot_merge_jax.report.verdict import Compared, judge

LESS, MORE, UNCLEAR = (
    Difference(-0.2, -0.3, -0.1),
    Difference(0.2, 0.1, 0.3),
    Difference(-0.2, -0.5, 0.1),
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


def test_nothing_was_evaluated():
    assert judge(None, {}, missing=[]).outcome == "not evaluated"
