"""How transformations, which are no modules, log what they do."""

from axlearn.common.module import current_context
from axlearn.common.utils import Tensor


def add_summary(name: str, value: Tensor) -> None:
    """Logs a value in the context of the learner; does nothing outside of any context.

    Two transformations of the same kind in one chain would log under the same name: the second gets `name_2`.

    Args:
        name: The name.
        value: A scalar.
    """
    context = current_context()
    if context is None:
        return
    taken = context.output_collection.summaries
    unique, number = name, 1
    while unique in taken:
        number += 1
        unique = f"{name}_{number}"
    context.add_summary(unique, value)
