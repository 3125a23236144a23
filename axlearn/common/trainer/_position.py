"""Where in its data a run is: the state of the input behind the last batch that was trained on."""

from typing import Any, Optional, Protocol, runtime_checkable


@runtime_checkable
class PositionedIterator(Protocol):
    """An iterator over batches that can tell where it is and go there.

    Its state is JSON, small, and global: the same on every process, whatever their number.
    """

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class DataPosition:
    """The leaf of a checkpoint that stands for the data.

    Batches are prepared ahead of their use, so the iterator itself is always further on than the run; what is
    saved is what `advance` was last told.

    Args:
        iterator: The input's iterator, before its first batch.
    """

    def __init__(self, iterator: PositionedIterator):
        self._iterator = iterator
        self._state: Optional[dict[str, Any]] = iterator.get_state()

    def advance(self, state: Optional[dict[str, Any]]) -> None:
        """Says that the run has used the batch behind which the iterator's state was `state`."""
        self._state = state

    def get_state(self) -> dict[str, Any]:
        """Returns the position of the run."""
        assert self._state is not None
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves the iterator, and with it the run, to a position that was saved."""
        self._iterator.set_state(state)
        self._state = state
