"""What each stage says it takes, against XLA's own count of its program.

At shapes where one part of a formula is most of it, so that a part that is missing is noticed; and
little more than what is counted, so that a run is not refused for nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from ot_merge_jax.evaluation import kl, nll, token_bias
from ot_merge_jax.merging import diagnostics, projections
from ot_merge_jax.models import decoder, gather, offload, specs
from ot_merge_jax.models.config import ModelConfig, Rope
from ot_merge_jax.transport import coupling
from ot_merge_jax.types import BUDGET, Batch, MergeSpec, Potentials

#: Said over counted, at most.
FACTOR = 2.5


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def batch_of(size, length):
    rows = shape(size, 1, dtype=jnp.int32)
    tokens = shape(size, length, dtype=jnp.int32)
    return Batch(tokens, shape(size, length, dtype=jnp.bool_), rows, rows)  # pyright: ignore[reportArgumentType]


def config(*, vocabulary=64, hidden=32, intermediate=64, heads=2, head_dim=16, positions=64):
    return ModelConfig(
        "llama", vocabulary, hidden, intermediate, 3, heads, heads, head_dim, positions, 1e-5,
        Rope(1e4), True, False, "float32",
    )  # fmt: skip


def counted(program, *shapes, **static):
    """Bytes of what a program makes, beside its arguments."""
    analysis = program.lower(*shapes, **static).compile().memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes


def check(said, took):
    assert took <= said <= FACTOR * took


#: Where the MLP, the narrow arrays, and the attention scores are most of the work.
WIDE = config(intermediate=2048), (16, 64)
NARROW = config(hidden=512, heads=4, head_dim=128), (16, 64)
LONG = config(heads=8, head_dim=4, positions=512), (2, 512)


@pytest.mark.parametrize(("cfg", "size"), [WIDE, NARROW, LONG])
def test_gather(cfg, size):
    batch = batch_of(*size)
    took = counted(gather._step, specs.abstract(cfg), batch, cfg=cfg, sites=frozenset({"down_out"}))
    check(gather.peak_bytes(cfg, [batch]), took)


def test_hidden_states_and_layers_come_on_top_where_a_model_is_on_disk():
    cfg, batches = config(intermediate=2048), [batch_of(16, 64), batch_of(4, 64)]
    layer = specs.largest_piece(cfg)
    assert layer == 3 * 32 * 2048 + 4 * 32 * 32 + 2 * 32
    resident = gather.peak_bytes(cfg, batches)
    for budget, tokens in ((BUDGET.hidden, 20 * 64), (4 * 32 * 1100, 1100), (1, 16 * 64)):
        said = gather.peak_bytes(cfg, batches, is_resident=False, hidden_at_once=budget)
        assert said - resident == 4 * 32 * tokens + 2 * 4 * layer
    assert [part.stop - part.start for part in offload.chunks(batches, cfg=cfg)] == [2]
    small = offload.chunks(batches, cfg=cfg, hidden_at_once=1)
    assert [part.stop - part.start for part in small] == [1, 1]


LARGE = config(vocabulary=20000)


@pytest.mark.parametrize("at_once", [BUDGET.logits, 16 * 64 * 20000, 1])
def test_score_and_divergence(at_once):
    """The longest windows of documents of 63 tokens are 64 sequences of 64."""
    params, (size, length) = specs.abstract(LARGE), nll.largest_window(LARGE, [63])
    assert (size, length) == (64, 64)
    arguments = batch_of(size, length), shape(size, length - 1)
    took = counted(nll._sequence_nll, params, *arguments, None, cfg=LARGE, logits_at_once=at_once)
    check(nll.peak_bytes(LARGE, [63], logits_at_once=at_once), took)
    took = counted(
        kl._sequences, (params, params), *arguments,
        cfgs=(LARGE, LARGE), logits_at_once=at_once,
    )  # fmt: skip
    check(kl.peak_bytes((LARGE, LARGE), [63], logits_at_once=at_once), took)


def test_layers_count_where_the_vocabulary_is_small():
    cfg = config(heads=8, head_dim=4, positions=512)
    params, (size, length) = specs.abstract(cfg), nll.largest_window(cfg, [600])
    arguments = batch_of(size, length), shape(size, length - 1)
    at_once = BUDGET.logits
    took = counted(nll._sequence_nll, params, *arguments, None, cfg=cfg, logits_at_once=at_once)
    check(nll.peak_bytes(cfg, [600]), took)
    took = counted(
        kl._sequences, (params, params), *arguments,
        cfgs=(cfg, cfg), logits_at_once=at_once,
    )  # fmt: skip
    check(kl.peak_bytes((cfg, cfg), [600]), took)


def test_unigram():
    positions, width = 500, LARGE.hidden_size
    arguments = shape(positions, width), shape(LARGE.vocab_size)
    took = counted(token_bias._fit, specs.abstract(LARGE), *arguments, cfg=LARGE)
    check(token_bias.peak_bytes(LARGE, tokens=positions), took)
    # an even part of the positions
    fewer = token_bias.peak_bytes(LARGE, tokens=positions, predictions=100 * LARGE.vocab_size)
    assert fewer == token_bias.peak_bytes(LARGE, tokens=100)


@pytest.mark.parametrize(
    ("n", "m", "rows", "layers", "pairs", "solver"),
    [
        (600, 800, 64, 3, 1, "scaling"),  # costs
        (600, 800, 64, 3, 1, "auto"),
        (600, 800, 64, 3, 3, "scaling"),
        (64, 96, 2000, 8, 3, "scaling"),  # rows, picked
        (64, 64, 2000, 8, 8, "scaling"),
        (600, 64, 2000, 4, 1, "scaling"),  # rows of the target
    ],
)
def test_couple(n, m, rows, layers, pairs, solver):
    arguments = shape(rows, n), shape(layers, rows, m)
    took = counted(
        coupling._one_layer, *arguments, 0.02, 1e-3,
        max_iterations=5, signed=False, solver=solver, size=pairs,
    )  # fmt: skip
    said = coupling.peak_bytes([(n, m)], rows=rows, source_layers=layers, pairs_at_once=pairs)
    check(said - 4 * rows * (n + layers * m), took)


def test_the_rows_of_a_block_of_layers_are_held():
    def said(at_once):
        return coupling.peak_bytes(
            [(8, 16)], rows=1000, source_layers=6, pairs_at_once=1, rows_at_once=at_once
        )

    layer = 4 * 1000 * 16
    assert said(6 * 16000) - said(3 * 16000) == 3 * layer
    assert said(2 * 16000) - said(1) == 2 * layer  # one layer, which is not picked from others


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize(
    ("n", "m", "rows", "at_once"),
    [(1000, 1500, 64, BUDGET.plan_block), (1000, 1500, 64, 800 * 1500), (1000, 1500, 64, 1),
     (100, 150, 5000, BUDGET.plan_block)],
)  # fmt: skip
def test_maps_and_parts_of_plans(n, m, rows, at_once, side):
    number = shape()
    whole, is_true = shape(dtype=jnp.int32), shape(dtype=jnp.bool_)
    potentials = Potentials(shape(n), shape(m), number, number, number, whole, is_true, is_true)  # pyright: ignore[reportArgumentType]
    x, y = shape(rows, n), shape(rows, m)
    pair = projections.LayerPair(x, y, potentials, shape(n), shape(m))
    took = counted(projections._map, pair, None, side=side, spec=MergeSpec(), plan_at_once=at_once)
    arguments = 4 * rows * (n + m)
    check(coupling.plan_bytes(n, m, rows=rows, plan_at_once=at_once) - arguments, took)
    picked = shape(n // 2, dtype=jnp.int32)
    took = counted(coupling.rebuild, x, y, potentials, picked, plan_at_once=at_once)
    said = coupling.plan_bytes(n, m, rows=rows, picked=n // 2, plan_at_once=at_once)
    check(said - arguments, took)


def test_smaller_budgets_never_need_more():
    cfg, batches, problems = config(vocabulary=20000), [batch_of(16, 64)] * 3, [(600, 800), (8, 9)]
    falling = {
        "gather": lambda b: gather.peak_bytes(cfg, batches, is_resident=False, hidden_at_once=b),
        "score": lambda b: nll.peak_bytes(cfg, [63] * 99, logits_at_once=b),
        "stream": lambda b: nll.peak_bytes(cfg, [63] * 99, is_resident=False, hidden_at_once=b),
        "divergence": lambda b: kl.peak_bytes((cfg, cfg), [63] * 99, logits_at_once=b),
        "pairs": lambda b: coupling.peak_bytes(problems, rows=64, source_layers=8, pairs_at_once=b),
        "rows": lambda b: coupling.peak_bytes(problems, rows=64, source_layers=8, rows_at_once=b),
        "plan": lambda b: coupling.plan_bytes(600, 800, rows=64, plan_at_once=b),
        "describe": lambda b: diagnostics.peak_bytes(problems, rows=64, plan_at_once=b),
    }
    for name, said in falling.items():
        sizes = [said(1 << power) for power in range(31)]
        if name in ("plan", "describe"):
            # one block of all rows is not joined from parts
            sizes = [size for power, size in enumerate(sizes) if 1 << power < 600 * 800]
        assert sizes == sorted(sizes), name
        assert sizes[0] < sizes[-1], name


@pytest.mark.parametrize("change", [{"size": 8}, {"length": 32}])
def test_more_tokens_need_more(change):
    small = {"size": 4, "length": 16}
    more = decoder.peak_bytes(config(), **{**small, **change})
    assert more > decoder.peak_bytes(config(), **small)
