"""What is minimised, against numpy and against torch: losses, and two steps of AdamW."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_merge_jax.io.hf import load_hf
from ot_merge_jax.models import specs
from ot_merge_jax.training import losses, packing, step
from ot_merge_jax.training.losses import Examples, Objective, Pairs


def softmax(logits):
    grown = np.exp(np.asarray(logits, np.float64) - np.max(logits, -1, keepdims=True))
    return grown / grown.sum(-1, keepdims=True)


@pytest.fixture
def examples(rng):
    """Two sequences of five tokens, the second one shorter, some of which do not count."""
    weight = rng.random((2, 5)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    weight[:, 0], weight[1, 3:], weight[0, 2] = 0, 0, 0
    tokens = jnp.asarray(rng.integers(0, 7, (2, 5)), jnp.int32)
    return Examples(tokens, jnp.asarray(mask), jnp.asarray(weight))


def test_next_token_against_numpy(rng, examples):
    logits = rng.normal(size=(2, 5, 7)).astype(np.float32)
    p, tokens, weight = softmax(logits), np.asarray(examples.tokens), np.asarray(examples.weight)
    expected = -sum(
        weight[b, t] * np.log(p[b, t - 1, tokens[b, t]]) for b in range(2) for t in range(1, 5)
    )
    found = losses.next_token(jnp.asarray(logits), examples)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("width", [7, 9, 6])
def test_divergence_is_kl_of_source_from_target(rng, examples, width):
    """Rows that only one padded table has are in neither distribution."""
    logits = rng.normal(size=(2, 5, 7)).astype(np.float32)
    source = rng.normal(size=(2, 5, width)).astype(np.float32)
    both = min(7, width)
    p, q = softmax(source[..., :both]), softmax(logits[..., :both])
    kl = (p * np.log(p / q)).sum(-1)
    expected = (kl[:, :-1] * np.asarray(examples.weight)[:, 1:]).sum()
    found = losses.divergence(jnp.asarray(logits), jnp.asarray(source), examples)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 5), (9, 4), (6, 6)])
def test_sorted_distance_against_numpy(rng, n, m):
    q, p = rng.normal(size=(3, n)).astype(np.float32), rng.normal(size=(3, m)).astype(np.float32)
    width = max(n, m)
    one, other = (np.zeros((3, width)) for _ in range(2))
    one[:, :n], other[:, :m] = -np.sort(-softmax(q)), -np.sort(-softmax(p))
    expected = np.abs(one - other).sum(-1)
    turned = p[:, rng.permutation(m)]  # which token has a probability is not seen
    for source in (p, turned):
        found = losses.sorted_distance(jnp.asarray(q), jnp.asarray(source))
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_universal_reads_the_paired_places(rng):
    logits = jnp.asarray(rng.normal(size=(1, 4, 5)), jnp.float32)
    source = jnp.asarray(rng.normal(size=(1, 6, 3)), jnp.float32)
    pairs = Pairs(
        jnp.zeros((1, 6), jnp.int32), jnp.ones((1, 6), bool), jnp.array([[1, 3, 0]]),
        jnp.array([[2, 5, 0]]), jnp.array([[0.25, 0.75, 0.0]]),
    )  # fmt: skip
    expected = sum(
        w * float(losses.sorted_distance(logits[0, t], source[0, s]))
        for w, t, s in ((0.25, 1, 2), (0.75, 3, 5))
    )
    found = losses.universal(logits, source, pairs)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "is_universal", "shares"),
    [
        ("sft", False, (1, 0)),
        ("kd", False, (0, 1)),
        ("mix", False, (0.75, 0.25)),
        ("kd", True, (1, 1.5)),
        ("mix", True, (0.75, 0.25)),
    ],
)
def test_shares_of_the_two_losses(kind, is_universal, shares, student):
    found = Objective(kind, student[0], kd_weight=0.25, is_universal=is_universal)
    assert found.shares == shares


# ---- torch ----


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["sft", "kd"])
def test_steps_are_those_of_torch_and_transformers(
    kind, torch_checkpoint, problem, student, teacher
):
    """AdamW on the same batch, eager attention, clipped, with weight decay."""
    torch = pytest.importorskip("torch")
    folder, theirs = torch_checkpoint("llama", layers=1)
    source_folder, source = torch_checkpoint("llama", layers=2, hidden=36, seed=5)
    cfg, params = load_hf(folder, dtype=jnp.float32)
    source_cfg, source_params = load_hf(source_folder, dtype=jnp.float32)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (4, 9)).astype(np.int32)
    ones = np.ones(tokens.shape, bool)
    blocks = packing.Blocks(tokens, ones, ones)
    task = problem(kind, weight_decay=0.1)
    assert (cfg, source_cfg) == (student[0], teacher[0])  # the programs are those of other tests
    trainable, frozen = step.begin(task, params, {}, {}, source_params)
    state, config = step.new_history(task, trainable).state, step.step_config(task)

    model = theirs.requires_grad_(True)
    start = {name: value.detach().clone() for name, value in model.state_dict().items()}
    adamw = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1)
    try:
        for index, rate in enumerate((0.0, 1e-2, 0.75e-2)):
            batch = packing.batch_at(blocks, index, batch_size=4, seed=0)
            state, seen = step._step(state, frozen, jax.tree.map(jnp.asarray, batch), config=config)
            given = torch.tensor(np.asarray(batch.tokens), dtype=torch.long)
            log_q = torch.log_softmax(model(given).logits[:, :-1], -1)
            if kind == "sft":
                loss = -log_q.gather(-1, given[:, 1:, None]).mean()
            else:
                with torch.no_grad():
                    log_p = torch.log_softmax(source(given).logits[:, :-1], -1)
                loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
            adamw.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adamw.param_groups[0]["lr"] = rate
            adamw.step()
            assert float(seen.loss) == pytest.approx(loss.item(), abs=1e-4)
        there = {name: value.detach().numpy().copy() for name, value in model.named_parameters()}
    finally:
        model.requires_grad_(False).load_state_dict(start)
    for spec in specs.param_specs(cfg):
        ours = np.asarray(specs.get(state.params, spec.path))
        for place, name in enumerate(spec.tensor_names()):
            one = ours[place] if spec.is_stacked else ours
            one = one.T if spec.transpose else one
            np.testing.assert_allclose(one, there[name], rtol=0, atol=1e-4, err_msg=name)
            if spec.weight:
                assert np.abs(there[name] - start[name].numpy()).max() > 1e-3
