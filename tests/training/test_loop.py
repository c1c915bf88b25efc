"""AdamW against torch, and the loop around one pure step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ot_merge_jax.errors import DivergedError
from ot_merge_jax.io.hf import load_hf
from ot_merge_jax.models.decoder import forward, token_nll
from ot_merge_jax.training import loop, optimizer
from ot_merge_jax.types import Batch

STEPS = 12


def next_token_loss(params, blocks, *, cfg):
    """Mean loss of full blocks, in nats per token."""
    no_rows = jnp.zeros((len(blocks), 1), jnp.int32)
    batch = Batch(jnp.asarray(blocks), jnp.ones(blocks.shape, bool), no_rows, no_rows - 1)
    losses, weights = token_nll(forward(params, batch, cfg=cfg)[0], batch)
    return losses.sum() / weights.sum()


_loss = jax.jit(next_token_loss, static_argnames="cfg")

# ------------------------------------------------------------------------ optimiser


def schedule(learning_rate, steps, warmup):
    """Rate of each step: from 0 up to the peak, then half a cosine down to 0."""
    rise = min(int(np.ceil(warmup * steps)), steps - 1)
    return [
        learning_rate * step / rise
        if step < rise
        else learning_rate * (1 + np.cos(np.pi * (step - rise) / (steps - rise))) / 2
        for step in range(steps)
    ]


@pytest.mark.parametrize(
    ("steps", "warmup"), [(20, 0.25), (20, 0.0), (7, 0.5), (4, 1.0), (2, 0.05), (1, 0.05)]
)
def test_the_rate_rises_and_falls(steps, warmup):
    """A constant gradient of one makes Adam step by the rate itself."""
    transform = optimizer.optimizer(
        learning_rate=0.1, steps=steps, warmup=warmup, max_grad_norm=1e9
    )
    params, gradient = jnp.zeros(()), jnp.ones(())
    state, rates = transform.init(params), []
    for _ in range(steps):
        update, state = transform.update(gradient, state, params)
        rates.append(-float(update))
    np.testing.assert_allclose(rates, schedule(0.1, steps, warmup), atol=1e-6)
    assert max(rates) == pytest.approx(0.1)  # so a training of one step trains


@pytest.mark.torch
@pytest.mark.parametrize("clip", [0.5, 1e9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_are_torchs_adamw(rng, weight_decay, clip):
    torch = pytest.importorskip("torch")
    shapes, steps = {"a": (3, 5), "b": (4,)}, 6
    start = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    transform = optimizer.optimizer(
        learning_rate=0.1, steps=steps, warmup=0.5, weight_decay=weight_decay, max_grad_norm=clip
    )
    ours = jax.tree.map(jnp.asarray, start)
    state = transform.init(ours)
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    adamw = torch.optim.AdamW(
        theirs.values(), lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay
    )
    for rate in schedule(0.1, steps, 0.5):
        gradient = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
        updates, state = transform.update(gradient, state, ours)
        ours = optax.apply_updates(ours, updates)
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradient[name])
        torch.nn.utils.clip_grad_norm_(theirs.values(), clip)
        adamw.param_groups[0]["lr"] = rate
        adamw.step()
    for name, parameter in theirs.items():
        assert np.abs(ours[name] - start[name]).max() > 0.05
        np.testing.assert_allclose(ours[name], parameter.detach().numpy(), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load_hf(tiny_checkpoint("llama", layers=1))


@pytest.fixture(scope="module")
def tokens(model):
    """Eight blocks of a repeating text that can be learned."""
    return np.array(([5, 9, 2, 7, 11, 3] * 22)[:128], np.int32).reshape(8, 16)


class Run:
    """A training run and what it left."""

    def __init__(self, model, tokens, *, dtype="float32", transform=None, steps=STEPS):
        self.cfg, params = model
        self.start = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        self.before = jax.tree.map(np.array, self.start)
        self.calls = []
        transform = transform or optimizer.optimizer(learning_rate=0.02, steps=steps)

        def loss(params, _, blocks):
            return next_token_loss(params, blocks, cfg=self.cfg)

        def on_step(history):
            self.calls.append((len(history.losses), history.losses[-1]))

        history = loop.fit(
            loop.TrainHistory(loop.start(self.start, transform)),
            loop.compiled(loop.one_step(loss, transform)),
            None,
            lambda index: batch_at(tokens, index),
            steps=steps,
            dev_loss=lambda params: 0.0,
            eval_every=steps,
            on_step=on_step,
        )
        self.params, self.losses = history.state.params, np.array(history.losses)


def batch_at(tokens, index):
    """Four of the blocks, in turn."""
    return tokens[4 * (index % 2) :][:4]


@pytest.fixture(scope="module")
def trained(model, tokens):
    return Run(model, tokens)


def test_loss_of_a_block_against_numpy(model, tokens):
    cfg, params = model
    blocks = tokens[:4]
    no_rows = np.zeros((4, 1), np.int32)
    batch = Batch(blocks, np.ones_like(blocks, bool), no_rows, no_rows - 1)
    logits = jax.jit(forward, static_argnames="cfg")(params, batch, cfg=cfg)[0]
    logits = np.asarray(logits, np.float64)[:, :-1]
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_softmax, blocks[:, 1:, None].astype(int), -1)
    np.testing.assert_allclose(_loss(params, blocks, cfg=cfg), -chosen.mean(), rtol=1e-5)


def test_the_loss_falls(trained):
    assert trained.losses.shape == (STEPS,)
    assert trained.losses[-1] < 0.7 * trained.losses[0]


def test_the_first_loss_is_that_of_the_start(trained, tokens):
    expected = _loss(trained.start, batch_at(tokens, 0), cfg=trained.cfg)
    np.testing.assert_allclose(trained.losses[0], expected, rtol=1e-5)


def test_every_parameter_learns(trained):
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), trained.params, trained.before)
    assert all(jax.tree.leaves(changed))


def test_after_hears_every_step(trained):
    assert [step for step, _ in trained.calls] == list(range(1, STEPS + 1))
    np.testing.assert_array_equal([loss for _, loss in trained.calls], trained.losses)


def test_the_start_is_neither_changed_nor_donated(trained):
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(trained.start))
    jax.tree.map(np.testing.assert_array_equal, trained.start, trained.before)


def test_the_same_run_gives_the_same_bits(model, tokens, trained):
    again = Run(model, tokens)
    np.testing.assert_array_equal(again.losses, trained.losses)
    jax.tree.map(np.testing.assert_array_equal, again.params, trained.params)


def test_half_precision_trains_as_float32(model, tokens):
    """And a rate of zero changes nothing but the dtype."""
    run = Run(model, tokens, dtype="bfloat16", transform=optax.sgd(0.0), steps=2)
    assert {leaf.dtype for leaf in jax.tree.leaves(run.params)} == {np.dtype("float32")}
    jax.tree.map(
        lambda ours, start: np.testing.assert_array_equal(ours, start.astype(np.float32)),
        run.params,
        run.before,
    )


def test_a_loss_that_is_not_finite_names_its_step(model, tokens):
    """The second update is NaN, so the third loss is."""
    breaking = optax.sgd(lambda step: jnp.where(step == 1, jnp.nan, 0.0))
    with pytest.raises(DivergedError, match="training step 3;"):
        Run(model, tokens, transform=breaking)
