"""A small state, a position in some data, and file operations that can be held up and made to fail."""

import contextlib
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Optional

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.checkpointer import Checkpointer, _peers
from axlearn.common.checkpointer._file_ops import FileOps
from axlearn.common.utils import TensorSpec, build_mesh, flatten_items, use_mesh


class Position:
    """A stateful leaf, as the iterator of the training data is one."""

    def __init__(self, record: int = 0):
        self.record = record

    def get_state(self) -> dict[str, Any]:
        return {"record": self.record, "epochs": [0, self.record // 10]}

    def set_state(self, state: dict[str, Any]) -> None:
        self.record = state["record"]


def make_state(seed: int) -> dict[str, Any]:
    """A state with the paths and the types of a trainer's."""
    rng = np.random.default_rng(seed)
    return {
        "prng_key": jax.random.PRNGKey(seed),
        "model": {"w": jnp.asarray(rng.standard_normal((4, 6), dtype=np.float32))},
        "learner": {"count": jnp.int32(seed), "mu": jnp.asarray(rng.standard_normal(6), dtype=jnp.bfloat16)},
        "input_iter": Position(seed),
    }


def specs_of(state: Any) -> Any:
    """Replicated specs of the arrays of a state; a new position."""
    return jax.tree.map(
        lambda x: Position() if isinstance(x, Position) else TensorSpec(x.shape, x.dtype), state
    )


def assert_same(actual: Any, expected: Any) -> None:
    """Compares two states, bit for bit."""
    actual_items, expected_items = flatten_items(actual), flatten_items(expected)
    assert [path for path, _ in actual_items] == [path for path, _ in expected_items]
    for (path, x), (_, y) in zip(actual_items, expected_items, strict=True):
        if isinstance(y, Position):
            assert x.get_state() == y.get_state(), path
        else:
            assert (x.dtype, x.shape) == (y.dtype, y.shape), path
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


@contextlib.contextmanager
def one_device() -> Iterator[None]:
    """A mesh of one device."""
    mesh = build_mesh(mesh_shape=(1,), mesh_axis_names=("data",), devices=jax.devices()[:1])
    with use_mesh(mesh):
        yield


@contextlib.contextmanager
def opened(
    base_dir: pathlib.Path, *, files: Optional[FileOps] = None, **fields: Any
) -> Iterator[Checkpointer]:
    """A checkpointer in `base_dir`, stopped at the end."""
    cfg = Checkpointer.default_config().set(name="checkpointer", dir=str(base_dir), **fields)
    checkpointer = cfg.instantiate(parent=None)
    if files is not None:
        checkpointer._files = checkpointer._garbage._files = files
    with one_device():
        try:
            yield checkpointer
        finally:
            checkpointer.stop()


def save_steps(base_dir: pathlib.Path, *steps: int, **fields: Any) -> dict[int, Any]:
    """Saves states of several steps, and returns them."""
    states = {step: make_state(step) for step in steps}
    with opened(base_dir, **{"keep_last_n": 99, **fields}) as checkpointer:
        for step, state in states.items():
            checkpointer.save(step=step, state=state)
    return states


def all_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


class Gate(FileOps):
    """Holds up every save until `open`."""

    def __init__(self):
        self._is_open = threading.Event()

    def open(self) -> None:
        self._is_open.set()

    def make_dir(self, path: pathlib.Path) -> None:
        assert self._is_open.wait(timeout=30)
        super().make_dir(path)


class Hooked(FileOps):
    """Calls a function before every operation."""

    def __init__(self, before: Callable[[str, pathlib.Path], None]):
        self._before = before

    def make_dir(self, path: pathlib.Path) -> None:
        self._before("make_dir", path)
        super().make_dir(path)

    def write_file(self, path: pathlib.Path, data: bytes) -> None:
        self._before("write_file", path)
        super().write_file(path, data)

    def sync_dir(self, path: pathlib.Path) -> None:
        self._before("sync_dir", path)
        super().sync_dir(path)

    def rename(self, source: pathlib.Path, target: pathlib.Path) -> None:
        self._before("rename", source)
        super().rename(source, target)

    def remove_tree(self, path: pathlib.Path) -> None:
        self._before("remove_tree", path)
        super().remove_tree(path)


def in_two_threads(fn: Callable[[_peers.Conversation], Any]) -> list[Any]:
    """Calls a function in two threads that stand for the processes of a run.

    Args:
        fn: What each of them does; it is given its side of one conversation.

    Returns:
        What it returned in each of them, or the error that it raised.
    """
    said: dict[tuple[str, int], str] = {}
    have_all_said = threading.Barrier(2)
    thread = threading.local()
    outcomes: list[Any] = [None, None]

    def all_gather(tag: str, text: Optional[str], *, timeout_seconds: float) -> list[str]:
        said[tag, thread.index] = text or ""
        have_all_said.wait(timeout=timeout_seconds)
        return [said[tag, 0], said[tag, 1]]

    def process(index: int) -> None:
        thread.index = index
        try:
            outcomes[index] = fn(_peers.Conversation("test", index=index, count=2, timeout_seconds=30))
        except Exception as e:
            outcomes[index] = e

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_peers, "all_gather_text", all_gather)
        patch.setattr(_peers, "gather_text", all_gather)
        patch.setattr(_peers, "broadcast_text", lambda *args, **kwargs: all_gather(*args, **kwargs)[0])
        patch.setattr(jax, "process_index", lambda: getattr(thread, "index", 0))
        threads = [threading.Thread(target=process, args=(index,)) for index in range(2)]
        for x in threads:
            x.start()
        for x in threads:
            x.join()
    return outcomes
