"""`ot-merge report`: rebuilds what a run wrote, and refuses what is no run."""

import json
import os

import pytest
import reported

from ot_merge_jax.reports import html


def test_rebuilds_the_same_files_of_a_real_run(merged, cli, tmp_path, hashes):
    out = merged("delta llama<-llama").out
    details = out / "ot_merge"
    assert (details / "report.html").is_file()
    copy = tmp_path / "run" / "ot_merge"
    copy.mkdir(parents=True)
    for name in ("report.json", "provenance.json", "recipe.yaml"):
        (copy / name).write_bytes((details / name).read_bytes())
    called = cli("report", tmp_path / "run")
    assert called.code == 0, called.err
    assert called.err == ""
    assert called.out.splitlines()[-1] == f"written: {copy / 'report.html'}"
    written = {name: digest for name, digest in hashes(details).items() if "coupling" not in name}
    assert hashes(copy) == written
    again = cli("report", copy, "--json")
    assert again.json["verdict"] == merged("delta llama<-llama").report.verdict
    assert again.json["files"][0] == str(copy / "report.html")
    assert hashes(copy) == written


def test_writes_the_report_alone_to_another_file(cli, tmp_path):
    details, file = reported.write(tmp_path / "run"), tmp_path / "page.html"
    before = set(details.iterdir())
    assert cli("report", tmp_path / "run", "--out", file).code == 0
    first = file.read_bytes()
    assert first.startswith(b"<!DOCTYPE html>")
    assert set(details.iterdir()) == before
    for words, code in (((), 3), (("--overwrite",), 0)):
        file.write_bytes(b"mine")
        called = cli("report", details, "--out", file, *words)
        assert called.code == code
        assert file.read_bytes() == (first if code == 0 else b"mine")
    for place in (tmp_path, tmp_path / "none" / "page.html"):
        assert_refused(cli("report", details, "--out", place, "--overwrite"), place.parent.name)


def assert_refused(called, words):
    assert called.code == 3
    [line] = called.err.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert called.out == ""


def changed(**parts):
    return json.dumps(reported.report() | parts)


DAMAGED = {
    "cut off": (changed()[:200], "not JSON, from line 1"),
    "empty": ("", "not JSON, from line 1"),
    "a list": ("[1]", "the whole: "),
    "no verdict": ("{}", "verdict: "),
    "a text for a number": (changed(evaluation={"merge": {"nll_per_token": "much"}}), "evaluation"),
    "rows of two lengths": (changed(sites={"s": {"layer_plan": [[1.0], [1.0, 2.0]]}}), "sites.s."),
    "no row": (changed(sites={"s": {"layer_plan": []}}), "sites.s.layer_plan"),
    "a curve of two lengths": (
        changed(sites={"s": {"layer_plan": [[1.0]], "mass_curve": {"k": [1], "share": [[1, 2]]}}}),
        "k and share",
    ),
    "deep": ("[" * 100_000, "not JSON"),
    "a long number": ("9" * 5000, "not JSON"),
    "a number without end": (changed(evaluation={"merge": {"tokens": 10**400}}), ""),
    "a hostile key": (changed(sites={"\x1b[31m": 7}), r"\x1b[31m"),
    "not UTF-8": (b"{\xff", "not UTF-8"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_json_is_refused_with_a_sentence(name, cli, tmp_path):
    text, words = DAMAGED[name]
    details = reported.write(tmp_path)
    (details / "report.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    called = cli("report", tmp_path)
    if not words:  # a strange number may also be shown
        assert called.code in (0, 3)
        return
    assert_refused(called, words)
    assert not (details / html.FILE).exists()


@pytest.mark.parametrize("file", ["provenance.json", "recipe.yaml"])
def test_incomplete_run_is_refused(file, cli, tmp_path):
    details = reported.write(tmp_path)
    (details / file).unlink()
    os.mkfifo(details / file)  # it would be waited for
    assert_refused(cli("report", tmp_path), file)


def test_no_run_is_refused(cli, tmp_path):
    assert_refused(cli("report", tmp_path), "is not a run")
    assert_refused(cli("report", tmp_path / "none"), "is not a run")


def test_a_report_of_a_later_version_is_refused(cli, tmp_path):
    details = reported.write(tmp_path, found=reported.report() | {"version": 2})
    assert_refused(cli("report", tmp_path), "report.json is a report of version 2")
    assert not (details / html.FILE).exists()


def test_a_report_of_the_first_version_and_one_without_have_the_same_page(cli, tmp_path):
    pages = []
    for name, more in (("old", {}), ("new", {"version": 1})):
        details = reported.write(tmp_path / name, found=reported.report() | more)
        assert cli("report", tmp_path / name).code == 0
        pages.append((details / html.FILE).read_bytes())
    assert pages[0] == pages[1]
