"""What both layouts need of TensorStore: loading it late, reading parts of checked arrays, encoding into memory."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from axlearn.common.checkpointer._errors import CorruptCheckpointError


def tensorstore() -> Any:
    """TensorStore, which is loaded when the first array is written or read."""
    import tensorstore

    return tensorstore


class ArrayReader:
    """Reads parts of an array whose files were checked."""

    def __init__(self, ckpt_dir: pathlib.Path, array_dir: str, *, driver: str, metadata_name: str):
        """Opens the array.

        Args:
            ckpt_dir: The folder of the checkpoint.
            array_dir: The folder of the array in it.
            driver: TensorStore's name of the format: "zarr3", or "zarr" for its version 2.
            metadata_name: The file that describes the array, which errors name.
        """
        self._ckpt_dir = ckpt_dir
        self._metadata_file = f"{array_dir}/{metadata_name}"
        kvstore = {"driver": "file", "path": f"{(ckpt_dir / array_dir).absolute()}/"}
        # A chunk that is missing is damage, not an abbreviation for zeros.
        spec = {"driver": driver, "kvstore": kvstore, "fill_missing_data_reads": False}
        self._opened = tensorstore().open(spec, open=True, read=True)

    def start_reading(self, index: tuple[slice, ...]) -> Any:
        """Begins to read a part.

        Args:
            index: One slice per dimension.

        Returns:
            What `finish_reading` takes.
        """
        try:
            return self._opened.result()[index].read()
        except ValueError as e:
            raise self._corrupt(e) from e

    def finish_reading(self, reading: Any) -> np.ndarray:
        """Waits for the part.

        Raises:
            CorruptCheckpointError: If a chunk does not decode.
        """
        try:
            return np.asarray(reading.result())
        except ValueError as e:
            raise self._corrupt(e) from e

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a part; `start_reading` and `finish_reading` in one."""
        return self.finish_reading(self.start_reading(index))

    def _corrupt(self, error: ValueError) -> CorruptCheckpointError:
        # The message repeats the whole request after the file that it is about.
        detail = str(error).split(" [", 1)[0]
        return CorruptCheckpointError(
            ckpt_dir=self._ckpt_dir,
            file=self._metadata_file,
            reason="bad-array",
            detail=f"the array cannot be read: {detail}.",
        )


def memory_store(driver: str, *, metadata: Mapping[str, Any]) -> Any:
    """An array in memory that encodes what is written to it: its files are in its `kvstore`.

    Args:
        driver: TensorStore's name of the layout.
        metadata: The contents of the array's metadata file.
    """
    ts = tensorstore()
    spec = {
        "driver": driver,
        "kvstore": {"driver": "memory"},
        "metadata": metadata,
        # A chunk that is missing is damage, not an abbreviation for zeros.
        "store_data_equal_to_fill_value": True,
    }
    return ts.open(spec, context=ts.Context(), create=True).result()
