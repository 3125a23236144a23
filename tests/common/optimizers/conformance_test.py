"""What every public transformation promises, checked for all of them: a new one must be added to EXAMPLES."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from axlearn.common import optimizers, schedule
from axlearn.common.base_layer import FactorizationSpec, ParameterSpec
from axlearn.common.optimizer_base import (
    PartitionedGradientTransformation,
    is_opt_param,
    make_opt_params,
)
from axlearn.common.utils import TensorSpec, VDict, build_mesh, flatten_items, use_mesh

COSINE = schedule.cosine_with_linear_warmup(1.0, max_step=10, warmup_steps=2, alpha=0.1)
ADAM = {"b1": 0.9, "b2": 0.95, "eps": 1e-8}


def _halve(per_param=1.0):
    return optimizers.scale_update_per_param(
        optimizers.per_param_scale_by_path(description="test", scale_by_path=[(".*weight", per_param)])
    )


def _skipping():
    return optimizers.skip_and_clip_by_global_norm(
        optimizers.adamw_optimizer(0.1, **ADAM),
        drop_norm=optimizers.drop_norm_by_grad_norm_ema((20, 40)),
        max_norm=1.0,
        grad_norm_ema_decay=0.9,
    )


def _adastar(**fields):
    defaults = {
        "gradient_ema_decay": 0.9,
        "gradient_ema_debias": True,
        "gradient_square_ema_decay": 0.95,
        "gradient_square_ema_debias": True,
        "eps": 1e-8,
        "eps_square": 0.0,
        "raw_update_clipping_threshold": None,
        "update_ema_decay": None,
        "update_ema_debias": None,
        "update_schedule": COSINE,
    }
    return optimizers.adastar_optimizer(0.1, **{**defaults, **fields})


def _adafactor(**fields):
    defaults = {
        "b1": 0.9,
        "b2": schedule.adafactor_decay_rate(),
        "multiply_by_parameter_scale": False,
        "clipping_threshold": 1.0,
    }
    return optimizers.adafactor_optimizer(fields.pop("learning_rate", 0.1), **{**defaults, **fields})


# One example of every public function that makes a transformation.
EXAMPLES = {
    "adafactor_optimizer": lambda: _adafactor(
        multiply_by_parameter_scale=True,
        weight_decay=0.01,
        weight_decay_scale_by_learning_rate_exponent=1,
        apply_scale_by_trust_ratio=True,
    ),
    "adastar_optimizer": lambda: _adastar(
        raw_update_clipping_threshold=1.0,
        update_ema_decay=0.95,
        update_ema_debias=False,
        eps_square=1e-30,
        weight_decay=0.01,
        adam_update_transformation=_halve(0.5),
        verbosity=1,
    ),
    "adam_optimizer": lambda: optimizers.adam_optimizer(0.1, **ADAM, l2_regularizer_weight=0.01),
    "adam_partition": lambda: optimizers.adam_partition(optax.scale_by_adam()),
    "adamw_decoupled_optimizer": lambda: optimizers.adamw_decoupled_optimizer(
        0.1, **ADAM, update_schedule=COSINE, weight_decay=0.01, adam_update_transformation=_halve(0.5)
    ),
    "adamw_optimizer": lambda: optimizers.adamw_optimizer(
        COSINE, **ADAM, weight_decay=0.01, mu_dtype=jnp.bfloat16
    ),
    "add_decayed_weights": lambda: optimizers.add_decayed_weights(
        0.1, learning_rate=COSINE, learning_rate_exponent=1.0
    ),
    "chain": lambda: optimizers.chain(optimizers.clip_by_global_norm(1.0), optimizers.scale_by_adam()),
    "clip_by_block_rms": lambda: optimizers.clip_by_block_rms(0.5, summary_suffix="test"),
    "clip_by_global_norm": lambda: optimizers.clip_by_global_norm(0.5, drop_norm=100.0),
    "ema": lambda: optimizers.ema(0.9, accumulator_dtype=jnp.bfloat16),
    "l2_regularizer": lambda: optimizers.l2_regularizer(0.1),
    "lion_optimizer": lambda: optimizers.lion_optimizer(
        0.1, b1=0.9, b2=0.99, weight_decay=0.01, multiply_by_parameter_scale=True
    ),
    "named_chain": lambda: optimizers.named_chain(
        momentum=optimizers.trace(0.9), learning_rate=optimizers.scale_from_learning_rate(0.1)
    ),
    "offload_optimizer": lambda: optimizers.offload_optimizer(
        optimizers.adamw_optimizer(0.1, **ADAM), pattern=".*/(mu|nu)/.*"
    ),
    "param_ema": lambda: optimizers.param_ema(decay=schedule.decay_bias_correction(0.9)),
    "scale": lambda: optimizers.scale(-2.0),
    "scale_by_adam": lambda: optimizers.scale_by_adam(mu_dtype=jnp.bfloat16),
    "scale_by_factored_rms": lambda: optimizers.scale_by_factored_rms(decay_rate=0.9),
    "scale_by_lion": lambda: optimizers.scale_by_lion(mu_dtype=jnp.bfloat16),
    "scale_by_param_block_rms": lambda: optimizers.scale_by_param_block_rms(),
    "scale_by_trust_ratio": lambda: optimizers.scale_by_trust_ratio(),
    "scale_by_schedule": lambda: optimizers.scale_by_schedule(COSINE, name="test"),
    "scale_from_learning_rate": lambda: optimizers.scale_from_learning_rate(COSINE),
    "scale_update_per_param": lambda: _halve(0.5),
    "sgd_optimizer": lambda: optimizers.sgd_optimizer(
        0.1, decouple_weight_decay=True, momentum=0.9, weight_decay=0.01
    ),
    "skip_and_clip_by_global_norm": _skipping,
    "trace": lambda: optimizers.trace(0.9, nesterov=True, accumulator_dtype=jnp.bfloat16),
    "with_partition_fn": lambda: optimizers.with_partition_fn(
        optax.scale(2.0), lambda param_specs: optax.EmptyState()
    ),
}

# A repeated layer, a matrix, a vector, and one parameter that is masked.
SPECS = {
    "head": {
        "bias": ParameterSpec((8,), jnp.float32, PartitionSpec("model"), weight_decay_scale=0.0),
        "weight": ParameterSpec(
            (16, 8),
            jnp.float32,
            PartitionSpec("data", "model"),
            factorization=FactorizationSpec(axes=["row", "col"]),
        ),
    },
    "masked": None,
    "repeat": VDict(
        layer={"weight": ParameterSpec((2, 8, 16), jnp.float32, PartitionSpec(None, "model", "data"))}
    ),
}


def _random(seed: int, scale: float = 1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda spec: (scale * rng.standard_normal(spec.shape)).astype(np.float32), SPECS)


def _shardings(specs):
    return jax.tree.map(lambda spec: spec.sharding, specs)


class _Compiled:
    """One example with its step compiled for one device."""

    def __init__(self, name: str):
        self.transformation = EXAMPLES[name]()
        self.num_traces = 0
        self.step = jax.jit(self._step)

    def _step(self, grads, state, params):
        self.num_traces += 1
        return self.transformation.update(grads, state, make_opt_params(params, model_param_specs=SPECS))

    def init(self, params):
        return self.transformation.init(make_opt_params(params, model_param_specs=SPECS))


@functools.cache
def _compiled(name: str) -> _Compiled:
    return _Compiled(name)


def test_every_public_transformation_has_an_example():
    makes_transformations = {
        name
        for name, fn in inspect.getmembers(optimizers, inspect.isfunction)
        if inspect.signature(fn).return_annotation is PartitionedGradientTransformation
    }
    assert makes_transformations == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_state_specs_have_the_structure_shapes_and_types_of_the_state(name):
    transformation = EXAMPLES[name]()
    params = make_opt_params(
        jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), SPECS),
        model_param_specs=SPECS,
    )
    state = jax.eval_shape(transformation.init, params)
    specs = transformation.partition(SPECS)
    assert jax.tree.structure(specs) == jax.tree.structure(state)
    for (path, spec), (_, leaf) in zip(flatten_items(specs), flatten_items(state), strict=True):
        assert isinstance(spec, TensorSpec), path
        assert tuple(spec.shape) == leaf.shape, path
        assert spec.dtype == leaf.dtype, path
    # What mirrors a parameter lies where the parameter lies.
    weights = [
        spec for path, spec in flatten_items(specs) if "head/weight" in path and tuple(spec.shape) == (16, 8)
    ]
    assert all(spec.mesh_axes == PartitionSpec("data", "model") for spec in weights)


@pytest.mark.parametrize("name", EXAMPLES)
def test_three_steps_trace_once_keep_the_structure_and_stay_finite_also_without_gradients(name):
    compiled = _compiled(name)
    params = _random(0)
    state = compiled.init(params)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for grads in (_random(1), jax.tree.map(np.zeros_like, params), _random(2, scale=1e3)):
        updates, state = compiled.step(grads, state, params)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
        assert jax.tree.map(lambda x: (x.shape, x.dtype), updates) == jax.tree.map(
            lambda x: (x.shape, x.dtype), grads
        )
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
    assert compiled.num_traces == 1


@pytest.mark.parametrize("name", EXAMPLES)
def test_sharded_over_eight_devices_equals_one_device(name):
    compiled = _compiled(name)
    params, grads = _random(0), _random(1)
    expected = compiled.step(grads, compiled.init(params), params)
    expected = compiled.step(_random(2), expected[1], params)
    with use_mesh(build_mesh(mesh_shape=(4, 2), mesh_axis_names=("data", "model"))):
        param_shardings = _shardings(SPECS)
        state_shardings = _shardings(compiled.transformation.partition(SPECS))
        step = jax.jit(compiled._step, out_shardings=(param_shardings, state_shardings))
        state = jax.device_put(compiled.init(params), state_shardings)
        params = jax.device_put(params, param_shardings)
        for seed in (1, 2):
            updates, state = step(jax.device_put(_random(seed), param_shardings), state, params)
    for (path, got), (_, want) in zip(flatten_items((updates, state)), flatten_items(expected), strict=True):
        # Sums in another order; bfloat16 states may round to the neighbour.
        rtol = 1e-5 if got.dtype != jnp.bfloat16 else 1e-2
        np.testing.assert_allclose(
            np.asarray(got, np.float64), np.asarray(want, np.float64), rtol=rtol, atol=1e-6, err_msg=path
        )


def _optax_pairs():
    """Transformations of ours whose updates optax makes too; optax counts the steps of schedules from 0."""
    lr = lambda count: -COSINE(count + 1)  # noqa: E731
    return {
        "adam": (
            optimizers.adam_optimizer(0.1, **ADAM),
            optax.adam(0.1, b1=0.9, b2=0.95, eps=1e-8),
        ),
        "adamw": (
            optimizers.adamw_optimizer(0.1, **ADAM, weight_decay=0.01),
            optax.adamw(0.1, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.01),
        ),
        "adamw_decoupled": (
            optimizers.adamw_decoupled_optimizer(0.1, **ADAM, update_schedule=COSINE, weight_decay=0.01),
            optax.chain(
                optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8),
                optax.scale(0.1),
                optax.add_decayed_weights(0.01),
                optax.scale_by_schedule(lr),
            ),
        ),
        "lion": (
            optimizers.lion_optimizer(0.1, b1=0.9, b2=0.99, weight_decay=0.01),
            optax.lion(0.1, b1=0.9, b2=0.99, weight_decay=0.01),
        ),
        "sgd": (
            optimizers.sgd_optimizer(0.1, decouple_weight_decay=False, momentum=0.9, weight_decay=0.01),
            optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.1, momentum=0.9)),
        ),
        "ema": (optimizers.ema(0.9), optax.ema(0.9)),
        "clip": (optimizers.clip_by_global_norm(0.5, eps=0.0), optax.clip_by_global_norm(0.5)),
    }


@pytest.mark.parametrize("name", _optax_pairs())
def test_updates_equal_those_of_optax(name):
    ours, theirs = _optax_pairs()[name]
    specs = jax.tree.map(lambda spec: ParameterSpec(spec.shape, spec.dtype), SPECS)

    @jax.jit
    def both(grads, states, params):
        opt_params = make_opt_params(params, model_param_specs=specs)
        our_updates, our_state = ours.update(grads, states[0], opt_params)
        their_updates, their_state = theirs.update(grads, states[1], params)
        return (our_updates, their_updates), (our_state, their_state)

    params = _random(0)
    states = ours.init(make_opt_params(params, model_param_specs=specs)), theirs.init(params)
    for seed in (1, 2, 3):
        (our_updates, their_updates), states = both(_random(seed), states, params)
        for got, want in zip(jax.tree.leaves(our_updates), jax.tree.leaves(their_updates), strict=True):
            np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-7)


def test_opt_params_pass_through_jit_whole():
    params = make_opt_params(_random(0), model_param_specs=SPECS)
    through = jax.jit(lambda tree: tree)(params)
    leaves = jax.tree.leaves(through, is_leaf=is_opt_param)
    assert [leaf.weight_decay_scale for leaf in leaves] == [0.0, None, None]
    assert leaves[1].factorization_spec == FactorizationSpec(axes=("row", "col"))
