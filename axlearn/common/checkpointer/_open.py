"""Which layout a checkpoint has, and opening it."""

import pathlib

from axlearn.common.checkpointer._axlearn import AXLearnCheckpoint
from axlearn.common.checkpointer._layout import is_ours
from axlearn.common.checkpointer._native import NativeCheckpoint
from axlearn.common.checkpointer._stored import StoredCheckpoint


def open_stored(ckpt_dir: pathlib.Path) -> StoredCheckpoint:
    """Opens a checkpoint in either layout, and reads its index.

    Args:
        ckpt_dir: Its folder.

    Raises:
        CorruptCheckpointError: If the index, or our manifest, is not what was written.
        ValueError: If it is not the folder of a checkpoint.
    """
    return NativeCheckpoint(ckpt_dir) if is_ours(ckpt_dir) else AXLearnCheckpoint(ckpt_dir)
