"""How the arrays of a checkpoint become files and come back."""

import abc
import collections
from collections.abc import Mapping
from typing import Any, NamedTuple, Optional

import jax
import numpy as np

from axlearn.common.checkpointer._file_ops import StepFolder
from axlearn.common.checkpointer._layout import ARRAYS_DIR
from axlearn.common.checkpointer._snapshot import ArraySnapshot
from axlearn.common.checkpointer._stored import StoredCheckpoint
from axlearn.common.checkpointer._tensorstore import ArrayReader
from axlearn.common.checkpointer._zarr import encode_array
from axlearn.common.config import Configurable, config_class

# The memory that a restore may hold besides the arrays it has finished, where nothing else is configured.
_DEFAULT_RESTORE_GB = 32


class StateStorage(Configurable):
    """Writes arrays into the folder of a step, and reads them."""

    @config_class
    class Config(Configurable.Config):
        """Configures StateStorage."""

        # How long a save may take before whoever waits for it gives up, in seconds.
        timeout_secs: float = 3600

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        if cfg.timeout_secs <= 0:
            raise ValueError(
                f"checkpointer.storage: timeout_secs={cfg.timeout_secs}. Expected more than 0 seconds."
            )

    @abc.abstractmethod
    def write_arrays(self, arrays: Mapping[str, ArraySnapshot], *, folder: StepFolder) -> None:
        """Writes this process's parts of arrays.

        Args:
            arrays: By path.
            folder: Where to.

        Raises:
            OSError: If it cannot be written.
        """

    @abc.abstractmethod
    def read_arrays(self, specs: Mapping[str, Any], *, stored: StoredCheckpoint) -> dict[str, jax.Array]:
        """Reads arrays into the memory of devices.

        Args:
            specs: What is asked for, by path: shapes that are those of the index, a dtype or None, and a
                sharding.
            stored: The checkpoint, in which these arrays were checked.

        Returns:
            The arrays by path.

        Raises:
            CorruptCheckpointError: If a file is not what was written.
        """


class _PendingArray(NamedTuple):
    spec: Any
    dtype: np.dtype
    num_bytes: int
    reader: ArrayReader
    # By the bounds of the part.
    readings: dict[tuple[tuple[int, int], ...], Any]


class TensorStoreStateStorage(StateStorage):
    """Stores each array as zarr 3 with checksummed chunks, one or more per shard, under `gda/<path>`."""

    @config_class
    class Config(StateStorage.Config):
        """Configures TensorStoreStateStorage."""

        # GB (10^9 bytes) of host memory that arrays on their way to the devices may take; one array at a time
        # may take more. None: 32.
        max_concurrent_restore_gb: Optional[float] = None

    def write_arrays(self, arrays: Mapping[str, ArraySnapshot], *, folder: StepFolder) -> None:
        has_metadata = jax.process_index() == 0
        for path in sorted(arrays):
            for name, data in encode_array(arrays[path], has_metadata=has_metadata):
                folder.write(f"{ARRAYS_DIR}/{path}/{name}", data)

    def read_arrays(self, specs: Mapping[str, Any], *, stored: StoredCheckpoint) -> dict[str, jax.Array]:
        """Reads ahead as far as memory allows, and puts arrays on devices in order."""
        max_gb = self.config.max_concurrent_restore_gb
        max_bytes = (_DEFAULT_RESTORE_GB if max_gb is None else max_gb) * 1e9
        pending: collections.deque[tuple[str, _PendingArray]] = collections.deque()
        arrays: dict[str, jax.Array] = {}
        num_bytes = 0.0
        for path, spec in specs.items():
            array = _start_array(spec, stored=stored, path=path)
            pending.append((path, array))
            num_bytes += array.num_bytes
            while pending and num_bytes > max_bytes:
                done_path, done = pending.popleft()
                arrays[done_path] = _finish_array(done)
                num_bytes -= done.num_bytes
        arrays.update((path, _finish_array(array)) for path, array in pending)
        return arrays


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _start_array(spec: Any, *, stored: StoredCheckpoint, path: str) -> _PendingArray:
    """Begins to read the parts that the devices of this process need, each of them once."""
    shape = tuple(spec.shape)
    stored_dtype = stored.index.arrays[path].dtype
    reader = stored.open_array(path)
    indices = spec.sharding.addressable_devices_indices_map(shape)
    parts = {_bounds(index, shape) for index in indices.values()}
    readings = {part: reader.start_reading(tuple(slice(*bounds) for bounds in part)) for part in parts}
    return _PendingArray(
        spec=spec,
        dtype=stored_dtype if spec.dtype is None else np.dtype(spec.dtype),
        num_bytes=sum(int(np.prod([b - a for a, b in part])) for part in parts) * stored_dtype.itemsize,
        reader=reader,
        readings=readings,
    )


def _finish_array(array: _PendingArray) -> jax.Array:
    shape, sharding = tuple(array.spec.shape), array.spec.sharding
    values = {
        part: array.reader.finish_reading(reading).astype(array.dtype, copy=False)
        for part, reading in array.readings.items()
    }
    shards = [
        jax.device_put(
            values[_bounds(index, shape)],
            jax.sharding.SingleDeviceSharding(device, memory_kind=sharding.memory_kind),
        )
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    ]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)
