"""Tables for a terminal: nothing is compared that cannot be, nothing missing without a reason."""

import io

import pytest
import reported
from rich.console import Console

from ot_merge_jax.reports import eval_tables, tables
from ot_merge_jax.reports.schema import Report


def printed(table, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def rows_of(text):
    return {line.split()[0]: line for line in text.splitlines() if line.strip()}


def test_loss_of_a_source_with_other_tokens_is_not_shown():
    found = Report.model_validate(reported.report()).evaluation
    rows = rows_of(printed(tables.evaluation_table(found, title="Held-out text")))
    assert "3.3000" not in rows["source"]
    assert "other tokens" in rows["source"]
    assert "bits/byte" in rows["source"]
    assert "4.2500" in rows["merge"]


def test_a_control_that_does_not_apply_says_why():
    found = Report.model_validate(reported.report())
    text = printed(tables.controls_table(found))
    assert "not applicable" in rows_of(text)["shrink"]
    assert "shrink: it equals the base" in text
    assert "(*) compared with a bias per token" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("metric", ["nll_per_token", "bits_per_byte"])
def test_models_of_other_tokens_are_said_to_be_compared_by_byte_alone(metric):
    one = {"documents": 9, "tokens": 90, "nll_per_token": 4.0, "bits_per_byte": 2.0}
    pair = reported.difference(-0.1, metric=metric) | {"a": "x", "b": "y"}
    sentences = [
        part
        for part in eval_tables.parts({"models": {"x": one, "y": one}, "pairs": [pair]})
        if isinstance(part, str)
    ]
    is_mixed = metric == "bits_per_byte"
    assert any("bits per byte alone" in one for one in sentences) is is_mixed
    assert ("nats per token" in sentences[-1]) is not is_mixed
