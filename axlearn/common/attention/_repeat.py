"""A stack of equal transformer layers that is compiled as one."""

from collections.abc import Mapping
from typing import Any, Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from axlearn.common.attention._layer import CrossData, TransformerOutput
from axlearn.common.attention._multihead import LogitBiases
from axlearn.common.attention._stack import BaseStackedTransformerLayer
from axlearn.common.base_layer import BaseLayer
from axlearn.common.config import config_class, error_message
from axlearn.common.module import nowrap
from axlearn.common.repeat import Repeat
from axlearn.common.utils import VDict


class _TransformerRepeat(Repeat):
    """A `Repeat` with the methods of a transformer layer."""

    @config_class
    class Config(Repeat.Config):
        """Configures `_TransformerRepeat`."""

    def forward(  # type: ignore[override]
        self,
        data: Float[Array, "batch seq input_dim"],
        *,
        attention_logit_biases: Optional[LogitBiases] = None,
        segment_ids: Optional[Int[Array, "batch seq"]] = None,
        positions: Optional[Int[Array, "#batch seq"]] = None,
        cross_attention_data: Optional[CrossData] = None,
        cross_attention_logit_biases: Optional[LogitBiases] = None,
    ) -> TransformerOutput:
        """See `BaseTransformerLayer.forward`."""

        def run_layer(data_i: Array, _: Any) -> tuple[Array, None]:
            output = self.layer(
                data_i,
                attention_logit_biases=attention_logit_biases,
                segment_ids=segment_ids,
                positions=positions,
                cross_attention_data=cross_attention_data,
                cross_attention_logit_biases=cross_attention_logit_biases,
            )
            return output.data, None

        data, _ = self._run(run_layer, data)
        return TransformerOutput(data=data)

    def init_states(self, *, batch_size: int, max_len: int) -> dict[str, Any]:
        """See `BaseTransformerLayer.init_states`; the states of all layers are stacked."""
        num_layers = self.config.num_layers
        states = self.layer.init_states(batch_size=batch_size, max_len=max_len)
        return VDict(layer=jax.tree.map(lambda x: jnp.broadcast_to(x[None], (num_layers, *x.shape)), states))

    def extend_step(
        self,
        cached_states: dict[str, Any],
        data: Float[Array, "batch step input_dim"],
        *,
        live_step_len: Optional[Int[Array, "batch"]] = None,
        cross_attention_data: Optional[CrossData] = None,
        cross_attention_logit_biases: Optional[LogitBiases] = None,
    ) -> tuple[dict[str, Any], TransformerOutput]:
        """See `BaseTransformerLayer.extend_step`."""

        def run_layer(data_i: Array, states_i: dict[str, Any]) -> tuple[Array, dict[str, Any]]:
            new_states, output = self.layer.extend_step(
                states_i,
                data_i,
                live_step_len=live_step_len,
                cross_attention_data=cross_attention_data,
                cross_attention_logit_biases=cross_attention_logit_biases,
            )
            return output.data, new_states

        data, new_states = self._run(run_layer, data, xs=cached_states["layer"])
        return VDict(layer=new_states), TransformerOutput(data=data)


class RepeatedTransformerLayer(BaseStackedTransformerLayer):
    """Equal layers whose parameters are stacked below `repeat/layer`; see `Repeat`."""

    @config_class
    class Config(BaseStackedTransformerLayer.Config):
        """Configures `RepeatedTransformerLayer`."""

        # Runs the layers.
        repeat: BaseLayer.Config = _TransformerRepeat.default_config()

    def __init__(self, cfg: Config, *, parent: Optional[BaseLayer]):
        super().__init__(cfg, parent=parent)
        if not isinstance(cfg.layer, BaseLayer.Config):
            raise ValueError(
                error_message(
                    where=self.path(),
                    what=f"layer is a {type(cfg.layer).__name__}",
                    expected="one config, for equal layers",
                    advice="to alternate between layers, repeat a StackedTransformerLayer",
                )
            )
        if cfg.peak_stochastic_depth_rate:
            raise ValueError(
                error_message(
                    where=self.path(),
                    what=f"peak_stochastic_depth_rate={cfg.peak_stochastic_depth_rate}",
                    expected="None: the layers of a loop have one config, so one rate for all",
                    advice="use StackedTransformerLayer, or set stochastic_depth.rate in the layer",
                )
            )
        layer = cfg.layer.clone(input_dim=cfg.input_dim)
        self._add_child("repeat", cfg.repeat.clone(layer=layer, num_layers=cfg.num_layers))

    @nowrap
    def initialize_parameters_recursively(
        self, prng_key: jax.Array, *, prebuilt: Optional[Mapping[str, Any]] = None
    ) -> dict[str, Any]:
        """See `BaseLayer.initialize_parameters_recursively`; `repeat` gets the key as it is."""
        prebuilt_repeat = (prebuilt or {}).get("repeat")
        return {"repeat": self.repeat.initialize_parameters_recursively(prng_key, prebuilt=prebuilt_repeat)}

    def forward(
        self,
        data: Float[Array, "batch seq input_dim"],
        *,
        attention_logit_biases: Optional[LogitBiases] = None,
        segment_ids: Optional[Int[Array, "batch seq"]] = None,
        positions: Optional[Int[Array, "#batch seq"]] = None,
        cross_attention_data: Optional[CrossData] = None,
        cross_attention_logit_biases: Optional[LogitBiases] = None,
    ) -> TransformerOutput:
        """See `BaseTransformerLayer.forward`."""
        return self.repeat(
            data,
            attention_logit_biases=attention_logit_biases,
            segment_ids=segment_ids,
            positions=positions,
            cross_attention_data=cross_attention_data,
            cross_attention_logit_biases=cross_attention_logit_biases,
        )

    def init_states(self, *, batch_size: int, max_len: int) -> dict[str, Any]:
        """See `BaseTransformerLayer.init_states`."""
        return {"repeat": self.repeat.init_states(batch_size=batch_size, max_len=max_len)}

    def extend_step(
        self,
        cached_states: dict[str, Any],
        data: Float[Array, "batch step input_dim"],
        *,
        live_step_len: Optional[Int[Array, "batch"]] = None,
        cross_attention_data: Optional[CrossData] = None,
        cross_attention_logit_biases: Optional[LogitBiases] = None,
    ) -> tuple[dict[str, Any], TransformerOutput]:
        """See `BaseTransformerLayer.extend_step`."""
        repeat_states, output = self.repeat.extend_step(
            cached_states["repeat"],
            data,
            live_step_len=live_step_len,
            cross_attention_data=cross_attention_data,
            cross_attention_logit_biases=cross_attention_logit_biases,
        )
        return {"repeat": repeat_states}, output
