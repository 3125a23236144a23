"""Where in a dataset of batches a run is."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Optional, Union

from absl import logging

from axlearn.common.config import error_message
from axlearn.common.input_base import Batch, DataIterator
from axlearn.common.input_tf_data._dataset import Dataset, load_grain

# Batches between two lines of the log while a place is looked for.
_LOG_EVERY_N_BATCHES = 100


class DatasetIterator(DataIterator):
    """The batches of a dataset of grain's, with the dataset's own position beside their index.

    Where the batches can be addressed by number, the index is all there is to the position. Those of a stream
    cannot: there the position is where the stream stood, which the dataset says in its own words.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        finish: Callable[[Batch], Batch],
        fingerprint: Mapping[str, Union[str, int, float, None]],
    ):
        """Starts at the first batch.

        Args:
            dataset: The batches of this process, as a stream.
            finish: Makes of each what this process hands in.
            fingerprint: What the batches are a function of, beside their index, as JSON values by name.
        """
        super().__init__(batches_from=self._read_from, fingerprint=fingerprint)
        self._dataset = dataset
        self._finish = finish
        self._iterator = iter(dataset)
        # Where the stream is to be, if that is not where it is.
        self._dataset_state: Optional[dict[str, Any]] = None
        # A stream that only goes through a dataset by number, from which the place follows.
        parents = dataset.parents
        self._is_addressable = len(parents) == 1 and isinstance(parents[0], load_grain().MapDataset)

    def _read_from(self, step: int) -> Iterator[Batch]:
        if self._is_addressable:
            self._iterator.set_state({"next_index": step})
        elif self._dataset_state is not None:
            self._iterator.set_state(self._dataset_state)
            self._dataset_state = None
        for batch in self._iterator:
            yield self._finish(batch)

    def get_state(self) -> dict[str, Any]:
        """Returns the position as JSON: index of the next batch, fingerprint, and where a stream stands."""
        state = super().get_state()
        if not self._is_addressable:
            place = self._dataset_state
            state["dataset"] = self._iterator.get_state() if place is None else place
        return state

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a position that `get_state` returned, in this process or another one.

        Raises:
            ValueError: If the position is of other data than these, naming what differs, or is no position.
        """
        super().set_state(state)
        place = state.get("dataset")
        if isinstance(place, Mapping) is self._is_addressable:
            raise ValueError(
                error_message(
                    where="input_iter",
                    what=f"the saved position {'lacks' if place is None else 'holds'} a place in a stream",
                    expected=f"a position of data that are {'no' if self._is_addressable else 'a'} stream",
                    advice="Set back what has changed, or start a new run in another directory.",
                )
            )
        self._dataset_state = None if place is None else dict(place)

    def set_step(self, step: int) -> None:
        """Goes behind the batches of the first `step` steps; of a stream, by reading them."""
        if self._is_addressable:
            super().set_step(step)
            return
        self._iterator = iter(self._dataset)
        self._dataset_state = None
        super().set_step(0)
        if step:
            logging.warning(
                "The place of step %d in a stream is found by reading what stands before it.", step
            )
        for i in range(step):
            if i and i % _LOG_EVERY_N_BATCHES == 0:
                logging.info("Behind batch %d of %d.", i, step)
            next(self)
