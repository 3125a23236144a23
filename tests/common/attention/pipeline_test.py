"""Tests of PipelinedTransformerLayer against RepeatedTransformerLayer with the same parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.attention import PipelinedTransformerLayer, RepeatedTransformerLayer, build_remat_spec
from axlearn.common.attention_bias import CausalAttentionBias, SegmentIdAttentionBias, TensorAttentionBias
from axlearn.common.module import functional
from axlearn.common.pipeline import GPipeSchedule, StreamSchedule
from axlearn.common.utils import VDict
from tests.common.attention.layer_configs import DIM, equations, llama_layer_config, normal, random_params

_LAYERS, _STAGES, _MICROBATCHES, _BATCH, _SEQ = 4, 2, 4, 8, 6
_X = normal(_BATCH, _SEQ, DIM)


def _pipelined_config(**kwargs) -> PipelinedTransformerLayer.Config:
    cfg = PipelinedTransformerLayer.default_config().set(
        name="stack",
        input_dim=DIM,
        num_layers=_LAYERS,
        num_stages=_STAGES,
        num_microbatches=_MICROBATCHES,
        layer=llama_layer_config(),
    )
    return cfg.set(**kwargs)


@functools.cache
def _repeated():
    cfg = RepeatedTransformerLayer.default_config().set(
        name="stack", input_dim=DIM, num_layers=_LAYERS, layer=llama_layer_config()
    )
    layer = cfg.instantiate(parent=None)
    return layer, random_params(layer)


def _as_stages(params):
    """The parameters of `_repeated` as those of `_pipelined_config`: layer i is number i % 2 of stage i // 2."""
    per_stage = _LAYERS // _STAGES
    layers = {
        f"layer{k}": jax.tree.map(lambda x, k=k: x[k::per_stage], dict(params["repeat"]["layer"]))
        for k in range(per_stage)
    }
    return {"pipeline": VDict(layer=layers)}


def _value_and_grads(layer, params, inputs):
    def loss(params, inputs):
        data = functional(layer, None, params, inputs, is_training=True)[0].data
        return jnp.mean(jnp.sin(data)), data

    (_, data), grads = jax.jit(jax.value_and_grad(loss, has_aux=True, allow_int=True))(params, inputs)
    return data, grads


def _segment_ids():
    """Segments that begin elsewhere in each row, and behind some rows padding."""
    starts = np.arange(_BATCH)[:, None] % _SEQ
    ids = 1 + (np.arange(_SEQ) >= starts).astype(np.int32)
    ids[1, -2:] = 0
    return jnp.asarray(ids)


_PER_ROW = jnp.asarray((np.arange(_BATCH)[:, None] + np.arange(_SEQ)).astype(np.int32))
_INPUTS = {
    "nothing": {},
    "segments and positions of each row": {"segment_ids": _segment_ids(), "positions": _PER_ROW},
    "positions of all rows": {"positions": _PER_ROW[3:4]},
    "an array of biases for each row": {"attention_logit_biases": normal(_BATCH, 1, _SEQ, _SEQ, seed=2)},
    "an array of biases without rows": {"attention_logit_biases": normal(_SEQ, _SEQ, seed=2)},
    "lazy biases": {
        "attention_logit_biases": SegmentIdAttentionBias(_segment_ids())
        + TensorAttentionBias(normal(1, 4, _SEQ, _SEQ, seed=3))
        + CausalAttentionBias(target_positions=_PER_ROW[:1], source_positions=_PER_ROW[:1])
    },
}


# What a schedule does with what belongs to a row does not depend on what that is.
_CASES = [(name, GPipeSchedule) for name in _INPUTS] + [
    ("segments and positions of each row", StreamSchedule)
]


@pytest.mark.parametrize(("name", "schedule"), _CASES)
def test_stages_side_by_side_equal_layers_one_after_another(name, schedule):
    cfg = _pipelined_config()
    cfg.pipeline.schedule = schedule.default_config()
    if name == "nothing":
        cfg.layer.remat_spec = build_remat_spec(cfg)
    inputs = {"data": _X, **_INPUTS[name]}
    repeated, params = _repeated()
    expected, expected_grads = _value_and_grads(repeated, params, inputs)
    data, grads = _value_and_grads(cfg.instantiate(parent=None), _as_stages(params), inputs)
    np.testing.assert_allclose(data, expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, _as_stages(expected_grads)
    )


def test_a_stage_may_be_a_loop():
    cfg = _pipelined_config(stage=RepeatedTransformerLayer.default_config().set(layer=None))
    repeated, params = _repeated()
    split = lambda x: x.reshape(_STAGES, -1, *x.shape[1:])  # noqa: E731
    stages = jax.tree.map(split, dict(params["repeat"]["layer"]))
    ours = {"pipeline": VDict(layer={"repeat": VDict(layer=stages)})}
    expected, _ = _value_and_grads(repeated, params, {"data": _X})
    data, _ = _value_and_grads(cfg.instantiate(parent=None), ours, {"data": _X})
    np.testing.assert_allclose(data, expected, rtol=1e-5, atol=1e-5)


def test_layers_of_a_stage_are_rematerialised():
    cfg = _pipelined_config()
    counts = []
    for remat_spec in (None, build_remat_spec(cfg)):
        layer = cfg.clone(layer=cfg.layer.clone(remat_spec=remat_spec)).instantiate(parent=None)
        params = random_params(layer)

        def loss(params, layer=layer):
            return jnp.sum(functional(layer, None, params, {"data": _X}, is_training=True)[0].data)

        jaxpr = jax.make_jaxpr(jax.grad(loss))(params)
        counts.append(sum(eqn.primitive.name in ("exp", "logistic") for eqn in equations(jaxpr.jaxpr)))
    # The activations of the backward pass are computed once more.
    assert counts[1] > counts[0]


def test_what_does_not_divide_is_refused():
    layer = _pipelined_config().instantiate(parent=None)
    params = random_params(layer)
    with pytest.raises(ValueError) as e:
        functional(layer, None, params, {"data": _X[:6]}, is_training=True)
    assert str(e.value).startswith(
        "stack.pipeline.num_microbatches: 4 micro-batches do not divide the 6 rows of a batch.\n  Expected a divisor "
        "of 6. Change the batch size, the number of micro-batches, or of accumulation steps."
    )
    with pytest.raises(ValueError) as e:
        _pipelined_config(num_stages=3).instantiate(parent=None)
    assert str(e.value).startswith(
        "stack.num_stages: 3 stages for 4 layers.\n  Expected a divisor of the number of layers: stages are equal. Did "
        "you mean 2?"
    )
    with pytest.raises(ValueError, match="layer is a list"):
        _pipelined_config(layer=[llama_layer_config()] * 4).instantiate(parent=None)
    with pytest.raises(ValueError, match=r"peak_stochastic_depth_rate=0\.5"):
        _pipelined_config(peak_stochastic_depth_rate=0.5).instantiate(parent=None)
