"""What the tests of adaptation share: a small student, a teacher, a residual, problems."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_merge_jax.io.hf import load_hf
from ot_merge_jax.recipes.training import resolve
from ot_merge_jax.training import packing, step
from ot_merge_jax.training.losses import Objective

#: Of all problems: few shapes, since each compiles anew.
BLOCKS, LENGTH, BATCH = 12, 9, 4


@pytest.fixture(scope="session")
def student(tiny_checkpoint):
    """(cfg, params) of one layer."""
    return load_hf(tiny_checkpoint("llama", layers=1), dtype=jnp.float32)


@pytest.fixture(scope="session")
def teacher(tiny_checkpoint):
    """(cfg, params) of two layers and another width, with the student's vocabulary."""
    return load_hf(tiny_checkpoint("llama", layers=2, hidden=36, seed=5), dtype=jnp.float32)


@pytest.fixture(scope="session")
def residual(student):
    """A residual of every other projection and of the embedding."""
    rng = np.random.default_rng(3)
    layers = student[1]["layers"]
    leaves = {
        "layers/mlp/up_proj/kernel": layers["mlp"]["up_proj"]["kernel"],
        "layers/self_attn/o_proj/kernel": layers["self_attn"]["o_proj"]["kernel"],
        "embed_tokens/embedding": student[1]["embed_tokens"]["embedding"],
    }
    return {
        path: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32)
        for path, leaf in leaves.items()
    }


def blocks_of(cfg, *, seed=0, count=BLOCKS):
    """Random blocks, of each of which something does not count."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, cfg.vocab_size, (count, LENGTH)).astype(np.int32)
    loss_mask = rng.random(tokens.shape) < 0.7
    loss_mask[:, 1] = True
    return packing.Blocks(tokens, np.ones_like(loss_mask), loss_mask)


@pytest.fixture(scope="session")
def problem(student, teacher):
    """``problem(kind="sft", remat=False, **settings)`` -> `step.Problem` of random blocks."""

    def make(kind="sft", *, remat=False, **settings):
        said = {
            "model": "m", "source": "s", "text": {"path": "t"}, "objective": kind, "steps": 4,
            "learning_rate": 0.01, "batch_size": BATCH, "eval_every": 2, "dtype": "float32",
            "warmup": 0.25, **settings,
        }  # fmt: skip
        source = None if kind == "sft" else teacher[0]
        objective = Objective(kind, student[0], source, remat=remat)
        return step.Problem(
            resolve(said), objective, blocks_of(student[0]), blocks_of(student[0], seed=1, count=5)
        )

    return make


@pytest.fixture(scope="session")
def trained():
    """``trained(problem, base, residual, factor, source)`` -> (course, frozen)."""

    def run(problem, base, residual=None, factor=None, source=None, **hooks):
        given = residual or {}, factor or {}
        trainable, frozen = step.begin(problem, base, *given, source)
        course = step.new_history(problem, trainable)
        return step.train(problem, course, frozen, **hooks), frozen

    return run


@pytest.fixture(scope="session")
def close():
    """``close(a, b, atol)``: two trees agree."""

    def check(a, b, atol):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)

    return check
