"""Where the layers of a stack are, and where their parameters."""

import dataclasses
from typing import Any, Optional

from axlearn.common.attention import (
    BaseStackedTransformerLayer,
    RepeatedTransformerLayer,
    StackedTransformerLayer,
    TransformerLayer,
)
from axlearn.common.base_layer import BaseLayer
from axlearn.common.hf._errors import refusal
from axlearn.common.hf._model_fields import check_fields


@dataclasses.dataclass(frozen=True)
class LayerPlace:
    """One layer of a stack."""

    # The path of its parameters, such as "decoder/transformer/repeat/layer".
    path: str
    # Its entry in the leading dim of those parameters. None: they have no such dim.
    index: Optional[int]
    # Its config.
    cfg: TransformerLayer.Config
    # Where that is in the config of the model.
    where: str


def layer_places(stack_cfg: BaseLayer.Config, *, path: str, where: str) -> list[LayerPlace]:
    """Lists the layers of a stack in the order in which they run.

    Args:
        stack_cfg: A `StackedTransformerLayer` or a `RepeatedTransformerLayer`; the latter may repeat the former.
        path: The path of the parameters of the stack.
        where: The path of the config of the stack.

    Returns:
        A place for each layer.

    Raises:
        ValueError: It is another kind of stack.
    """
    stack: Any = stack_cfg
    check_fields(
        stack_cfg,
        where=where,
        classes=(RepeatedTransformerLayer, StackedTransformerLayer),
        # `repeat` is how the loop is run.
        read=("num_layers", "layer", "repeat"),
    )
    if stack.klass is StackedTransformerLayer:
        return _stacked(stack, path=path, where=where)
    inner = stack.layer
    one = [LayerPlace(path=f"{path}/repeat/layer", index=None, cfg=inner, where=f"{where}.layer")]
    if isinstance(inner, BaseStackedTransformerLayer.Config):
        one = layer_places(inner, path=f"{path}/repeat/layer", where=f"{where}.layer")
        if any(place.index is not None for place in one):
            raise refusal(
                f"{where}.layer.klass", inner.klass, expected="a StackedTransformerLayer, or a layer"
            )
    return [dataclasses.replace(place, index=i) for i in range(stack.num_layers) for place in one]


def _stacked(stack: Any, *, path: str, where: str) -> list[LayerPlace]:
    is_list = isinstance(stack.layer, list | tuple)
    cfgs = stack.layer if is_list else [stack.layer] * stack.num_layers
    places = []
    for i, cfg in enumerate(cfgs):
        if isinstance(cfg, BaseStackedTransformerLayer.Config):
            raise refusal(f"{where}.layer[{i}].klass", cfg.klass, expected="a TransformerLayer")
        layer_where = f"{where}.layer[{i}]" if is_list else f"{where}.layer"
        places.append(LayerPlace(path=f"{path}/layer{i}", index=None, cfg=cfg, where=layer_where))
    return places
