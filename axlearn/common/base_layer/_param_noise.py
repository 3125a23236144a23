"""Noise on parameters during training."""

import abc
from typing import Any

from axlearn.common.config import Configurable
from axlearn.common.utils import Tensor


class ParameterNoise(Configurable):
    """Adds noise to the parameters of a layer before each training step."""

    @abc.abstractmethod
    def apply(self, prng_key: Tensor, params: dict[str, Any]) -> dict[str, Any]:
        """Makes noisy parameters.

        Args:
            prng_key: The PRNG key.
            params: The parameters of a layer and of its children, whose own noise they already carry.

        Returns:
            Parameters of the same structure.
        """
