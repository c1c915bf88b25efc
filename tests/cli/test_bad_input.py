"""Bad input: one sentence on stderr, what, where and what to do; the exit code; nothing written.

One row for each kind of input. A row gets a `Desk`, a private folder with everything that a good
run needs, breaks something in it, and returns the arguments; the exit code and words that the
sentence must contain stand above it. That the untouched desk works is tested too, or else every row
would pass.
"""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes  # noqa: F401  (teaches safetensors the name bfloat16)
import numpy as np
import pytest
import safetensors.numpy
import yaml

from ot_merge_jax import pipeline
from ot_merge_jax.io import folder

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
GATE = "model.layers.1.mlp.gate_proj.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1234\n"
FAST_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


class Desk:
    """A folder of inputs that may be broken: two models, a base, texts."""

    def __init__(self, folder, models, text_files):
        self.folder = folder
        self.models, self.out = models, folder / "out"
        self.calibration, self.heldout = (Path(shutil.copy(one, folder)) for one in text_files)
        self.parts = {
            "--preset": "barycentric", "--target": self.copy("llama-target"),
            "--source": models["llama-source"], "--calibration": self.calibration,
            "--strength": "0.1", "--out": self.out,
        }  # fmt: skip

    def copy(self, model, name="copy"):
        """A copy of a model that the row may damage."""
        return Path(shutil.copytree(self.models[model], self.folder / name))

    @property
    def target(self):
        return self.parts["--target"]

    def run(self, *more, **changes):
        """``ot-merge run``; ``changes`` replace flags (None drops one)."""
        parts = self.parts | {f"--{key.replace('_', '-')}": value for key, value in changes.items()}
        return [
            "run",
            *(word for pair in parts.items() if pair[1] is not None for word in pair),
            *more,
        ]

    def delta(self, **changes):
        """The same for preset delta, whose good form has a base."""
        given = {"preset": "delta", "source_base": self.models["llama-base"], **changes}
        return self.run(**given)

    def edit_config(self, folder=None, **changes):
        path = (folder or self.target) / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(
            json.dumps({key: value for key, value in config.items() if value is not ...})
        )

    def edit_tensors(self, change, folder=None):
        path = (folder or self.target) / SINGLE
        found = safetensors.numpy.load_file(path)
        change(found)
        safetensors.numpy.save_file(found, path, metadata={"format": "pt"})

    def write(self, name, content):
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path


@pytest.fixture
def desk(tmp_path, models, text_files):
    return Desk(tmp_path, models, text_files)


ROWS = {}


def row(code, *words):
    """Registers a row: its exit code and the words of its sentence."""

    def register(function):
        ROWS[function.__name__.replace("_", " ")] = (function, code, words)
        return function

    return register


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


@row(3, "mamba", "llama, qwen2")
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


@row(3, "token", "identical tokenizers", "rows: sample")
def token_rows_with_different_tokenizers(desk):
    return desk.run(rows="token", source=desk.models["qwen2-source"])


@row(3, "embed", "identical tokenizers", "weights")
def vocabulary_with_different_tokenizers(desk):
    return desk.run(weights="down,embed", source=desk.models["qwen2-source"])


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


# ---- usage ----


@row(2, "delta", "source_base", "barycentric")
def delta_without_a_source_base(desk):
    return desk.delta(source_base=None)


@row(2, "recipe.yaml", "'epsilom'", "did you mean 'epsilon'")
def unknown_recipe_key(desk):
    recipe = desk.write(
        "recipe.yaml", yaml.safe_dump({"target": "a", "source": "b", "epsilom": 0.1})
    )
    return ["run", recipe, "--out", desk.out]


@row(2, "recipe.yaml", "'pat'", "did you mean 'path'")
def unknown_key_of_the_calibration(desk):
    recipe = desk.write("recipe.yaml", yaml.safe_dump({"calibration": {"pat": "x"}}))
    return ["run", recipe, "--out", desk.out]


@row(2, "no recipe", "nowhere.yaml")
def recipe_that_does_not_exist(desk):
    return ["run", desk.folder / "nowhere.yaml", "--out", desk.out]


@row(2, "recipe.yaml", "not YAML", "mend")
def recipe_that_is_not_yaml(desk):
    return ["run", desk.write("recipe.yaml", "a: [1\nb: 2"), "--out", desk.out]


@row(2, "recipe.yaml", "not YAML", "named twice")
def recipe_with_a_key_twice(desk):
    return ["run", desk.write("recipe.yaml", "seed: 1\nseed: 2\n"), "--out", desk.out]


@row(2, "recipe.yaml", "not YAML", "python")
def recipe_with_a_python_tag(desk):
    tag = f"target: !!python/object/apply:os.mkdir ['{desk.folder / 'ran'}']\n"
    return ["run", desk.write("recipe.yaml", tag), "--out", desk.out]


@row(2, "target is missing", "source is missing", "calibration is missing")
def flags_that_say_too_little(desk):
    return ["run", "--preset", "paper", "--out", desk.out]


@row(2, "epsilon", "greater than 0")
def epsilon_of_zero(desk):
    return desk.run(epsilon="0")


@row(2, "epsilon", "greater than 0")
def negative_epsilon(desk):
    return desk.run(epsilon="-0.1")


@row(2, "epsilon")
def epsilon_that_is_not_a_number(desk):
    return desk.run(epsilon="nan")


@row(2, "layer_epsilon", "greater than 0")
def layer_epsilon_of_zero(desk):
    return desk.run(layer_epsilon="0")


@row(2, "max_iterations")
def no_iterations(desk):
    return desk.run(max_iterations="0")


@row(2, "strength")
def negative_strength(desk):
    return desk.run(strength="-1")


@row(2, "strength", "[0, 1]")
def strength_above_one(desk):
    return desk.run(strength="1.5")


@row(2, "preset", "paper, barycentric, delta", "'papier'")
def unknown_preset(desk):
    return desk.run(preset="papier")


@row(2, "weights", "'dwon'")
def unknown_weight(desk):
    return desk.run(weights="down,dwon")


@row(2, "--out")
def missing_out(desk):
    return desk.run(out=None)


@row(2, "--mesh", "data=2,model=4")
def nonsense_mesh(desk):
    return desk.run(mesh="two by four")


@row(2, "mesh axis", "'pipeline'", "data, model")
def mesh_with_an_unknown_axis(desk):
    return desk.run(mesh="pipeline=2")


@row(2, "mesh", "does not fit")
def mesh_larger_than_the_machine(desk):
    return desk.run(mesh="data=64")


@row(2, "mesh")
def mesh_of_zero(desk):
    return desk.run(mesh="data=0")


@row(2, "mesh")
def negative_mesh(desk):
    return desk.run(mesh="data=-2")


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


def test_untouched_desk_works(desk, cli):
    called = cli(*desk.run())
    assert called.code == 0, called.err


@pytest.mark.parametrize(
    ("problem", "code", "words"),
    [
        (PermissionError(13, "Permission denied", "m/model.safetensors"), 3, "m/model.safetensors"),
        (OSError(5, "Input/output error", "m/model.safetensors"), 4, "m/model.safetensors"),
        (OSError("out does not hold the merged parameters; check the disk."), 4, "check the disk"),
        (MemoryError(), 4, "out of memory"),
    ],
)
def test_trouble_with_files_and_memory_is_one_sentence(
    problem, code, words, desk, cli, monkeypatch
):
    def fail(*a, **k):
        raise problem

    monkeypatch.setattr(pipeline, "check", fail)
    called = cli(*desk.run("--quiet"))
    assert (called.code, called.out) == (code, "")
    [sentence] = called.err.splitlines()
    assert re.fullmatch(r"error: .+\.", sentence)
    assert words in sentence


def test_error_with_json_leaves_stdout_empty(desk, cli):
    called = cli(*desk.run("--json", target=desk.folder / "nowhere"))
    assert (called.code, called.out) == (3, "")
    assert called.err.splitlines()[-1].startswith("error: ")


def test_verbose_shows_where_an_error_came_from(desk, cli):
    called = cli(*desk.run("--verbose", target=desk.folder / "nowhere"))
    assert called.code == 3
    assert "InputError" in called.err
    assert called.err.splitlines()[-1].startswith("error: ")


def test_sentence_is_one_line_on_a_narrow_screen(desk, cli):
    called = cli(*desk.run("--quiet", target=desk.folder / "nowhere"), columns=30)
    assert len(called.err.splitlines()) == 1


@pytest.mark.parametrize(
    "words",
    [
        "run --no-such-flag",
        "run --epsilon small",
        "run --seed -1",
        "eval",
        "eval model",
        "no-such-command",
    ],
)
def test_usage_errors_exit_with_2(words, cli):
    called = cli(*words.split())
    assert (called.code, called.out) == (2, "")
    assert "Error" in called.err


def test_path_is_never_looked_up_on_the_hub(desk, cli, monkeypatch):
    monkeypatch.setattr(folder, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    assert cli(*desk.run(target="gpt2", source="Qwen/Qwen2.5-0.5B")).code == 3
    assert cli("eval", "gpt2", "--text", desk.heldout).code == 3


def test_output_whose_parent_is_not_writable(desk, cli, everything, monkeypatch):
    parent = desk.folder / "parent"
    parent.mkdir()
    if os.geteuid() == 0:  # permissions do not bind root, so say what a user would be told
        access = os.access
        monkeypatch.setattr(
            os, "access", lambda path, mode, **k: Path(path) != parent and access(path, mode, **k)
        )
    else:
        parent.chmod(0o555)
    before = everything()
    called = cli(*desk.run("--quiet", out=parent / "sub" / "out"))
    parent.chmod(0o755)
    assert called.code == 3
    assert "not writable" in called.err
    assert everything() == before


@pytest.mark.parametrize(
    "name", ["x" * 300, "two\nlines", "übung 河流", "-rf", "a'b\"c;$(touch x)`y`"]
)
def test_output_names(name, desk, cli):
    """Odd names work, or are refused like any other bad input; the card stays readable."""
    called = cli(*desk.run(out=desk.folder / "sub" / name))
    if len(name) > 255:
        assert called.code == 3
        assert called.err.splitlines()[-1].startswith("error: ")
        assert not (desk.folder / "sub").exists()
        return
    assert called.code == 0, called.err
    front = (desk.folder / "sub" / name / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    assert yaml.safe_load(front)["base_model_relation"] == "merge"


# ---- what is not bad input ----


def test_constant_neurons_are_fine(desk, cli):
    """A neuron that never changes, in both models, is uncorrelated with everything."""
    source = desk.copy("llama-source", "source")

    def change(tensors):
        for name in (GATE, GATE.replace("gate", "up"), "model.layers.0.mlp.up_proj.weight"):
            tensors[name][:3] = 0

    for model in (desk.target, source):
        desk.edit_tensors(change, model)
    called = cli(*desk.run("--json", source=source))
    assert called.code == 0, called.err
    report = called.json
    assert None not in report["weights"]["down"]["ratio_transported"]
    found = safetensors.numpy.load_file(desk.out / SINGLE)
    assert all(np.isfinite(one).all() for one in found.values())


def test_model_without_any_signal_in_a_layer_is_fine(desk, cli):
    def change(tensors):
        for name in (GATE, "model.layers.1.mlp.down_proj.weight"):
            tensors[name][:] = 0

    desk.edit_tensors(change)
    called = cli(*desk.run("--json"))
    assert called.code == 0, called.err
    found = safetensors.numpy.load_file(desk.out / SINGLE)
    assert all(np.isfinite(one).all() for one in found.values())


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_other_encodings_are_read_when_named(encoding, desk, cli):
    text = desk.write("other.txt", desk.calibration.read_text().encode(encoding, "replace"))
    mark = () if encoding == "utf-8-sig" else ("--encoding", encoding)
    assert cli(*desk.run(*mark, calibration=text)).code == 0


# ---- convergence and --strict ----


def test_solver_that_stops_early_is_a_warning(desk, cli):
    called = cli(*desk.run(preset="paper", max_iterations="1"))
    assert called.code == 0, called.err
    said = [line for line in called.out.splitlines() if line.startswith("warning: ")]
    assert len(said) == 4
    for sentence in said:
        assert "did not converge in 2 of 2 layers" in sentence
        assert "max_iterations" in sentence
    report = json.loads((desk.out / "ot_merge" / "report.json").read_text())
    assert report["warnings"] == [sentence.removeprefix("warning: ") for sentence in said]
    assert not any(any(one["converged"]) for one in report["weights"].values())


def test_strict_refuses_a_solver_that_stops_early(desk, cli, everything):
    before = everything()
    called = cli(*desk.run("--strict", "--quiet", preset="paper", max_iterations="1"))
    assert (called.code, called.out) == (5, "")
    assert "did not converge" in called.err
    assert everything() == before


def test_strict_lets_a_good_run_pass(desk, cli):
    assert cli(*desk.run("--strict")).code == 0


# ---- overwriting ----


def test_overwrite_replaces_the_folder_and_leaves_nothing_else(desk, cli):
    desk.out.mkdir()
    desk.write("out/notes.txt", "mine")
    desk.write("out/consolidated.safetensors", "stale")
    around = {path.name for path in desk.folder.iterdir()}
    called = cli(*desk.run("--overwrite"))
    assert called.code == 0, called.err
    assert not (desk.out / "notes.txt").exists()
    assert not (desk.out / "consolidated.safetensors").exists()
    assert (desk.out / SINGLE).exists()
    assert {path.name for path in desk.folder.iterdir()} == around


def test_overwrite_keeps_the_old_folder_when_the_run_fails(desk, cli, everything):
    desk.out.mkdir()
    desk.write("out/notes.txt", "mine")
    before = everything()
    called = cli(*desk.run("--overwrite", "--strict", preset="paper", max_iterations="1"))
    assert called.code == 5
    assert everything() == before


# ---- a full disk, Ctrl-C: real processes ----


def process(script, *arguments):
    """Starts Python on a script that has imported the command line."""
    head = "import os, resource, signal, sys\nfrom ot_merge_jax import cli, pipeline\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + script, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "XLA_FLAGS": FAST_TO_COMPILE},
    )  # fmt: skip


def test_full_disk_is_a_resource_error_and_leaves_nothing(desk, everything):
    """A limit on the size of files stands in for a full disk, until it is just large enough."""
    limits = (
        0,
        4096,
        (desk.target / SINGLE).stat().st_size - 1,
        (desk.target / SINGLE).stat().st_size,
    )
    script = (
        "import pathlib\n"
        # transformers may import torch, whose import writes files
        f"pipeline.calibration.load_tokenizer(pathlib.Path({str(desk.target)!r}))\n"
        "hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
        "codes, left = [], []\n"
        f"for limit in {limits}:\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))\n"
        "    try: cli.app(sys.argv[1:])\n"
        "    except SystemExit as stop: codes.append(stop.code)\n"
        f"    left.append(sorted(os.listdir({str(desk.folder)!r})))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))\n"
        "print([codes, left])\n"
    )
    before = sorted(path.name for path in desk.folder.iterdir())
    inputs = everything()[1], everything()[0]["copy/" + SINGLE]
    started = process(script, *desk.delta(weights="embed", strength="1"), "--quiet")
    out, err = started.communicate(timeout=300)
    codes, left = ast.literal_eval(out.splitlines()[-1])
    assert codes == [4, 4, 4, 0], err
    assert left == [before, before, before, sorted([*before, "out"])]
    sentence = re.compile(r"error: The disk is full at .*; nothing was written\.")
    assert all(sentence.fullmatch(line) for line in err.splitlines())
    assert len(err.splitlines()) == 3
    assert (everything()[1], everything()[0]["copy/" + SINGLE]) == inputs


def test_interrupt_when_the_folder_is_nearly_done(desk, everything, cli, monkeypatch):
    """SIGINT, as from Ctrl-C, while everything but the report lies in the partial folder."""

    def interrupted(*a, **k):
        assert list(desk.folder.glob("out.partial-*"))
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(pipeline, "_evaluate", interrupted)
    before = everything()
    called = cli(*desk.run("--quiet"))
    assert (called.code, called.out) == (130, "")
    assert called.err.splitlines() == ["interrupted; nothing was written."]
    assert everything() == before


def test_interrupt_from_outside(desk, everything):
    """A signal that another process sends while the tool works."""
    before = everything()
    started = process("cli.main()", *desk.delta(weights="embed", strength="1"))
    for line in started.stderr:
        if "load" in line:  # the models are being read
            started.send_signal(signal.SIGINT)
            break
    out, err = started.communicate(timeout=300)
    assert started.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert everything() == before
