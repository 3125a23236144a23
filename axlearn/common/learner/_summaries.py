"""What learners log about single parameters."""

from collections.abc import Sequence
from typing import Union

from axlearn.common.module import current_context
from axlearn.common.optimizers import global_norm, root_mean_square
from axlearn.common.update_transformation import Updates
from axlearn.common.utils import flatten_items


def _is_below(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(prefix.rstrip("/") + "/")


def add_per_variable_summaries(updates: Updates, *, prefixes: Union[bool, Sequence[str]]) -> None:
    """Logs sizes of parameters and gradients in the current context.

    Args:
        updates: The gradients and their parameters; those that are masked are not logged.
        prefixes: True: `param_rms/<path>` and `grad_rms/<path>` of every parameter. A list of prefixes of
            paths: of those below any of them, and `grad_norm/<prefix>` for each prefix. False: nothing.
    """
    context = current_context()
    if context is None or prefixes is False:
        return
    groups = ["*"] if prefixes is True else list(prefixes)
    grads = dict(flatten_items(updates.delta_updates))

    def in_group(path: str, group: str) -> bool:
        return prefixes is True or _is_below(path, group)

    for path, value in flatten_items(updates.param_values()):
        if any(in_group(path, group) for group in groups):
            context.add_summary(f"param_rms/{path}", root_mean_square(value))
            context.add_summary(f"grad_rms/{path}", root_mean_square(grads[path]))
    if prefixes is True:
        return
    for group in groups:
        members = [grad for path, grad in grads.items() if in_group(path, group)]
        context.add_summary(f"grad_norm/{group}", global_norm(members))
