"""The base class of layers."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Optional

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from axlearn.common.base_layer._param_noise import ParameterNoise
from axlearn.common.base_layer._remat import RematSpec, call_with_remat, needs_remat
from axlearn.common.base_layer._specs import NestedParameterSpec, ParameterSpec
from axlearn.common.base_layer._tensor_stats import TensorStats
from axlearn.common.config import config_class, maybe_instantiate
from axlearn.common.metrics import WeightedSummary
from axlearn.common.module import Module, nowrap
from axlearn.common.param_init import DefaultInitializer, FanAxes, Initializer
from axlearn.common.utils import Tensor, cast_floats


class BaseLayer(Module):
    """A module with parameters.

    A subclass says in `_create_layer_parameter_specs` which parameters it has, and reads them from
    `self.parameters` while it runs.
    """

    @config_class
    class Config(Module.Config):
        """Configures BaseLayer."""

        # The type of parameters, such as jnp.float32. None: that of the parent; at the root, float32.
        dtype: Optional[Any] = None
        # Initializes parameters. None: as the parent does; at the root, `DefaultInitializer` with its
        # defaults.
        param_init: Optional[DefaultInitializer.Config] = None
        # How the dimensions of the weight lie on the mesh: for each a mesh axis, several, or None: not split.
        # None: replicated. What it applies to is up to the layer.
        param_partition_spec: Optional[Any] = None
        # How to rematerialize this layer in training. None: not.
        remat_spec: Optional[RematSpec] = None
        # Adds noise to the parameters in training. None: no noise.
        param_noise: Optional[ParameterNoise.Config] = None
        # What to log of the intermediate values that the layer names. None: nothing.
        tensor_stats: Optional[TensorStats.Config] = None

    def __init__(self, cfg: "BaseLayer.Config", *, parent: Optional[Module]):
        super().__init__(cfg, parent=parent)
        self._param_init: Optional[DefaultInitializer] = maybe_instantiate(cfg.param_init)
        self._param_noise: Optional[ParameterNoise] = maybe_instantiate(cfg.param_noise)
        self._tensor_stats: Optional[TensorStats] = maybe_instantiate(cfg.tensor_stats)
        self._remat_kwargs: Optional[dict[str, Any]] = None
        if cfg.remat_spec is not None:
            self._remat_kwargs = {
                "prevent_cse": cfg.remat_spec.prevent_cse,
                "policy": maybe_instantiate(cfg.remat_spec.policy),
            }

    # Inherited settings.

    @nowrap
    def dtype(self) -> Any:
        """The type of the parameters of this layer."""
        if self.config.dtype is not None:
            return self.config.dtype
        return self.parent.dtype() if isinstance(self.parent, BaseLayer) else jnp.float32

    @nowrap
    def param_init(self) -> Initializer:
        """What initializes the parameters of this layer."""
        if self._param_init is None:
            if isinstance(self.parent, BaseLayer):
                return self.parent.param_init()
            self._param_init = DefaultInitializer.default_config().instantiate()
        return self._param_init

    # Parameters.

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of this layer and, as nested dicts, of its children, by name; only in a context."""
        return self.state

    def _create_layer_parameter_specs(self) -> dict[str, ParameterSpec]:
        """The parameters of this layer, for subclasses to say.

        Returns:
            Specs by name, without those of children. Types, mesh axes and fan axes may be missing: they are
            filled in.
        """
        return {}

    def _complete_layer_parameter_specs(self) -> dict[str, ParameterSpec]:
        """What `_create_layer_parameter_specs` says, with what is missing filled in."""
        specs = {}
        for name, spec in self._create_layer_parameter_specs().items():
            specs[name] = dataclasses.replace(
                spec,
                dtype=self.dtype() if spec.dtype is None else spec.dtype,
                mesh_axes=self._partition_spec(name, spec),
                fan_axes=self._compute_fan_axes(name, spec) if spec.fan_axes is None else spec.fan_axes,
            )
        return specs

    def _partition_spec(self, name: str, spec: ParameterSpec) -> PartitionSpec:
        """The mesh axes of a parameter, one entry per dimension; raises ValueError where they are not."""
        rank = len(spec.shape)
        if spec.mesh_axes is None:
            return PartitionSpec(*(None,) * rank)
        if len(spec.mesh_axes) != rank:
            raise ValueError(
                f"{self.path()}.{name}: the partition spec {tuple(spec.mesh_axes)} has "
                f"{len(spec.mesh_axes)} entries, but the parameter has shape {tuple(spec.shape)}, of rank "
                f"{rank}. Expected one entry per dimension, such as {(None,) * rank}; see "
                "param_partition_spec."
            )
        # A list is what a config may hold; jax wants several axes of a dimension as a tuple.
        return PartitionSpec(*(tuple(axes) if isinstance(axes, list) else axes for axes in spec.mesh_axes))

    def _compute_fan_axes(self, name: str, parameter_spec: ParameterSpec) -> Optional[FanAxes]:
        """The fans of a parameter whose spec has none: [in, out] for weights of rank 2, else unknown (None)."""
        if name.endswith("weight") and len(parameter_spec.shape) == 2:
            return FanAxes(in_axis=-2, out_axis=-1)
        return None

    def _child_layers(self) -> dict[str, "BaseLayer"]:
        return {name: child for name, child in self.children.items() if isinstance(child, BaseLayer)}

    @nowrap
    def create_parameter_specs_recursively(self) -> NestedParameterSpec:
        """The parameters of this layer and of all below it.

        Returns:
            Nested dicts: the layer's own parameters by name, then one dict per child layer.

        Raises:
            ValueError: If a partition spec does not have one entry per dimension.
        """
        specs: dict[str, Any] = dict(self._complete_layer_parameter_specs())
        for name, child in self._child_layers().items():
            assert name not in specs, f"{self.path()}: a parameter and a child are both called {name}."
            specs[name] = child.create_parameter_specs_recursively()
        return specs

    @nowrap
    def initialize_parameters_recursively(
        self, prng_key: Tensor, *, prebuilt: Optional[Mapping[str, Any]] = None
    ) -> dict[str, Any]:
        """Makes the first values of the parameters of this layer and of all below it.

        The key is split once for each parameter and once for each child, in order, with parameters or not: so
        the value of a parameter does not depend on what else is prebuilt.

        Args:
            prng_key: The PRNG key.
            prebuilt: Values that exist already, nested in the same way. None: there are none.

        Returns:
            Nested dicts like `create_parameter_specs_recursively`, with None where there is a prebuilt value.
        """
        prebuilt = {} if prebuilt is None else prebuilt
        params: dict[str, Any] = {}
        for name, spec in self._complete_layer_parameter_specs().items():
            prng_key, param_key = jax.random.split(prng_key)
            if prebuilt.get(name) is None:
                params[name] = self._initialize_parameter(name, prng_key=param_key, parameter_spec=spec)
            else:
                params[name] = None
        for name, child in self._child_layers().items():
            prng_key, child_key = jax.random.split(prng_key)
            params[name] = child.initialize_parameters_recursively(child_key, prebuilt=prebuilt.get(name))
        return params

    def _initialize_parameter(self, name: str, *, prng_key: Tensor, parameter_spec: ParameterSpec) -> Tensor:
        """Makes the first value of one parameter."""
        initializer = parameter_spec.initializer or self.param_init()
        return initializer.initialize(
            name,
            prng_key=prng_key,
            shape=parameter_spec.shape,
            dtype=parameter_spec.dtype,
            axes=parameter_spec.fan_axes,
        )

    @nowrap
    def apply_parameter_noise_recursively(
        self, prng_key: Tensor, params: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Adds the noise of this layer and of all below it, children first.

        Args:
            prng_key: The PRNG key.
            params: The parameters of this layer.

        Returns:
            Parameters of the same structure.
        """
        noisy = dict(params)
        for name, child in self._child_layers().items():
            prng_key, child_key = jax.random.split(prng_key)
            noisy[name] = child.apply_parameter_noise_recursively(child_key, params[name])
        if self._param_noise is None:
            return noisy
        return self._param_noise.apply(prng_key, noisy)

    # Running.

    def _invoke(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._remat_kwargs is None or not needs_remat(fn, self.get_invocation_context()):
            return super()._invoke(fn, args, kwargs)
        return call_with_remat(fn, self.get_invocation_context(), args, kwargs, **self._remat_kwargs)

    def _remat_name(self, x: Tensor, name: str) -> Tensor:
        """Names an intermediate value `ClassName.name`, for the policies of rematerialization."""
        return checkpoint_name(x, f"{type(self).__name__}.{name}")

    def _add_tensor_stats(self, name: str, value: Tensor) -> None:
        """Adds what `tensor_stats` asks for of a value to the summaries, below `tensor_stats/<name>`."""
        if self._tensor_stats is not None:
            self._tensor_stats.add_stats(f"tensor_stats/{name}", value)

    def _add_activation_summary(
        self, *, name: str, activations: Tensor, activation_paddings: Optional[Tensor] = None
    ) -> None:
        """Adds the mean and the mean norm of activations to the summaries.

        Args:
            name: They are called `activations/<name>_mean` and `activations/<name>_norm`.
            activations: `[batch, ..., dim]`.
            activation_paddings: `[batch, ...]`, true where an activation does not count. None: all count.
        """
        activations = cast_floats(activations, jnp.float32)
        live = jnp.ones(activations.shape[:-1], jnp.float32)
        if activation_paddings is not None:
            live = 1.0 - activation_paddings.astype(jnp.float32)
        weight = jnp.sum(live)
        for suffix, value in (
            ("mean", jnp.mean(activations, axis=-1)),
            ("norm", jnp.sqrt(jnp.sum(jnp.square(activations), axis=-1))),
        ):
            mean = jnp.sum(value * live) / jnp.maximum(weight, 1.0)
            self.add_summary(f"activations/{name}_{suffix}", WeightedSummary(mean=mean, weight=weight))
