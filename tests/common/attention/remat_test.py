"""Tests of axlearn.common.attention: what is saved for the backward pass."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from axlearn.common.attention import (
    RematRegexSavePatterns,
    RepeatedTransformerLayer,
    StackedTransformerLayer,
    build_remat_spec,
)
from axlearn.common.module import functional
from tests.common.attention.layer_configs import (
    DIM,
    llama_layer_config,
    llama_stack_config,
    normal,
    random_params,
)

_X = normal(2, 5, DIM)
_ATTENTION_NAMES = {"q_proj", "k_proj", "v_proj", "o_proj", "context"}
_LINEAR1_NAMES = {"linear1_0", "linear1_1"}


def _loss(layer):
    def loss(params):
        outputs, _ = functional(layer, None, params, {"data": _X}, is_training=True)
        return jnp.sum(jnp.square(outputs.data))

    return loss


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (RematRegexSavePatterns.NATIVE_ATTENTION, _ATTENTION_NAMES),
        (RematRegexSavePatterns.QKV_PROJ, {"q_proj", "k_proj", "v_proj"}),
        (RematRegexSavePatterns.CONTEXT, {"context"}),
        (RematRegexSavePatterns.O_PROJ, {"o_proj"}),
        (RematRegexSavePatterns.LINEAR1_X, _LINEAR1_NAMES),
        (RematRegexSavePatterns.LINEAR1_0, {"linear1_0"}),
        (".*[kqv]_proj|.*linear1_[01]", {"q_proj", "k_proj", "v_proj"} | _LINEAR1_NAMES),
        (None, set()),
    ],
)
def test_a_policy_saves_what_it_names_and_nothing_else(pattern, names, capsys):
    cfg = llama_layer_config().set(name="layer", input_dim=DIM)
    cfg.remat_spec = build_remat_spec(llama_stack_config(), save_pattern=pattern)
    layer = cfg.instantiate(parent=None)
    params = random_params(layer)
    print_saved_residuals(_loss(layer), params)
    lines = capsys.readouterr().out.splitlines()
    saved = {match.group(1) for line in lines if (match := re.search(r"named '\w+\.(\w+)'", line))}
    assert saved == names
    # All others are arguments, constants, or the outputs of the layer, which the loss squares.
    others = [line for line in lines if "named" not in line and "from the argument" not in line]
    assert all(
        str(tuple(_X.shape)).replace(" ", "")[1:-1] in line or "constant" in line for line in others
    ), others


def test_rematerialisation_does_not_change_gradients():
    cfg = llama_stack_config()
    plain = cfg.instantiate(parent=None)
    cfg.layer.remat_spec = build_remat_spec(cfg)
    remat = cfg.instantiate(parent=None)
    params = random_params(plain)
    expected = jax.jit(jax.value_and_grad(_loss(plain)))(params)
    actual = jax.jit(jax.value_and_grad(_loss(remat)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), actual, expected)


def test_the_loop_over_layers_carries_named_values_only():
    """What the forward loop stacks for the backward loop is the layers' inputs and what the policy names."""
    # A number that is no other dimension, to tell what is stacked over the layers from what is carried.
    num_layers = 7
    cfg = llama_stack_config(num_layers)
    cfg.layer.remat_spec = build_remat_spec(cfg)
    layer = cfg.instantiate(parent=None)
    params = random_params(layer)
    jaxpr = jax.make_jaxpr(jax.grad(_loss(layer)))(params)
    forward_scan = next(eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "scan")
    stacked = sorted(
        v.aval.shape[1:]
        for v in forward_scan.outvars
        if v.aval.shape[:1] == (num_layers,) and v.aval.ndim > 1
    )
    batch, seq, dim = _X.shape
    # The input of the layer and o_proj; q_proj and context; k_proj and v_proj.
    expected = [(batch, seq, dim)] * 2 + [(batch, seq, 4, 4)] * 2 + [(batch, seq, 2, 4)] * 2
    assert stacked == sorted(expected)


def test_layers_outside_of_a_loop_prevent_the_compiler_from_undoing_it():
    assert build_remat_spec(StackedTransformerLayer.default_config()).prevent_cse
    assert not build_remat_spec(RepeatedTransformerLayer.default_config()).prevent_cse


def test_the_spec_prints_as_in_the_reference_dumps():
    cfg = llama_layer_config()
    cfg.remat_spec = build_remat_spec(llama_stack_config())
    lines = [line for line in str(cfg).splitlines() if line.startswith("remat_spec")]
    assert lines == [
        "remat_spec['prevent_cse']: False",
        "remat_spec['policy'].fn: 'axlearn.common.attention._save_and_offload_only_these_names_regex'",
        "remat_spec['policy'].names_which_can_be_offloaded: None",
        "remat_spec['policy'].names_which_can_be_saved: '.*([qkvo]_proj|context)'",
        "remat_spec['policy'].offload_dst: 'pinned_host'",
        "remat_spec['policy'].offload_src: 'device'",
    ]
