"""Bad input: one sentence on stderr, what, where and what to do; the exit code; nothing written.

One row for each kind of input. A row gets a `Desk`, a private folder with everything that a good
run needs, breaks something in it, and returns the arguments; the exit code and words that the
sentence must contain stand above it. That the untouched desk works is tested too, or else every row
would pass.
"""

import json
import re
import shutil
import time
import tracemalloc

import bad_usage  # noqa: F401  (its rows stand in ROWS too)
import ml_dtypes  # noqa: F401  (teaches safetensors the name bfloat16)
import numpy as np
import pytest
from bad_files import BOMBS  # its rows stand in ROWS too
from desk import GATE, ROWS, SINGLE, row

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1234\n"


# ---- weights ----


@row(3, "copy/model.safetensors", "download")
def truncated_safetensors(desk):
    path = desk.target / SINGLE
    path.write_bytes(path.read_bytes()[:-1000])
    return desk.run()


@row(3, "copy/model.safetensors", "download")
def safetensors_cut_inside_the_header(desk):
    path = desk.target / SINGLE
    path.write_bytes(path.read_bytes()[:20])
    return desk.run()


@row(3, "copy/model.safetensors", "0 bytes")
def empty_safetensors(desk):
    (desk.target / SINGLE).write_bytes(b"")
    return desk.run()


@row(3, "copy/model.safetensors", "Git LFS pointer", "git lfs pull")
def lfs_pointer(desk):
    (desk.target / SINGLE).write_text(POINTER)
    return desk.run()


@row(3, "sharded", "model-00001-of-0000", "model-00002-of-0000", "missing", "download")
def missing_shards_all_named(desk):
    sharded = desk.copy("qwen2-target", "sharded")
    for path in sorted(sharded.glob("*.safetensors"))[:2]:
        path.unlink()
    return desk.run(target=sharded)


@row(3, "copy", "pickled", "convert")
def pickle_only_folder(desk):
    (desk.target / SINGLE).unlink()
    (desk.target / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    return desk.run()


@row(3, "copy", "no weights")
def folder_without_weights(desk):
    (desk.target / SINGLE).unlink()
    return desk.run()


@row(3, "copy", "mlp.gate_proj.weight", "[40, 24]", "[44, 24]")
def shape_against_config(desk):
    desk.edit_config(intermediate_size=44)
    return desk.run()


@row(3, "copy", GATE, "2 values", "NaN")
def nan_weights(desk):
    def change(tensors):
        tensors[GATE][0, :2] = [np.nan, np.inf]

    desk.edit_tensors(change)
    return desk.run()


@row(3, "base", "NaN")
def nan_weights_of_the_base(desk):
    base = desk.copy("llama-base", "base")

    def change(tensors):
        tensors["model.norm.weight"][0] = np.nan

    desk.edit_tensors(change, base)
    return desk.delta(source_base=base)


@row(5, "down_in", "layer 1", "not finite")
def nan_activations_from_finite_weights(desk):
    def change(tensors):
        for name in (GATE, GATE.replace("gate", "up")):
            tensors[name] *= np.float32(1e30)

    desk.edit_tensors(change)
    return desk.run()


# ---- models ----


@row(3, "mamba", "llama, mistral, qwen2")
def unsupported_model(desk):
    desk.edit_config(model_type="mamba")
    return desk.run()


@row(3, "LlamaForSequenceClassification", "LlamaForCausalLM")
def model_without_a_language_head(desk):
    desk.edit_config(architectures=["LlamaForSequenceClassification"])
    return desk.run()


@row(3, "quantised", "gptq", "unquantised parent")
def quantised_model(desk):
    desk.edit_config(quantization_config={"quant_method": "gptq", "bits": 4})
    return desk.run()


@row(3, "GGUF", "unquantised parent")
def quantised_gguf(desk):
    (desk.target / SINGLE).unlink()
    (desk.target / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    return desk.run()


@row(3, GATE, "I32", "unquantised parent")
def quantised_tensors(desk):
    def change(tensors):
        tensors[GATE] = tensors[GATE].astype("int32")

    desk.edit_tensors(change)
    return desk.run()


@row(3, "copy", "adapter", "merge it into its base")
def adapter_only_model(desk):
    (desk.target / SINGLE).unlink()
    (desk.target / "config.json").unlink()
    (desk.target / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "x"}'
    )
    (desk.target / "adapter_model.safetensors").write_bytes(b"")
    return desk.run()


@row(3, "remote code", "auto_map", "never run")
def remote_code_model(desk):
    (desk.target / "modeling_x.py").write_text(f"open({str(desk.folder / 'ran')!r}, 'w')\n")
    desk.edit_config(auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    return desk.run()


@row(3, "config.json", "missing")
def missing_config(desk):
    (desk.target / "config.json").unlink()
    return desk.run()


@row(3, "config.json", "not JSON")
def config_that_is_not_json(desk):
    (desk.target / "config.json").write_text("{")
    return desk.run()


@row(3, "hidden_size must be an integer", "'24'")
def config_of_wrong_types(desk):
    desk.edit_config(hidden_size="24")
    return desk.run()


@row(3, "copy", "no tokenizer")
def missing_tokenizer(desk):
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (desk.target / name).unlink()
    return desk.run()


@row(3, "copy", "tokenizer", "cannot be loaded")
def broken_tokenizer(desk):
    (desk.target / "tokenizer.json").write_text("{")
    return desk.run()


@row(3, "copy", "300 tokens", "256 rows")
def tokenizer_with_more_ids_than_rows(desk):
    def change(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:256].copy()

    desk.edit_tensors(change)
    desk.edit_config(vocab_size=256)
    return desk.run()


@row(3, "no directory", "meta-llama/Llama-3.2-1B")
def path_that_does_not_exist(desk):
    return desk.run(target="meta-llama/Llama-3.2-1B")


@row(3, "no directory", "nowhere")
def source_that_does_not_exist(desk):
    return desk.run(source=desk.folder / "nowhere")


@row(3, "no directory", "model.safetensors")
def file_in_place_of_a_folder(desk):
    return desk.run(target=desk.target / SINGLE)


@row(3, "no directory", "llama/base")
def eval_of_a_path_that_does_not_exist(desk):
    return ["eval", "llama/base", "--text", desk.heldout]


@row(3, "no directory", "llama/base")
def inspect_of_a_path_that_does_not_exist(desk):
    return ["inspect", "llama/base"]


# ---- texts ----


@row(3, "no text file", "nowhere.txt")
def text_that_does_not_exist(desk):
    return desk.run(calibration=desk.folder / "nowhere.txt")


@row(3, "empty.txt", "0 documents")
def empty_text(desk):
    return desk.run(calibration=desk.write("empty.txt", ""))


@row(3, "blank.txt", "0 documents")
def text_of_blank_lines(desk):
    return desk.run(calibration=desk.write("blank.txt", "\n  \n\t\n"))


@row(3, "latin.txt", "byte 8", "line 2", "--encoding")
def text_that_is_not_utf8(desk):
    return desk.run(
        calibration=desk.write(
            "latin.txt", "one two\nna\xefve\n".encode("latin-1").replace(b"na\xef", b"\xef")
        )
    )


@row(3, "sixteen.txt", "byte 0", "--encoding")
def text_in_utf16(desk):
    return desk.run(calibration=desk.write("sixteen.txt", "some text\n".encode("utf-16")))


@row(3, "klingon", "encoding")
def unknown_encoding(desk):
    return desk.run(encoding="klingon")


@row(3, "bad.jsonl", "line 2", "not JSON")
def broken_line_of_jsonl(desk):
    return desk.run(calibration=desk.write("bad.jsonl", '{"text": "a b"}\n{"text": \n'))


@row(3, "other.jsonl", "line 1", "'text'", "field")
def jsonl_without_the_field(desk):
    return desk.run(calibration=desk.write("other.jsonl", '{"body": "a b"}\n'))


@row(3, "calibration text", "usable row", "at least 2", "add text")
def fewer_than_two_usable_rows(desk):
    return desk.run(calibration=desk.write("one.txt", "only one document here\n"))


@row(3, "two.txt", "too few documents", "dev split")
def too_few_documents_for_a_dev_split(desk):
    return desk.run(
        calibration=desk.write("two.txt", "first document\nsecond document\n"), strength="auto"
    )


@row(3, "none.txt", "0 documents")
def empty_eval_text(desk):
    return desk.run(eval_text=desk.write("none.txt", "\n"))


@row(3, "none.txt", "0 documents")
def empty_text_for_eval(desk):
    return ["eval", desk.target, "--text", desk.write("none.txt", "")]


# ---- models that do not fit ----


@row(3, "token", "identical tokenizers", "rows: span or rows: sample")
def token_rows_with_different_tokenizers(desk):
    return desk.run(rows="token", source=desk.models["qwen2-source"])


@row(3, "share 0 tokens", "leave them out of weights")
def vocabularies_without_a_common_token(desk):
    state = json.loads((desk.target / "tokenizer.json").read_text())
    special = {token["content"]: token["id"] for token in state["added_tokens"]}
    vocabulary = special | {"[anything]": len(special)}
    state["model"] = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[anything]"}
    (desk.target / "tokenizer.json").write_text(json.dumps(state))
    return desk.run(weights="down,embed", rows="sample")


@row(3, "base", "differ", "give the right checkpoint")
def base_whose_shapes_differ_from_the_source(desk):
    return desk.delta(source_base=desk.models["llama-target"])


@row(3, "base", "different tokenizers")
def base_with_another_tokenizer(desk):
    base = desk.copy("llama-base", "base")
    state = json.loads((base / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    a, b = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (base / "tokenizer.json").write_text(json.dumps(state))
    return desk.delta(source_base=base)


# ---- output ----


@row(3, "out", "not empty", "--overwrite")
def output_that_exists_and_is_not_empty(desk):
    desk.out.mkdir()
    desk.write("out/notes.txt", "mine")
    return desk.run()


@row(3, "copy", "also an input")
def output_that_is_an_input(desk):
    return desk.run("--overwrite", out=desk.target)


@row(3, "also an input")
def output_that_is_an_input_by_another_name(desk):
    (desk.folder / "link").symlink_to(desk.target)
    return desk.run("--overwrite", out=desk.folder / "link" / ".." / "copy")


@row(3, "inside the input")
def output_inside_an_input(desk):
    return desk.run(out=desk.target / "merged")


@row(3, "contains the input")
def output_that_contains_an_input(desk):
    return desk.run("--overwrite", out=desk.folder)


@row(3, "contains the input")
def output_that_contains_a_text(desk):
    desk.out.mkdir()
    shutil.move(desk.calibration, desk.out / "c.txt")
    return desk.run("--overwrite", calibration=desk.out / "c.txt")


@row(3, "is a file")
def output_that_is_a_file(desk):
    desk.write("out", "mine")
    return desk.run("--overwrite")


@row(3, "not writable")
def output_below_a_file(desk):
    desk.write("file", "mine")
    return desk.run(out=desk.folder / "file" / "out")


@pytest.fixture
def everything(desk, hashes):
    """What lies on the desk and in the shared inputs."""
    return lambda: (
        hashes(desk.folder),
        {name: hashes(folder) for name, folder in desk.models.items()},
    )


@pytest.mark.parametrize("name", ROWS)
def test_bad_input_is_refused(name, desk, cli, everything):
    make, code, words = ROWS[name]
    arguments = make(desk)
    before = everything()
    called = cli(*arguments, *(() if arguments[0] == "inspect" else ("--quiet",)))
    assert (called.code, called.out) == (code, ""), called
    [sentence] = called.err.splitlines()
    assert re.fullmatch(r"error: .+\.", sentence)
    missing = [word for word in words if word not in sentence]
    assert not missing, sentence
    assert everything() == before, "something was written, moved or removed"


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_costs_little_to_refuse(name, desk, cli):
    make, code, _ = ROWS[name]
    arguments = make(desk)
    start = time.process_time()
    tracemalloc.start()
    called = cli(*arguments)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert called.code == code
    # a bomb that unfolds does not end; imports under tracemalloc alone can take 20 s of CPU
    assert time.process_time() - start < 120
    assert peak < 100e6


def test_untouched_desk_works(desk, cli):
    called = cli(*desk.run())
    assert called.code == 0, called.err
