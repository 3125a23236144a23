"""How one parameter translates."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Optional

import numpy as np

Shape = tuple[int, ...]
Transform = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class TensorRule:
    """How one parameter, or the part of it that belongs to one layer, translates.

    The arrays may have any dtype: values are moved, never changed.
    """

    # The path of our parameter, such as
    # "decoder/transformer/repeat/layer/self_attention/attention/o_proj/weight".
    path: str
    # The entry in the leading dim of that parameter, which counts layers. None: the whole parameter.
    layer: Optional[int]
    # The shape of our part: without the leading dim where `layer` is not None.
    shape: Shape
    # The tensors it is made from, by name.
    hf_shapes: Mapping[str, Shape]
    # From those tensors by name to our part, and back.
    to_ours: Callable[[Mapping[str, np.ndarray]], np.ndarray]
    to_hf: Callable[[np.ndarray], dict[str, np.ndarray]]


def copy_rule(
    path: str,
    layer: Optional[int],
    name: str,
    *,
    shape: Shape,
    hf_shape: Optional[Shape] = None,
    to_ours: Optional[Transform] = None,
    to_hf: Optional[Transform] = None,
) -> TensorRule:
    """A parameter made from one tensor.

    Args:
        path: See `TensorRule`.
        layer: See `TensorRule`.
        name: The name of the tensor.
        shape: The shape of our part.
        hf_shape: That of the tensor. None: the same.
        to_ours: From the tensor to our part. None: it is the same array.
        to_hf: The inverse.

    Returns:
        The rule.
    """

    def identity(x: np.ndarray) -> np.ndarray:
        return x

    ours_fn, hf_fn = to_ours or identity, to_hf or identity
    return TensorRule(
        path=path,
        layer=layer,
        shape=shape,
        hf_shapes={name: shape if hf_shape is None else hf_shape},
        to_ours=lambda tensors: np.ascontiguousarray(ours_fn(tensors[name])),
        to_hf=lambda array: {name: np.ascontiguousarray(hf_fn(array))},
    )
