"""The search over strengths, and the sweep of a tiny model against a plain loop."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_merge_jax.data import tokenizers
from ot_merge_jax.errors import NonFiniteError
from ot_merge_jax.evaluation import nll
from ot_merge_jax.experiments import sweep
from ot_merge_jax.io.hf import load_hf
from ot_merge_jax.merging import fuse
from ot_merge_jax.models import decoder
from ot_merge_jax.models.families import read
from ot_merge_jax.models.model import Model
from ot_merge_jax.types import Batch, HParams, MergeSpec, Transported

UP, EMBED = "layers/mlp/up_proj/kernel", "embed_tokens/embedding"

# ------------------------------------------------------------------------ search


class Counted:
    """A loss that remembers what it was asked."""

    def __init__(self, loss):
        self.loss, self.asked = loss, []

    def __call__(self, strength):
        self.asked.append(strength)
        return self.loss(strength)


def bowl(**centre):
    """Least at the centre: ``bowl(a=1.0)`` for group ``a``; numbers count for every group."""

    def loss(strength):
        by_group = strength if isinstance(strength, dict) else dict.fromkeys(centre, strength)
        assert by_group.keys() == centre.keys()
        return sum((by_group[group] - best) ** 2 for group, best in centre.items())

    return Counted(loss)


def best_of(points):
    return min(points, key=lambda point: point.loss)


def test_grids_are_those_of_the_spec():
    assert sweep.GRIDS["delta"] == (0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
    for rule in ("interpolate", "residual"):
        assert sweep.GRIDS[rule] == (0, 0.01, 0.03, 0.05, 0.1, 0.15, 0.2)


@pytest.mark.parametrize("grid", sweep.GRIDS.values())
def test_grids_start_at_zero_and_ascend(grid):
    assert grid[0] == 0
    assert list(grid) == sorted(set(grid))


@pytest.mark.parametrize("groups", [[], ["a"]])
def test_one_group_is_searched_by_the_grid_alone(groups):
    grid = [0.0, 0.5, 1.0]
    points = sweep.search(Counted(lambda s: (s - 0.6) ** 2), groups, grid)
    assert [point.strength for point in points] == grid
    assert best_of(points).strength == 0.5


def test_two_groups_start_from_the_shared_strength():
    grid = [0.0, 0.5, 1.0]
    loss = bowl(a=1.0, b=0.0)
    points = sweep.search(loss, ["a", "b"], grid)
    assert [point.strength for point in points[:3]] == grid
    assert all(isinstance(point.strength, dict) for point in points[3:])
    assert best_of(points).strength == {"a": 1.0, "b": 0.0}
    assert best_of(points).loss == 0


def test_the_coordinate_search_does_not_repeat_its_start():
    loss = bowl(a=1.0, b=0.0)
    sweep.search(loss, ["a", "b"], [0.0, 0.5, 1.0])
    assert len(loss.asked) == 3 + 2 + 2
    assert {"a": 0.5, "b": 0.5} not in loss.asked


def test_one_coordinate_moves_at_a_time():
    """Groups in turn, the best of the group before kept."""
    loss = bowl(a=0.4, b=1.2, c=0.0)
    grid = list(sweep.GRIDS["delta"])
    points = sweep.search(loss, ["a", "b", "c"], grid)
    start = best_of(points[:7]).strength
    rounds = [points[7 + 6 * i : 13 + 6 * i] for i in range(3)]
    assert all(p.strength["b"] == p.strength["c"] == start for p in rounds[0])
    assert all(p.strength["a"] == 0.4 and p.strength["c"] == start for p in rounds[1])
    assert all(p.strength["a"] == 0.4 and p.strength["b"] == 1.2 for p in rounds[2])
    assert len(points) == 7 + 18


def test_the_coordinate_search_is_never_worse_than_the_shared_strength(rng):
    for _ in range(20):
        table = {}
        loss = Counted(lambda s, t=table: t.setdefault(str(s), float(rng.random())))
        points = sweep.search(loss, ["a", "b"], [0.0, 0.5, 1.0])
        assert best_of(points).loss <= best_of(points[:3]).loss


def test_of_equal_losses_the_smaller_strength_wins():
    points = sweep.search(Counted(lambda s: 1.0), ["a"], [0.0, 0.5, 1.0])
    assert best_of(points).strength == 0.0
    points = sweep.search(Counted(lambda s: 1.0 if s > 0.2 else 2.0), ["a"], [0.0, 0.5, 1.0])
    assert best_of(points).strength == 0.5


def test_a_group_that_changes_nothing_does_not_win():
    points = sweep.search(bowl(a=1.0, b=1.0), ["a", "b"], [0.0, 0.5, 1.0])
    assert best_of(points).strength == 1.0


# ------------------------------------------------------------------------ sweep

GRID = (0.0, 0.5, 1.0, 2.0)


@pytest.fixture(scope="module")
def setup(tiny_checkpoint, texts):
    """(target, prepared, dev windows): the update follows the gradient, so some of it helps."""
    folder = tiny_checkpoint("llama", layers=1)
    cfg, params = load_hf(folder)
    dev = nll.windows(texts[:8], tokenizers.load_tokenizer(folder), max_positions=64)
    tokens = np.concatenate([b.tokens for b in dev.batches])[:, :24]
    no_rows = np.zeros((len(tokens), 1), np.int32)
    batch = jax.device_put(Batch(tokens, np.ones(tokens.shape, bool), no_rows, no_rows - 1))

    def loss(params):
        return decoder.token_nll(decoder.forward(params, batch, cfg=cfg)[0], batch)[0].mean()

    gradient = jax.jit(jax.grad(loss))(params)

    def step(leaf, size):
        return -size * leaf / jnp.linalg.norm(leaf)

    moved = {
        UP: step(gradient["layers"]["mlp"]["up_proj"]["kernel"], 2.0),
        EMBED: step(gradient["embed_tokens"]["embedding"], 1.0),
    }
    return Model(cfg, params), Transported(moved, {}), dev


def loss_of(setup, strength, spec):
    """The dev loss of one strength, with nothing shared between strengths."""
    (cfg, params), transported, dev = setup
    weights, masks = transported
    fused = fuse.fuse(params, weights, strength, spec=spec, mask=masks)
    return nll.score(fused, dev, cfg=cfg).nll_per_token


def only(setup, path):
    target, transported, dev = setup
    return target, Transported({path: transported.weights[path]}, {}), dev


def test_the_lowest_dev_loss_is_chosen(setup):
    spec, case = MergeSpec(weights=("up",)), only(setup, UP)
    hparams = HParams(None, epsilon=0.3)
    found = sweep.sweep(*case, hparams, spec=spec, grid=GRID)
    expected = [loss_of(case, strength, spec) for strength in GRID]
    np.testing.assert_allclose([point.loss for point in found.tried], expected, rtol=1e-5)
    assert [point.strength for point in found.tried] == list(GRID)
    assert found.hparams == hparams._replace(strength=GRID[int(np.argmin(expected))])
    assert min(expected) < expected[0]  # the update helps, or this test shows nothing


def test_groups_are_searched_one_by_one(setup):
    spec = MergeSpec(weights=("up", "embed"))
    found = sweep.sweep(*setup, HParams(None), spec=spec, grid=GRID)
    assert len(found.tried) == 4 + 3 + 3
    for point in found.tried[::3]:
        assert point.loss == pytest.approx(loss_of(setup, point.strength, spec), rel=1e-5)
    best = min(found.tried, key=lambda point: point.loss)
    assert found.hparams.strength == best.strength
    assert {key for p in found.tried[4:] for key in p.strength} == {"projections", "vocabulary"}


def test_vmap_over_strengths_is_the_loop(setup):
    """All strengths fused in one call give the losses of the sweep."""
    (cfg, params), (weights, _), dev = setup
    spec = MergeSpec(weights=("up", "embed"))
    fused = jax.jit(jax.vmap(lambda s: fuse.fuse(params, weights, s, spec=spec, mask={})))(
        jnp.array(GRID)
    )
    for index, strength in enumerate(GRID):
        one = jax.tree.map(lambda leaf, i=index: leaf[i], fused)
        ours = nll.score(one, dev, cfg=cfg).nll_per_token
        assert ours == pytest.approx(loss_of(setup, strength, spec), rel=1e-5)


@pytest.mark.parametrize("rule", sweep.GRIDS)
def test_the_grid_is_that_of_the_rule(setup, rule):
    spec = MergeSpec(weights=("up",), rule=rule)
    found = sweep.sweep(*only(setup, UP), HParams(None), spec=spec)
    assert tuple(point.strength for point in found.tried) == sweep.GRIDS[rule]


def test_the_whole_grid_is_one_program(setup, caplog):
    spec, case = MergeSpec(weights=("up",)), only(setup, UP)
    sweep.sweep(*case, HParams(None), spec=spec, grid=GRID)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        sweep.sweep(*case, HParams(None), spec=spec, grid=GRID)
    compiled = [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]
    assert len(compiled) <= 1, compiled  # the fusion, once; scoring is compiled already


NO_WINDOWS = nll.Windows([], [], [], np.zeros(0), np.zeros(0))


def test_a_strength_that_overflows_is_a_bad_strength(monkeypatch, config_dict):
    losses = iter([1.0, NonFiniteError("overflow"), 0.5])

    def score(*a, **k):
        value = next(losses)
        if isinstance(value, Exception):
            raise value
        return SimpleNamespace(nll_per_token=value)

    monkeypatch.setattr(sweep.nll, "score", score)
    target = Model(read(config_dict()), {})
    spec = MergeSpec(weights=("up",))
    best, points = sweep.sweep(
        target, Transported({}, {}), NO_WINDOWS, HParams(0.0), spec=spec, grid=[0.0, 1.0, 2.0]
    )
    assert [point.loss for point in points] == [1.0, math.inf, 0.5]
    assert best.strength == 2.0


def test_no_finite_loss_at_all_is_an_error(monkeypatch, config_dict):
    def score(*a, **k):
        raise NonFiniteError("overflow")

    monkeypatch.setattr(sweep.nll, "score", score)
    with pytest.raises(NonFiniteError, match="not finite at any strength"):
        sweep.sweep(
            Model(read(config_dict()), {}), Transported({}, {}), NO_WINDOWS, HParams(0.0),
            spec=MergeSpec(weights=("up",)), grid=[0.0],
        )  # fmt: skip
