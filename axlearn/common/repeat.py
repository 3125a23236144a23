"""Running one layer many times with different parameters, compiled once.

The parameters of all repetitions are stacked along a new leading dim, in a `VDict`; the layer runs inside a
`jax.lax.scan` over it. The compiled program is as large as one layer, whatever their number.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from axlearn.common.base_layer import BaseLayer, FactorizationSpec, NestedParameterSpec, ParameterSpec
from axlearn.common.config import REQUIRED, InstantiableConfig, Required, config_class, config_for_function
from axlearn.common.module import nowrap, scan_in_context
from axlearn.common.param_init import FanAxes
from axlearn.common.utils import Tensor, VDict, split_prng_key


def _drop_by_regex(rules: Sequence[str]) -> Callable[[str], bool]:
    """Makes a predicate that drops the outputs whose whole path matches one of the regular expressions.

    Args:
        rules: Expressions over paths such as "module_outputs/self_attention/probs".

    Returns:
        The predicate, from a path to whether it is dropped.
    """
    return lambda path: any(re.fullmatch(rule, path) for rule in rules)


def create_stacked_parameter_specs(
    layer: BaseLayer, *, num_layers: int, mesh_axis: Optional[str] = None
) -> NestedParameterSpec:
    """The parameter specs of `num_layers` copies of a layer, stacked along a leading dim.

    Args:
        layer: The layer.
        num_layers: The number of copies.
        mesh_axis: What the leading dim is split over. None: it is not.

    Returns:
        The specs by the names that the layer gives; to be put into a VDict.
    """

    def stack(spec: ParameterSpec) -> ParameterSpec:
        fan_axes, factorization = spec.fan_axes, spec.factorization
        return dataclasses.replace(
            spec,
            shape=(num_layers, *spec.shape),
            mesh_axes=PartitionSpec(mesh_axis, *(spec.mesh_axes or (None,) * len(spec.shape))),
            factorization=None
            if factorization is None
            else FactorizationSpec(axes=(None, *factorization.axes)),
            fan_axes=None if fan_axes is None else fan_axes.prepend_axis(FanAxes.AxisType.BATCH),
        )

    specs = layer.create_parameter_specs_recursively()
    return jax.tree.map(stack, specs, is_leaf=lambda x: isinstance(x, ParameterSpec))


def initialize_stacked_parameters(
    layer: BaseLayer, prng_key: Tensor, *, num_layers: int, prebuilt: Optional[Mapping[str, Any]] = None
) -> dict[str, Any]:
    """The first values of the parameters of `num_layers` copies of a layer, stacked.

    Args:
        layer: The layer.
        prng_key: Is split into one key per copy. (With "rbg" keys only that of the first copy matters: under
            vmap such a generator draws for all copies at once.)
        num_layers: The number of copies.
        prebuilt: As in `BaseLayer.initialize_parameters_recursively`, stacked.

    Returns:
        The parameters by the names that the layer gives; to be put into a VDict.
    """

    def initialize_one(key: Tensor) -> dict[str, Any]:
        return layer.initialize_parameters_recursively(key, prebuilt=prebuilt)

    return jax.vmap(initialize_one)(split_prng_key(prng_key, num_layers).keys)


def apply_noise_to_stacked_parameters(
    layer: BaseLayer, prng_key: Tensor, params: Mapping[str, Any], *, num_layers: int
) -> dict[str, Any]:
    """`BaseLayer.apply_parameter_noise_recursively` for stacked copies of a layer."""
    keys = split_prng_key(prng_key, num_layers).keys
    return jax.vmap(layer.apply_parameter_noise_recursively)(keys, dict(params))


class Repeat(BaseLayer):
    """Runs its layer `num_layers` times, each time on what the time before returned.

    Parameters are below `layer`, stacked in a `VDict`. Summaries of repetition i appear below `layer{i}`.
    """

    @config_class
    class Config(BaseLayer.Config):
        """Configures `Repeat`."""

        # The layer.
        layer: Required[BaseLayer.Config] = REQUIRED
        # Number of repetitions, at least 1.
        num_layers: Required[int] = REQUIRED
        # Makes a function from the path of an output ("module_outputs/...", "summaries/...",
        # "state_updates/...") to whether to drop it instead of stacking it. None: drop nothing.
        drop_output: Optional[InstantiableConfig] = config_for_function(_drop_by_regex).set(
            rules=["module_outputs.*"]
        )
        # Number of repetitions in the body of the compiled loop. None: 1.
        unroll: Optional[int] = None

    def __init__(self, cfg: Config, *, parent: Optional[BaseLayer]):
        super().__init__(cfg, parent=parent)
        self._add_child("layer", cfg.layer)
        self._drop_output = None if cfg.drop_output is None else cfg.drop_output.instantiate()

    @nowrap
    def create_parameter_specs_recursively(self) -> NestedParameterSpec:
        """See `BaseLayer.create_parameter_specs_recursively`."""
        return VDict(layer=create_stacked_parameter_specs(self.layer, num_layers=self.config.num_layers))

    @nowrap
    def initialize_parameters_recursively(
        self, prng_key: Tensor, *, prebuilt: Optional[Mapping[str, Any]] = None
    ) -> dict[str, Any]:
        """See `BaseLayer.initialize_parameters_recursively`."""
        params = initialize_stacked_parameters(
            self.layer,
            prng_key,
            num_layers=self.config.num_layers,
            prebuilt=(prebuilt or {}).get("layer"),
        )
        return VDict(layer=params)

    @nowrap
    def apply_parameter_noise_recursively(
        self, prng_key: Tensor, params: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `BaseLayer.apply_parameter_noise_recursively`."""
        noisy = apply_noise_to_stacked_parameters(
            self.layer, prng_key, params["layer"], num_layers=self.config.num_layers
        )
        return VDict(layer=noisy)

    def forward(self, carry: Any) -> Any:
        """Applies the layer again and again.

        Args:
            carry: The input of the first repetition.

        Returns:
            The output of the last.
        """
        carry, _ = self._run(lambda carry_i, _: (self.layer(carry_i), None), carry)
        return carry

    def _run(
        self,
        fn: Callable[[Any, Any], tuple[Any, Any]],
        carry: Any,
        *,
        xs: Optional[Any] = None,
    ) -> tuple[Any, Any]:
        """Scans a function over the repetitions.

        Args:
            fn: From the carry and the slice of `xs` to the new carry and an output; may call methods of
                `self.layer`, which then run with the parameters of that repetition.
            carry: The first carry.
            xs: Arrays with a leading dim of size num_layers. None: none.

        Returns:
            The last carry and the stacked outputs.
        """
        cfg: Repeat.Config = self.config
        # The indices tell the loop its length, also where there are no parameters.
        scanned: dict[str, Any] = {
            "xs": {"index": jnp.arange(cfg.num_layers), "x": xs},
            "state": (self.state or {}).get("layer", {}),
        }
        if self.prng_key is not None:
            scanned["prng_key"] = split_prng_key(self.prng_key, cfg.num_layers).keys
        return scan_in_context(
            lambda carry_i, x_i: fn(carry_i, x_i["x"]),  # type: ignore[index,call-overload]
            carry=carry,
            xs=scanned,
            module=self.layer,
            drop_output=self._drop_output,
            child_name_prefix="layer",
            unroll=cfg.unroll or 1,
        )
