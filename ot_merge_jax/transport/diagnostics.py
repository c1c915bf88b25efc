"""How sharp a plan is and how well it predicts (method: Diagnostics)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

#: Target neurons, at most, that diagnostics of a plan look at.
SAMPLE = 1024


def sample(n: int) -> Int[np.ndarray, " k"]:
    """At most `SAMPLE` of ``n`` target neurons, evenly spaced.

    Example:
        >>> sample(3).tolist(), len(sample(5000))
        ([0, 1, 2], 1024)
    """
    return np.arange(min(n, SAMPLE)) * n // min(n, SAMPLE)


def effective_neighbours(plan: Float[Array, "n m"]) -> Float[Array, ""]:
    """Mean over rows of ``exp(entropy)`` of the row-normalised plan: 1 is a hard match.

    Example:
        >>> round(float(effective_neighbours(jnp.array([[0.25, 0.25], [0.0, 0.5]]))), 3)
        1.5
    """
    tiny = jnp.finfo(jnp.float32).tiny
    weight = jnp.abs(plan)
    weight = weight / jnp.maximum(weight.sum(1, keepdims=True), tiny)
    entropy = -jnp.sum(weight * jnp.log(jnp.maximum(weight, tiny)), 1)
    return jnp.exp(entropy).mean()


def mass_curve(plan: Float[np.ndarray, "n m"], ks: tuple[int, ...]) -> Float[np.ndarray, " ks"]:
    """Share of the plan's mass in its ``k`` largest entries, for each ``k``.

    On the host, like `sorted_heat`: numpy selects in less time than XLA compiles a sort.

    Example:
        >>> mass_curve(np.array([[0.5, 0.25], [0.25, 0.0]]), (1, 2, 9)).tolist()
        [0.5, 0.75, 1.0]

    Source: Transport and Merge, Fig. 3.
    """
    entries = np.abs(plan).ravel()
    starts = [max(0, len(entries) - k) for k in ks]
    parts = np.partition(entries, starts)
    return np.array([parts[start:].sum(dtype=np.float64) for start in starts]) / entries.sum(
        dtype=np.float64
    )


def sorted_heat(
    plan: Float[np.ndarray, "n m"], *, bins: int = 48
) -> Float[np.ndarray, "rows columns"]:
    """A small picture of a plan: source neurons ordered by where their mass goes, summed in bins.

    Args:
        plan: ``[n, m]``.
        bins: Rows and columns of the picture, at most.

    Returns:
        At most ``[bins, bins]``, summing to the plan's mass; a sharp plan shows a diagonal.

    Example:
        >>> sorted_heat(np.array([[0.0, 0.5], [0.5, 0.0]])).tolist()
        [[0.5, 0.0], [0.0, 0.5]]
    """
    plan = np.abs(plan)
    n, m = plan.shape
    centre = np.arange(n) @ plan / np.maximum(plan.sum(0), np.finfo(np.float32).tiny)
    plan = plan[:, np.argsort(centre, kind="stable")]
    for axis, size in enumerate((n, m)):
        count = min(bins, size)
        # the first place of each of `count` bins of nearly equal size
        plan = np.add.reduceat(plan, -(-np.arange(count) * size // count), axis)
    return plan


def held_out_r2(
    plan: Float[Array, "n m"],
    fitted: tuple[Float[Array, "t n"], Float[Array, "t m"]],
    held_out: tuple[Float[Array, "u n"], Float[Array, "u m"]],
) -> Float[Array, ""]:
    r"""How much of the target's held-out activations the plan predicts from the source's.

    .. math:: \hat x = \mu_t + \sigma_t \odot \big(n\,Q\,((y - \mu_s) / \sigma_s)\big)

    Args:
        plan: Plan between the two, fitted on other rows.
        fitted: Target and source activations of those rows, for means and standard deviations.
        held_out: Target and source activations of rows that the plan was not fitted on.

    Returns:
        R^2 over all neurons in units of their standard deviation: 1 is perfect, 0 is the mean.
    """
    (x, y), (x_new, y_new) = fitted, held_out

    def standardised(new: jax.Array, reference: jax.Array) -> jax.Array:
        deviation = reference.std(0)
        return (new - reference.mean(0)) / jnp.where(deviation > 0, deviation, 1.0)

    wanted = standardised(x_new, x)
    mapped = jnp.matmul(
        standardised(y_new, y), plan.shape[0] * plan.T, precision=jax.lax.Precision.HIGHEST
    )
    total = jnp.sum(wanted**2)
    return 1.0 - jnp.sum((wanted - mapped) ** 2) / jnp.where(total > 0, total, 1.0)
