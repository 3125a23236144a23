"""What writers share that write every so many steps: which values are due, and what kind each one is."""

import abc
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Optional, Union

import jax
import numpy as np

from axlearn.common.config import config_class
from axlearn.common.module import Module
from axlearn.common.summary import ImageSummary, is_summary
from axlearn.common.summary_writer._base import BaseWriter
from axlearn.common.utils import Nested, flatten_items


class Images(NamedTuple):
    """Images on the host.

    Attributes:
        images: [batch, height, width, channels], float in [0, 1] or uint8.
    """

    images: np.ndarray


# A number, an array of numbers of any rank above 0 (float64), a text or images.
Value = Union[float, np.ndarray, str, Images]


class PeriodicWriter(BaseWriter):
    """Writes values on the first process only, and of those only what is due. Abstract."""

    @config_class
    class Config(BaseWriter.Config):
        """Configures PeriodicWriter."""

        # Steps that are multiples of this number are written.
        write_every_n_steps: int = 1
        # Numbers that replace it for summaries whose whole path matches a regular expression; the first one
        # wins. None: there are no exceptions.
        write_every_n_steps_map: Optional[dict[str, int]] = None

    def __init__(self, cfg: Config, *, parent: Optional[Module]):
        super().__init__(cfg, parent=parent)
        numbers = {"write_every_n_steps": cfg.write_every_n_steps}
        for pattern, number in (cfg.write_every_n_steps_map or {}).items():
            numbers[f"write_every_n_steps_map[{pattern!r}]"] = number
        for field, number in numbers.items():
            if number < 1:
                raise ValueError(
                    f"{self.path()}.{field}={number} is not a number of steps. Expected at least 1."
                )

    @abc.abstractmethod
    def _write(self, step: int, values: Mapping[str, Value]) -> None:
        """Writes values, of which there is at least one, by their paths such as `model/accuracy`."""

    def __call__(self, step: int, values: Nested[Any]) -> None:
        if jax.process_index() != 0:
            return
        items = flatten_items(values, is_leaf=is_summary)
        due = {path: value for path, value in items if self._is_due(path, step)}
        if due:
            # One fetch for all arrays: the copies from the device overlap.
            fetched = jax.device_get(due)
            self._write(
                step, dict(item for path, value in fetched.items() for item in self._classify(path, value))
            )

    def _is_due(self, path: str, step: int) -> bool:
        cfg = self.config
        for pattern, number in (cfg.write_every_n_steps_map or {}).items():
            if re.fullmatch(pattern, path):
                return step % number == 0
        return step % cfg.write_every_n_steps == 0

    def _classify(self, path: str, value: Any) -> Iterator[tuple[str, Value]]:
        """Makes of a fetched value what can be written; of a summary of several values, one for each."""
        if is_summary(value):
            value.validate()
        if isinstance(value, ImageSummary):
            yield path, Images(np.asarray(value.value()))
            return
        if is_summary(value):
            # A summary may compute its value from fetched arrays with jax.
            value = jax.device_get(value.value())
        if isinstance(value, Mapping):
            for name, nested in flatten_items(value):
                yield from self._classify(f"{path}/{name}", nested)
        elif isinstance(value, str):
            yield path, value
        elif isinstance(value, bool | int | float | np.ndarray | np.generic):
            # The libraries know no bfloat16.
            array = np.asarray(value, dtype=np.float64)
            yield path, float(array) if array.ndim == 0 else array
        else:
            raise TypeError(
                f"{self.path()}: the summary {path!r} is of type {type(value).__name__}. Expected a "
                "Summary, an array, a number or a string."
            )
