"""What all learners do: differentiate a forward pass, and keep an average of the parameters."""

import enum
from collections.abc import Callable
from typing import Any, Optional

import jax

from axlearn.common.base_layer import ParameterSpec
from axlearn.common.config import (
    ConfigOr,
    InstantiableConfig,
    config_class,
    config_for_function,
    maybe_instantiate,
)
from axlearn.common.gradient_accumulation import MinibatchSteps
from axlearn.common.module import Module, nowrap
from axlearn.common.optimizer_base import (
    NestedOptParam,
    OptParam,
    PartitionedGradientTransformation,
    opt_param_values,
)
from axlearn.common.optimizers import param_ema
from axlearn.common.update_transformation import (
    BackwardOutputs,
    ForwardBackwardOutputs,
    ForwardFn,
    ForwardOutputs,
    ForwardPass,
    LearnerModule,
    Updates,
    mask_tree,
)
from axlearn.common.utils import Nested, NestedTensor, Tensor


class UpdateType(enum.Enum):
    """What may change a parameter.

    NO_UPDATE: nothing. OPTIMIZERS: its gradient. STATE_UPDATES: the new values that the forward pass computes,
    such as moving averages of a normalization. ALL_UPDATES: both; new values win.
    """

    NO_UPDATE = "no_update"
    OPTIMIZERS = "optimizers"
    STATE_UPDATES = "state_updates"
    ALL_UPDATES = "all_updates"

    def takes_optimizer(self) -> bool:
        """Whether the optimizer sees the parameter."""
        return self in (UpdateType.OPTIMIZERS, UpdateType.ALL_UPDATES)

    def takes_state_updates(self) -> bool:
        """Whether new values from the forward pass count."""
        return self in (UpdateType.STATE_UPDATES, UpdateType.ALL_UPDATES)


class BaseLearner(LearnerModule):
    """The base of learners. Their state is a dict: `ema`, where averages are on, and what subclasses add."""

    @config_class
    class Config(LearnerModule.Config):
        """Configures BaseLearner."""

        # The moving average of the parameters; it is on where its `decay` is set. None: off.
        ema: Optional[InstantiableConfig] = config_for_function(param_ema)
        # From the forward pass to the one that is differentiated, for example in several small batches
        # (`gradient_accumulation.with_minibatch_steps`). None: the same.
        forward_fn_transformation: Optional[ConfigOr[Callable[[ForwardFn], ForwardFn]]] = None

    def __init__(self, cfg: Config, *, parent: Optional[Module]):
        super().__init__(cfg, parent=parent)
        is_on = cfg.ema is not None and getattr(cfg.ema, "decay", None) is not None
        self._ema: Optional[PartitionedGradientTransformation] = maybe_instantiate(cfg.ema) if is_on else None
        self._forward_fn_transformation: Optional[Callable[[ForwardFn], ForwardFn]] = maybe_instantiate(
            cfg.forward_fn_transformation
        )

    # For subclasses.

    @nowrap
    def should_update_with_optimizers(self, model_params: Nested[Any]) -> Nested[bool]:
        """Which parameters an optimizer sees.

        Args:
            model_params: A tree of OptParam or of ParameterSpec; None where they are masked.

        Returns:
            A tree of the same structure.
        """
        raise NotImplementedError(type(self))

    @nowrap
    def gradient_is_new_value(self, model_params: Nested[Any]) -> Nested[bool]:
        """Which parameters have their new value for a gradient, such as the scales of float8 products.

        Args:
            model_params: A tree of OptParam or of ParameterSpec; None where they are masked.

        Returns:
            A tree of the same structure.
        """
        raise NotImplementedError(type(self))

    def update(self, updates: Updates) -> NestedTensor:
        """Applies updates. New states go to the state updates of the context.

        Args:
            updates: The updates, the gradients as its `delta_updates`.

        Returns:
            The new parameters; None where they are masked.
        """
        raise NotImplementedError(type(self))

    # What is the same for all.

    @nowrap
    def check_input_batch(self, input_batch: Nested[Any]) -> None:
        """Refuses a batch that the transformation of the forward pass cannot work with, from its shapes.

        Args:
            input_batch: The shapes of a global batch.

        Raises:
            ValueError: If it cannot.
        """
        if isinstance(self._forward_fn_transformation, MinibatchSteps):
            where = f"{self.path()}.forward_fn_transformation.steps"
            self._forward_fn_transformation.check_input_batch(input_batch, where=where)

    def _ema_specs(self, model_param_specs: Nested[ParameterSpec]) -> dict[str, Any]:
        return {} if self._ema is None else {"ema": self._ema.partition(model_param_specs)}

    def _init_ema(self, model_params: NestedOptParam) -> dict[str, Any]:
        return {} if self._ema is None else {"ema": self._ema.init(model_params)}

    def _update_ema(self, new_params: NestedTensor, *, is_new_value: Nested[bool]) -> None:
        """Moves the averages on. Of parameters with `is_new_value` the latest value counts: scales that lag behind
        the weights would cut them off.
        """
        if self._ema is None:
            return
        _, new_ema = self._ema.update({}, self.state["ema"], jax.tree.map(OptParam, new_params))
        if any(jax.tree.leaves(is_new_value)):
            averages = jax.tree.map(
                lambda is_new, latest, average: latest.astype(average.dtype) if is_new else average,
                is_new_value,
                new_params,
                new_ema.ema,
            )
            new_ema = new_ema._replace(ema=averages)
        self.add_state_update("ema", new_ema)

    def forward_and_backward(
        self, *, fn: ForwardFn, inputs: Any, opt_params: NestedOptParam
    ) -> ForwardBackwardOutputs:
        """Runs a forward pass, differentiates its loss, and updates the parameters.

        New states go to the state updates of the context, which `functional` returns.

        Args:
            fn: The forward pass, called as `fn(model_params=..., inputs=...)`.
            inputs: Goes to `fn`.
            opt_params: The parameters. Those that no optimizer sees are not differentiated.

        Returns:
            What `fn` returned, and the new parameters.

        Raises:
            ValueError: If the forward pass has a new value for something that is no parameter.
        """
        if isinstance(self._forward_fn_transformation, MinibatchSteps):
            fn = self._forward_fn_transformation(fn, is_new_value=self.gradient_is_new_value(opt_params))
        elif self._forward_fn_transformation is not None:
            fn = self._forward_fn_transformation(fn)
        values = opt_param_values(opt_params)
        should_optimize = self.should_update_with_optimizers(opt_params)

        def loss_fn(optimized: NestedTensor) -> tuple[Tensor, ForwardOutputs]:
            model_params = jax.tree.map(
                lambda is_optimized, new, old: new if is_optimized else old,
                should_optimize,
                optimized,
                values,
            )
            outputs = fn(model_params=model_params, inputs=inputs)
            return outputs.loss, outputs

        grads, outputs = jax.grad(loss_fn, has_aux=True)(mask_tree(values, keep=should_optimize))
        forward_pass = ForwardPass(forward_fn=fn, model_params=values, inputs=inputs, outputs=outputs)
        updated_params = self.update(
            Updates(
                opt_params=opt_params,
                delta_updates=grads,
                inplace_updates=outputs.output_collection.state_updates,
                forward_pass={"default": forward_pass},
            )
        )
        return ForwardBackwardOutputs(
            forward_outputs=outputs, backward_outputs=BackwardOutputs(updated_params=updated_params)
        )
