"""Rematerialization of layers: same results, fewer saved values, outputs in their places."""

import contextlib
import enum
import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from axlearn.common.base_layer import BaseLayer, ParameterSpec, RematSpec, no_remat
from axlearn.common.config import config_class, config_for_function
from axlearn.common.metrics import WeightedSummary
from axlearn.common.module import functional
from axlearn.common.utils import save_and_offload_only_these_names_regex


class Mode(enum.Enum):
    PLAIN = 0


class FeedForward(BaseLayer):
    """sin(x @ w1) @ w2, with noise."""

    def _create_layer_parameter_specs(self):
        return {"w1_weight": ParameterSpec(shape=(4, 8)), "w2_weight": ParameterSpec(shape=(8, 4))}

    def forward(self, x, *, mode, mask=None, label="a"):
        assert mode is Mode.PLAIN
        assert label == "b"
        hidden = self._remat_name(x @ self.parameters["w1_weight"], "linear1")
        hidden = jnp.sin(jnp.sin(hidden))
        self.add_summary("hidden", WeightedSummary(mean=hidden.mean(), weight=1.0))
        self.add_state_update("w1_weight", self.parameters["w1_weight"] + 1)
        noise = jax.random.normal(self.prng_key, x.shape)
        return {"y": self.project(hidden) + noise, "mode": mode, "mask": mask}

    def project(self, hidden):
        return self._remat_name(hidden @ self.parameters["w2_weight"], "linear2")

    @no_remat
    def untouched(self, x):
        return jnp.sin(jnp.sin(x))


class Block(BaseLayer):
    """Adds what its feed-forward returns."""

    @config_class
    class Config(BaseLayer.Config):
        feed_forward: FeedForward.Config = FeedForward.default_config()

    def __init__(self, cfg, *, parent):
        super().__init__(cfg, parent=parent)
        self._add_child("feed_forward", cfg.feed_forward)

    def forward(self, x):
        out = self.feed_forward(x, mode=Mode.PLAIN, label="b")
        assert out["mode"] is Mode.PLAIN
        assert out["mask"] is None
        return x + out["y"]


def policy(saved):
    return config_for_function(save_and_offload_only_these_names_regex).set(
        names_which_can_be_saved=saved, names_which_can_be_offloaded=None
    )


def block(remat_spec=None, inner_spec=None):
    cfg = Block.default_config().set(name="block", remat_spec=remat_spec)
    cfg.feed_forward.remat_spec = inner_spec
    return cfg.instantiate(parent=None)


X = np.linspace(-1, 1, 12).reshape(3, 4).astype(np.float32)
KEY = jax.random.PRNGKey(1)
PARAMS = block().initialize_parameters_recursively(jax.random.PRNGKey(0))


def loss_fn(layer):
    def loss(params):
        y, outputs = functional(layer, KEY, params, (X,), is_training=True)
        return jnp.sum(y**2), outputs

    return loss


def num_checkpoints(fn, *args):
    """How many calls of jax.checkpoint a function contains; the name of the primitive depends on the
    version.
    """
    return len(re.findall(r"\b(?:remat2?|checkpoint)\[", str(jax.make_jaxpr(fn)(*args))))


def saved_by(layer):
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        print_saved_residuals(lambda params: loss_fn(layer)(params)[0], PARAMS)
    return text.getvalue()


SPECS = {
    "outer": (RematSpec(), None),
    "inner": (None, RematSpec(prevent_cse=False, policy=policy(r"FeedForward\.linear1"))),
    "both": (RematSpec(policy=policy(".*linear2")), RematSpec()),
    "a policy that is no config": (RematSpec(policy=jax.checkpoint_policies.dots_saveable), None),
}


@pytest.mark.parametrize("specs", list(SPECS.values()), ids=list(SPECS))
def test_rematerialization_changes_no_result(specs):
    expected = jax.jit(jax.value_and_grad(loss_fn(block()), has_aux=True))(PARAMS)
    got = jax.jit(jax.value_and_grad(loss_fn(block(*specs)), has_aux=True))(PARAMS)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


def test_only_named_values_are_saved():
    assert "sin" in saved_by(block()) or "cos" in saved_by(block())
    saved = saved_by(block(None, RematSpec(policy=policy(r"FeedForward\.linear1"))))
    assert "named 'FeedForward.linear1'" in saved
    assert "linear2" not in saved
    assert "named" not in saved_by(block(RematSpec()))


def test_evaluation_is_not_rematerialized_and_a_layer_is_so_once():
    def call(layer, is_training):
        return num_checkpoints(
            lambda params: functional(layer, KEY, params, (X,), is_training=is_training)[0], PARAMS
        )

    assert call(block(None, RematSpec()), True) == 1
    assert call(block(None, RematSpec()), False) == 0
    assert call(block(RematSpec(), RematSpec()), True) == 2
    assert call(block(), True) == 0


def test_marked_methods_are_not_rematerialized():
    layer = block(None, RematSpec()).feed_forward

    def call(x, method):
        return functional(layer, KEY, PARAMS["feed_forward"], (x,), method=method, is_training=True)[0]

    assert num_checkpoints(lambda x: call(x, "untouched"), X) == 0
    assert num_checkpoints(lambda x: call(x, "project"), jnp.ones((3, 8))) == 1


def test_the_spec_prints_as_in_the_reference():
    cfg = Block.default_config()
    cfg.remat_spec = RematSpec(prevent_cse=False, policy=policy(".*proj"))
    assert [line for line in str(cfg).splitlines() if line.startswith("remat_spec")] == [
        "remat_spec['prevent_cse']: False",
        "remat_spec['policy'].fn: 'axlearn.common.utils.save_and_offload_only_these_names_regex'",
        "remat_spec['policy'].names_which_can_be_offloaded: None",
        "remat_spec['policy'].names_which_can_be_saved: '.*proj'",
        "remat_spec['policy'].offload_dst: 'pinned_host'",
        "remat_spec['policy'].offload_src: 'device'",
    ]
