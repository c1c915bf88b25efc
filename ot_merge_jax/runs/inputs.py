"""Everything about a run's inputs that can be checked before weights are read."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ot_merge_jax.data import calibration, chat, leaks
from ot_merge_jax.data.chat import Document
from ot_merge_jax.data.documents import sampled, split
from ot_merge_jax.data.sources import Source, locate
from ot_merge_jax.data.tokenizers import is_same_tokenizer, tokenizer_of
from ot_merge_jax.data.vocabulary import matched_vocabulary
from ot_merge_jax.errors import InputError
from ot_merge_jax.io import atomic, resolve
from ot_merge_jax.io.folder import ModelFolder, open_folder
from ot_merge_jax.merging import merge
from ot_merge_jax.models.model import BASE
from ot_merge_jax.models.sites import VOCABULARY
from ot_merge_jax.recipes.recipe import Recipe, Text
from ot_merge_jax.types import VocabularyMatch

_LOG = logging.getLogger(__name__)
_HELD_OUT_ROWS = 1024


class MergeInputs(NamedTuple):
    """Everything that was checked before weights are read.

    Attributes:
        recipe: The recipe with ``rows`` decided.
        folders: Role (``target``, ``source``, ``source base``) -> folder.
        tokenizers: Role -> tokenizer.
        texts: Documents that give rows.
        dev: Documents that choose the strength.
        held_out: Documents that are reported, or None.
        leaked: How many held-out documents were left out, as they are calibration documents too.
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
    leaked: int
    sources: dict[str, Source]
    data: calibration.Calibration
    held_out_data: calibration.Calibration | None
    is_one_tokenizer: bool
    vocabulary: VocabularyMatch | None


def check(
    recipe: Recipe, out: Path | None, *, overwrite: bool, offline: bool = False
) -> MergeInputs:
    """Checks folders, tokenizers and texts, and tokenises; reads no weights.

    What is named by a hub id is fetched first, weights too; this is all that uses the network.
    Without ``out`` no place for the output is checked.
    """
    paths = {"target": recipe.target, "source": recipe.source, BASE: recipe.source_base}
    paths = {role: path for role, path in paths.items() if path is not None}
    if out is not None:
        named = [side for path in paths.values() for side in resolve.split(path) if side]
        named += [text.path for text in _texts(recipe).values()]
        local = [path for name in named if (path := Path(name).expanduser()).exists()]
        atomic.check_output(out, inputs=local, overwrite=overwrite)
    sources = {name: locate(text.path, offline=offline) for name, text in _texts(recipe).items()}
    folders = {role: open_folder(path, offline=offline) for role, path in paths.items()}
    if BASE in folders:
        merge.check_base(folders["source"].cfg, folders[BASE].cfg)
    tokenizers = {role: tokenizer_of(folder) for role, folder in folders.items()}
    held_out, leaked = None, 0
    if recipe.evaluation is not None:
        held_out, leaked = leaks.held_out(
            recipe.evaluation, sources["evaluation"], learned=recipe.calibration,
            learned_source=sources["calibration"], role="calibration",
        )  # fmt: skip
    return _calibrated(recipe, folders, tokenizers, sources, held_out, leaked)


def reseeded(inputs: MergeInputs, seed: int) -> MergeInputs:
    """The same inputs with another sample, split and choice of rows; nothing is fetched again."""
    return _again(inputs, seed=seed)


def with_rows(inputs: MergeInputs, max_rows: int) -> MergeInputs:
    """The same inputs with another number of rows at most; no tokenizer is loaded again."""
    return _again(inputs, max_rows=max_rows)


def _again(inputs: MergeInputs, **settings: int) -> MergeInputs:
    """The calibration once more with other settings."""
    recipe = inputs.recipe.model_copy(update=settings)
    return _calibrated(
        recipe, inputs.folders, inputs.tokenizers, inputs.sources, inputs.held_out, inputs.leaked
    )


def _calibrated(
    recipe: Recipe,
    folders: dict[str, ModelFolder],
    tokenizers: dict[str, Any],
    sources: dict[str, Source],
    held_out: list[Document] | None,
    leaked: int,
) -> MergeInputs:
    """Everything that follows from the calibration text and the seed."""
    documents = sampled(
        recipe.calibration,
        sources["calibration"],
        samples=recipe.calibration.samples,
        seed=recipe.seed,
    )
    train, dev = split(documents, seed=recipe.seed)
    if not documents:
        raise InputError(f"{recipe.calibration.path} has 0 documents; add text.")
    if recipe.strength == "auto" and not dev:
        raise InputError(
            f"{recipe.calibration.path} has too few documents ({len(documents)}) for a dev split; "
            f"add text or give a strength."
        )
    both = tokenizers["target"], tokenizers["source"]
    is_one = is_same_tokenizer(*both, documents)
    # a base often has no chat template: it reads what the source's own template writes
    as_source = [chat.render(document, tokenizers["source"]).text for document in documents]
    if BASE in tokenizers and not is_same_tokenizer(
        tokenizers[BASE], tokenizers["source"], as_source
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
        # rows as dense as those of the calibration, so that the batches have its shapes
        most = min(_HELD_OUT_ROWS, max(2, recipe.max_rows * len(dev) // len(train)))
        unseen = calibration.align(dev, *both, max_rows=most, **settings)
    except InputError:
        unseen = None  # too few dev documents for held-out diagnostics
    matched = None
    if set(recipe.weights) & set(VOCABULARY):
        matched = matched_vocabulary(
            *both,
            target_size=folders["target"].cfg.vocab_size,
            source_size=folders["source"].cfg.vocab_size,
            is_one=is_one,
        )
        if recipe.vocabulary_weights == "frequency":
            matched = _by_frequency(matched, both[0], train, max_length=recipe.max_length)
    return MergeInputs(
        recipe,
        folders,
        tokenizers,
        train,
        dev,
        held_out,
        leaked,
        sources,
        data,
        unseen,
        is_one,
        matched,
    )


def _texts(recipe: Recipe) -> dict[str, Text]:
    """The texts a recipe reads."""
    texts: dict[str, Text] = {"calibration": recipe.calibration}
    return texts if recipe.evaluation is None else texts | {"evaluation": recipe.evaluation}


def _by_frequency(
    matched: VocabularyMatch, tokenizer: Any, documents: Sequence[Document], *, max_length: int
) -> VocabularyMatch:
    """Matched tokens, each weighted by how often the target reads it in these documents."""
    encoded = calibration.encode(tokenizer, documents, max_length=max_length)
    counts = Counter(token for document in encoded for token in document.ids)
    weights = np.array([counts[int(token)] for token in matched.target_ids], np.float32)
    return matched._replace(weights=jnp.asarray(weights))


def log_matches(inputs: MergeInputs) -> None:
    """Logs how much of the two models' texts and vocabularies corresponds."""
    data, vocabulary = inputs.data, inputs.vocabulary
    if data.target_matched is not None and data.source_matched is not None:
        _LOG.info(
            "rows: %d (%s), matched %.1f %% of the target's tokens and %.1f %% of the source's",
            *(data.rows, inputs.recipe.rows, 100 * data.target_matched, 100 * data.source_matched),
        )
    if vocabulary is not None:
        _LOG.info("vocabulary: %d tokens matched", len(vocabulary.target_ids))


def calibration_summary(inputs: MergeInputs) -> dict[str, Any]:
    """Where the rows came from, as counts and shares."""
    return {
        "documents": inputs.data.documents,
        "dev_documents": len(inputs.dev),
        "target_tokens": inputs.data.target_tokens,
        "source_tokens": inputs.data.source_tokens,
        "rows": inputs.data.rows,
        "rows_are": inputs.recipe.rows,
        "target_matched": inputs.data.target_matched,
        "source_matched": inputs.data.source_matched,
        "vocabulary_matched": inputs.vocabulary and len(inputs.vocabulary.target_ids),
    }
