"""Several learners side by side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common import optimizers
from axlearn.common.base_layer import ParameterSpec
from axlearn.common.config import config_for_function
from axlearn.common.gradient_accumulation import with_minibatch_steps
from axlearn.common.learner import CompositeLearner, Learner, UpdateType
from axlearn.common.metrics import MetricAccumulator
from axlearn.common.module import functional, new_output_collection
from axlearn.common.optimizer_base import make_opt_params
from axlearn.common.update_transformation import ForwardOutputs, OverrideInplaceUpdateTransformation
from axlearn.common.utils import flatten_items

PARAMS = {
    "decoder": {"mean": np.ones(2, np.float32), "weight": np.full(2, 3.0, np.float32)},
    "encoder": {"weight": np.full(2, 4.0, np.float32)},
}


def _sgd(learning_rate: float) -> Learner.Config:
    return Learner.default_config().set(
        optimizer=config_for_function(optimizers.sgd_optimizer).set(
            learning_rate=learning_rate, decouple_weight_decay=True, momentum=0.9
        )
    )


def _config(**kwargs) -> CompositeLearner.Config:
    learners = {
        "slow": _sgd(0.1),
        "fast": _sgd(0.5).set(update_rules=[("decoder/mean", UpdateType.STATE_UPDATES)]),
    }
    return CompositeLearner.default_config().set(
        name="learner", learners=learners, rules=[("encoder/.*", "slow"), (".*", "fast")], **kwargs
    )


_HALVES = config_for_function(with_minibatch_steps).set(
    steps=2, metric_accumulator=MetricAccumulator.default_config()
)


def _forward(*, model_params, inputs):
    del inputs
    collection = new_output_collection()
    collection.state_updates.update({"decoder": {"mean": model_params["decoder"]["mean"] + 5}, "encoder": {}})
    # Half the sum of squares: the gradient is the parameter.
    loss = 0.5 * sum(jnp.sum(x**2) for x in jax.tree.leaves(model_params))
    return ForwardOutputs(loss=loss, aux={}, output_collection=collection)


def test_each_learner_updates_its_own_parameters():
    cfg = _config(ema=config_for_function(optimizers.param_ema).set(decay=0.5))
    learner = cfg.instantiate(parent=None)
    opt_params = make_opt_params(PARAMS)
    state = learner.init(opt_params)
    assert [path for path, _ in flatten_items(state)] == [
        "ema/count",
        "ema/ema/decoder/mean",
        "ema/ema/decoder/weight",
        "ema/ema/encoder/weight",
        "fast/optimizer/0/trace/decoder/weight",
        "fast/optimizer/2/count",
        "slow/optimizer/0/trace/encoder/weight",
        "slow/optimizer/2/count",
    ]
    specs = jax.tree.map(lambda x: ParameterSpec(x.shape, x.dtype), PARAMS)
    assert jax.tree.structure(learner.create_state_partition_specs(specs)) == jax.tree.structure(state)
    outputs, collection = functional(
        learner,
        None,
        state,
        {"fn": _forward, "inputs": {}, "opt_params": opt_params},
        method="forward_and_backward",
        is_training=True,
    )
    new_params = outputs.backward_outputs.updated_params
    assert {path: float(x[0]) for path, x in flatten_items(new_params)} == pytest.approx(
        {"decoder/mean": 6.0, "decoder/weight": 1.5, "encoder/weight": 3.6}
    )
    assert jax.tree.structure(collection.state_updates) == jax.tree.structure(state)
    np.testing.assert_allclose(collection.state_updates["ema"].ema["encoder"]["weight"], 1.8)
    assert float(collection.summaries["slow"]["optimizer"]["learning_rate"]) == np.float32(0.1)
    assert not learner.handles_undefined_loss()


def test_the_forward_pass_of_all_learners_may_work_in_micro_batches():
    learner = _config(forward_fn_transformation=_HALVES).instantiate(parent=None)
    opt_params = make_opt_params(PARAMS)
    inputs = {"input_batch": {"x": np.zeros(4)}}
    outputs, _ = functional(
        learner,
        None,
        learner.init(opt_params),
        {"fn": _forward, "inputs": inputs, "opt_params": opt_params},
        method="forward_and_backward",
        is_training=True,
    )
    new_params = outputs.backward_outputs.updated_params
    assert {path: float(x[0]) for path, x in flatten_items(new_params)} == pytest.approx(
        {"decoder/mean": 6.0, "decoder/weight": 1.5, "encoder/weight": 3.6}
    )
    with pytest.raises(
        ValueError, match=r"learner.forward_fn_transformation.steps: 2 micro-batches do not divide"
    ):
        learner.check_input_batch({"x": np.zeros(3)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rules": [("encoder/.*", "slow"), (".*", "fsat")]},
            "learner.rules[1]: there is no learner 'fsat'.\n"
            "  Expected one of slow, fast. Did you mean 'fast'?",
        ),
        (
            {"learners": {"ema": _sgd(0.1)}, "rules": [(".*", "ema")]},
            "learner.learners: a learner is called 'ema', as the averages in the state are.\n"
            "  Give it another name.",
        ),
        (
            {
                "learners": {
                    "a": _sgd(0.1).set(ema=config_for_function(optimizers.param_ema).set(decay=0.9))
                },
                "rules": [(".*", "a")],
            },
            "learner.learners['a'].ema.decay: 0.9 turns averages on in a part.\n"
            "  Expected None. Set learner.ema.decay instead, for all parameters.",
        ),
        (
            {"learners": {"a": _sgd(0.1).set(forward_fn_transformation=_HALVES)}, "rules": [(".*", "a")]},
            "learner.learners['a'].forward_fn_transformation: a part cannot transform the forward pass, which is "
            "one for all parts.\n  Expected None. Set learner.forward_fn_transformation instead.",
        ),
        (
            {"rules": [("encoder/.*", "slow"), ("decoder/mean", "fast")]},
            "learner.rules: no rule matches 1 parameters, the first of which is 'decoder/weight'.\n"
            "  Expected a learner for every parameter. Append ('.*', NAME) to give the rest to one learner.",
        ),
        (
            {"rules": [(".*", "slow")]},
            "learner.learners['fast']: no rule gives it a parameter.\n"
            "  Expected some parameters for every learner.",
        ),
    ],
    ids=[
        "unknown learner",
        "ema as a name",
        "averages in a part",
        "a transformation in a part",
        "orphan",
        "idle learner",
    ],
)
def test_rules_that_do_not_fit_are_errors(changes, message):
    with pytest.raises(ValueError) as e:
        _config().set(**changes).instantiate(parent=None).init(make_opt_params(PARAMS))
    assert str(e.value) == message


def test_each_learner_says_of_its_own_parameters_whose_gradient_is_the_new_value():
    cfg = _config()
    cfg.learners["fast"].optimizer = OverrideInplaceUpdateTransformation.default_config().set(
        transformation=cfg.learners["fast"].optimizer, rules=[".*/weight"]
    )
    is_new_value = cfg.instantiate(parent=None).gradient_is_new_value(make_opt_params(PARAMS))
    assert is_new_value == {"decoder": {"mean": False, "weight": True}, "encoder": {"weight": False}}
