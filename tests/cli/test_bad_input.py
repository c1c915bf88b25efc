"""Bad input: one sentence on stderr, what, where and what to do; the exit code; nothing written.

What one function refuses is tested there (`tests/io`, `tests/data`, `tests/recipes`). Here is what
only a run sees, and enough of the rest to know that a refusal becomes a sentence and an exit code.
A row gets a `Desk`, a private folder with everything that a good run needs, breaks something in it,
and returns the arguments; the exit code and words that the sentence must contain stand above it.
That the untouched desk works is tested too, or else every row would pass.
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
from desk import GATE, ROWS, row, rows

# ---- weights ----


@pytest.mark.catalogue("nan-weights")
@row(3, "base", "NaN")
def nan_weights_of_the_base(desk):
    base = desk.copy("llama-base", "base")

    def change(tensors):
        tensors["model.norm.weight"][0] = np.nan

    desk.edit_tensors(change, base)
    return desk.delta(source_base=base)


@pytest.mark.catalogue("nan-activations")
@row(5, "down_in", "layer 1", "not finite")
def nan_activations_from_finite_weights(desk):
    def change(tensors):
        for name in (GATE, GATE.replace("gate", "up")):
            tensors[name] *= np.float32(1e30)

    desk.edit_tensors(change)
    return desk.run()


# ---- models ----


@pytest.mark.catalogue("remote-code")
@row(3, "remote code", "auto_map", "never run")
def remote_code_model(desk):
    (desk.target / "modeling_x.py").write_text(f"open({str(desk.folder / 'ran')!r}, 'w')\n")
    desk.edit_config(auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    return desk.run()


@pytest.mark.catalogue("vocabulary-padding")
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


@row(3, "no directory", "llama/base")
def eval_of_a_path_that_does_not_exist(desk):
    return ["eval", "llama/base", "--text", desk.heldout]


@row(3, "no directory", "llama/base")
def inspect_of_a_path_that_does_not_exist(desk):
    return ["inspect", "llama/base"]


# ---- texts ----


@pytest.mark.catalogue("empty-calibration")
@row(3, "empty.txt", "0 documents")
def empty_text(desk):
    return desk.run(calibration=desk.write("empty.txt", ""))


@pytest.mark.catalogue("not-utf8")
@row(3, "sixteen.txt", "byte 0", "--encoding")
def text_in_utf16(desk):
    return desk.run(calibration=desk.write("sixteen.txt", "some text\n".encode("utf-16")))


@pytest.mark.catalogue("too-few-tokens")
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


@pytest.mark.catalogue("existing-output")
@row(3, "out", "not empty", "--overwrite")
def output_that_exists_and_is_not_empty(desk):
    desk.out.mkdir()
    desk.write("out/notes.txt", "mine")
    return desk.run()


@pytest.mark.catalogue("bad-output")
@row(3, "copy", "also an input")
def output_that_is_an_input(desk):
    return desk.run("--overwrite", out=desk.target)


@row(3, "contains the input")
def output_that_contains_a_text(desk):
    desk.out.mkdir()
    shutil.move(desk.calibration, desk.out / "c.txt")
    return desk.run("--overwrite", calibration=desk.out / "c.txt")


@pytest.fixture
def everything(desk, hashes):
    """What lies on the desk and in the shared inputs."""
    return lambda: (
        hashes(desk.folder),
        {name: hashes(folder) for name, folder in desk.models.items()},
    )


def assert_refused(name, desk, cli):
    """One sentence, the exit code, the culprit by name."""
    make, code, words = ROWS[name]
    arguments = make(desk)
    called = cli(*arguments, *(() if arguments[0] == "inspect" else ("--quiet",)))
    assert (called.code, called.out) == (code, ""), called
    [sentence] = called.err.splitlines()
    assert re.fullmatch(r"error: .+\.", sentence)
    missing = [word for word in words if word not in sentence]
    assert not missing, sentence


@pytest.mark.parametrize("name", rows(name for name in ROWS if name not in BOMBS))
def test_bad_input_is_refused(name, desk, cli, everything):
    before = None

    def called(*arguments):
        nonlocal before
        before = everything()  # what the row has broken is broken now
        return cli(*arguments)

    assert_refused(name, desk, called)
    assert everything() == before, "something was written, moved or removed"


@pytest.mark.parametrize("name", rows(BOMBS))
def test_bomb_costs_little_to_refuse(name, desk, cli):
    peak = 0

    def called(*arguments):
        nonlocal peak
        tracemalloc.start()
        try:
            return cli(*arguments)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()

    start = time.process_time()
    assert_refused(name, desk, called)
    # a bomb that unfolds does not end; imports under tracemalloc alone can take 20 s of CPU
    assert time.process_time() - start < 120
    assert peak < 100e6
    assert not desk.out.exists()


def test_untouched_desk_works(desk, cli):
    called = cli(*desk.run())
    assert called.code == 0, called.err
