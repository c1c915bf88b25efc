"""The cost of matching two neurons: how little their activations correlate. Imports JAX only."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# A column whose spread is within this many units in the last place of its largest entry is
# constant: its variance is rounding noise, and dividing by it would invent correlations.
_CONSTANT_ULPS = 8


def center(x: Float[Array, "t n"]) -> tuple[Float[Array, "t n"], Float[Array, " n"]]:
    """Columns minus their mean, and their standard deviations.

    Args:
        x: One row per sample. Any float dtype; statistics are taken in float32.

    Returns:
        Centred columns, exactly zero where a column is constant, and the population standard
        deviations ``[n]`` in the units of ``x``, 0 where constant.
    """
    x = x.astype(jnp.float32)
    low, high = x.min(0), x.max(0)
    is_constant = _is_constant(low, high)
    shifted = x - low[None]  # exact for close values: a large common offset costs no precision
    centre = jnp.where(is_constant[None], 0.0, shifted - shifted.mean(0, keepdims=True))
    return centre, jnp.sqrt(jnp.mean(centre * centre, 0))


def _is_constant(low: Any, high: Any) -> Any:
    """Whether columns between these bounds differ by rounding alone."""
    ulp = np.finfo(np.float32).eps * abs(low).clip(abs(high))
    return high - low <= _CONSTANT_ULPS * ulp


def is_nonconstant(values: Any) -> np.ndarray:
    """Whether any neuron of a site ever changes, for each layer.

    Args:
        values: ``[layers, t, d]``, on the host; read one layer at a time.

    Returns:
        ``[layers]`` of booleans.

    Example:
        >>> is_nonconstant(np.array([[[1.0, 2.0], [1.0, 3.0]], [[1.0, 2.0], [1.0, 2.0]]])).tolist()
        [True, False]
    """
    return np.array([not _is_constant(layer.min(0), layer.max(0)).all() for layer in values])


def standardize(x: Float[Array, "t n"]) -> tuple[Float[Array, "t n"], Float[Array, " n"]]:
    """Columns of mean 0 and norm 1, and their standard deviations.

    Args:
        x: One row per sample.

    Returns:
        Unit columns, zero where a column is constant, and the population standard deviations
        ``[n]``, where a constant column counts as 1 (method: Activations).

    Example:
        >>> unit, std = standardize(jnp.array([[1.0, 5.0], [3.0, 5.0]]))
        >>> unit.round(3).tolist(), std.tolist()
        ([[-0.7070000171661377, 0.0], [0.7070000171661377, 0.0]], [1.0, 1.0])
    """
    centre, deviation = center(x)
    deviation = jnp.where(deviation > 0, deviation, 1.0)
    return centre / (deviation[None] * x.shape[0] ** 0.5), deviation


def cost_from_standardized(
    x: Float[Array, "t n"], y: Float[Array, "t m"], *, signed: bool = False
) -> Float[Array, "n m"]:
    """The cost of columns that `standardize` has made; see `correlation_cost`."""
    rho = correlation_from_standardized(x, y)
    return 1.0 - (jnp.abs(rho) if signed else rho)


def correlation_from_standardized(
    x: Float[Array, "t n"], y: Float[Array, "t m"]
) -> Float[Array, "n m"]:
    """Correlation of columns that `standardize` has made."""
    # really transposed: on CPU a product over the leading axes of both takes 1.2 times as long
    rows = jax.lax.optimization_barrier(x.T)
    return jnp.clip(jnp.matmul(rows, y, precision=jax.lax.Precision.HIGHEST), -1.0, 1.0)


def correlation(x: Float[Array, "t n"], y: Float[Array, "t m"]) -> Float[Array, "n m"]:
    """Pearson correlation of every column of ``x`` with every one of ``y``; 0 if one is constant.

    Args:
        x: Target activations, one row per sample.
        y: Source activations; row ``k`` must come from the same sample as row ``k`` of ``x``.

    Returns:
        ``[n, m]`` in [-1, 1], float32.

    Raises:
        ValueError: if the sample counts differ or are below 2.
    """
    if x.shape[0] != y.shape[0] or x.shape[0] < 2:
        raise ValueError(
            f"Rows of the two models must correspond one to one and be at least 2, "
            f"not {x.shape[0]} and {y.shape[0]}."
        )
    return correlation_from_standardized(standardize(x)[0], standardize(y)[0])


def correlation_cost(
    x: Float[Array, "t n"], y: Float[Array, "t m"], *, signed: bool = False
) -> Float[Array, "n m"]:
    r"""Pearson correlation distance between the columns of two sample-aligned arrays.

    .. math:: C_{ij} = 1 - \rho(x_{:,i},\, y_{:,j}) \in [0, 2]

    Args:
        x: Target activations, one row per sample. Any float dtype; statistics are in float32.
        y: Source activations; row ``k`` must come from the same sample as row ``k`` of ``x``.
        signed: Use :math:`1 - |\rho|` in [0, 1], so that a neuron may match its negative.

    Returns:
        ``[n, m]`` cost, dimensionless. Columns with zero variance get cost 1 (uncorrelated).

    Raises:
        ValueError: if the sample counts differ or are below 2.

    Example:
        >>> correlation_cost(jnp.array([[0.0], [1.0]]), jnp.array([[1.0], [0.0]]))
        Array([[2.]], dtype=float32)

    Source: Transport and Merge, arXiv 2602.05495, eq. 7. Differs: constant columns are defined, and
    ``signed`` is ours.
    """
    rho = correlation(x, y)
    return 1.0 - (jnp.abs(rho) if signed else rho)
