"""`eval` from Python: what the command prints."""

import numpy as np
import pytest

from ot_merge_jax.errors import RecipeError
from ot_merge_jax.evaluation import evaluate
from ot_merge_jax.evaluation.request import EvalRequest
from ot_merge_jax.recipes import recipe


@pytest.fixture(scope="module")
def folders(tiny_checkpoint):
    """A model, a copy of it that has moved, and one with other tokens."""
    near = {"hidden": 24, "layers": 2}
    return [
        str(one)
        for one in (
            tiny_checkpoint("llama", **near),
            tiny_checkpoint("llama", drift=0.1, **near),
            tiny_checkpoint("qwen2", **near),
        )
    ]


def test_evaluate_is_what_the_command_prints(folders, text_file):
    found = evaluate.evaluate(folders, EvalRequest(text=recipe.Text(path=str(text_file)), limit=5))
    metrics = {(one["a"], one["b"]): one for one in found["pairs"]}
    assert list(metrics) == [(folders[0], folders[1]), (folders[0], folders[2]),
                             (folders[1], folders[2])]  # fmt: skip
    for (a, b), pair in metrics.items():
        assert pair["metric"] == ("bits_per_byte" if folders[2] in (a, b) else "nll_per_token")
        values = [found["models"][name][pair["metric"]] for name in (a, b)]
        assert pair["difference"] == pytest.approx(values[0] - values[1])
    assert found["base"] == folders[0]
    assert ["kl_to_base" in found["models"][name] for name in folders] == [False, True, False]
    assert all(one["documents"] == 5 for one in found["models"].values())


def test_divergence_is_of_the_shorter_context(folders, text_file, tmp_path, tiny_checkpoint):
    """A model with a longer context than its base: the same windows for both, each token once."""
    ask = EvalRequest(text=recipe.Text(path=str(text_file)), limit=4)
    short = str(tiny_checkpoint("llama", hidden=24, layers=2, max_position_embeddings=24))
    found = evaluate.evaluate([short, folders[1]], ask)["models"]
    back = evaluate.evaluate([folders[1], short], ask)["models"]
    assert found[short]["tokens"] == back[short]["tokens"] == found[folders[1]]["tokens"]
    values = [found[folders[1]]["kl_to_base"], back[short]["kl_to_base"]]
    assert all(np.isfinite(values))
    assert values[0] > 0 < values[1]


def test_nothing_to_ask(folders):
    with pytest.raises(RecipeError, match="nothing to ask"):
        evaluate.evaluate(folders, EvalRequest())
