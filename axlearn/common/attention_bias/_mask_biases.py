"""Biases that are functions of positions or of segment ids."""

import dataclasses
from typing import Any, Optional, TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from axlearn.common.attention_bias._base import (
    BoolAttentionBias,
    LogitAxes,
    bias_pytree,
    bool_to_bias,
    spec_of,
)
from axlearn.common.attention_bias._masks import (
    MaskFn,
    causal_mask,
    left_right_window_mask,
    sliding_window_causal_mask,
)
from axlearn.common.config import ClassConfigBase, config_for_class, error_message

M = TypeVar("M", bound="MaskFnAttentionBias")


@bias_pytree(data_fields=("segment_ids", "source_segment_ids"))
@dataclasses.dataclass(frozen=True)
class SegmentIdAttentionBias(BoolAttentionBias):
    """Tokens attend only within their own segment, for instance one of several packed documents.

    Padding (by custom segment 0) is a segment of its own: it sees itself and nobody else sees it.
    """

    # The segment of each target position: [batch, target] int.
    segment_ids: Any
    # The segment of each source position: [batch, source] int. None: as `segment_ids`.
    source_segment_ids: Any = None

    def bool_value(self) -> Bool[Array, "#batch #heads #target #source"]:
        """See `BoolAttentionBias.bool_value`."""
        source = self.segment_ids if self.source_segment_ids is None else self.source_segment_ids
        return self.segment_ids[:, None, :, None] == source[:, None, None, :]

    def _partition_spec(self, axes: LogitAxes) -> "SegmentIdAttentionBias":
        if self.source_segment_ids is not None:
            source = spec_of(self.source_segment_ids, axes.batch, axes.source)
        elif axes.target == axes.source:
            source = None
        else:
            raise ValueError(
                error_message(
                    what=f"targets split over {axes.target!r} and sources over {axes.source!r}, by one array",
                    expected="segment ids of targets and of sources as two arrays",
                    advice="use SegmentIdAttentionBias(segment_ids, segment_ids)",
                )
            )
        return dataclasses.replace(
            self,
            segment_ids=spec_of(self.segment_ids, axes.batch, axes.target),
            source_segment_ids=source,
        )


@bias_pytree(data_fields=("target_positions", "source_positions"))
@dataclasses.dataclass(frozen=True)
class MaskFnAttentionBias(BoolAttentionBias):
    """Attention allowed where a function of the two positions says so."""

    # The time index of each target: [batch or 1, target] int.
    target_positions: Any
    # The time index of each source: [batch or 1, source] int.
    source_positions: Any
    # The function, see `MaskFn`.
    mask: MaskFn = dataclasses.field(kw_only=True)
    # The order of both positions, where it is known: then a kernel knows the mask while it is compiled, and can skip
    # what is masked. 1: 0, 1, 2, ... as far as they go. More: head-tail order of so many chunks, the same number of
    # both, see `sequence_order`. None: nobody knows.
    num_chunks: Optional[int] = dataclasses.field(default=None, kw_only=True)

    @classmethod
    def default_config(cls, **kwargs: Any) -> ClassConfigBase:
        """A config of this class; the attention layer fills in the positions."""
        return config_for_class(cls).set(**kwargs)

    def bool_value(self) -> Bool[Array, "#batch #heads #target #source"]:
        """See `BoolAttentionBias.bool_value`."""
        return self.mask(self.target_positions[:, None, :, None], self.source_positions[:, None, None, :])

    def _partition_spec(self: M, axes: LogitAxes) -> M:
        return dataclasses.replace(
            self,
            target_positions=spec_of(self.target_positions, axes.batch, axes.target),
            source_positions=spec_of(self.source_positions, axes.batch, axes.source),
        )


@bias_pytree(data_fields=("target_positions", "source_positions"))
@dataclasses.dataclass(frozen=True)
class CausalAttentionBias(MaskFnAttentionBias):
    """Attention to the own position and before."""

    mask: MaskFn = dataclasses.field(default=causal_mask, kw_only=True)


@bias_pytree(data_fields=("target_positions", "source_positions"))
@dataclasses.dataclass(frozen=True)
class SlidingWindowAttentionBias(MaskFnAttentionBias):
    """Attention to the own position and a fixed number of positions before."""

    # Number of visible positions before the query, itself not counted.
    sliding_window_size: int = dataclasses.field(kw_only=True)
    mask: MaskFn = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", sliding_window_causal_mask(self.sliding_window_size))


@bias_pytree(data_fields=("target_positions", "source_positions"))
@dataclasses.dataclass(frozen=True)
class LeftRightWindowAttentionBias(MaskFnAttentionBias):
    """Attention to a window on both sides of the own position."""

    # Numbers of visible positions before and after the query, itself not counted.
    left_size: int = dataclasses.field(kw_only=True)
    right_size: int = dataclasses.field(kw_only=True)
    mask: MaskFn = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", left_right_window_mask(self.left_size, self.right_size))


def make_segment_mask(
    *,
    target_segments: Int[Array, "batch target"],
    source_segments: Optional[Int[Array, "batch source"]] = None,
) -> Float[Array, "batch 1 target source"]:
    """The bias array that keeps attention within segments.

    Args:
        target_segments: The segment of each target position.
        source_segments: The segment of each source position; None: as `target_segments`.

    Returns:
        0 within a segment, `NEG_INF` between segments.
    """
    return bool_to_bias(SegmentIdAttentionBias(target_segments, source_segments).bool_value())


def make_causal_biases(seq_len: int) -> Float[Array, "seq seq"]:
    """The causal bias array: 0 where source <= target, `NEG_INF` elsewhere."""
    positions = jnp.arange(seq_len)
    return bool_to_bias(causal_mask(positions[:, None], positions[None, :]))
