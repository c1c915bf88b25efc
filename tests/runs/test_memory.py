"""What a run is said to need, and what happens when that is too much."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from ot_merge_jax.data import batching, calibration
from ot_merge_jax.errors import ResourceError
from ot_merge_jax.io import arrays
from ot_merge_jax.io.hf import load_hf
from ot_merge_jax.models import sites as spaces
from ot_merge_jax.models.config import ModelConfig, Rope
from ot_merge_jax.runs import memory
from ot_merge_jax.transport import coupling as couplings
from ot_merge_jax.types import BUDGET, Budget, Coupling, MergeSpec, Potentials

SPEC = MergeSpec(weights=("up", "down"))


@pytest.fixture(scope="module")
def cfgs(tiny_checkpoint):
    sizes = {"target": {"layers": 2}, "source": {"layers": 6, "hidden": 64, "intermediate": 256}}
    return {role: load_hf(tiny_checkpoint(**more))[0] for role, more in sizes.items()}


@pytest.fixture(scope="module")
def data():
    rows = [([0, 1], [2 * i, 2 * i + 1]) for i in range(8)]
    parts = batching.batches([[1, 2, 3, 4]] * 8, rows)
    return calibration.Calibration(parts, parts, 8, 32, 32, rows=16, target_matched=1.0,
                                   source_matched=1.0)  # fmt: skip


def test_whole_models_are_held_if_they_fit(cfgs, data):
    plan = memory.choose(cfgs, data, spec=SPEC, scored=[100], limit=1 << 40)
    assert plan.offloaded == frozenset()
    assert str(plan).startswith("about 0.7 GiB at most (to ")


@pytest.fixture(scope="module")
def large(cfgs):
    """A vocabulary of which a batch's logits are most of what there is, in wide models."""
    sizes = {"vocab_size": 50_000, "intermediate_size": 1 << 11}
    return {role: dataclasses.replace(cfg, **sizes) for role, cfg in cfgs.items()}


def test_smaller_blocks_come_before_the_disk(large, data):
    """Whole models in blocks as large as fit, and only of the stages that were too large."""
    whole = memory.needed(large, data, spec=SPEC, scored=[100])
    assert whole.peak == whole.stages["score the source"]
    plan = memory.choose(large, data, spec=SPEC, scored=[100], limit=whole.peak - 1)
    assert plan.offloaded == frozenset()
    assert plan.peak < whole.peak
    assert plan.budget == BUDGET._replace(logits=plan.budget.logits)
    twice = plan.budget._replace(logits=2 * plan.budget.logits)
    assert memory.needed(large, data, spec=SPEC, scored=[100], budget=twice).peak >= whole.peak
    assert str(memory.choose(large, data, spec=SPEC, scored=[100], limit=1 << 40)) == str(whole)


@pytest.fixture(scope="module")
def deep(large):
    """The same with a source that is too large for whatever its blocks are."""
    return {**large, "source": dataclasses.replace(large["source"], num_layers=400)}


def test_source_stays_on_disk_if_it_does_not_fit(deep, data):
    """First in the blocks of today, then in smaller ones."""
    choose = functools.partial(memory.choose, deep, data, spec=SPEC, scored=[100])
    offloaded = frozenset({"source"})
    layered = memory.needed(deep, data, spec=SPEC, scored=[100], offloaded=offloaded)
    plan = choose(limit=layered.peak)
    assert plan == layered
    assert str(plan).endswith("source layer by layer")
    smaller = choose(limit=layered.peak - 1)
    assert smaller.offloaded == {"source"}
    assert smaller.peak < layered.peak
    assert smaller.budget.logits < BUDGET.logits


def test_every_limit_is_kept_or_refused_with_what_one_piece_needs(deep, data):
    """Down to the smallest blocks; what is refused names that, and is more than was allowed."""
    plan = memory.choose(deep, data, spec=SPEC, scored=[100], limit=1 << 40)
    for _ in range(100):
        limit = (9 * plan.peak + memory.PROCESS) // 10 - 1
        try:
            plan = memory.choose(deep, data, spec=SPEC, scored=[100], limit=limit)
        except ResourceError as error:
            said = re.search(r"\(to (.+?)\).*\(([\d,]+) and ([\d,]+) bytes\)", str(error))
            break
        assert plan.peak <= limit
    assert said[1] in plan.stages
    assert int(said[2].replace(",", "")) == plan.peak
    assert int(said[3].replace(",", "")) == limit
    assert plan.budget.predictions == BUDGET.predictions  # results depend on it


def test_what_the_smallest_blocks_fit_is_never_refused(cfgs, data):
    """Here the rows of the source count only after the parts of plans have become smaller."""
    sizes = {
        "target": {"num_layers": 2, "hidden_size": 256, "intermediate_size": 6000},
        "source": {"num_layers": 3, "hidden_size": 32, "intermediate_size": 4096},
    }
    wide = {
        role: dataclasses.replace(cfg, vocab_size={"target": 50_000, "source": 300}[role],
                                  num_heads=2, num_kv_heads=2,
                                  head_dim=sizes[role]["hidden_size"] // 2, **sizes[role])
        for role, cfg in cfgs.items()
    }  # fmt: skip
    given = {
        "spec": MergeSpec(weights=("gate", "up", "down", "embed")),
        "scored": [50] * 20,
        "controls": ("permuted", "wrong-source", "unigram"),
    }
    asked = wide, data._replace(rows=2000)
    smallest = memory.needed(
        *asked, offloaded=frozenset({"source"}), budget=Budget(None, 1, 1, 1, 1), **given
    )
    assert memory.choose(*asked, limit=smallest.peak, **given).peak <= smallest.peak
    with pytest.raises(ResourceError, match="smallest blocks"):
        memory.choose(*asked, limit=smallest.peak // 2, **given)


def test_run_that_cannot_fit_is_refused_with_both_sizes(cfgs, data):
    with pytest.raises(
        ResourceError, match=r"needs about 0\.7 GiB .*--memory-limit allows 0\.5 GiB"
    ):
        memory.choose(cfgs, data, spec=SPEC, scored=[100], limit=1 << 29)


@pytest.mark.catalogue("out-of-memory")
def test_machine_is_the_limit_if_none_is_given(cfgs, data, monkeypatch):
    monkeypatch.setattr(memory, "of_machine", lambda: 1000)
    with pytest.raises(ResourceError, match=r"this machine has 0\.0 GiB"):
        memory.choose(cfgs, data, spec=SPEC, scored=[100], limit=None)


def test_more_of_everything_needs_more(cfgs, data):
    """More rows, more weights, a source base: no stage may shrink."""
    few = memory.needed(cfgs, data, spec=SPEC, scored=[10]).stages
    both = {**cfgs, "source base": cfgs["source"]}
    for more in (
        memory.needed(cfgs, data._replace(rows=10**6), spec=SPEC, scored=[10]),
        memory.needed(
            cfgs, data, spec=SPEC._replace(weights=("q", "up", "down", "embed")), scored=[10]
        ),
        memory.needed(cfgs, data, spec=SPEC, scored=[60]),
        memory.needed(both, data, spec=SPEC, scored=[10]),
    ):
        assert all(more.stages[name] >= size for name, size in few.items())
        assert sum(more.stages.values()) > sum(few.values())


def test_pairs_that_do_not_fit_are_refused_though_the_process_does(cfgs, data):
    """A limit between what the process needs and what one pair of wide sites needs beside it."""
    wide = {role: dataclasses.replace(cfg, intermediate_size=1 << 14) for role, cfg in cfgs.items()}
    limit = memory.PROCESS + (1 << 30)
    assert memory.needed(wide, data, spec=SPEC, scored=[10]).stages["couple"] > limit + (1 << 30)
    with pytest.raises(ResourceError, match=r"needs about \d\.\d GiB .* allows 1\.7 GiB"):
        memory.choose(wide, data, spec=SPEC, scored=[10], limit=limit)


def test_weights_of_a_model_are_counted_from_its_shapes(tiny_checkpoint, data):
    cfg, params = load_hf(tiny_checkpoint())
    count = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
    cfgs = {"target": cfg, "source": cfg}
    held = memory.needed(cfgs, data, spec=SPEC, scored=[10]).stages["choose the strength"]
    streamed = memory.needed(cfgs, data, spec=SPEC, scored=[10], offloaded=frozenset({"source"}))
    assert held - streamed.stages["choose the strength"] == 4 * count


@pytest.mark.catalogue("out-of-memory")
@pytest.mark.parametrize(
    ("said", "expected"), [("1000000\n", 1_000_000), ("max\n", None), ("9223372036854771712", None)]
)
def test_limit_of_a_container_counts(said, expected, tmp_path):
    file = tmp_path / "memory.max"
    machine = memory.of_machine([str(file)])  # no such file: the machine's memory
    assert machine > 1 << 28
    file.write_text(said)
    assert memory.of_machine([str(file)]) == (expected or machine)


def coupling_bytes(target, source, weights):
    """What a coupling of these models is said to take."""
    return couplings.result_bytes(
        memory._problems({"target": target, "source": source}, MergeSpec(weights=weights)),
        layers=(target.num_layers, source.num_layers),
    )


def test_a_coupling_of_an_8b_into_a_1b_is_small():
    """All seven projections of every layer pair, at the shapes of Llama 3.1 8B and 3.2 1B."""
    said = {
        "family": "llama", "vocab_size": 128256, "num_heads": 32, "num_kv_heads": 8,
        "max_positions": 131072, "rms_norm_eps": 1e-5, "rope": Rope(5e5), "qkv_bias": False,
        "dtype": "bfloat16", "tie_word_embeddings": False,
    }  # fmt: skip
    names = ("hidden_size", "intermediate_size", "num_layers", "head_dim")
    target, source = (
        ModelConfig(**said, **dict(zip(names, sizes, strict=True)))
        for sizes in ((2048, 8192, 16, 64), (4096, 14336, 32, 128))
    )
    assert 200e6 < coupling_bytes(target, source, tuple(spaces.PROJECTIONS)) <= 250e6


def test_a_coupling_takes_the_disk_that_was_said(cfgs, tmp_path, rng):
    """Random potentials, which do not compress, of every pair."""
    target, source = (
        dataclasses.replace(cfgs[role], hidden_size=1 << 13, intermediate_size=1 << 13)
        for role in ("target", "source")
    )
    pairs, width = (target.num_layers, source.num_layers), 1 << 13
    sites = spaces.sites_of(("up",))
    assert {spaces.site_width(site, cfg) for site in sites for cfg in (target, source)} == {width}

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    feature = {
        site: Potentials(
            draw(*pairs, width), draw(*pairs, width), *(draw(*pairs) for _ in range(3)),
            iterations=np.zeros(pairs, np.int32), converged=np.ones(pairs, bool),
            used_log_domain=np.zeros(pairs, bool),
        )
        for site in sites
    }  # fmt: skip
    std = [{site: draw(one.num_layers, width) for site in sites} for one in (target, source)]
    layer = {site: draw(*pairs) for site in sites}
    arrays.save_coupling(tmp_path / "coupling", Coupling(layer, feature, *std))
    took = sum(one.stat().st_size for one in (tmp_path / "coupling").rglob("*") if one.is_file())
    said = coupling_bytes(target, source, ("up",))
    assert 0.9 * said < took < 1.05 * said
