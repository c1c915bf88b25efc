"""The steps of a merge as stages of a run folder: each computes what is not there, and reads it.

What `merge.prepare`, `sweep` and `evaluate` do in memory, done so that a run can die anywhere. No
maths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from ot_merge_jax import calibration, merge, site_diagnostics
from ot_merge_jax import sweep as sweeps
from ot_merge_jax.activations import gather
from ot_merge_jax.evaluate import nll
from ot_merge_jax.io import checkpoint, stages
from ot_merge_jax.spaces import sites_of
from ot_merge_jax.transport import coupling as couplings
from ot_merge_jax.types import Activations, Batch, HParams, MergeSpec, VocabularyMatch

#: Role (``target``, ``source``, ``source base``) -> model, read when it is first asked for.
Models = Callable[[str], merge.Model]


def activations(
    run: stages.Run,
    name: str,
    models: Models,
    data: calibration.Calibration,
    *,
    spec: MergeSpec,
    reference: str,
) -> tuple[Activations, Activations]:
    """Activations of the target and of the reference (source or source base), on disk.

    Args:
        run: The run folder.
        name: What the rows are; the stages are ``NAME-target`` and ``NAME-source``.
        models: The models.
        data: Batches of both.
        spec: Which sites are needed.
        reference: Role of the model the target is aligned with.

    Returns:
        Both, in memory-mapped files.
    """
    sides = (("target", "target", data.target), ("source", reference, data.source))
    target, source = (
        gathered(run, f"{name}-{side}", models, role, batches, spec=spec)
        for side, role, batches in sides
    )
    return target, source


def gathered(
    run: stages.Run,
    name: str,
    models: Models,
    role: str,
    batches: Sequence[Batch],
    *,
    spec: MergeSpec,
) -> Activations:
    """Activations of one model, in memory-mapped files; ``name`` is the stage's."""

    def make(folder: Any) -> None:
        cfg, params = models(role)
        rows = gather(
            params,
            batches,
            cfg=cfg,
            sites=sites_of(spec.weights),
            model=role,
            allocate=checkpoint.allocator(folder),
        )
        checkpoint.save_row_ids(folder, rows)

    return stages.stage(run, name, make, checkpoint.load_activations)


def prepare(
    run: stages.Run,
    models: Models,
    data: calibration.Calibration,
    hparams: HParams,
    *,
    spec: MergeSpec,
    has_base: bool,
    vocabulary: VocabularyMatch | None,
) -> merge.Prepared:
    """`merge.prepare` in stages: activations, coupling, transported weights and masks."""
    rows = found = None
    needs = []
    if sites_of(spec.weights):
        reference = "source base" if has_base else "source"
        rows = activations(run, "rows", models, data, spec=spec, reference=reference)
        found = stages.stage(
            run,
            "coupling",
            lambda folder: checkpoint.save_coupling(
                folder, couplings.couple(*rows, hparams, spec=spec)
            ),
            checkpoint.load_coupling,
            needs=["rows-target", "rows-source"],
        )
        needs = ["rows-target", "rows-source", "coupling"]

    def make(folder: Any) -> None:
        moved, masks = merge.move(
            models("target"),
            models("source"),
            found,
            rows,
            spec=spec,
            source_base=models("source base") if has_base else None,
            vocabulary=vocabulary,
        )
        checkpoint.save_arrays(folder / "moved", moved)
        checkpoint.save_arrays(folder / "masks", masks)

    def load(folder: Any) -> list[dict[str, Any]]:
        both = (checkpoint.load_arrays(folder / part) for part in ("moved", "masks"))
        return jax.device_put(list(both))

    moved, masks = stages.stage(run, "moved", make, load, needs=needs)
    return merge.Prepared(moved, masks, found, *(rows or (None, None)))


def site_facts(
    run: stages.Run,
    models: Models,
    prepared: merge.Prepared,
    unseen: calibration.Calibration | None,
    *,
    spec: MergeSpec,
    has_base: bool,
    seed: int,
) -> dict[str, Any]:
    """`site_diagnostics.sites` as JSON values; with unseen rows, if there are any."""
    held_out, needs = None, []
    if prepared.coupling is not None and unseen is not None:
        reference = "source base" if has_base else "source"
        held_out = activations(run, "unseen", models, unseen, spec=spec, reference=reference)
        needs = ["unseen-target", "unseen-source"]
    if prepared.coupling is not None:
        needs += ["rows-target", "rows-source", "coupling"]
    return kept(
        run,
        "sites",
        lambda: site_diagnostics.sites(prepared, held_out, spec=spec, seed=seed),
        needs=needs,
    )


def kept(run: stages.Run, name: str, compute: Callable[[], Any], *, needs: Sequence[str]) -> Any:
    """A value that `checkpoint.plain` takes, as a stage of its own."""
    return stages.stage(
        run,
        name,
        lambda folder: checkpoint.save_json(folder / "value.json", compute()),
        lambda folder: checkpoint.load_json(folder / "value.json"),
        needs=needs,
    )


def strength(
    run: stages.Run,
    models: Models,
    prepared: merge.Prepared,
    dev: nll.Windows,
    hparams: HParams,
    *,
    spec: MergeSpec,
) -> sweeps.Sweep:
    """`sweeps.sweep`: every strength tried on the dev split, and the best."""
    points = kept(
        run,
        "sweep",
        lambda: sweeps.sweep(models("target"), prepared, dev, hparams, spec=spec).points,
        needs=["moved"],
    )
    return sweeps.chosen([sweeps.Point(**one) for one in points], hparams)


def scores(
    run: stages.Run, compute: Callable[[], Mapping[str, nll.Scores]]
) -> dict[str, nll.Scores]:
    """Loss of every model on the held-out text, document by document."""

    def make(folder: Any) -> None:
        named = {
            f"{name}/{key}": array
            for name, one in compute().items()
            for key, array in one._asdict().items()
        }
        checkpoint.save_arrays(folder, named)

    def load(folder: Any) -> dict[str, nll.Scores]:
        found: dict[str, dict[str, Any]] = {}
        for name, array in checkpoint.load_arrays(folder).items():
            model, _, key = name.partition("/")
            found.setdefault(model, {})[key] = array
        return {name: nll.Scores(**one) for name, one in found.items()}

    return stages.stage(run, "evaluation", make, load, needs=["model"])
