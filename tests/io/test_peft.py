"""Models named ``BASE+ADAPTER``: the weights that merging by hand gives, or a refusal by name."""

import json
import os
import shutil

import jax
import lora
import numpy as np
import pytest
import safetensors.numpy
from checkpoints import header, tensors
from hub_cache import COMMIT, contents, fill

from ot_merge_jax.distributed import sharding
from ot_merge_jax.errors import InputError
from ot_merge_jax.io.folder import open_folder
from ot_merge_jax.io.hf import load_hf, save_hf
from ot_merge_jax.io.lazy import open_lazy
from ot_merge_jax.io.resolve import split
from ot_merge_jax.models import specs
from ot_merge_jax.models.families import FAMILIES

Q0, UP1, DOWN = (
    "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.{}.mlp.down_proj"
)  # fmt: skip


def same(ours, theirs, atol=1e-6):
    """Parameters agree to the rounding of float32 (largest values are about 1)."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), ours, theirs)


@pytest.fixture
def pair(tiny_checkpoint, tmp_path):
    """A llama and an adapter of three of its modules, which a test may change."""
    base = tiny_checkpoint("llama")
    return base, lora.write(tmp_path / "lora", base, [Q0, UP1, DOWN.format(2)], target_modules=None)


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, change):
    found = safetensors.numpy.load_file(folder / lora.FILE)
    change(found)
    lora.store(folder, found, lora.FILE)


# ---- the right weights ----


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_every_family(family, tiny_checkpoint, tmp_path):
    """Fused tensors and several shards included; whole, by layer, and over devices."""
    base = tiny_checkpoint(family, max_shard_bytes=12_000)
    adapter = lora.write(tmp_path / "lora", base, lora.linear(base))
    named = f"{base}+{adapter}"
    cfg, expected = load_hf(lora.merge(tmp_path / "merged", base, adapter))
    same_cfg, ours = load_hf(named)
    assert same_cfg == cfg
    same(ours, expected)
    _, before = load_hf(base)
    for spec in specs.param_specs(cfg):
        was_moved = bool((specs.get(ours, spec.path) != specs.get(before, spec.path)).any())
        assert was_moved == (spec.path.endswith("kernel")), spec.path
    _, stored = open_lazy(named)
    for l in range(cfg.num_layers):
        jax.tree.map(np.testing.assert_array_equal, stored.layer(l), specs.layer(ours, l))
    np.testing.assert_array_equal(stored.leaf("norm/scale"), ours["norm"]["scale"])


def test_over_devices(pair):
    mesh = sharding.make_mesh({"data": 2, "model": 4})
    named = "+".join(map(str, pair))
    same(load_hf(named, mesh=mesh)[1], load_hf(named)[1])


def test_rslora_and_patterns(tiny_checkpoint, tmp_path):
    """The first name that ends a module counts; alpha and rank are looked up apart."""
    base = tiny_checkpoint("llama")
    modules = [Q0, *(DOWN.format(l) for l in range(3))]
    adapter = lora.write(
        tmp_path / "lora", base, modules, use_rslora=True, r=4, lora_alpha=8,
        target_modules=["down_proj", Q0],
        rank_pattern={"layers.1.mlp.down_proj": 2, "down_proj": 5},
        alpha_pattern={r"^model\.layers\.2\.mlp\.down_proj": 3, "^mlp.down_proj": 99},
        ranks={DOWN.format(0): 5, DOWN.format(1): 2, DOWN.format(2): 5},
    )  # fmt: skip
    scales = {
        Q0: 8 / 4**0.5, DOWN.format(0): 8 / 5**0.5, DOWN.format(1): 8 / 2**0.5,
        DOWN.format(2): 3 / 5**0.5,
    }  # fmt: skip
    expected = lora.merge(tmp_path / "merged", base, adapter, scales=scales)
    same(load_hf(f"{base}+{adapter}")[1], load_hf(expected)[1])


def test_embedding_and_head_that_are_not_tied(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("gemma2", tied=False)
    modules = ["model.embed_tokens", "lm_head"]
    adapter = lora.write(tmp_path / "lora", base, modules)
    expected = lora.merge(tmp_path / "merged", base, adapter)
    same(load_hf(f"{base}+{adapter}")[1], load_hf(expected)[1])


def test_layers_to_transform(tiny_checkpoint, tmp_path):
    """Only the layers that are said must have factors."""
    base = tiny_checkpoint("llama")
    adapter = lora.write(tmp_path / "lora", base, [UP1], layers_to_transform=[1])
    same(load_hf(f"{base}+{adapter}")[1],
         load_hf(lora.merge(tmp_path / "merged", base, adapter))[1])  # fmt: skip
    change_config(adapter, layers_to_transform=[1, 2])
    with pytest.raises(InputError, match=r"layers\.2\.mlp\.up_proj is one of the target_modules"):
        open_folder(f"{base}+{adapter}")


def test_half_precision_is_added_in_float32_and_rounded_once(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("llama", dtype="bfloat16")
    adapter = lora.write(tmp_path / "lora", base, lora.linear(base), dtype=np.float16)
    _, exact = load_hf(lora.merge(tmp_path / "merged", base, adapter))  # float32 files
    _, ours = load_hf(f"{base}+{adapter}", dtype="float32")
    same(ours, exact)
    _, rounded = load_hf(f"{base}+{adapter}")
    assert rounded["layers"]["mlp"]["up_proj"]["kernel"].dtype == "bfloat16"
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), rounded, ours)


def test_what_is_written_is_the_bases_but_for_the_weights(tiny_checkpoint, tmp_path):
    """The adapter's own tokenizer is not used."""
    base = tiny_checkpoint("llama", dtype="bfloat16", max_shard_bytes=20_000)
    adapter = lora.write(tmp_path / "lora", base, [UP1], target_modules=None)
    (adapter / "tokenizer.json").write_text("{}")
    (adapter / "chat_template.jinja").write_text("another")
    named, out = f"{base}+{adapter}", tmp_path / "out"
    cfg, params = load_hf(named)
    save_hf(out, params, cfg=cfg, like=named)
    before, after = tensors(base), tensors(out)
    assert {name: one[:2] for name, one in after.items()} == {
        name: one[:2] for name, one in before.items()
    }
    assert {name for name in before if before[name] != after[name]} == {f"{UP1}.weight"}
    names = {one.name for one in base.iterdir() if one.suffix not in (".safetensors",)}
    for name in names - {"config.json", "model.safetensors.index.json"}:
        assert (out / name).read_bytes() == (base / name).read_bytes(), name
    assert {one.name for one in out.iterdir()} == {one.name for one in base.iterdir()}
    same(load_hf(out)[1], params, atol=0)
    for inside in (base, adapter):
        with pytest.raises(InputError, match="lies inside the input"):
            save_hf(inside / "out", params, cfg=cfg, like=named)


# ---- names ----


def test_hub_ids(pair, tmp_path, monkeypatch):
    import huggingface_hub

    base, adapter = pair
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    fill(tmp_path / "hub", "o/base", contents(base))
    fill(tmp_path / "hub", "o/lora", contents(adapter), revision="v1")
    opened = open_folder("o/base@main+o/lora@v1", offline=True)
    assert opened.name == "o/base+o/lora"
    assert opened.adapter is not None
    assert opened.adapter.origin == ("o/lora", "v1", COMMIT)
    same(load_hf("o/base@main+o/lora@v1")[1], load_hf(f"{base}+{adapter}")[1], atol=0)


def test_plus_signs_in_names(pair, tmp_path):
    base, adapter = pair
    odd = shutil.copytree(base, tmp_path / "a+b")
    lone = shutil.copytree(adapter, tmp_path / "c+d")
    assert open_folder(odd).adapter is None
    assert split(f"{odd}+{lone}") == (str(odd), str(lone))
    assert split(f"{odd}+{tmp_path}/missing") == (str(odd), f"{tmp_path}/missing")
    assert split("plain") == ("plain", None)
    assert split(f"{odd}+") == (f"{odd}+", None)
    assert split("no+where") == ("no+where", None)


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("{lora}", ("holds only an adapter; write BASE+", "'owner/base'")),
        ("{lora}+{base}", ("holds only an adapter; write BASE+",)),
        ("{base}+{base}", ("has no adapter_config.json; write BASE+ADAPTER",)),
        ("{base}+{base}/nowhere", ("There is no directory", "nowhere")),
        ("{base}+{lora}+{lora}", ("There is no directory",)),
    ],
)
def test_wrong_names(named, words, pair):
    base, adapter = pair
    with pytest.raises(InputError) as caught:
        open_folder(named.format(base=base, lora=adapter))
    for word in words:
        assert word in str(caught.value)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, ("type IA3", "only LORA")),
        ({"peft_type": None}, ("type None",)),
        ({"use_dora": True}, ("use_dora",)),
        ({"bias": "lora_only"}, ("bias is 'lora_only'",)),
        ({"modules_to_save": ["lm_head"]}, ("modules_to_save", "lm_head")),
        ({"fan_in_fan_out": True}, ("fan_in_fan_out",)),
        ({"lora_bias": True}, ("lora_bias",)),
        ({"layer_replication": [[0, 2]]}, ("layer_replication",)),
        ({"trainable_token_indices": [1]}, ("trainable_token_indices",)),
        ({"alora_invocation_tokens": [1]}, ("alora_invocation_tokens",)),
        ({"something_new": 3}, ("something_new is '3'",)),
        ({"init_lora_weights": "pissa_niter_4"}, ("pissa_niter_4", "base's weights too")),
        ({"r": 0}, ("r is '0'",)),
        ({"r": True}, ("r is 'True'",)),
        ({"r": 10**300}, ("r is '1000",)),
        ({"lora_alpha": "16"}, ("lora_alpha is '16'",)),
        ({"lora_alpha": float("nan")}, ("lora_alpha is 'nan'",)),
        ({"lora_alpha": 10**400}, ("lora_alpha is '1000",)),
        ({"use_rslora": "yes"}, ("use_rslora",)),
        ({"rank_pattern": {"(a+)+b": 3}}, ("rank_pattern names '(a+)+b'", "plain module name")),
        ({"alpha_pattern": {"q_proj": None}}, ("alpha_pattern gives 'q_proj' the value 'None'",)),
        ({"alpha_pattern": [1]}, ("alpha_pattern is not an object",)),
        ({"use_dora": True, "bias": "all", "r": -1}, ("use_dora", "bias is 'all'", "r is '-1'")),
    ],
)  # fmt: skip
def test_settings_that_are_refused(changes, words, pair):
    base, adapter = pair
    change_config(adapter, **changes)
    with pytest.raises(InputError) as caught:
        open_folder(f"{base}+{adapter}")
    for word in (*words, str(adapter), "with peft and save that"):
        assert word in str(caught.value)


A, B = (f"{lora.PREFIX}{UP1}.lora_{one}.weight" for one in "AB")


def rename(old, new):
    return lambda found: found.update({new: found.pop(old)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: found.pop(B), (f"{UP1}.lora_A", "not both there")),
        (rename(A, A.replace("up_proj", "side")), ("no model.layers.1.mlp.side.weight",)),
        (rename(A, A.replace("layers.1", "layers.7")), ("no model.layers.7.mlp.up_proj.weight",)),
        (rename(A, A.replace("layers.1.mlp.up_proj", "norm")), ("no model.norm.weight",)),
        (rename(A, A.removeprefix("base_model.model.")), ("is not a LoRA factor",)),
        (rename(A, A.removesuffix(".weight")), ("is not a LoRA factor",)),
        (lambda found: found.update({B.replace("lora_B", "lora_magnitude_vector"): found[A][0]}),
         ("lora_magnitude_vector", "is not a LoRA factor")),
        (lambda found: found.update({f"{lora.PREFIX}lm_head.weight": np.ones((2, 2), "f4")}),
         ("lm_head.weight is not a LoRA factor",)),
        (lambda found: found.update({A: found[A][:2]}), (A, "[2, 24]", "[3, 24]")),
        (lambda found: found.update({A: found[A].T.copy()}), (A, "[24, 3]", "[3, 24]")),
        (lambda found: found.update({B: found[B].astype("f8")}), (B, "F64")),
        (lambda found: found.update({f"{lora.PREFIX}model.embed_tokens.lora_A.weight": found[A]}),
         ("embed_tokens.lora_embedding_A", "not both there")),
        (lambda found: (found.update({B: found[B][:1]}), found.pop(
            f"{lora.PREFIX}{Q0}.lora_A.weight")), (B, "[1, 3]", f"{Q0}.lora_A")),
        (lambda found: found.clear(), ("is empty",)),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(change, words, pair):
    base, adapter = pair
    change_tensors(adapter, change)
    with pytest.raises(InputError) as caught:
        open_folder(f"{base}+{adapter}")
    for word in (*words, str(adapter), "download it again or fix it"):
        assert word in str(caught.value)


@pytest.mark.parametrize("module", ["model.embed_tokens", "lm_head"])
def test_tied_tables_are_not_changed(module, tiny_checkpoint, tmp_path):
    """The head would change with the embedding, which is not what was trained."""
    untied, tied = tiny_checkpoint("llama"), tiny_checkpoint("llama", tied=True)
    adapter = lora.write(tmp_path / "lora", untied, [module])
    with pytest.raises(InputError, match=r"tied to the head|no lm_head\.weight in the base"):
        open_folder(f"{tied}+{adapter}")


def test_values_that_are_not_finite(pair):
    """All of them are named at once, also those of the base."""
    base, adapter = pair

    def damage(found):
        found[A][0, :2] = np.nan
        found[f"{lora.PREFIX}{Q0}.lora_B.weight"][1, 0] = np.inf

    change_tensors(adapter, damage)
    named = f"{base}+{adapter}"
    with pytest.raises(InputError) as caught:
        load_hf(named)
    q = f"{lora.PREFIX}{Q0}.lora_B.weight (1 value)"
    for word in (named, f"{A} (2 values)", q):
        assert word in str(caught.value)
    assert f" {UP1}.weight" not in str(caught.value)
    _, stored = open_lazy(named)
    stored.layer(2)
    with pytest.raises(InputError, match="lora_A"):
        stored.layer(1)


def test_a_sum_that_overflows(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("llama", dtype="float16")
    adapter = lora.write(tmp_path / "lora", base, [UP1], target_modules=None, lora_alpha=1e6)
    load_hf(f"{base}+{adapter}", dtype="float32")
    with pytest.raises(InputError, match=rf"{UP1}\.weight"):
        load_hf(f"{base}+{adapter}")


# ---- files ----


def _pickled(folder):
    (folder / lora.FILE).rename(folder / "adapter_model.bin")


def _pointer(folder):
    (folder / lora.FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def _truncated(folder):
    raw = (folder / lora.FILE).read_bytes()
    (folder / lora.FILE).write_bytes(raw[:-7])


def _elsewhere(folder):
    (folder / lora.FILE).rename(folder.parent / "elsewhere.safetensors")
    (folder / lora.FILE).symlink_to(folder.parent / "elsewhere.safetensors")


def _pipe(folder):
    (folder / lora.FILE).unlink()
    os.mkfifo(folder / lora.FILE)


def _broken_link(folder):
    (folder / lora.FILE).unlink()
    (folder / lora.FILE).symlink_to("nowhere")


def _huge_config(folder):
    with (folder / "adapter_config.json").open("ab") as file:
        file.truncate(6_000_000)


def _config_is_a_list(folder):
    (folder / "adapter_config.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_pickled, "pickled .bin adapters are never opened"),
        (_pointer, "git lfs pull"),
        (_truncated, "its header promises"),
        (_elsewhere, "is a link that leaves the folder"),
        (_pipe, "not a regular file"),
        (_broken_link, "broken link"),
        (_huge_config, "larger than 5000000 bytes"),
        (_config_is_a_list, "is not a JSON object"),
    ],
)
def test_files_that_are_refused(damage, words, pair):
    base, adapter = pair
    damage(adapter)
    with pytest.raises(InputError) as caught:
        open_folder(f"{base}+{adapter}")
    assert words in str(caught.value)
    assert str(adapter) in str(caught.value)


def test_only_the_header_is_read_on_opening(pair):
    """As for the base: values that are not finite do not matter yet."""
    base, adapter = pair
    change_tensors(adapter, lambda found: found.update({A: found[A] * np.nan}))
    opened = open_folder(f"{base}+{adapter}")
    assert opened.adapter is not None
    used = {name for one in opened.adapter.updates.values() for name in (one.left, one.right)}
    assert used == header(adapter / lora.FILE).keys() - {"__metadata__"}
