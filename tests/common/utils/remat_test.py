"""The policy that chooses saved values by name, against what jax says it saves."""

import contextlib
import io

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import Offloadable, Recompute, Saveable, checkpoint_name, print_saved_residuals

from axlearn.common.config import config_for_function
from axlearn.common.utils import (
    combine_fn,
    combine_remat_policies,
    offload_dots_saveable,
    save_and_offload_only_these_names_regex,
)

dots_saveable = jax.checkpoint_policies.dots_saveable
offload_dots = offload_dots_saveable(offload_src="device", offload_dst="pinned_host")


def layer(x):
    x = checkpoint_name(jnp.sin(x), "Attention.q_proj")
    x = checkpoint_name(jax.jit(jnp.cos)(x), "Attention.context")
    return jnp.sin(checkpoint_name(jnp.sin(x), "FeedForward.linear1"))


def saved_by(policy, layer=layer, x=1.0):
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        print_saved_residuals(jax.checkpoint(layer, policy=policy), jnp.asarray(x, jnp.float32))
    return text.getvalue()


def two_products(x):
    """A product without batch dims, one with, and things in between that are cheap."""
    y = checkpoint_name(jnp.sin(jnp.dot(x, x)), "Attention.q_proj")
    return jnp.sum(jnp.sin(jnp.einsum("bi,bi->b", jnp.cos(y), y)))


def program(policy):
    return str(jax.make_jaxpr(jax.grad(jax.checkpoint(two_products, policy=policy)))(jnp.ones((4, 4))))


def save(names):
    return save_and_offload_only_these_names_regex(
        names_which_can_be_saved=names, names_which_can_be_offloaded=None
    )


def test_names_that_match_whole_are_saved_and_nothing_else():
    saved = saved_by(save(r".*\.(q_proj|linear1)"))
    assert "Attention.q_proj" in saved
    assert "FeedForward.linear1" in saved
    assert "Attention.context" not in saved
    assert "named" not in saved_by(save("proj"))


def test_names_can_be_offloaded():
    policy = save_and_offload_only_these_names_regex(
        names_which_can_be_saved=".*context",
        names_which_can_be_offloaded=".*q_proj",
        offload_src="device",
        offload_dst="pinned_host",
    )
    jaxpr = str(jax.make_jaxpr(jax.grad(jax.checkpoint(layer, policy=policy)))(1.0))
    assert jaxpr.count("Host") + jaxpr.count("pinned_host") > 0
    plain = save(".*context")
    assert "ost" not in str(jax.make_jaxpr(jax.grad(jax.checkpoint(layer, policy=plain)))(1.0))


def test_a_name_that_is_both_saved_and_offloaded_is_an_error():
    policy = save_and_offload_only_these_names_regex(
        names_which_can_be_saved=".*proj", names_which_can_be_offloaded=".*q_proj"
    )
    with pytest.raises(ValueError, match=r"'Attention.q_proj' matches both"):
        jax.grad(jax.checkpoint(layer, policy=policy))(1.0)


def test_equal_arguments_give_the_same_policy():
    assert save("a") is save("a")
    assert save("a") is not save("b")


def verdicts(policy):
    """What a policy says of each equation of `two_products`, by the name of its primitive."""
    eqns = jax.make_jaxpr(two_products)(jnp.ones((4, 4))).jaxpr.eqns
    said = [(eqn.primitive.name, policy(eqn.primitive, **eqn.params)) for eqn in eqns]
    return {
        kind: {name for name, verdict in said if isinstance(verdict, kind) and verdict is not False}
        for kind in (Offloadable, bool)
    }


def test_the_results_of_products_wait_on_the_host_and_nothing_else():
    assert verdicts(offload_dots) == {Offloadable: {"dot_general"}, bool: set()}
    assert verdicts(dots_saveable) == {Offloadable: set(), bool: {"dot_general"}}
    # Both products, with and without batch dims: out after the forward pass, back before the backward pass.
    offloading = program(offload_dots)
    assert offloading.count("Host") == 2 * program(
        jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")
    ).count("Host")
    # Nothing is multiplied again: as many products as where they are saved, and fewer than where they are not.
    num_products = lambda policy: program(policy).count("dot_general[")  # noqa: E731
    assert num_products(offload_dots) == num_products(dots_saveable)
    assert num_products(offload_dots) < num_products(jax.checkpoint_policies.nothing_saveable)


def test_offloading_changes_no_gradient():
    x = jnp.linspace(-1, 1, 16).reshape(4, 4)
    expected = jax.grad(two_products)(x)
    actual = jax.jit(jax.grad(jax.checkpoint(two_products, policy=offload_dots)))(x)
    assert jnp.allclose(actual, expected, rtol=1e-5)


def test_offloading_lowers_to_transfers_to_the_host_on_a_tpu():
    grad = jax.jit(jax.grad(jax.checkpoint(two_products, policy=offload_dots)))
    text = grad.trace(jax.ShapeDtypeStruct((4, 4), jnp.float32)).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("annotate_device_placement") == 4
    assert text.count('"pinned_host"') == 2


def test_a_combined_policy_keeps_what_either_keeps():
    both = combine_remat_policies(save(".*q_proj"), dots_saveable)
    saved = saved_by(both, two_products, jnp.ones((4, 4)))
    assert "Attention.q_proj" in saved
    assert saved.count("dot_general") == 2
    # Neither alone keeps both.
    assert "dot_general" not in saved_by(save(".*q_proj"), two_products, jnp.ones((4, 4)))
    assert "Attention.q_proj" not in saved_by(dots_saveable, two_products, jnp.ones((4, 4)))


def test_where_policies_keep_a_value_in_different_places_the_first_decides():
    assert verdicts(combine_remat_policies(dots_saveable, offload_dots))[Offloadable] == set()
    assert verdicts(combine_remat_policies(offload_dots, dots_saveable))[Offloadable] == {"dot_general"}
    # An exception from a rule: products without batch dims stay on the device, those with wait on the host.
    few = combine_remat_policies(jax.checkpoint_policies.dots_with_no_batch_dims_saveable, offload_dots)
    assert 0 < program(few).count("Host") < program(offload_dots).count("Host")


@pytest.mark.parametrize("nothing", [False, Recompute])
def test_combine_fn_takes_the_second_verdict_where_the_first_is_to_recompute(nothing):
    offload = Offloadable(src="device", dst="pinned_host")
    for verdict in (True, Saveable, offload):
        assert combine_fn(nothing, verdict) is verdict
        assert combine_fn(verdict, nothing) is verdict
    assert combine_fn(True, offload) is True
    assert combine_fn(offload, Saveable) is offload
    assert combine_fn(nothing, False) is False


def test_policies_combine_as_configs_too():
    cfg = config_for_function(save_and_offload_only_these_names_regex).set(
        names_which_can_be_saved=".*q_proj", names_which_can_be_offloaded=None
    )
    saved = saved_by(combine_remat_policies(cfg, dots_saveable), two_products, jnp.ones((4, 4)))
    assert "Attention.q_proj" in saved
    assert saved.count("dot_general") == 2


def test_another_rule_may_combine_policies():
    def both(verdict_1, verdict_2):
        return verdict_1 and verdict_2

    no_batch = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    saved = saved_by(combine_remat_policies(dots_saveable, no_batch, both), two_products, jnp.ones((4, 4)))
    assert saved.count("dot_general") == 1


def test_policies_made_of_equal_arguments_are_the_same_object():
    assert offload_dots_saveable(offload_src="device", offload_dst="pinned_host") is offload_dots
    assert combine_remat_policies(save("a"), dots_saveable) is combine_remat_policies(
        save("a"), dots_saveable
    )
    assert combine_remat_policies(save("a"), dots_saveable) is not combine_remat_policies(
        dots_saveable, save("a")
    )
