"""One row for each kind of bad folder: refused with `InputError`, named, with advice, and nothing
left behind.
"""

import json
import re
import shutil
import sys
import time

import numpy as np
import pytest
from checkpoints import (
    NORM,
    SINGLE,
    UP,
    body,
    edit_config,
    edit_tensors,
    halves,
    join_header,
    shard,
    snapshot,
    split_header,
    store,
    write_index,
)
from damaged_config import ROWS, remote_code
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ot_merge_jax.errors import InputError
from ot_merge_jax.io import safetensors as files
from ot_merge_jax.io.folder import open_folder
from ot_merge_jax.io.hf import load_hf, save_hf
from ot_merge_jax.io.resolve import resolve

#: Every message must tell the reader what to do next.
ADVICE = re.compile(
    r"download|git lfs pull|use (the unquantised parent|a )|convert|merge it into|fix (it|one)"
    r"|supported are|give the folder"
)


# ---- the test ----


@pytest.fixture
def victim(tiny_checkpoint, writable_copy):
    return lambda **config: writable_copy(tiny_checkpoint(**config))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=getattr(one[0], "pytestmark", ())) for name, one in ROWS.items()],
)
def test_bad_folder_is_refused(name, victim):
    """By the function that sees it, and by `load_hf`, the door everyone uses: no fault may become
    another exception there.
    """
    damage, needles, check, config = ROWS[name]
    folder = victim(**config)
    damage(folder)
    before = snapshot(folder.parent)
    with pytest.raises(InputError) as caught:
        check(folder)
    message = str(caught.value)
    assert type(caught.value) is InputError
    for needle in needles:
        assert needle in message
    assert str(folder) in message
    assert ADVICE.search(message)
    assert len(message) < 6000
    if check is not load_hf:
        with pytest.raises(InputError):
            load_hf(folder)
    assert snapshot(folder.parent) == before


@pytest.mark.parametrize("tied", [False, True])
def test_undamaged_folder_is_accepted(tied, victim):
    """Or every row above would pass for another reason."""
    cfg, _ = load_hf(victim(tied=tied))
    assert cfg.tie_word_embeddings == tied


def test_honest_shards_are_accepted(victim):
    folder = victim()
    expected = body(folder)
    shard(folder, halves(folder))
    _, params = load_hf(folder)
    np.testing.assert_array_equal(params["norm"]["scale"], expected[NORM])
    np.testing.assert_array_equal(params["layers"]["mlp"]["up_proj"]["kernel"][1], expected[UP].T)


# ---- accepted on purpose ----


@pytest.mark.catalogue("tied-embeddings")
def test_tied_with_an_equal_head_is_accepted(victim):
    folder = victim(tied=True)
    edit_tensors(
        folder,
        lambda tensors: tensors.update(
            {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
        ),
    )
    cfg, params = load_hf(folder)
    assert cfg.tie_word_embeddings
    assert "lm_head" not in params


def test_old_rotary_buffers_are_ignored(victim):
    folder = victim()
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda tensors: tensors.update({name: np.ones(4, "f4")}))
    _, params = load_hf(folder)
    assert "rotary_emb" not in params["layers"]["self_attn"]


def test_link_inside_the_folder_is_accepted(victim):
    folder = victim()
    (folder / SINGLE).rename(folder / "real.safetensors")
    (folder / SINGLE).symlink_to("real.safetensors")
    load_hf(folder)


def test_folder_reached_through_a_link_is_accepted(victim, tmp_path):
    folder = victim()
    (tmp_path / "alias").symlink_to(folder)
    load_hf(tmp_path / "alias")


def test_header_whose_length_looks_like_html_is_accepted(victim):
    """A length of 60 modulo 256 starts with '<'; the format does not forbid it."""
    folder = victim()
    text, data = split_header(folder / SINGLE)
    text = text.rstrip()
    text += b" " * ((60 - len(text)) % 256)
    join_header(folder / SINGLE, text, data)
    assert (folder / SINGLE).read_bytes()[:1] == b"<"
    load_hf(folder)


def test_null_quantisation_and_auto_map_are_accepted(victim):
    folder = victim()
    edit_config(folder, quantization_config=None, auto_map=None)
    load_hf(folder)


def test_weights_in_the_file_transformers_would_take(victim):
    """Both a single file and an index: transformers reads the single file."""
    folder = victim()
    tensors = body(folder)
    store(folder, {name: value + 1 for name, value in tensors.items()}, "shard.safetensors")
    write_index(folder, dict.fromkeys(tensors, "shard.safetensors"))
    _, params = load_hf(folder)
    np.testing.assert_array_equal(params["norm"]["scale"], tensors[NORM])


# ---- paths ----


@pytest.mark.parametrize("name", ["gpt2", "meta-llama/Llama-3.2-1B", "no/such/folder", ""])
def test_path_that_does_not_exist_is_never_a_hub_id(name, tmp_path, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("asked the hub")

    monkeypatch.setattr("ot_merge_jax.io.hub.snapshot_download", forbidden)
    monkeypatch.chdir(tmp_path)
    where = name or str(tmp_path / "nothing")
    for check in (load_hf, open_folder, resolve):
        with pytest.raises(InputError, match=f"no directory {re.escape(where)}"):
            check(where)


def test_file_in_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "model").write_text("x")
    with pytest.raises(InputError, match="no directory"):
        load_hf(tmp_path / "model")


def test_hub_failure_is_an_input_error_of_one_line(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("long trace\nwith hf_secretToken")

    monkeypatch.setattr("ot_merge_jax.io.hub.snapshot_download", fail)
    with pytest.raises(InputError, match=r"some/model at revision main") as caught:
        load_hf("some/model", revision="main")
    assert "\n" not in str(caught.value)
    assert "hf_secret" not in str(caught.value)


def test_hub_id_with_a_revision_asks_for_that_revision_without_pickles(victim, monkeypatch):
    asked = {}

    def answer(name, *, revision, allow_patterns, **_):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(folder)

    folder = victim()
    monkeypatch.setattr("ot_merge_jax.io.hub.snapshot_download", answer)
    load_hf("some/model", revision="v1.2")
    assert (asked["name"], asked["revision"]) == ("some/model", "v1.2")
    assert not {"*", "*.bin", "*.pt", "*.py"} & set(asked["patterns"])


@pytest.mark.catalogue("remote-code")
def test_nothing_is_imported_from_the_folder(victim):
    folder = victim()
    remote_code(folder)
    before = set(sys.modules)
    with pytest.raises(InputError):
        load_hf(folder)
    assert not {name for name in set(sys.modules) - before if "evil" in name}
    assert not (folder / "marker").exists()


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "generation_config.json"])
def test_sidecar_that_links_out_of_the_folder_is_not_copied_into_the_output(name, victim, tmp_path):
    """A downloaded folder could otherwise publish any file of this machine."""
    folder = victim()
    cfg, params = load_hf(folder)
    secret = tmp_path / "secret"
    secret.write_text("private key")
    (folder / name).unlink()
    (folder / name).symlink_to(secret)
    with pytest.raises(InputError, match=re.escape(name)):
        save_hf(tmp_path / "out", params, cfg=cfg, like=folder)
    assert not (tmp_path / "out").exists()


def test_many_duplicate_names_are_refused_quickly(tmp_path):
    """The duplicate check must not be quadratic: a hostile header has room for a million names."""
    entry = b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = b"{" + b",".join(entry % (i % 100_000) for i in range(100_001)) + b"}"
    join_header(tmp_path / SINGLE, text, b"")
    start = time.process_time()
    with pytest.raises(InputError, match="'t0' twice"):
        files.read_header(tmp_path / SINGLE)
    assert time.process_time() - start < 10


@pytest.mark.parametrize("value", [10**9, 2**63, 10**400], ids=["1e9", "2e63", "1e400"])
@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "num_attention_heads"])
def test_absurd_size_is_refused_without_building_it(key, value, victim):
    folder = victim()
    edit_config(folder, **{key: value})
    with pytest.raises(InputError) as caught:
        open_folder(folder)
    assert key in str(caught.value) or "has shape" in str(caught.value)
    assert len(str(caught.value)) < 2500


# ---- any bytes ----

_SETTINGS = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}


@pytest.fixture
def one_layer(tiny_checkpoint, writable_copy):
    return writable_copy(tiny_checkpoint(layers=1, hidden=6, heads=2, head_dim=4, intermediate=5))


def accepts_or_refuses(folder):
    """Success or InputError; anything else is a traceback for the user and fails the test."""
    try:
        load_hf(folder)
    except InputError:
        return False
    return True


@pytest.mark.catalogue("corrupt-safetensors")
@given(data=st.data())
@settings(max_examples=150, **_SETTINGS)
def test_header_bytes_mutated(one_layer, tiny_checkpoint, data):
    """Bytes of the header replaced, inserted or removed; the length mended or not."""
    original = tiny_checkpoint(layers=1, hidden=6, heads=2, head_dim=4, intermediate=5) / SINGLE
    text, rest = split_header(original)
    start = data.draw(st.integers(0, len(text)))
    removed = data.draw(st.integers(0, 12))
    inserted = data.draw(st.binary(max_size=12))
    changed = text[:start] + inserted + text[start + removed :]
    length = len(changed) if data.draw(st.booleans()) else data.draw(st.integers(0, 2**64 - 1))
    (one_layer / SINGLE).write_bytes(length.to_bytes(8, "little") + changed + rest)
    accepts_or_refuses(one_layer)


#: The two bands of llama3 at one place: a division by zero.
_FLAT_BANDS = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 2.0,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 64,
}
_CONFIG_KEYS = """
hidden_size num_hidden_layers head_dim rope_parameters rope_scaling rope_theta layer_types
architectures model_type dtype torch_dtype tie_word_embeddings rms_norm_eps vocab_size
num_key_value_heads num_attention_heads quantization_config auto_map hidden_act attention_bias
max_position_embeddings
"""
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.mark.catalogue("corrupt-safetensors")
@given(data=st.data())
@settings(max_examples=150, **_SETTINGS)
def test_header_fields_mutated(one_layer, tiny_checkpoint, data):
    """Valid JSON, wrong content: one field of one tensor is any JSON value."""
    original = tiny_checkpoint(layers=1, hidden=6, heads=2, head_dim=4, intermediate=5) / SINGLE
    text, rest = split_header(original)
    header = json.loads(text)
    name = data.draw(st.sampled_from(sorted(header)))
    value = data.draw(_JSON)
    if name == "__metadata__" or data.draw(st.booleans()):
        header[name] = value
    else:
        header[name][data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = value
    join_header(one_layer / SINGLE, json.dumps(header).encode(), rest)
    accepts_or_refuses(one_layer)


@given(key=st.sampled_from(_CONFIG_KEYS.split()), value=_JSON)
@settings(max_examples=200, **_SETTINGS)
@example(key="model_type", value=["llama"])
@example(key="model_type", value={})
@example(key="layer_types", value=3)
@example(key="layer_types", value=[["full_attention"]])
@example(key="layer_types", value=[None, "x"])
@example(key="rope_scaling", value=4.0)
@example(key="rope_scaling", value="linear")
@example(key="rope_parameters", value=[1])
@example(key="rope_parameters", value=_FLAT_BANDS)
@example(key="rope_parameters", value={"rope_type": ["default"]})
@example(key="rope_parameters", value={"rope_theta": None})
@example(key="dtype", value=["float32"])
@example(key="vocab_size", value=10**400)
@example(key="rms_norm_eps", value=10**400)
@example(key="rope_theta", value=10**400)
@example(key="num_attention_heads", value=0)
def test_config_values_mutated(one_layer, tiny_checkpoint, key, value):
    original = (
        tiny_checkpoint(layers=1, hidden=6, heads=2, head_dim=4, intermediate=5) / "config.json"
    )
    config = json.loads(original.read_text())
    config[key] = value
    (one_layer / "config.json").write_text(json.dumps(config))
    accepts_or_refuses(one_layer)


_SHARDS = st.sampled_from(["weights.safetensors", "config.json", ".", "..", "~.safetensors", "x/"])
_TENSORS = st.sampled_from([NORM, "x", "lm_head.weight"]) | st.text(max_size=5)


@pytest.mark.catalogue("escaping-weight-map")
@given(weight_map=st.dictionaries(_TENSORS, _JSON | _SHARDS, max_size=4))
@settings(max_examples=100, **_SETTINGS)
def test_weight_map_mutated(one_layer, tiny_checkpoint, weight_map):
    original = tiny_checkpoint(layers=1, hidden=6, heads=2, head_dim=4, intermediate=5)
    (one_layer / SINGLE).unlink(missing_ok=True)
    shutil.copyfile(original / SINGLE, one_layer / "weights.safetensors")
    honest = dict.fromkeys(body(original), "weights.safetensors")
    write_index(one_layer, honest | weight_map)
    accepts_or_refuses(one_layer)
