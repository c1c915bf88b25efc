"""What an adaptation reads: all of a text, or a seeded sample of it."""

import pytest

from ot_merge_jax.errors import InputError, RecipeError
from ot_merge_jax.recipes import training
from ot_merge_jax.runs import adapt_inputs


@pytest.fixture
def checked(tiny_checkpoint, text_file, tmp_path):
    """``checked(**more)`` -> the inputs of an adaptation on sixty documents."""

    def check(path=text_file, **more):
        said = {"model": str(tiny_checkpoint()), "text": {"path": str(path)}, "block": 32}
        return adapt_inputs.check(training.resolve(said | more), tmp_path / "out")

    return check


@pytest.mark.parametrize(
    ("samples", "learned", "dev"), [(None, 48, 12), (16, 16, 4), (1000, 48, 12)]
)
def test_samples_are_learned_from_beside_their_dev_split(samples, learned, dev, checked):
    assert checked(samples=samples).counts == {"documents": learned, "dev_documents": dev}


def test_sample_is_the_seeds(checked):
    tokens = [checked(samples=16, seed=seed).problem.train.tokens.tolist() for seed in (0, 0, 1)]
    assert tokens[0] == tokens[1] != tokens[2]


def test_no_samples_are_refused(checked, tmp_path):
    with pytest.raises(RecipeError, match="samples"):
        checked(samples=0)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    with pytest.raises(InputError, match="too few documents"):
        checked(path=empty, samples=4)
