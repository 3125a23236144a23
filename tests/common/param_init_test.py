"""Initializers: distributions against numpy's moments and jax's own initializers, and the lines that describe
them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.param_init import (
    PARAM_REGEXP_WEIGHT,
    ConstantInitializer,
    DefaultInitializer,
    FanAxes,
    GaussianInitializer,
    PerGroupInitializer,
    WeightInitializer,
)

AXES = FanAxes(in_axis=-2, out_axis=-1)


def weight_init(**kwargs):
    return WeightInitializer.default_config().set(**kwargs).instantiate()


def draw(initializer, shape, axes=AXES, name="weight", dtype=jnp.float32):
    return initializer.initialize(name, prng_key=jax.random.PRNGKey(1), shape=shape, dtype=dtype, axes=axes)


@pytest.mark.parametrize("distribution", ["normal", "uniform", "truncated_normal"])
@pytest.mark.parametrize("fan", ["fan_in", "fan_out", "fan_avg"])
def test_weights_equal_those_of_jax(distribution, fan):
    shape = (48, 64)
    expected = jax.nn.initializers.variance_scaling(2.0, fan, distribution)(jax.random.PRNGKey(1), shape)
    got = draw(weight_init(scale=2.0, fan=fan, distribution=distribution), shape)
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-7)


def test_normal_weights_are_draws_times_the_standard_deviation_but_for_the_last_bit():
    """The last bit is that of one product with sqrt(2) * std; the reference's checkpoint proves it elsewhere."""
    got = draw(weight_init(scale=1.0, fan="fan_out", distribution="normal"), [32, 11])
    draws = np.asarray(jax.random.normal(jax.random.PRNGKey(1), (32, 11), jnp.float32))
    np.testing.assert_array_max_ulp(np.asarray(got), draws * np.float32(np.sqrt(1.0 / 11)), maxulp=2)


def test_normal_weights_have_the_same_bits_compiled_or_not():
    initializer = weight_init(scale=1.0, fan="fan_out", distribution="normal")
    compiled = jax.jit(lambda: draw(initializer, [32, 11]))()
    np.testing.assert_array_equal(draw(initializer, [32, 11]), compiled)


@pytest.mark.parametrize(
    ("distribution", "std"), [("normal", 0.1), ("uniform", 0.1 / np.sqrt(3)), ("truncated_normal", 0.1)]
)
def test_without_a_fan_the_scale_is_the_width(distribution, std):
    values = np.asarray(
        draw(weight_init(scale=0.1, fan=None, distribution=distribution), (200, 100), axes=None)
    )
    np.testing.assert_allclose(values.std(), std, rtol=0.02)
    np.testing.assert_allclose(values.mean(), 0, atol=2e-3)


def test_fans_follow_the_axes():
    assert AXES.fans((3, 5)) == {"fan_in": 3, "fan_out": 5, "fan_avg": 4}
    # A fused projection, stacked over layers.
    axes = FanAxes(in_axis=0, out_axis=(1, 2)).prepend_axis(FanAxes.AxisType.BATCH)
    assert axes.fans((7, 8, 6, 2)) == {"fan_in": 8, "fan_out": 12, "fan_avg": 10}
    # A convolution: the window counts for both.
    assert AXES.fans((3, 3, 4, 5)) == {"fan_in": 36, "fan_out": 45, "fan_avg": 40.5}


def test_axes_can_be_added_in_front_and_behind():
    axes = FanAxes(in_axis=0, out_axis=-1)
    assert axes.prepend_axis(FanAxes.AxisType.NONE) == FanAxes(in_axis=(1,), out_axis=(-1,), batch_axis=())
    assert axes.append_axis(FanAxes.AxisType.OUT) == FanAxes(in_axis=(0,), out_axis=(-1, -2), batch_axis=())
    assert axes.prepend_axis(FanAxes.AxisType.IN) == FanAxes(in_axis=(0, 1), out_axis=(-1,), batch_axis=())


def test_the_description_has_the_form_of_the_reference():
    shape, axes = (8, 4, 2), FanAxes(in_axis=(1, 2), out_axis=0)
    assert weight_init(distribution="normal", fan="fan_in").debug_string("weight", shape, axes) == (
        "normal(0, 1.0 / fan_in), shape=(8, 4, 2), axes=FanAxes(in_axis=(1, 2), out_axis=0, batch_axis=())"
    )
    assert weight_init(distribution="normal", fan="fan_out").debug_string("weight", [32, 8], AXES) == (
        "normal(0, 1.0 / fan_out), shape=[32, 8], axes=FanAxes(in_axis=-2, out_axis=-1, batch_axis=())"
    )
    assert weight_init().debug_string("weight", (1,), None) == (
        "uniform(-sqrt(3.0 / fan_avg), sqrt(3.0 / fan_avg)), shape=(1,), axes=None"
    )
    assert weight_init(distribution="truncated_normal", scale=2.0).debug_string("weight", (1,), None) == (
        "truncated_normal(-2, 2) * sqrt(2.0 / fan_avg) / 0.88, shape=(1,), axes=None"
    )
    assert weight_init(fan=None, scale=0.5).debug_string("weight", (1,), None) == "uniform(-0.5, 0.5)"
    assert ConstantInitializer.default_config().set(value=1.0).instantiate().debug_string() == "constant(1.0)"


def test_the_default_chooses_by_name_the_config_first():
    init = DefaultInitializer.default_config().instantiate()
    assert np.array_equal(draw(init, (3,), name="bias"), np.zeros(3))
    assert np.array_equal(draw(init, (3,), name="scale"), np.ones(3))
    assert init.debug_string("weight", (1, 1), AXES).startswith("uniform(-sqrt(3.0 / fan_avg)")
    cfg = DefaultInitializer.default_config().set(
        init_by_param_name={
            "special_weight": ConstantInitializer.default_config().set(value=2.0),
            PARAM_REGEXP_WEIGHT: WeightInitializer.default_config().set(fan="fan_in", distribution="normal"),
        }
    )
    init = cfg.instantiate()
    assert init.debug_string("special_weight") == "constant(2.0)"
    assert init.debug_string("weight").startswith("normal(0, 1.0 / fan_in)")
    assert init.debug_string("bias") == "constant(0.0)"
    with pytest.raises(NotImplementedError, match="no initializer for a parameter called 'gamma'"):
        draw(init, (3,), name="gamma")


def test_illegal_settings_are_refused():
    with pytest.raises(ValueError, match=r"fan='fan_inn' is unknown. Expected one of"):
        weight_init(fan="fan_inn")
    with pytest.raises(ValueError, match="distribution='gauss' is unknown"):
        weight_init(distribution="gauss")
    with pytest.raises(ValueError, match=r"needs the fan axes of the weight of shape \(2, 3, 4\)"):
        draw(weight_init(), (2, 3, 4), axes=None)


def test_a_gaussian_has_its_mean_and_width():
    init = GaussianInitializer.default_config().set(std=0.5, mean=3.0).instantiate()
    values = np.asarray(draw(init, (20000,), axes=None))
    np.testing.assert_allclose([values.mean(), values.std()], [3.0, 0.5], atol=0.02)
    assert init.debug_string() == "normal(3.0, 0.5^2)"


def test_groups_have_the_fans_of_their_block():
    cfg = PerGroupInitializer.default_config().set(
        initializer=WeightInitializer.default_config().set(fan="fan_out", distribution="normal"), num_groups=4
    )
    values = np.asarray(draw(cfg.instantiate(), (500, 64)))
    np.testing.assert_allclose(values.std(), np.sqrt(1 / 16), rtol=0.02)
    assert not np.array_equal(values[:, :16], values[:, 16:32])
    with pytest.raises(ValueError, match="does not divide into num_groups=4"):
        draw(cfg.instantiate(), (2, 6))
