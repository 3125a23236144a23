"""Sorting what is added to the logits into what kernels know."""

import dataclasses
from typing import NamedTuple, Optional, TypeGuard, TypeVar

from axlearn.common.attention_bias import (
    BaseAttentionBias,
    CompositeAttentionBias,
    LeftRightWindowAttentionBias,
    MaskFn,
    MaskFnAttentionBias,
    SegmentIdAttentionBias,
    SlidingWindowAttentionBias,
    causal_mask,
)
from axlearn.common.attention_kernels import Window

B = TypeVar("B", bound=BaseAttentionBias)


class SortedBias(NamedTuple):
    """What is added to the logits.

    Attributes:
        window: What the masks of indices let a query see, as far as they are windows.
        mask_fns: The other masks of indices.
        segments: Segment ids, with both arrays. None: there are none.
        explicit: The classes of everything else.
        is_self_segmented: Whether queries and keys have the same segment ids.
        num_chunks: The order of queries and keys that `window` and `mask_fns` are about, see `MaskFnAttentionBias`.
    """

    window: Window = Window()
    mask_fns: tuple[MaskFn, ...] = ()
    segments: Optional[SegmentIdAttentionBias] = None
    explicit: tuple[str, ...] = ()
    is_self_segmented: bool = True
    num_chunks: int = 1


def sort_bias(bias: BaseAttentionBias) -> SortedBias:
    """Sorts the summands of a bias.

    Args:
        bias: The bias.

    Returns:
        Each summand in one place. Masks of indices whose order is not known, or not that of all others, all segment
        ids but the first, and biases of classes that compute their values themselves, count as explicit.
    """
    orders = {leaf.num_chunks for leaf in bias.leaves() if _is_mask_of_known_order(leaf)}
    num_chunks = next(iter(orders)) if len(orders) == 1 else None
    found = SortedBias(num_chunks=num_chunks or 1)
    for leaf in bias.leaves():
        if not leaf.has_value():
            continue
        if num_chunks is not None and _is_mask_of_known_order(leaf):
            window = _window_of(leaf)
            found = (
                found._replace(mask_fns=(*found.mask_fns, leaf.mask))
                if window is None
                else found._replace(window=found.window.intersect(window))
            )
        elif _is_plain(leaf, SegmentIdAttentionBias) and found.segments is None:
            is_self = leaf.source_segment_ids is None or leaf.source_segment_ids is leaf.segment_ids
            found = found._replace(segments=_with_both(leaf), is_self_segmented=is_self)
        else:
            found = found._replace(explicit=(*found.explicit, type(leaf).__name__))
    return found


def _is_plain(bias: BaseAttentionBias, cls: type[B]) -> TypeGuard[B]:
    """Whether a bias is of this class or one below it, and no class between computes the values itself."""
    methods = ("value", "bool_value")
    return isinstance(bias, cls) and all(getattr(type(bias), m) is getattr(cls, m) for m in methods)


def _is_mask_of_known_order(bias: BaseAttentionBias) -> TypeGuard[MaskFnAttentionBias]:
    return _is_plain(bias, MaskFnAttentionBias) and bias.num_chunks is not None


def _window_of(bias: MaskFnAttentionBias) -> Optional[Window]:
    """The mask as a window. None: it is none."""
    if isinstance(bias, SlidingWindowAttentionBias):
        return Window(left=bias.sliding_window_size, right=0)
    if isinstance(bias, LeftRightWindowAttentionBias):
        return Window(left=bias.left_size, right=bias.right_size)
    return Window(right=0) if bias.mask is causal_mask else None


def _with_both(bias: SegmentIdAttentionBias) -> SegmentIdAttentionBias:
    if bias.source_segment_ids is not None:
        return bias
    return dataclasses.replace(bias, source_segment_ids=bias.segment_ids)


def with_both_segment_ids(bias: BaseAttentionBias) -> BaseAttentionBias:
    """The same bias, whose segment ids can be cut up differently for queries and for keys."""
    leaves = [
        _with_both(leaf) if isinstance(leaf, SegmentIdAttentionBias) else leaf for leaf in bias.leaves()
    ]
    return leaves[0] if len(leaves) == 1 else CompositeAttentionBias(tuple(leaves), dtype=bias.dtype)
