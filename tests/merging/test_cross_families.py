"""Every family as target and as source: transformers gives our logits on what is published, and the
folder is what the output contract says. The presets take turns; all pairs of all presets are slow.

Compiling is nearly all of the time, so a family has one size as a target and one as a source, and
all presets read the same rows and move all that they can: then their activations, of all families
by far the most to compile, are those of one program. What the presets do with rows and weights of
their own is tested in `tests/cli`.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import output_contract
import pytest
from tokenizers import Tokenizer

from ot_merge_jax import forward, load_hf
from ot_merge_jax.models.families import FAMILIES
from ot_merge_jax.recipes import loading, presets
from ot_merge_jax.runs import merge
from ot_merge_jax.types import Batch

NAMES = list(FAMILIES)
TARGET = {"hidden": 24, "heads": 4, "kv_heads": 2, "intermediate": 40, "layers": 2}
SOURCE = {"hidden": 36, "heads": 6, "kv_heads": 3, "intermediate": 56, "layers": 3}
#: Preset -> how far along the ring of families the source is: no pair is merged twice.
STEPS = {"paper": 1, "barycentric": 3, "delta": 7}
PROJECTIONS = ["q", "k", "v", "o", "gate", "up", "down"]
#: Few enough to leave no dev split, whose rows would compile once more.
DOCUMENTS = 2
PAIRS = [
    (preset, target, NAMES[(place + step) % len(NAMES)])
    for place, target in enumerate(NAMES)
    for preset, step in STEPS.items()
]


#: The preset of each target in the default run: then each family is a source once too.
TURNS = 3 * ["paper"] + ["delta"] + 3 * ["barycentric"] + 3 * ["delta"]
DEFAULT = [pair for pair in PAIRS if pair[0] == TURNS[NAMES.index(pair[1])]]


def test_every_family_is_target_and_source_of_every_preset():
    for preset in presets.PRESETS:
        pairs = [(target, source) for one, target, source in PAIRS if one == preset]
        assert [sorted(side) for side in zip(*pairs, strict=True)] == [sorted(NAMES)] * 2
        assert all(target != source for target, source in pairs)
    assert len({pair[1:] for pair in PAIRS}) == len(PAIRS)
    assert [sorted(side) for side in list(zip(*DEFAULT, strict=True))[1:]] == [sorted(NAMES)] * 2
    assert {pair[0] for pair in DEFAULT} == presets.PRESETS.keys()


@pytest.fixture(scope="module")
def text(tmp_path_factory, texts, tokenizer_folder):
    """A file of documents that all have 17 to 32 tokens, whatever the tokenizer."""
    readers = [
        Tokenizer.from_file(str(tokenizer_folder(kind) / "tokenizer.json"))
        for kind in ("bpe", "qwen", "metaspace")
    ]
    found, words = [], []
    for word in " ".join(texts).split():
        words.append(word)
        lengths = [len(one.encode(" ".join(words)).ids) for one in readers]
        if max(lengths) > 32:
            words = []
        elif min(lengths) > 16:
            found.append(" ".join(words))
            words = []
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(found[:DOCUMENTS]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    """``model(family, role)`` -> folder; the tokenizers of target and source always differ."""

    def make(family, role):
        is_target = role == "target"
        kind = "qwen" if family == "qwen2" else "bpe" if is_target else "metaspace"
        return tiny_checkpoint(
            family,
            tokenizer=kind,
            tied=(NAMES.index(family) % 2 == 0) == is_target,
            vocab_size=384 if is_target else 400,
            drift=0.1 if role == "source" else 0.0,
            **(TARGET if is_target else SOURCE),
        )

    return make


@pytest.mark.torch
@pytest.mark.parametrize(
    ("preset", "target", "source"),
    [pytest.param(*pair, marks=() if pair in DEFAULT else pytest.mark.slow) for pair in PAIRS],
)
def test_published_folder(preset, target, source, model, text, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    settings = {
        "preset": preset,
        "target": str(model(target, "target")),
        "source": str(model(source, "source")),
        "calibration": str(text),
        "strength": 0.3,
        "rows": "span",
        "weights": [*PROJECTIONS, *(["embed", "head"] if preset == "delta" else [])],
    }
    if preset == "delta":
        settings["source_base"] = str(model(source, "source base"))
    out = tmp_path / "out"
    found = merge.run(
        loading.resolve(settings), out, command=f"ot-merge run --preset {preset} --out out"
    )
    assert found.report.calibration["rows"] > 20
    folders = output_contract.Folders(out, Path(settings["target"]), Path(settings["source"]))
    output_contract.check(folders)

    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    cfg, params = load_hf(out, dtype=jnp.float32)
    # the shape of the pipeline's own check of what it wrote, which has compiled it
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, 16)).astype(np.int32)
    mask, row = np.ones(tokens.shape, bool), np.zeros((1, 1), np.int32)
    ours = jax.jit(forward, static_argnames="cfg")(params, Batch(tokens, mask, row, row), cfg=cfg)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(np.asarray(ours[0]), expected, rtol=0, atol=1e-4)
    before = load_hf(folders.target, dtype=jnp.float32)[1]
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(params), strict=True)
    )
