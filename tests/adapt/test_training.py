"""Ways to the same step: parts, remat, bfloat16, adapters, many devices, many rates; early stops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_merge_jax import sharding
from ot_merge_jax.adapt import data, loop, lora, training
from ot_merge_jax.errors import DivergedError
from ot_merge_jax.models import specs

KINDS = ["sft", "kd", "mix"]


@pytest.fixture(scope="module")
def straight(student, teacher, problem, trained):
    """Kind -> the course of plain training."""
    return {kind: trained(problem(kind), student[1], source=teacher[1])[0] for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_what_it_minimises(kind, straight, student, teacher, problem):
    task = problem(kind)
    loss = jax.jit(training.loss_of(task))
    _, constants = training.begin(task, student[1], {}, {}, teacher[1])
    batch = data.batch_at(task.train, 3, batch_size=4, seed=0)
    before, after = (
        float(loss(params, constants, batch)) for params in (student[1], straight[kind].state.params)
    )
    assert after < before


def test_mix_is_between(straight):
    sft, kd, mix = (straight[kind].losses[0] for kind in KINDS)
    np.testing.assert_allclose(mix, (sft + kd) / 2, rtol=1e-5)


@pytest.mark.parametrize("kind", ["sft", "mix"])
def test_parts_of_a_batch_add_up_to_it(kind, straight, student, teacher, problem, trained, close):
    course, _ = trained(problem(kind, accumulate=2), student[1], source=teacher[1])
    np.testing.assert_allclose(course.losses, straight[kind].losses, rtol=0, atol=1e-5)
    close(course.state.params, straight[kind].state.params, 1e-4)


def test_remat_changes_memory_alone(straight, student, teacher, problem, trained, close):
    course, _ = trained(problem("mix", remat=True), student[1], source=teacher[1])
    np.testing.assert_allclose(course.losses, straight["mix"].losses, rtol=0, atol=1e-5)
    close(course.state.params, straight["mix"].state.params, 1e-4)


def test_remat_computes_layers_twice(student, problem):
    """Or nothing would be saved: the program names the recomputation."""
    batch = data.batch_at(problem().train, 0, batch_size=4, seed=0)
    texts = []
    for remat in (False, True):
        task = problem(remat=remat)
        _, constants = training.begin(task, student[1], {}, {})
        texts.append(str(jax.make_jaxpr(jax.grad(training.loss_of(task)))(student[1], constants, batch)))
    assert ["checkpoint" in text or "remat" in text for text in texts] == [False, True]


def test_bfloat16_keeps_masters_in_float32(straight, student, problem, trained):
    course, _ = trained(problem(dtype="bfloat16"), student[1])
    assert {leaf.dtype for leaf in jax.tree.leaves(course.state.params)} == {np.dtype("float32")}
    np.testing.assert_allclose(course.losses, straight["sft"].losses, rtol=0.02)
    assert course.losses != straight["sft"].losses


def test_eight_devices_train_as_one(straight, student, problem, trained, close):
    cfg, params = student
    mesh = sharding.make_mesh({"data": 4, "model": 2})
    placed = specs.unflatten({
        spec.path: jax.device_put(
            specs.get(params, spec.path), sharding.leaf_sharding(mesh, spec.axes, spec.shape)
        )
        for spec in specs.param_specs(cfg)
    })  # fmt: skip
    course, _ = trained(problem(), placed)
    np.testing.assert_allclose(course.losses, straight["sft"].losses, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        [loss for _, loss in course.dev], [loss for _, loss in straight["sft"].dev], atol=1e-5
    )
    close(course.state.params, straight["sft"].state.params, 1e-4)


def test_rates_sweep_under_vmap(straight, student, problem, close):
    """The arms of a comparison: one program, a rate for each."""
    task = problem()
    _, constants = training.begin(task, student[1], {}, {})
    batch = jax.tree.map(jnp.asarray, data.batch_at(task.train, 0, batch_size=4, seed=0))

    def two(rate, batch):
        step, transform = training.step_of(task, learning_rate=rate)
        state = loop.start(student[1], transform)
        for _ in range(2):
            state, _ = step(state, constants, batch)
        return state.params

    rates = jnp.array([0.0, 0.01])
    both = jax.jit(jax.vmap(two, in_axes=(0, None)))(rates, batch)
    jax.tree.map(lambda leaf, start: np.testing.assert_array_equal(leaf[0], start), both, student[1])
    alone = jax.jit(two)(rates[1], batch)
    close(jax.tree.map(lambda leaf: leaf[1], both), alone, 1e-5)


# ---- adapters ----


@pytest.fixture(scope="module")
def adapted(student, problem, trained):
    task = problem(lora=3, lora_alpha=6, lora_targets=["q", "down"], learning_rate=0.05)
    return task, *trained(task, student[1])


def test_adapters_begin_at_the_base(adapted, straight):
    assert adapted[1].losses[0] == pytest.approx(straight["sft"].losses[0], abs=1e-6)


def test_adapters_alone_train(adapted, student):
    task, course, constants = adapted
    folded = training.params_of(loop.result(course), constants, settings=task.settings)
    changed = {
        spec.path
        for spec in specs.param_specs(student[0])
        if np.any(specs.get(folded, spec.path) != specs.get(student[1], spec.path))
    }
    assert changed == {"layers/self_attn/q_proj/kernel", "layers/mlp/down_proj/kernel"}
    assert course.losses[-1] != course.losses[0]


def test_adapters_fold_as_in_the_formula(adapted, student):
    task, course, constants = adapted
    path = "layers/mlp/down_proj/kernel"
    pair = loop.result(course)[path]
    folded = training.params_of(loop.result(course), constants, settings=task.settings)
    expected = np.asarray(specs.get(student[1], path), np.float64) + 6 / 3 * (
        np.asarray(pair["a"], np.float64) @ np.asarray(pair["b"], np.float64)
    )
    np.testing.assert_allclose(specs.get(folded, path), expected, atol=1e-6)


def test_rank_is_at_most_the_weight_s_own(student):
    found = lora.init(jax.random.key(0), student[0], rank=99, targets=["k"])
    assert found["layers/self_attn/k_proj/kernel"]["a"].shape[-1] == 16


# ---- the course ----


def test_the_dev_loss_is_the_mean_over_counted_tokens(student, straight, problem):
    """The split has 5 blocks and batches 4: the last batch is filled up."""
    task = problem()
    plain = problem()._replace(train=task.dev)
    whole = data.in_order(task.dev, batch_size=5)
    assert len(whole) == 1
    _, constants = training.begin(plain, student[1], {}, {})
    expected = float(jax.jit(training.loss_of(plain))(student[1], constants, whole[0]))
    assert straight["sft"].dev[0] == (0, pytest.approx(expected, abs=1e-5))


def test_evaluations_come_when_asked_and_at_both_ends(straight):
    assert [step for step, _ in straight["sft"].dev] == [0, 2, 4]


def test_early_stopping_keeps_the_best(student, problem, trained):
    """A rate that only does harm: the first evaluation stays the best."""
    task = problem(learning_rate=3.0, steps=9, eval_every=1, patience=2, clip=1e6)
    course, _ = trained(task, student[1])
    losses = [loss for _, loss in course.dev]
    best = int(np.argmin(losses))
    assert len(course.losses) == best + 2 < 9
    _, constants = training.begin(task, student[1], {}, {})
    again = training.dev_loss_of(task, constants)(loop.result(course))
    assert again == pytest.approx(losses[best], abs=1e-6)
    assert losses[-1] > losses[best]


def test_what_diverges_keeps_the_state_before(student, problem, trained):
    """The first step of the warm-up has rate 0; the second leaves numbers that overflow."""
    task = problem(learning_rate=1e38, clip=1e30, schedule="constant")
    seen = []
    with pytest.raises(DivergedError, match=r"at training step 3; lower the learning rate"):
        trained(task, student[1], rescue=lambda course: seen.append(course))
    [course] = seen
    assert len(course.losses) == 2
    assert int(course.state.step) == 2
