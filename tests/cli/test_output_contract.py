"""`ot-merge run`: the folder it writes, as transformers and the output contract see it."""

import os
import shutil
import stat
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import output_contract
import pytest
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
def test_output(name, merged):
    output_contract.check(merged(name))


def test_both_forms_of_weights_occur(merged):
    """Or the checks of shards and of tied heads would pass for want of any."""
    single, sharded = merged("paper llama<-qwen2").out, merged("paper qwen2<-llama").out
    assert not (single / INDEX).exists()
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert "lm_head.weight" in tensors(single)
    assert "lm_head.weight" not in tensors(sharded)


def test_modes_follow_another_umask(calls, tmp_path, models, cli):
    before = os.umask(0o027)
    try:
        assert cli(*calls["paper llama<-qwen2"], "--out", tmp_path / "out").code == 0
        folders = (tmp_path / "out", models["llama-target"], models["qwen2-source"])
        output_contract.has_modes_that_follow_the_umask(output_contract.Folders(*folders))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


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
