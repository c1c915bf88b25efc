"""The figures of docs/benchmarks.md are those that the benchmarks wrote."""

import importlib
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("benchmark_tables")


def test_the_page_holds_what_was_measured(script, monkeypatch, tmp_path):
    page = shutil.copy(ROOT / "docs" / "benchmarks.md", tmp_path / "benchmarks.md")
    monkeypatch.setattr("sys.argv", ["benchmark_tables.py", "--page", str(page)])
    script.main()
    assert page.read_text(encoding="utf-8") == PAGE, "run python scripts/benchmark_tables.py"


def test_every_result_has_a_table_and_every_benchmark_a_result(script):
    results = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.json"))
    assert results == sorted(p.stem.removeprefix("bench_") for p in ROOT.glob("scripts/bench_*.py"))
    machines = script.tables(ROOT / "benchmarks")["machines"]
    assert re.findall(r"bench_(\w+)\.py", machines) == results


def test_a_figure_edited_by_hand_is_found(script):
    tables = script.tables(ROOT / "benchmarks")
    for name, body in tables.items():
        digit = re.search(r"\d", body.split("\n", 2)[2])
        place = PAGE.index(body) + body.index("\n", body.index("\n") + 1) + 1 + digit.start()
        edited = PAGE[:place] + str((int(PAGE[place]) + 1) % 10) + PAGE[place + 1 :]
        assert script.filled(edited, tables) == PAGE != edited, name


def test_words_outside_of_tables_stay_and_names_are_checked(script):
    page = "before <!-- table:a -->\n<!-- /table --> after"
    assert script.filled(page, {"a": "| 1 |"}) == (
        "before <!-- table:a -->\n| 1 |\n<!-- /table --> after"
    )
    for tables in ({}, {"b": ""}, {"a": "", "b": ""}):
        with pytest.raises(ValueError, match="places"):
            script.filled(page, tables)
