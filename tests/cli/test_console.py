"""What a log line looks like: one plain line, however long, whatever stands in it."""

import logging
import re

import pytest

from ot_merge_jax.cli import console

LONG = "/a/folder/of models" * 20


@pytest.fixture
def logged(capsys, monkeypatch):
    """``logged(message)`` -> the lines of stderr where it is no terminal and narrow."""
    monkeypatch.setenv("COLUMNS", "40")
    logger = logging.getLogger("ot_merge_jax")
    before = logger.handlers, logger.propagate, logger.level

    def log(message, *arguments):
        with console.session(verbose=False, quiet=False):
            logging.getLogger("ot_merge_jax.somewhere").info(message, *arguments)
        out, err = capsys.readouterr()
        assert out == ""
        return err.splitlines()

    yield log
    logger.handlers, logger.propagate, logger.level = before


def test_a_long_line_is_not_wrapped_and_not_padded(logged):
    [line] = logged("load %s", LONG)
    assert re.fullmatch(rf"\[\S[^\]]*\] load {LONG}", line)


def test_every_line_has_its_time(logged):
    for _ in range(2):  # within a second, too
        [line] = logged("short")
        assert re.fullmatch(r"\[\S[^\]]*\] short", line)


def test_a_name_cannot_end_the_line_or_act_on_the_terminal(logged):
    [line] = logged("load %s", "a\nb\x1b[31m [bold]c[/bold] 字")
    assert line.endswith(r"load a\nb\x1b[31m [bold]c[/bold] 字")


def test_secrets_are_left_out(logged):
    [line] = logged("load hf_%s", "a" * 30)
    assert line.endswith("load [redacted]")
