"""Stacks of transformer layers, each with parameters of its own."""

from collections.abc import Sequence
from typing import Any, Optional, Union

from jaxtyping import Array, Float, Int

from axlearn.common.attention._layer import BaseTransformerLayer, TransformerLayer, TransformerOutput
from axlearn.common.attention._multihead import LogitBiases
from axlearn.common.base_layer import BaseLayer
from axlearn.common.config import REQUIRED, Required, config_class, error_message


class BaseStackedTransformerLayer(BaseTransformerLayer):
    """A stack of layers."""

    @config_class
    class Config(BaseTransformerLayer.Config):
        """Configures `BaseStackedTransformerLayer`."""

        # Number of layers, at least 1.
        num_layers: Required[int] = REQUIRED
        # The layers: one config for all, or, where the subclass allows it, one for each.
        layer: Union[BaseLayer.Config, Sequence[BaseLayer.Config], None] = TransformerLayer.default_config()


class StackedTransformerLayer(BaseStackedTransformerLayer):
    """Layers `layer0`, `layer1`, ..., which may differ from each other."""

    @config_class
    class Config(BaseStackedTransformerLayer.Config):
        """Configures `StackedTransformerLayer`."""

    def __init__(self, cfg: Config, *, parent: Optional[BaseLayer]):
        super().__init__(cfg, parent=parent)
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
            self._add_child(f"layer{i}", layer_cfg.clone(input_dim=cfg.input_dim))

    def forward(
        self,
        data: Float[Array, "batch seq input_dim"],
        *,
        attention_logit_biases: Optional[LogitBiases] = None,
        segment_ids: Optional[Int[Array, "batch seq"]] = None,
        positions: Optional[Int[Array, "#batch seq"]] = None,
    ) -> TransformerOutput:
        """See `BaseTransformerLayer.forward`."""
        for layer in self._layers():
            data = layer(
                data,
                attention_logit_biases=attention_logit_biases,
                segment_ids=segment_ids,
                positions=positions,
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
    ) -> tuple[dict[str, Any], TransformerOutput]:
        """See `BaseTransformerLayer.extend_step`."""
        new_states = {}
        for layer in self._layers():
            new_states[layer.name], output = layer.extend_step(
                cached_states[layer.name], data, live_step_len=live_step_len
            )
            data = output.data
        return new_states, TransformerOutput(data=data)

    def _layers(self) -> list[Any]:
        return [self.children[f"layer{i}"] for i in range(self.config.num_layers)]
