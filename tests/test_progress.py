"""What a loop shows while it runs: nothing, log lines, or a bar; with what was found so far."""

import io
import logging

import pytest
import rich.console

from ot_merge_jax import progress


@pytest.fixture
def console():
    return lambda is_terminal: rich.console.Console(
        file=io.StringIO(), force_terminal=is_terminal, width=120
    )


def looped(note):
    """Three items, the note asked for in between."""
    return list(progress.track(range(3), "adapt (steps)", note=note))


def test_a_library_user_sees_nothing():
    asked = []
    assert looped(lambda: asked.append(1) or "") == [0, 1, 2]
    assert not asked


def test_lines_hold_the_note(console, caplog, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    losses = iter(("", "loss 3.0", "loss 2.0"))
    with caplog.at_level(logging.INFO), progress.shown(console(False)):
        assert looped(lambda: next(losses)) == [0, 1, 2]
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("adapt (steps): 1 of 3, about ")
    assert lines[1].startswith("adapt (steps), loss 3.0: 2 of 3, about ")


def test_a_bar_holds_the_note(console):
    terminal = console(True)
    with progress.shown(terminal):
        assert looped(lambda: "loss 3.0") == [0, 1, 2]
    assert "adapt (steps), loss 3.0" in terminal.file.getvalue()
    assert "3/3" in terminal.file.getvalue()
