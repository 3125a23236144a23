"""Scanning in a context, against a Python loop over the same iterations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.config import config_class
from axlearn.common.metrics import WeightedSummary
from axlearn.common.module import Module, OutputConflictError, functional, scan_in_context
from axlearn.common.utils import split_prng_key

NUM = 3


class Step(Module):
    """One iteration."""

    def forward(self, x):
        noise = jax.random.normal(self.prng_key, x.shape)
        y = jnp.tanh(x * self.state["scale"] + noise)
        self.add_summary("mean", WeightedSummary(mean=y.mean(), weight=self.state["scale"]))
        self.add_state_update("scale", self.state["scale"] + 1)
        self.add_module_output("y", y)
        return y


class Scanned(Module):
    """Runs its step several times."""

    @config_class
    class Config(Module.Config):
        scan_kwargs: dict = {}

    def __init__(self, cfg, *, parent):
        super().__init__(cfg, parent=parent)
        self._add_child("step", Step.default_config())

    def forward(self, x, drop_output=None):
        def fn(carry, bias):
            y = self.step(carry)
            return y + bias, y.sum()

        return scan_in_context(
            fn,
            carry=x,
            xs={
                "xs": jnp.arange(NUM, dtype=jnp.float32),
                "state": self.state["step"],
                "prng_key": split_prng_key(self.prng_key, NUM),
            },
            module=self.step,
            drop_output=drop_output,
            **self.config.scan_kwargs,
        )

    def twice(self, x):
        self.forward(x)
        return self.forward(x)

    def without_xs(self, x):
        return scan_in_context(lambda carry, _: (carry, None), carry=x, xs={"state": 1})


STATE = {"step": {"scale": jnp.array([0.5, 1.0, 2.0])}}
X = np.linspace(-1, 1, 4).astype(np.float32)
KEY = jax.random.PRNGKey(5)


def scan(**scan_kwargs):
    module = Scanned.default_config().set(name="scanned", scan_kwargs=scan_kwargs).instantiate(parent=None)

    @jax.jit
    def call(state, x):
        return functional(module, KEY, state, {"x": x}, is_training=True, drop_output_collections=())

    return call(STATE, X)


def by_hand():
    x, ys, states, sums = X, [], [], []
    key = KEY
    for i in range(NUM):
        key, key_i = jax.random.split(key)
        scale = float(STATE["step"]["scale"][i])
        y = np.tanh(x * scale + np.asarray(jax.random.normal(key_i, x.shape)))
        ys.append(y)
        states.append(scale + 1)
        sums.append(y.sum())
        x = y + i
    return x, np.stack(ys), np.array(states), np.array(sums)


@pytest.mark.parametrize("scan_kwargs", [{}, {"unroll": 2}, {"remat_kwargs": {}}])
def test_a_scan_equals_a_loop(scan_kwargs):
    carry, ys, states, sums = by_hand()
    (got_carry, got_sums), outputs = scan(**scan_kwargs)
    np.testing.assert_allclose(got_carry, carry, rtol=1e-5)
    np.testing.assert_allclose(got_sums, sums, rtol=1e-5)
    np.testing.assert_allclose(outputs.state_updates["iter"]["scale"], states)
    np.testing.assert_allclose(outputs.module_outputs["iter"]["y"], ys, rtol=1e-5)
    assert set(outputs.summaries) == {"iter0", "iter1", "iter2"}
    for i in range(NUM):
        np.testing.assert_allclose(outputs.summaries[f"iter{i}"]["mean"].mean, ys[i].mean(), rtol=1e-5)


def test_summaries_can_be_merged():
    _, ys, _, _ = by_hand()
    _, outputs = scan(merge_summaries=True, child_name_prefix="layer")
    merged = outputs.summaries["layer"]["mean"]
    weights = STATE["step"]["scale"]
    np.testing.assert_allclose(merged.mean, np.average(ys.mean(axis=1), weights=weights), rtol=1e-5)
    np.testing.assert_allclose(merged.weight, weights.sum())
    assert set(outputs.state_updates) == {"layer"}


def test_outputs_can_be_dropped_by_path():
    module = Scanned.default_config().set(name="scanned").instantiate(parent=None)
    asked = set()

    def drop(path):
        asked.add(path)
        return path.startswith(("module_outputs", "summaries/me"))

    _, outputs = functional(
        module, KEY, STATE, {"x": X, "drop_output": drop}, is_training=True, drop_output_collections=()
    )
    assert asked == {"summaries/mean", "state_updates/scale", "module_outputs/y"}
    assert outputs.module_outputs == {"iter": {}}
    assert outputs.summaries == {}
    assert set(outputs.state_updates["iter"]) == {"scale"}


def test_rematerialization_does_not_change_gradients():
    def loss(scale, remat_kwargs):
        cfg = Scanned.default_config().set(name="scanned", scan_kwargs={"remat_kwargs": remat_kwargs})
        module = cfg.instantiate(parent=None)
        (carry, _), _ = functional(module, KEY, {"step": {"scale": scale}}, {"x": X}, is_training=True)
        return carry.sum()

    grads = [jax.jit(jax.grad(lambda s, kw=kw: loss(s, kw)))(STATE["step"]["scale"]) for kw in (None, {})]
    np.testing.assert_allclose(*grads, rtol=1e-6)


def test_misuse_is_refused():
    module = Scanned.default_config().set(name="scanned").instantiate(parent=None)
    with pytest.raises(ValueError, match="xs has no 'xs'"):
        functional(module, KEY, STATE, (X,), method="without_xs", is_training=True)
    with pytest.raises(ValueError, match=r"remat_kwargs\['prevent_cse'\] is True"):
        scan(remat_kwargs={"prevent_cse": True})
    with pytest.raises(OutputConflictError, match="The outputs of 'iter' are there already"):
        functional(module, KEY, STATE, (X,), method="twice", is_training=True)
    with pytest.raises(RuntimeError, match="there is no context"):
        scan_in_context(lambda c, x: (c, x), carry=1, xs={"xs": None})
