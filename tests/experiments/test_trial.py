"""Planted merges: one whose source knows something, one that knows only how often words occur, and
one that knows nothing. The verdict must be right in all of them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published import assert_nothing_is_lost, report_of

from ot_merge_jax.data import tokenizers
from ot_merge_jax.evaluation import nll
from ot_merge_jax.io import hf
from ot_merge_jax.models import decoder
from ot_merge_jax.recipes import loading
from ot_merge_jax.runs import merge

WORDS = ["river", "market", "the", "stone", "house", "water", "bread", "light"]
SIZES = {"layers": 2, "hidden": 24, "heads": 2, "intermediate": 24}


def documents(count, seed, follows=0.85):
    """Walks on a ring of words: ``follows`` of the steps go to the next one."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        steps = np.where(rng.random(16) < follows, 1, rng.integers(0, len(WORDS), 16))
        made.append(" ".join(WORDS[place % len(WORDS)] for place in steps.cumsum()))
    return made


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    """``walks(follows)`` -> calibration and held-out files."""

    def make(follows):
        folder = tmp_path_factory.mktemp("texts")
        found = {}
        for seed, (name, count) in enumerate({"calibration": 60, "evaluation": 80}.items()):
            found[name] = str(folder / f"{name}.txt")
            lines = documents(count, seed, follows)
            (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
        return found

    return make


@pytest.fixture(scope="module")
def target(tiny_checkpoint):
    return tiny_checkpoint("llama", seed=1, **SIZES)


@pytest.fixture(scope="module")
def sources(target, tmp_path_factory):
    """Name -> a copy of the target that learned something in its head alone."""
    cfg, params = hf.load_hf(target)
    cut = nll.windows(
        documents(200, 2), tokenizers.load_tokenizer(target), max_positions=cfg.max_positions
    )
    identity = {**params, "lm_head": {"kernel": jnp.eye(cfg.hidden_size)}}
    x, following = [], []
    for batch, scored in zip(cut.batches, cut.scored, strict=True):
        residual = decoder.hidden_states(params, jax.device_put(batch), cfg=cfg)[0]
        seen = decoder.head(identity, residual, cfg=cfg)
        x.append(np.asarray(seen)[:, :-1][scored > 0])
        following.append(np.asarray(batch.tokens)[:, 1:][scored > 0])
    x, following = np.concatenate(x), np.concatenate(following)
    one_hot = np.eye(cfg.vocab_size, dtype=np.float32)[following]
    share = one_hot.mean(0)
    frequency = np.log((share + 1e-3) / (share + 1e-3).mean())
    changes = {
        # the next word from the last one
        "knows": np.linalg.lstsq(x, 8 * (one_hot - share) + frequency, rcond=None)[0],
        # the same for every word, as far as one head can say it
        "counts": np.linalg.lstsq(x, np.broadcast_to(frequency, one_hot.shape), rcond=None)[0],
        "nothing": np.random.default_rng(0).normal(size=(cfg.hidden_size, cfg.vocab_size)),
    }
    found = {}
    for name, change in changes.items():
        kernel = params["lm_head"]["kernel"] + jnp.asarray(change, jnp.float32)
        found[name] = tmp_path_factory.mktemp("sources") / name
        hf.save_hf(found[name], {**params, "lm_head": {"kernel": kernel}}, cfg=cfg, like=target)
    return found


@pytest.fixture(scope="module")
def reports(target, sources, walks, tmp_path_factory):
    """Name of a source -> report of a run with all controls."""
    found = {}
    for name, source in sources.items():
        settings = {
            "preset": "delta",
            "weights": ["head"],
            "target": str(target),
            "source": str(source),
            "source_base": str(target),
            # where words follow by chance there is nothing to know but how often they occur
            **walks(0.0 if name == "counts" else 0.85),
            "controls": "all",
            "continuations": 1,
            "seeds": 2 if name == "knows" else 1,
        }
        out = tmp_path_factory.mktemp("out") / name
        merge.run(loading.resolve(settings), out, command="test")
        assert_nothing_is_lost(out)
        found[name] = report_of(out)
    return found


def test_a_source_that_knows_the_next_word_improves_the_target(reports):
    report = reports["knows"]
    assert report.outcome == "improved", report.verdict
    assert "2 calibration seeds agree" in report.verdict
    assert report.seeds == [0, 1]
    assert [one.seed for one in report.per_seed] == [0, 1]
    assert report.controls["unigram"].beyond.high < 0


def test_a_source_that_counts_words_does_not_improve_it_beyond_counting(reports):
    report = reports["counts"]
    assert report.evaluation["merge"].against_target.high < 0
    assert report.outcome == "no measurable difference", report.verdict
    assert "beyond unigram" in report.verdict


def test_a_source_that_learned_nothing_changes_nothing(reports):
    assert reports["nothing"].outcome in ("unchanged", "worse", "no measurable difference")


def test_every_control_is_there_with_its_interval(reports):
    found = reports["knows"].controls
    assert list(found) == [
        "target", "source", "shrink", *(f"noise {n}" for n in range(1, 6)),
        "permuted", "wrong-layer", "wrong-source", "unigram",
    ]  # fmt: skip
    assert {name for name, one in found.items() if one.not_applicable is not None} == {
        "shrink", "wrong-layer",
    }  # fmt: skip
    for name in ("noise 1", "permuted", "wrong-source"):
        one = found[name]
        change = one.merge_minus_control
        assert change.low <= change.difference <= change.high < 0
        # the same strengths, the same documents
        tried = [point.strength for point in one.strength.tried]
        assert tried == [point.strength for point in reports["knows"].strength.tried]
        assert one.documents == reports["knows"].evaluation["target"].documents
    assert 0 < found["unigram"].gamma <= 1


def test_the_split_and_the_continuations_are_in_the_report(reports):
    report = reports["knows"]
    split = report.strength.split
    assert (split.train_documents, split.dev_documents, split.seed) == (48, 12, 0)
    [sample] = report.samples
    assert list(sample.continuations) == ["target", "merge"]


@pytest.fixture(scope="module")
def of_neurons(target, walks, tiny_checkpoint, tmp_path_factory):
    """Report of neurons that moved at a given strength, to which every control applies."""
    settings = {
        "preset": "barycentric",
        "weights": ["down", "o"],
        "target": str(target),
        "source": str(tiny_checkpoint("llama", seed=2, **SIZES | {"layers": 3})),
        **walks(0.85),
        "strength": 0.5,
        "controls": "all",
        "continuations": 0,
        "seeds": 2,
    }
    out = tmp_path_factory.mktemp("out") / "neurons"
    merge.run(loading.resolve(settings), out, command="test")
    assert_nothing_is_lost(out)
    return report_of(out)


def test_every_control_of_neurons_is_another_model(of_neurons):
    """Another than the merge and than every other control, with every calibration seed."""
    found = of_neurons.controls
    assert not [name for name, one in found.items() if one.not_applicable is not None]
    assert of_neurons.seeds == [0, 1]
    broken = ["shrink", "noise 1", "permuted", "wrong-layer", "wrong-source"]
    losses = [found[name].nll_per_token for name in broken]
    losses.append(of_neurons.evaluation["merge"].nll_per_token)
    assert len({round(loss, 6) for loss in losses}) == len(losses)
    for name in broken:
        seeds = found[name].seeds
        assert [one.seed for one in seeds] == [0, 1]
        assert all(one.difference != 0 for one in seeds)
        assert found[name].strength.chosen == of_neurons.strength.chosen
