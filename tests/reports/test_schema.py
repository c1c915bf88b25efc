"""The schema of ``report.json``: nothing is lost between reading and writing, and versions."""

import json

import pytest
import reported

from ot_merge_jax.errors import InputError, VersionError
from ot_merge_jax.reports import schema
from ot_merge_jax.reports.schema import Dev, Difference, Entry, Report, Residual, Strength, Tried

#: Every field of a report that is a model, from the top down.
MODELS = [
    one for one in vars(schema).values() if isinstance(one, type) and issubclass(one, schema.Part)
]


def typed(value):
    """A JSON value in which 1, 1.0 and true differ."""
    return json.dumps(value, sort_keys=True)


def written(folder, value):
    path = folder / "report.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_every_key_and_kind_of_number_survives(tmp_path):
    value = reported.report() | {"version": 1}
    report = schema.read(written(tmp_path, value))
    assert typed(json.loads(report.to_json())) == typed(value)
    assert typed(report.to_dict()) == typed(value)


@pytest.mark.parametrize("model", MODELS)
def test_what_was_not_set_is_not_written(model):
    """And so an older report is written as it was, without keys that it did not have."""
    needed = {"verdict": "v.", "strength": 1, "curve": [[0, 1.5]], "k": [1], "share": [[1]],
              "layer_plan": [[1]], "text": "t", "prompt": "p"}  # fmt: skip
    value = {key: needed[key] for key, field in model.model_fields.items() if field.is_required()}
    dumped = model.model_validate(value).model_dump_json(exclude_unset=True)
    assert typed(json.loads(dumped)) == typed(value)


def test_null_that_was_set_is_written_and_a_list_that_is_null_is_none_at_all():
    value = {"verdict": "v.", "outcome": None, "residual": {"merged_at": None, "held_at": {}}}
    report = Report.model_validate(value | {"warnings": None, "controls": None})
    assert typed(report.to_dict()) == typed(value)
    assert (report.warnings, report.controls) == ([], {})


def test_numbers_that_are_not_finite_are_null():
    infinite, missing = float("inf"), float("nan")
    report = Report(
        version=schema.VERSION,
        verdict="v.",
        evaluation={"merge": Entry(nll_per_token=missing, tokens=3)},
        strength=Strength(chosen={"projections": 1}, tried=[Tried(strength=0.5, loss=infinite)]),
        dev=Dev(curve=[[0, 2.5], [4, infinite]]),
        residual=Residual(held_at={"projections": missing}),
    )
    assert typed(json.loads(report.to_json())) == typed(
        {
            "version": 1,
            "verdict": "v.",
            "dev": {"curve": [[0, 2.5], [4, None]]},
            "evaluation": {"merge": {"tokens": 3, "nll_per_token": None}},
            "residual": {"held_at": {"projections": None}},
            "strength": {"chosen": {"projections": 1}, "tried": [{"strength": 0.5, "loss": None}]},
        }
    )
    assert next(iter(json.loads(report.to_json()))) == "version"


def test_a_report_without_a_version_is_read(tmp_path):
    report = schema.read(written(tmp_path, {"verdict": "merged.", "of another time": 1}))
    assert report.version is None
    assert typed(report.to_dict()) == typed({"verdict": "merged."})


@pytest.mark.parametrize("version", [2, 10**30])
def test_a_later_version_is_refused_whatever_else_it_says(version, tmp_path):
    path = written(tmp_path, {"version": version, "verdict": {"is": "a mapping now"}})
    with pytest.raises(VersionError) as caught:
        schema.read(path)
    assert str(caught.value) == (
        f"{path} is a report of version {version}, and this ot-merge reads versions up to 1; "
        "install a newer ot-merge-jax, or run again with this one."
    )


@pytest.mark.parametrize("version", [0, -1, "1.x", 1.5, [1]])
def test_a_version_that_is_none_is_damage(version, tmp_path):
    with pytest.raises(InputError, match="is damaged: version: ") as caught:
        schema.read(written(tmp_path, {"version": version, "verdict": "v."}))
    assert not isinstance(caught.value, VersionError)


@pytest.mark.parametrize("number", ["much", [1], 10**400])
def test_what_is_no_number_is_refused(number):
    with pytest.raises(ValueError, match="valid number"):
        Difference.model_validate({"low": number})
