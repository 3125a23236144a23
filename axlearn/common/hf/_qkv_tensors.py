"""The projections to queries, keys and values: which tensors make which parameter."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

import numpy as np

from axlearn.common.attention import FusedGroupedQKVLinear, FusedQKVLinear
from axlearn.common.hf._facts import DecoderFacts
from axlearn.common.hf._layer_places import LayerPlace
from axlearn.common.hf._tensor_rule import Shape, TensorRule


def pair_adjacent(x: np.ndarray) -> np.ndarray:
    """Reorders the dims of a head, the last axis, such that rotated pairs stand together.

    They rotate dim i with dim i + per_head_dim / 2, we rotate dim 2 i with dim 2 i + 1.
    """
    halves = x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    return np.swapaxes(halves, -1, -2).reshape(x.shape)


def pair_halves(x: np.ndarray) -> np.ndarray:
    """The inverse of `pair_adjacent`."""
    pairs = x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    return np.swapaxes(pairs, -1, -2).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class _Projection:
    """One of the projections to queries, keys and values."""

    name: str
    num_heads: int
    is_rotated: bool

    def weight_to_ours(self, x: np.ndarray, *, per_head_dim: int) -> np.ndarray:
        """From [heads * per_head_dim, dim] to [dim, heads, per_head_dim]."""
        heads = x.T.reshape(x.shape[1], self.num_heads, per_head_dim)
        return pair_adjacent(heads) if self.is_rotated else heads

    def weight_to_hf(self, x: np.ndarray) -> np.ndarray:
        """The inverse of `weight_to_ours`."""
        heads = pair_halves(x) if self.is_rotated else x
        return np.ascontiguousarray(heads.reshape(x.shape[0], -1).T)

    def bias_to_ours(self, x: np.ndarray, *, per_head_dim: int) -> np.ndarray:
        """From [heads * per_head_dim] to [heads, per_head_dim]."""
        heads = x.reshape(self.num_heads, per_head_dim)
        return pair_adjacent(heads) if self.is_rotated else heads

    def bias_to_hf(self, x: np.ndarray) -> np.ndarray:
        """The inverse of `bias_to_ours`."""
        return np.ascontiguousarray((pair_halves(x) if self.is_rotated else x).reshape(-1))


def qkv_rules(facts: DecoderFacts, place: LayerPlace, *, prefix: str) -> list[TensorRule]:
    """How the projections of a layer translate, in whichever way it keeps them.

    Args:
        facts: The decoder.
        place: The layer.
        prefix: Of the names of the tensors, such as "model.layers.0.self_attn.".

    Returns:
        A rule for each parameter.
    """
    cfg: Any = place.cfg
    klass = cfg.self_attention.attention.input_linear.input_linear.klass
    # The outer i_proj rotates what the inner one projects.
    path = f"{place.path}/self_attention/attention/i_proj/i_proj"
    projections = (
        _Projection("q_proj", num_heads=facts.num_heads, is_rotated=True),
        _Projection("k_proj", num_heads=facts.num_kv_heads, is_rotated=True),
        _Projection("v_proj", num_heads=facts.num_kv_heads, is_rotated=False),
    )
    groups: list[tuple[str, Sequence[_Projection]]] = [(x.name, (x,)) for x in projections]
    if klass in (FusedGroupedQKVLinear, FusedQKVLinear):
        groups = [("qkv_proj", projections)]
    make_rule = _stacked_rule if klass is FusedQKVLinear else _concatenated_rule
    return [
        make_rule(facts, f"{path}/{name}/{param}", place.index, group, prefix=prefix, param=param)
        for param in (("weight", "bias") if facts.qkv_bias else ("weight",))
        for name, group in groups
    ]


def _qkv_parts(
    facts: DecoderFacts, projections: Sequence[_Projection], *, prefix: str, param: str
) -> tuple[dict[str, Shape], Callable, Callable]:
    """The tensors of some projections; from them to a list of our arrays, and from such a list to them."""
    names = [f"{prefix}{x.name}.{param}" for x in projections]
    is_weight, per_head_dim = param == "weight", facts.per_head_dim
    shapes = {
        name: (x.num_heads * per_head_dim, facts.dim)[: 2 if is_weight else 1]
        for name, x in zip(names, projections, strict=True)
    }

    def to_parts(tensors: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return [
            (x.weight_to_ours if is_weight else x.bias_to_ours)(tensors[name], per_head_dim=per_head_dim)
            for name, x in zip(names, projections, strict=True)
        ]

    def from_parts(parts: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        return {
            name: (x.weight_to_hf if is_weight else x.bias_to_hf)(part)
            for name, x, part in zip(names, projections, parts, strict=True)
        }

    return shapes, to_parts, from_parts


def _concatenated_rule(
    facts: DecoderFacts,
    path: str,
    layer: Optional[int],
    projections: Sequence[_Projection],
    *,
    prefix: str,
    param: str,
) -> TensorRule:
    """A parameter that holds the heads of one or more projections one after the other."""
    shapes, to_parts, from_parts = _qkv_parts(facts, projections, prefix=prefix, param=param)
    num_heads = sum(x.num_heads for x in projections)
    ends = np.cumsum([x.num_heads for x in projections])[:-1]
    lead = (facts.dim,) if param == "weight" else ()
    return TensorRule(
        path=path,
        layer=layer,
        shape=(*lead, num_heads, facts.per_head_dim),
        hf_shapes=shapes,
        to_ours=lambda tensors: np.concatenate(to_parts(tensors), axis=-2),
        to_hf=lambda array: from_parts(np.split(array, ends, axis=-2)),
    )


def _stacked_rule(
    facts: DecoderFacts,
    path: str,
    layer: Optional[int],
    projections: Sequence[_Projection],
    *,
    prefix: str,
    param: str,
) -> TensorRule:
    """A parameter that holds three projections of equal shape along a new first dim."""
    shapes, to_parts, from_parts = _qkv_parts(facts, projections, prefix=prefix, param=param)
    lead = (facts.dim,) if param == "weight" else ()
    return TensorRule(
        path=path,
        layer=layer,
        shape=(len(projections), *lead, facts.num_heads, facts.per_head_dim),
        hf_shapes=shapes,
        to_ours=lambda tensors: np.stack(to_parts(tensors)),
        to_hf=lambda array: from_parts(list(array)),
    )
