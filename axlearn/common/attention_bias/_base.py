"""What every attention bias offers, and how biases compose."""

import abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Optional, TypeVar, Union

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from axlearn.common.config import error_message

# Added to the logits of pairs that must not attend. Finite, so that a row with nothing to attend to
# gives a uniform softmax and no NaN; so large that exp underflows to zero beside any visible key.
NEG_INF = -1e15

B = TypeVar("B", bound="BaseAttentionBias")


def bool_to_bias(mask: Bool[Array, "*shape"], *, dtype: Any = jnp.float32) -> Float[Array, "*shape"]:
    """Turns a mask into a bias: 0 where True, `NEG_INF` where False.

    Args:
        mask: True where attention is allowed.
        dtype: Floating dtype of the result. In one that cannot hold `NEG_INF` (float16) its lowest finite
            number stands in.

    Returns:
        The bias, shaped like `mask`.
    """
    lowest = max(NEG_INF, float(jnp.finfo(dtype).min))
    return jnp.where(mask, 0.0, lowest).astype(dtype)


def bias_pytree(*, data_fields: Sequence[str]) -> Callable[[type[B]], type[B]]:
    """Registers a frozen dataclass as a pytree whose children are `data_fields`, the other fields static.

    Unflattening goes around `__init__`: jax puts specs, sentinels and shapes where arrays were.
    """

    def register(cls: type[B]) -> type[B]:
        names = [field.name for field in dataclasses.fields(cls)]
        static_fields = [name for name in names if name not in data_fields]

        def flatten_with_keys(bias: B) -> tuple[list, tuple]:
            children = [(jax.tree_util.GetAttrKey(name), getattr(bias, name)) for name in data_fields]
            return children, tuple(getattr(bias, name) for name in static_fields)

        def unflatten(static: tuple, children: Iterable[Any]) -> B:
            bias = object.__new__(cls)
            pairs = [*zip(static_fields, static, strict=True), *zip(data_fields, children, strict=True)]
            for name, value in pairs:
                object.__setattr__(bias, name, value)
            return bias

        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten)
        return cls

    return register


class LogitAxes(NamedTuple):
    """The mesh axes that split each dim of the logits: entries of a partition spec."""

    batch: Any
    heads: Any
    target: Any
    source: Any


def spec_of(array: Any, *entries: Any) -> PartitionSpec:
    """The partition spec of an array that is broadcast along its dims of size 1, which nothing can split."""
    return PartitionSpec(
        *(None if size == 1 else entry for size, entry in zip(array.shape, entries, strict=True))
    )


@dataclasses.dataclass(frozen=True)
class BaseAttentionBias(abc.ABC):
    """What is added to the logits `[batch, heads, target, source]` of an attention, made when asked for.

    A bias is a pytree of small arrays (positions, segment ids) plus static data (a mask function). A backend
    that knows its kind can use those; any other calls `value()` and gets the matrix.
    """

    # Floating dtype of `value()`.
    dtype: Any = dataclasses.field(default=jnp.float32, kw_only=True)

    @abc.abstractmethod
    def value(self) -> Optional[Float[Array, "#batch #heads #target #source"]]:
        """The bias as an array that broadcasts against the logits, or None if nothing is to be added."""

    def has_value(self) -> bool:
        """Whether `value()` is an array. Decided without computing it."""
        return True

    def eval_shape(self) -> Optional[tuple[int, ...]]:
        """The shape of `value()` without computing it; None if there is no value."""
        spec = jax.eval_shape(lambda bias: bias.value(), self)
        return None if spec is None else tuple(spec.shape)

    def astype(self: B, dtype: Any) -> B:
        """The same bias whose `value()` has the given floating dtype."""
        return dataclasses.replace(self, dtype=dtype)

    def partition_spec(self: B, mha_dim_to_partition_spec: Mapping[str, PartitionSpec]) -> B:
        """How the arrays that this bias is made from lie on the mesh, given how the logits do.

        Args:
            mha_dim_to_partition_spec: At "bnts" the partition spec of the logits
                `[batch, heads, target, source]`; other keys do not matter.

        Returns:
            A bias with a `PartitionSpec` in the place of each array: what `shard_map` takes as the `in_specs`
            of this bias. Inside, `value()` is the part of the bias that belongs to the local logits.

        Raises:
            ValueError: If there is no "bnts", or if parts of the arrays cannot make the parts of the bias.
        """
        if "bnts" not in mha_dim_to_partition_spec:
            raise ValueError(
                error_message(
                    what=f"a partition spec for {sorted(mha_dim_to_partition_spec)}",
                    expected="one for the logits, 'bnts'",
                )
            )
        logits_spec = tuple(mha_dim_to_partition_spec["bnts"])
        return self._partition_spec(LogitAxes(*logits_spec, *(None,) * (4 - len(logits_spec))))

    @abc.abstractmethod
    def _partition_spec(self: B, axes: "LogitAxes") -> B:
        """See `partition_spec`."""

    def leaves(self) -> tuple["BaseAttentionBias", ...]:
        """The biases that this one is the sum of; itself if it is not composed."""
        return (self,)

    def __add__(self, other: "BaseAttentionBias") -> "BaseAttentionBias":
        """The lazy sum of two biases."""
        if not isinstance(other, BaseAttentionBias):
            return NotImplemented
        summands = [bias for bias in (*self.leaves(), *other.leaves()) if bias.has_value()]
        if not summands:
            return ZeroAttentionBias(dtype=self.dtype)
        return (
            summands[0] if len(summands) == 1 else CompositeAttentionBias(tuple(summands), dtype=self.dtype)
        )

    def bias_and_residual(self, cls: type[B]) -> tuple[Optional[B], "BaseAttentionBias"]:
        """Takes the one summand of class `cls` out.

        Args:
            cls: The class to look for; subclasses count.

        Returns:
            The summand, or None if there is none, and the sum of all others.

        Raises:
            ValueError: If there are several: add them up first, or use `split`.
        """
        *found, residual = split(self, cls)
        summands = [bias for bias in found[0].leaves() if bias.has_value()]
        if len(summands) > 1:
            raise ValueError(
                error_message(
                    what=f"{len(summands)} summands are {cls.__name__}",
                    expected="at most one",
                    advice="Add them up first, or use split",
                )
            )
        return (summands[0] if summands else None), residual  # type: ignore[return-value]


@bias_pytree(data_fields=())
@dataclasses.dataclass(frozen=True)
class ZeroAttentionBias(BaseAttentionBias):
    """Adds nothing: the neutral element of `+`."""

    def value(self) -> None:
        """None. See `BaseAttentionBias.value`."""

    def has_value(self) -> bool:
        """False."""
        return False

    def _partition_spec(self, axes: LogitAxes) -> "ZeroAttentionBias":
        return self


@dataclasses.dataclass(frozen=True)
class BoolAttentionBias(BaseAttentionBias):
    """A bias that allows or forbids, and prefers nothing."""

    @abc.abstractmethod
    def bool_value(self) -> Bool[Array, "#batch #heads #target #source"]:
        """True where attention is allowed; broadcasts against the logits."""

    def value(self) -> Optional[Float[Array, "#batch #heads #target #source"]]:
        """See `BaseAttentionBias.value`."""
        return bool_to_bias(self.bool_value(), dtype=self.dtype)


@bias_pytree(data_fields=("biases",))
@dataclasses.dataclass(frozen=True)
class CompositeAttentionBias(BaseAttentionBias):
    """The sum of several biases."""

    biases: tuple[BaseAttentionBias, ...]

    def value(self) -> Optional[Float[Array, "#batch #heads #target #source"]]:
        """The sum. Masks are joined as booleans first, so that twice forbidden is not twice as negative."""
        summands = self.leaves()
        masks = [bias.bool_value() for bias in summands if isinstance(bias, BoolAttentionBias)]
        values = [bias.value() for bias in summands if not isinstance(bias, BoolAttentionBias)]
        total = None
        if masks:
            allowed = masks[0]
            for mask in masks[1:]:
                allowed = allowed & mask
            total = bool_to_bias(allowed, dtype=self.dtype)
        for value in values:
            if value is not None:
                value = value.astype(self.dtype)
                total = value if total is None else total + value
        return total

    def has_value(self) -> bool:
        """Whether any summand has a value."""
        return any(bias.has_value() for bias in self.biases)

    def _partition_spec(self, axes: LogitAxes) -> "CompositeAttentionBias":
        return dataclasses.replace(self, biases=tuple(bias._partition_spec(axes) for bias in self.biases))

    def leaves(self) -> tuple[BaseAttentionBias, ...]:
        """See `BaseAttentionBias.leaves`."""
        return tuple(leaf for bias in self.biases for leaf in bias.leaves())


def split(bias: BaseAttentionBias, *classes: type[BaseAttentionBias]) -> tuple[BaseAttentionBias, ...]:
    """Sorts the summands of a bias by class.

    Args:
        bias: Any bias.
        classes: Classes to sort by; a summand goes to the first that it is an instance of.

    Returns:
        One bias for each class, in order, and last the sum of what belongs to none.
    """
    bins: list[BaseAttentionBias] = [ZeroAttentionBias(dtype=bias.dtype) for _ in range(len(classes) + 1)]
    for summand in bias.leaves():
        matches = (i for i, cls in enumerate(classes) if isinstance(summand, cls))
        index = next(matches, len(classes))
        bins[index] = bins[index] + summand
    return tuple(bins)


def as_attention_bias(bias: Union[jax.Array, BaseAttentionBias, None]) -> BaseAttentionBias:
    """Accepts what users pass as logit biases: None, a floating array of rank 2 to 4, or a bias.

    Raises:
        TypeError: If an array is not floating: it may be a mask, which is not meant to be added.
        ValueError: If an array has another rank.
    """
    if bias is None:
        return ZeroAttentionBias()
    if isinstance(bias, BaseAttentionBias):
        return bias
    if not jnp.issubdtype(bias.dtype, jnp.floating):
        raise TypeError(
            error_message(
                what=f"an attention bias of {bias.dtype}",
                expected="a floating array, which is added to the logits",
                advice="Wrap a mask (True: may attend) by BoolTensorAttentionBias.from_tensor",
            )
        )
    return TensorAttentionBias.from_tensor(bias)


@bias_pytree(data_fields=("tensor",))
@dataclasses.dataclass(frozen=True)
class TensorAttentionBias(BaseAttentionBias):
    """A bias given as an array."""

    # The bias [batch or 1, heads or 1, target or 1, source or 1], floating.
    tensor: Any

    @classmethod
    def from_tensor(cls, tensor: Float[Array, "*dims"]) -> "TensorAttentionBias":
        """Wraps `[target, source]`, `[batch, target, source]` or `[batch, heads, target, source]`."""
        return cls(to_rank_4(tensor))

    def value(self) -> Optional[Float[Array, "#batch #heads #target #source"]]:
        """See `BaseAttentionBias.value`."""
        return self.tensor.astype(self.dtype)

    def _partition_spec(self, axes: LogitAxes) -> "TensorAttentionBias":
        return dataclasses.replace(self, tensor=spec_of(self.tensor, *axes))


@bias_pytree(data_fields=("tensor",))
@dataclasses.dataclass(frozen=True)
class BoolTensorAttentionBias(BoolAttentionBias):
    """A mask given as an array."""

    # True where attention is allowed: [batch or 1, heads or 1, target or 1, source or 1], bool.
    tensor: Any

    @classmethod
    def from_tensor(cls, tensor: Bool[Array, "*dims"]) -> "BoolTensorAttentionBias":
        """Wraps `[target, source]`, `[batch, target, source]` or `[batch, heads, target, source]`."""
        return cls(to_rank_4(tensor))

    def bool_value(self) -> Bool[Array, "#batch #heads #target #source"]:
        """See `BoolAttentionBias.bool_value`."""
        return self.tensor

    def _partition_spec(self, axes: LogitAxes) -> "BoolTensorAttentionBias":
        return dataclasses.replace(self, tensor=spec_of(self.tensor, *axes))


def to_rank_4(tensor: jax.Array) -> jax.Array:
    """Puts in the batch and head dims that a bias of rank 2 or 3 lacks."""
    if tensor.ndim == 4:
        return tensor
    if tensor.ndim == 3:
        return tensor[:, None]
    if tensor.ndim == 2:
        return tensor[None, None]
    raise ValueError(
        error_message(
            what=f"an attention bias of shape {tensor.shape}",
            expected="[target, source], [batch, target, source] or [batch, heads, target, source]",
        )
    )
