"""What each of several processes does in `processes_test.py`; what it returns is compared there."""

import contextlib
import errno
import itertools
import json
import os
import pathlib
import shutil
import signal
from collections.abc import Iterator
from typing import Any, Optional

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from axlearn.common.checkpointer import Checkpointer, _native
from axlearn.common.checkpointer._file_ops import FileOps
from axlearn.common.processes import wait_for_all
from axlearn.common.utils import TensorSpec, build_mesh, flatten_items, use_mesh
from tests.common.checkpointer.harness import Hooked, Position, all_files

# By path: how each array is split. Over two processes of two devices, either of them has all of "rows", each half
# of "columns" twice, and a quarter of "both" on each device.
SPLITS = {
    "model/rows": ((8, 6), PartitionSpec("fsdp", None)),
    "model/columns": ((6, 4), PartitionSpec(None, "data")),
    "learner/both": ((8, 4), PartitionSpec(("data", "fsdp"), None)),
    "learner/count": ((), PartitionSpec()),
}
# Each process has all of it for itself.
_LOCAL_SHAPE = (3,)
_PEER_TIMEOUT = 60


def values(seed: int) -> dict[str, np.ndarray]:
    """The values of a state, by path."""
    rng = np.random.default_rng(seed)
    arrays = {path: rng.standard_normal(shape).astype(np.float32) for path, (shape, _) in SPLITS.items()}
    return {**arrays, "local": rng.standard_normal(_LOCAL_SHAPE).astype(np.float32)}


def mesh() -> contextlib.AbstractContextManager[Any]:
    """A mesh of all devices of all processes, split in two ways."""
    devices = jax.devices()
    shape = (len(devices) // 2, 2)
    return use_mesh(build_mesh(mesh_shape=shape, mesh_axis_names=("data", "fsdp"), devices=devices))


def make_state(seed: int) -> dict[str, Any]:
    """A state over all devices, under `mesh()`."""
    content = values(seed)

    def distribute(path: str) -> jax.Array:
        shape, split = SPLITS[path]
        sharding = NamedSharding(TensorSpec((), jnp.float32, split).sharding.mesh, split)
        return jax.make_array_from_callback(shape, sharding, lambda index: content[path][index])

    return {
        "model": {name: distribute(f"model/{name}") for name in ("rows", "columns")},
        "learner": {name: distribute(f"learner/{name}") for name in ("both", "count")},
        # On a device of this process alone, or on none.
        "local": jax.device_put(content["local"], jax.local_devices()[0]) if seed % 2 else content["local"],
        "input_iter": Position(seed),
    }


def specs() -> dict[str, Any]:
    """What `make_state` makes, to restore."""

    def spec(path: str) -> TensorSpec:
        shape, split = SPLITS[path]
        return TensorSpec(shape, jnp.float32, split)

    return {
        "model": {name: spec(f"model/{name}") for name in ("rows", "columns")},
        "learner": {name: spec(f"learner/{name}") for name in ("both", "count")},
        "local": TensorSpec(_LOCAL_SHAPE, jnp.float32),
        "input_iter": Position(),
    }


def is_state_of(state: Any, seed: int) -> bool:
    """Whether the parts of a state that this process has are those of `make_state(seed)`."""
    expected = values(seed)
    items = dict(flatten_items(state))
    position = items.pop("input_iter")
    assert items.keys() == expected.keys()
    return position.get_state() == Position(seed).get_state() and all(
        np.array_equal(np.asarray(shard.data), expected[path][shard.index])
        for path, x in items.items()
        for shard in x.addressable_shards
    )


@contextlib.contextmanager
def opened(base_dir: str, *, files: Optional[FileOps] = None, **fields: Any) -> Iterator[Checkpointer]:
    """A checkpointer of all processes, stopped at the end."""
    fields = {"keep_last_n": 99, "peer_timeout_seconds": _PEER_TIMEOUT, **fields}
    cfg = Checkpointer.default_config().set(name="checkpointer", dir=base_dir, **fields)
    checkpointer = cfg.instantiate(parent=None)
    if files is not None:
        checkpointer._files = files
    with mesh():
        try:
            yield checkpointer
        finally:
            checkpointer.stop()


def outcome(fn: Any) -> list[str]:
    """The type and the message of the error that a call raises."""
    try:
        fn()
    except Exception as e:
        return [type(e).__name__, str(e)]
    return ["", ""]


def names(base_dir: str) -> list[str]:
    """What is in a folder of checkpoints, while nobody does anything there."""
    wait_for_all(f"looking/{next(_looks)}", timeout_seconds=_PEER_TIMEOUT)
    found = sorted(path.name for path in pathlib.Path(base_dir).iterdir())
    wait_for_all(f"looked/{next(_looks)}", timeout_seconds=_PEER_TIMEOUT)
    return found


_looks = itertools.count()


def save(base_dir: str, *, seeds: list[int], files: Optional[FileOps] = None) -> list[str]:
    """Saves states; the step is the seed."""
    with opened(base_dir, files=files) as checkpointer:
        for seed in seeds:
            checkpointer.save(step=seed, state=make_state(seed))
    return names(base_dir)


def chunks_of_each(base_dir: str) -> list[str]:
    """The chunks that this process writes in a save, by array and place."""
    chunks: list[str] = []

    def before(operation: str, path: pathlib.Path) -> None:
        if operation == "write_file" and path.parts[-1].isdigit():
            chunks.append(str(path).partition("/gda/")[2])

    save(base_dir, seeds=[4], files=Hooked(before))
    return sorted(chunks)


def restore(base_dir: str, *, step: Optional[int] = None) -> list[Any]:
    """Restores, and says which step it was and whether it is whole."""
    with opened(base_dir) as checkpointer:
        found, state = checkpointer.restore(step=step, state=specs())
        return [found, found is not None and is_state_of(state, found)]


def fail_on_one(base_dir: str) -> dict[str, Any]:
    """A save during which process 1 has no space, one whose positions differ, and a third that is well."""
    me = jax.process_index()

    def before(operation: str, path: pathlib.Path) -> None:
        if operation == "write_file" and is_full and me == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with opened(base_dir, files=Hooked(before)) as checkpointer:
        is_full = True
        checkpointer.save(step=5, state=make_state(5))
        # Nobody is told at a moment that would be another one on another process.
        while checkpointer._save_under_way.is_alive():
            checkpointer._save_under_way.join(0.1)
        checkpointer.is_due(step=5)
        full = outcome(checkpointer.wait_until_finished)
        is_full = False
        after_full = names(base_dir)
        state = make_state(6)
        state["input_iter"] = Position(6 + me)
        checkpointer.save(step=6, state=state)
        differing = outcome(checkpointer.wait_until_finished)
        after_differing = names(base_dir)
        checkpointer.save(step=7, state=make_state(7))
    return {
        "full": full,
        "after_full": after_full,
        "differing": differing,
        "after_differing": after_differing,
        "at_last": names(base_dir),
    }


def flip_bit(base_dir: str, *, step: int, array: str) -> None:
    """Process 0 flips a bit in the last chunk of an array, which another process wrote and reads."""
    if jax.process_index() == 0:
        folder = pathlib.Path(base_dir) / f"step_{step:08d}" / "gda" / array / "c"
        path = all_files(folder)[-1]
        data = bytearray(path.read_bytes())
        data[0] ^= 1
        path.write_bytes(data)
    wait_for_all(f"flipped/{base_dir}/{step}", timeout_seconds=_PEER_TIMEOUT)


def restore_damaged(base_dir: str) -> dict[str, Any]:
    """The newest is damaged, then the one before as well, and all that are left."""
    flip_bit(base_dir, step=3, array="learner/both")
    first = restore(base_dir)
    after_first = names(base_dir)
    flip_bit(base_dir, step=2, array="model/columns")
    second = outcome(lambda: restore(base_dir, step=2))
    flip_bit(base_dir, step=1, array="learner/both")
    third = outcome(lambda: restore(base_dir))
    return {
        "first": first,
        "after_first": after_first,
        "second": second,
        "third": third,
        "at_last": names(base_dir),
    }


def hashed_by_each(base_dir: str) -> list[str]:
    """The files that this process verifies in a restore."""
    verified: list[str] = []
    original = _native.verify_files

    def spy(ckpt_dir: pathlib.Path, manifest: Any, *, names: Any) -> None:
        listed = list(names)
        verified.extend(listed)
        original(ckpt_dir, manifest, names=listed)

    _native.verify_files = spy
    try:
        restore(base_dir)
    finally:
        _native.verify_files = original
    return verified


def refusals(base_dir: str, *, scratch: str) -> dict[str, Any]:
    """What is refused on all processes: a second writer, folders that are not shared, another state."""
    own = f"{scratch}/{jax.process_index()}"
    with opened(base_dir) as checkpointer:
        checkpointer.restore(state=specs())
        second = outcome(lambda: restore(base_dir))
        asked = specs()
        asked["model"].pop("rows")
        mismatch = outcome(lambda: checkpointer.restore(state=asked))
        missing = outcome(lambda: checkpointer.restore(step=99, state=specs()))
    apart = outcome(lambda: save(own, seeds=[1]))
    # A folder of the same name that was copied to each machine.
    if jax.process_index() == 0:
        shutil.copytree(base_dir, f"{scratch}/copy-0")
        pathlib.Path(f"{scratch}/copy-1").mkdir()
        pathlib.Path(f"{scratch}/copy-1/.writer").touch()
    wait_for_all("copied", timeout_seconds=_PEER_TIMEOUT)
    copied = outcome(lambda: restore(f"{scratch}/copy-{jax.process_index()}"))
    return {
        "second": second,
        "mismatch": mismatch,
        "missing": missing,
        "apart": apart,
        "copied": copied,
        "kept": sorted(os.listdir(f"{scratch}/copy-0")),
    }


def run_all(*, base_dir: str, from_one: str, scratch: str) -> dict[str, Any]:
    """Everything that two processes of two devices do, one after the other."""
    return {
        "fresh": restore(base_dir),
        "saved": save(base_dir, seeds=[1, 2]),
        "restored": restore(base_dir),
        "from_one": restore(from_one),
        "hashed": hashed_by_each(base_dir),
        "chunks": chunks_of_each(f"{scratch}/chunks"),
        "refused": refusals(base_dir, scratch=scratch),
        "damaged": restore_damaged(from_one),
        "failed": fail_on_one(base_dir),
    }


def run_steps(*, base_dir: str, restores: Optional[int], saves: Optional[int]) -> list[Any]:
    """Restores the newest step, and saves another one."""
    restored = None if restores is None else restore(base_dir, step=restores)
    return [restored, None if saves is None else save(base_dir, seeds=[saves])]


def die_during_save(*, base_dir: str, victim: int) -> None:
    """One process is killed while it writes its part of step 2; the other says what it is told, and ends."""

    def before(operation: str, path: pathlib.Path) -> None:
        if operation == "write_file" and jax.process_index() == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    save(base_dir, seeds=[1])
    with opened(base_dir, files=Hooked(before), peer_timeout_seconds=2) as checkpointer:
        checkpointer.save(step=2, state=make_state(2))
        told = outcome(checkpointer.wait_until_finished)
    pathlib.Path(os.environ["PROCESSES_RESULT"]).write_text(json.dumps(told), encoding="utf-8")
    # jax would wait for the farewell of the other one.
    os._exit(0)
