"""Sizes of flags: what is read, and what is refused."""

import pytest

from ot_merge_jax.cli import sizes
from ot_merge_jax.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "size"),
    [("1024", 1024), ("8GiB", 8 << 30), ("8g", 8 << 30), ("1.5 MB", 3 << 19), ("2T", 2 << 40)],
)
def test_sizes_are_read(text, size):
    assert sizes.bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-1G", "8 XB", "0", "1e3", "8GiBs", "nan"])
def test_what_is_not_a_size_is_refused(text):
    with pytest.raises(RecipeError, match="8GiB"):
        sizes.bytes_of(text)


@pytest.mark.parametrize("text", ["", "data", "data=", "data=two", "data=0", "data=2,model=-1"])
def test_what_is_not_a_mesh_is_refused(text):
    with pytest.raises(RecipeError, match="data=2,model=4"):
        sizes.axes_of(text)


def test_what_is_not_given_stays_so():
    assert sizes.bytes_of(None) is None
    assert sizes.axes_of(None) is None
