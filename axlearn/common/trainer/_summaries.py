"""Trees of summaries as flat names and numbers."""

from typing import Any

import jax
import numpy as np

from axlearn.common.summary import is_summary
from axlearn.common.utils import Nested, flatten_items


def scalars(summaries: Nested[Any]) -> dict[str, float]:
    """Returns the numbers in a tree by their path, such as `model/accuracy`; images and texts are left out.

    It waits for the device where the values are arrays on it.

    Args:
        summaries: A tree of Summary, arrays and numbers.
    """
    values = {
        path: leaf.value() if is_summary(leaf) else leaf
        for path, leaf in flatten_items(summaries, is_leaf=is_summary)
    }
    values = {
        path: value for path, value in values.items() if np.ndim(value) == 0 and not isinstance(value, str)
    }
    return {path: float(value) for path, value in jax.device_get(values).items()}
