"""Stacks of transformer layers, each with parameters of its own."""

from collections.abc import Sequence
from typing import Any, Optional, Union

from jaxtyping import Array, Float, Int

from axlearn.common.attention._layer import (
    BaseTransformerLayer,
    CrossData,
    TransformerLayer,
    TransformerOutput,
)
from axlearn.common.attention._multihead import LogitBiases
from axlearn.common.base_layer import BaseLayer
from axlearn.common.config import REQUIRED, ConfigBase, Required, config_class, error_message
from axlearn.common.layers import StochasticDepth, for_each_config


class BaseStackedTransformerLayer(BaseTransformerLayer):
    """A stack of layers."""

    @config_class
    class Config(BaseTransformerLayer.Config):
        """Configures `BaseStackedTransformerLayer`."""

        # Number of layers, at least 1.
        num_layers: Required[int] = REQUIRED
        # The layers: one config for all, or, where the subclass allows it, one for each.
        layer: Union[BaseLayer.Config, Sequence[BaseLayer.Config], None] = TransformerLayer.default_config()
        # Probability in [0, 1) with which the last layer's blocks are skipped in training. Layer l of L, counted
        # from 1, gets `l / L` of it (Huang et al., Deep Networks with Stochastic Depth,
        # https://arxiv.org/abs/1603.09382, section 3). None: each block's own `stochastic_depth` decides.
        peak_stochastic_depth_rate: Optional[float] = None


class StackedTransformerLayer(BaseStackedTransformerLayer):
    """Layers `layer0`, `layer1`, ..., which may differ from each other."""

    @config_class
    class Config(BaseStackedTransformerLayer.Config):
        """Configures `StackedTransformerLayer`."""

    def __init__(self, cfg: Config, *, parent: Optional[BaseLayer]):
        super().__init__(cfg, parent=parent)
        peak_rate = cfg.peak_stochastic_depth_rate
        if peak_rate is not None and not 0 <= peak_rate < 1:
            raise ValueError(
                error_message(
                    where=self.path(),
                    what=f"peak_stochastic_depth_rate={peak_rate}",
                    expected="a probability in [0, 1), or None",
                )
            )
        layers = cfg.layer if isinstance(cfg.layer, list | tuple) else [cfg.layer] * cfg.num_layers
        if len(layers) != cfg.num_layers:
            raise ValueError(
                error_message(
                    where=self.path(),
                    what=f"{len(layers)} layer configs",
                    expected=f"num_layers={cfg.num_layers} of them, or one for all",
                )
            )
        for i, layer_cfg in enumerate(layers):
            layer_cfg = layer_cfg.clone(input_dim=cfg.input_dim)
            if peak_rate is not None:
                self._set_stochastic_depth(layer_cfg, peak_rate * (i + 1) / cfg.num_layers)
            self._add_child(f"layer{i}", layer_cfg)

    def _set_stochastic_depth(self, layer_cfg: BaseLayer.Config, rate: float) -> None:
        """Sets the rate of every block of a layer, in place."""

        def set_rate(cfg: ConfigBase) -> None:
            if not isinstance(cfg, StochasticDepth.Config):
                return
            if cfg.rate is not None:
                raise ValueError(
                    error_message(
                        where=self.path(),
                        what=f"peak_stochastic_depth_rate={self.config.peak_stochastic_depth_rate} and "
                        f"stochastic_depth.rate={cfg.rate} in a layer",
                        expected="only one of them",
                    )
                )
            cfg.rate = rate

        for_each_config(layer_cfg, set_rate)

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
        for layer in self._layers():
            data = layer(
                data,
                attention_logit_biases=attention_logit_biases,
                segment_ids=segment_ids,
                positions=positions,
                cross_attention_data=cross_attention_data,
                cross_attention_logit_biases=cross_attention_logit_biases,
            ).data
        return TransformerOutput(data=data)

    def init_states(self, *, batch_size: int, max_len: int) -> dict[str, Any]:
        """See `BaseTransformerLayer.init_states`."""
        return {
            layer.name: layer.init_states(batch_size=batch_size, max_len=max_len) for layer in self._layers()
        }

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
        new_states = {}
        for layer in self._layers():
            new_states[layer.name], output = layer.extend_step(
                cached_states[layer.name],
                data,
                live_step_len=live_step_len,
                cross_attention_data=cross_attention_data,
                cross_attention_logit_biases=cross_attention_logit_biases,
            )
            data = output.data
        return new_states, TransformerOutput(data=data)

    def _layers(self) -> list[Any]:
        return [self.children[f"layer{i}"] for i in range(self.config.num_layers)]
