"""One calibration seed of a run: the merge and its controls, treated alike, scored on one text.

Every arm gets the same strengths to try, the same dev split to choose on and the same rounding to
the dtypes of the file (SPEC section 10). No maths: `controls` breaks, `sweep` chooses, `nll`
scores.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ot_merge_jax import controls, fuse, merge, preflight, staged
from ot_merge_jax import sweep as sweeps
from ot_merge_jax.evaluate import nll, unigram
from ot_merge_jax.io import checkpoint, hf, stages
from ot_merge_jax.io.folder import ModelFolder
from ot_merge_jax.models import specs
from ot_merge_jax.preflight import Inputs
from ot_merge_jax.texts import Document
from ot_merge_jax.transport import coupling as couplings
from ot_merge_jax.types import HParams, MergeSpec, Params

_LOG = logging.getLogger(__name__)
Moved = tuple[dict[str, jax.Array], dict[str, jax.Array]]


class Arm(NamedTuple):
    """A merge, or a control of it, at the strength that was best for it.

    Attributes:
        strength: A number, or one for each group.
        points: Every strength tried on the dev split; none if the recipe gives one.
        scores: On the held-out text.
    """

    strength: Any
    points: list[sweeps.Point]
    scores: nll.Scores


class Biased(NamedTuple):
    """A model with its own fitted bias for each token.

    Attributes:
        gamma: Share of the bias that was best on the dev split.
        scores: On the held-out text.
    """

    gamma: float
    scores: nll.Scores


class Trial(NamedTuple):
    """What one calibration seed showed.

    Attributes:
        seed: Of the calibration sample, the split and every control.
        arms: ``merge``, then every control that applies.
        biased: ``target`` and ``merge`` with a bias each; empty if that control was not asked for.
    """

    seed: int
    arms: dict[str, Arm]
    biased: dict[str, Biased]


class Setting(NamedTuple):
    """What all arms of a trial share.

    Attributes:
        run: Where stages are kept.
        models: Role -> model.
        inputs: Of this seed.
        prepared: The merge up to its strength.
        hparams: As the recipe says; the strength counts only if it is not chosen.
        spec: What moves and how.
        dev: The dev split, for the target; None if there is none, and nothing to choose on it.
        held_out: The held-out text, for the target.
        target: The target's scores on the held-out text.
    """

    run: stages.Run
    models: staged.Models
    inputs: Inputs
    prepared: merge.Prepared
    hparams: HParams
    spec: MergeSpec
    dev: nll.Windows | None
    held_out: nll.Windows
    target: nll.Scores


def trial(setting: Setting, names: Sequence[str], *, merged: Arm | None = None) -> Trial:
    """Runs the controls of a merge, and the merge itself unless it has been.

    Args:
        setting: Of the seed.
        names: From `controls.arms`.
        merged: The merge, if it was scored already.

    Returns:
        All arms; those that do not apply are missing.
    """
    s, seed = setting, setting.inputs.recipe.seed
    names = [name for name in names if why_not(s, name) is None]
    kept = s.prepared.moved, s.prepared.masks
    arms = {"merge": merged or _arm(s, "merge", lambda: kept)}
    for name in names:
        if name == "unigram":
            continue
        _LOG.info("control %s (seed %d)", name, seed)
        arms[name] = _arm(s, name, lambda name=name: _broken(s, name))
    biased = {}
    if "unigram" in names:
        _LOG.info("control unigram (seed %d)", seed)
        params = {
            "target": lambda: s.models("target")[1],
            "merge": lambda: _fused(s, kept, arms["merge"].strength),
        }
        plain = {"target": s.target, "merge": arms["merge"].scores}
        biased = {name: _biased(s, name, params[name], plain[name]) for name in params}
    return Trial(seed, arms, biased)


def why_not(setting: Setting, name: str) -> str | None:
    """Why a control does not apply to a run; None if it does."""
    return controls.why_not(
        name,
        spec=setting.spec,
        source_layers=setting.inputs.folders["source"].cfg.num_layers,
        has_dev=setting.dev is not None,
    )


def every(setting: Setting, merged: Arm) -> list[Trial]:
    """The trial of the run's own seed, then of each further one that the recipe asks for.

    Args:
        setting: Of the run.
        merged: Its merge, as it was published.
    """
    recipe = setting.inputs.recipe
    names = controls.arms(recipe.controls)
    found = [trial(setting, names, merged=merged)]
    for seed in range(recipe.seed + 1, recipe.seed + recipe.seeds):
        _LOG.info("calibration seed %d", seed)
        inputs = preflight.reseeded(setting.inputs, seed)
        run = setting.run._replace(part=f"seed-{seed}/")
        prepared = staged.prepare(
            run, setting.models, inputs.data, setting.hparams,
            spec=setting.spec, has_base="source base" in inputs.folders,
            vocabulary=inputs.vocabulary,
        )  # fmt: skip
        again = setting._replace(run=run, inputs=inputs, prepared=prepared, dev=dev_windows(inputs))
        found.append(trial(again, names))
    return found


def target_windows(inputs: Inputs, documents: Sequence[Document]) -> nll.Windows:
    """Documents ready to be scored by the target, or by any merge of it."""
    longest = inputs.folders["target"].cfg.max_positions
    return nll.windows(documents, inputs.tokenizers["target"], max_positions=longest)


def dev_windows(inputs: Inputs) -> nll.Windows | None:
    """The dev split, ready to be scored by the target; None if there is none."""
    return target_windows(inputs, inputs.dev) if inputs.dev else None


def _arm(s: Setting, name: str, make: Callable[[], Moved]) -> Arm:
    """Chooses the strength of what ``make`` returns, and scores it."""

    def compute(folder: Any) -> None:
        moved = make()
        points, hparams = [], s.hparams
        if s.inputs.recipe.strength == "auto":
            assert s.dev is not None
            prepared = s.prepared._replace(moved=moved[0], masks=moved[1])
            points, hparams = sweeps.sweep(
                s.models("target"), prepared, s.dev, s.hparams, spec=s.spec
            )
        scores = s.target  # at strength 0 it is the target, bit for bit
        if fuse.is_moving(hparams.strength):
            params = _fused(s, moved, hparams.strength)
            scores = nll.score(params, s.held_out, cfg=s.models("target")[0])
        found = {"strength": hparams.strength, "points": points}
        checkpoint.save_json(folder / "arm.json", found)
        checkpoint.save_arrays(folder / "scores", scores._asdict())

    def load(folder: Any) -> Arm:
        found = checkpoint.load_json(folder / "arm.json")
        points = [sweeps.Point(**one) for one in found["points"]]
        return Arm(found["strength"], points, _scores(folder))

    return stages.stage(s.run, f"arm-{name.replace(' ', '-')}", compute, load, needs=["moved"])


def _scores(folder: Any) -> nll.Scores:
    """Scores as a stage kept them."""
    return nll.Scores(**checkpoint.load_arrays(folder / "scores"))  # pyright: ignore[reportArgumentType]


def _broken(s: Setting, name: str) -> Moved:
    """What a control moves instead of the transported weights, and the masks."""
    seed, prepared = s.inputs.recipe.seed, s.prepared
    if name == "shrink":
        return controls.shrink(prepared.moved), prepared.masks
    if name in controls.NOISE:
        number = controls.NOISE.index(name)
        moved = controls.noise(
            s.models("target")[1], prepared.moved, prepared.masks,
            spec=s.spec, seed=seed * controls.NOISE_SEEDS + number,
        )  # fmt: skip
        return moved, prepared.masks
    coupling, matched, reference = prepared.coupling, s.inputs.vocabulary, None
    rows = None
    if prepared.target is not None and prepared.source is not None:
        rows = prepared.target, prepared.source
    if name == "permuted":
        if coupling is not None and rows is not None:
            coupling, source = controls.permuted(coupling, rows[1], seed=seed)
            rows = rows[0], source
        matched = matched and controls.permuted_tokens(matched, seed=seed)
    elif name == "wrong-layer":
        assert coupling is not None
        coupling = controls.wrong_layers(coupling, seed=seed)
    else:
        reference = _random_reference(s)
        if rows is not None:
            wrong = staged.gathered(
                s.run, "rows-random", lambda _: reference, "random source",
                s.inputs.data.source, spec=s.spec,
            )  # fmt: skip
            rows = rows[0], wrong
            coupling = couplings.couple(*rows, s.hparams, spec=s.spec)
    return merge.move(
        s.models("target"),
        s.models("source"),
        coupling,
        rows,
        spec=s.spec,
        source_base=s.models("source base") if "source base" in s.inputs.folders else None,
        vocabulary=matched,
        aligned_with=reference,
    )


def _random_reference(s: Setting) -> merge.Model:
    """A random model where the source (the source base, if there is one) is aligned with."""
    role = "source base" if "source base" in s.inputs.folders else "source"
    cfg, params = s.models(role)
    is_held = specs.is_in_memory(params)
    return cfg, controls.random_source(cfg, seed=s.inputs.recipe.seed, is_held=is_held)


def _fused(s: Setting, moved: Moved, strength: Any) -> Params:
    """The merged parameters as a file would hold them, in float32."""
    _, params = s.models("target")
    fused = fuse.fuse(params, moved[0], strength, spec=s.spec, mask=moved[1])
    return as_stored(fused, s.inputs.folders["target"])


def as_stored(params: Params, folder: ModelFolder) -> Params:
    """Parameters rounded to the dtypes that a folder stores, in their own dtypes."""
    return specs.unflatten(
        {
            path: specs.get(params, path).astype(dtype).astype(specs.get(params, path).dtype)
            for path, dtype in hf.stored_dtypes(folder).items()
        }
    )


def _biased(s: Setting, name: str, params: Callable[[], Params], plain: nll.Scores) -> Biased:
    """A model with the bias that is fitted to it."""

    def compute(folder: Any) -> None:
        cfg, model = s.models("target")[0], params()
        train = target_windows(s.inputs, s.inputs.texts)
        assert s.dev is not None
        found = unigram.fitted(model, train, s.dev, cfg=cfg)
        scores = plain
        if found.gamma:
            scores = nll.score(model, s.held_out, cfg=cfg, bias=found.bias)
        checkpoint.save_json(folder / "gamma.json", found.gamma)
        checkpoint.save_arrays(folder / "scores", scores._asdict())

    return stages.stage(
        s.run,
        f"bias-{name}",
        compute,
        lambda folder: Biased(checkpoint.load_json(folder / "gamma.json"), _scores(folder)),
        needs=["moved"],
    )


def pooled(scores: Sequence[nll.Scores]) -> nll.Scores:
    """Scores of one arm over several seeds: the mean loss of each document.

    Example:
        >>> count = np.array([2])
        >>> pooled([nll.Scores(np.array([x]), count, count) for x in (1.0, 3.0)]).nll
        array([2.])
    """
    return scores[0]._replace(nll=np.mean([one.nll for one in scores], 0))


def every_seed(trials: Sequence[Trial]) -> Mapping[str, Sequence[tuple[nll.Scores, nll.Scores]]]:
    """For each control that ran, (merge, control) of every seed; ``unigram`` with a bias each."""
    found = {
        name: [(one.arms["merge"].scores, one.arms[name].scores) for one in trials]
        for name in trials[0].arms
        if name != "merge"
    }
    if trials[0].biased:
        pairs = [(one.biased["merge"].scores, one.biased["target"].scores) for one in trials]
        found["unigram"] = pairs
    return found
