"""Where data sets and tokenizers lie: `--data_dir`, as the code that needs it sees it."""

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Optional

# As a data directory, this stands for made-up data instead of any that is read.
FAKE = "FAKE"

# The data directory where none is set, as in TensorFlow Datasets.
_DEFAULT_DATA_DIR = "~/tensorflow_datasets"

_local = threading.local()


def get_data_dir() -> Optional[str]:
    """Returns the data directory: that of the innermost `set_data_dir`, else `$DATA_DIR`, else None.

    None stands for the default place of whatever is looked for; `FAKE` for made-up data.
    """
    stack = getattr(_local, "stack", None)
    return stack[-1] if stack else os.environ.get("DATA_DIR")


def default_data_dir() -> str:
    """Returns where data sets and tokenizers are looked for where no data directory is set."""
    return os.path.expanduser(_DEFAULT_DATA_DIR)


@contextlib.contextmanager
def set_data_dir(data_dir: Optional[str]) -> Iterator[None]:
    """Makes `get_data_dir` return `data_dir` in this thread, inside of the `with` block.

    Args:
        data_dir: A directory, `FAKE`, or None for the default places.
    """
    if not hasattr(_local, "stack"):
        _local.stack = []
    _local.stack.append(data_dir)
    try:
        yield
    finally:
        _local.stack.pop()
