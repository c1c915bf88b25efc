"""`ot-merge eval`: losses as torch has them, JSON as documented, a minus b."""

import json
import math
import os
import shutil

import numpy as np
import pytest
import safetensors.numpy
import transformers

from ot_merge_jax.data import tokenizers


@pytest.fixture(scope="module")
def long_text(place, text_files):
    """Text with a document that is longer than the context of the models (512 tokens)."""
    path = place / "long.txt"
    lines = text_files[1].read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([lines[0], " ".join(lines * 4), lines[1]]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def typed(models):
    """Models as typed in the folder they lie in; two of the names are one folder."""
    return ["llama-target", "qwen2-target", "./llama-target", "llama-source"]


@pytest.fixture(scope="module")
def scored(typed, place, text_files, cli):
    """The JSON."""
    before = os.getcwd()
    os.chdir(place)
    try:
        called = cli("eval", *typed, "--text", "heldout.txt", "--json")
    finally:
        os.chdir(before)
    assert called.code == 0, called.err
    return called.json


def torch_losses(folder, documents):
    """(nats, tokens) of each document by transformers, after one prefix token, not scored."""
    torch = pytest.importorskip("torch")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    found = []
    for text in documents:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([[prefix, *ids]])).logits[0, :-1].double()
        likelihood = torch.log_softmax(logits, -1)[range(len(ids)), ids]
        found.append((-float(likelihood.sum()), len(ids)))
    return np.array(found)


def test_json_has_the_documented_keys(scored, typed):
    """The first model is the base of those that share its tokenizer."""
    assert set(scored) == {"models", "pairs", "base"}
    assert scored["base"] == typed[0]
    assert list(scored["models"]) == typed  # as typed, in order
    for name, one in scored["models"].items():
        keys = {"documents", "tokens", "nll_per_token", "bits_per_byte"}
        near = name in ("./llama-target", "llama-source")
        assert set(one) == keys | ({"kl_to_base", "kl_to_base_interval"} if near else set())
    for one in scored["pairs"]:
        assert set(one) == {"a", "b", "metric", "difference", "low", "high"}


def test_every_pair_is_there_once(scored, typed):
    pairs = [(one["a"], one["b"]) for one in scored["pairs"]]
    assert pairs == [(a, b) for i, a in enumerate(typed) for b in typed[i + 1 :]]


@pytest.mark.torch
@pytest.mark.parametrize("name", ["llama-target", "qwen2-target", "llama-source"])
def test_losses_are_those_of_torch(name, scored, place, text_files):
    documents = text_files[1].read_text(encoding="utf-8").splitlines()
    nats, tokens = torch_losses(place / name, documents).T
    one = scored["models"][name]
    assert one["documents"] == len(documents)
    assert one["tokens"] == tokens.sum()
    assert one["nll_per_token"] == pytest.approx(nats.sum() / tokens.sum(), abs=1e-4)
    size = sum(len(text.encode()) for text in documents)
    assert one["bits_per_byte"] == pytest.approx(nats.sum() / size / math.log(2), abs=1e-4)


@pytest.mark.torch
def test_kl_is_that_of_torch(scored, place, text_files):
    """Nats per token over all tokens of all documents, after one prefix token."""
    torch = pytest.importorskip("torch")
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "llama-target")
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(
            place / name, dtype=torch.float32, attn_implementation="eager"
        )
        for name in ("llama-target", "llama-source")
    ]
    total = tokens = 0
    for text in text_files[1].read_text(encoding="utf-8").splitlines():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        sequence = torch.tensor([[tokenizer.bos_token_id, *ids]])
        with torch.no_grad():
            p, q = (torch.log_softmax(one(sequence).logits[0, :-1].double(), -1) for one in models)
        total, tokens = total + float((p.exp() * (p - q)).sum()), tokens + len(ids)
    one = scored["models"]["llama-source"]
    assert one["kl_to_base"] == pytest.approx(total / tokens, abs=1e-4)
    low, high = one["kl_to_base_interval"]
    assert 0 < low < one["kl_to_base"] < high
    assert scored["models"]["./llama-target"]["kl_to_base"] == 0


def test_base_by_name(scored, place, text_files, cli, monkeypatch):
    """It is scored too, and models with other tokens have no divergence from it."""
    monkeypatch.chdir(place)
    words = ("eval", "llama-target", "qwen2-target", "--text", "heldout.txt", "--base")
    called = cli(*words, "llama-source", "--json")
    assert called.code == 0
    assert called.json["base"] == "llama-source"
    assert list(called.json["models"]) == ["llama-target", "qwen2-target", "llama-source"]
    has = [name for name, one in called.json["models"].items() if "kl_to_base" in one]
    assert has == ["llama-target"]
    back = called.json["models"]["llama-target"]["kl_to_base"]
    assert abs(back - scored["models"]["llama-source"]["kl_to_base"]) > 1e-3  # not symmetric
    assert "qwen2-target has other tokens than the base" in called.err
    shown = cli(*words, "llama-source", columns=100).out
    assert (
        f"KL of llama-target from llama-source: {back:.4f} nats per token, 95 % interval" in shown
    )


def test_limit_reads_the_first_documents(place, text_files, tmp_path, cli):
    lines = text_files[1].read_text(encoding="utf-8").splitlines()
    few = tmp_path / "few.txt"
    few.write_text("\n".join(lines[:3]) + "\n", encoding="utf-8")
    words = ("eval", place / "llama-target", "--json", "--text")
    assert cli(*words, text_files[1], "--limit", 3).json == cli(*words, few).json


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "--text, --choices or --tasks"),
        (("--choices", "q.jsonl", "--base", "x"), 2, "--base needs documents; give --text"),
        (("--choices", "q.jsonl", "--generate", "2"), 2, "--generate needs documents"),
        (("--choices", "nowhere.jsonl"), 3, "nowhere.jsonl does not exist"),
        (("--text", "heldout.txt", "--limit", "0"), 2, "--limit"),
        (("--text", "heldout.txt", "--base", "nobody"), 3, "nobody"),
    ],
)
def test_refused(words, code, message, place, text_files, cli, monkeypatch):
    monkeypatch.chdir(place)
    called = cli("eval", "llama-target", *words)
    assert called.code == code
    assert message in called.err
    assert called.out == ""


def test_difference_is_a_minus_b(scored):
    for one in scored["pairs"]:
        a, b = (scored["models"][one[key]][one["metric"]] for key in ("a", "b"))
        assert one["difference"] == pytest.approx(a - b, abs=1e-9)
        assert one["low"] <= one["difference"] <= one["high"]


def test_models_of_different_tokenizers_are_compared_in_bits_per_byte(scored):
    for one in scored["pairs"]:
        is_mixed = "qwen2-target" in (one["a"], one["b"])
        assert one["metric"] == ("bits_per_byte" if is_mixed else "nll_per_token")


def test_one_folder_typed_in_two_ways_is_no_different(scored):
    [one] = [
        one for one in scored["pairs"] if (one["a"], one["b"]) == ("llama-target", "./llama-target")
    ]
    assert (one["difference"], one["low"], one["high"]) == (0, 0, 0)


def test_interval_excludes_zero_where_all_documents_agree(scored, place, text_files, cli):
    """A model against one whose head was multiplied by 20: worse on every document."""
    worse = shutil.copytree(place / "llama-target", place.parent / "worse")
    tensors = safetensors.numpy.load_file(worse / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 20
    safetensors.numpy.save_file(tensors, worse / "model.safetensors", metadata={"format": "pt"})
    found = cli("eval", worse, place / "llama-target", "--text", text_files[1], "--json").json
    [pair] = found["pairs"]
    assert 0 < pair["low"] < pair["difference"] < pair["high"]
    shutil.rmtree(worse)


def test_same_call_gives_the_same_numbers(scored, typed, place, cli, monkeypatch):
    monkeypatch.chdir(place)
    assert cli("eval", *typed, "--text", "heldout.txt", "--json").json == scored


def test_one_model_has_no_pairs(place, text_files, cli):
    found = cli("eval", place / "llama-target", "--text", text_files[1], "--json").json
    assert len(found["models"]) == 1
    assert found["pairs"] == []


def test_model_named_twice_in_the_same_way_is_scored_once(place, text_files, cli):
    found = cli(
        "eval", place / "llama-target", place / "llama-target", "--text", text_files[1], "--json"
    ).json
    assert (len(found["models"]), found["pairs"]) == (1, [])


def test_document_longer_than_the_context_is_scored_whole(long_text, place, cli):
    found = cli("eval", place / "llama-target", "--text", long_text, "--json").json
    tokenizer = tokenizers.load_tokenizer(place / "llama-target")
    documents = long_text.read_text(encoding="utf-8").splitlines()
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in documents]
    assert max(lengths) > 512
    [one] = found["models"].values()
    assert one["documents"] == 3
    assert one["tokens"] == sum(lengths)


def test_jsonl_with_a_field_of_another_name(place, text_files, tmp_path, cli):
    lines = text_files[1].read_text(encoding="utf-8").splitlines()
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"body": line}) + "\n" for line in lines), encoding="utf-8")
    words = ("eval", place / "llama-target", "--json", "--text")
    assert cli(*words, path, "--field", "body").json == cli(*words, text_files[1]).json


@pytest.mark.parametrize("columns", [80, 120])
def test_table_and_sentences(columns, place, text_files, cli, scored, monkeypatch):
    monkeypatch.chdir(place)
    called = cli("eval", "llama-target", "qwen2-target", "--text", "heldout.txt", columns=columns)
    assert called.code == 0
    for name in ("llama-target", "qwen2-target"):
        one = scored["models"][name]
        [row] = [line for line in called.out.splitlines() if name in line and "minus" not in line]
        for number in (
            f"{one['nll_per_token']:.4f}",
            f"{one['bits_per_byte']:.4f}",
            str(one["tokens"]),
        ):
            assert number in row
    [sentence] = [
        line for line in called.out.splitlines() if "llama-target minus qwen2-target" in line
    ]
    assert "bits per byte, 95 % interval [" in sentence


def test_long_folder_names_are_shown_whole(place, text_files, cli):
    """Rows may wrap, but a name must not be cut."""
    called = cli("eval", place / "llama-target", "--text", text_files[1], columns=60)
    assert "…" not in called.out


def test_inputs_are_unchanged(place, hashes, scored, cli):
    before = hashes(place)
    assert cli("eval", place / "llama-target", "--text", place / "heldout.txt", "--json").code == 0
    assert hashes(place) == before
