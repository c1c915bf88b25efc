"""Everything about an adaptation's inputs that can be checked before weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ot_merge_jax.data import leaks, tokenizers
from ot_merge_jax.data.chat import Document
from ot_merge_jax.data.documents import documents_of, sampled, split
from ot_merge_jax.data.sources import Source, locate
from ot_merge_jax.errors import InputError, RecipeError
from ot_merge_jax.io import atomic, resolve
from ot_merge_jax.io.folder import ModelFolder, open_folder
from ot_merge_jax.recipes.recipe import Text
from ot_merge_jax.recipes.training import BLOCK, Adaptation
from ot_merge_jax.training import initial, packing
from ot_merge_jax.training.initial import Start
from ot_merge_jax.training.losses import Objective
from ot_merge_jax.training.step import Problem


class AdaptInputs(NamedTuple):
    """The checked inputs.

    Attributes:
        start: What is trained.
        source: The teacher; None for ``sft``.
        tokenizer: Of the student.
        problem: Settings with everything decided, the objective, the blocks.
        held_out: Documents that are reported, or None.
        leaked: How many held-out documents were left out, as something is learned from them.
        sources: ``text`` and ``evaluation`` -> where they come from.
        counts: Documents of both splits.
    """

    start: Start
    source: ModelFolder | None
    tokenizer: Any
    problem: Problem
    held_out: list[Document] | None
    leaked: int
    sources: dict[str, Source]
    counts: dict[str, int]

    @property
    def settings(self) -> Adaptation:
        """The settings with everything decided."""
        return self.problem.settings

    @property
    def folders(self) -> dict[str, ModelFolder]:
        """Role -> folder."""
        by_role = {"model": self.start.folder, "target": self.start.target, "source": self.source}
        return {role: folder for role, folder in by_role.items() if folder is not None}

    @property
    def factor(self) -> dict[str, float]:
        """Group -> how much of the residual is held."""
        return initial.factor_of(self.start, self.settings.strength)


def check(
    settings: Adaptation, out: Path, *, overwrite: bool = False, offline: bool = False
) -> AdaptInputs:
    """Checks folders, tokenizers, contexts and texts, and cuts the blocks; reads no weights.

    What is named by a hub id is fetched first; this is all that uses the network.

    Args:
        settings: What is asked for.
        out: The folder to be written.
        overwrite: Whether it may exist.
        offline: Whether the network is forbidden.

    Returns:
        The inputs.

    Raises:
        OtMergeError: naming what is wrong.
    """
    named = [side for model in (settings.model, settings.target, settings.source) if model
             for side in resolve.split(model) if side]  # fmt: skip
    texts: dict[str, Text] = {"text": settings.text}
    if settings.evaluation is not None:
        texts["evaluation"] = settings.evaluation
    named += [text.path for text in texts.values()]
    local = [path for name in named if (path := Path(name).expanduser()).exists()]
    atomic.check_output(out, inputs=local, overwrite=overwrite)
    sources = {name: locate(text.path, offline=offline) for name, text in texts.items()}
    begun = initial.open_start(settings.model, target=settings.target, offline=offline)
    initial.factor_of(begun, settings.strength)  # raises if the strength does not fit
    if settings.baselines is not None and (begun.target is None or not any(
        (begun.merged or {}).values()
    )):  # fmt: skip
        raise RecipeError(
            f"--baselines compares starts of a merge with its target, and {settings.model} is not "
            "a folder of `ot-merge run` that moved anything; name one."
        )
    source = None
    if settings.is_distilled and settings.source is not None:
        source = open_folder(settings.source, offline=offline)
    tokenizer = tokenizers.tokenizer_of(begun.folder)
    if settings.samples is None:
        documents = documents_of(settings.text, sources["text"])
    else:
        documents = sampled(
            settings.text, sources["text"], samples=settings.samples, seed=settings.seed
        )
    held_out, leaked = None, 0
    if settings.evaluation is not None:
        held_out, leaked = leaks.held_out(
            settings.evaluation, sources["evaluation"], learned=settings.text,
            learned_source=sources["text"], role="training",
        )  # fmt: skip
    learned, dev = split(documents, seed=settings.seed)
    if not dev:
        raise InputError(
            f"{settings.text.path} has too few documents ({len(documents)}) for a dev split; add "
            "text, one document a line."
        )
    contexts = [folder.cfg.max_positions for folder in (begun.folder, source) if folder is not None]
    block = min(BLOCK, *contexts) if settings.seq_len is None else settings.seq_len
    if block > min(contexts):
        raise RecipeError(
            f"--seq-len {block} is longer than the context of the "
            f"{'student' if block > contexts[0] else 'teacher'}, {min(contexts)} tokens; lower it."
        )
    teacher = None if source is None else tokenizers.tokenizer_of(source)
    is_universal = teacher is not None and not tokenizers.is_same_tokenizer(
        tokenizer, teacher, documents
    )
    blocks = [
        _blocks(part, tokenizer, teacher if is_universal else None, block, settings, is_dev=is_dev)
        for part, is_dev in ((learned, False), (dev, True))
    ]
    objective = Objective(
        settings.objective,
        begun.folder.cfg,
        None if source is None else source.cfg,
        settings.kd_weight,
        is_universal,
        settings.remat,
    )
    problem = Problem(_decided(settings, blocks[0], block), objective, *blocks)
    counts = {"documents": len(learned), "dev_documents": len(dev)}
    return AdaptInputs(begun, source, tokenizer, problem, held_out, leaked, sources, counts)


def _blocks(
    documents: Sequence[Document],
    tokenizer: Any,
    teacher: Any,
    length: int,
    settings: Adaptation,
    *,
    is_dev: bool,
) -> packing.Blocks:
    """The blocks of one split; ``teacher`` is None where it shares the student's tokens."""
    only = settings.loss_on == "responses"
    if teacher is not None and not is_dev:  # the dev split is scored on the next token
        return packing.pair(documents, tokenizer, teacher, length=length, responses_only=only)
    marked = [
        packing.tokenize_for_training(document, tokenizer, responses_only=only)
        for document in documents
    ]
    return packing.pack(marked, length, has_tail=is_dev)


def _decided(settings: Adaptation, blocks: packing.Blocks, block: int) -> Adaptation:
    """The settings with every number decided."""
    size = min(settings.batch_size, len(blocks.tokens))
    size -= size % settings.grad_accum_steps
    if not size:
        raise InputError(
            f"{settings.text.path} gives {len(blocks.tokens)} blocks of {block} tokens, fewer than "
            f"--grad-accum-steps {settings.grad_accum_steps}; add text or lower --seq-len."
        )
    steps = packing.per_epoch(blocks, size) if settings.steps is None else settings.steps
    tenth = max(1, steps // 10)
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return settings.model_copy(
        update={
            "batch_size": size,
            "seq_len": block,
            "steps": steps,
            "eval_every": settings.eval_every or tenth,
            "save_every": settings.save_every or tenth,
            "dtype": dtype,
        }
    )
