"""What every published folder must be: a function for each part of the output contract.

A check takes anything with ``out``, ``target`` and ``source``: the published folder, and the model
folders it was made from.
"""

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import safetensors
import yaml
from desk import INDEX, SINGLE
from published import report_of, tensors

#: Weights in a form that vLLM and others prefer over safetensors, or that can hold code.
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "consolidated*", "*.py")


class Folders(NamedTuple):
    """A published folder and what it was made from."""

    out: Path
    target: Path
    source: Path


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def config(folder):
    return json.loads((folder / "config.json").read_text())


def has_the_files_of_the_target_and_ours_and_no_others(merge):
    expected = {path.name for path in merge.target.iterdir()} | {"README.md", "ot_merge"}
    assert {path.name for path in merge.out.iterdir()} == expected
    details = {path.name for path in (merge.out / "ot_merge").iterdir()}
    assert details == {
        "recipe.yaml", "provenance.json", "report.json", "report.html", "plots", "coupling",
    }  # fmt: skip
    plots = {path.suffix for path in (merge.out / "ot_merge" / "plots").iterdir()}
    assert plots == {".svg", ".png"}
    assert not [path for pattern in OTHER_WEIGHTS for path in merge.out.rglob(pattern)]
    assert not any(path.is_symlink() for path in merge.out.rglob("*"))


@pytest.mark.catalogue("vocabulary-padding")
def has_tensors_of_the_names_shapes_and_dtypes_of_the_target(merge):
    before, after = tensors(merge.target), tensors(merge.out)
    assert {k: (kind, x.shape) for k, (kind, x) in after.items()} == {
        k: (kind, x.shape) for k, (kind, x) in before.items()
    }
    for key, (kind, x) in after.items():
        assert np.isfinite(x.astype("float32")).all(), (key, kind)
    if config(merge.out).get("tie_word_embeddings"):  # a merge never unties
        assert "lm_head.weight" not in after
    assert after["model.embed_tokens.weight"][1].shape[0] == config(merge.target)["vocab_size"]


def has_one_key_of_metadata(merge):
    for path in merge.out.glob("*.safetensors"):
        with safetensors.safe_open(path, framework="np") as file:
            assert file.metadata() == {"format": "pt"}


def has_the_shards_of_the_target_and_a_complete_index(merge):
    shards = sorted(path.name for path in merge.out.glob("*.safetensors"))
    assert shards == sorted(path.name for path in merge.target.glob("*.safetensors"))
    if shards == [SINGLE]:
        assert not (merge.out / INDEX).exists()
        return
    index = json.loads((merge.out / INDEX).read_text())
    assert index["weight_map"] == json.loads((merge.target / INDEX).read_text())["weight_map"]
    assert sorted(set(index["weight_map"].values())) == shards
    found = tensors(merge.out)
    assert list(index["weight_map"]) == sorted(found)
    assert index["metadata"] == {
        "total_size": sum(x.nbytes for _, x in found.values()),
        "total_parameters": sum(x.size for _, x in found.values()),
    }


def has_the_config_of_the_target_with_both_spellings(merge):
    before, after = config(merge.target), config(merge.out)
    assert {key: after[key] for key in before} == before
    assert [key for key in after if key in before] == list(before)
    assert set(after) - set(before) <= {"torch_dtype", "rope_theta", "rope_scaling"}
    assert after["torch_dtype"] == after["dtype"]
    if "rope_theta" in after["rope_parameters"]:  # not one for each kind of layer
        assert after["rope_theta"] == after["rope_parameters"]["rope_theta"]
    assert not {"auto_map", "_name_or_path", "quantization_config"} & set(after)


@pytest.mark.catalogue("no-pad-token")
def has_all_other_files_byte_for_byte(merge):
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


def has_modes_that_follow_the_umask(merge):
    umask = os.umask(0)
    os.umask(umask)
    for path in [merge.out, *merge.out.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, (path, oct(mode))


def has_a_card_that_says_what_it_is(merge):
    start, front, body = (merge.out / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    found = yaml.safe_load(front)
    assert start == ""
    assert found["base_model_relation"] == "merge"
    assert found["base_model"][:2] == [merge.target.name, merge.source.name]
    assert set(found["tags"]) >= {"merge", "ot-merge", "optimal-transport"}
    assert found["library_name"] == "transformers"
    assert found["license"] == "other"  # the tiny models state none, so none is invented
    assert "2602.05495" in body
    report = report_of(merge.out)
    assert report.verdict in re.sub(r"\\(\W)", r"\1", body)  # Markdown is escaped


def has_a_provenance_of_hashes_versions_and_the_command(merge):
    found = json.loads((merge.out / "ot_merge" / "provenance.json").read_text())
    recipe = yaml.safe_load((merge.out / "ot_merge" / "recipe.yaml").read_text())
    files = {path.name for path in merge.out.iterdir() if path.is_file()}
    assert {one for one in files if one.endswith(".safetensors")} <= set(found["output"]) <= files
    assert all(sha256(merge.out / file) == digest for file, digest in found["output"].items())
    assert found["recipe_sha256"] == sha256(merge.out / "ot_merge" / "recipe.yaml")
    for role, folder in (("target", merge.target), ("source", merge.source)):
        assert found["inputs"][role]["name"] == folder.name
        files = found["inputs"][role]["files"]
        assert {path.name for path in folder.glob("*.safetensors")} <= set(files)
        assert all(sha256(folder / file) == digest for file, digest in files.items())
    base = {"source base"} if recipe["source_base"] else set()
    assert set(found["inputs"]) == {"target", "source"} | base
    assert set(found["texts"]) == {"calibration"} | (
        {"evaluation"} if recipe["evaluation"] else set()
    )
    assert found["command"].startswith("ot-merge run --preset")
    assert found["packages"]["jax"]
    assert found["wall_seconds"] > 0
    assert found["peak_memory_bytes"] > 0


CHECKS = (
    has_the_files_of_the_target_and_ours_and_no_others,
    has_tensors_of_the_names_shapes_and_dtypes_of_the_target,
    has_one_key_of_metadata,
    has_the_shards_of_the_target_and_a_complete_index,
    has_the_config_of_the_target_with_both_spellings,
    has_all_other_files_byte_for_byte,
    has_modes_that_follow_the_umask,
    has_a_card_that_says_what_it_is,
    has_a_provenance_of_hashes_versions_and_the_command,
)


def check(merge):
    """The whole contract."""
    for one in CHECKS:
        one(merge)
