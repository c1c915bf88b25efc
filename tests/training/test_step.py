"""Ways to the same step: parts, remat, bfloat16, adapters, devices, rates; when training ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_merge_jax.distributed import sharding
from ot_merge_jax.errors import DivergedError
from ot_merge_jax.models import decoder, specs
from ot_merge_jax.training import loop, lora, packing
from ot_merge_jax.training import step as train_step
from ot_merge_jax.types import Batch

KINDS = ["sft", "kd", "mix"]


@pytest.fixture(scope="module")
def straight(student, teacher, problem, trained):
    """Kind -> the history of plain training."""
    return {kind: trained(problem(kind), student[1], source=teacher[1])[0] for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_what_it_minimises(kind, straight, student, teacher, problem):
    task = problem(kind)
    _, frozen = train_step.begin(task, student[1], {}, {}, teacher[1])
    batch = packing.batch_at(task.train, 3, batch_size=4, seed=0)
    batch = jax.tree.map(jnp.asarray, batch)
    losses = []
    for params in (student[1], straight[kind].state.params):
        state = train_step.new_history(task, params).state
        losses.append(
            float(
                train_step._step(state, frozen, batch, config=train_step.step_config(task))[1].loss
            )
        )
    assert losses[1] < losses[0]


def test_mix_is_between(straight):
    sft, kd, mix = (straight[kind].losses[0] for kind in KINDS)
    np.testing.assert_allclose(mix, (sft + kd) / 2, rtol=1e-5)


def test_parts_and_remat_change_memory_alone(straight, student, teacher, problem, trained, close):
    """A batch in two parts, layers and logits computed twice: one program for both."""
    task = problem("mix", accumulate=2, remat=True)
    history, _ = trained(task, student[1], source=teacher[1])
    np.testing.assert_allclose(history.losses, straight["mix"].losses, rtol=0, atol=1e-5)
    close(history.state.params, straight["mix"].state.params, 1e-4)


def test_remat_computes_layers_twice(student, problem):
    """Or nothing would be saved: the program names the recomputation."""
    batch = packing.batch_at(problem().train, 0, batch_size=4, seed=0)
    texts = []
    for remat in (False, True):
        task = problem(remat=remat)
        _, frozen = train_step.begin(task, student[1], {}, {})
        texts.append(
            str(
                jax.make_jaxpr(jax.grad(train_step.loss_of(train_step.step_config(task))))(
                    student[1], frozen, batch
                )
            )
        )
    assert ["checkpoint" in text or "remat" in text for text in texts] == [False, True]


def test_bfloat16_keeps_masters_in_float32(straight, student, problem, trained):
    history, _ = trained(problem(dtype="bfloat16"), student[1])
    assert {leaf.dtype for leaf in jax.tree.leaves(history.state.params)} == {np.dtype("float32")}
    np.testing.assert_allclose(history.losses, straight["sft"].losses, rtol=0.02)
    assert history.losses != straight["sft"].losses


def test_eight_devices_train_as_one(straight, student, problem, trained, close):
    cfg, params = student
    mesh = sharding.make_mesh({"data": 4, "model": 2})
    placed = specs.unflatten({
        spec.path: jax.device_put(
            specs.get(params, spec.path), sharding.leaf_sharding(mesh, spec.axes, spec.shape)
        )
        for spec in specs.param_specs(cfg)
    })  # fmt: skip
    history, _ = trained(problem(), placed)
    np.testing.assert_allclose(history.losses, straight["sft"].losses, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        [loss for _, loss in history.dev], [loss for _, loss in straight["sft"].dev], atol=1e-5
    )
    close(history.state.params, straight["sft"].state.params, 1e-4)


def test_rates_sweep_under_vmap(straight, student, problem, close):
    """The arms of a comparison: one program, a rate for each."""
    task = problem()
    _, frozen = train_step.begin(task, student[1], {}, {})
    batch = jax.tree.map(jnp.asarray, packing.batch_at(task.train, 0, batch_size=4, seed=0))

    config = train_step.step_config(task)

    def two(rate, batch):
        given = frozen._replace(rates=frozen.rates._replace(learning_rate=rate))
        first = train_step.new_history(task, student[1]).state
        return jax.lax.scan(
            lambda state, _: train_step.step(state, given, batch, config=config), first, length=2
        )[0].params

    rates = jnp.array([0.0, 0.01])
    both = jax.jit(jax.vmap(two, in_axes=(0, None)))(rates, batch)
    jax.tree.map(
        lambda leaf, start: np.testing.assert_array_equal(leaf[0], start), both, student[1]
    )
    history = train_step.new_history(task, student[1])
    state = history.state
    for _ in range(2):
        state, _ = train_step._step(state, frozen, batch, config=config)
    close(jax.tree.map(lambda leaf: leaf[1], both), state.params, 1e-5)


# ---- adapters ----


@pytest.fixture(scope="module")
def adapted(student, problem, trained):
    task = problem(lora=3, lora_alpha=6, lora_targets=["q", "down"], learning_rate=0.05)
    return task, *trained(task, student[1])


def test_adapters_begin_at_the_base(adapted, straight):
    assert adapted[1].losses[0] == pytest.approx(straight["sft"].losses[0], abs=1e-6)


def test_adapters_alone_train(adapted, student):
    task, history, frozen = adapted
    folded = train_step.params_of(loop.result(history), frozen, config=train_step.step_config(task))
    changed = {
        spec.path
        for spec in specs.param_specs(student[0])
        if np.any(specs.get(folded, spec.path) != specs.get(student[1], spec.path))
    }
    assert changed == {"layers/self_attn/q_proj/kernel", "layers/mlp/down_proj/kernel"}
    assert history.losses[-1] != history.losses[0]


def test_adapters_fold_as_in_the_formula(adapted, student):
    task, history, frozen = adapted
    path = "layers/mlp/down_proj/kernel"
    pair = loop.result(history)[path]
    folded = train_step.params_of(loop.result(history), frozen, config=train_step.step_config(task))
    expected = np.asarray(specs.get(student[1], path), np.float64) + 6 / 3 * (
        np.asarray(pair["a"], np.float64) @ np.asarray(pair["b"], np.float64)
    )
    np.testing.assert_allclose(specs.get(folded, path), expected, atol=1e-6)


def test_rank_is_at_most_the_weight_s_own(student):
    found = lora.init(jax.random.key(0), student[0], rank=99, targets=["k"])
    assert found["layers/self_attn/k_proj/kernel"]["a"].shape[-1] == 16


# ---- the history ----


def _forward(model, tokens):
    """Logits of full sequences."""
    none = np.full((len(tokens), 1), -1, np.int32)
    batch = Batch(tokens, np.ones(tokens.shape, bool), none, none)
    return jax.jit(decoder.forward, static_argnames="cfg")(model[1], batch, cfg=model[0])[0]


def softmax(logits):
    grown = np.exp(np.asarray(logits, np.float64) - np.max(logits, -1, keepdims=True))
    return grown / grown.sum(-1, keepdims=True)


def test_the_dev_loss_is_the_mean_over_counted_tokens(student, straight, problem):
    """The split has 5 blocks and batches 4: the last batch is filled up."""
    task = problem()
    whole = packing.in_order(task.dev, batch_size=5)
    assert len(whole) == 1
    one = whole[0]
    losses = -np.log(softmax(_forward(student, one.tokens)))[:, :-1]
    chosen = np.take_along_axis(losses, one.tokens[:, 1:, None].astype(int), -1)[..., 0]
    counts = task.dev.loss_mask[:, 1:]
    expected = chosen[counts].mean()
    assert straight["sft"].dev[0] == (0, pytest.approx(expected, abs=1e-5))


def test_evaluations_come_when_asked_and_at_both_ends(straight):
    assert [step for step, _ in straight["sft"].dev] == [0, 2, 4]


def test_early_stopping_keeps_the_best(student, problem, trained):
    """A rate that only does harm: the first evaluation stays the best."""
    task = problem(learning_rate=3.0, eval_every=1, patience=2, clip=1e6)
    history, _ = trained(task, student[1])
    losses = [loss for _, loss in history.dev]
    best = int(np.argmin(losses))
    assert (best, len(history.losses)) == (0, 2)
    again = train_step.next_token_loss(loop.result(history), task)
    assert again == pytest.approx(losses[best], abs=1e-6)
    assert losses[-1] > losses[best]


def test_what_diverges_keeps_the_state_before(student, problem, trained):
    """The first step of the warm-up has rate 0; the second leaves numbers that overflow."""
    task = problem(learning_rate=1e38, clip=1e30, eval_every=4)
    seen = []
    with pytest.raises(DivergedError, match=r"at training step 3; lower the learning rate"):
        trained(task, student[1], on_divergence=seen.append)
    [history] = seen
    assert len(history.losses) == 2
    assert int(history.state.step) == 2


def test_what_diverges_at_the_last_step_is_noticed(student, problem, trained):
    """The last update breaks the weights, and no loss of a batch comes behind it."""
    task = problem(learning_rate=1e38, clip=1e30, steps=2)
    seen = []
    with pytest.raises(DivergedError, match=r"dev loss is \w+ after training step 2; lower the le"):
        trained(task, student[1], on_step=lambda history: seen.append(len(history.losses)))
    assert seen == [1]


def test_a_start_that_is_broken_is_not_trained(student, problem, trained):
    broken = student[1] | {"norm": {"scale": student[1]["norm"]["scale"] * np.inf}}
    with pytest.raises(
        DivergedError, match=r"dev loss is \w+ before training; use --dtype float32"
    ):
        trained(problem(), broken)
