"""The check before a run: what it needs, what is there, and that a refusal comes before everything else."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from axlearn.common import optimizers
from axlearn.common.base_layer import ParameterSpec
from axlearn.common.config import config_for_function
from axlearn.common.learner import CompositeLearner, Learner, UpdateType
from axlearn.common.trainer import (
    DoesNotFitError,
    MemoryNeeds,
    MemoryThere,
    _programs,
    format_bytes,
    memory_there,
)
from axlearn.common.trainer._device_memory import free_host_bytes
from axlearn.common.trainer._gradients import bytes_held_at_once
from axlearn.common.trainer._memory import check_fits
from axlearn.common.update_transformation import UpdateTransformation
from tests.common.trainer.tiny_recipe import VOCAB_SIZE, BadBatchInput, trainer_config

GIB = 2**30
# Of the table of pairs and the bias, in float32.
TABLE, BIAS = 4 * VOCAB_SIZE**2, 4 * VOCAB_SIZE
# The optimizer and its schedule count steps.
COUNTS = 2 * 4


def _needs(**fields) -> MemoryNeeds:
    cfg = trainer_config(dir="unused")
    learner_fields = {name: fields.pop(name) for name in ("update_rules",) if name in fields}
    cfg.learner.set(**learner_fields)
    cfg.learner.ema.decay = fields.pop("ema_decay", None)
    return cfg.set(**fields).instantiate(parent=None).programs.memory_needs()


def test_needs_are_parameters_moments_gradients_and_the_batch():
    needs = _needs()
    state = {"parameters": TABLE + BIAS, "optimizer": 2 * (TABLE + BIAS) + COUNTS, "prng_key": 8}
    assert needs.state == state
    assert needs.gradients == TABLE + BIAS
    # A row of 12 positions on each of 8 devices: four arrays of int32, and the row's bytes.
    assert needs.batch == 4 * 12 * 4 + 4
    assert needs.total == sum(state.values()) + needs.gradients + needs.batch
    assert list(needs.parts()) == ["parameters", "optimizer", "prng_key", "gradients", "batch"]


def test_needs_are_per_device():
    needs = _needs(mesh_shape=(2, 4))
    assert needs.state["parameters"] == (TABLE + BIAS) // 4
    assert needs.gradients == (TABLE + BIAS) // 4
    assert needs.batch == 4 * (4 * 12 * 4 + 4)


def test_averages_count_and_what_is_not_optimized_has_no_gradient():
    needs = _needs(ema_decay=0.9, update_rules=[("weight", UpdateType.NO_UPDATE)])
    assert needs.state["ema"] >= TABLE + BIAS
    assert needs.state["optimizer"] == 2 * BIAS + COUNTS
    assert needs.gradients == BIAS


def test_gradients_are_as_narrow_as_what_is_computed_with():
    assert _needs(train_dtype=jnp.bfloat16).gradients == (TABLE + BIAS) // 2
    assert _needs(train_dtype=jnp.float32).gradients == TABLE + BIAS


# Which gradients have to be there at once.

ADAMW = config_for_function(optimizers.adamw_optimizer).set(learning_rate=0.1, b1=0.9, b2=0.95, eps=1e-8)
CLIP = config_for_function(optimizers.clip_by_global_norm).set(max_norm=1.0)
CLIPPED = config_for_function(optimizers.chain).set(args=[CLIP, ADAMW])


class _LooksAtTheForwardPass(UpdateTransformation):
    """Scales by the loss, so that all updates depend on all there is."""

    def create_state_partition_specs(self, model_param_specs):
        return {}

    def init(self, model_params):
        return {}

    def transform_update(self, updates):
        loss = updates.forward_pass["default"].outputs.loss
        return dataclasses.replace(
            updates, delta_updates=jax.tree.map(lambda x: x * loss, updates.delta_updates)
        )


def _held_at_once(learner) -> int:
    made = learner.set(name="learner").instantiate(parent=None)
    specs = {f"w{i}": ParameterSpec((4, 4), jnp.float32) for i in range(4)}
    return bytes_held_at_once(
        {"w0": 1, "w1": 10, "w2": 100, "w3": 1000},
        learner=made,
        model_specs=specs,
        learner_specs=made.create_state_partition_specs(specs),
    )


@pytest.mark.parametrize(
    ("optimizer", "num_bytes"),
    [
        (CLIPPED, 1111),
        (config_for_function(optimizers.skip_and_clip_by_global_norm).set(inner=ADAMW, max_norm=1.0), 1111),
        (ADAMW, 0),
        (config_for_function(optimizers.sgd_optimizer).set(learning_rate=1.0, decouple_weight_decay=True), 0),
        (_LooksAtTheForwardPass.default_config(), 0),
    ],
)
def test_gradients_are_held_together_where_each_update_depends_on_all_of_them(optimizer, num_bytes):
    assert _held_at_once(Learner.default_config().set(optimizer=optimizer)) == num_bytes


def test_of_learners_for_parts_of_the_parameters_the_largest_group_counts():
    learners = {
        name: Learner.default_config().set(optimizer=optimizer)
        for name, optimizer in (("a", CLIPPED), ("b", CLIPPED), ("c", ADAMW))
    }
    rules = [("w[01]", "a"), ("w2", "b"), ("w3", "c")]
    learner = CompositeLearner.default_config().set(learners=learners, rules=rules)
    assert _held_at_once(learner) == 11
    rules = [("w0", "a"), ("w[12]", "b"), ("w3", "c")]
    assert _held_at_once(learner.set(rules=rules)) == 110


# What is there.


def _write(root, files: dict[str, str]) -> None:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text + "\n", encoding="utf-8")


MEMINFO = {"proc/meminfo": "MemTotal:  64000 kB\nMemFree:  100 kB\nMemAvailable:   50000 kB"}


def test_a_machine_has_what_its_kernel_says_is_available(tmp_path):
    assert free_host_bytes(tmp_path) is None
    _write(tmp_path, MEMINFO)
    assert free_host_bytes(tmp_path) == 50_000 * 1024


def test_a_control_group_may_have_less_left(tmp_path):
    group = "sys/fs/cgroup/job"
    _write(
        tmp_path,
        {
            **MEMINFO,
            "proc/self/cgroup": "0::/job/step",
            f"{group}/memory.max": "10000",
            f"{group}/memory.current": "7000",
            f"{group}/memory.stat": "anon 100\ninactive_file 500\nactive_file 30\nfile 600",
            f"{group}/step/memory.max": "max",
            f"{group}/step/memory.current": "7000",
        },
    )
    assert free_host_bytes(tmp_path) == 10_000 - 7_000 + 530
    # A container whose own group is the root.
    _write(tmp_path, {"proc/self/cgroup": "0::/elsewhere"})
    assert free_host_bytes(tmp_path) == 50_000 * 1024
    _write(tmp_path, {"sys/fs/cgroup/memory.max": "900", "sys/fs/cgroup/memory.current": "1000"})
    assert free_host_bytes(tmp_path) == 0


def test_control_groups_of_the_first_version_are_understood(tmp_path):
    group = "sys/fs/cgroup/memory/job"
    _write(
        tmp_path,
        {
            **MEMINFO,
            "proc/self/cgroup": "5:cpu,cpuacct:/job\n4:memory:/job",
            f"{group}/memory.limit_in_bytes": "10000",
            f"{group}/memory.usage_in_bytes": "7000",
            f"{group}/memory.stat": "inactive_file 1\ntotal_inactive_file 200\ntotal_active_file 40",
            # No limit, as the first version has it.
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096),
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "5",
        },
    )
    assert free_host_bytes(tmp_path) == 10_000 - 7_000 + 240


class _Accelerator:
    platform, device_kind, process_index = "gpu", "Abacus 9000", 0

    def __init__(self, stats):
        self._stats = stats

    def memory_stats(self):
        return self._stats


def test_an_accelerator_says_itself_what_it_has():
    devices = [_Accelerator({"bytes_limit": 100, "bytes_in_use": used}) for used in (10, 30)]
    assert memory_there(devices) == MemoryThere(70, "free on Abacus 9000")
    assert memory_there([*devices, _Accelerator(None)]) is None


def test_devices_of_one_processor_share_its_memory():
    one, eight = memory_there(jax.devices()[:1]), memory_there(jax.devices())
    assert eight.num_bytes * 8 == pytest.approx(one.num_bytes, rel=0.3)
    assert eight.source == "free memory of this machine, shared by its 8 devices"


# The refusal.

NEEDS = MemoryNeeds(
    state={"parameters": 3 * GIB, "optimizer": 6 * GIB, "prng_key": 8}, gradients=3 * GIB, batch=2**20
)


def test_a_refusal_names_what_is_needed_what_is_there_and_the_three_largest_parts():
    with pytest.raises(DoesNotFitError) as e:
        check_fits(NEEDS, there=MemoryThere(8 * GIB, "free on X"), where="trainer", num_devices=2)
    assert str(e.value).splitlines()[0] == (
        "trainer: does not fit: each of its 2 devices needs 12.0 GiB without activations (optimizer 6.0 GiB, "
        "parameters 3.0 GiB, gradients 3.0 GiB), and 8.0 GiB are there (free on X)."
    )
    assert (e.value.needs, e.value.there.num_bytes) == (NEEDS, 8 * GIB)


@pytest.mark.parametrize("there", [None, MemoryThere(NEEDS.total, "free on X")])
def test_what_fits_or_may_fit_is_not_refused(there):
    check_fits(NEEDS, there=there, where="trainer", num_devices=1)


def test_a_run_is_refused_before_anything_is_read_made_or_written(tmp_path, monkeypatch):
    def read(self):
        raise AssertionError("Data was read.")

    monkeypatch.setattr(BadBatchInput, "batches", read)
    monkeypatch.setattr(_programs, "memory_there", lambda devices: MemoryThere(100, "free on X"))
    before = {id(x) for x in jax.live_arrays()}
    trainer = trainer_config(dir=str(tmp_path / "run")).instantiate(parent=None)
    key = jax.random.PRNGKey(0)
    with pytest.raises(DoesNotFitError, match="each of its 8 devices needs"):
        trainer.run(key, on_ready=lambda: pytest.fail("It was ready."))
    assert {id(x) for x in jax.live_arrays()} - before <= {id(key)}
    assert not list(tmp_path.iterdir())
    # The user may know better.
    trainer = trainer_config(dir=str(tmp_path / "run")).set(check_memory=False).instantiate(parent=None)
    with pytest.raises(AssertionError, match=r"Data was read\."):
        trainer.run(key)


def test_gradients_that_need_not_be_held_at_once_are_no_reason_to_refuse_a_run(monkeypatch):
    cfg = trainer_config(dir="unused")
    needs = _needs()
    # Room for the state and the batch, and for nearly all of the gradients.
    there = MemoryThere(needs.total - 1, "free on X")
    monkeypatch.setattr(_programs, "memory_there", lambda devices: there)
    cfg.instantiate(parent=None).programs.check_fits(where="tiny")
    cfg.learner.optimizer = CLIPPED
    with pytest.raises(DoesNotFitError) as e:
        cfg.instantiate(parent=None).programs.check_fits(where="tiny")
    assert e.value.needs.gradients == needs.gradients
    # Without room for the state itself nothing of the kind matters.
    there = MemoryThere(needs.total - needs.gradients - 1, "free on X")
    with pytest.raises(DoesNotFitError) as e:
        trainer_config(dir="unused").instantiate(parent=None).programs.check_fits(where="tiny")
    assert e.value.needs.gradients == 0


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1,023 B"), (1536, "1.5 KiB"), (GIB, "1.0 GiB"), (5000 * 2**40, "5,000.0 TiB")],
)
def test_bytes_are_written_in_the_largest_unit(num_bytes, text):
    assert format_bytes(num_bytes) == text
