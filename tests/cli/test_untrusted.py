"""Inputs that are odd or hostile and must do no harm to a run that succeeds all the same."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import output_contract
import pytest
import safetensors.numpy
import yaml
from bombs import ALIASES
from desk import SINGLE
from published import report_of

from ot_merge_jax import load_hf
from ot_merge_jax.models.generation import generate

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"
HOSTILE_NAME = "<script>alert(1)<&script> `x` [a](b) | --- #\n---\nlicense: mit\n*"


@pytest.fixture
def succeeds(cli):
    """``succeeds(arguments)`` -> what was called; fails with its errors."""

    def run(arguments):
        called = cli(*arguments)
        assert called.code == 0, called.err
        return called

    return run


@pytest.mark.catalogue("hostile-names")
def test_hostile_names_stay_text_in_the_card(desk, succeeds):
    """As HTML, Markdown and YAML; the command stands in a fence of its own."""
    source = desk.copy("llama-source", HOSTILE_NAME.replace("/", ""))
    succeeds(desk.run(source=source))
    card = (desk.out / "README.md").read_text(encoding="utf-8")
    _, front, rest = card.split("---\n", 2)
    found = yaml.safe_load(front)
    assert found["base_model"] == ["copy", " ".join(source.name.split())]
    assert found["license"] == "other"
    outside = "".join(rest.split("```")[0])
    assert "<script>" not in outside
    assert "[a](b)" not in outside
    assert "`x`" not in outside.replace("\\`", "")
    title = next(line for line in outside.splitlines() if line.startswith("# "))
    assert title.count("|") == title.count("\\|") == 1
    rows = [line for line in outside.splitlines() if line.startswith("| source ")]
    assert len(rows) == 1
    assert rows[0].replace("\\|", "").count("|") == 4


@pytest.mark.catalogue("hostile-names")
def test_code_fences_of_the_card_hold_their_content(desk, succeeds):
    out = desk.folder / "a ```` b"
    succeeds(desk.run(out=out))
    card = (out / "README.md").read_text(encoding="utf-8")
    fence = max((line for line in card.splitlines() if set(line) == {"`"}), key=len)
    assert len(fence) == 5
    assert "a ```` b" in card.split(fence)[1]


@pytest.mark.catalogue("secrets")
def test_secrets_are_in_no_output_and_no_log(desk, succeeds, monkeypatch):
    """The user's token in the environment and in a path, another in the target's own config."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = desk.folder / f"logged-in-as-{TOKEN}"
    folder.mkdir()
    calibration = shutil.copy(desk.calibration, folder / "texts.txt")
    target = shutil.copytree(desk.target, folder / "target")
    desk.edit_config(target, _name_or_path=f"https://me:{TOKEN}@huggingface.co/o/n")
    called = succeeds(desk.run("--verbose", calibration=calibration, target=target))
    assert "load " in called.err
    assert TOKEN not in called.out + called.err
    written = [path for path in desk.out.rglob("*") if path.is_file()]
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]


@pytest.mark.catalogue("hostile-template")
def test_hostile_chat_template_is_copied_and_not_rendered(desk, succeeds):
    template = b"{% for i in range(10**9) %}{{ ''.__class__ }}{% endfor %}\r\n"
    (desk.target / "chat_template.jinja").write_bytes(template)
    succeeds(desk.run(eval_text=desk.heldout))
    assert (desk.out / "chat_template.jinja").read_bytes() == template


@pytest.mark.catalogue("hostile-yaml")
def test_bombs_in_a_card_are_no_licence(desk, succeeds):
    """The card of an input is only asked for its licence."""
    (desk.target / "README.md").write_text(f"---\n{ALIASES}license: *i\n---\n")
    source = desk.copy("llama-source", "source")
    with (source / "README.md").open("w") as file:
        file.truncate(50_000_000)  # sparse
    succeeds(desk.run(source=source))
    front = (desk.out / "README.md").read_text().split("---\n")[1]
    assert yaml.safe_load(front)["license"] == "other"


@pytest.mark.catalogue("source-is-target")
def test_a_model_merged_with_itself(desk, succeeds):
    succeeds(desk.run(source=desk.target))
    output_contract.has_tensors_of_the_names_shapes_and_dtypes_of_the_target(
        output_contract.Folders(desk.out, desk.target, desk.target)
    )


@pytest.mark.catalogue("vocabulary-padding")
def test_added_tokens_within_the_rows_are_kept(desk, succeeds):
    path = desk.target / "tokenizer.json"
    state = json.loads(path.read_text())
    settings = dict(state["added_tokens"][0], special=False)
    state["added_tokens"] += [
        settings | {"id": 300 + number, "content": f"<added {number}>"} for number in range(3)
    ]
    path.write_text(json.dumps(state))
    succeeds(desk.run(weights="down,embed", rows="sample"))
    output_contract.check(
        output_contract.Folders(desk.out, desk.target, desk.models["llama-source"])
    )


@pytest.mark.catalogue("template-differences")
def test_the_output_stops_at_the_eos_of_the_target(desk, succeeds, models):
    """Where target and source end texts with other ids, and speak other tokenizers."""
    source = models["qwen2-source"]
    stops = [
        json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        for folder in (desk.target, source)
    ]
    assert stops[0] != stops[1]

    def says_only_the_end(tensors):
        tensors["model.norm.weight"][:] = 0
        tensors["model.norm.weight"][0] = 1
        tensors["model.embed_tokens.weight"][:, 0] = 50
        tensors["lm_head.weight"][:] = 0
        tensors["lm_head.weight"][stops[0], 0] = 1

    desk.edit_tensors(says_only_the_end)
    succeeds(desk.run(source=source, weights="down", strength="0.01"))
    eos = json.loads((desk.out / "generation_config.json").read_text())["eos_token_id"]
    assert eos == stops[0]
    cfg, params = load_hf(desk.out, dtype=jnp.float32)
    tokens = jnp.array([[5, 6, 7]])
    new = generate(params, tokens, tokens > 0, cfg=cfg, max_new_tokens=6, stop=[eos])
    assert np.asarray(new).tolist() == [[eos] * 6]


SHAPES = {
    "narrowest": (
        {"hidden": 1, "heads": 1, "kv_heads": 1, "head_dim": 2, "intermediate": 1, "layers": 1},
        {"hidden": 2, "heads": 2, "kv_heads": 1, "head_dim": 2, "intermediate": 3, "layers": 2},
    ),
    "shallow from deep": (
        {"hidden": 6, "heads": 2, "kv_heads": 1, "head_dim": 4, "intermediate": 5, "layers": 2},
        {"hidden": 4, "heads": 1, "kv_heads": 1, "head_dim": 4, "intermediate": 3, "layers": 48},
    ),
}


@pytest.mark.catalogue("extreme-shapes")
@pytest.mark.parametrize(
    ("name", "preset"),
    [("narrowest", "barycentric"), ("narrowest", "paper"), ("shallow from deep", "barycentric")],
)
def test_extreme_shapes(name, preset, desk, succeeds, tiny_checkpoint):
    target, source = (tiny_checkpoint("llama", **sizes) for sizes in SHAPES[name])
    k = {"k": "1"} if preset == "paper" else {}
    succeeds(desk.run(preset=preset, target=target, source=source, **k))
    output_contract.check(output_contract.Folders(desk.out, target, source))


@pytest.mark.catalogue("constant-activations")
def test_constant_activations_of_a_whole_layer(desk, succeeds):
    """Nothing correlates with them: the plan is flat, the numbers stay finite."""

    def silence(tensors):
        for name, one in tensors.items():
            if ".layers.1." in name and name.endswith("proj.weight"):
                one[:] = 0

    desk.edit_tensors(silence)
    succeeds(desk.run("--json"))
    assert report_of(desk.out).weights["down"].converged == [True, True]
    found = safetensors.numpy.load_file(desk.out / SINGLE)
    assert all(np.isfinite(one).all() for one in found.values())
