"""Tests of axlearn.common.flash_attention.remat: the backward pass does not run the forward kernel again.

`aot_test.py` counts the kernels in programs compiled for TPU.
"""

import collections
import math
import types

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import print_saved_residuals
from jax.extend import core
from jax.sharding import PartitionSpec as P

from axlearn.common.base_layer import RematSpec
from axlearn.common.flash_attention import remat
from axlearn.common.module import functional
from axlearn.common.utils import (
    build_mesh,
    combine_remat_policies,
    save_and_offload_only_these_names_regex,
    use_mesh,
)
from tests.common.flash_attention.kernel_cases import (
    BATCH,
    CASES,
    NUM_HEADS,
    PER_HEAD_DIM,
    SEQ,
    build,
    forward_and_grads,
    inputs_of,
)

_BY_NAME = save_and_offload_only_these_names_regex(
    names_which_can_be_saved=".*flash_residuals", names_which_can_be_offloaded=None
)
_WITH_DOTS = combine_remat_policies(remat.policy, jax.checkpoint_policies.dots_saveable)


def _count(jaxpr: core.Jaxpr, found: collections.Counter) -> collections.Counter:
    """How often each primitive stands in a program; what is inside of a kernel does not count."""
    for eqn in jaxpr.eqns:
        found[eqn.primitive.name] += 1
        if eqn.primitive.name == "pallas_call":
            continue
        for value in eqn.params.values():
            for x in value if isinstance(value, tuple) else (value,):
                x = getattr(x, "jaxpr", x)
                if isinstance(x, core.Jaxpr):
                    _count(x, found)
    return found


# For ring attention.
_KEYS_SPLIT = {name: P(None, "seq", None, None) for name in ("btnh", "bsnh")}


def _layer(kernel: str, policy):
    case = CASES["causal, packed"]
    cfg = build(case, implementation=kernel, mha_dim_to_partition_spec=_KEYS_SPLIT).config.clone(
        remat_spec=RematSpec(prevent_cse=False, policy=policy)
    )
    return cfg.instantiate(parent=None), inputs_of(case)


def _primitives(kernel: str, policy) -> collections.Counter:
    layer, inputs = _layer(kernel, policy)
    return _count(jax.make_jaxpr(lambda x: forward_and_grads(layer, x))(inputs).jaxpr, collections.Counter())


@pytest.mark.parametrize("kernel", ["tpu_splash", "tpu_flash", "gpu_pallas"])
def test_saved_residuals_spare_the_backward_pass_the_forward_kernel(kernel):
    again = _primitives(kernel, None)["pallas_call"]
    for policy in (remat.policy, _BY_NAME, _WITH_DOTS):
        assert _primitives(kernel, policy)["pallas_call"] == again - 1


def test_saved_residuals_spare_the_backward_pass_the_first_round_of_keys(capsys):
    with use_mesh(build_mesh(mesh_shape=(8,), mesh_axis_names=("seq",))):
        again = _primitives("ring", None)["ppermute"]
        # Keys, values and segment ids.
        found = [_primitives("ring", policy)["ppermute"] for policy in (remat.policy, _BY_NAME)]
        assert found == [again - 3] * 2
        saved = _saved("ring", remat.policy, capsys, of="output of shard_map")
    assert [math.prod(shape) for shape in saved] == [
        BATCH * SEQ * NUM_HEADS * PER_HEAD_DIM,
        BATCH * SEQ * NUM_HEADS,
    ]


def test_without_a_kernel_the_context_is_saved_and_its_product_is_not_computed_again():
    assert _primitives("xla", remat.policy)["dot_general"] == _primitives("xla", None)["dot_general"] - 1


@pytest.mark.parametrize("kernel", ["tpu_splash", "gpu_pallas"])
def test_the_context_and_one_number_per_query_and_head_are_saved_once(kernel, capsys):
    for policy in (remat.policy, _BY_NAME):
        sizes = [sorted(shape) for shape in _saved(kernel, policy, capsys, of="flash_residuals")]
        assert sizes == [sorted([BATCH, SEQ, NUM_HEADS, PER_HEAD_DIM]), sorted([BATCH, NUM_HEADS, SEQ])]


def _saved(kernel: str, policy, capsys, *, of: str) -> list[list[int]]:
    """The shapes of what is saved for the backward pass, of lines that say so."""
    layer, inputs = _layer(kernel, policy)
    floats = {name: inputs.pop(name) for name in ("params", "query")}

    def loss(floats):
        arguments = {"query": floats["query"], **inputs}
        return jnp.sum(functional(layer, None, floats["params"], arguments, is_training=True)[0].data)

    print_saved_residuals(loss, floats)
    lines = [line for line in capsys.readouterr().out.splitlines() if of in line]
    return [list(map(int, line[4 : line.index("]")].split(","))) for line in lines]


@pytest.mark.parametrize(
    ("primitive", "name", "is_saved"),
    [
        ("name", "FlashAttention.flash_residuals", True),
        ("name", "flash_residuals", True),
        ("name", "FlashAttention.context", False),
        ("name", "flash_residuals_of_others", False),
        ("jit", "flash_residuals", False),
    ],
)
def test_the_policy_saves_what_is_named_so_and_nothing_else(primitive, name, is_saved):
    assert remat.policy(types.SimpleNamespace(name=primitive), name=name) is is_saved
