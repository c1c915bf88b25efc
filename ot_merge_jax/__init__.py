"""Merge language models across architectures with optimal transport, in JAX.

The public names below are enough for most uses; modules of the same name as a function
(`ot_merge_jax.merging.merge`, `ot_merge_jax.merging.fuse`, `ot_merge_jax.experiments.sweep`) stay
modules.
"""

from ot_merge_jax.errors import OtMergeError
from ot_merge_jax.io.hf import load_hf, save_hf
from ot_merge_jax.merging.weight_transport import source_delta, transport_weights
from ot_merge_jax.models.config import ModelConfig
from ot_merge_jax.models.decoder import forward
from ot_merge_jax.models.gather import gather
from ot_merge_jax.models.model import Model, Models
from ot_merge_jax.models.sites import sites_of
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
    "couple",
    "forward",
    "gather",
    "load_hf",
    "save_hf",
    "sites_of",
    "source_delta",
    "transport_weights",
]
