"""The learner of one optimizer."""

from collections.abc import Sequence
from typing import Any, Optional, Union

import jax
import jax.numpy as jnp

from axlearn.common.base_layer import ParameterSpec
from axlearn.common.config import (
    REQUIRED,
    ConfigOr,
    Required,
    config_class,
    error_message,
    nearest_names,
)
from axlearn.common.learner._base import BaseLearner, UpdateType
from axlearn.common.learner._summaries import add_per_variable_summaries
from axlearn.common.module import Module, nowrap
from axlearn.common.optimizer_base import NestedOptParam, PartitionedGradientTransformation, is_opt_param
from axlearn.common.update_transformation import (
    Updates,
    as_update_transformation,
    mask_tree,
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


class Learner(BaseLearner):
    """Updates parameters by one optimizer, and by the new values that the forward pass computes.

    Its state is `{"optimizer": ..., "ema": ...}`, where `ema` is there only if averages are on. A parameter
    that the optimizer does not see has None in the optimizer's state. Each step logs what the optimizer logs,
    below "optimizer".
    """

    @config_class
    class Config(BaseLearner.Config):
        """Configures Learner."""

        # The optimizer: a PartitionedGradientTransformation or an UpdateTransformation, or the config of one.
        optimizer: Required[ConfigOr[PartitionedGradientTransformation]] = REQUIRED
        # What may change which parameter, by regular expressions for whole paths such as "decoder/emb/.*".
        # The first that matches counts; where none does, ALL_UPDATES. A rule that decides nothing is an
        # error.
        update_rules: Sequence[tuple[str, UpdateType]] = []
        # Whether to log `param_rms/<path>` and `grad_rms/<path>` of each parameter that is optimized. A list
        # of prefixes of paths: only of parameters below these, and `grad_norm/<prefix>` of all of them
        # together.
        enable_per_variable_summaries: Union[bool, Sequence[str]] = False
        # Whether a loss that is not finite is no reason to stop, because the optimizer leaves such steps out.
        # None: no.
        ignore_undefined_loss: Optional[bool] = None

    def __init__(self, cfg: Config, *, parent: Optional[Module]):
        super().__init__(cfg, parent=parent)
        self._add_child("optimizer", as_update_transformation(cfg.optimizer))

    @nowrap
    def handles_undefined_loss(self) -> bool:
        """Whether training may go on after a loss that is not finite."""
        return bool(self.config.ignore_undefined_loss)

    def _update_types(self, model_params: Nested[Any]) -> Nested[UpdateType]:
        """What may change each parameter."""
        return jax.tree.map(
            lambda path: match_regex_rules(
                path, rules=self.config.update_rules, default_value=UpdateType.ALL_UPDATES
            ),
            tree_paths(model_params, is_leaf=is_opt_param),
        )

    def _check_update_rules(self, model_params: Nested[Any]) -> None:
        """Raises ValueError for a rule that decides nothing."""
        rules = self.config.update_rules
        paths = [path for path, _ in flatten_items(model_params, is_leaf=is_opt_param)]
        indexed = [(pattern, i) for i, (pattern, _) in enumerate(rules)]
        used = {match_regex_rules(path, rules=indexed) for path in paths}
        for pattern, i in indexed:
            if i not in used:
                raise ValueError(
                    error_message(
                        where=f"{self.path()}.update_rules[{i}]",
                        what=f"{pattern!r} decides for no parameter",
                        expected="a regular expression that matches the whole path of at least one of the "
                        f"{len(paths)} parameters, which no rule before it matches",
                        nearest=nearest_names(pattern, paths)[:3],
                    )
                )

    @nowrap
    def should_update_with_optimizers(self, model_params: Nested[Any]) -> Nested[bool]:
        """See BaseLearner. Parameters that are not floats change by the forward pass only."""

        def should_update(update_type: UpdateType, param: Any) -> bool:
            is_float = param.dtype is None or jnp.issubdtype(param.dtype, jnp.floating)
            return update_type.takes_optimizer() and bool(is_float)

        return jax.tree.map(should_update, self._update_types(model_params), model_params)

    @nowrap
    def gradient_is_new_value(self, model_params: Nested[Any]) -> Nested[bool]:
        """See BaseLearner."""
        return self.optimizer.gradient_is_new_value(model_params)

    @nowrap
    def create_state_partition_specs(self, model_param_specs: Nested[ParameterSpec]) -> dict[str, Any]:
        """See LearnerModule."""
        self._check_update_rules(model_param_specs)
        optimized = mask_tree(model_param_specs, keep=self.should_update_with_optimizers(model_param_specs))
        return {
            "optimizer": self.optimizer.create_state_partition_specs(optimized),
            **self._ema_specs(model_param_specs),
        }

    def init(self, model_params: NestedOptParam) -> dict[str, Any]:
        """See LearnerModule."""
        self._check_update_rules(model_params)
        optimized = mask_tree(model_params, keep=self.should_update_with_optimizers(model_params))
        return {"optimizer": self.optimizer.init(optimized), **self._init_ema(model_params)}

    def update(self, updates: Updates) -> NestedTensor:
        """See BaseLearner."""
        optimized = updates.mask(self.should_update_with_optimizers(updates.opt_params))
        is_new_value = self.gradient_is_new_value(updates.opt_params)
        add_per_variable_summaries(
            optimized.mask(jax.tree.map(lambda is_new: not is_new, is_new_value)),
            prefixes=self.config.enable_per_variable_summaries,
        )
        transformed = self.optimizer.transform_update(optimized)
        new_params = _add_deltas(updates.param_values(), transformed.delta_updates)
        new_params = self._with_inplace_updates(new_params, transformed.inplace_updates)
        self._update_ema(new_params, is_new_value=is_new_value)
        return new_params

    def _with_inplace_updates(self, old_params: NestedTensor, inplace_updates: NestedTensor) -> NestedTensor:
        """A copy of the parameters with the new values that the update rules admit."""
        params: Any = jax.tree.map(lambda x: x, old_params)
        values = dict(flatten_items(params))
        update_types = dict(flatten_items(self._update_types(params)))
        for path, new_value in flatten_items(inplace_updates):
            if path not in values:
                raise ValueError(
                    error_message(
                        where=self.path(),
                        what=f"the forward pass has a new value for {path!r}, which is not a parameter",
                        nearest=nearest_names(path, list(values))[:3],
                        advice="Declare it in _create_layer_parameter_specs of its layer",
                    )
                )
            if update_types[path].takes_state_updates():
                new_value = new_value.astype(values[path].dtype)
                set_recursively(params, value=new_value, path=path)
        return params


def _add_deltas(values: NestedTensor, deltas: NestedTensor) -> NestedTensor:
    """`values + deltas` in the type of `values`, which stay where the delta is None."""

    def add(value: Tensor, delta: Optional[Tensor]) -> Tensor:
        return value if delta is None else (value + delta).astype(value.dtype)

    return jax.tree.map(add, values, deltas)
