"""The small parts of the trainer: records, pace, signals, profiles, finiteness, keys."""

import json
import math
import signal
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.flops import FlopsPerToken
from axlearn.common.metrics import WeightedSummary
from axlearn.common.trainer import StoppedBySignal, read_metrics
from axlearn.common.trainer._analysis import aot_model_analysis, state_tree_text
from axlearn.common.trainer._finite import non_finite_paths
from axlearn.common.trainer._metrics_file import MetricsFile
from axlearn.common.trainer._signals import StopSignals
from axlearn.common.trainer._state import TrainerState, as_key, as_raw_key
from axlearn.common.trainer._summaries import scalars
from axlearn.common.trainer._throughput import Throughput, device_peak
from axlearn.common.trainer._watchdog import Watchdog
from axlearn.common.utils import TensorSpec


def test_records_read_back_with_the_same_bits(tmp_path):
    path = str(tmp_path / "metrics.jsonl")
    loss = float(np.float32(0.1) + np.float32(0.2))
    MetricsFile(path).write([{"step": 1, "loss": loss}, {"step": 2, "loss": math.nan}])
    assert [record["loss"] for record in read_metrics(path)] == [loss, "nan"]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_line_that_a_kill_left_unfinished_is_removed_and_the_others_stay(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(str(path)) == [{"step": 1}]
    MetricsFile(str(path)).write([{"step": 2}])
    assert read_metrics(str(path)) == [{"step": 1}, {"step": 2}]


def test_scalars_are_named_by_path_and_arrays_are_left_out():
    summaries = {
        "model": {"loss": WeightedSummary(mean=jnp.asarray(1.5), weight=jnp.asarray(3.0)), "text": "x"},
        "learner": {"histogram": jnp.ones([3]), "lr": 2.0},
    }
    assert scalars(summaries) == {"model/loss": 1.5, "learner/lr": 2.0}


def test_the_pace_is_that_of_the_tokens_between_two_readings(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("axlearn.common.trainer._throughput.time.perf_counter", lambda: now[0])
    throughput = Throughput(devices=jax.devices(), dtype=jnp.float32, flops_per_token=None)
    for _ in range(4):
        throughput.count(num_tokens=100)
    now[0] = 1.0
    with throughput.pause():
        now[0] = 11.0
    now[0] = 12.0
    reading = throughput.read()
    assert (reading.steps_per_second, reading.tokens_per_second) == (2.0, 200.0)
    assert reading.mfu_full is None
    throughput.count(num_tokens=50)
    now[0] = 13.0
    assert throughput.read().tokens_per_second == 50.0


def test_both_utilisations_are_of_a_measured_peak_on_a_device_that_no_table_knows():
    peak = device_peak(jax.devices(), dtype=jnp.float32)
    assert peak.source == "measured matmul peak"
    assert peak.flops_per_second > 1e8
    throughput = Throughput(
        devices=jax.devices(), dtype=jnp.float32, flops_per_token=FlopsPerToken(full=200.0, causal=100.0)
    )
    throughput.count(num_tokens=1000)
    reading = throughput.read()
    assert reading.mfu_full == pytest.approx(2 * reading.mfu_causal)
    assert reading.mfu_full == pytest.approx(200 * reading.tokens_per_second / reading.peak.flops_per_second)


def test_a_known_accelerator_counts_once_per_device():
    class _Device:
        device_kind, platform, process_index = "NVIDIA H100 80GB HBM3", "gpu", 0

    peak = device_peak([_Device()] * 4, dtype=jnp.bfloat16)
    assert peak.flops_per_second == pytest.approx(4 * 989.4e12)
    assert "H100" in peak.source


def test_the_first_signal_is_noted_and_the_old_handler_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        assert signals.received is None
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def _run_beside(module: str, code: str) -> subprocess.CompletedProcess:
    """Runs code in a process of its own, with the one file of `module` loaded as `module`."""
    load = (
        "import importlib.util, signal, sys, time\n"
        "spec = importlib.util.spec_from_file_location('file', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
    )
    arguments = [sys.executable, "-c", load + textwrap.dedent(code), sys.modules[module].__file__]
    return subprocess.run(arguments, capture_output=True, text=True, check=False)


def test_the_second_signal_ends_the_process_at_once():
    done = _run_beside(
        StopSignals.__module__,
        """
        with module.StopSignals():
            signal.raise_signal(signal.SIGTERM)
            print("still here", flush=True)
            signal.raise_signal(signal.SIGTERM)
            print("not reached", flush=True)
        """,
    )
    assert done.stdout == "still here\n"
    assert done.returncode == -signal.SIGTERM


def test_outside_of_the_main_thread_no_handler_is_set():
    seen = []

    def enter():
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_exit_status_is_128_plus_the_signal(signum, status):
    e = StoppedBySignal(step=7, signum=signum, is_saved=True)
    assert e.code == status
    assert str(e) == f"Stopped by {signal.Signals(signum).name} after step 7, which is saved."
    assert str(StoppedBySignal(step=0, signum=signum, is_saved=False)).endswith("before the first step.")


def test_paths_of_what_is_not_finite_are_named():
    tree = {"a": jnp.ones([2]), "b": {"c": jnp.array([1.0, jnp.inf]), "d": jnp.array([1, 2])}, "e": jnp.nan}
    tree["e"] = jnp.asarray(tree["e"])
    assert non_finite_paths(tree) == ["b/c", "e"]
    assert non_finite_paths({"count": jnp.zeros([], jnp.int32)}) == []


def test_a_key_of_four_words_goes_on_as_rbg_while_threefry_is_the_default():
    raw = jax.random.key_data(jax.random.key(3, impl="rbg"))
    key = as_key(raw)
    assert str(jax.random.key_impl(key)) == "rbg"
    np.testing.assert_array_equal(
        as_raw_key(jax.random.split(key)[0]),
        jax.random.key_data(jax.random.split(jax.random.key(3, impl="rbg"))[0]),
    )
    own = jax.random.PRNGKey(3)
    assert as_key(own) is own
    assert as_raw_key(own) is own


def test_the_analysis_subtracts_what_is_donated():
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    compiled = step.lower(jax.ShapeDtypeStruct((256, 1024), jnp.float32)).compile()
    lines = {line.split("  ")[0].strip(): line for line in aot_model_analysis(compiled).splitlines()}
    memory = compiled.memory_analysis()
    size = 256 * 1024 * 4
    assert memory.argument_size_in_bytes == memory.alias_size_in_bytes == size
    assert f"{memory.temp_size_in_bytes + memory.generated_code_size_in_bytes + size} bytes" in lines["total"]


def test_the_state_tree_lists_every_leaf_and_counts_the_parameters():
    spec = TensorSpec(shape=(2, 3), dtype=jnp.float32, mesh_axes=jax.sharding.PartitionSpec(None, "model"))
    text = state_tree_text(
        TrainerState(
            prng_key=TensorSpec(shape=(2,), dtype=jnp.uint32), model={"weight": spec}, learner={"mu": spec}
        )
    )
    assert text.splitlines() == [
        "prng_key uint32[2] mesh_axes=replicated",
        "model/weight float32[2, 3] mesh_axes=(None, 'model')",
        "learner/mu float32[2, 3] mesh_axes=(None, 'model')",
        "parameters: 6",
    ]


def test_the_watchdog_prints_all_stacks_when_the_step_stands_still(capfd):
    with Watchdog(lambda: 3, timeout_seconds=0.05, crash_timeout_seconds=None):
        threading.Event().wait(0.3)
    assert "test_the_watchdog_prints_all_stacks" in capfd.readouterr().err


def test_the_watchdog_ends_a_process_that_has_stepped_and_hangs():
    done = _run_beside(
        Watchdog.__module__,
        """
        step = [0]
        with module.Watchdog(lambda: step[0], timeout_seconds=None, crash_timeout_seconds=0.2):
            time.sleep(0.5)  # Before the first step it may take as long as it takes.
            step[0] = 1
            print("stepped", flush=True)
            time.sleep(30)
        """,
    )
    assert done.stdout == "stepped\n"
    assert done.returncode == -signal.SIGKILL
