"""Checkpoints: saved in the background, committed by one rename, verified before they are believed.

`Checkpointer` is what a trainer uses; `load_checkpoint` reads next to a running one. On disk a checkpoint is
a folder of zarr 3 arrays, JSON, and a manifest with the SHA-256 of every file; AXLearn's are read too
(`docs/checkpoints.md`).
"""

# Saving and restoring.
from axlearn.common.checkpointer._checkpointer import Checkpointer as Checkpointer

# Errors.
from axlearn.common.checkpointer._errors import CheckpointMismatchError as CheckpointMismatchError
from axlearn.common.checkpointer._errors import CheckpointSaveError as CheckpointSaveError
from axlearn.common.checkpointer._errors import CorruptCheckpointError as CorruptCheckpointError
from axlearn.common.checkpointer._errors import DirectoryInUseError as DirectoryInUseError
from axlearn.common.checkpointer._errors import NoUsableCheckpointError as NoUsableCheckpointError

# From one layout to another.
from axlearn.common.checkpointer._export import Exported as Exported
from axlearn.common.checkpointer._export import export_axlearn as export_axlearn
from axlearn.common.checkpointer._export import export_native as export_native

# When to save, and what to restore.
from axlearn.common.checkpointer._filters import drop_learner_optimizer_cfg as drop_learner_optimizer_cfg
from axlearn.common.checkpointer._filters import drop_paths as drop_paths

# What is on disk.
from axlearn.common.checkpointer._garbage import cleanup_checkpoint as cleanup_checkpoint
from axlearn.common.checkpointer._index import CheckpointIndex as CheckpointIndex
from axlearn.common.checkpointer._index import CheckpointValidationType as CheckpointValidationType
from axlearn.common.checkpointer._layout import checkpoint_paths as checkpoint_paths
from axlearn.common.checkpointer._layout import checkpoint_steps as checkpoint_steps
from axlearn.common.checkpointer._layout import latest_checkpoint_path as latest_checkpoint_path
from axlearn.common.checkpointer._layout import latest_checkpoint_step as latest_checkpoint_step
from axlearn.common.checkpointer._layout import parse_step_from_dir as parse_step_from_dir
from axlearn.common.checkpointer._policies import CheckpointPolicy as CheckpointPolicy
from axlearn.common.checkpointer._policies import (
    every_n_steps_and_last_policy as every_n_steps_and_last_policy,
)
from axlearn.common.checkpointer._policies import every_n_steps_policy as every_n_steps_policy

# Reading and writing, in whole and array by array.
from axlearn.common.checkpointer._reader import CheckpointReader as CheckpointReader
from axlearn.common.checkpointer._reader import open_checkpoint as open_checkpoint
from axlearn.common.checkpointer._restore import PathFilter as PathFilter
from axlearn.common.checkpointer._restore import read_state_spec as read_state_spec
from axlearn.common.checkpointer._restore import verify_checkpoint as verify_checkpoint
from axlearn.common.checkpointer._save import IndexWriter as IndexWriter
from axlearn.common.checkpointer._select import Restored as Restored
from axlearn.common.checkpointer._select import load_checkpoint as load_checkpoint
from axlearn.common.checkpointer._snapshot import Stateful as Stateful
from axlearn.common.checkpointer._storage import StateStorage as StateStorage
from axlearn.common.checkpointer._storage import TensorStoreStateStorage as TensorStoreStateStorage
from axlearn.common.checkpointer._writer import CheckpointWriter as CheckpointWriter
