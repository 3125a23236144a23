"""Four real processes of two devices: meshes over them, parts of batches, agreements, and the end of all."""

import functools
import hashlib
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from axlearn.common import notices, peer_failures, processes
from axlearn.common.input_base import DataIterator
from axlearn.common.input_dispatch import InputDispatcher
from axlearn.common.input_fake import FakeLmInput
from axlearn.common.module import nowrap
from axlearn.common.trainer._agreement import StopAgreement
from axlearn.common.trainer._signals import StopSignals
from axlearn.common.utils import HybridMeshShape, batch_part, build_mesh, host_to_global_array, use_mesh
from tests.common.trainer import tiny_recipe
from tests.processes_harness import Outcome, start_processes

ROWS = 16
# Shape, and whether the parts that processes read are (index of process 0 to 3, number of parts).
MESHES: dict[str, tuple[Any, tuple[str, ...], list[tuple[int, int]]]] = {
    "a part each": ((8, 1), ("data", "model"), [(0, 4), (1, 4), (2, 4), (3, 4)]),
    "the model within a process": ((4, 2), ("data", "model"), [(0, 4), (1, 4), (2, 4), (3, 4)]),
    "two processes share the model": (
        HybridMeshShape((1, 2), (2, 2)),
        ("data", "model"),
        [(0, 2), (0, 2), (1, 2), (1, 2)],
    ),
    "all share the model": (HybridMeshShape((1, 2), (1, 4)), ("data", "model"), [(0, 1)] * 4),
    "fsdp stays within a process": (
        HybridMeshShape((1, 2), (4, 1)),
        ("data", "fsdp"),
        [(0, 4), (1, 4), (2, 4), (3, 4)],
    ),
    "rows of a process that do not lie together": (
        HybridMeshShape((2, 1), (1, 4)),
        ("data", "fsdp"),
        [(0, 1)] * 4,
    ),
    "data within processes only": (HybridMeshShape((2, 1), (1, 4)), ("data", "model"), [(0, 1)] * 4),
}


def _batch_axes(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name != "model")


def _check_rows(name: str) -> list[int]:
    """Every device has the rows that are its by the mesh, whoever read them; returns the part of this process."""
    shape, axis_names, _ = MESHES[name]
    expected = np.arange(ROWS * 3).reshape(ROWS, 3)
    with use_mesh(build_mesh(mesh_shape=shape, mesh_axis_names=axis_names)):
        spec = P(_batch_axes(axis_names))
        part = batch_part(spec)
        size = ROWS // part.num_parts
        mine = expected[part.part_index * size :][:size]
        on_mesh = host_to_global_array({"x": mine, "y": np.float32(3)}, partition={"x": spec, "y": P()})
        assert on_mesh["x"].shape == expected.shape
        for shard in on_mesh["x"].addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), expected[shard.index])
        assert float(on_mesh["y"]) == 3
        _check_input(spec)
    return [part.part_index, part.num_parts]


def _check_input(spec: P) -> None:
    """An input reads that part; with a dispatcher, the rows come out in their order too."""
    whole = FakeLmInput.default_config().set(
        is_training=True, global_batch_size=ROWS, source_length=4, vocab_size=9
    )
    expected = _rows_of_one_process(ROWS)
    module = whole.clone(name="input", partition_spec=spec).instantiate(parent=None)
    on_mesh = host_to_global_array(next(module.batches()), partition=spec)
    for shard in on_mesh["input_ids"].addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), expected[shard.index])
    assert module.num_feeds == batch_part(spec).num_parts


@functools.cache
def _rows_of_one_process(rows: int) -> np.ndarray:
    """The ids of the first batch, as the only process reads them."""
    bits = np.random.Philox(np.random.SeedSequence((0, 1, 0))).random_raw(rows * 5)
    return (bits % np.uint64(9)).astype(np.int32).reshape(rows, 5)[:, :-1]


def _dispatched() -> list[int]:
    """Six logical rows on eight devices of four processes that share them by two: padding stands behind."""
    with use_mesh(build_mesh(mesh_shape=HybridMeshShape((1, 2), (2, 2)), mesh_axis_names=("data", "model"))):
        spec = P("data")
        cfg = FakeLmInput.default_config().set(
            is_training=True, global_batch_size=6, source_length=4, vocab_size=9
        )
        cfg.input_dispatcher = InputDispatcher.default_config().set(global_logical_batch_size=6)
        module = cfg.set(name="input", partition_spec=spec).instantiate(parent=None)
        on_mesh = host_to_global_array(next(module.batches()), partition=spec)
        logical = jax.jit(module.dispatch_global_batch, out_shardings=None)(on_mesh)["input_ids"]
        for shard in logical.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), _rows_of_one_process(6)[shard.index])
        return list(logical.shape)


def _stop(*, asked: int) -> list[int]:
    """Processes at different steps when one is asked to stop; returns where this one stopped and why."""
    me = jax.process_index()
    signals = StopSignals()
    step = 10
    with StopAgreement(signals, step=step, num_processes=4) as stops:
        while True:
            signum = stops.signal_behind(step)
            if signum is not None:
                return [step, signum]
            # Nothing else keeps them in step here: process 3 is the fastest.
            time.sleep(0.05 / (1 + me))
            step += 1
            if me == asked and step == 14:
                signals.received = 15


def together() -> dict[str, Any]:
    """What each process does; returns what it saw."""
    me = jax.process_index()
    seen: dict[str, Any] = {
        "parts": {name: _check_rows(name) for name in MESHES},
        "dispatched": _dispatched(),
    }
    seen["notice"] = notices.post_once("who is first", f"{me}")
    seen["stop"] = _stop(asked=2)
    assert notices.posted("nobody posted this") is None
    digest = hashlib.sha256(repr([seen["notice"], seen["stop"]]).encode()).hexdigest()
    assert len(set(processes.all_gather_text("all saw the same", digest, timeout_seconds=60))) == 1
    return seen


class DataOfSome(FakeLmInput):
    """Made-up ids, which process 2 does not have, as it finds out when others could have begun long ago."""

    @nowrap
    def batches(self) -> DataIterator:
        if jax.process_index() == 2:
            time.sleep(2)
            raise OSError("the data\nare not there")
        return super().batches()


def fail_in_one(run_dir: str) -> None:
    """Process 2 fails while the others wait where no exception reaches them."""
    cfg = tiny_recipe.trainer_config(dir=run_dir)
    fields = {name: getattr(cfg.input, name) for name in ("global_batch_size", "source_length", "vocab_size")}
    trainer = cfg.set(input=DataOfSome.default_config().set(**fields)).instantiate(parent=None)
    peer_failures.watch_peers()
    processes.wait_for_all("all watch", timeout_seconds=60)
    try:
        trainer.run(jax.random.PRNGKey(0))
    except OSError as e:
        peer_failures.end_with_peers(status=3, text=str(e))


def do_all(result_file: str) -> None:
    """All of it in one start, which costs most."""
    seen = together()
    pathlib.Path(f"{result_file}-{jax.process_index()}").write_text(json.dumps(seen), encoding="utf-8")
    fail_in_one(f"{result_file}-run")


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> tuple[list[dict[str, Any]], list[Outcome], pathlib.Path]:
    """What four processes saw, how they ended, and where they would have trained."""
    results = tmp_path_factory.mktemp("together") / "seen"
    with start_processes(
        f"{__name__}:do_all", num_processes=4, num_devices=2, arguments={"result_file": str(results)}
    ) as four:
        outcomes = four.wait(timeout_seconds=240)
    files = [results.with_name(f"seen-{i}") for i in range(4)]
    assert all(file.exists() for file in files), "\n".join(outcome.output for outcome in outcomes)
    seen = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return seen, outcomes, results.with_name("seen-run")


@pytest.mark.parametrize("name", MESHES)
def test_processes_read_what_their_devices_hold(ended, name):
    seen, *_ = ended
    assert [tuple(one["parts"][name]) for one in seen] == MESHES[name][2]


def test_a_dispatcher_counts_the_parts_of_the_mesh_and_not_processes(ended):
    assert [one["dispatched"] for one in ended[0]] == [[6, 4]] * 4


def test_all_stop_behind_the_same_step_that_none_has_passed(ended):
    stops = [tuple(one["stop"]) for one in ended[0]]
    assert len(set(stops)) == 1
    assert stops[0][0] > 14
    assert stops[0][1] == 15


def test_of_several_notices_the_first_stands(ended):
    assert len({one["notice"] for one in ended[0]}) == 1


def test_all_end_with_the_status_and_the_words_of_the_one_that_failed(ended):
    _, outcomes, _ = ended
    assert [outcome.status for outcome in outcomes] == [3] * 4
    for i in (0, 1, 3):
        assert "Process 2 of 4 failed, and all end with it. It said:\n  the data\n  are not there" in (
            outcomes[i].output
        )


def test_a_run_that_one_refuses_leaves_nothing_behind(ended):
    *_, run_dir = ended
    assert run_dir.parent.is_dir()
    assert not run_dir.exists()
