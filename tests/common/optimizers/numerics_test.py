"""Decoupled AdamW against its formula in float64, weight decay, and numbers per parameter."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common import optimizers, schedule
from axlearn.common.config import config_for_function
from axlearn.common.optimizer_base import OptParam, is_opt_param, make_opt_params
from axlearn.common.utils import VDict, flatten_items


def _params(seed: int = 0, scale: float = 1.0) -> dict:
    rng = np.random.default_rng(seed)
    shapes = {"emb": (8, 4), "norm": (4,)}
    return {name: (scale * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def _decoupled_adamw_config():
    return config_for_function(optimizers.chain).set(
        args=[
            config_for_function(optimizers.clip_by_global_norm).set(max_norm=1),
            config_for_function(optimizers.adamw_decoupled_optimizer).set(
                learning_rate=6e-4,
                b1=0.9,
                b2=0.95,
                eps=1e-8,
                update_schedule=config_for_function(schedule.cosine_with_linear_warmup).set(
                    peak_lr=1.0, warmup_steps=2, max_step=10, alpha=0.1, begin_value=0.0
                ),
                weight_decay=0.01,
            ),
        ]
    )


class _Float64AdamW:
    """reference.md 14.3 for fuji-test-v2, word for word, in numpy."""

    schedule = (0.5, 1.0, 0.9657457896)

    def __init__(self, params):
        self.params = {k: v.astype(np.float64) for k, v in params.items()}
        self.mu = {k: np.zeros_like(v) for k, v in self.params.items()}
        self.nu = {k: np.zeros_like(v) for k, v in self.params.items()}
        self.t = 0

    def step(self, grads):
        self.t += 1
        grads = {k: g.astype(np.float64) for k, g in grads.items()}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for k, g in grads.items():
            g = g * min(1.0, 1.0 / (norm + 1e-8))
            self.mu[k] = 0.9 * self.mu[k] + 0.1 * g
            self.nu[k] = 0.95 * self.nu[k] + 0.05 * g**2
            u = (self.mu[k] / (1 - 0.9**self.t)) / (np.sqrt(self.nu[k] / (1 - 0.95**self.t)) + 1e-8)
            p = self.params[k]
            self.params[k] = p - self.schedule[self.t - 1] * (6e-4 * u + 0.01 * p)


@pytest.mark.parametrize("gradient_scale", [10.0, 1e-3], ids=["clipped", "not clipped"])
def test_decoupled_adamw_equals_its_formula_in_float64(gradient_scale):
    optimizer = _decoupled_adamw_config().instantiate()
    params = _params()
    reference = _Float64AdamW(params)
    state = optimizer.init(make_opt_params(params))

    @jax.jit
    def step(grads, state, params):
        updates, state = optimizer.update(grads, state, make_opt_params(params))
        return jax.tree.map(jnp.add, params, updates), state

    for seed in (1, 2, 3):
        grads = _params(seed, scale=gradient_scale)
        reference.step(grads)
        params, state = step(grads, state, params)
    adam_state = state[1][0]
    for name in params:
        np.testing.assert_allclose(params[name], reference.params[name], atol=1e-6)
        # Relative to the tensor's largest value: single elements may cancel.
        largest = np.abs(reference.mu[name]).max()
        np.testing.assert_allclose(adam_state.mu[name], reference.mu[name], atol=1e-6 * largest)
        largest = np.abs(reference.nu[name]).max()
        np.testing.assert_allclose(adam_state.nu[name], reference.nu[name], atol=1e-6 * largest)
    assert [int(x) for x in (adam_state.count, state[1][1].count, state[1][3].count)] == [3, 3, 3]


def test_decoupled_adamw_has_the_state_paths_of_the_reference():
    optimizer = _decoupled_adamw_config().instantiate()
    state = jax.eval_shape(optimizer.init, make_opt_params({"emb": np.zeros((8, 4), np.float32)}))
    assert [path for path, _ in flatten_items({"optimizer": state})] == [
        "optimizer/1/0/count",
        "optimizer/1/0/mu/emb",
        "optimizer/1/0/nu/emb",
        "optimizer/1/1/count",
        "optimizer/1/3/count",
    ]


def test_a_constant_update_schedule_and_a_constant_one_by_config_are_the_same():
    number = config_for_function(optimizers.scale_by_schedule).set(schedule_fn=0.5).instantiate()
    nested = config_for_function(optimizers.scale_by_schedule).set(
        schedule_fn=config_for_function(schedule.constant_with_linear_warmup).set(peak_lr=0.5, warmup_steps=0)
    )
    for transformation in (number, nested.instantiate()):
        updates, _ = transformation.update({"x": jnp.ones(2)}, transformation.init({}), {})
        np.testing.assert_array_equal(updates["x"], 0.5)


def test_weight_decay_of_a_parameter_follows_its_spec_before_the_rules():
    params = {
        "bias": OptParam(jnp.full(2, 10.0)),
        "own": OptParam(jnp.full(2, 10.0), weight_decay_scale=3.0),
        "weight": OptParam(jnp.full(2, 10.0)),
    }
    updates = {name: jnp.ones(2) for name in params}
    transformation = optimizers.add_decayed_weights(
        0.1,
        per_param_scale=config_for_function(optimizers.per_param_scale_by_path).set(
            description="weight_decay_scale", scale_by_path=[(".*bias|own", 0)]
        ),
    )
    updates, _ = transformation.update(updates, transformation.init(params), params)
    assert {name: float(x[0]) for name, x in updates.items()} == {"bias": 1.0, "own": 4.0, "weight": 2.0}


def test_weight_decay_scales_with_a_power_of_the_learning_rate():
    transformation = optimizers.add_decayed_weights(
        0.1, learning_rate=lambda step: step * 2.0, learning_rate_exponent=2.0
    )
    params = {"w": OptParam(jnp.full(2, 10.0))}
    state = transformation.init(params)
    for step in (1, 2):
        updates, state = transformation.update({"w": jnp.zeros(2)}, state, params)
        np.testing.assert_allclose(updates["w"], 0.1 * (2.0 * step) ** 2 * 10.0, rtol=1e-6)
    with pytest.raises(ValueError, match=r"learning_rate_exponent=2.0 without a learning_rate"):
        optimizers.add_decayed_weights(0.1, learning_rate_exponent=2.0)


def test_l2_regularizer_adds_the_gradient_of_the_penalty():
    params = {"w": jnp.asarray([1.0, -2.0, 3.0])}
    transformation = optimizers.l2_regularizer(0.3)
    opt_params = make_opt_params(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = transformation.update(zeros, transformation.init(opt_params), opt_params)
    penalty_grad = jax.grad(lambda p: 0.15 * jnp.sum(p["w"] ** 2))(params)
    np.testing.assert_allclose(updates["w"], penalty_grad["w"], rtol=1e-6)


def test_scale_update_per_param_freezes_at_zero_and_leaves_other_bits_alone():
    updates = {"a": {"weight": jnp.asarray([jnp.nan, 1.0])}, "b": jnp.asarray([0.1, -0.0]), "c": jnp.ones(2)}
    params = jax.tree.map(OptParam, updates)
    transformation = optimizers.scale_update_per_param(
        config_for_function(optimizers.per_param_scale_by_path).set(
            description="update_scale", scale_by_path=[("a/.*", 0.0), ("c", 0.5), ("no/such/layer", 2.0)]
        )
    )
    scaled, _ = transformation.update(updates, transformation.init(params), params)
    np.testing.assert_array_equal(scaled["a"]["weight"], 0.0)
    np.testing.assert_array_equal(
        np.asarray(scaled["b"]).view(np.uint32), np.asarray(updates["b"]).view(np.uint32)
    )
    np.testing.assert_array_equal(scaled["c"], 0.5)


def test_per_param_scale_by_rms_treats_repeated_layers_one_by_one():
    rng = np.random.default_rng(0)
    stacked = rng.standard_normal((3, 4, 5)).astype(np.float32) * np.asarray([1.0, 10.0, 0.0])[:, None, None]
    params = {"repeat": VDict(w=jnp.asarray(stacked, jnp.float32)), "w": jnp.asarray(stacked[0], jnp.float32)}
    scales = optimizers.per_param_scale_by_rms(min_scale=1e-4)(make_opt_params(params))
    expected = np.maximum(np.sqrt((stacked**2).mean(axis=(1, 2))), 1e-4)
    np.testing.assert_allclose(scales["repeat"]["w"], expected, rtol=1e-6)
    np.testing.assert_allclose(scales["w"], expected[0], rtol=1e-6)
    transformation = optimizers.scale_by_param_block_rms(1e-4)
    opt_params = make_opt_params(params)
    updates, _ = transformation.update(
        jax.tree.map(jnp.ones_like, params), transformation.init(opt_params), opt_params
    )
    np.testing.assert_allclose(
        updates["repeat"]["w"], np.broadcast_to(expected[:, None, None], stacked.shape), rtol=1e-6
    )


def test_bfloat16_updates_stay_bfloat16_and_are_scaled_in_float32():
    updates = {"w": jnp.asarray([1.0, 3.0], jnp.bfloat16)}
    params = make_opt_params(updates)
    for transformation in (
        optimizers.scale_by_schedule(1 / 3),
        optimizers.clip_by_global_norm(0.01),
        optimizers.add_decayed_weights(0.1),
    ):
        new_updates, _ = transformation.update(updates, transformation.init(params), params)
        assert new_updates["w"].dtype == jnp.bfloat16
    scaled, _ = optimizers.scale_by_schedule(1 / 3).update(
        updates, optimizers.scale_by_schedule(1 / 3).init(params), params
    )
    np.testing.assert_array_equal(
        scaled["w"], (np.asarray([1.0, 3.0], np.float32) * np.float32(1 / 3)).astype(jnp.bfloat16)
    )


FUJI_TEST_V1 = [
    "decoder/emb/token_emb/weight",
    "decoder/output_norm/scale",
    "decoder/transformer/repeat/layer/feed_forward/linear1_0/weight",
    "decoder/transformer/repeat/layer/feed_forward/linear1_1/weight",
    "decoder/transformer/repeat/layer/feed_forward/linear2/weight",
    "decoder/transformer/repeat/layer/feed_forward/norm/scale",
    "decoder/transformer/repeat/layer/self_attention/attention/i_proj/i_proj/qkv_proj/weight",
    "decoder/transformer/repeat/layer/self_attention/attention/o_proj/weight",
    "decoder/transformer/repeat/layer/self_attention/norm/scale",
]


def test_registered_settings_print_the_regularizer_file_of_the_reference():
    params = dict.fromkeys(reversed(FUJI_TEST_V1), OptParam(jnp.ones(2)))
    with optimizers.collect_per_param_settings() as records:
        settings = jax.tree.map(lambda _: 1, params, is_leaf=is_opt_param)
        optimizers.register_per_param_settings(
            settings, description="weight_decay_scale", path="root.optimizer"
        )
    (record,) = records
    # fuji-test-v1_regularizer.txt in the shared SHA256SUMS, which are of the texts without a final newline.
    expected = "5950ea7b9e17751be97e3434fe9e6516b5136bb1b253b2f5720fc1c479268e57"
    assert hashlib.sha256(str(record).encode()).hexdigest() == expected


def test_settings_are_recorded_only_where_somebody_collects_them():
    assert optimizers.register_per_param_settings({"w": 1}, description="x") == {"w": 1}
    with optimizers.collect_per_param_settings() as outer:
        optimizers.register_per_param_settings({"w": 1}, description="outer")
        with optimizers.collect_per_param_settings() as inner:
            optimizers.register_per_param_settings({"w": 1, "masked": None}, description="inner")
    assert [record.description for record in outer] == ["outer"]
    assert [(record.description, record.settings) for record in inner] == [("inner", {"w": 1})]


def test_chain_refuses_what_is_no_transformation():
    with pytest.raises(TypeError) as e:
        optimizers.chain(optimizers.scale(1.0), config_for_function(schedule.ema_schedule))
    assert str(e.value) == (
        "chain.args[1]: function is not a partitioned transformation.\n"
        "  Expected PartitionedGradientTransformation(init, update, partition), or the config of one. "
        "Wrap transformations of optax by with_partition_fn."
    )
