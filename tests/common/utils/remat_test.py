"""The policy that chooses saved values by name, against what jax says it saves."""

import contextlib
import io

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name, print_saved_residuals

from axlearn.common.utils import save_and_offload_only_these_names_regex


def layer(x):
    x = checkpoint_name(jnp.sin(x), "Attention.q_proj")
    x = checkpoint_name(jax.jit(jnp.cos)(x), "Attention.context")
    return jnp.sin(checkpoint_name(jnp.sin(x), "FeedForward.linear1"))


def saved_by(policy):
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        print_saved_residuals(jax.checkpoint(layer, policy=policy), jnp.float32(1.0))
    return text.getvalue()


def test_names_that_match_whole_are_saved_and_nothing_else():
    saved = saved_by(
        save_and_offload_only_these_names_regex(names_which_can_be_saved=r".*\.(q_proj|linear1)")
    )
    assert "Attention.q_proj" in saved
    assert "FeedForward.linear1" in saved
    assert "Attention.context" not in saved
    assert "named" not in saved_by(save_and_offload_only_these_names_regex(names_which_can_be_saved="proj"))


def test_names_can_be_offloaded():
    policy = save_and_offload_only_these_names_regex(
        names_which_can_be_saved=".*context",
        names_which_can_be_offloaded=".*q_proj",
        offload_src="device",
        offload_dst="pinned_host",
    )
    jaxpr = str(jax.make_jaxpr(jax.grad(jax.checkpoint(layer, policy=policy)))(1.0))
    assert jaxpr.count("Host") + jaxpr.count("pinned_host") > 0
    plain = save_and_offload_only_these_names_regex(names_which_can_be_saved=".*context")
    assert "ost" not in str(jax.make_jaxpr(jax.grad(jax.checkpoint(layer, policy=plain)))(1.0))


def test_a_name_that_is_both_saved_and_offloaded_is_an_error():
    policy = save_and_offload_only_these_names_regex(
        names_which_can_be_saved=".*proj", names_which_can_be_offloaded=".*q_proj"
    )
    with pytest.raises(ValueError, match=r"'Attention.q_proj' matches both"):
        jax.grad(jax.checkpoint(layer, policy=policy))(1.0)


def test_equal_arguments_give_the_same_policy():
    make = save_and_offload_only_these_names_regex
    assert make(names_which_can_be_saved="a") is make(names_which_can_be_saved="a")
    assert make(names_which_can_be_saved="a") is not make(names_which_can_be_saved="b")
