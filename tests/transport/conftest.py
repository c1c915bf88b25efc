"""Fixtures of the transport tests."""

import jaxtyping
import pytest


@pytest.fixture
def unchecked(monkeypatch):
    """Switches the shape checks of the test run off: what a user gets is our own exception."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
