"""The one composition: activations -> coupling -> transported weights -> fused parameters.

`ot-merge run`, every control and the library call `merge`. What differs between them is injected:
``stage`` decides whether a step is computed, read from disk or already known, ``choose`` which
strength is taken once the weights are transported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from ot_merge_jax.errors import InputError, RecipeError
from ot_merge_jax.io import arrays
from ot_merge_jax.merging import fuse
from ot_merge_jax.merging.diagnostics import describe
from ot_merge_jax.merging.weight_transport import transport_weights
from ot_merge_jax.models import specs
from ot_merge_jax.models.config import ModelConfig
from ot_merge_jax.models.gather import gather
from ot_merge_jax.models.model import AnyModel, Models
from ot_merge_jax.models.sites import VOCABULARY, sites_of
from ot_merge_jax.transport import coupling as couplings
from ot_merge_jax.types import (
    BUDGET,
    Activations,
    AlignedBatches,
    Alignment,
    Batch,
    Budget,
    Choice,
    HParams,
    Merged,
    MergeSpec,
    Transported,
    VocabularyMatch,
)

T = TypeVar("T")


@runtime_checkable
class Stage(Protocol):
    """Does one step of a merge, or knows its result."""

    def __call__(
        self,
        name: str,
        compute: Callable[..., T],
        save: Callable[..., Any] | None = None,
        load: Callable[..., T] | None = None,
        *,
        needs: Sequence[str] = (),
    ) -> T:
        """The result of a step.

        Args:
            name: Of the step: ``rows-target``, ``rows-source``, ``coupling``, ``moved``,
                ``report``.
            compute: Makes the result.
            save: ``(folder, compute)``: computes the result and keeps it; None: it is not kept.
            load: ``(folder)``: reads what was kept.
            needs: Names of the steps whose results ``compute`` uses.
        """
        ...


def call(
    name: str,
    compute: Callable[..., T],
    save: Callable[..., Any] | None = None,
    load: Callable[..., T] | None = None,
    *,
    needs: Sequence[str] = (),
) -> T:
    """The stage that only computes, in memory.

    Example:
        >>> call("double", lambda: 2 * 21)
        42
    """
    del name, save, load, needs
    return compute()


def given(known: Mapping[str, Any], otherwise: Stage = call) -> Stage:
    """A stage that returns the results it knows and leaves the other steps to another stage.

    Args:
        known: Name -> result; these are not computed.
        otherwise: Does the other steps.

    Example:
        >>> stage = given({"coupling": "known"})
        >>> stage("coupling", lambda: "computed"), stage("moved", lambda: "computed")
        ('known', 'computed')
    """

    def stage(
        name: str, compute: Any, save: Any = None, load: Any = None, *, needs: Sequence[str] = ()
    ) -> Any:
        if name in known:
            return known[name]
        return otherwise(name, compute, save, load, needs=needs)

    return stage


def merge(
    models: Models,
    batches: AlignedBatches,
    hparams: HParams,
    *,
    spec: MergeSpec,
    vocabulary: VocabularyMatch | None = None,
    stage: Stage = call,
    choose: Callable[[Transported], Choice] | None = None,
    budget: Budget = BUDGET,
) -> Merged:
    """Merges the source into the target.

    Args:
        models: Target, source, and, if it is known, what the source was fine-tuned from: needed by
            rule ``delta``; if given, what the target is aligned with.
        batches: Row-aligned batches of target and source (`calibration.align`).
        hparams: Strength, epsilons and threshold; its numbers may be traced.
        spec: What moves and how.
        vocabulary: Matched tokens; needed when ``embed`` or ``head`` moves.
        stage: Does the steps; `call` computes them in memory, a run keeps them on disk.
        choose: Chooses the strength once the weights are transported; None: that of ``hparams``.
        budget: How much each step takes up at a time.

    Returns:
        The fused parameters, in the target's dtypes, and everything that led to them.

    Raises:
        RecipeError: if the spec needs a source base or a vocabulary that is not given.
        InputError: if source and source base have different shapes.
        NonFiniteError: if activations are not finite.

    Example:
        >>> from ot_merge_jax.demo import assets
        >>> from ot_merge_jax.data import calibration, documents
        >>> from ot_merge_jax.data.tokenizers import load_tokenizer
        >>> from ot_merge_jax.io.hf import load_hf
        >>> names = ("sibling", "source", "source-base")
        >>> models = Models(*(load_hf(assets.path(name)) for name in names))
        >>> tokenizer = load_tokenizer(assets.path("sibling"))
        >>> texts = list(documents.read_documents(assets.path("calibration.jsonl")))[:8]
        >>> data = calibration.align(texts, tokenizer, tokenizer, rows="token", max_rows=100)
        >>> merged = merge(models, AlignedBatches(data.target, data.source), HParams(0.8),
        ...                spec=MergeSpec(weights=("down",)))
        >>> merged.report.weights["down"].source_layer.shape == (models.target.cfg.num_layers,)
        True

    Source: Transport and Merge, arXiv 2602.05495, sections 4 and 5. Differs: see `MergeSpec`.
    """
    check_needs(models, vocabulary, spec=spec)
    alignment = align_activations(models, batches, hparams, spec=spec, stage=stage, budget=budget)
    transported = stage(
        "moved",
        lambda: transport_weights(
            models,
            alignment,
            spec=spec,
            vocabulary=vocabulary,
            plan_at_once=budget.plan_block,
        ),
        *arrays.TRANSPORTED,
        needs=[] if alignment is None else ["rows-target", "rows-source", "coupling"],
    )
    choice = Choice(hparams, []) if choose is None else choose(transported)
    strength, target = choice.hparams.strength, models.target.params
    return Merged(
        params=fuse.fuse(target, transported.weights, strength, spec=spec, mask=transported.masks),
        transported=transported,
        alignment=alignment,
        choice=choice,
        report=stage(
            "report",
            lambda: describe(
                target,
                transported,
                alignment,
                choice.hparams,
                spec=spec,
                plan_at_once=budget.plan_block,
            ),
        ),
    )


def steps_of(merged: Merged) -> dict[str, Any]:
    """The results of the steps of a merge by the names of its stages, for `given`."""
    steps: dict[str, Any] = {"moved": merged.transported, "report": merged.report}
    if merged.alignment is not None:
        coupling, target, source = merged.alignment
        steps |= {"rows-target": target, "rows-source": source, "coupling": coupling}
    return steps


def align_activations(
    models: Models,
    batches: AlignedBatches,
    hparams: HParams,
    *,
    spec: MergeSpec,
    stage: Stage = call,
    budget: Budget = BUDGET,
) -> Alignment | None:
    """Which layer and which neuron of the reference corresponds to which of the target.

    Args:
        models: The target and the reference (the source's base, if there is one) are run.
        batches: Row-aligned batches of both.
        hparams: Epsilons and threshold.
        spec: Its weights say which sites are needed.
        stage: Does the steps.
        budget: How much each step takes up at a time.

    Returns:
        The coupling and the activations it was made from; None if only the vocabulary moves.
    """
    if not (sites := sites_of(spec.weights)):
        return None
    target = gather_rows(
        "rows-target", models.target, batches.target,
        sites=sites, role="target", stage=stage, hidden_at_once=budget.hidden,
    )  # fmt: skip
    source = gather_rows(
        "rows-source", models.reference, batches.source,
        sites=sites, role=models.reference_role, stage=stage, hidden_at_once=budget.hidden,
    )  # fmt: skip
    coupling = stage(
        "coupling",
        lambda: couplings.couple(
            target,
            source,
            hparams,
            spec=spec,
            sites=sites,
            pairs_at_once=budget.pairs,
            rows_at_once=budget.source_rows,
        ),
        *arrays.COUPLING,
        needs=["rows-target", "rows-source"],
    )
    return Alignment(coupling, target, source)


def gather_rows(
    name: str,
    model: AnyModel,
    batches: Sequence[Batch],
    *,
    sites: Sequence[str],
    role: str,
    stage: Stage = call,
    hidden_at_once: int = BUDGET.hidden,
) -> Activations:
    """The activations of one model as a step.

    Args:
        name: Of the step.
        model: The model.
        batches: What it reads.
        sites: Where its activations are taken.
        role: What it is called in messages.
        stage: Does the step; one that keeps activations on disk says where by ``allocate``.
        hidden_at_once: As for `gather`.
    """
    return stage(
        name,
        lambda **place: gather(
            model.params,
            batches,
            cfg=model.cfg,
            sites=sites,
            model=role,
            hidden_at_once=hidden_at_once,
            **place,
        ),
        *arrays.ACTIVATIONS,
    )


def check_needs(models: Models, vocabulary: VocabularyMatch | None, *, spec: MergeSpec) -> None:
    """Refuses a spec that needs a source base or matched tokens that are not given."""
    if spec.rule == "delta" and models.base is None:
        raise RecipeError(
            "rule: delta needs source_base, the checkpoint the source was fine-tuned from; "
            "give it or choose the preset barycentric."
        )
    if models.base is not None:
        check_base(models.source.cfg, models.base.cfg)
    if set(spec.weights) & set(VOCABULARY) and vocabulary is None:
        raise RecipeError("Moving embed or head needs the matched tokens of the two vocabularies.")


def check_base(source: ModelConfig, base: ModelConfig) -> None:
    """Refuses a source base whose shapes are not the source's."""
    shapes = [{spec.path: spec.shape for spec in specs.param_specs(cfg)} for cfg in (source, base)]
    if shapes[0] != shapes[1]:
        differing = sorted(path for path in shapes[0].keys() | shapes[1].keys()
                           if shapes[0].get(path) != shapes[1].get(path))  # fmt: skip
        raise InputError(
            "The source base is not what the source was fine-tuned from: "
            f"{', '.join(differing[:4])} differ in shape; give the right checkpoint."
        )
