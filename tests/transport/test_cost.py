"""The correlation cost against `np.corrcoef` in float64, and the columns it cannot see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_merge_jax.transport import cost

#: (rows, target width, source width): never square by accident.
SIZES = [(2, 1, 1), (3, 2, 1), (5, 2, 3), (50, 5, 11), (257, 64, 33)]
_jitted = jax.jit(cost.correlation_cost, static_argnames=("signed",))
_std = jax.jit(lambda x: cost.standardize(x)[1])


def correlation_cost(x, y, *, signed=False):
    """Ours, numpy in and out, one compilation for each shape."""
    return np.asarray(_jitted(jnp.asarray(x), jnp.asarray(y), signed=signed))


def correlation(x, y):
    """Pearson correlation in float64, ``[n, m]``."""
    n = x.shape[1]
    both = np.concatenate([x, y], 1).astype(np.float64)
    return np.atleast_2d(np.corrcoef(both, rowvar=False))[:n, n:]


def draw(rng, t, width):
    """Rows of one model: columns of different scale and offset."""
    scale, offset = rng.uniform(0.1, 5, width), rng.normal(size=width)
    return (scale * rng.normal(size=(t, width)) + offset).astype(np.float32)


@pytest.fixture(params=SIZES, ids=str)
def pair(request, rng):
    t, n, m = request.param
    return draw(rng, t, n), draw(rng, t, m)


def test_is_one_minus_the_correlation(pair):
    x, y = pair
    ours = _jitted(jnp.asarray(x), jnp.asarray(y))
    assert ours.shape == (x.shape[1], y.shape[1])
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, 1 - correlation(x, y), rtol=0, atol=2e-6)


def test_signed_is_one_minus_the_absolute_correlation(pair):
    x, y = pair
    ours = correlation_cost(x, y, signed=True)
    np.testing.assert_allclose(ours, 1 - np.abs(correlation(x, y)), rtol=0, atol=2e-6)


def test_promotes_nothing_implicitly(rng, strict):
    x, y = (jnp.asarray(draw(rng, 50, width)) for width in (5, 11))
    with strict():
        ours = cost.correlation_cost(x, y)
        deviations = cost.standardize(x)[1]
    np.testing.assert_allclose(ours, correlation_cost(x, y), rtol=0, atol=1e-6)
    np.testing.assert_allclose(deviations, _std(x), rtol=1e-6)


def test_stays_in_its_range(pair):
    """Rounding never leaves [0, 2] (signed: [0, 1]), not even for equal columns."""
    x, _ = pair
    for other in (x, -x):
        ours = correlation_cost(x, other)
        assert ours.min() >= 0
        assert ours.max() <= 2
        assert correlation_cost(x, other, signed=True).max() <= 1


def test_a_column_costs_nothing_against_itself_and_two_against_its_negative(pair):
    x, _ = pair
    np.testing.assert_allclose(np.diag(correlation_cost(x, x)), 0, atol=1e-6)
    np.testing.assert_allclose(np.diag(correlation_cost(x, -x)), 2, atol=1e-6)


def test_swapping_the_models_transposes(pair):
    x, y = pair
    np.testing.assert_allclose(correlation_cost(x, y), correlation_cost(y, x).T, rtol=0, atol=1e-6)


@pytest.mark.parametrize("power", [-20, -1, 3, 20])
def test_a_scale_is_invisible(pair, power):
    """A power of two only changes exponents, so the equality is exact."""
    x, y = pair
    scaled = x * np.float32(2.0**power)
    np.testing.assert_array_equal(correlation_cost(scaled, y), correlation_cost(x, y))


def test_a_scale_of_each_column_is_invisible(pair, rng):
    x, y = pair
    scaled = x * rng.uniform(0.01, 100, x.shape[1]).astype(np.float32)
    np.testing.assert_allclose(
        correlation_cost(scaled, y), correlation_cost(x, y), rtol=0, atol=2e-6
    )


def test_a_shift_is_invisible(pair, rng):
    """Integers, so that the shifted columns are the same numbers and the equality is exact."""
    x, y = (np.round(8 * z) for z in pair)
    shifted = y + rng.integers(-(2**15), 2**15, y.shape[1]).astype(np.float32)
    np.testing.assert_array_equal(correlation_cost(x, shifted), correlation_cost(x, y))


def test_a_negative_scale_mirrors(pair):
    x, y = pair
    np.testing.assert_allclose(
        correlation_cost(-x, y), 2 - correlation_cost(x, y), rtol=0, atol=1e-6
    )
    np.testing.assert_allclose(
        correlation_cost(-x, y, signed=True), correlation_cost(x, y, signed=True), atol=1e-6
    )


#: Constants whose float32 mean over 50 rows is not always themselves, and one that is.
CONSTANTS = [0.0, 5.0, 0.1, -12345.678, 1e8, 3.3e20]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("value", CONSTANTS)
def test_a_constant_column_costs_exactly_one(rng, value, signed):
    x, y = draw(rng, 50, 5), draw(rng, 50, 11)
    x[:, 2], y[:, 1] = value, -value
    ours = correlation_cost(x, y, signed=signed)
    np.testing.assert_array_equal(ours[2], 1)
    np.testing.assert_array_equal(ours[:, 1], 1)
    assert (np.delete(np.delete(ours, 2, 0), 1, 1) != 1).all()


def test_rounding_noise_on_a_constant_is_constant(rng):
    """A column that flips by one unit in the last place knows nothing."""
    x, y = draw(rng, 50, 5), draw(rng, 50, 11)
    base = np.float32(1234.5)
    x[:, 0] = np.where(rng.random(50) < 0.5, base, np.nextafter(base, np.float32(2e3)))
    assert np.ptp(x[:, 0]) > 0
    np.testing.assert_array_equal(correlation_cost(x, y)[0], 1)


@pytest.mark.parametrize("offset", [1e3, 1e5, -1e6])
def test_small_variance_on_a_large_offset_stays_accurate(rng, offset):
    """Against float64 on the same float32 numbers; one-pass float32 moments lose all digits."""
    spread = 40 * np.spacing(np.float32(abs(offset)))
    signal = rng.normal(size=(50, 5))
    x = (offset + spread * signal).astype(np.float32)
    y = (signal @ rng.normal(size=(5, 11))).astype(np.float32)
    assert np.abs(correlation(x, y)).max() > 0.5
    np.testing.assert_allclose(correlation_cost(x, y), 1 - correlation(x, y), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_input_is_read_as_float32(rng, dtype):
    x, y = (jnp.asarray(draw(rng, 50, width), dtype) for width in (5, 11))
    ours = _jitted(x, y)
    assert ours.dtype == jnp.float32
    np.testing.assert_array_equal(ours, correlation_cost(*(z.astype(np.float32) for z in (x, y))))


def test_a_nan_is_not_hidden(rng):
    x, y = draw(rng, 50, 5), draw(rng, 50, 11)
    x[7, 1] = np.nan
    ours = correlation_cost(x, y)
    assert np.isnan(ours[1]).all()
    assert np.isfinite(np.delete(ours, 1, 0)).all()


@pytest.mark.parametrize(("t_x", "t_y"), [(5, 4), (4, 5), (1, 1), (0, 0), (2, 1)])
def test_rows_must_correspond_and_be_two(t_x, t_y, unchecked):
    with pytest.raises(ValueError, match="correspond one to one"):
        cost.correlation_cost(jnp.zeros((t_x, 3)), jnp.zeros((t_y, 2)))


def test_vmap_changes_nothing(rng):
    xs, ys = (np.stack([draw(rng, 50, width) for _ in range(3)]) for width in (5, 11))
    one_by_one = np.stack([correlation_cost(x, y) for x, y in zip(xs, ys, strict=True)])
    ours = jax.jit(jax.vmap(cost.correlation_cost))(jnp.asarray(xs), jnp.asarray(ys))
    np.testing.assert_allclose(ours, one_by_one, rtol=0, atol=1e-6)


def test_std_is_the_population_one(pair):
    x, _ = pair
    np.testing.assert_allclose(_std(jnp.asarray(x)), x.astype(np.float64).std(0), rtol=2e-6)


@pytest.mark.parametrize("value", CONSTANTS)
def test_std_of_a_constant_counts_as_one(rng, value):
    x = draw(rng, 50, 5)
    expected = x.std(0)
    x[:, 1], expected[1] = value, 1
    np.testing.assert_allclose(_std(jnp.asarray(x)), expected, rtol=1e-5)


def test_centred_columns_have_mean_zero_and_constants_vanish(rng):
    x = draw(rng, 50, 5)
    x[:, 1] = -12345.678
    centre, deviation = jax.jit(cost.center)(jnp.asarray(x))
    np.testing.assert_allclose(np.asarray(centre).mean(0), 0, atol=5e-6)
    np.testing.assert_array_equal(centre[:, 1], 0)
    assert deviation[1] == 0
