"""Gradient accumulation against the whole batch, computed by hand in float64."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.causal_lm._metrics import PerplexitySummary
from axlearn.common.config import config_for_function
from axlearn.common.gradient_accumulation import with_minibatch_steps
from axlearn.common.jax_compat import scan_operand_counts
from axlearn.common.metrics import MaxSummary, MetricAccumulator, MinSummary, SumSummary, WeightedSummary
from axlearn.common.module import OutputCollection
from axlearn.common.update_transformation import ForwardOutputs

_ROWS = 8
_PARAMS = {
    "dense": {
        "bias": np.linspace(-0.2, 0.3, 2, dtype=np.float32),
        "weight": np.arange(8, dtype=np.float32).reshape(4, 2) / 8,
    },
    "norm": {"count": np.array(3, np.int32), "moving_mean": np.ones(4, np.float32)},
}
_FLOATS = {"dense": _PARAMS["dense"], "norm": {"moving_mean": _PARAMS["norm"]["moving_mean"]}}


def _inputs(live=None, *, rows: int = _ROWS):
    rng = np.random.default_rng(0)
    return {
        "input_batch": {
            "row": np.arange(rows, dtype=np.int32),
            "x": rng.standard_normal((rows, 4)).astype(np.float32),
            "y": rng.standard_normal((rows, 2)).astype(np.float32),
            "live": np.ones(rows, np.float32) if live is None else np.asarray(live, np.float32),
        },
        "forward_key": jax.random.PRNGKey(0),
        "noise_key": jax.random.PRNGKey(1),
    }


def _forward(*, model_params, inputs, weighted: bool = True) -> ForwardOutputs:
    """A regression over live rows, with one of each kind of output."""
    dense, norm, batch = model_params["dense"], model_params["norm"], inputs["input_batch"]
    errors = jnp.sum((batch["x"] @ dense["weight"] + dense["bias"][None] - batch["y"]) ** 2, axis=-1)
    num_live = jnp.sum(batch["live"])
    loss = jnp.sum(errors * batch["live"]) / jnp.maximum(num_live, 1)
    # A loss that is a mean over nothing in particular.
    loss = loss + 0.1 * jnp.sum(dense["bias"] ** 2)
    summaries = {
        "loss": WeightedSummary(loss, num_live),
        "perplexity": PerplexitySummary(WeightedSummary(loss, num_live)),
        "nested": {"max": MaxSummary(batch["row"].max()), "min": MinSummary(batch["row"].min()), "empty": {}},
        "sum": SumSummary(batch["row"].sum()),
        "number": batch["row"].mean(),
    }
    state_updates = {
        "norm": {
            "count": norm["count"] + 1,
            "moving_mean": 0.5 * norm["moving_mean"] + 0.5 * batch["x"].mean(axis=0),
        }
    }
    return ForwardOutputs(
        loss=loss,
        aux={"error": jnp.sum(errors * batch["live"]) / jnp.maximum(num_live, 1), "rows": batch["row"]},
        output_collection=OutputCollection(
            summaries=summaries,
            state_updates=state_updates,
            module_outputs={"forward_key": inputs["forward_key"], "noise_key": inputs["noise_key"]},
        ),
        loss_weight=num_live if weighted else None,
    )


def _transform(steps: int, **kwargs):
    return with_minibatch_steps(steps, MetricAccumulator.default_config(), **kwargs)


@functools.cache
def _loss_and_grads(steps: int, *, weighted: bool = True):
    fn = _transform(steps)(functools.partial(_forward, weighted=weighted))

    def loss_fn(floats, inputs):
        params = {
            "dense": floats["dense"],
            "norm": {"count": _PARAMS["norm"]["count"], "moving_mean": floats["norm"]["moving_mean"]},
        }
        outputs = fn(model_params=params, inputs=inputs)
        return outputs.loss, outputs

    return jax.jit(jax.grad(loss_fn, has_aux=True))


def _by_hand(inputs) -> tuple[float, dict]:
    """Loss and gradients of the whole batch in float64."""
    batch = {name: np.asarray(x, np.float64) for name, x in inputs["input_batch"].items()}
    weight, bias = (np.asarray(_PARAMS["dense"][name], np.float64) for name in ("weight", "bias"))
    error = batch["x"] @ weight + bias - batch["y"]
    share = batch["live"] / max(batch["live"].sum(), 1)
    loss = (error**2).sum(axis=-1) @ share + 0.1 * (bias**2).sum()
    scaled = 2 * error * share[:, None]
    return loss, {"weight": batch["x"].T @ scaled, "bias": scaled.sum(axis=0) + 0.2 * bias}


@hypothesis.given(
    live=st.lists(st.integers(0, 3), min_size=_ROWS, max_size=_ROWS), steps=st.sampled_from((2, 4))
)
@hypothesis.example(live=[1, 0, 0, 0, 2, 0, 0, 0], steps=4)
@hypothesis.example(live=[0] * _ROWS, steps=4)
@hypothesis.settings(max_examples=20, deadline=None)
def test_loss_and_gradients_are_those_of_the_whole_batch_whatever_is_live(live, steps):
    inputs = _inputs(live)
    grads, outputs = _loss_and_grads(steps)(_FLOATS, inputs)
    expected_loss, expected_grads = _by_hand(inputs)
    np.testing.assert_allclose(outputs.loss, expected_loss, rtol=1e-6)
    assert outputs.loss_weight == sum(live)
    for name, expected in expected_grads.items():
        np.testing.assert_allclose(grads["dense"][name], expected, rtol=2e-5, atol=1e-6)


def test_without_weights_every_micro_batch_counts_the_same():
    live = [1, 0, 0, 0, 1, 1, 0, 1]
    grads, outputs = _loss_and_grads(4, weighted=False)(_FLOATS, _inputs(live))
    whole = _inputs(live)
    parts = []
    for i in range(4):
        part = {name: x[i::4] for name, x in whole["input_batch"].items()}
        parts.append(_by_hand({**whole, "input_batch": part}))
    np.testing.assert_allclose(outputs.loss, np.mean([loss for loss, _ in parts]), rtol=1e-6)
    expected = np.mean([part["weight"] for _, part in parts], axis=0)
    np.testing.assert_allclose(grads["dense"]["weight"], expected, rtol=2e-5, atol=1e-6)
    assert outputs.loss_weight is None


def test_summaries_add_up_to_those_of_the_whole_batch():
    inputs = _inputs([3, 0, 1, 2, 0, 0, 1, 0])
    whole = _loss_and_grads(1)(_FLOATS, inputs)[1].output_collection.summaries
    parts = _loss_and_grads(4)(_FLOATS, inputs)[1].output_collection.summaries
    del whole["nested"]["empty"]
    assert jax.tree.structure(parts) == jax.tree.structure(whole)
    for part, expected in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(part, expected, rtol=1e-6)


def test_rows_go_to_micro_batches_by_their_number_modulo_the_steps():
    outputs = _loss_and_grads(4)(_FLOATS, _inputs())[1]
    np.testing.assert_array_equal(outputs.aux["rows"], [[0, 4], [1, 5], [2, 6], [3, 7]])
    # A scalar is averaged as the loss is.
    np.testing.assert_allclose(
        outputs.aux["error"], outputs.loss - 0.1 * np.sum(_PARAMS["dense"]["bias"] ** 2), rtol=1e-6
    )


def test_every_micro_batch_has_a_key_of_its_own_and_all_other_inputs_in_common():
    outputs = _loss_and_grads(4)(_FLOATS, _inputs())[1].output_collection.module_outputs
    assert len({tuple(key) for key in np.asarray(outputs["forward_key"])}) == 4
    np.testing.assert_array_equal(outputs["noise_key"], np.tile(jax.random.PRNGKey(1), (4, 1)))
    one = _loss_and_grads(1)(_FLOATS, _inputs())[1].output_collection.module_outputs
    np.testing.assert_array_equal(one["forward_key"], jax.random.PRNGKey(0))


def test_new_values_of_parameters_are_averaged_and_counts_stay_whole():
    inputs = _inputs()
    updates = _loss_and_grads(4)(_FLOATS, inputs)[1].output_collection.state_updates["norm"]
    assert updates["count"] == 4
    assert updates["count"].dtype == jnp.int32
    np.testing.assert_allclose(
        updates["moving_mean"], 0.5 + 0.5 * inputs["input_batch"]["x"].mean(axis=0), rtol=1e-6
    )


def test_it_can_run_without_a_gradient_and_does_not_retrace():
    traces = []

    def forward(**kwargs):
        traces.append(None)
        return _forward(**kwargs)

    run = jax.jit(lambda inputs: _transform(4)(forward)(model_params=_PARAMS, inputs=inputs).loss)
    losses = [run(_inputs()), run(_inputs([2, 1, 0, 0, 0, 0, 0, 1]))]
    count = len(traces)
    assert [float(loss) for loss in losses] == pytest.approx(
        [_by_hand(_inputs())[0], _by_hand(_inputs([2, 1, 0, 0, 0, 0, 0, 1]))[0]], rel=1e-6
    )
    assert run._cache_size() == 1
    assert len(traces) == count


def _linear(*, model_params, inputs) -> ForwardOutputs:
    return ForwardOutputs(
        loss=jnp.sum(inputs["input_batch"]["x"] * model_params["w"][None]),
        aux={},
        output_collection=OutputCollection(summaries={}, state_updates={}, module_outputs={}),
    )


def test_gradients_are_summed_up_in_float32_even_where_parameters_are_bfloat16():
    # In bfloat16, 256 + 1 is 256: of 63 ones on top of it none would be left.
    x = np.ones((64, 1), np.float32)
    x[0] = 256
    inputs = {"input_batch": {"x": jnp.asarray(x, jnp.bfloat16)}}
    params = {"w": jnp.zeros([1], jnp.bfloat16)}

    def grad(fn, params):
        return jax.jit(jax.grad(lambda params: fn(model_params=params, inputs=inputs).loss))(params)["w"]

    got = grad(_transform(64)(_linear), params)
    assert got.dtype == jnp.bfloat16
    assert float(got[0]) == float(jnp.asarray((256 + 63) / 64, jnp.bfloat16))
    # Rounded only when all is summed up, if that is asked for.
    exact = grad(_transform(64)(_linear), {"w": jnp.zeros([1])})
    rounded = grad(_transform(64, grad_dtype=jnp.bfloat16)(_linear), {"w": jnp.zeros([1])})
    assert float(exact[0]) == (256 + 63) / 64
    assert rounded.dtype == jnp.float32
    assert float(rounded[0]) == float(got[0])


def test_only_parameters_that_are_differentiated_have_an_accumulator():
    params = {"w": np.ones([3], np.float32), "frozen": np.ones([5, 7], np.float32)}

    def forward(*, model_params, inputs):
        frozen = jnp.sum(model_params["frozen"])
        return _linear(model_params={"w": model_params["w"] * frozen}, inputs=inputs)

    inputs = {"input_batch": {"x": np.ones((8, 3), np.float32)}}

    def loss(w):
        return _transform(4)(forward)(model_params={**params, "w": w}, inputs=inputs).loss

    def carries(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "scan":
                first, num_carry = scan_operand_counts(eqn.params)
                yield [v.aval.shape for v in eqn.invars[first : first + num_carry]]

    assert list(carries(jax.make_jaxpr(jax.grad(loss))(params["w"]).jaxpr)) == [[(3,)]]


def test_the_activations_of_one_micro_batch_are_all_there_are():
    def forward(*, model_params, inputs):
        hidden = inputs["input_batch"]["x"]
        for weight in (model_params["a"], model_params["b"]):
            hidden = jnp.tanh(hidden @ weight)
        return ForwardOutputs(
            loss=jnp.mean(hidden),
            aux={},
            output_collection=OutputCollection(summaries={}, state_updates={}, module_outputs={}),
        )

    spec = jax.ShapeDtypeStruct
    params = {"a": spec((8, 64), jnp.float32), "b": spec((64, 64), jnp.float32)}

    def temp_bytes(steps: int) -> int:
        fn = _transform(steps)(forward)
        grad = jax.jit(
            jax.grad(lambda params, x: fn(model_params=params, inputs={"input_batch": {"x": x}}).loss)
        )
        return grad.lower(params, spec((4096, 8), jnp.float32)).compile().memory_analysis().temp_size_in_bytes

    # An eighth, and the gradients, which are small beside it.
    assert temp_bytes(8) < temp_bytes(1) / 4


@pytest.mark.parametrize(
    ("rows", "steps", "message"),
    [
        (
            10,
            4,
            "forward_fn_transformation.steps: 4 micro-batches do not divide the 10 rows of a batch.\n  Expected a "
            "divisor of 10. Did you mean 2 or 5? Change the batch size or the number of accumulation steps.",
        ),
        (
            8,
            16,
            "forward_fn_transformation.steps: 16 micro-batches do not divide the 8 rows of a batch.\n  Expected a "
            "divisor of 8. Did you mean 8? Change the batch size or the number of accumulation steps.",
        ),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_divisors(rows, steps, message):
    with pytest.raises(ValueError) as e:
        _transform(steps)(_forward)(model_params=_PARAMS, inputs=_inputs(rows=rows))
    assert str(e.value) == message


@pytest.mark.parametrize("batch", [{}, {"a": np.ones([2]), "b": np.ones([4])}, {"a": np.ones([])}])
def test_a_batch_without_a_number_of_rows_is_refused(batch):
    with pytest.raises(ValueError, match="the same number of rows, to be split into micro-batches"):
        _transform(2)(_forward)(model_params=_PARAMS, inputs={"input_batch": batch})


@pytest.mark.parametrize("steps", [0, -4, 2.0])
def test_a_number_of_steps_below_one_is_refused(steps):
    cfg = config_for_function(with_minibatch_steps).set(metric_accumulator=MetricAccumulator.default_config())
    with pytest.raises((ValueError, TypeError)) as e:
        cfg.set(steps=steps).instantiate()
    assert "steps" in str(e.value)


@jax.custom_vjp
def _with_new_value(x, new_value):
    """`x`; the gradient of `new_value` is what flows back through `x`, at most."""
    return x


_with_new_value.defvjp(lambda x, new_value: (x, None), lambda _, g: (g, jnp.max(jnp.abs(g))))


@pytest.mark.parametrize("loudest", [0, 1])
def test_of_gradients_that_are_new_values_the_largest_counts_whatever_the_weights(loudest):
    params = {"amax": jnp.zeros([]), "scale": jnp.ones([])}

    def forward(*, model_params, inputs):
        batch = inputs["input_batch"]
        outputs = _with_new_value(model_params["scale"] * batch["x"][:, 0], model_params["amax"])
        num_live = jnp.sum(batch["live"])
        empty = OutputCollection(summaries={}, state_updates={}, module_outputs={})
        loss = jnp.sum(outputs**2 * batch["live"]) / num_live
        return ForwardOutputs(loss=loss, aux={}, output_collection=empty, loss_weight=num_live)

    live = np.array([1, 1, 1, 0, 1, 0, 1, 1], np.float32)
    inputs = _inputs(live)
    inputs["input_batch"]["x"][loudest::2] *= 10
    transformation = with_minibatch_steps(2, MetricAccumulator.default_config())
    in_parts = transformation(forward, is_new_value={"amax": True, "scale": False})
    # What the loss is multiplied with is no part of a new value: the micro-batches were done before.
    grads = jax.grad(lambda params: 3 * in_parts(model_params=params, inputs=inputs).loss)(params)
    x = inputs["input_batch"]["x"][:, 0]
    np.testing.assert_allclose(grads["scale"], 3 * 2 * np.sum(x**2 * live) / 6, rtol=1e-6)
    # Half of what each micro-batch has alone: what the whole batch has, but for the number of its live rows.
    parts = [2 * np.abs(x * live)[i::2].max() / live[i::2].sum() / 2 for i in range(2)]
    assert np.argmax(parts) == loudest
    np.testing.assert_allclose(grads["amax"], max(parts), rtol=1e-6)
