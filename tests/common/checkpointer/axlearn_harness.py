"""Checkpoints in AXLearn's layout, written by TensorStore and `json` alone."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, Optional

import numpy as np
import tensorstore as ts

from tests.common.checkpointer.harness import Position, make_state

ZSTD = {"id": "zstd", "level": 1}


def write_array(
    folder: pathlib.Path,
    value: np.ndarray,
    *,
    chunks: Optional[tuple[int, ...]] = None,
    compressor: Optional[Mapping[str, Any]] = ZSTD,
    **metadata: Any,
) -> None:
    """Writes a zarr 2 array; `metadata` goes to `.zarray` as it is."""
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "dtype": value.dtype.name,
        "metadata": {
            "shape": list(value.shape),
            "chunks": list(value.shape if chunks is None else chunks),
            "compressor": compressor,
            **metadata,
        },
        "store_data_equal_to_fill_value": True,
    }
    ts.open(spec, create=True).result().write(value).result()


def write_index(
    ckpt_dir: pathlib.Path, *, step: int, arrays: Mapping[str, np.ndarray], documents: Mapping[str, str]
) -> None:
    """Writes `index`."""
    leaves: dict[str, Any] = {
        path: {"dtype": value.dtype.name, "shape": str(value.shape)} for path, value in arrays.items()
    }
    leaves.update(documents)
    index = [["step", step], *([path, leaves[path]] for path in sorted(leaves))]
    (ckpt_dir / "index").write_text(json.dumps(index))


def write_checkpoint(
    base_dir: pathlib.Path,
    *,
    step: int,
    arrays: Mapping[str, np.ndarray],
    documents: Optional[Mapping[str, str]] = None,
    **fields: Any,
) -> pathlib.Path:
    """Writes a checkpoint; `fields` are those of `write_array`."""
    ckpt_dir = base_dir / f"step_{step:08d}"
    for path, value in arrays.items():
        write_array(ckpt_dir / "gda" / path, value, **fields)
    for path in documents or {}:
        (ckpt_dir / "python_0").mkdir(parents=True, exist_ok=True)
        (ckpt_dir / "python_0" / path).write_bytes(b"\x81\xa1x\x01")
    write_index(ckpt_dir, step=step, arrays=arrays, documents=documents or {})
    return ckpt_dir


def arrays_of(step: int) -> dict[str, np.ndarray]:
    """The arrays of `harness.make_state(step)`, by path."""
    state = make_state(step)
    return {
        "prng_key": np.asarray(state["prng_key"]),
        "model/w": np.asarray(state["model"]["w"]),
        "learner/count": np.asarray(state["learner"]["count"]),
        "learner/mu": np.asarray(state["learner"]["mu"]),
    }


def save_axlearn_steps(base_dir: pathlib.Path, *steps: int, **fields: Any) -> None:
    """Writes the states of `harness.make_state` as AXLearn would."""
    for step in steps:
        write_checkpoint(base_dir, step=step, arrays=arrays_of(step), **fields)


class SteppedPosition(Position):
    """A position that follows from the step."""

    def set_step(self, step: int) -> None:
        self.record = step


def stepped_specs(specs: Any) -> Any:
    """The same with a position that follows from the step."""
    return {**specs, "input_iter": SteppedPosition()}
