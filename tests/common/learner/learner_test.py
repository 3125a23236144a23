"""The learner: which parameters change by what, what it remembers, where that lives, and what it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from axlearn.common import optimizers, schedule
from axlearn.common.base_layer import ParameterSpec
from axlearn.common.config import config_for_function
from axlearn.common.learner import Learner, UpdateType
from axlearn.common.module import OutputCollection, functional
from axlearn.common.optimizer_base import make_opt_params
from axlearn.common.update_transformation import ForwardOutputs, OverrideInplaceUpdateTransformation
from axlearn.common.utils import build_mesh, flatten_items, use_mesh

# The lines of fuji-test-v1.txt.
FUJI_TEST_V1 = """\
ema.fn: 'axlearn.common.optimizers.param_ema'
enable_per_variable_summaries: False
klass: 'axlearn.common.learner.Learner'
optimizer.args[0].eps: 1e-08
optimizer.args[0].fn: 'axlearn.common.optimizers.clip_by_global_norm'
optimizer.args[0].max_norm: 1
optimizer.args[1].b1: 0.9
optimizer.args[1].b2: 0.95
optimizer.args[1].eps: 1e-08
optimizer.args[1].fn: 'axlearn.common.optimizers.adamw_decoupled_optimizer'
optimizer.args[1].learning_rate: 0.0006
optimizer.args[1].update_schedule.alpha: 0.1
optimizer.args[1].update_schedule.begin_value: 0.0
optimizer.args[1].update_schedule.fn: 'axlearn.common.schedule.cosine_with_linear_warmup'
optimizer.args[1].update_schedule.max_step: 3000
optimizer.args[1].update_schedule.peak_lr: 1.0
optimizer.args[1].update_schedule.warmup_steps: 2000
optimizer.args[1].weight_decay: 0.01
optimizer.fn: 'axlearn.common.optimizers.chain'"""


def _fuji_config() -> Learner.Config:
    return Learner.default_config().set(
        optimizer=config_for_function(optimizers.chain).set(
            args=[
                config_for_function(optimizers.clip_by_global_norm).set(max_norm=1),
                config_for_function(optimizers.adamw_decoupled_optimizer).set(
                    learning_rate=6e-4,
                    b1=0.9,
                    b2=0.95,
                    eps=1e-8,
                    update_schedule=config_for_function(schedule.cosine_with_linear_warmup).set(
                        peak_lr=1.0, max_step=3000, warmup_steps=2000, alpha=0.1, begin_value=0.0
                    ),
                    weight_decay=0.01,
                ),
            ]
        )
    )


def _sgd_config(learning_rate: float = 0.5, **kwargs) -> Learner.Config:
    sgd = config_for_function(optimizers.sgd_optimizer).set(
        learning_rate=learning_rate, decouple_weight_decay=True, **kwargs
    )
    return Learner.default_config().set(optimizer=sgd)


# A regression of `y` from `x`, with a moving average of `x` that only the forward pass changes.
PARAMS = {
    "dense": {"bias": np.zeros(2, np.float32), "weight": np.arange(8, dtype=np.float32).reshape(4, 2) / 8},
    "norm": {"count": np.zeros([], np.int32), "moving_mean": np.ones(4, np.float32)},
}
SPECS = {
    "dense": {
        "bias": ParameterSpec((2,), jnp.float32, PartitionSpec("model")),
        "weight": ParameterSpec((4, 2), jnp.float32, PartitionSpec("data", "model")),
    },
    "norm": {
        "count": ParameterSpec((), jnp.int32, PartitionSpec()),
        "moving_mean": ParameterSpec((4,), jnp.float32, PartitionSpec("data")),
    },
}
PATHS = ["dense/bias", "dense/weight", "norm/count", "norm/moving_mean"]


def _batch(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((8, 4)).astype(np.float32)
    return {"x": x, "y": (x[:, :2] ** 2).astype(np.float32)}


def _forward(*, model_params, inputs) -> ForwardOutputs:
    dense, norm = model_params["dense"], model_params["norm"]
    predicted = inputs["x"] @ dense["weight"] + dense["bias"][None]
    state_updates = {
        "dense": {},
        "norm": {
            "count": norm["count"] + 1,
            "moving_mean": 0.5 * norm["moving_mean"] + 0.5 * inputs["x"].mean(axis=0),
        },
    }
    return ForwardOutputs(
        loss=jnp.mean((predicted - inputs["y"]) ** 2),
        aux={"predicted": predicted},
        output_collection=OutputCollection(
            summaries={"mean": predicted.mean()}, state_updates=state_updates, module_outputs={}
        ),
    )


def _grads(params, batch) -> dict:
    """The gradients of `_forward`, by hand in float64."""
    x, y = batch["x"].astype(np.float64), batch["y"].astype(np.float64)
    error = x @ np.asarray(params["dense"]["weight"]) + np.asarray(params["dense"]["bias"]) - y
    return {"weight": x.T @ error * 2 / error.size, "bias": error.sum(axis=0) * 2 / error.size}


class _Run:
    """A learner, its state and the parameters."""

    def __init__(self, cfg: Learner.Config, *, fn=_forward, params=None):
        self.learner = cfg.set(name="learner").instantiate(parent=None)
        self.params = PARAMS if params is None else params
        self.state = self.learner.init(make_opt_params(self.params))
        self.summaries = {}
        self.num_traces = 0
        self._fn = fn
        self._jitted = jax.jit(self.step_fn)

    def step_fn(self, params, state, batch):
        self.num_traces += 1
        outputs, collection = functional(
            self.learner,
            None,
            state,
            {"fn": self._fn, "inputs": batch, "opt_params": make_opt_params(params)},
            method="forward_and_backward",
            is_training=True,
        )
        new_params = outputs.backward_outputs.updated_params
        return (
            new_params,
            collection.state_updates,
            (collection.summaries, outputs.forward_outputs.loss),
        )

    def step(self, batch):
        self.params, self.state, (self.summaries, self.loss) = self._jitted(self.params, self.state, batch)
        return self.params


def _paths(tree) -> list[str]:
    return [path for path, _ in flatten_items(tree)]


def test_config_prints_the_lines_of_the_reference():
    assert _fuji_config().debug_string() == FUJI_TEST_V1


def test_state_has_the_checkpoint_paths_of_the_reference():
    learner = _fuji_config().set(name="learner").instantiate(parent=None)
    specs = {"decoder": {"emb": ParameterSpec((4, 2), jnp.float32), "norm": ParameterSpec((2,), jnp.float32)}}
    assert _paths({"learner": learner.create_state_partition_specs(specs)}) == [
        "learner/optimizer/1/0/count",
        "learner/optimizer/1/0/mu/decoder/emb",
        "learner/optimizer/1/0/mu/decoder/norm",
        "learner/optimizer/1/0/nu/decoder/emb",
        "learner/optimizer/1/0/nu/decoder/norm",
        "learner/optimizer/1/1/count",
        "learner/optimizer/1/3/count",
    ]


def test_forward_and_backward_descends_the_gradient_and_applies_new_values():
    run = _Run(_sgd_config(0.5))
    weight, bias = PARAMS["dense"]["weight"].astype(np.float64), np.zeros(2)
    moving_mean = np.ones(4)
    for seed in range(3):
        batch = _batch(seed)
        grads = _grads({"dense": {"weight": weight, "bias": bias}}, batch)
        weight, bias = weight - 0.5 * grads["weight"], bias - 0.5 * grads["bias"]
        moving_mean = 0.5 * moving_mean + 0.5 * batch["x"].mean(axis=0)
        run.step(batch)
    np.testing.assert_allclose(run.params["dense"]["weight"], weight, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run.params["dense"]["bias"], bias, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run.params["norm"]["moving_mean"], moving_mean, rtol=1e-5, atol=1e-6)
    assert int(run.params["norm"]["count"]) == 3
    assert run.num_traces == 1
    assert jax.tree.structure(run.params) == jax.tree.structure(PARAMS)


@pytest.mark.parametrize("update_type", UpdateType)
def test_update_rules_decide_what_changes_a_parameter(update_type):
    run = _Run(_sgd_config(momentum=0.9).set(update_rules=[("dense/weight|norm/.*", update_type)]))
    # A parameter that is not a float is never the optimizer's; the others of the optimizer's state are None.
    optimized = ["dense/bias"]
    if update_type.takes_optimizer():
        optimized += ["dense/weight", "norm/moving_mean"]
    assert _paths(run.state["optimizer"][0].trace) == optimized
    specs = run.learner.create_state_partition_specs(SPECS)
    assert jax.tree.structure(specs) == jax.tree.structure(run.state)
    run.step(_batch(0))
    changed = {
        path
        for path, old in flatten_items(PARAMS)
        if (np.asarray(old) != dict(flatten_items(run.params))[path]).any()
    }
    expected = {"dense/bias"}
    if update_type.takes_optimizer():
        expected.add("dense/weight")
    if update_type.takes_state_updates():
        expected |= {"norm/count", "norm/moving_mean"}
    assert changed == expected


def test_a_learner_of_nothing_leaves_everything_as_it_is():
    run = _Run(_fuji_config().set(update_rules=[(".*", UpdateType.NO_UPDATE)]))
    assert _paths(run.state["optimizer"]) == ["1/0/count", "1/1/count", "1/3/count"]
    run.step(_batch(0))
    jax.tree.map(np.testing.assert_array_equal, run.params, PARAMS)


def test_a_parameter_without_update_keeps_its_bits_under_weight_decay():
    run = _Run(_sgd_config(weight_decay=0.1).set(update_rules=[("dense/weight", UpdateType.NO_UPDATE)]))
    run.step(_batch(0))
    assert np.asarray(run.params["dense"]["weight"]).tobytes() == PARAMS["dense"]["weight"].tobytes()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [("dense/wieght", UpdateType.NO_UPDATE)],
            "learner.update_rules[0]: 'dense/wieght' decides for no parameter.\n"
            "  Expected a regular expression that matches the whole path of at least one of the 4 "
            "parameters, which no rule before it matches. Did you mean 'dense/weight'",
        ),
        (
            [("dense/.*", UpdateType.OPTIMIZERS), ("dense/bias", UpdateType.NO_UPDATE)],
            "learner.update_rules[1]: 'dense/bias' decides for no parameter.\n",
        ),
        ([("dense", UpdateType.OPTIMIZERS)], "learner.update_rules[0]: 'dense' decides for no parameter.\n"),
    ],
    ids=["misspelt", "shadowed", "prefix only"],
)
def test_a_rule_that_decides_nothing_is_an_error(rules, message):
    learner = _sgd_config().set(name="learner", update_rules=rules).instantiate(parent=None)
    for make in (
        lambda: learner.create_state_partition_specs(SPECS),
        lambda: learner.init(make_opt_params(PARAMS)),
    ):
        with pytest.raises(ValueError) as e:
            make()
        assert str(e.value).startswith(message)


def test_a_new_value_for_what_is_no_parameter_is_an_error():
    def forward(*, model_params, inputs):
        outputs = _forward(model_params=model_params, inputs=inputs)
        outputs.output_collection.state_updates["norm"]["moving_maen"] = jnp.ones(4)
        return outputs

    with pytest.raises(ValueError) as e:
        _Run(_sgd_config(), fn=forward).step(_batch(0))
    assert str(e.value) == (
        "learner: the forward pass has a new value for 'norm/moving_maen', which is not a parameter.\n"
        "  Did you mean 'norm/moving_mean'? Declare it in _create_layer_parameter_specs of its layer."
    )


def test_averages_follow_the_parameters_after_the_update():
    cfg = _sgd_config().set(
        ema=config_for_function(optimizers.param_ema).set(
            decay=config_for_function(schedule.decay_bias_correction).set(decay=0.5)
        )
    )
    run = _Run(cfg)
    assert sorted(run.state) == ["ema", "optimizer"]
    weights = [np.asarray(run.step(_batch(seed))["dense"]["weight"]) for seed in range(3)]
    expected = (weights[0] + 2 * weights[1] + 4 * weights[2]) / 7
    ema = run.state["ema"]
    np.testing.assert_allclose(ema.ema["dense"]["weight"], expected, rtol=1e-5, atol=1e-6)
    assert int(ema.ema["norm"]["count"]) == 3
    specs = run.learner.create_state_partition_specs(SPECS)
    assert jax.tree.structure(specs) == jax.tree.structure(run.state)
    assert specs["ema"].ema["dense"]["weight"].mesh_axes == PartitionSpec("data", "model")


def test_no_averages_without_a_decay_or_without_a_config():
    for cfg in (_sgd_config(), _sgd_config().set(ema=None)):
        assert sorted(_Run(cfg).state) == ["optimizer"]


def _of_first_half():
    """A forward pass over the first half of the batch only."""

    def transformation(fn):
        def forward(*, model_params, inputs):
            return fn(model_params=model_params, inputs=jax.tree.map(lambda x: x[:4], inputs))

        return forward

    return transformation


def test_forward_fn_transformation_changes_what_is_differentiated_and_returned():
    plain = _Run(_sgd_config())
    transformed = _Run(_sgd_config().set(forward_fn_transformation=config_for_function(_of_first_half)))
    for seed in range(2):
        plain.step(jax.tree.map(lambda x: x[:4], _batch(seed)))
        transformed.step(_batch(seed))
    np.testing.assert_allclose(plain.loss, transformed.loss, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain.params, transformed.params
    )


def _skip_config() -> Learner.Config:
    return Learner.default_config().set(
        optimizer=config_for_function(optimizers.skip_and_clip_by_global_norm).set(
            inner=_fuji_config().optimizer.args[1], max_norm=1, drop_norm=100
        ),
        ignore_undefined_loss=True,
    )


def test_gradients_that_are_not_finite_leave_parameters_and_optimizer_alone():
    cfg = _skip_config().set(update_rules=[(".*", UpdateType.OPTIMIZERS)])
    params = jax.tree.map(lambda x: -0.0 * x, PARAMS)
    run = _Run(cfg, params=params)
    run.step(_batch(0))
    before = jax.tree.map(np.asarray, (run.params, run.state["optimizer"].inner_state))
    run.step({**_batch(1), "y": np.full((8, 2), np.nan, np.float32)})
    after = jax.tree.map(np.asarray, (run.params, run.state["optimizer"].inner_state))
    assert jax.tree.map(lambda x: x.tobytes(), before) == jax.tree.map(lambda x: x.tobytes(), after)
    assert float(run.summaries["optimizer"]["num_skipped_steps"]) == 1
    assert run.learner.handles_undefined_loss()
    assert not _sgd_config().set(name="learner").instantiate(parent=None).handles_undefined_loss()


def test_summaries_name_norms_and_rates_and_single_parameters_where_asked():
    run = _Run(_fuji_config())
    run.step(_batch(0))
    assert sorted(run.summaries) == ["optimizer"]
    assert sorted(run.summaries["optimizer"]) == [
        "gradient_norm",
        "gradient_scale",
        "learning_rate",
        "lr_schedule_step",
        "schedule_scale",
        "schedule_step",
    ]
    grads = _grads(PARAMS, _batch(0))
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    np.testing.assert_allclose(run.summaries["optimizer"]["gradient_norm"], norm, rtol=1e-6)
    assert int(run.summaries["optimizer"]["schedule_step"]) == 1

    run = _Run(_sgd_config().set(enable_per_variable_summaries=["dense"]))
    run.step(_batch(0))
    del run.summaries["optimizer"]
    expected = {
        "grad_norm/dense": norm,
        "grad_rms/dense/bias": np.sqrt((grads["bias"] ** 2).mean()),
        "grad_rms/dense/weight": np.sqrt((grads["weight"] ** 2).mean()),
        "param_rms/dense/bias": 0.0,
        "param_rms/dense/weight": np.sqrt((PARAMS["dense"]["weight"] ** 2).mean()),
    }
    assert sorted(run.summaries) == sorted(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(run.summaries[name], value, rtol=1e-5)

    run = _Run(_sgd_config().set(enable_per_variable_summaries=True))
    run.step(_batch(0))
    assert {name for name in run.summaries if name.startswith("param_rms/norm")} == {
        "param_rms/norm/moving_mean"
    }


def test_a_gradient_that_is_a_new_value_is_not_logged_as_a_gradient():
    cfg = _sgd_config().set(enable_per_variable_summaries=True)
    cfg.optimizer = OverrideInplaceUpdateTransformation.default_config().set(
        transformation=cfg.optimizer, rules=[".*/weight"]
    )
    run = _Run(cfg)
    run.step(_batch(0))
    assert {name for name in run.summaries if "dense" in name} == {
        "grad_rms/dense/bias",
        "param_rms/dense/bias",
    }


def test_two_clippings_in_one_chain_log_under_two_names():
    clip = config_for_function(optimizers.clip_by_global_norm)
    sgd = config_for_function(optimizers.sgd_optimizer).set(learning_rate=1.0, decouple_weight_decay=True)
    chain = config_for_function(optimizers.chain).set(
        args=[clip.clone(max_norm=1.0), clip.clone(max_norm=0.5), sgd]
    )
    run = _Run(Learner.default_config().set(optimizer=chain))
    run.step(_batch(0))
    assert run.summaries["optimizer"]["gradient_norm"] > 1.0
    np.testing.assert_allclose(run.summaries["optimizer"]["gradient_norm_2"], 1.0, rtol=1e-6)


def test_settings_per_parameter_are_registered_under_the_path_of_the_optimizer():
    run = _Run(_fuji_config())
    with optimizers.collect_per_param_settings() as records:
        jax.eval_shape(run.step_fn, run.params, run.state, _batch(0))
    (record,) = records
    assert str(record) == "\n".join(
        [
            "====================weight_decay_scale root.optimizer====================",
            *(f"{path}: 1" for path in PATHS if path != "norm/count"),
        ]
    )


@functools.cache
def _trained_on_one_device() -> _Run:
    run = _Run(_fuji_config().set(ema=config_for_function(optimizers.param_ema).set(decay=0.9)))
    for seed in range(2):
        run.step(_batch(seed))
    return run


def test_sharded_over_eight_devices_equals_one_device_and_state_lies_with_its_parameters():
    expected = _trained_on_one_device()
    run = _Run(_fuji_config().set(ema=config_for_function(optimizers.param_ema).set(decay=0.9)))
    with use_mesh(build_mesh(mesh_shape=(4, 2), mesh_axis_names=("data", "model"))):
        shardings = jax.tree.map(
            lambda spec: spec.sharding, (SPECS, run.learner.create_state_partition_specs(SPECS))
        )
        step = jax.jit(run.step_fn, out_shardings=(*shardings, None))
        params, state = jax.device_put((run.params, run.state), shardings)
        for seed in range(2):
            params, state, _ = step(params, state, _batch(seed))
    for got, want in zip(
        flatten_items((params, state)), flatten_items((expected.params, expected.state)), strict=True
    ):
        assert got[0] == want[0]
        np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-6, err_msg=got[0])
    mu = state["optimizer"][1][0].mu["dense"]["weight"]
    assert mu.sharding == params["dense"]["weight"].sharding
    # Eight shards of the (4, 2) array, one element each.
    assert {shard.data.shape for shard in mu.addressable_shards} == {(1, 1)}
    assert state["ema"].ema["dense"]["weight"].sharding == params["dense"]["weight"].sharding


def test_learner_state_can_be_made_from_specs_alone():
    run = _trained_on_one_device()
    shapes = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), SPECS)
    state = jax.eval_shape(run.learner.init, make_opt_params(shapes, model_param_specs=SPECS))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), run.state
    )


def test_what_is_no_optimizer_is_refused_when_the_learner_is_built():
    cfg = _sgd_config().set(name="learner", optimizer=config_for_function(schedule.ema_schedule))
    with pytest.raises(TypeError, match=r"learner.optimizer: function is not an optimizer"):
        cfg.instantiate(parent=None)
