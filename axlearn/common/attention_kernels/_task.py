"""What an attention asks of a kernel: what is known while tracing, and the arrays."""

import dataclasses
from typing import Any, NamedTuple, Optional

from jaxtyping import Array, Float, Int

from axlearn.common.attention_bias import BaseAttentionBias, MaskFn


class Window(NamedTuple):
    """How far a query sees, counted in positions and itself not counted.

    Attributes:
        left: Number of visible positions before the query. None: all.
        right: Number of visible positions after it. None: all.
    """

    left: Optional[int] = None
    right: Optional[int] = None

    @property
    def is_full(self) -> bool:
        """Whether every query sees every key."""
        return self == Window()

    @property
    def is_causal(self) -> bool:
        """Whether every query sees itself and everything before, and nothing else."""
        return self == Window(left=None, right=0)

    def intersect(self, other: "Window") -> "Window":
        """The window of what both let a query see."""
        return Window(_lower(self.left, other.left), _lower(self.right, other.right))


FULL_WINDOW = Window()


def _lower(a: Optional[int], b: Optional[int]) -> Optional[int]:
    return b if a is None else a if b is None else min(a, b)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionTask:
    """An attention as far as it is known before it runs. Sizes are those on one device."""

    # "tpu", "gpu" or "cpu".
    platform: str
    # Of queries, keys and values.
    dtype: Any
    # Numbers of queries and of keys, of their heads, and the size of a head.
    target_len: int
    source_len: int
    num_heads: int
    num_kv_heads: int
    per_head_dim: int
    # Over how many devices the queries of one sequence are split, and the keys.
    num_target_shards: int = 1
    num_source_shards: int = 1
    # The mesh axes that split them, outermost first.
    target_axes: tuple[str, ...] = ()
    source_axes: tuple[str, ...] = ()
    # Whether it is known how queries, keys and values lie on a mesh of several devices.
    is_placed: bool = True
    # The order in which queries and keys lie, both: head-tail order of so many chunks of the whole sequence, see
    # `sequence_order`; `window` and `mask_fns` are about indices in the text. 1: in the order of the text.
    num_chunks: int = 1
    # What the masks together let a query see, as far as they are windows of indices.
    window: Window = FULL_WINDOW
    # Masks of indices that are no windows.
    mask_fns: tuple[MaskFn, ...] = ()
    # Whether there are segment ids; and whether they are the same for queries and keys.
    has_segment_ids: bool = False
    is_self_segmented: bool = True
    # Whatever else is added to the logits, by name: only `AttentionArrays.bias` knows it.
    explicit: tuple[str, ...] = ()
    # Keeps logits within plus and minus this number by tanh. None: no cap.
    logit_cap: Optional[float] = None
    # Whether each head has a sink, a logit that takes part in the softmax alone.
    has_sink: bool = False
    # How many of the probabilities are dropped; 0 outside of training.
    dropout_rate: float = 0.0
    # Whether somebody wants to see the probabilities.
    need_probs: bool = False
    # Sides of blocks at most.
    tpu_block_size: int = 512
    gpu_block_size: int = 128
    # Fields of splash attention's BlockSizes by name, which count instead of `tpu_block_size`.
    splash_blocks: tuple[tuple[str, Any], ...] = ()
    # What the values are called that the backward pass needs of the forward pass.
    residual_name: str = "flash_residuals"

    @property
    def total_target_len(self) -> int:
        """Number of queries of a sequence, on all devices."""
        return self.target_len * self.num_target_shards

    @property
    def total_source_len(self) -> int:
        """Number of keys of a sequence, on all devices."""
        return self.source_len * self.num_source_shards

    @property
    def interpret(self) -> bool:
        """Whether Pallas kernels are interpreted: there is nothing to compile them for."""
        return self.platform == "cpu"


class AttentionArrays(NamedTuple):
    """The arrays of an attention, as far as they are on one device.

    Attributes:
        query: Queries, scaled.
        key: Keys; their heads divide those of the queries.
        value: Values.
        bias: Everything that is added to the logits, masks and segments included.
        target_segment_ids: The segment of each query. None: one segment.
        source_segment_ids: The segment of each key.
        sink: The sink of each head. None: no sinks.
        target_shard: Which of the `num_target_shards` parts of the queries this is; an int32 scalar.
    """

    query: Float[Array, "batch target heads per_head_dim"]
    key: Float[Array, "batch source kv_heads per_head_dim"]
    value: Float[Array, "batch source kv_heads per_head_dim"]
    bias: BaseAttentionBias
    target_segment_ids: Optional[Int[Array, "batch target"]] = None
    source_segment_ids: Optional[Int[Array, "batch source"]] = None
    sink: Optional[Float[Array, "heads"]] = None
    target_shard: Any = 0
