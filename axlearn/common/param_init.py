"""How parameters start: constants, and random numbers scaled by the fan-in and fan-out of a weight."""

import abc
import dataclasses
import enum
import math
import re
from collections.abc import Sequence
from typing import Any, Optional, Union

import jax
import jax.numpy as jnp
import numpy as np

from axlearn.common.config import REQUIRED, Configurable, Required, config_class
from axlearn.common.utils import Tensor

PARAM_REGEXP_WEIGHT = ".*weight$"
PARAM_REGEXP_BIAS = ".*bias$"
PARAM_REGEXP_SCALE = ".*scale$"

# The standard deviation of a standard normal distribution cut off at -2 and 2.
_TRUNCATED_STD = 0.87962566103423978

_Axes = Union[int, Sequence[int]]


def _normal(prng_key: Tensor, shape: Sequence[int], *, dtype: Any, std: float) -> Tensor:
    """Draws from a normal distribution of mean 0, in float32 with the same bits on every mesh.

    `jax.random.normal` ends in a product with sqrt(2). Whether XLA makes one constant of that and the width depends on
    its version and on how the array is split (seen with jax 0.12.0.1), and so does the last bit. Here they are one
    constant from the start, which is what jax 0.10.2, and the version behind the reference's checkpoints, compute.
    """
    if dtype != jnp.float32:
        return jax.random.normal(prng_key, tuple(shape), dtype=dtype) * std
    # The inverse error function is infinite at -1, which `uniform` includes.
    above_minus_one = np.nextafter(np.float32(-1), np.float32(0))
    uniform = jax.random.uniform(prng_key, tuple(shape), dtype=dtype, minval=above_minus_one, maxval=1)
    return jax.lax.erf_inv(uniform) * (np.float32(math.sqrt(2)) * np.float32(std))


def _as_tuple(axes: _Axes) -> tuple[int, ...]:
    return (axes,) if isinstance(axes, int) else tuple(axes)


@dataclasses.dataclass(frozen=True)
class FanAxes:
    """Which dimensions of a weight are its inputs, and which its outputs.

    Attributes:
        in_axis: Dimensions that are summed over; a number or several.
        out_axis: Dimensions of the result.
        batch_axis: Dimensions along which independent weights are stacked. All other dimensions are the
            receptive field of a convolution and count for both fans.
    """

    class AxisType(enum.Enum):
        """What a dimension is."""

        NONE = 0
        IN = 1
        OUT = 2
        BATCH = 3

    in_axis: _Axes
    out_axis: _Axes
    batch_axis: _Axes = ()

    def _map(self, fn: Any, *, add: int, axis_type: "FanAxes.AxisType") -> "FanAxes":
        fields = {
            FanAxes.AxisType.IN: "in_axis",
            FanAxes.AxisType.OUT: "out_axis",
            FanAxes.AxisType.BATCH: "batch_axis",
        }
        moved = {name: tuple(fn(axis) for axis in _as_tuple(getattr(self, name))) for name in fields.values()}
        if axis_type in fields:
            moved[fields[axis_type]] = (add, *moved[fields[axis_type]])
        return FanAxes(**moved)

    def prepend_axis(self, axis_type: "FanAxes.AxisType") -> "FanAxes":
        """The fans of a weight with a new first dimension of the given type."""
        return self._map(lambda axis: axis + 1 if axis >= 0 else axis, add=0, axis_type=axis_type)

    def append_axis(self, axis_type: "FanAxes.AxisType") -> "FanAxes":
        """The fans of a weight with a new last dimension of the given type."""
        return self._map(lambda axis: axis if axis >= 0 else axis - 1, add=-1, axis_type=axis_type)

    def fans(self, shape: Sequence[int]) -> dict[str, float]:
        """How many inputs each output has, and the reverse.

        Args:
            shape: The shape of the weight.

        Returns:
            "fan_in", "fan_out" and "fan_avg", their mean.

        Reference:
            Glorot and Bengio, Understanding the difficulty of training deep feedforward neural networks
            (2010).
        """
        rank = len(shape)
        sizes = {}
        named: set[int] = set()
        for name in ("in_axis", "out_axis", "batch_axis"):
            dims = [axis % rank for axis in _as_tuple(getattr(self, name))]
            sizes[name] = math.prod(shape[dim] for dim in dims)
            named.update(dims)
        field = math.prod(size for dim, size in enumerate(shape) if dim not in named)
        fan_in, fan_out = sizes["in_axis"] * field, sizes["out_axis"] * field
        return {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}


class Initializer(Configurable):
    """Makes the first value of a parameter."""

    @abc.abstractmethod
    def initialize(
        self,
        name: str,
        *,
        prng_key: Tensor,
        shape: Sequence[int],
        dtype: Any,
        axes: Optional[FanAxes] = None,
    ) -> Tensor:
        """Makes the value.

        Args:
            name: The name of the parameter in its layer.
            prng_key: The PRNG key.
            shape: The shape.
            dtype: The type.
            axes: Which dimensions are inputs and outputs; None where that has no meaning.

        Returns:
            The value.
        """

    @abc.abstractmethod
    def debug_string(
        self,
        name: Optional[str] = None,
        shape: Optional[Sequence[int]] = None,
        axes: Optional[FanAxes] = None,
    ) -> str:
        """Describes the distribution in a line that is compared with the one of earlier versions.

        Args:
            name: The name of the parameter.
            shape: Its shape, printed in the form in which it is given.
            axes: Its fans.

        Returns:
            The line.
        """


class ConstantInitializer(Initializer):
    """All elements are the same."""

    @config_class
    class Config(Initializer.Config):
        """Configures ConstantInitializer."""

        # The value.
        value: Required[Union[int, float, bool]] = REQUIRED

    def initialize(self, name, *, prng_key, shape, dtype, axes=None):
        del name, prng_key, axes
        return jnp.full(tuple(shape), self.config.value, dtype=dtype)

    def debug_string(self, name=None, shape=None, axes=None):
        del name, shape, axes
        return f"constant({self.config.value})"


class GaussianInitializer(Initializer):
    """Elements from a normal distribution of a given width."""

    @config_class
    class Config(Initializer.Config):
        """Configures GaussianInitializer."""

        # Standard deviation, at least 0.
        std: Required[float] = REQUIRED
        # Mean. None: 0.
        mean: Optional[float] = None

    def initialize(self, name, *, prng_key, shape, dtype, axes=None):
        del name, axes
        cfg = self.config
        noise = _normal(prng_key, shape, dtype=dtype, std=cfg.std)
        return noise if cfg.mean is None else noise + cfg.mean

    def debug_string(self, name=None, shape=None, axes=None):
        del name, shape, axes
        cfg = self.config
        return f"normal({0 if cfg.mean is None else cfg.mean}, {cfg.std}^2)"


class WeightInitializer(Initializer):
    """Elements whose variance is `scale / fan`; the defaults are Xavier (Glorot) uniform."""

    @config_class
    class Config(Initializer.Config):
        """Configures WeightInitializer."""

        # With a fan, multiplies the variance. Without, it is the width itself: the limit of a uniform
        # distribution, the standard deviation of a normal one.
        scale: float = 1.0
        # "fan_in", "fan_out" or "fan_avg". None: `scale` alone decides.
        fan: Optional[str] = "fan_avg"
        # "uniform", "normal" or "truncated_normal" (cut off at two standard deviations, variance restored).
        distribution: str = "uniform"

    def __init__(self, cfg: "WeightInitializer.Config"):
        super().__init__(cfg)
        for field, legal in (
            ("fan", (None, "fan_in", "fan_out", "fan_avg")),
            ("distribution", ("uniform", "normal", "truncated_normal")),
        ):
            value = getattr(cfg, field)
            if value not in legal:
                raise ValueError(f"{field}={value!r} is unknown. Expected one of {legal}.")

    def _std(self, shape: Sequence[int], axes: Optional[FanAxes]) -> float:
        cfg = self.config
        if cfg.fan is None:
            return cfg.scale
        if axes is None:
            raise ValueError(
                f"fan={cfg.fan!r} needs the fan axes of the weight of shape {tuple(shape)}, which are not "
                "known. Expected fan_axes in its ParameterSpec (the default covers rank 2 only), or fan=None."
            )
        return math.sqrt(cfg.scale / axes.fans(shape)[cfg.fan])

    def initialize(self, name, *, prng_key, shape, dtype, axes=None):
        del name
        cfg = self.config
        std = self._std(shape, axes)
        shape = tuple(shape)
        if cfg.distribution == "normal":
            return _normal(prng_key, shape, dtype=dtype, std=std)
        if cfg.distribution == "truncated_normal":
            return jax.random.truncated_normal(prng_key, -2, 2, shape, dtype=dtype) * (std / _TRUNCATED_STD)
        # The variance of a uniform distribution over [-limit, limit] is limit^2 / 3.
        limit = std if cfg.fan is None else math.sqrt(3) * std
        return jax.random.uniform(prng_key, shape, dtype=dtype, minval=-limit, maxval=limit)

    def debug_string(self, name=None, shape=None, axes=None):
        del name
        cfg = self.config
        if cfg.fan is None:
            return {
                "uniform": f"uniform(-{cfg.scale}, {cfg.scale})",
                "normal": f"normal(0, {cfg.scale}^2)",
                "truncated_normal": f"truncated_normal(-2, 2) * {cfg.scale} / 0.88",
            }[cfg.distribution]
        limit = f"sqrt({3 * cfg.scale} / {cfg.fan})"
        distribution = {
            "uniform": f"uniform(-{limit}, {limit})",
            "normal": f"normal(0, {cfg.scale} / {cfg.fan})",
            "truncated_normal": f"truncated_normal(-2, 2) * sqrt({cfg.scale} / {cfg.fan}) / 0.88",
        }[cfg.distribution]
        return f"{distribution}, shape={shape}, axes={axes}"


class DefaultInitializer(Initializer):
    """Chooses an initializer by the name of the parameter."""

    @config_class
    class Config(Initializer.Config):
        """Configures DefaultInitializer."""

        # Regular expressions of whole parameter names, the first that matches wins. Behind them stand the
        # defaults: biases 0, scales 1, weights Xavier uniform.
        init_by_param_name: dict[str, Initializer.Config] = {}

    def __init__(self, cfg: "DefaultInitializer.Config"):
        super().__init__(cfg)
        defaults = {
            PARAM_REGEXP_BIAS: ConstantInitializer.default_config().set(value=0.0),
            PARAM_REGEXP_SCALE: ConstantInitializer.default_config().set(value=1.0),
            PARAM_REGEXP_WEIGHT: WeightInitializer.default_config(),
        }
        # A pattern that the config has keeps its place and its value.
        rules = {**cfg.init_by_param_name, **defaults, **cfg.init_by_param_name}
        self._rules = {pattern: initializer_cfg.instantiate() for pattern, initializer_cfg in rules.items()}

    def _initializer_of(self, name: str) -> Initializer:
        for pattern, initializer in self._rules.items():
            if re.fullmatch(pattern, name):
                return initializer
        raise NotImplementedError(
            f"There is no initializer for a parameter called {name!r}. Known patterns: "
            f"{', '.join(self._rules)}. Add one to init_by_param_name, or set the initializer in its "
            "ParameterSpec."
        )

    def initialize(self, name, *, prng_key, shape, dtype, axes=None):
        initializer = self._initializer_of(name)
        return initializer.initialize(name, prng_key=prng_key, shape=shape, dtype=dtype, axes=axes)

    def debug_string(self, name=None, shape=None, axes=None):
        return self._initializer_of(name or "").debug_string(name=name, shape=shape, axes=axes)


class PerGroupInitializer(Initializer):
    """Treats blocks of the last dimension as weights of their own: each has the fans of its block."""

    @config_class
    class Config(Initializer.Config):
        """Configures PerGroupInitializer."""

        # Initializes each block.
        initializer: Required[Initializer.Config] = REQUIRED
        # How many blocks the last dimension consists of.
        num_groups: int = 1

    def __init__(self, cfg: "PerGroupInitializer.Config"):
        super().__init__(cfg)
        self._initializer: Initializer = cfg.initializer.instantiate()

    def initialize(self, name, *, prng_key, shape, dtype, axes=None):
        num_groups = self.config.num_groups
        if shape[-1] % num_groups != 0:
            raise ValueError(
                f"{name}: the last dimension of shape {tuple(shape)} does not divide into "
                f"num_groups={num_groups} blocks."
            )
        block = (*shape[:-1], shape[-1] // num_groups)
        keys = jax.random.split(prng_key, num_groups)
        return jnp.concatenate(
            [
                self._initializer.initialize(name, prng_key=key, shape=block, dtype=dtype, axes=axes)
                for key in keys
            ],
            axis=-1,
        )

    def debug_string(self, name=None, shape=None, axes=None):
        inner = self._initializer.debug_string(name=name, shape=shape, axes=axes)
        return f"PerGroup(num_groups={self.config.num_groups}, {inner})"
