"""The recipes of the paper in ``configs/``, as they stand: settings, commands, plans."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import huggingface_hub
import pytest
import typer
from hub_cache import contents, fill

from ot_merge_jax.cli import early
from ot_merge_jax.cli.main import app
from ot_merge_jax.errors import InputError
from ot_merge_jax.io import hub
from ot_merge_jax.recipes import loading
from ot_merge_jax.runs import adapt as adaptation
from ot_merge_jax.runs import merge

CONFIGS = Path(__file__).parents[2] / "configs"
#: method: Recipes of the paper: alpha of the fusion, alpha and learning rate of the adaptation.
REFERENCE = {
    "malay": (0.1, 0.1, 1e-6),
    "indonesian": (0.01, 0.1, 1e-6),
    "cantonese": (0.01, 0.1, 1e-8),
    "thai": (0.01, 0.01, 1e-7),
    "finance": (0.03, 0.03, 1e-6),
    "medical": (0.03, 0.005, 3e-7),
}
#: Target, source and data.
SOURCE = "unsloth/Llama-3.1-8B-Instruct"
NAMES = {
    "malay": ("mesolitica/Malaysian-Llama-3.2-1B-Instruct", SOURCE, "mesolitica/Malaysian-SFT"),
    "indonesian": (
        "digo-prayudha/Llama-3.2-1B-Indonesian-lora", SOURCE, "izzulgod/indonesian-conversation"
    ),
    "cantonese": (
        "unsloth/Llama-3.2-1B-Instruct", "FlagAlpha/Llama3-Chinese-8B-Instruct",
        "stvlynn/Cantonese-Dialogue",
    ),
    "thai": (
        "scb10x/llama3.2-typhoon2-1b-instruct", SOURCE, "ChavyvAkvar/fineweb-2-1M-Sample-Thai"
    ),
    "finance": (
        "unsloth/Llama-3.2-1B-Instruct", "Qwen/Qwen2.5-7B-Instruct",
        "Josephgflowers/Finance-Instruct-500k",
    ),
    "medical": (
        "PathFinderKR/Llama-3-1B-Medical-Instruct", SOURCE,
        "Shekswess/medical_llama3_instruct_dataset",
    ),
}  # fmt: skip
GENERAL = {"arc_easy", "commonsense_qa", "piqa", "social_iqa", "winogrande"}
FINANCE = ("business_ethics", "high_school_microeconomics", "professional_accounting")
#: Of lm-eval, beside the general ones.
TASKS = {
    "malay": set(),
    "cantonese": set(),
    "indonesian": {"arc_id", "belebele_ind_Latn", "truthfulqa_id_mc1", "truthfulqa_id_mc2",
                   "xcopa_id"},
    "thai": {"mmlu_prox_lite_th_other", "mgsm_native_cot_th", "xcopa_th"},
    "finance": {f"global_mmlu_full_en_{one}" for one in FINANCE},
    "medical": {"mmlu_anatomy", "mmlu_medical_genetics", "mmlu_professional_medicine",
                "medqa_4options", "medmcqa"},
}  # fmt: skip
each = pytest.mark.parametrize("name", REFERENCE)


def path(name):
    return CONFIGS / f"{name}.yaml"


def commands(name):
    """The arguments of every command that the comment of a recipe shows."""
    comment = [line[1:] for line in path(name).read_text().splitlines() if line[:1] == "#"]
    lines = "\n".join(comment).replace("\\\n", " ").splitlines()
    return [shlex.split(one)[1:] for one in lines if one.strip().startswith("ot-merge ")]


def parsed(words):
    """Flags by name, as typer reads them."""
    command = typer.main.get_command(app).commands[words[0]]
    return command.make_context(words[0], list(words[1:])).params


@pytest.fixture
def asked(cli, monkeypatch):
    """``asked(words)`` -> the recipe of a run, or the settings of an adaptation; neither starts."""
    seen = []

    def stop(settings, *_, **__):
        seen.append(settings)
        raise InputError("Seen.")

    monkeypatch.setattr(merge, "run", stop)
    monkeypatch.setattr(adaptation, "adapt", stop)
    monkeypatch.setattr(early, "look_for", lambda **_: None)  # nothing of it is here
    monkeypatch.chdir(CONFIGS.parent)

    def ask(words):
        called = cli(*words)
        assert called.code == 3, called.err
        return seen.pop()

    return ask


def test_every_recipe_is_known():
    assert {one.stem for one in CONFIGS.iterdir()} == set(REFERENCE)


@each
def test_settings_are_those_of_the_reference_runs(name):
    found = loading.resolve(loading.load(path(name)))
    fused = REFERENCE[name][0]
    assert (found.preset, found.k, found.epsilon, found.strength) == ("paper", 128, 0.1, fused)
    assert found.calibration.samples == 2000
    assert hub.model_id(found.target)[1] == hub.model_id(found.source)[1] == "main"
    models = (hub.model_id(one)[0] for one in (found.target, found.source))
    assert (*models, hub.dataset_id(found.calibration.path).repo) == NAMES[name]
    tasks = [
        task
        for words in commands(name)
        if words[0] == "eval"
        for task in (parsed(words)["tasks"] or "").split(",")
        if task
    ]
    assert len(tasks) == len(set(tasks))
    assert set(tasks) == TASKS[name] | GENERAL


@each
def test_commands_of_the_comment_ask_for_what_it_says(name, asked):
    """They are read by the command line itself; the adaptation starts from a merge shown before."""
    shown = commands(name)
    own = loading.resolve(loading.load(path(name)))
    merges, adapted = {}, None
    for words in shown:
        if words[0] == "run":
            merges[parsed(words)["out"].name] = asked(words)
        elif words[0] == "adapt":
            adapted = asked(words)
        else:
            parsed(words)
    assert [words[0] for words in shown].count("adapt") == 1
    _, held, rate = REFERENCE[name]
    assert merges[name] == own
    assert (adapted.strength or merges[adapted.model].strength) == held
    assert merges[adapted.model].model_copy(update={"strength": own.strength}) == own
    assert adapted.learning_rate == rate
    assert (adapted.batch_size, adapted.seq_len, adapted.samples) == (8, 2048, 2000)
    assert (adapted.weight_decay, adapted.warmup, adapted.steps) == (0.01, 0.03, None)
    assert adapted.text.model_dump() == own.calibration.model_dump(exclude={"samples"})
    others = [one for one in merges.values() if one.preset != "paper"]
    assert others
    for one in others:
        assert one.model_dump(exclude={"target", "source", "source_base", "calibration"}) == (
            loading.resolve({"preset": one.preset, "target": "t", "source": "s", "source_base": "b",
                             "calibration": "c.txt"})
            .model_dump(exclude={"target", "source", "source_base", "calibration"})
        )  # fmt: skip


def test_task_names_are_those_of_the_installed_lm_eval():
    found = importlib.util.find_spec("lm_eval")  # its index takes 14 seconds to read
    if found is None:
        pytest.skip("lm-evaluation-harness is not installed (the extra eval)")
    named = {
        task
        for name in REFERENCE
        for words in commands(name)
        if words[0] == "eval"
        for task in (parsed(words)["tasks"] or "").split(",")
        if task
    }
    assert len(named) == 21
    line = re.compile(r"""^["']?task["']?:\s*["']?(\w+)["']?\s*$""", re.MULTILINE)
    known = set()
    for file in Path(found.origin).parent.joinpath("tasks").rglob("*.yaml"):
        known.update(line.findall(file.read_text(encoding="utf-8")))
    assert named <= known


@each
def test_plan_of_the_recipe_as_it_stands(name, cli, tiny_checkpoint, documents, tmp_path,
                                         monkeypatch):  # fmt: skip
    """Offline, from a hub cache that holds small models of the same families and a small text."""
    source_family = "qwen2" if name == "finance" else "llama"
    sizes = {
        "target": {"hidden": 16, "heads": 4, "kv_heads": 2, "intermediate": 24, "layers": 2},
        "source": {"hidden": 32, "heads": 4, "kv_heads": 1, "intermediate": 40, "layers": 3},
    }
    made = {
        "target": tiny_checkpoint("llama", seed=8, tied=True, dtype="bfloat16", **sizes["target"]),
        "source": tiny_checkpoint(source_family, seed=9, **sizes["source"]),
    }
    settings = loading.load(path(name))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for role, folder in made.items():
        fill(tmp_path / "hub", hub.model_id(settings[role])[0], contents(folder))
    data = hub.dataset_id(settings["calibration"]["path"])
    lines = "".join(
        json.dumps(_record(settings["calibration"]["field"], text)) + "\n"
        for text in documents[:20]
    )
    files = {f"data/{data.split}-0.jsonl": lines.encode()}
    fill(tmp_path / "hub", data.repo, files, kind="dataset")
    monkeypatch.chdir(tmp_path)
    called = cli("plan", path(name), "--offline", "--json")
    assert called.code == 0, called.err
    assert [one.name for one in tmp_path.iterdir()] == ["hub"]
    found = called.json
    assert found["recipe"]["target"] == settings["target"]
    assert found["recipe"]["strength"] == REFERENCE[name][0]
    assert found["calibration"]["rows"] == 16  # a fifth of the documents is the dev split
    # attn_in, q_out, k_out, v_out, o_in and o_out of every pair of layers; heads of 8
    widths = {"target": 16 + 32 + 16 + 16 + 32 + 16, "source": 32 + 32 + 8 + 8 + 32 + 32}
    assert found["transport"]["neuron_problems"] == 6 * 2 * 3
    assert found["transport"]["layer_problems"] == 6
    assert found["transport"]["sites"]["k_out"] == {"count": 6, "target": 16, "source": 8}
    rows = 2 * widths["target"] + 3 * widths["source"]
    assert found["disk"]["parts"]["activations"] == 4 * (16 + 4) * rows
    assert 0 < found["disk"]["needed"] < found["disk"]["free"]
    assert found["memory"]["on_disk"] == []
    assert 700 << 20 < found["memory"]["peak"] < 1 << 30
    assert all(count > 0 for count in found["flops"].values())
    assert found["seconds"] is None


def _record(field, text):
    """A record of a dataset with a field of texts, of chats, or a prompt and a response."""
    if field == "messages":
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]
        return {"messages": turns}
    names = [field] if isinstance(field, str) else field
    return dict.fromkeys(names, text)
