"""Merge language models across architectures with optimal transport, in JAX.

The names below are enough for most uses. Each is imported when it is first asked for, so that
``import ot_merge_jax`` is quick and starts nothing: JAX is imported with the first name that needs
it. `load_hf` and `save_hf` are other names of `load` and `save`.

Example:
    >>> import ot_merge_jax
    >>> ot_merge_jax.sites_of(["gate", "up"])
    ('mlp_in', 'gate_out', 'up_out')
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ot_merge_jax.data.calibration import align
    from ot_merge_jax.errors import OtMergeError
    from ot_merge_jax.evaluation.nll import score
    from ot_merge_jax.experiments.sweep import sweep
    from ot_merge_jax.io.hf import load_hf, save_hf
    from ot_merge_jax.io.hf import load_hf as load
    from ot_merge_jax.io.hf import save_hf as save
    from ot_merge_jax.merging.fuse import fuse
    from ot_merge_jax.merging.merge import merge
    from ot_merge_jax.merging.weight_transport import source_delta, transport_weights
    from ot_merge_jax.models.config import ModelConfig
    from ot_merge_jax.models.decoder import forward
    from ot_merge_jax.models.gather import gather
    from ot_merge_jax.models.generation import generate
    from ot_merge_jax.models.model import Model, Models
    from ot_merge_jax.models.sites import sites_of
    from ot_merge_jax.training.step import train
    from ot_merge_jax.transport.coupling import couple
    from ot_merge_jax.types import (
        Activations,
        AlignedBatches,
        Alignment,
        Batch,
        Choice,
        Coupling,
        HParams,
        Merged,
        MergeReport,
        MergeSpec,
        Params,
        Potentials,
        Transported,
        VocabularyMatch,
    )

__all__ = [
    "Activations",
    "AlignedBatches",
    "Alignment",
    "Batch",
    "Choice",
    "Coupling",
    "HParams",
    "MergeReport",
    "MergeSpec",
    "Merged",
    "Model",
    "ModelConfig",
    "Models",
    "OtMergeError",
    "Params",
    "Potentials",
    "Transported",
    "VocabularyMatch",
    "align",
    "couple",
    "forward",
    "fuse",
    "gather",
    "generate",
    "load",
    "load_hf",
    "merge",
    "save",
    "save_hf",
    "score",
    "sites_of",
    "source_delta",
    "sweep",
    "train",
    "transport_weights",
]

#: Module -> the public names it has under their own name; those of `types` are all the others.
_HOMES = {
    "data.calibration": ("align",),
    "errors": ("OtMergeError",),
    "evaluation.nll": ("score",),
    "experiments.sweep": ("sweep",),
    "io.hf": ("load_hf", "save_hf"),
    "merging.fuse": ("fuse",),
    "merging.merge": ("merge",),
    "merging.weight_transport": ("source_delta", "transport_weights"),
    "models.config": ("ModelConfig",),
    "models.decoder": ("forward",),
    "models.gather": ("gather",),
    "models.generation": ("generate",),
    "models.model": ("Model", "Models"),
    "models.sites": ("sites_of",),
    "training.step": ("train",),
    "transport.coupling": ("couple",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
#: Public name -> its name in the module.
_ALIASES = {"load": "load_hf", "save": "save_hf"}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    own = _ALIASES.get(name, name)
    home = _HOME_OF.get(own, "types")
    module = importlib.import_module(f"{__name__}.{home}")  # noqa: TID251, a name of the table above
    value = globals()[name] = getattr(module, own)
    return value


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__})
