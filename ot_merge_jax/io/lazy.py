"""Parameters that stay in their files: read each time they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ot_merge_jax.errors import InputError
from ot_merge_jax.io import hf
from ot_merge_jax.io.folder import ModelFolder, open_folder
from ot_merge_jax.models import specs
from ot_merge_jax.models.model import Model
from ot_merge_jax.types import Params


class LazyLayers(Sequence[jax.Array]):
    """A stacked leaf on disk: ``[l]`` reads one layer, without the stacking axis."""

    def __init__(self, read: Callable[[specs.ParamSpec, int], np.ndarray], spec: specs.ParamSpec):
        """The leaf's row of the parameter table, and the function that reads a layer of it."""
        self._read, self._spec = read, spec

    def __getitem__(self, l: Any) -> jax.Array:
        """One layer, read now; IndexError if there is no such layer."""
        return jax.device_put(self._read(self._spec, range(len(self))[l]))

    def __len__(self) -> int:
        """How many layers there are."""
        return self._spec.shape[0]


class LazyFolder:
    """Lazy parameters (`specs.LazyParams`) that stay in their files: a leaf is read each time."""

    def __init__(self, read: Callable[[specs.ParamSpec, int | None], np.ndarray],
                 table: Mapping[str, specs.ParamSpec]):  # fmt: skip
        """The leaves by their path, and the function that reads one, or a layer of one."""
        self._read, self._table = read, table

    def leaf(self, path: str) -> Any:
        """A leaf, read now, or `LazyLayers` if it is stacked."""
        spec = self._table[path]
        if spec.is_stacked:
            return LazyLayers(self._read, spec)
        return jax.device_put(self._read(spec, None))

    def layer(self, l: int) -> Params:
        """The parameters of one layer, read now, without the stacking axis."""
        return specs.unflatten(
            {
                path.removeprefix("layers/"): jax.device_put(self._read(spec, l))
                for path, spec in self._table.items()
                if path.startswith("layers/")
            }
        )


def open_lazy(path: str | Path, *, dtype: Any = None) -> Model:
    """Opens a Hugging Face folder without reading weights.

    Args:
        path: The folder, or ``BASE+ADAPTER``.
        dtype: Dtype of the parameters; None: that of the file.

    Returns:
        The configuration, and parameters that are read when asked for.

    Raises:
        InputError: as `hf.load_hf` does, but for weights that are not finite only when they are
            read.

    Example:
        >>> from ot_merge_jax.demo import assets
        >>> cfg, params = open_lazy(assets.path("sibling"))
        >>> params.leaf("layers/mlp/up_proj/kernel")[0].shape == (
        ...     cfg.hidden_size, cfg.intermediate_size)
        True
    """
    return lazy_model(open_folder(path), dtype=dtype)


def lazy_model(folder: ModelFolder, *, dtype: Any = None) -> Model:
    """`open_lazy` for a folder that is open already."""
    opened, dtypes = hf.open_files(folder), hf.stored_dtypes(folder)

    def read(spec: specs.ParamSpec, l: int | None) -> np.ndarray:
        wanted = np.dtype(dtype) if dtype is not None else dtypes[spec.path]
        first = slice(None) if l is None else slice(l, l + 1)
        index = (first, *(slice(None),) * (len(spec.shape) - 1))
        leaf, broken = hf.read_leaf(folder, opened, spec, index, wanted)
        if broken:
            raise InputError(
                f"{folder.where} holds NaN or infinite weights: {', '.join(broken)}; "
                "download it again."
            )
        return leaf if l is None else leaf[0]

    table = {spec.path: spec for spec in specs.param_specs(folder.cfg)}
    return Model(folder.cfg, LazyFolder(read, table))
