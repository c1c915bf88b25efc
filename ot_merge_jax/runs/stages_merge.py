"""The stage of a merge that keeps results in a run folder, so that a run can die anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ot_merge_jax.merging.merge import Stage
from ot_merge_jax.runs import stages


def keeping(run: stages.RunFolder) -> Stage:
    """The stage of `ot_merge_jax.merging.merge.merge` that keeps results in a run folder.

    Args:
        run: The run folder; steps without ``save`` and ``load`` are computed each time.
    """

    def stage(
        name: str, compute: Any, save: Any = None, load: Any = None, *, needs: Sequence[str] = ()
    ) -> Any:
        if save is None or load is None:
            return compute()
        return stages.stage(run, name, lambda folder: save(folder, compute), load, needs=needs)

    return stage
