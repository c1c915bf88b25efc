"""Merge language models across architectures with optimal transport, in JAX.

The public names below are enough for most uses; modules of the same name as a function
(`ot_merge_jax.merge`, `ot_merge_jax.fuse`, `ot_merge_jax.sweep`) stay modules.
"""

from ot_merge_jax.activations import gather
from ot_merge_jax.config import ModelConfig
from ot_merge_jax.errors import OtMergeError
from ot_merge_jax.io.hf import load_hf, save_hf
from ot_merge_jax.models.decoder import forward
from ot_merge_jax.types import (
    Activations,
    Batch,
    Coupling,
    HParams,
    MergeReport,
    MergeSpec,
    Params,
    Potentials,
    VocabularyMatch,
)

__all__ = [
    "Activations",
    "Batch",
    "Coupling",
    "HParams",
    "MergeReport",
    "MergeSpec",
    "ModelConfig",
    "OtMergeError",
    "Params",
    "Potentials",
    "VocabularyMatch",
    "forward",
    "gather",
    "load_hf",
    "save_hf",
]
