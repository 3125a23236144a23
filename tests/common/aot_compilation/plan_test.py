"""A plan says of a step what is known of it by other means; here on CPU devices, which are there."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.aot_compilation import (
    Plan,
    advise,
    compile_trainer_step,
    compiled_facts,
    flops_of,
    make_failed_plan,
    make_plan,
    plan_text,
    read_facts,
    speeds_of,
    topology_devices,
    trace_trainer_step,
    write_facts,
)
from axlearn.common.config import apply_overrides
from axlearn.common.machines import Machine, machine_of
from axlearn.common.trainer_config_modifier import GradientAccumulationModifier
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
        dataclasses.replace(second, seconds=0.25, link="network between slices", overlaps=True),
        *(dataclasses.replace(row, seconds=0.0) for row in rest),
    ]
    return dataclasses.replace(
        plan, traffic=traffic, compute_seconds=0.4, product_memory_seconds=0.1, other_memory_seconds=0.2
    )


def test_the_time_of_a_step_lies_between_full_overlap_and_none(tpu_plan):
    """Products are bound by compute here; other operations come after them; what overlaps costs nothing."""
    step = tpu_plan.step_seconds()
    assert step.best == 0.5
    assert step.predicted == pytest.approx(0.4 + 0.2 + 0.5)
    assert step.worst == pytest.approx(0.4 + 0.2 + 0.5 + 0.25)
    slower = dataclasses.replace(tpu_plan, product_memory_seconds=0.7)
    assert slower.step_seconds().predicted == pytest.approx(0.7 + 0.2 + 0.5)
    assert tpu_plan.mfu(0.8) == pytest.approx(tpu_plan.model_flops / tpu_plan.flops * 0.5)


def test_parameters_are_listed_with_what_each_device_has_of_them(plan):
    parameters = {x.path: x for x in plan.parameters}
    weight = parameters["decoder/transformer/repeat/layer/feed_forward/linear2/weight"]
    assert (weight.spec, weight.num_parts) == (((), ("model",), ("fsdp",)), 8)
    assert weight.num_bytes == math.prod(weight.shape) * 4 // 8
    assert sum(x.num_bytes for x in plan.parameters) == plan.parts["parameters"]


def test_a_plan_made_of_what_was_kept_is_the_same(plan, step, tmp_path):
    path = tmp_path / "facts.gz"
    write_facts(compiled_facts(step.compiled, seconds=step.seconds), path=path, key="one")
    assert read_facts(path, key="another") is None
    kept = read_facts(path, key="one")
    assert make_plan(step, machine=_CPU, facts=kept) == plan
    path.write_bytes(path.read_bytes()[:-100])
    assert read_facts(path, key="one") is None


def test_advice_is_tried_on_the_specs_of_the_trainer(plan, tmp_path):
    """The embedding is whole on each device, and what it names does what it says."""
    cfg = fuji_tiny.trainer_config(data_dir="FAKE")
    cfg.set(dir=str(tmp_path), mesh_shape=(1, 2, 1, 4, 1, 1))
    cfg.model.decoder.emb.token_emb.param_partition_spec = (None, None)
    devices = np.array(jax.devices())
    traced = trace_trainer_step(cfg, devices=devices)
    failed = make_failed_plan(
        traced,
        machine=_CPU._replace(memory_bytes=2**20),
        failure="no",
        temporary_bytes=2**21,
        compile_seconds=0,
    )
    assert not failed.fits
    assert failed.peak_bytes == failed.state_bytes + failed.parts["batch"] + 2**21
    lines = advise(failed, trainer_config=cfg, devices=devices)
    flag = '--set "model.decoder.emb.token_emb.param_partition_spec=('
    (embedding,) = [line for line in lines if line.startswith(flag)]
    override, told = embedding.removeprefix('--set "').split('": the state is ')
    apply_overrides(cfg, [override])
    needs = trace_trainer_step(cfg, devices=devices).trainer.programs.memory_needs()
    assert told.startswith(f"{sum(needs.state.values()) / _GIB:.3g} GiB then")
    assert any("mesh_shape=(1,1,1,-1,1,1)" in line for line in lines)
    # The memory of a CPU device is that of the host.
    assert not any("offload_optimizer" in line for line in lines)
    assert advise(plan, trainer_config=cfg, devices=devices) == []


def test_accumulation_is_advised_only_where_the_rows_of_a_device_divide(plan, tmp_path):
    """Every device has all rows of a batch here, in two parts now."""
    cfg = fuji_tiny.trainer_config(data_dir="FAKE")
    cfg.set(dir=str(tmp_path), mesh_shape=(1, 1, 1, 1, 1, 8))
    GradientAccumulationModifier.default_config().set(grad_acc_steps=2).instantiate()(cfg)
    rows = fuji_tiny.BATCH_SIZE // 2

    def advised(times: float) -> list[str]:
        too_large = dataclasses.replace(
            plan, memory_bytes=plan.state_bytes + 2**20, peak_bytes=2**40, parts={**plan.parts}
        )
        too_large.parts["activations and temporaries"] = int(times * 2**20)
        lines = advise(too_large, trainer_config=cfg, devices=np.array(jax.devices()))
        return [line for line in lines if "GradientAccumulationModifier" in line]

    (line,) = advised(1.5)
    assert "grad_acc_steps=4:" in line
    (line,) = advised(rows)
    assert f"grad_acc_steps={2 * rows}:" in line
    assert advised(rows + 1) == []


def test_transfers_to_the_host_are_told_as_not_counted(tpu_plan):
    assert "not counted" not in plan_text(tpu_plan)
    offloaded = dataclasses.replace(tpu_plan, host_bytes=_GIB)
    assert "transfers to and from the host are not counted" in plan_text(offloaded)


def test_a_step_that_does_not_fit_is_told_with_what_is_missing_and_what_to_do(plan):
    small = dataclasses.replace(plan, memory_bytes=plan.peak_bytes - _GIB // 100, advice=("do this",))
    assert not small.fits
    assert plan_text(small).splitlines()[-2:] == ["It does not fit: 0.01 GiB too much.", "  do this"]
    assert plan_text(plan).splitlines()[-1] == "It fits."
    failed = dataclasses.replace(small, failure="the compiler gave up")
    assert plan_text(failed).splitlines()[-2] == "It does not compile: the compiler gave up."


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
