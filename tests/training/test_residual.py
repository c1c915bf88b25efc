"""The frozen residual: fold, unfold, rescale, and what training may and may not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_merge_jax.errors import InputError
from ot_merge_jax.models import decoder, layers, specs
from ot_merge_jax.training import loop, packing, step
from ot_merge_jax.training import residual as residuals
from ot_merge_jax.types import Batch

BOTH = {"projections": 0.7, "vocabulary": 0.4}


def in_numpy(base, residual, factors):
    """Base with the residual, leaf by leaf."""
    made = jax.tree.map(np.array, base)
    for path, leaf in residual.items():
        parents, _, last = path.rpartition("/")
        node = specs.get(made, parents)
        group = "vocabulary" if path.startswith("embed") else "projections"
        node[last] = node[last] + np.float32(factors[group]) * np.asarray(leaf)
    return made


# ---- pure functions ----


def test_fold_adds_each_groups_share(student, residual):
    folded = residuals.fold(student[1], residual, BOTH)
    jax.tree.map(np.testing.assert_array_equal, folded, in_numpy(student[1], residual, BOTH))


def test_what_has_no_residual_is_the_bases_own(student, residual):
    folded = residuals.fold(student[1], residual, BOTH)
    assert folded["norm"]["scale"] is student[1]["norm"]["scale"]


def test_unfold_takes_back_what_fold_added(student, residual, close):
    folded = residuals.fold(student[1], residual, BOTH)
    close(residuals.unfold(folded, residual, BOTH), student[1], 1e-6)


@pytest.mark.parametrize("new", [0.0, 1.0, {"projections": 0.0, "vocabulary": 2.0}])
def test_rescale_is_a_fold_at_another_strength(new, student, residual, close):
    folded = residuals.fold(student[1], residual, BOTH)
    again = residuals.rescale(folded, residual, BOTH, new)
    close(again, residuals.fold(student[1], residual, new), 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_target_plus_difference_is_the_merge(dtype, student, residual):
    target = jax.tree.map(lambda leaf: leaf.astype(dtype), student[1])
    merged = jax.tree.map(
        lambda leaf: leaf.astype(dtype), residuals.fold(student[1], residual, BOTH)
    )
    found = residuals.between(merged, target)
    assert found.keys() == residual.keys()
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float32), target)
    again = residuals.fold(wide, found, residuals.AS_MERGED)
    jax.tree.map(
        lambda ours, there: np.testing.assert_allclose(ours, there.astype(np.float32), rtol=1e-6),
        again,
        merged,
    )


def test_a_difference_that_no_merge_makes_is_refused(student):
    other = dict(student[1]) | {"norm": {"scale": student[1]["norm"]["scale"] + 1}}
    with pytest.raises(InputError, match="norm/scale of the merge differs"):
        residuals.between(other, student[1])


# ---- in training ----


def test_the_gradient_of_the_residual_is_exactly_zero(student, residual, problem):
    task = problem()
    _, frozen = step.begin(task, student[1], residual, BOTH)
    batch = jax.tree.map(jnp.asarray, packing.batch_at(task.train, 0, batch_size=4, seed=0))

    def loss(base, leaves):
        return step.loss_of(step.step_config(task))(base, frozen._replace(residual=leaves), batch)

    base, leaves = jax.jit(jax.grad(loss, argnums=(0, 1)))(student[1], residual)
    assert leaves.keys() == residual.keys()
    for leaf in jax.tree.leaves(leaves):
        assert not np.any(leaf)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(base))


def doubled(params, residual):
    """Every kernel as base over residual, so that ``[x, x] @ kernel`` is the unfolded model."""
    made = jax.tree.map(lambda leaf: leaf, params)
    for path, leaf in paths(params):
        if path.startswith("layers/") and path.endswith("kernel"):
            parents, _, last = path.rpartition("/")
            added = residual.get(path, jnp.zeros_like(leaf))
            specs.get(made, parents)[last] = jnp.concatenate([leaf, added], axis=1)
    return made


def paths(params):
    found, _ = jax.tree_util.tree_flatten_with_path(params)
    return [("/".join(key.key for key in keys), leaf) for keys, leaf in found]


def test_after_training_the_fold_runs_as_the_unfolded_model(
    student, residual, problem, trained, monkeypatch
):
    """The unfolded model computes ``x @ base + x @ (s R)``, two products and never their sum."""
    cfg = student[0]
    parts = {path: leaf for path, leaf in residual.items() if path.startswith("layers/")}
    task = problem()
    course, frozen = trained(task, student[1], parts, BOTH)
    base = loop.result(course)
    tokens = jnp.asarray(task.dev.tokens)
    none = jnp.full((len(tokens), 1), -1, jnp.int32)
    batch = Batch(tokens, jnp.ones(tokens.shape, bool), none, none)
    folded = step.params_of(base, frozen, config=step.step_config(task))
    run = jax.jit(lambda p: decoder.forward(p, batch, cfg=cfg)[0])
    ours, without = run(folded), run(base)
    with monkeypatch.context() as patch:
        patch.setattr(
            layers.Linear,
            "__call__",
            lambda self, x: jnp.concatenate([x, x], -1) @ self.kernel[...],
        )
        scaled = {path: BOTH["projections"] * leaf for path, leaf in parts.items()}
        apart = jax.jit(lambda p: decoder.forward(p, batch, cfg=cfg)[0])(doubled(base, scaled))
    np.testing.assert_allclose(ours, apart, rtol=0, atol=1e-5)
    assert np.abs(ours - without).max() > 0.1  # the residual is seen


def test_without_decay_it_is_training_of_the_folded_weights(
    student, residual, problem, trained, close
):
    task = problem()
    apart, frozen = trained(task, student[1], residual, BOTH)
    whole, _ = trained(task, residuals.fold(student[1], residual, BOTH))
    folded = step.params_of(loop.result(apart), frozen, config=step.step_config(task))
    close(folded, loop.result(whole), 1e-5)
    np.testing.assert_allclose(apart.losses, whole.losses, rtol=0, atol=1e-5)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), loop.result(apart), student[1])
    assert max(jax.tree.leaves(moved)) > 1e-2


def test_with_decay_only_the_base_shrinks(student, residual, problem, trained):
    """So it is another training: what was merged stays."""
    task = problem(weight_decay=5.0)
    apart, frozen = trained(task, student[1], residual, BOTH)
    whole, _ = trained(task, residuals.fold(student[1], residual, BOTH))
    folded = step.params_of(loop.result(apart), frozen, config=step.step_config(task))
    name = "embedding"
    one, other = folded["embed_tokens"][name], loop.result(whole)["embed_tokens"][name]
    assert np.abs(one - other).max() > 1e-3
