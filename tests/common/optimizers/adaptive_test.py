"""Adafactor and AdaStar against optax, a float64 reference, each other, and the dumps of the recipes that use them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from axlearn.common import optimizers, schedule
from axlearn.common.base_layer import FactorizationSpec, ParameterSpec
from axlearn.common.config import config_for_function
from axlearn.common.learner import Learner
from axlearn.common.optimizer_base import make_opt_params
from axlearn.common.utils import VDict, flatten_items

ROW_COL = FactorizationSpec(axes=("row", "col"))
SPECS = {
    "bias": ParameterSpec((6,), jnp.float32, PartitionSpec("model"), weight_decay_scale=0.0),
    "repeat": VDict(
        w=ParameterSpec(
            (3, 4, 6),
            jnp.float32,
            PartitionSpec(None, "data", "model"),
            factorization=FactorizationSpec(axes=(None, "row", "col")),
        )
    ),
    "weight": ParameterSpec((4, 6), jnp.float32, PartitionSpec("data", "model"), factorization=ROW_COL),
}
SCHEDULE = schedule.cosine_with_linear_warmup(1.0, max_step=6, warmup_steps=2, alpha=0.1)


def _random(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda spec: rng.standard_normal(spec.shape).astype(np.float32), SPECS)


def _updates(optimizer, *, num_steps=4, params=None, specs=SPECS):
    """The updates of each step, at parameters that stay."""
    params = _random(0) if params is None else params
    opt_params = make_opt_params(params, model_param_specs=specs)

    @jax.jit
    def step(grads, state):
        return optimizer.update(grads, state, opt_params)

    state, updates = optimizer.init(opt_params), []
    for seed in range(1, num_steps + 1):
        grads = {name: _random(seed)[name] for name in params}
        new, state = step(grads, state)
        updates.append(new)
    return updates, state


def _assert_equal(ours, theirs, *, rtol=2e-6, atol=1e-8):
    for (path, a), (_, b) in zip(flatten_items(ours), flatten_items(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=path)


@pytest.mark.parametrize("multiply_by_parameter_scale", [False, True])
@pytest.mark.parametrize("factored", [False, True])
def test_adafactor_equals_optax(factored, multiply_by_parameter_scale):
    ours = optimizers.adafactor_optimizer(
        0.1,
        b1=0.9,
        b2=schedule.adafactor_decay_rate(0.8),
        multiply_by_parameter_scale=multiply_by_parameter_scale,
        clipping_threshold=0.5,
        weight_decay=0.01,
        factored=factored,
    )
    theirs = optax.adafactor(
        0.1,
        min_dim_size_to_factor=2,
        multiply_by_parameter_scale=multiply_by_parameter_scale,
        clipping_threshold=0.5,
        momentum=0.9,
        weight_decay_rate=0.01,
        factored=factored,
    )
    # What optax does to an array, we do to each layer of a stack; so compare arrays.
    params = {name: _random(0)[name] for name in ("bias", "weight")}
    specs = {"bias": ParameterSpec((6,), jnp.float32), "weight": SPECS["weight"]}
    updates, _ = _updates(ours, params=params, specs=specs)
    state = theirs.init(params)
    for seed, ours_now in enumerate(updates, start=1):
        grads = {name: _random(seed)[name] for name in params}
        theirs_now, state = theirs.update(grads, state, params)
        _assert_equal(ours_now, theirs_now)


def test_layers_of_a_stack_are_optimized_one_by_one():
    optimizer = optimizers.adafactor_optimizer(
        0.1,
        b1=None,
        b2=0.9,
        multiply_by_parameter_scale=True,
        clipping_threshold=0.5,
        apply_scale_by_trust_ratio=True,
    )
    stacked, _ = _updates(optimizer)
    for layer in range(3):
        params = {"weight": _random(0)["repeat"]["w"][layer]}
        specs = {"weight": SPECS["weight"]}
        opt_params = make_opt_params(params, model_param_specs=specs)
        state = optimizer.init(opt_params)
        for seed, together in enumerate(stacked, start=1):
            alone, state = optimizer.update(
                {"weight": _random(seed)["repeat"]["w"][layer]}, state, opt_params
            )
            np.testing.assert_allclose(together["repeat"]["w"][layer], alone["weight"], rtol=2e-6)


def test_factored_moments_take_a_row_and_a_column_where_the_parameter_has_them():
    optimizer = optimizers.adafactor_optimizer(
        0.1, b1=None, b2=0.9, multiply_by_parameter_scale=False, clipping_threshold=None
    )
    specs = dict(flatten_items(optimizer.partition(SPECS)))
    placed = {path: (tuple(spec.shape), spec.mesh_axes) for path, spec in specs.items()}
    one = ((1,), PartitionSpec(None))
    assert placed == {
        "0/count": ((), PartitionSpec()),
        "0/v_row/bias": one,
        "0/v_row/repeat/w": ((3, 4), PartitionSpec(None, "data")),
        "0/v_row/weight": ((4,), PartitionSpec("data")),
        "0/v_col/bias": one,
        "0/v_col/repeat/w": ((3, 6), PartitionSpec(None, "model")),
        "0/v_col/weight": ((6,), PartitionSpec("model")),
        "0/v/bias": ((6,), PartitionSpec("model")),
        "0/v/repeat/w": one,
        "0/v/weight": one,
        "1/count": ((), PartitionSpec()),
    }


def test_a_factorization_of_another_rank_is_refused():
    specs = {"w": ParameterSpec((2, 3, 4), jnp.float32, factorization=ROW_COL)}
    with pytest.raises(
        ValueError, match=r"factorization: \('row', 'col'\) for a parameter of shape \(2, 3, 4\)"
    ):
        optimizers.scale_by_factored_rms(decay_rate=0.9).partition(specs)


ADASTAR = {
    "gradient_ema_decay": 0.9,
    "gradient_ema_debias": True,
    "gradient_square_ema_decay": 0.95,
    "gradient_square_ema_debias": True,
    "eps": 1e-8,
    "eps_square": 0.0,
    "raw_update_clipping_threshold": None,
    "update_ema_decay": None,
    "update_ema_debias": None,
    "weight_decay": 0.01,
    "update_schedule": SCHEDULE,
}


def _adastar(**fields):
    return optimizers.adastar_optimizer(0.1, **{**ADASTAR, **fields})


def test_adastar_with_debiased_averages_is_decoupled_adamw():
    adamw = optimizers.adamw_decoupled_optimizer(
        0.1, b1=0.9, b2=0.95, eps=1e-8, update_schedule=SCHEDULE, weight_decay=0.01
    )
    for ours, theirs in zip(_updates(_adastar())[0], _updates(adamw)[0], strict=True):
        _assert_equal(ours, theirs)


def test_adastar_with_an_average_of_updates_is_adafactor_without_factors():
    adastar = _adastar(
        gradient_ema_decay=None,
        gradient_ema_debias=None,
        gradient_square_ema_debias=False,
        eps=0,
        eps_square=1e-30,
        raw_update_clipping_threshold=0.5,
        update_ema_decay=0.9,
        update_ema_debias=False,
        update_schedule=1.0,
    )
    adafactor = optimizers.adafactor_optimizer(
        0.1,
        b1=0.9,
        b2=0.95,
        multiply_by_parameter_scale=False,
        clipping_threshold=0.5,
        weight_decay=0.01,
        factored=False,
    )
    for ours, theirs in zip(_updates(adastar)[0], _updates(adafactor)[0], strict=True):
        _assert_equal(ours, theirs)


@pytest.mark.parametrize("update_debias", [False, True])
@pytest.mark.parametrize("gradient_decay", [None, 0.8])
def test_adastar_equals_its_formulas_in_float64(gradient_decay, update_debias):
    optimizer = _adastar(
        gradient_ema_decay=gradient_decay,
        gradient_ema_debias=False,
        eps=1e-3,
        eps_square=1e-2,
        raw_update_clipping_threshold=0.7,
        update_ema_decay=0.6,
        update_ema_debias=update_debias,
        adam_update_transformation=optimizers.scale_update_per_param(
            optimizers.per_param_scale_by_path(description="x", scale_by_path=[("weight", 0.5)])
        ),
    )
    got, _ = _updates(optimizer)
    mean = square = average = 0.0
    value = _random(0)["repeat"]["w"].astype(np.float64)
    for t, updates in enumerate(got, start=1):
        g = _random(t)["repeat"]["w"].astype(np.float64)
        mean = g if gradient_decay is None else gradient_decay * mean + (1 - gradient_decay) * g
        square = 0.95 * square + 0.05 * (g**2 + 1e-2)
        raw = mean / (np.sqrt(square / (1 - 0.95**t)) + 1e-3)
        raw = raw / np.maximum(1, np.sqrt((raw**2).mean(axis=(1, 2), keepdims=True)) / 0.7)
        average = 0.6 * average + 0.4 * raw
        smooth = average / (1 - 0.6**t) if update_debias else average
        want = -float(SCHEDULE(jnp.asarray(t))) * (0.1 * smooth + 0.01 * value)
        np.testing.assert_allclose(updates["repeat"]["w"], want, rtol=1e-5, atol=1e-8)


def test_adastar_has_only_the_averages_that_it_needs_below_the_names_of_the_reference():
    _, state = _updates(
        _adastar(gradient_ema_decay=None, update_ema_decay=0.9, update_ema_debias=False), num_steps=2
    )
    arrays = dict(flatten_items(state))
    assert {path for path in arrays if "repeat" not in path and "weight" not in path} == {
        "compute_updates/count",
        "compute_updates/pps/bias/gradient_square_ema",
        "compute_updates/pps/bias/update_ema",
        "apply_lr_and_wd/count",
    }
    assert arrays["compute_updates/count"] == arrays["apply_lr_and_wd/count"] == 2


def test_adastar_registers_scales_of_weight_decay_only_where_they_are_configured():
    per_param = config_for_function(optimizers.per_param_scale_by_path).set(
        description="weight_decay_scale", scale_by_path=[("weight", 0.0)]
    )
    for scale, num_records in ((None, 0), (per_param, 2)):
        with optimizers.collect_per_param_settings() as records:
            updates, _ = _updates(_adastar(weight_decay_per_param_scale=scale), num_steps=1)
        assert len(records) == num_records
    unscaled, _ = _updates(_adastar(weight_decay=0.0), num_steps=1)
    # The scale of the weight by the rule, and that of the bias by its spec, are 0.
    for name in ("bias", "weight"):
        np.testing.assert_array_equal(updates[0][name], unscaled[0][name])


MUP_PATHS = (
    ".*attention/o_proj/weight",
    ".*attention/i_proj/i_proj/qkv_proj/weight",
    ".*feed_forward/linear1_0/weight",
    ".*feed_forward/linear1_1/weight",
    ".*feed_forward/linear2/weight",
    ".*feed_forward/wi_0_weight",
    ".*feed_forward/wi_1_weight",
    ".*feed_forward/wo_weight",
)


def _honeycrisp_optimizer():
    return config_for_function(optimizers.skip_and_clip_by_global_norm).set(
        drop_norm=100,
        max_norm=1,
        inner=config_for_function(optimizers.adastar_optimizer).set(
            learning_rate=0.01,
            gradient_ema_decay=None,
            gradient_ema_debias=None,
            gradient_square_ema_decay=0.95,
            gradient_square_ema_debias=True,
            eps=0,
            eps_square=1e-30,
            raw_update_clipping_threshold=1.0,
            update_ema_decay=0.95,
            update_ema_debias=False,
            adam_update_transformation=config_for_function(optimizers.scale_update_per_param).set(
                per_param_scale=config_for_function(optimizers.per_param_scale_by_path).set(
                    description="scale_by_mup_simple", scale_by_path=[(path, 1.0) for path in MUP_PATHS]
                )
            ),
            weight_decay=3.16e-4,
            update_schedule=config_for_function(schedule.cosine_with_linear_warmup).set(
                peak_lr=1.0, max_step=3000, warmup_steps=2000, alpha=0.005, begin_value=0.0
            ),
        ),
    )


def _gspmd_optimizer():
    return config_for_function(optimizers.adafactor_optimizer).set(
        learning_rate=config_for_function(schedule.adafactor).set(scale=0.001),
        b1=0.9,
        b2=config_for_function(schedule.adafactor_decay_rate),
        multiply_by_parameter_scale=False,
        clipping_threshold=5,
        weight_decay=0.001,
        weight_decay_scale_by_learning_rate_exponent=1,
    )


@pytest.mark.parametrize(
    ("module", "recipe", "optimizer"),
    [
        ("pajama_trainer", "honeycrisp-test-sp-rp", _honeycrisp_optimizer),
        ("c4_trainer", "gspmd-16B-2x16x8", _gspmd_optimizer),
    ],
)
def test_the_learners_of_the_recipes_print_the_lines_of_the_reference(
    module, recipe, optimizer, golden, shared_dir
):
    cfg = Learner.default_config().set(optimizer=optimizer())
    lines = [f"learner.{line}" for line in cfg.debug_string().splitlines()]
    golden(f"learner/{recipe}.txt", "\n".join(lines) + "\n")
    cfg.optimizer.instantiate()
    if shared_dir is None:
        return
    dump = shared_dir / "golden" / f"axlearn.experiments.text.gpt.{module}" / f"{recipe}.txt"
    assert lines == [line for line in dump.read_text().splitlines() if line.startswith("learner.")]


def test_the_state_of_an_offloaded_optimizer_waits_in_the_memory_of_the_host():
    inner = config_for_function(optimizers.adamw_optimizer).set(learning_rate=0.1, b1=0.9, b2=0.95)
    cfg = config_for_function(optimizers.offload_optimizer).set(optimizer=inner, pattern=".*/(mu|nu)/.*")
    kinds = {path: spec.memory_kind for path, spec in flatten_items(cfg.instantiate().partition(SPECS))}
    assert {path for path, kind in kinds.items() if kind == "pinned_host"} == {
        f"0/{moment}/{name}" for moment in ("mu", "nu") for name in ("bias", "repeat/w", "weight")
    }
    for ours, theirs in zip(_updates(cfg.instantiate())[0], _updates(inner.instantiate())[0], strict=True):
        _assert_equal(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"offload_dst": "disk"}, r"offload_optimizer\.offload_dst: 'disk'"),
        ({"pattern": "mu/.*"}, r"offload_optimizer\.pattern: 'mu/\.\*' matches nothing in the state"),
    ],
)
def test_an_offload_that_does_nothing_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        optimizers.offload_optimizer(optimizers.adamw_optimizer(0.1, b1=0.9, b2=0.95), **fields).partition(
            SPECS
        )
