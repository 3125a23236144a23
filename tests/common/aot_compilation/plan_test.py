"""A plan says of a step what is known of it by other means; here on CPU devices, which are there."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.aot_compilation import (
    Plan,
    compile_trainer_step,
    flops_of,
    make_plan,
    plan_text,
    speeds_of,
    topology_devices,
)
from axlearn.common.machines import Machine, machine_of
from axlearn.experiments.text.gpt import fuji_tiny

_GIB = 2**30
_CPU = Machine(
    name="eight CPU devices",
    accelerator="cpu",
    device_kind="cpu",
    num_slices=1,
    devices_per_slice=8,
    memory_bytes=_GIB,
)


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    cfg = fuji_tiny.trainer_config(data_dir="FAKE")
    cfg.set(dir=str(tmp_path_factory.mktemp("run")), mesh_shape=(1, 1, 1, 4, 1, 2))
    return compile_trainer_step(cfg, devices=np.array(jax.devices()))


@pytest.fixture(scope="module")
def plan(step):
    return make_plan(step, machine=_CPU)


def test_parameters_and_state_are_counted_by_their_specs(plan, step):
    specs = jax.tree.leaves(step.trainer.trainer_state_specs.model)
    assert plan.num_params == sum(math.prod(spec.shape) for spec in specs)
    # Two moments of each parameter lie as it does.
    assert plan.parts["optimizer"] == pytest.approx(2 * plan.parts["parameters"], rel=1e-3)
    assert plan.tokens == fuji_tiny.BATCH_SIZE * fuji_tiny.SEQ_LEN


def test_a_program_that_recomputes_nothing_does_the_models_own_operations(plan):
    assert plan.flops == pytest.approx(plan.model_flops, rel=0.01)


def test_traffic_is_told_by_kind_and_axis(plan):
    rows = {(row.kind, row.axes): row for row in plan.traffic}
    # Weights are gathered over fsdp, three layers forward and three backward, five weights each.
    assert rows["all-gather", ("fsdp",)].count >= 2 * 3 * 5
    assert all(row.sent_bytes > 0 for row in plan.traffic)
    assert {axis for _, axes in rows for axis in axes} == {"fsdp", "model"}


def test_what_no_vendor_states_is_not_known_rather_than_guessed(plan):
    assert speeds_of(_CPU) is None
    assert (plan.compute_seconds, plan.memory_seconds, plan.step_seconds()) == (None, None, None)
    assert "not known" in plan_text(plan)


def test_a_plan_is_the_same_after_json(plan):
    assert Plan.from_json(plan.to_json()) == plan


@pytest.fixture
def tpu_plan(plan):
    """The same numbers as if they were of two slices of v5e."""
    first, second, *rest = plan.traffic
    traffic = [
        dataclasses.replace(first, seconds=0.5),
        dataclasses.replace(second, seconds=0.25, link="network between slices"),
        *(dataclasses.replace(row, seconds=0.0) for row in rest),
    ]
    return dataclasses.replace(plan, traffic=traffic, compute_seconds=0.4, memory_seconds=0.3)


def test_the_time_of_a_step_lies_between_full_overlap_and_none(tpu_plan):
    assert tpu_plan.step_seconds() == (0.5, pytest.approx(0.4 + 0.5 + 0.25))


def test_a_step_that_does_not_fit_is_told_with_what_is_missing_and_what_to_do(plan):
    small = dataclasses.replace(plan, memory_bytes=plan.peak_bytes - _GIB // 100)
    assert not small.fits
    assert (
        plan_text(small)
        .splitlines()[-1]
        .startswith("It does not fit: 0.01 GiB too much. Activations take most")
    )
    mostly_state = dataclasses.replace(small, parts={**small.parts, "activations and temporaries": 0})
    assert "The state takes most" in plan_text(mostly_state)
    assert plan_text(plan).splitlines()[-1] == "It fits."


def test_products_in_loops_branches_and_shards_are_counted():
    n = 8

    def twice(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, length=5)[0]

    def either(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x, x)

    x = jnp.ones((n, n))
    product = 2 * n**3
    assert flops_of(jax.make_jaxpr(twice)(x)) == 5 * product
    assert flops_of(jax.make_jaxpr(either)(x)) == 2 * product
    assert (
        flops_of(jax.make_jaxpr(jax.vmap(jnp.matmul))(jnp.ones((3, n, n)), jnp.ones((3, n, n))))
        == 3 * product
    )
    assert flops_of(jax.make_jaxpr(jax.jit(jnp.matmul))(x, x)) == product
    rematted = jax.grad(lambda x: jnp.sum(jax.checkpoint(lambda x: jnp.sin(x @ x))(x)))
    # Forward, once again, and a product for each of the two factors.
    assert flops_of(jax.make_jaxpr(rematted)(x)) == 4 * product
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    spec = jax.sharding.PartitionSpec("data")
    shards = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=spec, out_specs=spec)
    assert flops_of(jax.make_jaxpr(shards)(jnp.ones((16, 4)))) == 8 * (2 * 2 * 2 * 4)


def test_only_tpus_can_be_compiled_for_without_having_them():
    with pytest.raises(ValueError, match=r"'gpu-p5\.48xlarge-256' has no TPUs"):
        topology_devices(machine_of("gpu-p5.48xlarge-256"))


def test_the_speeds_of_the_tpus_of_mesh_rules_are_known():
    for name in ("tpu-v4-1024", "tpu-v5litepod-256-4", "tpu-v5p-512", "tpu-v6e-256-4", "tpu-7x-128"):
        speeds = speeds_of(machine_of(name))
        assert speeds is not None
        assert speeds.flops > speeds.memory > speeds.link
