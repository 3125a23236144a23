"""Which kernel computes an attention, and why not another."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple, Optional

import jax

from axlearn.common.attention_kernels import _gpu_cudnn, _gpu_pallas, _ring, _tpu_flash, _tpu_splash
from axlearn.common.attention_kernels._task import AttentionArrays, AttentionTask
from axlearn.common.config import error_message, similar_names

# The layer's own maths, which XLA compiles for any device and which honours everything.
XLA = "xla"


class AttentionKernel(NamedTuple):
    """A row of the table.

    Attributes:
        name: What users call it.
        platform: Where it runs. None: everywhere.
        refusal: Says why it cannot compute an attention; None if it can.
        attend: Computes one that it does not refuse.
        splits_keys: Whether it is for keys that are split over devices, and for nothing else.
    """

    name: str
    platform: Optional[str]
    refusal: Callable[[AttentionTask], Optional[str]]
    attend: Callable[[AttentionTask, AttentionArrays], jax.Array]
    splits_keys: bool = False

    def is_for(self, task: AttentionTask) -> bool:
        """Whether somebody with such a task wants to know why it is not this kernel."""
        is_here = self.platform in (None, task.platform)
        return is_here and (task.num_source_shards > 1 or not self.splits_keys)


# The first one of a platform that does not refuse is taken.
TABLE = (
    AttentionKernel("tpu_splash", "tpu", _tpu_splash.refusal, _tpu_splash.attend),
    AttentionKernel("tpu_flash", "tpu", _tpu_flash.refusal, _tpu_flash.attend),
    AttentionKernel("gpu_cudnn", "gpu", _gpu_cudnn.refusal, _gpu_cudnn.attend),
    AttentionKernel("gpu_pallas", "gpu", _gpu_pallas.refusal, _gpu_pallas.attend),
    AttentionKernel("gpu_cudnn_bias", "gpu", _gpu_cudnn.bias_refusal, _gpu_cudnn.attend_with_bias),
    AttentionKernel("ring", None, _ring.refusal, _ring.attend, splits_keys=True),
)


@dataclasses.dataclass(frozen=True)
class AttentionChoice:
    """How an attention is computed.

    Attributes:
        name: The kernel's name in the table, or `XLA`.
        task: What was asked.
        refused: Why not by those kernels that come before it: their names and reasons.
    """

    name: str
    task: AttentionTask
    refused: tuple[tuple[str, str], ...] = ()

    @property
    def kernel(self) -> Optional[AttentionKernel]:
        """The row of the table; None for `XLA`."""
        return next((kernel for kernel in TABLE if kernel.name == self.name), None)


# Who is told of choices, and of which platform to make them for.
_LISTENER: contextvars.ContextVar[Optional[tuple[list[AttentionChoice], Optional[str]]]] = (
    contextvars.ContextVar("attention_choices", default=None)
)


def choose_kernel(task: AttentionTask, *, name: Optional[str] = None, where: str = "") -> AttentionChoice:
    """Takes the first kernel of the platform that honours everything that a task asks for.

    Args:
        task: The task.
        name: The kernel to take instead, which must honour it too. A Pallas kernel of another platform is
            interpreted on CPU: slow, for tests. None: the table decides.
        where: The dotted path of who asks, for the error.

    Returns:
        The choice.

    Raises:
        ValueError: If there is no kernel `name`, or if it refuses.
    """
    listener = _LISTENER.get()
    if listener is not None and listener[1] is not None:
        task = dataclasses.replace(task, platform=listener[1])
    choice = _choose(task) if name is None else _force(task, name=name, where=where)
    if listener is not None and choice not in listener[0]:
        listener[0].append(choice)
    return choice


def _choose(task: AttentionTask) -> AttentionChoice:
    refused: list[tuple[str, str]] = []
    for kernel in TABLE:
        if not kernel.is_for(task):
            continue
        reason = kernel.refusal(task)
        if reason is None:
            return AttentionChoice(kernel.name, task, tuple(refused))
        refused.append((kernel.name, reason))
    return AttentionChoice(XLA, task, tuple(refused))


def _force(task: AttentionTask, *, name: str, where: str) -> AttentionChoice:
    if name == XLA:
        return AttentionChoice(XLA, task)
    kernel = next((kernel for kernel in TABLE if kernel.name == name), None)
    names = [*(kernel.name for kernel in TABLE), XLA]
    if kernel is None:
        expected = f"one of {', '.join(names)}"
        nearest = next(iter(similar_names(name, names)), None)
        raise ValueError(
            error_message(where=where, what=f"implementation={name!r}", expected=expected, nearest=nearest)
        )
    is_elsewhere = kernel.platform is not None and task.platform not in (kernel.platform, "cpu")
    reason = f"runs on {kernel.platform}" if is_elsewhere else kernel.refusal(task)
    if reason is not None:
        raise ValueError(
            error_message(
                where=where,
                what=f"implementation={name!r}, which {reason}",
                expected="a kernel that can compute this attention",
                advice="Leave the implementation out: then the first that can is taken",
            )
        )
    return AttentionChoice(name, task)


@contextlib.contextmanager
def collect_attention_choices(*, platform: Optional[str] = None) -> Iterator[list[AttentionChoice]]:
    """Collects the choices that are made inside of a `with` block, for instance while a step is traced.

    Args:
        platform: "tpu", "gpu" or "cpu": chooses as on that platform, to be told and not to be run. None: the
            platform that the step is traced for.

    Yields:
        The list that different choices are appended to.
    """
    choices: list[AttentionChoice] = []
    token = _LISTENER.set((choices, platform))
    try:
        yield choices
    finally:
        _LISTENER.reset(token)


def describe_attention_choice(choice: AttentionChoice) -> str:
    """Says which kernel is taken, for what, and why not those before it.

    Args:
        choice: The choice.

    Returns:
        A line, and one more for each kernel that refused.
    """
    task = choice.task
    keys = f"{task.source_len} keys"
    if task.num_source_shards > 1:
        keys = f"{task.source_len} of {task.total_source_len} keys"
    elif task.num_target_shards > 1:
        keys = f"all {keys}"
    heads = f"{task.num_heads} heads of {task.per_head_dim} ({task.num_kv_heads} of keys)"
    first = (
        f"attention by {choice.name} on {task.platform}: {task.target_len} queries, {keys} and {heads} on a device, "
        f"{jax.numpy.dtype(task.dtype).name}"
    )
    return "\n".join([first, *(f"  not by {name}: it {reason}" for name, reason in choice.refused)])
