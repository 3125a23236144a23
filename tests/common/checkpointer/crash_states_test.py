"""Every state that a crash can leave on the disk restores to the checkpoint before or the one being written.

The operations of one save are recorded. From them every state is built that a killed process can leave (all
operations up to some point, the last write torn) and every state that a power cut can leave (what was not
made durable may be missing, empty, half there or there; what was not made durable of the names may be gone or
not). On each of them a run starts.
"""

import dataclasses
import itertools
import os
import pathlib
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.checkpointer import TensorStoreStateStorage
from axlearn.common.checkpointer._file_ops import FileOps
from axlearn.common.checkpointer._save import write_checkpoint
from axlearn.common.checkpointer._snapshot import Shard, take_snapshot
from axlearn.common.utils import TensorSpec
from tests.common.checkpointer.harness import Position, all_files, assert_same, in_two_threads, opened


class Recorder(FileOps):
    """Records operations, as tuples of a kind, a path below `base_dir` and more."""

    def __init__(self, base_dir: pathlib.Path, *, records_sync: bool = True):
        self.ops: list[tuple] = []
        self._base_dir = base_dir
        self._records_sync = records_sync
        self._lock = threading.Lock()

    def _add(self, kind: str, path: pathlib.Path, *more) -> None:
        with self._lock:
            self.ops.append((kind, str(path.relative_to(self._base_dir)), *more))

    def make_dir(self, path):
        self._add("mkdir", path)
        super().make_dir(path)

    def write_file(self, path, data):
        self._add("create", path)
        self._add("write", path, data)
        if self._records_sync:
            self._add("fsync", path)
        super().write_file(path, data)

    def sync_dir(self, path):
        if self._records_sync:
            self._add("fsync_dir", path)
        super().sync_dir(path)

    def rename(self, source, target):
        self._add("rename", source, str(target.relative_to(self._base_dir)))
        super().rename(source, target)

    def remove_tree(self, path):
        for file in all_files(path):
            self._add("unlink", file)
        for folder in sorted((p for p in path.rglob("*") if p.is_dir()), reverse=True):
            self._add("rmdir", folder)
        self._add("rmdir", path)
        super().remove_tree(path)


@dataclasses.dataclass
class Disk:
    """Files and folders, and how much of them a power cut leaves."""

    files: dict[str, bytes]
    dirs: set[str]
    durable_data: set[str] = dataclasses.field(default_factory=set)
    durable_names: set[str] = dataclasses.field(default_factory=set)
    # The renames of `.` since it was made durable.
    open_renames: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def apply(self, op: tuple) -> None:
        kind, path, *more = op
        match kind:
            case "mkdir":
                self.dirs.add(path)
            case "create":
                self.files[path] = b""
            case "write":
                self.files[path] = more[0]
            case "fsync":
                self.durable_data.add(path)
            case "fsync_dir":
                names = [
                    name for name in (*self.files, *self.dirs) if os.path.dirname(name) == path.strip(".")
                ]
                self.durable_names.update(names)
                if path == ".":
                    self.open_renames.clear()
            case "rename":
                self._move(path, more[0])
                self.open_renames.append((path, more[0]))
            case "unlink":
                del self.files[path]
            case "rmdir":
                self.dirs.remove(path)

    def _move(self, source: str, target: str) -> None:
        def moved(name: str) -> str:
            return target + name[len(source) :] if name == source or name.startswith(f"{source}/") else name

        self.files = {moved(name): data for name, data in self.files.items()}
        for field in ("dirs", "durable_data", "durable_names"):
            setattr(self, field, {moved(name) for name in getattr(self, field)})

    def after_power_cut(self, *, has_renames: bool, has_names: bool, data_kept: float) -> "Disk":
        """What a power cut leaves: durable things, and of the others what is said."""
        disk = Disk(dict(self.files), set(self.dirs), set(self.durable_data), set(self.durable_names))
        for name in self.files:
            if name not in self.durable_data:
                disk.files[name] = self.files[name][: int(len(self.files[name]) * data_kept)]
        targets = {target for _, target in self.open_renames}
        if not has_renames:
            for source, target in reversed(self.open_renames):
                disk._move(target, source)
            targets = set()
        if not has_names:
            gone = {n for n in (*disk.files, *disk.dirs) if n not in disk.durable_names and n not in targets}

            def is_gone(name: str) -> bool:
                parts = name.split("/")
                return any("/".join(parts[: i + 1]) in gone for i in range(len(parts)))

            disk.files = {name: data for name, data in disk.files.items() if not is_gone(name)}
            disk.dirs = {name for name in disk.dirs if not is_gone(name)}
        return disk

    def build(self, base_dir: pathlib.Path) -> None:
        for name in sorted(self.dirs):
            (base_dir / name).mkdir(parents=True)
        for name, data in self.files.items():
            (base_dir / name).write_bytes(data)


def _state(step: int):
    return {"w": jnp.full((2, 3), step, jnp.float32), "input_iter": Position(step)}


def _specs():
    return {"w": TensorSpec((2, 3), jnp.float32), "input_iter": Position()}


def _durable(base_dir: pathlib.Path) -> Disk:
    """A disk with what is in a folder, all of it durable."""
    files = {str(path.relative_to(base_dir)): path.read_bytes() for path in all_files(base_dir)}
    dirs = {str(path.relative_to(base_dir)) for path in base_dir.rglob("*") if path.is_dir()}
    return Disk(files, dirs, durable_data=set(files), durable_names={*files, *dirs})


def _record(base_dir: pathlib.Path, *, steps: list[int], last: int, **kwargs) -> tuple[Disk, list[tuple]]:
    """The disk before step `last` is saved, and the operations of that save and of its deletions."""
    files = Recorder(base_dir, **kwargs)
    with opened(base_dir, files=files) as checkpointer:
        for step in steps:
            checkpointer.save(step=step, state=_state(step))
        checkpointer.wait_until_finished()
        checkpointer._garbage.stop()
        before = _durable(base_dir)
        del files.ops[:]
        checkpointer.save(step=last, state=_state(last))
    return before, files.ops


def _record_two_processes(base_dir: pathlib.Path, *, last: int) -> tuple[Disk, list[tuple]]:
    """As `_record`, of a save in which each of two processes writes one row."""
    _record(base_dir, steps=[], last=last - 1)
    before = _durable(base_dir)
    files = Recorder(base_dir)
    storage = TensorStoreStateStorage.default_config().instantiate()
    whole = take_snapshot(_state(last))

    def save(talk):
        row = Shard(start=(talk.index, 0), value=np.full((1, 3), last, np.float32))
        array = whole.arrays["w"]._replace(chunk_shape=(1, 3), shards=(row,))
        snapshot = whole._replace(arrays={"w": array})
        write_checkpoint(base_dir, step=last, snapshot=snapshot, storage=storage, files=files, talk=talk)

    assert in_two_threads(save) == [None, None]
    return before, files.ops


def _crash_states(before: Disk, ops: list[tuple]) -> list[Disk]:
    """Every state after a crash, each once."""
    states: dict[object, Disk] = {}

    def add(disk: Disk) -> None:
        states[(frozenset(disk.files.items()), frozenset(disk.dirs))] = disk

    for num_ops in range(len(ops) + 1):
        disk = dataclasses.replace(before, files=dict(before.files), dirs=set(before.dirs))
        disk.durable_data, disk.durable_names = set(before.durable_data), set(before.durable_names)
        disk.open_renames = []
        for op in ops[:num_ops]:
            disk.apply(op)
        add(disk)
        if num_ops and ops[num_ops - 1][0] == "write":
            path, data = ops[num_ops - 1][1:]
            for torn in (b"", data[: len(data) // 2]):
                add(Disk({**disk.files, path: torn}, set(disk.dirs)))
        for has_renames, has_names, data_kept in itertools.product((0, 1), (0, 1), (0.0, 0.5, 1.0)):
            cut = disk.after_power_cut(
                has_renames=bool(has_renames), has_names=bool(has_names), data_kept=data_kept
            )
            add(cut)
    return list(states.values())


def _restored_steps(states: list[Disk], work: pathlib.Path) -> list[int]:
    """The step from which a run on each state starts; its arrays and its position are those of that step."""
    steps = []
    for i, disk in enumerate(states):
        base_dir = work / str(i)
        base_dir.mkdir(parents=True)
        disk.build(base_dir)
        with opened(base_dir) as checkpointer:
            step, restored = checkpointer.restore(state=_specs())
            assert_same(restored, _state(step))
        assert not list(base_dir.glob("*.corrupt-*")), "a crash does not look like damage"
        assert not list(base_dir.glob("*.tmp-*")), "what was left behind is swept"
        steps.append(step)
    return steps


def test_every_crash_state_of_a_save_restores_this_step_or_the_one_before(tmp_path):
    before, ops = _record(tmp_path / "run", steps=[1, 2], last=3)
    assert [op[0] for op in ops].count("rename") == 2, "the save is committed, and step 1 is deleted"
    states = _crash_states(before, ops)
    assert len(states) > 30
    steps = _restored_steps(states, tmp_path / "states")
    assert set(steps) == {2, 3}


def test_every_crash_state_of_replacing_a_step_restores_one_or_the_other(tmp_path):
    before, ops = _record(tmp_path / "run", steps=[1], last=1)
    assert [op[0] for op in ops].count("rename") == 2
    assert set(_restored_steps(_crash_states(before, ops), tmp_path / "states")) == {1}


def test_every_crash_state_of_a_save_by_two_processes_restores_this_step_or_the_one_before(tmp_path):
    before, ops = _record_two_processes(tmp_path / "run", last=3)
    states = _crash_states(before, ops)
    assert len(states) > 20
    assert set(_restored_steps(states, tmp_path / "states")) == {2, 3}
    assert _after_the_end(before, ops, tmp_path / "end") == [3]


def test_a_save_that_has_ended_survives_a_power_cut(tmp_path):
    before, ops = _record(tmp_path / "run", steps=[1], last=2)
    assert _after_the_end(before, ops, tmp_path) == [2]


def test_a_save_without_fsync_would_not_survive_a_power_cut(tmp_path):
    """The negative control: the states that are built do know the difference."""
    before, ops = _record(tmp_path / "run", steps=[1], last=2, records_sync=False)
    with pytest.raises(AssertionError):
        assert _after_the_end(before, ops, tmp_path) == [2]


def _after_the_end(before: Disk, ops: list[tuple], tmp_path: pathlib.Path) -> list[int]:
    for op in ops:
        before.apply(op)
    cut = before.after_power_cut(has_renames=False, has_names=False, data_kept=0.0)
    return _restored_steps([cut], tmp_path / "states")
