"""Context parallelism: devices that split the positions of each row."""

import enum
from collections.abc import Sequence
from typing import Any, Optional, Union

from jax.sharding import PartitionSpec

from axlearn.common.attention import (
    GroupedQueryAttention,
    MultiheadAttention,
    for_each_self_attention,
)
from axlearn.common.config import (
    REQUIRED,
    ConfigModifier,
    InstantiableConfig,
    config_class,
    error_message,
    public_name,
)
from axlearn.common.flash_attention.layer import FlashAttention, attention_configs
from axlearn.common.sequence_order import check_num_chunks
from axlearn.common.trainer_config_modifier._modifiers import _config_at, _name, _set
from axlearn.common.utils import HybridMeshShape, replace_layer_config_recursively

AxisNames = Union[str, Sequence[str]]

# Attention that FlashAttention computes too, from the same parameters.
_SAME_MATHS = (MultiheadAttention, GroupedQueryAttention, FlashAttention)


class ContextParallelMethod(enum.Enum):
    """How the queries of a device meet the keys of others."""

    # Every device gets all keys and values of its rows before it attends.
    ALL_GATHER = "all_gather"
    # Keys and values pass every device, one neighbour after another; none has all of them.
    RING = "ring"


class ContextParallelModifier(ConfigModifier):
    """Splits the positions of each row over devices, in attention too: nothing but keys and values travels.

    All attention becomes `FlashAttention`. The mesh is not touched: `mesh_shape` says how many devices there are along
    `seq_axis`, and is to be set before.
    """

    @config_class
    class Config(ConfigModifier.Config):
        """Configures ContextParallelModifier."""

        # How the queries of a device meet the keys of others.
        method: ContextParallelMethod = ContextParallelMethod.ALL_GATHER
        # Number of chunks of the order in which positions lie, see `Decoder.Config.num_seq_chunks`: 1, or a multiple
        # of twice the number of devices along `seq_axis`. None: twice that number.
        num_chunks: Optional[int] = None
        # The mesh axis that splits positions, and the axes that split rows and heads.
        seq_axis: str = "seq"
        batch_axis_names: AxisNames = ("data", "expert", "fsdp")
        head_axis_names: AxisNames = "model"

    def __call__(self, cfg: InstantiableConfig) -> InstantiableConfig:
        """Changes the model of a trainer's config.

        It sets how queries, keys and contexts lie in every self-attention layer, `decoder.num_seq_chunks`, and
        `batch_axis_names` and `seq_axis_names` of the model.

        Args:
            cfg: A trainer's config, changed in place.

        Returns:
            `cfg`.

        Raises:
            ValueError: If there is no attention, or another one than FlashAttention can compute; if the mesh has no
                such axis; if the number of chunks is not known, or leaves devices with unequal work.
        """
        own, where = self.config, _name(self)
        model = _config_at(cfg, "model", where=where)
        decoder = _config_at(cfg, "model.decoder", where=where)
        num_chunks = self._num_chunks(cfg)
        self._check_attention(model)
        replace_layer_config_recursively(
            model, target_cls=MultiheadAttention, source_config=FlashAttention.default_config()
        )
        for_each_self_attention(model, self._place)
        _set(decoder, "num_seq_chunks", None if num_chunks == 1 else num_chunks, where=where)
        _set(model, "batch_axis_names", own.batch_axis_names, where=where)
        _set(model, "seq_axis_names", own.seq_axis, where=where)
        return cfg

    def _num_chunks(self, cfg: Any) -> int:
        """The number of chunks, by the size of the mesh where it is known and nobody says."""
        own, where = self.config, f"{_name(self)}.num_chunks"
        num_devices = self._num_devices(cfg)
        if own.num_chunks is None:
            if num_devices is None:
                raise ValueError(
                    error_message(
                        where=where,
                        what=f"None, and the mesh {cfg.mesh_shape} does not say how many devices {own.seq_axis!r} has",
                        expected="a number of chunks, or a mesh that says so, set before this",
                    )
                )
            return 2 * num_devices if num_devices > 1 else 1
        check_num_chunks(own.num_chunks, where=where)
        if own.num_chunks > 1 and num_devices is not None and own.num_chunks % (2 * num_devices):
            raise ValueError(
                error_message(
                    where=where,
                    what=f"{own.num_chunks} chunks for {num_devices} devices along {own.seq_axis!r}",
                    expected=f"a multiple of {2 * num_devices}, so that all have equal work, or 1",
                )
            )
        return own.num_chunks

    def _num_devices(self, cfg: Any) -> Optional[int]:
        """The number of devices along `seq_axis`. None: the mesh shape does not say."""
        names, shape = cfg.mesh_axis_names, cfg.mesh_shape
        if names is not REQUIRED and self.config.seq_axis not in names:
            raise ValueError(
                error_message(
                    where=f"{_name(self)}.seq_axis",
                    what=f"the mesh has no axis {self.config.seq_axis!r}",
                    expected=f"one of {', '.join(names)}",
                )
            )
        if REQUIRED in (names, shape):
            return None
        index = list(names).index(self.config.seq_axis)
        is_hybrid = isinstance(shape, HybridMeshShape)
        shapes = [shape.ici_mesh_shape, shape.dcn_mesh_shape] if is_hybrid else [shape]
        num_devices = 1
        for part in shapes:
            if part[index] < 1:
                return None
            num_devices *= part[index]
        return num_devices

    def _check_attention(self, model: Any) -> None:
        where, found = _name(self), attention_configs(model)
        self_attention: list[MultiheadAttention.Config] = []
        for_each_self_attention(model, self_attention.append)
        problem = None
        if not found:
            problem = "the model has no attention layer"
        elif len(self_attention) < len(found):
            problem = "the model attends to another sequence (cross_attention)"
        else:
            other: Any = next((layer for layer in found if layer.klass not in _SAME_MATHS), None)
            problem = None if other is None else f"the model has {public_name(other.klass)}"
        if problem is not None:
            expected = f"self-attention by {' or '.join(public_name(cls) for cls in _SAME_MATHS)}"
            raise ValueError(error_message(where=where, what=problem, expected=expected))

    def _place(self, attention: Any) -> None:
        """Sets how the operands of a layer lie on the mesh."""
        own = self.config
        batch, heads, seq = own.batch_axis_names, own.head_axis_names, own.seq_axis
        key_seq = seq if own.method == ContextParallelMethod.RING else None
        queries = PartitionSpec(batch, seq, heads, None)
        attention.set(
            mha_dim_to_partition_spec={
                "btnh": queries,
                "bsnh": PartitionSpec(batch, key_seq, heads, None),
                "bnts": PartitionSpec(batch, heads, seq, key_seq),
            },
            output_dim_to_partition_spec={
                "btnh": queries,
                "bnts": PartitionSpec(batch, heads, seq, None),
            },
        )
