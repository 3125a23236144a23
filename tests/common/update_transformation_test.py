"""Updates, masks, and transformations as modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common import optimizers
from axlearn.common.base_layer import FactorizationSpec, ParameterSpec
from axlearn.common.config import config_for_function
from axlearn.common.module import functional
from axlearn.common.optimizer_base import OptParam, make_opt_params
from axlearn.common.update_transformation import (
    ConditionalUpdateTransformation,
    OverrideInplaceUpdateTransformation,
    Updates,
    WrappedPartitionedGradientTransformation,
    as_update_transformation,
    mask_tree,
)
from axlearn.common.utils import flatten_items


def _updates() -> Updates:
    values = {"layer": {"scale": jnp.asarray(2.0), "weight": jnp.ones((2, 3))}}
    return Updates(
        opt_params=make_opt_params(values),
        delta_updates=jax.tree.map(lambda x: 0.5 * x, values),
        inplace_updates={"norm": {"mean": jnp.asarray(7.0)}},
    )


def _transform(cfg, updates: Updates):
    module = cfg.set(name="transformation").instantiate(parent=None)
    state = module.init(updates.opt_params)
    specs = module.create_state_partition_specs(updates.param_specs())
    assert jax.tree.structure(specs) == jax.tree.structure(state)
    transformed, collection = functional(
        module, None, state, {"updates": updates}, method="transform_update", is_training=True
    )
    return transformed, collection


def test_mask_tree_replaces_parts_and_keeps_the_rest():
    tree = {"a": {"x": 1, "y": 2}, "b": 3}
    assert mask_tree(tree, keep={"a": True, "b": False}) == {"a": {"x": 1, "y": 2}, "b": None}
    assert mask_tree(tree, keep={"a": {"x": False, "y": True}, "b": True}, mask_value=0) == {
        "a": {"x": 0, "y": 2},
        "b": 3,
    }


def test_updates_mask_only_the_fields_they_are_told_to():
    keep = {"layer": {"scale": False, "weight": True}}
    masked = _updates().mask(keep, fields=("delta_updates",))
    assert [path for path, _ in flatten_items(masked.delta_updates)] == ["layer/weight"]
    assert [path for path, _ in flatten_items(masked.param_values())] == ["layer/scale", "layer/weight"]
    both = _updates().mask(keep)
    assert both.opt_params["layer"]["scale"] is None


def test_updates_know_the_specs_of_their_parameters():
    factorization = FactorizationSpec(axes=("row", None))
    updates = Updates(
        opt_params={"w": OptParam(jnp.ones((2, 3)), factorization, weight_decay_scale=0.5)}, delta_updates={}
    )
    assert updates.param_specs() == {
        "w": ParameterSpec((2, 3), jnp.dtype("float32"), factorization=factorization, weight_decay_scale=0.5)
    }


def test_wrapped_transformation_keeps_its_whole_state_in_the_context():
    cfg = WrappedPartitionedGradientTransformation.default_config().set(
        transformation=config_for_function(optimizers.sgd_optimizer).set(
            learning_rate=2.0, decouple_weight_decay=True
        )
    )
    transformed, collection = _transform(cfg, _updates())
    np.testing.assert_allclose(transformed.delta_updates["layer"]["weight"], -1.0)
    assert [path for path, _ in flatten_items(collection.state_updates)] == [
        "0/trace/layer/scale",
        "0/trace/layer/weight",
        "2/count",
    ]
    assert isinstance(collection.state_updates, tuple)
    assert float(collection.summaries["learning_rate"]) == 2.0


def test_wrapped_transformation_refuses_what_is_no_optimizer():
    cfg = WrappedPartitionedGradientTransformation.default_config().set(
        name="optimizer", transformation=config_for_function(optimizers.per_param_scale_by_rms)
    )
    with pytest.raises(
        TypeError, match=r"optimizer: function is not an optimizer.\n  Expected a Partitioned"
    ):
        cfg.instantiate(parent=None)


def test_override_takes_gradients_as_new_values_and_hides_them_from_the_inner_one():
    cfg = OverrideInplaceUpdateTransformation.default_config().set(
        transformation=config_for_function(optimizers.sgd_optimizer).set(
            learning_rate=2.0, decouple_weight_decay=True
        ),
        rules=[".*/scale"],
    )
    updates = _updates()
    transformed, collection = _transform(cfg, updates)
    assert transformed.delta_updates["layer"]["scale"] is None
    np.testing.assert_allclose(transformed.delta_updates["layer"]["weight"], -1.0)
    assert {path: float(x) for path, x in flatten_items(transformed.inplace_updates)} == {
        "layer/scale": 1.0,
        "norm/mean": 7.0,
    }
    # The caller's tree is as it was.
    assert [path for path, _ in flatten_items(updates.inplace_updates)] == ["norm/mean"]
    assert [path for path, _ in flatten_items(collection.state_updates)] == [
        "transformation/0/trace/layer/weight",
        "transformation/2/count",
    ]


def test_an_override_says_whose_gradient_is_the_new_value_also_within_others():
    inner = OverrideInplaceUpdateTransformation.default_config().set(
        transformation=config_for_function(optimizers.sgd_optimizer).set(
            learning_rate=2.0, decouple_weight_decay=True
        ),
        rules=[".*/scale"],
    )
    outer = inner.clone(transformation=inner, rules=[".*/weight"])
    sometimes = ConditionalUpdateTransformation.default_config().set(inner=outer, update_schedule=1)
    params = _updates().opt_params
    for cfg, found in (
        (inner, {"layer/scale"}),
        (sometimes, {"layer/scale", "layer/weight"}),
        (as_update_transformation(inner.transformation), set()),
    ):
        transformation = cfg.clone(name="optimizer").instantiate(parent=None)
        is_new_value = dict(flatten_items(transformation.gradient_is_new_value(params)))
        assert {path for path, is_new in is_new_value.items() if is_new} == found


def test_a_conditional_transformation_acts_at_its_steps_and_leaves_no_bit_changed_at_the_others():
    override = OverrideInplaceUpdateTransformation.default_config().set(
        transformation=config_for_function(optimizers.adam_optimizer).set(
            learning_rate=2.0, b1=0.9, b2=0.9, l2_regularizer_weight=0.1
        ),
        rules=[".*/scale"],
    )
    module = (
        ConditionalUpdateTransformation.default_config()
        .set(name="sometimes", inner=override, update_schedule=lambda step: step % 2)
        .instantiate(parent=None)
    )
    always = override.set(name="always").instantiate(parent=None)
    updates = _updates()
    specs = module.create_state_partition_specs(updates.param_specs())
    assert jax.tree.structure(specs) == jax.tree.structure(module.init(updates.opt_params))

    @jax.jit
    def transform(states):
        outputs = [
            functional(x, None, state, {"updates": updates}, method="transform_update", is_training=True)
            for x, state in zip((module, always), states, strict=True)
        ]
        collections = [collection for _, collection in outputs]
        changes = [(x.delta_updates, x.inplace_updates) for x, _ in outputs]
        return changes, [c.state_updates for c in collections], collections[0].summaries["is_updated"]

    states = [module.init(updates.opt_params), always.init(updates.opt_params)]
    for step in range(1, 5):
        is_on = step % 2 == 1
        before = states
        (ours, expected), states, is_updated = transform(states)
        assert float(is_updated) == is_on
        assert int(states[0]["step"]) == step
        if is_on:
            jax.tree.map(np.testing.assert_array_equal, ours, expected)
            jax.tree.map(np.testing.assert_array_equal, states[0]["inner"], states[1])
            continue
        deltas, inplace = ours
        # Not even the sign of a zero changes.
        weights = np.array([[-0.0, 0.0, 1.0]], np.float32)
        assert (weights + np.asarray(deltas["layer"]["weight"])[:1]).tobytes() == weights.tobytes()
        assert deltas["layer"]["scale"] is None
        # The parameter as it is, and what the forward pass wants in place.
        assert (float(inplace["layer"]["scale"]), float(inplace["norm"]["mean"])) == (2.0, 7.0)
        jax.tree.map(np.testing.assert_array_equal, states[0]["inner"], before[0]["inner"])
        # The other one rests too.
        states[1] = before[1]
