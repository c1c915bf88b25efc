"""Hides secrets and control characters in what is shown. Imports nothing of the package."""

from __future__ import annotations

import os
import re

_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_TOKENS = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{16,}")
_USERINFO = re.compile(r"(?<=://)[^\s/@'\"]+@")
_MASK = "[redacted]"


def redacted(text: str) -> str:
    """A text without secrets: the user's own token, any token of the hub, and logins inside URLs.

    Example:
        >>> redacted("https://me:hf_abcdefghijklmnopqrst@huggingface.co/owner/name")
        'https://[redacted]@huggingface.co/owner/name'
        >>> redacted("hf_abcdefghijklmnopqrst"), redacted("owner/name@main")
        ('[redacted]', 'owner/name@main')
    """
    for variable in _VARIABLES:
        token = os.environ.get(variable, "").strip()
        if len(token) >= 8:  # shorter values could be ordinary words
            text = text.replace(token, _MASK)
    return _USERINFO.sub(f"{_MASK}@", _TOKENS.sub(_MASK, text))


def visible(text: str) -> str:
    r"""A text on one line, with control characters escaped, so that none reaches a terminal.

    Example:
        >>> print(visible("red: \x1b[31m"))
        red: \x1b[31m
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
