"""What happens between the backward pass and the new parameters, as modules with a state of their own."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from axlearn.common import schedule
from axlearn.common.base_layer import ParameterSpec
from axlearn.common.config import REQUIRED, ConfigOr, Required, config_class, error_message, maybe_instantiate
from axlearn.common.module import Module, OutputCollection, nowrap
from axlearn.common.optimizer_base import (
    NestedOptParam,
    OptStateSpec,
    PartitionedGradientTransformation,
    is_opt_param,
    opt_param_values,
)
from axlearn.common.utils import (
    Nested,
    NestedTensor,
    Tensor,
    flatten_items,
    match_regex_rules,
    set_recursively,
    tree_paths,
)


class ForwardOutputs(NamedTuple):
    """What a forward pass returns.

    Attributes:
        loss: The loss to differentiate, a scalar.
        aux: Anything else the model returns.
        output_collection: Summaries, and new values of parameters such as moving averages, as `functional`
            returns them.
        loss_weight: What the loss is a mean over, in number: a scalar, such as the count of live targets.
            Losses of several parts of a batch average by it to that of the batch. None: not known; parts
            count the same.
    """

    loss: Tensor
    aux: Nested[Any]
    output_collection: OutputCollection
    loss_weight: Optional[Tensor] = None


class BackwardOutputs(NamedTuple):
    """What a learner returns.

    Attributes:
        updated_params: The new parameters, a tree like the old ones.
    """

    updated_params: NestedTensor


class ForwardBackwardOutputs(NamedTuple):
    """What `Learner.forward_and_backward` returns."""

    forward_outputs: ForwardOutputs
    backward_outputs: BackwardOutputs


class ForwardFn(Protocol):
    """A forward pass: a pure function of the parameters and of what the trainer passes on."""

    def __call__(self, *, model_params: NestedTensor, inputs: Any) -> ForwardOutputs:
        """Runs the model."""


@dataclasses.dataclass(frozen=True)
class ForwardPass:
    """A forward pass that was run, for transformations that look at it or run it again.

    Attributes:
        forward_fn: The function.
        model_params: The parameters it was given.
        inputs: The inputs it was given.
        outputs: What it returned.
    """

    forward_fn: ForwardFn
    model_params: NestedTensor
    inputs: Any
    outputs: ForwardOutputs


def mask_tree(tree: Nested[Any], *, keep: Nested[bool], mask_value: Any = None) -> Nested[Any]:
    """Replaces parts of a tree.

    Args:
        tree: A tree.
        keep: A tree that is a prefix of `tree`: True where to keep what is there.
        mask_value: What to put where it is False; None takes the part out of the tree.

    Returns:
        A tree.
    """
    return jax.tree.map(lambda should_keep, part: part if should_keep else mask_value, keep, tree)


@dataclasses.dataclass(frozen=True)
class Updates:
    """What is about to change the parameters.

    Attributes:
        opt_params: The parameters; None where they are masked.
        delta_updates: What will be added to them, at first their gradients; None where they are masked.
        inplace_updates: New values of some of them, nested dicts with a part of the paths of `opt_params`;
            they win.
        forward_pass: The forward passes by name; the learner's is "default".
    """

    opt_params: NestedOptParam
    delta_updates: NestedTensor
    inplace_updates: NestedTensor = dataclasses.field(default_factory=dict)
    forward_pass: dict[str, ForwardPass] = dataclasses.field(default_factory=dict)

    def param_values(self) -> NestedTensor:
        """The values of the parameters."""
        return opt_param_values(self.opt_params)

    def param_specs(self) -> Nested[ParameterSpec]:
        """What is known of the parameters without their values; their place on the mesh is not."""
        return jax.tree.map(
            lambda param: ParameterSpec(
                shape=param.shape,
                dtype=param.dtype,
                factorization=param.factorization_spec,
                weight_decay_scale=param.weight_decay_scale,
            ),
            self.opt_params,
            is_leaf=is_opt_param,
        )

    def mask(
        self, keep: Nested[bool], *, fields: Sequence[str] = ("opt_params", "delta_updates")
    ) -> "Updates":
        """Puts None in place of some parameters.

        Args:
            keep: A tree like the parameters: which ones to keep.
            fields: Where to mask: `opt_params`, `delta_updates`, or both.

        Returns:
            The masked updates.
        """
        masked: dict[str, Any] = {name: mask_tree(getattr(self, name), keep=keep) for name in fields}
        return dataclasses.replace(self, **masked)


class LearnerModule(Module):
    """A module whose state is made from the parameters of a model, and lives on the mesh as they do."""

    @nowrap
    def create_state_partition_specs(self, model_param_specs: Nested[ParameterSpec]) -> Any:
        """Makes the specs of the state.

        Args:
            model_param_specs: The specs of the parameters; None where they are masked.

        Returns:
            A tree of OptStateSpec with the structure of the state.
        """
        raise NotImplementedError(type(self))

    def init(self, model_params: NestedOptParam) -> Any:
        """Makes the first state.

        Args:
            model_params: The parameters; None where they are masked.

        Returns:
            The state.
        """
        raise NotImplementedError(type(self))


class UpdateTransformation(LearnerModule):
    """Changes updates: an optimizer, or a part of one, that may look at the forward pass."""

    @nowrap
    def gradient_is_new_value(self, model_params: Nested[Any]) -> Nested[bool]:
        """Which parameters have their new value for a gradient; see `OverrideInplaceUpdateTransformation`.

        Args:
            model_params: A tree of OptParam or of ParameterSpec; None where they are masked.

        Returns:
            A tree of the same structure.
        """
        return jax.tree.map(lambda _: False, model_params, is_leaf=is_opt_param)

    def transform_update(self, updates: Updates) -> Updates:
        """Changes updates. The new state goes to the state updates of the context.

        Args:
            updates: The updates.

        Returns:
            The changed updates.
        """
        raise NotImplementedError(type(self))


class WrappedPartitionedGradientTransformation(UpdateTransformation):
    """A PartitionedGradientTransformation as a module; their states are the same."""

    @config_class
    class Config(UpdateTransformation.Config):
        """Configures WrappedPartitionedGradientTransformation."""

        # The transformation, or its config.
        transformation: Required[ConfigOr[PartitionedGradientTransformation]] = REQUIRED

    def __init__(self, cfg: Config, *, parent: Optional[Module]):
        super().__init__(cfg, parent=parent)
        self._transformation = maybe_instantiate(cfg.transformation)
        if not isinstance(self._transformation, PartitionedGradientTransformation):
            raise TypeError(
                error_message(
                    where=self.path(),
                    what=f"{type(self._transformation).__name__} is not an optimizer",
                    expected="a PartitionedGradientTransformation, or the config of one such as "
                    "config_for_function(optimizers.adamw_optimizer)",
                )
            )

    @nowrap
    def create_state_partition_specs(self, model_param_specs: Nested[ParameterSpec]) -> Any:
        """See LearnerModule."""
        return self._transformation.partition(model_param_specs)

    def init(self, model_params: NestedOptParam) -> Any:
        """See LearnerModule."""
        return self._transformation.init(model_params)

    def transform_update(self, updates: Updates) -> Updates:
        """See UpdateTransformation."""
        delta_updates, new_state = self._transformation.update(
            updates.delta_updates, self.state, updates.opt_params
        )
        # The state as a whole, since it is a tuple or a namedtuple more often than a dict.
        self.get_invocation_context().set_state_update(new_state)
        return dataclasses.replace(updates, delta_updates=delta_updates)


def as_update_transformation(cfg: Any) -> UpdateTransformation.Config:
    """The config of an UpdateTransformation that does what `cfg` says.

    Args:
        cfg: The config of an UpdateTransformation, or a PartitionedGradientTransformation, or the config of
            one.

    Returns:
        The config.
    """
    if isinstance(cfg, UpdateTransformation.Config):
        return cfg
    return WrappedPartitionedGradientTransformation.default_config().set(transformation=cfg)


class ConditionalUpdateTransformation(UpdateTransformation):
    """Lets another transformation act at some steps only.

    At the others it is as if it were not there: nothing of its state changes (counts included), its deltas
    change no bit of the parameters, and new values that it would put in place are those that are there. Its
    summaries are logged all the same. Logs `is_updated`.
    """

    @config_class
    class Config(UpdateTransformation.Config):
        """Configures ConditionalUpdateTransformation."""

        # What transforms the updates: an UpdateTransformation or a PartitionedGradientTransformation, or the
        # config of one.
        inner: Required[Any] = REQUIRED
        # The steps, counted from 1, at which it acts: those where the schedule is above 0.
        update_schedule: Required[ConfigOr[schedule.Schedule]] = REQUIRED

    def __init__(self, cfg: Config, *, parent: Optional[Module]):
        super().__init__(cfg, parent=parent)
        self._update_schedule = schedule.as_schedule_fn(cfg.update_schedule)
        self._add_child("inner", as_update_transformation(cfg.inner))

    @nowrap
    def gradient_is_new_value(self, model_params: Nested[Any]) -> Nested[bool]:
        """See UpdateTransformation."""
        return self.inner.gradient_is_new_value(model_params)

    @nowrap
    def create_state_partition_specs(self, model_param_specs: Nested[ParameterSpec]) -> Any:
        """See LearnerModule."""
        step = OptStateSpec(shape=(), dtype=jnp.int32, mesh_axes=PartitionSpec())
        return {"inner": self.inner.create_state_partition_specs(model_param_specs), "step": step}

    def init(self, model_params: NestedOptParam) -> Any:
        """See LearnerModule."""
        return {"inner": self.inner.init(model_params), "step": jnp.zeros([], jnp.int32)}

    def transform_update(self, updates: Updates) -> Updates:
        """See UpdateTransformation."""
        step = optax.safe_increment(self.state["step"])
        is_on = jnp.asarray(self._update_schedule(step)) > 0
        transformed = self.inner.transform_update(updates)
        context = self.get_invocation_context()
        new_inner = context.output_collection.state_updates["inner"]

        def choose(new: Tensor, old: Tensor) -> Tensor:
            return jnp.where(is_on, new, old)

        context.set_state_update(
            {"inner": jax.tree.map(choose, new_inner, self.state["inner"]), "step": step}
        )
        self.add_summary("is_updated", is_on.astype(jnp.float32))
        old_values = dict(flatten_items(updates.param_values())) | dict(
            flatten_items(updates.inplace_updates)
        )
        inplace_updates: dict[str, Any] = {}
        for path, new_value in flatten_items(transformed.inplace_updates):
            set_recursively(inplace_updates, value=choose(new_value, old_values[path]), path=path)
        return dataclasses.replace(
            transformed,
            # Minus zero is the number that changes nothing when added: -0.0 + 0.0 would be 0.0.
            delta_updates=jax.tree.map(lambda x: choose(x, -jnp.zeros_like(x)), transformed.delta_updates),
            inplace_updates=inplace_updates,
        )


class OverrideInplaceUpdateTransformation(UpdateTransformation):
    """For parameters whose "gradient" is their new value, such as the scales of float8 matrix products.

    Their new values become in-place updates; the inner transformation sees the other parameters only.
    """

    @config_class
    class Config(UpdateTransformation.Config):
        """Configures OverrideInplaceUpdateTransformation."""

        # What transforms the updates of all other parameters: an UpdateTransformation or a
        # PartitionedGradientTransformation, or the config of one.
        transformation: Required[Any] = REQUIRED
        # Regular expressions, each for whole paths of parameters whose gradient is their new value.
        rules: Required[Sequence[str]] = REQUIRED

    def __init__(self, cfg: Config, *, parent: Optional[Module]):
        super().__init__(cfg, parent=parent)
        self._add_child("transformation", as_update_transformation(cfg.transformation))

    def _is_inner(self, tree: Nested[Any]) -> Nested[bool]:
        """Which parameters go to the inner transformation."""
        rules = [(pattern, False) for pattern in self.config.rules]
        return jax.tree.map(
            lambda path: match_regex_rules(path, rules=rules, default_value=True),
            tree_paths(tree, is_leaf=is_opt_param),
        )

    @nowrap
    def gradient_is_new_value(self, model_params: Nested[Any]) -> Nested[bool]:
        """See UpdateTransformation."""
        keep = self._is_inner(model_params)
        inner = self.transformation.gradient_is_new_value(mask_tree(model_params, keep=keep))
        return jax.tree.map(lambda is_inner, new: not is_inner or new, keep, inner)

    @nowrap
    def create_state_partition_specs(self, model_param_specs: Nested[ParameterSpec]) -> Any:
        """See LearnerModule."""
        keep = self._is_inner(model_param_specs)
        return {
            "transformation": self.transformation.create_state_partition_specs(
                mask_tree(model_param_specs, keep=keep)
            )
        }

    def init(self, model_params: NestedOptParam) -> Any:
        """See LearnerModule."""
        keep = self._is_inner(model_params)
        return {"transformation": self.transformation.init(mask_tree(model_params, keep=keep))}

    def transform_update(self, updates: Updates) -> Updates:
        """See UpdateTransformation."""
        keep = self._is_inner(updates.opt_params)
        inplace_updates = jax.tree.map(lambda x: x, updates.inplace_updates)
        is_new_value = jax.tree.map(lambda is_inner: not is_inner, keep)
        for path, new_value in flatten_items(mask_tree(updates.delta_updates, keep=is_new_value)):
            set_recursively(inplace_updates, value=new_value, path=path)
        inner = self.transformation.transform_update(updates.mask(keep))
        return dataclasses.replace(inner, opt_params=updates.opt_params, inplace_updates=inplace_updates)
