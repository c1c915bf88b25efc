"""A whole run: folders and texts in, one published folder out. Strings the stages; no maths.

Everything is checked that can be checked without reading weights before any weight is read.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from ot_merge_jax import calibration, fuse, merge, spelling, texts
from ot_merge_jax import sweep as sweeps
from ot_merge_jax.activations import gather
from ot_merge_jax.config import ModelConfig
from ot_merge_jax.errors import InputError, StrictError
from ot_merge_jax.evaluate import compare, nll
from ot_merge_jax.io import checkpoint, hf, provenance, publish, records
from ot_merge_jax.io.folder import ModelFolder, open_folder
from ot_merge_jax.models.decoder import forward
from ot_merge_jax.recipe import Recipe, Text
from ot_merge_jax.report import facts
from ot_merge_jax.spaces import VOCABULARY, sites_of
from ot_merge_jax.texts import Document
from ot_merge_jax.types import MergeReport, Params, VocabularyMatch

_LOG = logging.getLogger(__name__)
_HELD_OUT_ROWS = 1024
_WEIGHT_FILES = ("*.safetensors", "*.json", "tokenizer.model")


class RunResult(NamedTuple):
    """What a run found.

    Attributes:
        out: The published folder.
        report: What ``report.json`` holds.
        merge: Diagnostics of the merge.
        warnings: Sentences for the user.
        scores: Role -> scores on the held-out text; empty without one.
    """

    out: Path
    report: dict[str, Any]
    merge: MergeReport
    warnings: list[str]
    scores: dict[str, nll.Scores]


class Inputs(NamedTuple):
    """Everything that was checked before weights are read.

    Attributes:
        recipe: The recipe with ``rows`` decided.
        folders: Role (``target``, ``source``, ``source base``) -> folder.
        tokenizers: Role -> tokenizer.
        texts: Documents that give rows.
        dev: Documents that choose the strength.
        held_out: Documents that are reported, or None.
        sources: Name of a text (``calibration``, ``evaluation``) -> where it comes from.
        data: Row-aligned batches of the calibration texts.
        held_out_data: The same of the dev split, for held-out diagnostics; None if it is too small.
        is_one_tokenizer: Whether target and source share a tokenizer.
        vocabulary: Matched tokens, if the vocabulary moves.
    """

    recipe: Recipe
    folders: dict[str, ModelFolder]
    tokenizers: dict[str, Any]
    texts: list[Document]
    dev: list[Document]
    held_out: list[Document] | None
    sources: dict[str, records.Source]
    data: calibration.Calibration
    held_out_data: calibration.Calibration | None
    is_one_tokenizer: bool
    vocabulary: VocabularyMatch | None


def run(
    recipe: Recipe,
    out: Path,
    *,
    command: str,
    overwrite: bool = False,
    strict: bool = False,
    offline: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    known: Mapping[str, nll.Scores] | None = None,
    show: Callable[[Recipe], None] | None = None,
) -> RunResult:
    """Merges two folders into a third and publishes it atomically.

    Args:
        recipe: The resolved recipe.
        out: The folder to write; absent, or empty, unless ``overwrite``.
        command: What the user typed, for the card and the provenance.
        overwrite: Whether an existing folder is replaced.
        strict: Whether a solver that did not converge, or a worse verdict, is an error.
        offline: Whether the network is forbidden; the hub's local cache is used all the same.
        mesh: Where models and batches live; None: one device.
        known: Role -> scores on the held-out text from an earlier run with the same model and text;
            they are not computed again.
        show: Called with the recipe once everything in it is decided, before weights are read.

    Returns:
        What was found. ``out`` is a Hugging Face folder with the details in ``ot_merge/``.

    Raises:
        OtMergeError: with an exit code; nothing has been written then.
    """
    started = time.monotonic()
    inputs = check(recipe, out, overwrite=overwrite, offline=offline)
    recipe = inputs.recipe
    if show is not None:
        show(recipe)
    _log_matches(inputs)
    spec, hparams = recipe.spec(), recipe.hparams()
    models = {role: _load(folder, mesh) for role, folder in inputs.folders.items()}
    target, source, base = models["target"], models["source"], models.get("source base")
    _LOG.info("transport: %s", ", ".join(spec.weights))
    prepared = merge.prepare(
        target,
        source,
        (inputs.data.target, inputs.data.source),
        hparams,
        spec=spec,
        source_base=base,
        vocabulary=inputs.vocabulary,
    )
    unseen = _held_out_activations(inputs, target, base or source, spec)
    site_facts = facts.sites(prepared, unseen, spec=spec, seed=recipe.seed)
    points: list[sweeps.Point] = []
    if recipe.strength == "auto":
        cut = nll.windows(
            inputs.dev, inputs.tokenizers["target"], max_positions=target[0].max_positions
        )
        points, hparams = sweeps.sweep(target, prepared, cut, hparams, spec=spec)
    fused = fuse.fuse(target[1], prepared.moved, hparams.strength, spec=spec, mask=prepared.masks)
    report = merge.describe(target, prepared, hparams, spec=spec)
    unconverged = _unconverged(report)
    warnings = [*unconverged, *sweeps.at_the_edge(points, hparams)]
    with publish.atomic_folder(out, overwrite=overwrite) as partial:
        hf.write_model(partial, fused, cfg=target[0], like=inputs.folders["target"].path)
        written = _self_check(partial, fused)
        models["merge"] = target[0], written
        scores, evaluation, change = _evaluate(inputs, models, known or {})
        verdict = facts.verdict(report, hparams, spec, change, is_auto=recipe.strength == "auto")
        if strict and (unconverged or (change and change.low > 0)):
            raise StrictError(f"--strict: {(unconverged or [verdict])[0]}")
        found = {
            "verdict": verdict,
            "warnings": warnings,
            "controls": {name: evaluation[name] for name in ("target", "source") if evaluation},
            "evaluation": evaluation,
            "strength": {"chosen": hparams.strength, "tried": points},
            "weights": facts.weights(report),
            "sites": site_facts,
            "calibration": _calibration_facts(inputs, recipe),
            "settings": yaml.safe_load(provenance.public(recipe.to_yaml())),
        }
        _write_details(partial, recipe, inputs, prepared, facts.plain(found), command, started)
    return RunResult(out, facts.plain(found), report, warnings, scores)


def check(recipe: Recipe, out: Path, *, overwrite: bool, offline: bool = False) -> Inputs:
    """Checks folders, tokenizers and texts, and tokenises; reads no weights.

    What is named by a hub id is fetched first, weights too; this is all that uses the network.
    """
    paths = {"target": recipe.target, "source": recipe.source, "source base": recipe.source_base}
    paths = {role: path for role, path in paths.items() if path is not None}
    named = [*paths.values(), *(text.path for text in _texts(recipe).values())]
    local = [path for one in named if (path := Path(one).expanduser()).exists()]
    publish.check_output(out, inputs=local, overwrite=overwrite)
    sources = {
        name: records.locate(text.path, offline=offline) for name, text in _texts(recipe).items()
    }
    folders = {role: open_folder(path, offline=offline) for role, path in paths.items()}
    if "source base" in folders:
        merge.check_base((folders["source"].cfg, {}), (folders["source base"].cfg, {}))
    tokenizers = {role: _tokenizer(folder) for role, folder in folders.items()}
    documents = _sampled(recipe, sources["calibration"])
    train, dev = texts.split(documents, seed=recipe.seed)
    held_out = None
    if recipe.evaluation is not None:
        held_out = _documents(recipe.evaluation, sources["evaluation"])
    if not documents:
        raise InputError(f"{recipe.calibration.path} has 0 documents; add text.")
    if recipe.strength == "auto" and not dev:
        raise InputError(
            f"{recipe.calibration.path} has too few documents ({len(documents)}) for a dev split; "
            f"add text or give a strength."
        )
    both = tokenizers["target"], tokenizers["source"]
    is_one = calibration.is_same_tokenizer(*both, documents)
    # a base often has no chat template: it reads what the source's own template writes
    as_source = [texts.render(one, tokenizers["source"]).text for one in documents]
    if "source base" in tokenizers and not calibration.is_same_tokenizer(
        tokenizers["source base"], tokenizers["source"], as_source
    ):
        raise InputError(
            "Source and source base have different tokenizers; give the right checkpoint."
        )
    if recipe.rows == "auto":
        recipe = recipe.model_copy(update={"rows": "token" if is_one else "span"})
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
    matched = None
    if set(recipe.weights) & set(VOCABULARY):
        matched = _vocabulary(recipe, folders, tokenizers, train, is_one=is_one)
    return Inputs(
        recipe, folders, tokenizers, train, dev, held_out, sources, data, unseen, is_one, matched
    )


def _tokenizer(folder: ModelFolder) -> Any:
    """The tokenizer of a model, if it fits the model's tables."""
    tokenizer = calibration.load_tokenizer(folder.path)
    if len(tokenizer) > folder.cfg.vocab_size:
        raise InputError(
            f"The tokenizer of {folder.path} has {len(tokenizer)} tokens but the model "
            f"has {folder.cfg.vocab_size} rows; one of them is not its own."
        )
    return tokenizer


def _texts(recipe: Recipe) -> dict[str, Text]:
    """The texts a recipe reads."""
    said: dict[str, Text] = {"calibration": recipe.calibration}
    return said if recipe.evaluation is None else said | {"evaluation": recipe.evaluation}


def _sampled(recipe: Recipe, source: records.Source) -> list[Document]:
    """The seeded sample of the calibration text: rows and dev split together."""
    text = recipe.calibration
    count = round(text.samples / (1 - texts.DEV_FRACTION))
    documents = texts.read_documents(source, field=text.field, encoding=text.encoding)
    return texts.sample(documents, count=count, seed=recipe.seed)


def _documents(text: Text, source: records.Source) -> list[Document]:
    """All documents of a text; InputError if there are none."""
    documents = list(texts.read_documents(source, field=text.field, encoding=text.encoding))
    if not documents:
        raise InputError(f"{text.path} has 0 documents; add text.")
    return documents


def _load(folder: ModelFolder, mesh: jax.sharding.Mesh | None) -> tuple[ModelConfig, Params]:
    """A model in float32."""
    _LOG.info("load %s", folder.path)
    return hf.load_hf(folder.path, mesh=mesh, dtype=jnp.float32)


def _vocabulary(
    recipe: Recipe,
    folders: Mapping[str, ModelFolder],
    tokenizers: Mapping[str, Any],
    documents: Sequence[Document],
    *,
    is_one: bool,
) -> VocabularyMatch:
    """Matched tokens, weighted as the recipe says."""
    matched = spelling.matched(
        tokenizers["target"],
        tokenizers["source"],
        target_size=folders["target"].cfg.vocab_size,
        source_size=folders["source"].cfg.vocab_size,
        is_one=is_one,
    )
    if recipe.vocabulary_weights == "uniform":
        return matched
    encoded = calibration.encode(tokenizers["target"], documents, max_length=recipe.max_length)
    counts = Counter(token for one in encoded for token in one.ids)
    weights = np.array([counts[int(token)] for token in matched.target_ids], np.float32)
    return matched._replace(weights=jnp.asarray(weights))


def _log_matches(inputs: Inputs) -> None:
    """How much of the two models' texts and vocabularies corresponds."""
    data, vocabulary = inputs.data, inputs.vocabulary
    if data.target_matched is not None and data.source_matched is not None:
        _LOG.info(
            "rows: %d (%s), matched %.1f %% of the target's tokens and %.1f %% of the source's",
            *(data.rows, inputs.recipe.rows, 100 * data.target_matched, 100 * data.source_matched),
        )
    if vocabulary is not None:
        _LOG.info("vocabulary: %d tokens matched", len(vocabulary.target_ids))


def _held_out_activations(inputs: Inputs, target: merge.Model, reference: merge.Model, spec: Any):
    """Activations of the dev split, which the plans have not seen."""
    sites = sites_of(spec.weights)
    if not sites or inputs.held_out_data is None:
        return None
    data = inputs.held_out_data
    return (
        gather(target[1], data.target, cfg=target[0], sites=sites),
        gather(reference[1], data.source, cfg=reference[0], sites=sites),
    )


def _unconverged(report: MergeReport) -> list[str]:
    """Sentences about plans that did not converge."""
    return [
        f"{name}: the neuron transport did not converge in "
        f"{int(np.sum(~np.asarray(one.converged)))} "
        f"of {len(one.converged)} layers (largest marginal error {float(np.max(one.error)):.1e}); "
        f"raise epsilon or max_iterations."
        for name, one in report.weights.items()
        if not np.all(one.converged)
    ]


def _self_check(folder: Path, fused: Params) -> Params:
    """Reads the written folder back: parameters, tokenizer, one forward pass. Returns float32."""
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
    return written


def _evaluate(
    inputs: Inputs, models: Mapping[str, merge.Model], known: Mapping[str, nll.Scores]
) -> tuple[dict[str, nll.Scores], dict[str, Any], compare.Difference | None]:
    """Scores on the held-out text, what they say of every model, and merge minus target."""
    if inputs.held_out is None:
        return {}, {}, None
    scores = dict(known)
    for role in ("target", "merge", "source"):
        if role not in known:
            cfg, params = models[role]
            tokenizer = inputs.tokenizers["source" if role == "source" else "target"]
            cut = nll.windows(inputs.held_out, tokenizer, max_positions=cfg.max_positions)
            scores[role] = nll.score(params, cut, cfg=cfg)
    scores = {role: scores[role] for role in ("target", "merge", "source")}
    same, seed = {"merge": True, "source": inputs.is_one_tokenizer}, inputs.recipe.seed
    change = compare.paired_bootstrap(scores["merge"], scores["target"], seed=seed)
    return scores, facts.compared(scores, has_one_tokenizer=same, seed=seed), change


def _calibration_facts(inputs: Inputs, recipe: Recipe) -> dict[str, Any]:
    """What the rows were made from."""
    return {
        "documents": inputs.data.documents,
        "dev_documents": len(inputs.dev),
        "target_tokens": inputs.data.target_tokens,
        "source_tokens": inputs.data.source_tokens,
        "rows": inputs.data.rows,
        "rows_are": recipe.rows,
        "target_matched": inputs.data.target_matched,
        "source_matched": inputs.data.source_matched,
        "vocabulary_matched": inputs.vocabulary and len(inputs.vocabulary.target_ids),
    }


def _write_details(
    folder: Path,
    recipe: Recipe,
    inputs: Inputs,
    prepared: merge.Prepared,
    found: dict[str, Any],
    command: str,
    started: float,
) -> None:
    """README.md and ``ot_merge/``: recipe, coupling, report, provenance."""
    details = folder / "ot_merge"
    details.mkdir()
    text = provenance.public(recipe.to_yaml())
    (details / "recipe.yaml").write_text(text, encoding="utf-8")
    if prepared.coupling is not None:
        checkpoint.save_coupling(details / "coupling", prepared.coupling)
    _write_json(details / "report.json", found)
    (folder / "README.md").write_text(
        provenance.model_card(
            name=" + ".join(inputs.folders[role].name for role in ("target", "source")),
            models={role: (one.path, one.origin) for role, one in inputs.folders.items()},
            verdict=found["verdict"],
            evaluation=[
                (name, one["nll_per_token"], one["bits_per_byte"])
                for name, one in found["evaluation"].items()
            ],
            command=provenance.public(command),
            recipe=text,
        ),
        encoding="utf-8",
    )
    side = {
        "command": provenance.public(command),
        "recipe_sha256": provenance.sha256(details / "recipe.yaml"),
        "inputs": {
            role: {
                "name": one.name,
                "hub": one.origin and one.origin._asdict(),
                "files": provenance.file_hashes(one.path, _WEIGHT_FILES),
            }
            for role, one in inputs.folders.items()
        },
        "texts": {
            name: {
                "hub": one.origin and {**one.origin._asdict(), "split": one.split},
                "files": [
                    {"name": file.name, "sha256": provenance.sha256(file)} for file in one.files
                ],
            }
            for name, one in inputs.sources.items()
        },
        "calibration": found["calibration"],
        "seed": recipe.seed,
        "transport": found["sites"]
        and {
            site: {k: one[k] for k in ("largest_error", "most_iterations", "converged")}
            for site, one in found["sites"].items()
        },
        "evaluation": found["evaluation"],
        "output": provenance.file_hashes(folder, _WEIGHT_FILES),
        "wall_seconds": round(time.monotonic() - started, 2),
        **provenance.environment(),
    }
    _write_json(details / "provenance.json", side)


def _write_json(path: Path, value: Any) -> None:
    """Indented UTF-8 JSON."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def evaluate(
    paths: Sequence[str], text: Text, *, seed: int = 0, offline: bool = False
) -> dict[str, Any]:
    """Scores models on a text and compares every pair.

    Args:
        paths: Model folders or hub ids, as typed; they are the keys of the result.
        text: The held-out text.
        seed: Of the bootstrap.
        offline: Whether the network is forbidden; the hub's local cache is used all the same.

    Returns:
        ``{"models": {path: {documents, tokens, nll_per_token, bits_per_byte}}, "pairs": [{a, b,
        metric, difference, low, high}]}``; ``difference`` is ``a`` minus ``b``, in nats per token,
        or in bits per byte where the two tokenizers differ.
    """
    documents = _documents(text, records.locate(text.path, offline=offline))
    scores, tokenizers = {}, {}
    for path in dict.fromkeys(paths):
        folder = open_folder(path, offline=offline)
        tokenizers[path] = _tokenizer(folder)
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
