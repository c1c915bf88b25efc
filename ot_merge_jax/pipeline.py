"""A whole run: folders and texts in, one published folder out. Strings the stages; no maths.

Everything is checked that can be checked without reading weights before any weight is read.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from ot_merge_jax import calibration, fuse, merge, staged
from ot_merge_jax import sweep as sweeps
from ot_merge_jax.config import ModelConfig
from ot_merge_jax.errors import InputError, StrictError
from ot_merge_jax.evaluate import compare, nll
from ot_merge_jax.io import details, hf, provenance, publish, stages
from ot_merge_jax.io.folder import ModelFolder, open_folder
from ot_merge_jax.models.decoder import forward
from ot_merge_jax.recipe import Recipe, Text
from ot_merge_jax.report import facts
from ot_merge_jax.spaces import VOCABULARY
from ot_merge_jax.transport import vocabulary as vocabularies
from ot_merge_jax.types import (
    HParams,
    MergeReport,
    MergeSpec,
    Params,
    VocabularyMatch,
)

_LOG = logging.getLogger(__name__)
_HELD_OUT_ROWS = 1024


class RunResult(NamedTuple):
    """What a run found.

    Attributes:
        out: The published folder.
        report: What ``report.json`` holds.
        merge: Diagnostics of the merge.
        warnings: Sentences for the user.
    """

    out: Path
    report: dict[str, Any]
    merge: MergeReport
    warnings: list[str]


class Inputs(NamedTuple):
    """Everything that was checked before weights are read.

    Attributes:
        folders: Role (``target``, ``source``, ``source base``) -> folder.
        tokenizers: Role -> tokenizer.
        texts: Documents that give rows.
        dev: Documents that choose the strength.
        held_out: Documents that are reported, or None.
        data: Row-aligned batches of the calibration texts.
        held_out_data: The same of the dev split, for held-out diagnostics; None if it is too small.
        is_one_tokenizer: Whether target and source share a tokenizer.
    """

    folders: dict[str, ModelFolder]
    tokenizers: dict[str, Any]
    texts: list[str]
    dev: list[str]
    held_out: list[str] | None
    data: calibration.Calibration
    held_out_data: calibration.Calibration | None
    is_one_tokenizer: bool


def run(
    recipe: Recipe,
    out: Path,
    *,
    command: str,
    overwrite: bool = False,
    resume: bool = False,
    keep: bool = True,
    strict: bool = False,
    mesh: jax.sharding.Mesh | None = None,
) -> RunResult:
    """Merges two folders into a third and publishes it atomically.

    Args:
        recipe: The resolved recipe.
        out: The folder to write; absent, or empty, unless ``overwrite``.
        command: What the user typed, for the card and the provenance.
        overwrite: Whether an existing folder is replaced.
        resume: Whether the finished stages of an earlier run of the same settings, inputs and
            versions are used, after their hashes have been checked.
        keep: Whether a run that is interrupted, or finds the disk or the memory full, keeps its
            finished stages beside ``out``.
        strict: Whether a solver that did not converge, or a worse verdict, is an error.
        mesh: Where models and batches live; None: one device.

    Returns:
        What was found. ``out`` is a Hugging Face folder with the details in ``ot_merge/``.

    Raises:
        OtMergeError: with an exit code; nothing has been written then, but for the stages of a
            `ResourceError`.
        KeyboardInterrupt: saying how to resume.
    """
    started = time.monotonic()
    inputs = check(recipe, out, overwrite=overwrite or resume)
    models = {role: one.path for role, one in inputs.folders.items()}
    texts = {name: Path(text.path).expanduser() for name, text in _texts(recipe).items()}
    side = details.inputs(models, texts)
    key = stages.key({"recipe": recipe.to_yaml(), "versions": _versions(), **side})
    side = {"run": key, "command": command, **side}
    with publish.locked(out):
        if resume and (done := details.read(out, key)):
            _LOG.info("resume: %s is finished", out)
            stages.clear(out, key)
            return RunResult(out, *done, done[0]["warnings"])
        with stages.run_folder(
            out, key, command=command, resume=resume, overwrite=overwrite, keep=keep
        ) as state:
            return _merge(
                state, recipe, inputs, out, side, strict=strict, mesh=mesh, started=started
            )


def _merge(
    state: stages.Run,
    recipe: Recipe,
    inputs: Inputs,
    out: Path,
    side: dict[str, Any],
    *,
    strict: bool,
    mesh: jax.sharding.Mesh | None,
    started: float,
) -> RunResult:
    """The stages of a run, up to the folder that is published."""
    spec, hparams = recipe.spec(), recipe.hparams()

    @functools.cache
    def models(role: str) -> merge.Model:
        return _load(inputs.folders[role], mesh)

    has_base = "source base" in inputs.folders
    _LOG.info("transport: %s", ", ".join(spec.weights))
    prepared = staged.prepare(
        state, models, inputs.data, hparams,
        spec=spec, has_base=has_base, vocabulary=_vocabulary(recipe, inputs),
    )  # fmt: skip
    site_facts = staged.site_facts(
        state, models, prepared, inputs.held_out_data,
        spec=spec, has_base=has_base, seed=recipe.seed,
    )  # fmt: skip
    points: list[sweeps.Point] = []
    if recipe.strength == "auto":
        points, hparams = staged.strength(
            state, models, prepared, lambda: _dev_windows(inputs), hparams, spec=spec
        )
    model = stages.stage(
        state,
        "model",
        lambda folder: _write_model(folder, inputs, models("target"), prepared, hparams, spec),
        lambda folder: folder,
        needs=["moved", *(["sweep"] if points else [])],
        folder=stages.MODEL,
    )
    report = merge.describe(models("target"), prepared, hparams, spec=spec)
    warnings = _warnings(report)
    evaluation, change = _evaluate(state, inputs, models, model, recipe)
    verdict = facts.verdict(
        is_nothing=merge.is_nothing_transferred(report, hparams),
        strength=hparams.strength,
        is_auto=recipe.strength == "auto",
        rule=recipe.rule,
        change=change,
    )
    if strict and (warnings or verdict.startswith("worse")):
        raise StrictError(f"--strict: {(warnings or [verdict])[0]}")
    found = facts.plain(
        {
            "verdict": verdict,
            "warnings": warnings,
            "controls": {name: evaluation[name] for name in ("target", "source") if evaluation},
            "evaluation": evaluation,
            "strength": {"chosen": hparams.strength, "tried": points},
            "weights": facts.weights(report),
            "sites": site_facts,
            "calibration": _calibration_facts(inputs, recipe),
            "settings": yaml.safe_load(provenance.without_home(recipe.to_yaml())),
        }
    )
    stages.stage(
        state,
        "details",
        lambda folder: details.write(
            folder,
            recipe=recipe,
            models={role: one.path for role, one in inputs.folders.items()},
            coupling=prepared.coupling,
            found=found,
            side=side,
            started=started,
        ),
        lambda folder: folder,
        needs=list(state.finished),
        folder=stages.MODEL,
    )
    return RunResult(out, found, report, warnings)


def _versions() -> list[str]:
    """What else than settings and inputs decides the numbers."""
    return [importlib.metadata.version(name) for name in ("ot-merge-jax", "jax")]


def check(recipe: Recipe, out: Path, *, overwrite: bool) -> Inputs:
    """Checks folders, tokenizers and texts, and tokenises; reads no weights."""
    paths = {"target": recipe.target, "source": recipe.source, "source base": recipe.source_base}
    paths = {role: Path(path).expanduser() for role, path in paths.items() if path is not None}
    texts = {name: Path(text.path).expanduser() for name, text in _texts(recipe).items()}
    publish.check_output(out, inputs=[*paths.values(), *texts.values()], overwrite=overwrite)
    folders = {role: open_folder(path) for role, path in paths.items()}
    if "source base" in folders:
        merge.check_base((folders["source"].cfg, {}), (folders["source base"].cfg, {}))
    tokenizers = {role: calibration.load_tokenizer(folder.path) for role, folder in folders.items()}
    for role, tokenizer in tokenizers.items():
        if len(tokenizer) > folders[role].cfg.vocab_size:
            raise InputError(
                f"The tokenizer of {folders[role].path} has {len(tokenizer)} tokens but the model "
                f"has {folders[role].cfg.vocab_size} rows; one of them is not its own."
            )
    documents = _sampled(recipe)
    train, dev = calibration.split(documents, seed=recipe.seed)
    held_out = None if recipe.evaluation is None else _documents(recipe.evaluation)
    if not documents:
        raise InputError(f"{recipe.calibration.path} has 0 documents; add text.")
    if recipe.strength == "auto" and not dev:
        raise InputError(
            f"{recipe.calibration.path} has too few documents ({len(documents)}) for a dev split; "
            f"add text or give a strength."
        )
    both = tokenizers["target"], tokenizers["source"]
    is_one = calibration.is_same_tokenizer(*both, documents)
    if "source base" in tokenizers and not calibration.is_same_tokenizer(
        tokenizers["source base"], tokenizers["source"], documents
    ):
        raise InputError(
            "Source and source base have different tokenizers; give the right checkpoint."
        )
    if set(recipe.weights) & set(VOCABULARY) and not is_one:
        raise InputError(
            "Moving embed or head needs identical tokenizers, and those of target "
            "and source differ; "
            "leave them out of weights."
        )
    settings = {
        "rows": recipe.rows,
        "max_length": min(recipe.max_length, *(f.cfg.max_positions for f in folders.values())),
        "seed": recipe.seed,
    }
    data = calibration.align(train, *both, max_rows=recipe.max_rows, **settings)
    try:
        unseen = calibration.align(dev, *both, max_rows=_HELD_OUT_ROWS, **settings)
    except InputError:
        unseen = None  # too few dev documents for held-out diagnostics
    return Inputs(folders, tokenizers, train, dev, held_out, data, unseen, is_one)


def _texts(recipe: Recipe) -> dict[str, Text]:
    """The texts a recipe reads."""
    texts: dict[str, Text] = {"calibration": recipe.calibration}
    return texts if recipe.evaluation is None else texts | {"evaluation": recipe.evaluation}


def _sampled(recipe: Recipe) -> list[str]:
    """The seeded sample of the calibration text: rows and dev split together."""
    text = recipe.calibration
    count = round(text.samples / (1 - calibration.DEV_FRACTION))
    lines = calibration.read_documents(
        Path(text.path).expanduser(), field=text.field, encoding=text.encoding
    )
    return calibration.sample(lines, count=count, seed=recipe.seed)


def _documents(text: Text) -> list[str]:
    """All documents of a text; InputError if there are none."""
    path = Path(text.path).expanduser()
    documents = list(calibration.read_documents(path, field=text.field, encoding=text.encoding))
    if not documents:
        raise InputError(f"{text.path} has 0 documents; add text.")
    return documents


def _load(folder: ModelFolder, mesh: jax.sharding.Mesh | None) -> tuple[ModelConfig, Params]:
    """A model in float32."""
    _LOG.info("load %s", folder.path)
    return hf.load_hf(folder.path, mesh=mesh, dtype=jnp.float32)


def _vocabulary(recipe: Recipe, inputs: Inputs) -> VocabularyMatch | None:
    """Matched tokens, weighted as the recipe says, if the vocabulary moves."""
    if not set(recipe.weights) & set(VOCABULARY):
        return None
    tokens = {
        role: calibration.vocabulary(
            inputs.tokenizers[role], size=inputs.folders[role].cfg.vocab_size
        )
        for role in ("target", "source")
    }
    matched = vocabularies.match(tokens["target"], tokens["source"])
    if recipe.vocabulary_weights == "uniform":
        return matched
    encoded = calibration.encode(
        inputs.tokenizers["target"], inputs.texts, max_length=recipe.max_length
    )
    counts = Counter(token for one in encoded for token in one.ids)
    weights = np.array([counts[int(token)] for token in matched.target_ids], np.float32)
    return matched._replace(weights=jnp.asarray(weights))


def _dev_windows(inputs: Inputs) -> nll.Windows:
    """The dev split, ready to be scored by the target."""
    longest = inputs.folders["target"].cfg.max_positions
    return nll.windows(inputs.dev, inputs.tokenizers["target"], max_positions=longest)


def _write_model(
    folder: Path,
    inputs: Inputs,
    target: merge.Model,
    prepared: merge.Prepared,
    hparams: HParams,
    spec: MergeSpec,
) -> None:
    """The fused parameters as a Hugging Face folder, read back and tried."""
    fused = fuse.fuse(target[1], prepared.moved, hparams.strength, spec=spec, mask=prepared.masks)
    hf.write_model(folder, fused, cfg=target[0], like=inputs.folders["target"].path)
    _self_check(folder, fused)


def _warnings(report: MergeReport) -> list[str]:
    """Sentences about plans that did not converge."""
    return [
        f"{name}: the neuron transport did not converge in "
        f"{int(np.sum(~np.asarray(one.converged)))} "
        f"of {len(one.converged)} layers (largest marginal error {float(np.max(one.error)):.1e}); "
        f"raise epsilon or max_iterations."
        for name, one in report.weights.items()
        if not np.all(one.converged)
    ]


def _self_check(folder: Path, fused: Params) -> None:
    """Reads the written folder back: parameters, tokenizer, one forward pass."""
    cfg, written = hf.load_hf(folder)
    merged, written = (jax.tree.map(np.asarray, tree) for tree in (fused, written))
    same = jax.tree.map(lambda a, b: np.array_equal(a.astype(b.dtype), b), merged, written)
    if not jax.tree.all(same):
        raise OSError(f"{folder} does not hold the merged parameters; check the disk.")
    calibration.load_tokenizer(folder)
    tokens = calibration.batches([[0, 1 % cfg.vocab_size]], [([-1], [0])])[0]
    written = jax.tree.map(lambda leaf: jnp.asarray(leaf.astype(np.float32)), written)
    logits = jax.jit(forward, static_argnames="cfg")(written, tokens, cfg=cfg)[0]
    if not np.isfinite(np.asarray(logits)[0, :2]).all():
        raise OSError(f"{folder} was written, but its logits are not finite; report this as a bug.")


def _evaluate(
    state: stages.Run, inputs: Inputs, models: staged.Models, merged: Path, recipe: Recipe
) -> tuple[dict[str, Any], compare.Difference | None]:
    """Loss of every model on the held-out text, and merge minus target."""
    texts = inputs.held_out
    if texts is None:
        return {}, None
    roles = ("target", "merge", "source")

    def one(role: str) -> nll.Scores:
        cfg, params = hf.load_hf(merged, dtype=jnp.float32) if role == "merge" else models(role)
        tokenizer = inputs.tokenizers["source" if role == "source" else "target"]
        return nll.score(
            params, nll.windows(texts, tokenizer, max_positions=cfg.max_positions), cfg=cfg
        )

    read = staged.scores(state, lambda: {role: one(role) for role in roles})
    scores = {role: read[role] for role in roles}
    same = {"merge": True, "source": inputs.is_one_tokenizer}
    change = compare.paired_bootstrap(scores["merge"], scores["target"], seed=recipe.seed)
    return facts.compared(scores, has_one_tokenizer=same, seed=recipe.seed), change


def _calibration_facts(inputs: Inputs, recipe: Recipe) -> dict[str, Any]:
    """What the rows were made from."""
    return {
        "documents": inputs.data.documents,
        "dev_documents": len(inputs.dev),
        "target_tokens": inputs.data.target_tokens,
        "source_tokens": inputs.data.source_tokens,
        "rows": inputs.data.rows,
        "rows_are": recipe.rows,
    }


def evaluate(paths: Sequence[str], text: Text, *, seed: int = 0) -> dict[str, Any]:
    """Scores models on a text and compares every pair.

    Args:
        paths: Model folders, as typed; they are the keys of the result.
        text: The held-out text.
        seed: Of the bootstrap.

    Returns:
        ``{"models": {path: {documents, tokens, nll_per_token, bits_per_byte}}, "pairs": [{a, b,
        metric, difference, low, high}]}``; ``difference`` is ``a`` minus ``b``, in nats per token,
        or in bits per byte where the two tokenizers differ.
    """
    documents = _documents(text)
    scores, tokenizers = {}, {}
    for path in dict.fromkeys(paths):
        folder = open_folder(Path(path).expanduser())
        tokenizers[path] = calibration.load_tokenizer(folder.path)
        cfg, params = _load(folder, None)
        cut = nll.windows(documents, tokenizers[path], max_positions=cfg.max_positions)
        scores[path] = nll.score(params, cut, cfg=cfg)
    pairs = []
    names = list(scores)
    for index, a in enumerate(names):
        for b in names[index + 1 :]:
            is_one = calibration.is_same_tokenizer(tokenizers[a], tokenizers[b], documents)
            metric = "nll_per_token" if is_one else "bits_per_byte"
            change = compare.paired_bootstrap(scores[a], scores[b], metric=metric, seed=seed)
            pairs.append({"a": a, "b": b, "metric": metric, **change._asdict()})
    models = {
        name: {
            "documents": len(one.tokens),
            "tokens": int(one.tokens.sum()),
            "nll_per_token": one.nll_per_token,
            "bits_per_byte": one.bits_per_byte,
        }
        for name, one in scores.items()
    }
    return {"models": models, "pairs": pairs}
