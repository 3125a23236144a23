"""Where in its data a run is: the state of the input behind the last batch that was trained on."""

from typing import Any, Optional, Protocol, runtime_checkable

from axlearn.common.config import error_message


@runtime_checkable
class PositionedIterator(Protocol):
    """An iterator over batches that can tell where it is and go there.

    Its state is JSON, small, and global: the same on every process, whatever their number.
    """

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class SteppedIterator(Protocol):
    """An iterator whose batch is a function of the step, so that it can go behind any number of steps."""

    def set_step(self, step: int) -> None: ...


class DataPosition:
    """The leaf of a checkpoint that stands for the data.

    Batches are prepared ahead of their use, so the iterator itself is always further on than the run; what is
    saved is what `advance` was last told.

    Args:
        iterator: The input's iterator, before its first batch.

    Attributes:
        follows_step: Whether the position was concluded from the step, because the checkpoint held none.
    """

    def __init__(self, iterator: PositionedIterator):
        self.follows_step = False
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
        self.follows_step = False

    def set_step(self, step: int) -> None:
        """Moves the iterator, and with it the run, behind the batch of a step.

        Raises:
            ValueError: If the iterator cannot do that.
        """
        if isinstance(self._iterator, SteppedIterator):
            self._iterator.set_step(step)
        elif step != 0:
            raise ValueError(
                error_message(
                    where="input_iter",
                    what=f"The checkpoint of step {step} holds no position in the data that can be read here, and the "
                    f"batches of {type(self._iterator).__name__} are no function of the step",
                    expected="an iterator with set_step(step)",
                    advice="Use such an input, or begin a new run from the checkpoint's parameters",
                )
            )
        self.follows_step = True
        self._state = self._iterator.get_state()
