"""`ot-merge adapt`: a merge with its residual frozen, teachers, adapters."""

import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import output_contract
import pytest
import yaml
from published import assert_nothing_is_lost, of_a_later_version, report_of, tensors

from ot_merge_jax import load_hf
from ot_merge_jax.demo import assets
from ot_merge_jax.io import arrays
from ot_merge_jax.models import specs
from ot_merge_jax.runs import adapt
from ot_merge_jax.training import initial, residual
from ot_merge_jax.training.loop import TrainHistory

COMMON = ("--block", 24, "--batch-size", 4, "--steps", 4, "--learning-rate", 0.01)


class Adapted:
    """A finished adaptation."""

    def __init__(self, out, called):
        self.out, self.called = out, called
        self.report = report_of(out)

    def settings(self):
        return yaml.safe_load((self.out / "ot_merge" / "recipe.yaml").read_text())


@pytest.fixture(scope="session")
def adapted(tmp_path_factory, cli, text_files):
    """``adapted(model, *flags)`` -> `Adapted`, run once."""
    made = {}

    def make(model, *flags):
        key = (str(model), *map(str, flags))
        if key not in made:
            out = tmp_path_factory.mktemp("adapted") / "out"
            called = cli("adapt", model, "--text", text_files[0], *COMMON, *flags, "--out", out)
            assert called.code == 0, called.err
            made[key] = Adapted(out, called)
        return made[key]

    return make


@pytest.fixture(scope="session")
def merge(merged):
    return merged("delta llama<-llama")


@pytest.fixture(scope="session")
def of_a_merge(adapted, merge, models, text_files):
    """A merge adapted by a teacher, with held-out text."""
    teacher = ("--objective", "mix", "--source", models["llama-source"])
    return adapted(merge.out, *teacher, "--eval-text", text_files[1])


# ---- what it writes ----


def test_it_is_a_plain_folder_of_the_merge_s_form(of_a_merge, merge, models):
    folders = output_contract.Folders(of_a_merge.out, merge.out, models["llama-source"])
    for check in (
        output_contract.has_tensors_of_the_names_shapes_and_dtypes_of_the_target,
        output_contract.has_one_key_of_metadata,
        output_contract.has_the_shards_of_the_target_and_a_complete_index,
        output_contract.has_all_other_files_byte_for_byte,
        output_contract.has_modes_that_follow_the_umask,
    ):
        kept = folders._replace(target=models["llama-target"])
        check(kept)
    inside = {path.name for path in (of_a_merge.out / "ot_merge").iterdir()}
    assert inside == {
        "recipe.yaml", "report.json", "report.html", "provenance.json", "events.jsonl", "residual"
    }  # fmt: skip
    assert not list(of_a_merge.out.parent.glob("out.*"))


@pytest.mark.torch
def test_transformers_loads_it_and_gives_our_logits(of_a_merge):
    torch = pytest.importorskip("torch")
    import jax
    import transformers

    from ot_merge_jax import forward
    from ot_merge_jax.types import Batch

    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        of_a_merge.out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    cfg, params = load_hf(of_a_merge.out, dtype=jnp.float32)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, 16)).astype(np.int32)
    row = np.zeros((1, 1), np.int32)
    batch = Batch(tokens, np.ones(tokens.shape, bool), row, row)
    ours = jax.jit(forward, static_argnames="cfg")(params, batch, cfg=cfg)[0]
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(np.asarray(ours), expected, rtol=0, atol=1e-4)


def test_the_report_says_what_happened(of_a_merge):
    assert_nothing_is_lost(of_a_merge.out)
    found = of_a_merge.report
    assert found.steps == len(found.losses) == 4
    assert found.dev.curve[0] == [0, found.dev.before]
    assert found.dev.curve[-1][0] == 4
    assert found.dev.after == pytest.approx(found.dev.curve[-1][1], abs=1e-5)
    held_out = found.evaluation
    assert set(held_out) == {"before", "after", "target"}
    change = held_out["after"].against_before
    assert change.difference == pytest.approx(
        held_out["after"].nll_per_token - held_out["before"].nll_per_token
    )
    assert change.low < change.difference < change.high
    assert found.verdict in " ".join(of_a_merge.called.out.split("\n"))
    assert found.data["universal_distillation"] is False


def test_the_page_speaks_of_the_training_and_of_no_merge(of_a_merge, every_plot, cli, tmp_path):
    page = tmp_path / "report.html"
    assert cli("report", of_a_merge.out, "--out", page).code == 0
    said = re.sub(r"<svg.*?</svg>|<style>.*?</style>|<[^>]+>", " ", page.read_text(), flags=re.S)
    said = " ".join(said.split())
    found = of_a_merge.report
    assert "after minus before training, on held-out text" in said
    assert f"{found.evaluation['after'].against_before.difference:+.4f} [" in said
    assert f"is {found.dev.after:.4f} of what was written" in said
    assert "Loss while training" in said
    for other in ("transported", "How far it went", "calibration seed", "No controls"):
        assert other not in said


def test_a_damaged_provenance_of_a_merge_is_refused(merge, text_files, cli, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(merge.out, copy)
    for damage in ('{"inputs": null}', '{"inputs": {"target": null}}', '{"inputs": {"target": 3}}'):
        (copy / "ot_merge" / "provenance.json").write_text(damage)
        called = cli("adapt", copy, "--text", text_files[0], *COMMON, "--out", tmp_path / "out")
        assert called.code == 3, called.err
        assert "are not those that copy was merged from" in " ".join(called.err.split())


def test_a_folder_of_a_later_version_is_refused(merge, of_a_merge, text_files, cli, tmp_path):
    """A merge, and what was adapted from one."""
    for name, folder in (("merge", merge.out), ("adapted", of_a_merge.out)):
        copy = shutil.copytree(folder, tmp_path / name)
        of_a_later_version(copy)
        called = cli("adapt", copy, "--text", text_files[0], *COMMON, "--out", tmp_path / "out")
        assert (called.code, called.out) == (3, "")
        assert called.err.splitlines()[-1].startswith("error: ")
        assert "report.json is a report of version 2" in called.err.splitlines()[-1]


def test_a_finished_training_of_a_later_version_is_not_taken_for_this_one(
    models, text_files, cli, tmp_path
):
    words = ("adapt", models["llama-target"], "--text", text_files[0], *COMMON, "--steps", 0,
             "--out", tmp_path / "out")  # fmt: skip
    assert cli(*words).code == 0
    assert cli(*words, "--resume").code == 0
    of_a_later_version(tmp_path / "out")
    refused = cli(*words, "--resume")
    assert (refused.code, refused.out) == (3, "")
    assert "report.json is a report of version 2" in refused.err.splitlines()[-1]
    assert cli(*words, "--overwrite").code == 0
    assert_nothing_is_lost(tmp_path / "out")


def test_the_progress_says_losses_and_the_rate():
    history = TrainHistory(None, (2.5,), (1.0,), ((0, 3.0),))
    assert adapt._note(history, 12.4) == "loss 2.5000, dev 3.0000, 12 tokens/s"
    assert adapt._note(TrainHistory(None), 0.0) == ""


def test_held_out_losses_are_those_of_eval(of_a_merge, merge, text_files, cli):
    called = cli("eval", merge.target, merge.out, of_a_merge.out, "--text", text_files[1], "--json")
    losses = [one["nll_per_token"] for one in called.json["models"].values()]
    ours = [of_a_merge.report.evaluation[x].nll_per_token for x in ("target", "before", "after")]
    np.testing.assert_allclose(ours, losses, atol=1e-5)


def test_what_is_trained_on_is_not_held_out(models, text_files, cli, tmp_path):
    trained, held_out = (path.read_text().splitlines() for path in text_files)
    mixed = tmp_path / "mixed.txt"
    mixed.write_text("\n".join([*held_out, trained[0].upper()]) + "\n")
    words = ("adapt", models["llama-target"], "--text", text_files[0], *COMMON, "--out")
    called = cli(*words, tmp_path / "out", "--eval-text", mixed)
    assert called.code == 0, called.err
    total = len(held_out) + 1
    said = f"1 of {total} held-out documents also stands in the training text and is left out"
    assert said in " ".join(called.err.split())
    assert report_of(tmp_path / "out").evaluation["after"].documents == len(held_out)
    called = cli(*words, tmp_path / "again", "--eval-text", text_files[0])
    assert (called.code, called.out) == (3, "")
    assert "training text and the held-out text are the same file" in " ".join(called.err.split())
    assert not (tmp_path / "again").exists()


def test_events_are_one_line_of_json_for_each_step(of_a_merge):
    lines = (of_a_merge.out / "ot_merge" / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert [one["step"] for one in events] == [1, 2, 3, 4]
    assert [one["loss"] for one in events] == of_a_merge.report.losses
    assert all(one["tokens_per_second"] > 0 for one in events)
    assert events[-1]["dev_loss"] == of_a_merge.report.dev.curve[-1][1]


def test_the_card_says_what_was_done(of_a_merge, merge):
    _, front, body = (of_a_merge.out / "README.md").read_text().split("---\n", 2)
    found = yaml.safe_load(front)
    assert found["base_model_relation"] == "finetune"
    assert found["base_model"][0] == merge.out.name
    assert "ot-merge adapt" in body
    assert "Merged across" not in body


def test_provenance_hashes_everything_that_was_read(of_a_merge):
    found = json.loads((of_a_merge.out / "ot_merge" / "provenance.json").read_text())
    assert set(found["inputs"]) == {"model", "target", "source"}
    assert set(found["texts"]) == {"text", "evaluation"}
    for name, digest in found["output"].items():
        assert output_contract.sha256(of_a_merge.out / name) == digest


# ---- the residual ----


def test_the_residual_is_the_merge_minus_its_target(of_a_merge, merge):
    kept = arrays.load_arrays(of_a_merge.out / "ot_merge" / "residual")
    target, merged = (load_hf(one, dtype=jnp.float32)[1] for one in (merge.target, merge.out))
    assert kept.keys() == residual.between(merged, target).keys()
    for path, leaf in kept.items():
        np.testing.assert_array_equal(leaf, specs.get(merged, path) - specs.get(target, path))


def test_no_steps_and_another_strength_rescale_the_merge(adapted, merge):
    """0 takes the merge back, and the strength it was merged at leaves it alone."""
    chosen = merge.report.strength.chosen
    target, merged = (load_hf(one, dtype=jnp.float32)[1] for one in (merge.target, merge.out))
    flags = ("--steps", 0)
    none = load_hf(adapted(merge.out, *flags, "--strength", 0).out, dtype=jnp.float32)[1]
    for path in residual.between(merged, target):
        np.testing.assert_array_equal(specs.get(none, path), specs.get(target, path))
    same = adapted(merge.out, *flags)
    assert same.report.residual.held_at == {"projections": 1.0, "vocabulary": 1.0}
    for name, (_, one) in tensors(merge.out).items():
        np.testing.assert_array_equal(tensors(same.out)[name][1], one)
    assert set(same.report.residual.merged_at) == {"projections", "vocabulary"}
    assert chosen is not None


def test_an_adapted_folder_can_be_taken_apart_again(of_a_merge, merge, adapted):
    begun = initial.open_start(str(of_a_merge.out))
    parts = initial.load(begun)
    written = load_hf(of_a_merge.out, dtype=jnp.float32)[1]
    folded = residual.fold(parts.base, parts.residual, parts.factor)
    for path, leaf in parts.residual.items():
        np.testing.assert_allclose(specs.get(folded, path), specs.get(written, path), atol=1e-6)
        assert np.any(leaf)
    again = adapted(of_a_merge.out, "--steps", 0, "--strength", 0)
    removed = load_hf(again.out, dtype=jnp.float32)[1]
    for path in parts.residual:
        np.testing.assert_allclose(specs.get(removed, path), specs.get(parts.base, path), atol=1e-6)


def test_another_target_than_the_merged_one_is_refused(merge, models, text_files, tmp_path, cli):
    other = shutil.copytree(models["llama-target"], tmp_path / "other")
    changed = tensors(other)
    import safetensors.numpy

    arrays = {name: one + 1 for name, (_, one) in changed.items()}
    safetensors.numpy.save_file(arrays, other / "model.safetensors", metadata={"format": "pt"})
    words = ("--text", text_files[0], *COMMON, "--out", tmp_path / "out")
    called = cli("adapt", merge.out, *words, "--target", other)
    assert called.code == 3
    assert "are not those that out was merged from" in called.err


# ---- ways to train ----


def test_sft_ignores_the_source(adapted, models):
    one = adapted(models["llama-target"])
    other = adapted(models["llama-target"], "--source", "/nowhere")
    assert tensors(one.out).keys() == tensors(other.out).keys()
    for name, (_, leaf) in tensors(one.out).items():
        np.testing.assert_array_equal(tensors(other.out)[name][1], leaf)


def test_a_teacher_with_another_vocabulary_distils_universally(adapted, models):
    found = adapted(
        models["llama-target"], "--objective", "kd", "--source", models["qwen2-source"],
        "--learning-rate", 0.02,
    ).report  # fmt: skip
    assert found.data["universal_distillation"] is True
    assert 0.3 < found.data["target_matched"] <= 1
    assert found.losses[-1] < found.losses[0]
    assert found.dev.after < found.dev.before


def test_the_demos_source_teaches_its_stranger(cli, tmp_path):
    """Of another family and another vocabulary; both were trained."""
    files = {}
    for name, count in {"calibration": 48, "heldout": 16}.items():
        lines = assets.path(f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("\n".join(lines) + "\n", encoding="utf-8")
    teacher = ("--objective", "kd", "--source", assets.path("source"))
    budget = ("--block", 64, "--batch-size", 4, "--steps", 24, "--learning-rate", 0.0003)
    called = cli(
        "adapt", assets.path("stranger"), *teacher, *budget, "--text", files["calibration"],
        "--eval-text", files["heldout"], "--out", tmp_path / "out",
    )  # fmt: skip
    assert called.code == 0, called.err
    found = report_of(tmp_path / "out")
    assert found.data["universal_distillation"] is True
    assert min(found.data["target_matched"], found.data["source_matched"]) > 0.6
    assert found.dev.after < found.dev.before
    losses = {name: found.evaluation[name].nll_per_token for name in ("before", "after")}
    assert losses["after"] < losses["before"]


def test_adapters_change_their_targets_alone_and_are_folded(adapted, models):
    found = adapted(models["llama-target"], "--lora", 4, "--lora-targets", "v,up")
    before, after = tensors(models["llama-target"]), tensors(found.out)
    changed = {name.split(".")[-2] for name in before if np.any(before[name][1] != after[name][1])}
    assert changed == {"v_proj", "up_proj"}


def test_one_epoch_is_the_default_and_json_alone_is_on_stdout(models, cli, text_files, tmp_path):
    words = ("--text", text_files[0], "--block", 24, "--batch-size", 8, "--out", tmp_path / "out")
    called = cli("adapt", models["llama-target"], *words, "--json")
    assert called.json["steps"] == called.json["data"]["blocks"] // 8
    assert called.out == (tmp_path / "out" / "ot_merge" / "report.json").read_text()


def test_rounded_files_are_what_is_reported(adapted, models):
    """bfloat16 shards: the dev loss after is that of the files."""
    found = adapted(models["qwen2-target"])
    assert {kind for kind, _ in tensors(found.out).values()} == {"bfloat16"}
    dev = found.report.dev
    assert dev.after != dev.curve[-1][1]
    assert dev.after == pytest.approx(dev.curve[-1][1], abs=0.02)
