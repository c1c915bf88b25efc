"""What a readout fit's search takes: the ridge, the mixture and the start, by the dev split."""

import jax.numpy as jnp
import numpy as np
import pytest

from ot_merge_jax.experiments import readout_choice
from ot_merge_jax.training import head_survey, readout
from ot_merge_jax.training.head_survey import FinalStates, OutputHead

V, D, N, DEV, DOCUMENTS = 40, 8, 120, 400, 20


def softmax(logits):
    likely = np.exp(logits - logits.max(-1, keepdims=True))
    return likely / likely.sum(-1, keepdims=True)


def drawn(rng, *, is_wrong=False, noise=0.0):
    """(task, dev): a teacher that knows where labels come from, or one that knows nothing of it."""
    content = jnp.ones(V, bool)
    table = rng.normal(size=(V, D)).astype(np.float32)
    states = rng.normal(size=(N + DEV, D)).astype(np.float32)
    truth = states @ (table + 0.7 * rng.normal(size=(V, D))).T
    label = np.array([rng.choice(V, p=row) for row in softmax(truth)])
    taught = 3 * rng.normal(size=truth.shape) if is_wrong else truth
    taught = taught + noise * rng.normal(size=truth.shape)
    head = OutputHead(jnp.asarray(table))
    train, dev = (
        FinalStates(jnp.asarray(states[part]), jnp.asarray(label[part]))
        for part in (slice(N), slice(N, None))
    )
    teacher = head_survey.distribution(jnp.asarray(taught[:N], jnp.float32), content)
    found = head_survey.survey(head, train, teacher, content)
    rows = head_survey.moving_rows(found, train.label, content, min_probability=0.0)
    task = readout.problem(head, train, teacher, content, found, rows)
    return task, readout.dev_states(head, dev, content, rows)


DOCUMENT = np.arange(DEV) % DOCUMENTS


def test_a_teacher_that_knows_is_taken_whole(rng):
    task, dev = drawn(rng)
    choice = readout_choice.choose({0.0: (task, dev)}, DOCUMENT)
    assert choice.chosen.kappa == 1.0
    assert choice.chosen.loss < choice.chosen.fitted.curve[0].dev - 0.05
    by_text = readout_choice.choose({0.0: (task, dev)}, DOCUMENT, kappas=[0.0])
    assert choice.chosen.loss < by_text.chosen.loss - 0.05


def test_a_teacher_that_knows_nothing_is_mostly_left_out(rng):
    choice = readout_choice.choose(
        {0.0: drawn(rng, is_wrong=True)}, DOCUMENT, kappas=[0.0, 0.5, 1.0]
    )
    assert choice.chosen.kappa < 1.0
    mean, error = choice.unsure[1.0]
    assert mean > error


def test_of_mixtures_within_a_standard_error_the_largest_is_taken(rng):
    choice = readout_choice.choose({0.0: drawn(rng, noise=1.0)}, DOCUMENT)
    near = [kappa for kappa, (mean, error) in choice.unsure.items() if mean <= error]
    assert choice.chosen.kappa == max(near)
    best = min(choice.tried, key=lambda one: one.loss)
    mean, error = choice.unsure[best.kappa]
    assert (mean, error) == (0, 0)
    others = {one.kappa: one for one in choice.tried if one.loss == min(
        again.loss for again in choice.tried if again.kappa == one.kappa)}  # fmt: skip
    for kappa, (mean, error) in choice.unsure.items():
        per_document = (others[kappa].by_document - best.by_document) / (DEV / DOCUMENTS)
        np.testing.assert_allclose(mean, per_document.mean(), atol=1e-9)
        np.testing.assert_allclose(
            error, per_document.std(ddof=1) / DOCUMENTS**0.5, rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize("ridges", [(0.0004, 0.0008), (20.0, 40.0)], ids=["too small", "too large"])
def test_the_grid_is_extended_while_its_edge_wins(rng, ridges):
    given = {0.0: drawn(rng)}
    choice = readout_choice.choose(given, DOCUMENT, kappas=[1.0], ridges=ridges)
    tried = sorted(one.ridge for one in choice.tried)
    assert len(tried) > len(ridges)
    assert choice.chosen.ridge not in (tried[0], tried[-1])
    normal = readout_choice.choose(given, DOCUMENT, kappas=[1.0])
    assert choice.chosen.loss < normal.chosen.loss + 0.02


def test_one_value_is_taken_as_it_is(rng):
    choice = readout_choice.choose({0.0: drawn(rng)}, DOCUMENT, kappas=[0.3], ridges=[7.0])
    assert len(choice.tried) == 1
    assert (choice.chosen.kappa, choice.chosen.ridge) == (0.3, 7.0)


def test_the_better_start_is_taken(rng):
    good = drawn(rng)
    bad = good[1]._replace(fixed=jnp.full(DEV, 8.0))  # much mass on tokens that never come
    choice = readout_choice.choose(
        {0.0: (good[0], bad), 0.5: good}, DOCUMENT, kappas=[1.0], ridges=[0.1]
    )
    assert choice.chosen.start == 0.5
    assert {one.start for one in choice.tried} == {0.0, 0.5}


def test_a_teacher_that_harms_leaves_the_head_alone(rng):
    task, dev = drawn(rng, is_wrong=True)
    dev = dev._replace(place=task.place[jnp.arange(DEV) % N])  # labels that no state explains
    choice = readout_choice.choose({0.0: (task, dev)}, DOCUMENT, kappas=[1.0], ridges=[0.01, 0.1])
    assert choice.chosen.loss <= choice.chosen.fitted.curve[0].dev
    head = readout_choice.moved_head(jnp.zeros((V, D)), task, choice.chosen.fitted)
    assert bool(np.asarray(head).any()) is (choice.chosen.fitted.best > 0)


def test_the_moved_head_is_the_table_where_nothing_moves(rng):
    task, dev = drawn(rng)
    fitted = readout_choice.choose(
        {0.0: (task, dev)}, DOCUMENT, kappas=[1.0], ridges=[0.1]
    ).chosen.fitted
    table = jnp.asarray(rng.normal(size=(V + 3, D)), jnp.bfloat16)
    head = readout_choice.moved_head(table, task, fitted)
    assert head.dtype == jnp.float32
    np.testing.assert_array_equal(head[V:], table[V:].astype(jnp.float32))
    moved = head[:V] - table[:V].astype(jnp.float32)
    np.testing.assert_allclose(moved, readout.difference(task, fitted.change), atol=1e-6)


@pytest.mark.parametrize("missing", ["tasks", "kappas", "ridges", "dev"])
def test_nothing_to_choose_from_is_refused(rng, missing):
    tasks = {} if missing == "tasks" else {0.0: drawn(rng)}
    document = DOCUMENT[:0] if missing == "dev" else DOCUMENT
    grids = {name: () if name == missing else (1.0,) for name in ("kappas", "ridges")}
    with pytest.raises(ValueError, match="choose"):
        readout_choice.choose(tasks, document, **grids)
