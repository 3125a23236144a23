"""The processes that save and restore one run's checkpoints, and how they come to the same end.

Every process goes through the same steps of a `Conversation`. What fails on one of them fails on all, at the end of
the step, and with the same error, so that all of them raise, go back to the checkpoint before, or go on. With one
process there is nobody to talk to, and a step is a call.
"""

import itertools
import json
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Optional, TypeVar

from axlearn.common.checkpointer._errors import (
    CheckpointMismatchError,
    CorruptCheckpointError,
    DirectoryInUseError,
    NoUsableCheckpointError,
)
from axlearn.common.config import error_message
from axlearn.common.jax_compat import coordination
from axlearn.common.processes import PeerTimeoutError, all_gather_text, broadcast_text, gather_text

_T = TypeVar("_T")

# How often processes began to talk about a checkpointer; it advances equally on all of them, because they begin
# with the first save or restore, which all of them call.
_num_groups = itertools.count()

# Errors that are raised elsewhere with the type that they had.
_ERROR_TYPES: Mapping[str, Callable[[str], Exception]] = {
    error_type.__name__: error_type
    for error_type in (
        CheckpointMismatchError,
        DirectoryInUseError,
        FileExistsError,
        FileNotFoundError,
        NoUsableCheckpointError,
        OSError,
        TypeError,
        ValueError,
    )
}


class Conversation:
    """One save or one restore of all processes: a number of steps, in the same order on all of them.

    Attributes:
        index: Which process this is.
        count: How many there are.
    """

    def __init__(self, tag: str, *, index: int, count: int, timeout_seconds: float):
        """Begins; nobody is talked to yet.

        Args:
            tag: What no other conversation is called.
            index: Which process this is.
            count: How many there are.
            timeout_seconds: How long the first process that has finished a step waits for the last one.
        """
        self.index = index
        self.count = count
        self._tag = tag
        self._timeout_seconds = timeout_seconds
        self._num_meetings = 0

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, which alone makes, renames and removes folders of checkpoints."""
        return self.index == 0

    def together(self, fn: Callable[[], _T]) -> _T:
        """A step that every process does.

        Args:
            fn: The step.

        Returns:
            What it returned here, when it has returned on all processes.

        Raises:
            Exception: What it raised: the same everywhere. Of several errors, one that says nothing about the
                checkpoint comes before `CorruptCheckpointError`, and a lower process before a higher one.
            PeerTimeoutError: If a process does not come to the end of the step.
        """
        if self.count == 1:
            return fn()
        result, own = None, None
        try:
            result = fn()
        except Exception as e:
            own = e
        said = all_gather_text(self._next_tag(), _encode_error(own), timeout_seconds=self._timeout_seconds)
        errors = [(index, error) for index, error in enumerate(map(json.loads, said)) if error is not None]
        if not errors:
            return result  # type: ignore[return-value]
        index, error = min(errors, key=lambda item: item[1]["type"] == CorruptCheckpointError.__name__)
        if own is not None and said[self.index] == said[index]:
            raise own
        if own is not None:
            logging.error("Process %d: %s", self.index, own)
        raise _decode_error(error, index=index)

    def first(self, fn: Callable[[], str]) -> str:
        """A step that process 0 does for all.

        Args:
            fn: The step; it is called on process 0 only.

        Returns:
            What it returned, on every process.

        Raises:
            Exception: What it raised, on every process.
            PeerTimeoutError: If a process does not come to hear it.
        """
        if self.count == 1:
            return fn()
        tag = self._next_tag()
        if not self.is_first:
            heard = json.loads(broadcast_text(tag, None, timeout_seconds=self._timeout_seconds))
            if heard["error"] is not None:
                raise _decode_error(heard["error"], index=0)
            return heard["text"]
        try:
            text = fn()
        except Exception as e:
            try:
                said = json.dumps({"error": json.loads(_encode_error(e))})
                broadcast_text(tag, said, timeout_seconds=self._timeout_seconds)
            except PeerTimeoutError as timeout:
                logging.error("%s", timeout)
            raise
        said = json.dumps({"error": None, "text": text})
        broadcast_text(tag, said, timeout_seconds=self._timeout_seconds)
        return text

    def gather(self, text: str) -> Optional[list[str]]:
        """Tells process 0 something.

        Args:
            text: What.

        Returns:
            On process 0 what all processes said, itself included, in their order; elsewhere None.

        Raises:
            PeerTimeoutError: If a process does not come.
        """
        if self.count == 1:
            return [text]
        return gather_text(self._next_tag(), text, timeout_seconds=self._timeout_seconds)

    def check_equal(self, values: Mapping[str, str], *, where: str, advice: str) -> None:
        """Compares what should be the same on all processes.

        Args:
            values: By name, such as hashes of what they stand for.
            where: What it is about, for the message.
            advice: What to do where something differs.

        Raises:
            ValueError: On all processes, if something differs; it names it.
            PeerTimeoutError: If a process does not come.
        """
        if self.count == 1:
            return
        said = all_gather_text(
            self._next_tag(), json.dumps(dict(values)), timeout_seconds=self._timeout_seconds
        )
        expected, *others = (json.loads(text) for text in said)
        for index, held in enumerate(others, start=1):
            differing = sorted(name for name in {*expected, *held} if expected.get(name) != held.get(name))
            if differing:
                raise ValueError(
                    error_message(
                        where=where,
                        what=f"{', '.join(differing[:5])} on process {index} differs from that on process 0",
                        expected="the same on all processes",
                        advice=advice,
                    )
                )

    def check_visible(self, path: pathlib.Path) -> None:
        """Checks that what process 0 has made is seen from here; nobody is talked to.

        Args:
            path: A file or folder that process 0 has made or read.

        Raises:
            FileNotFoundError: If it is not.
        """
        if not self.is_first and not path.exists():
            raise FileNotFoundError(
                error_message(
                    where=str(path),
                    what=f"Process {self.index} does not see what process 0 has here",
                    expected="one folder on a file system that all processes share",
                    advice="Mount the same file system everywhere, and give every process the same path",
                )
            )

    def _next_tag(self) -> str:
        self._num_meetings += 1
        return f"{self._tag}/{self._num_meetings}"


# The conversation of a process that does something without the others.
ALONE = Conversation("", index=0, count=1, timeout_seconds=0)


class Peers:
    """The processes that have a checkpointer in common."""

    def __init__(self, *, timeout_seconds: float):
        """Nobody is talked to before `begin`.

        Args:
            timeout_seconds: How long they wait for each other at the end of a step.
        """
        self._timeout_seconds = timeout_seconds
        self._name: Optional[str] = None
        self._num_begun = 0

    def begin(self, purpose: str) -> Conversation:
        """Begins a conversation; all processes begin the same ones in the same order.

        Args:
            purpose: What it is about, for messages of who waits in vain.

        Returns:
            The conversation.
        """
        peers = coordination()
        if peers is None:
            return ALONE
        if self._name is None:
            self._name = f"checkpoint/{next(_num_groups)}"
        self._num_begun += 1
        return Conversation(
            f"{self._name}/{self._num_begun}/{purpose}",
            index=peers.process_index,
            count=peers.num_processes,
            timeout_seconds=self._timeout_seconds,
        )


def _encode_error(error: Optional[Exception]) -> str:
    """An error as JSON; `null` for None."""
    if error is None:
        return json.dumps(None)
    said: dict[str, Any] = {"type": type(error).__name__, "text": str(error), "errno": None}
    if isinstance(error, CorruptCheckpointError):
        fields = {"file": error.file, "reason": error.reason, "detail": error.detail}
        said.update(ckpt_dir=str(error.ckpt_dir), **fields)
    elif isinstance(error, OSError) and error.errno is not None:
        said["errno"] = error.errno
        said["text"] = f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    return json.dumps(said)


def _decode_error(said: Mapping[str, Any], *, index: int) -> Exception:
    """The error that another process had."""
    if said["type"] == CorruptCheckpointError.__name__:
        return CorruptCheckpointError(
            ckpt_dir=pathlib.Path(said["ckpt_dir"]),
            file=said["file"],
            reason=said["reason"],
            detail=f"{said['detail']} (So process {index} found.)",
        )
    text = f"{said['text']} (on process {index})"
    if said["errno"] is not None:
        return OSError(said["errno"], text)
    make = _ERROR_TYPES.get(said["type"])
    return RuntimeError(f"{said['type']}: {text}") if make is None else make(text)
