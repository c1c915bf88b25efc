"""`ot-merge run`: the folder it writes, as transformers and the output contract see it."""

import json
import os
import re
import shutil
import stat
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import transformers
import yaml
from desk import INDEX
from published import ALL, tensors

from ot_merge_jax import forward, load_hf
from ot_merge_jax.types import Batch

# ---- what transformers sees ----


@pytest.mark.torch
@pytest.mark.parametrize("name", ALL)
def test_transformers_loads_the_output_and_gives_our_logits(name, merged):
    torch = pytest.importorskip("torch")
    out = merged(name).out
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    cfg, params = load_hf(out, dtype=jnp.float32)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, 16)).astype(np.int32)
    mask, row = np.ones(tokens.shape, bool), np.zeros((1, 1), np.int32)
    ours = jax.jit(forward, static_argnames="cfg")(params, Batch(tokens, mask, row, row), cfg=cfg)[
        0
    ]
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(np.asarray(ours), expected, rtol=0, atol=1e-4)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["barycentric qwen2<-llama", "delta llama<-llama"])
def test_transformers_tokenizes_as_with_the_target(name, merged, documents):
    merge = merged(name)
    ours, theirs = (
        transformers.AutoTokenizer.from_pretrained(one) for one in (merge.out, merge.target)
    )
    assert [ours(text)["input_ids"] for text in documents] == [
        theirs(text)["input_ids"] for text in documents
    ]


# ---- output contract ----


@pytest.mark.parametrize("name", ALL)
def test_output_holds_the_files_of_the_target_and_ours_and_no_others(name, merged):
    merge = merged(name)
    expected = {path.name for path in merge.target.iterdir()} | {"README.md", "ot_merge"}
    assert {path.name for path in merge.out.iterdir()} == expected
    details = {path.name for path in (merge.out / "ot_merge").iterdir()}
    assert details == {"recipe.yaml", "provenance.json", "report.json", "coupling"}


@pytest.mark.parametrize("name", ALL)
def test_tensors_have_the_names_shapes_and_dtypes_of_the_target(name, merged):
    merge = merged(name)
    before, after = tensors(merge.target), tensors(merge.out)
    assert {k: (kind, x.shape) for k, (kind, x) in after.items()} == {
        k: (kind, x.shape) for k, (kind, x) in before.items()
    }
    for key, (kind, x) in after.items():
        assert np.isfinite(x.astype("float32")).all(), (key, kind)


@pytest.mark.parametrize("name", ALL)
def test_metadata_is_one_key(name, merged):
    for path in merged(name).out.glob("*.safetensors"):
        with safetensors.safe_open(path, framework="np") as file:
            assert file.metadata() == {"format": "pt"}


def test_shards_are_those_of_the_target_and_the_index_is_complete(merged):
    merge = merged("paper qwen2<-llama")
    index = json.loads((merge.out / INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert index["weight_map"] == json.loads((merge.target / INDEX).read_text())["weight_map"]
    found = tensors(merge.out)
    assert list(index["weight_map"]) == sorted(found)
    assert index["metadata"] == {
        "total_size": sum(x.nbytes for _, x in found.values()),
        "total_parameters": sum(x.size for _, x in found.values()),
    }
    assert "lm_head.weight" not in found  # tied: a merge never unties


def test_single_file_has_no_index(merged):
    assert not (merged("paper llama<-qwen2").out / INDEX).exists()


@pytest.mark.parametrize("name", ALL)
def test_config_is_the_targets_with_both_spellings(name, merged):
    merge = merged(name)
    before, after = (
        json.loads((one / "config.json").read_text()) for one in (merge.target, merge.out)
    )
    assert {key: after[key] for key in before} == before
    assert [key for key in after if key in before] == list(before)
    assert set(after) - set(before) <= {"torch_dtype", "rope_theta", "rope_scaling"}
    assert after["torch_dtype"] == after["dtype"]
    assert after["rope_theta"] == after["rope_parameters"]["rope_theta"]


@pytest.mark.parametrize("name", ALL)
def test_other_files_are_byte_for_byte_the_targets(name, merged):
    merge = merged(name)
    names = {path.name for path in merge.target.iterdir() if path.suffix != ".safetensors"}
    names -= {"config.json", INDEX}
    assert {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    } <= names
    for one in sorted(names):
        assert (merge.out / one).read_bytes() == (merge.target / one).read_bytes(), one


def test_modes_follow_the_umask(calls, tmp_path, cli):
    before = os.umask(0o027)
    try:
        assert cli(*calls["paper llama<-qwen2"], "--out", tmp_path / "out").code == 0
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*")}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o750}
    assert {
        str(path): oct(mode) for path, mode in modes.items() if path.is_file() and mode != 0o640
    } == {}


@pytest.mark.parametrize("name", ALL)
def test_card_says_what_it_is(name, merged):
    merge = merged(name)
    start, front, body = (merge.out / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    found = yaml.safe_load(front)
    assert start == ""
    assert found["base_model_relation"] == "merge"
    assert found["base_model"][:2] == [merge.target.name, merge.source.name]
    assert set(found["tags"]) >= {"merge", "ot-merge", "optimal-transport"}
    assert found["library_name"] == "transformers"
    assert found["license"] == "other"  # the tiny models state none, so none is invented
    assert "2602.05495" in body
    assert merge.report["verdict"] in re.sub(r"\\(\W)", r"\1", body)  # Markdown is escaped


def test_licence_is_kept_when_all_agree_and_only_then(calls, models, tmp_path, cli):
    for agree in (True, False):
        folders = {}
        for role, licence in (
            ("llama-target", "mit"),
            ("qwen2-source", "mit" if agree else "apache-2.0"),
        ):
            folders[role] = shutil.copytree(models[role], tmp_path / f"{agree}" / role)
            (folders[role] / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
        words = [
            folders.get(Path(one).name, one) if isinstance(one, Path) else one
            for one in calls["paper llama<-qwen2"]
        ]
        assert cli(*words, "--out", tmp_path / f"out-{agree}").code == 0
        text = (tmp_path / f"out-{agree}" / "README.md").read_text()
        assert yaml.safe_load(text.split("---\n")[1])["license"] == ("mit" if agree else "other")
        assert ("apache-2.0" in text) is not agree


@pytest.mark.parametrize("name", ALL)
def test_provenance_holds_hashes_versions_and_the_command(name, merged, hashes):
    merge = merged(name)
    found = json.loads((merge.out / "ot_merge" / "provenance.json").read_text())
    now = hashes(merge.out)
    assert found["output"]
    assert all(now[file] == digest for file, digest in found["output"].items())
    shards = {one for one in now if one.endswith(".safetensors") and "/" not in one}
    assert shards
    assert shards <= set(found["output"])
    assert found["recipe_sha256"] == now["ot_merge/recipe.yaml"]
    for role, folder in (("target", merge.target), ("source", merge.source)):
        assert found["inputs"][role]["name"] == folder.name
        assert found["inputs"][role]["files"].items() <= hashes(folder).items()
    assert set(found["inputs"]) == {
        "target",
        "source",
        *(["source base"] if "delta" in name else []),
    }
    assert set(found["texts"]) == {"calibration", "evaluation"}
    assert found["command"].startswith("ot-merge run --preset")
    assert found["packages"]["jax"]
    assert found["wall_seconds"] > 0
    assert found["peak_memory_bytes"] > 0
