"""Rebuilds the demo's assets from the interpreter's own standard library: checkpoints and texts.

``source-base`` learns general text; ``sibling`` is pruned from it and healed on general text;
``source`` is ``source-base`` fine-tuned on the domain; ``stranger`` (another family and tokenizer)
learns general text. About half an hour on 2 cores; ``--keep`` resumes after the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import demo_pruning
import demo_texts
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from ot_merge_jax.io import hf
from ot_merge_jax.models import decoder, families, specs
from ot_merge_jax.models.config import ModelConfig
from ot_merge_jax.recipes import training
from ot_merge_jax.training import loop
from ot_merge_jax.training import step as train_step
from ot_merge_jax.training.losses import Objective
from ot_merge_jax.types import Batch, Params

_LOG = logging.getLogger("train_demo_models")
_BLOCK, _BATCH, _LONGEST = 128, 16, 160  # tokens, blocks, tokens of a scored document
_AT_MOST = {"calibration": 400, "heldout": 192}  # documents that ship
_COMMON = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
_FAMILY = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "head_dim": 32,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False},
}
_SHAPE = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
]
_KEPT_LAYERS = (0, 1, 3, 5)


class Stage(NamedTuple):
    """One checkpoint: its shape, what it starts from (pruned if smaller), its text and schedule."""

    name: str
    family: str
    shape: tuple[int, ...]
    start: str | None
    text: str
    steps: int
    learning_rate: float


STAGES = (
    Stage("source-base", "llama", (2048, 192, 512, 6, 6, 3), None, "general", 800, 3e-3),
    Stage("sibling", "llama", (2048, 128, 320, 4, 4, 2), "source-base", "general", 250, 1.5e-3),
    Stage("source", "llama", (2048, 192, 512, 6, 6, 3), "source-base", "domain", 250, 1e-3),
    Stage("stranger", "qwen2", (1536, 160, 416, 3, 5, 1), None, "general", 500, 3e-3),
)


def main() -> None:
    """Builds the assets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    assets = Path(__file__).resolve().parent.parent / "ot_merge_jax" / "demo" / "assets"
    parser.add_argument(
        "--out", type=Path, default=assets, help="folder to write (default: the package's assets)"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="multiplies every number of training steps"
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the checkpoints that are already there"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    out, results = arguments.out, {}
    texts = demo_texts.read_texts(calibration=500, heldout=300)
    out.mkdir(parents=True, exist_ok=True)
    (out / "LICENSE-PSF.txt").write_text(demo_texts.licence(), encoding="utf-8")
    for stage in STAGES:
        began = time.time()
        if not (arguments.keep and (out / stage.name).is_dir()):
            with tempfile.TemporaryDirectory() as skeleton:
                steps = max(1, round(arguments.scale * stage.steps))
                build(stage, out, Path(skeleton), texts, steps=steps)
        _LOG.info("%s: %.0f s", stage.name, time.time() - began)
    readers = [
        tokenizers.Tokenizer.from_file(str(out / name / "tokenizer.json"))
        for name in ("sibling", "stranger")
    ]
    for part in ("calibration", "heldout"):
        texts[part] = [one for one in texts[part] if _is_short(one, readers)][: _AT_MOST[part]]
        demo_texts.write_jsonl(out / f"{part}.jsonl", texts[part])
    for stage in STAGES:
        cfg, params = hf.load_hf(out / stage.name, dtype=jnp.float32)
        tokenizer = tokenizers.Tokenizer.from_file(str(out / stage.name / "tokenizer.json"))
        parts = ("heldout", "general_heldout")
        results[stage.name] = {
            part: round(score(params, cfg, texts[part], tokenizer), 4) for part in parts
        }
        _LOG.info("%s: %s nats per token", stage.name, results[stage.name])
    (out / "NOTICE.md").write_text(demo_texts.notice(results), encoding="utf-8")
    _LOG.info("nats per token: %s", json.dumps(results, indent=2))


def _is_short(document: str, readers: list[tokenizers.Tokenizer]) -> bool:
    """Whether a document and its prefix fill one block at most: all batches have one shape."""
    counts = [len(one.encode(document, add_special_tokens=False).ids) for one in readers]
    return max(counts) < _BLOCK


def build(stage: Stage, out: Path, skeleton: Path, texts: demo_texts.Texts, *, steps: int) -> None:
    """Trains one checkpoint into ``out``; ``skeleton`` takes its config and tokenizer meanwhile."""
    if stage.start is None:
        every = texts["general"] + texts["domain"]
        demo_texts.save_tokenizer(skeleton, every, vocab_size=stage.shape[0], family=stage.family)
    else:
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copyfile(out / stage.start / name, skeleton / name)
    last = len(demo_texts.SPECIAL[stage.family]) - 1
    ids: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": last}
    shape = dict(zip(_SHAPE, stage.shape, strict=True))
    config = {"model_type": stage.family, **_FAMILY[stage.family], **_COMMON, **shape, **ids}
    generation = ids | {"pad_token_id": last}
    for name, data in {"config.json": config, "generation_config.json": generation}.items():
        (skeleton / name).write_text(json.dumps(data, indent=2) + "\n")
    cfg = families.read(config)
    tokenizer = tokenizers.Tokenizer.from_file(str(skeleton / "tokenizer.json"))
    documents = list(texts[stage.text])
    np.random.default_rng(0).shuffle(documents)
    encoded = tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    marked = [
        data.Marked([0, *item.ids], [True] * (1 + len(item.ids)), [False] * (1 + len(item.ids)), {})
        for item in encoded
    ]
    blocks = data.pack(marked, _BLOCK)
    if stage.start is None:
        params = specs.init(jax.random.key(0), cfg)
    else:
        start_cfg, params = hf.load_hf(out / stage.start, dtype=jnp.float32)
        if start_cfg != cfg:
            params = demo_pruning.prune(
                params, blocks.tokens[:_BATCH], cfg=start_cfg, small=cfg, layers=_KEPT_LAYERS
            )

    settings = training.resolve(
        {
            "model": stage.name, "text": {"path": stage.text}, "steps": steps, "block": _BLOCK,
            "batch_size": _BATCH, "learning_rate": stage.learning_rate, "eval_every": steps,
            "dtype": "float32",
        }
    )  # fmt: skip
    # nothing is chosen on a dev split: a few blocks stand in for it
    few = data.Blocks(*(part[:_BATCH] for part in blocks[:3]))
    problem = train_step.Problem(settings, Objective("sft", cfg), blocks, few)
    trainable, frozen = train_step.begin(problem, params, {}, {})

    def report(history: loop.TrainHistory) -> None:
        if (step := len(history.losses)) % 25 == 0:
            loss = history.losses[-1]
            _LOG.info("%s: step %d of %d, loss %.3f", stage.name, step, steps, loss)

    history = train_step.new_history(problem, trainable)
    params = loop.result(train_step.train(problem, history, frozen, on_step=report))
    shutil.rmtree(out / stage.name, ignore_errors=True)
    hf.save_hf(out / stage.name, params, cfg=cfg, like=skeleton)


def score(
    params: Params, cfg: ModelConfig, texts: list[str], tokenizer: tokenizers.Tokenizer
) -> float:
    """Mean loss in nats per token, each document alone after its opening token."""
    rows = -(-len(texts) // _BATCH) * _BATCH
    tokens, mask = np.zeros((rows, _LONGEST), np.int32), np.zeros((rows, _LONGEST), bool)
    for row, item in enumerate(tokenizer.encode_batch_fast(texts, add_special_tokens=False)):
        ids = [0, *item.ids[: _LONGEST - 1]]
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True

    @jax.jit
    def sums(tokens: jax.Array, mask: jax.Array) -> list[jax.Array]:
        none = jnp.full((_BATCH, 1), -1, jnp.int32)
        batch = Batch(tokens, mask, none, none)
        return [
            part.sum()
            for part in decoder.token_nll(decoder.forward(params, batch, cfg=cfg)[0], batch)
        ]

    parts = [sums(tokens[i : i + _BATCH], mask[i : i + _BATCH]) for i in range(0, rows, _BATCH)]
    loss, count = np.sum(np.asarray(parts), 0)
    return float(loss / count)


if __name__ == "__main__":
    main()
