"""Several learners side by side, each with parameters of its own."""

from collections.abc import Callable, Sequence
from typing import Any, Optional

import jax

from axlearn.common.base_layer import ParameterSpec
from axlearn.common.config import REQUIRED, Required, config_class, error_message, nearest_names
from axlearn.common.learner._base import BaseLearner
from axlearn.common.learner._learner import Learner
from axlearn.common.module import Module, nowrap
from axlearn.common.optimizer_base import NestedOptParam, is_opt_param
from axlearn.common.update_transformation import Updates, mask_tree
from axlearn.common.utils import (
    Nested,
    NestedTensor,
    flatten_items,
    match_regex_rules,
    prune_empty,
    prune_tree,
    tree_paths,
)


class CompositeLearner(BaseLearner):
    """Gives each parameter to one of several learners. Its state is the dict of theirs, and `ema`."""

    @config_class
    class Config(BaseLearner.Config):
        """Configures CompositeLearner."""

        # The learners by name. None of them may be called "ema", or have averages on: this learner has them.
        # None may transform the forward pass, which is one for all.
        learners: Required[dict[str, Learner.Config]] = REQUIRED
        # Which learner has which parameter, by regular expressions for whole paths; the first that matches
        # counts. Every parameter must be somebody's, and every learner must have some.
        rules: Required[Sequence[tuple[str, str]]] = REQUIRED

    def __init__(self, cfg: Config, *, parent: Optional[Module]):
        super().__init__(cfg, parent=parent)
        self._check_config(cfg)
        self._learners = {
            name: self._add_child(name, learner_cfg) for name, learner_cfg in cfg.learners.items()
        }

    def _check_config(self, cfg: Config) -> None:
        """Raises ValueError for names that do not fit together."""
        for name, learner_cfg in cfg.learners.items():
            if name == "ema":
                raise ValueError(
                    error_message(
                        where=f"{self.path()}.learners",
                        what="a learner is called 'ema', as the averages in the state are",
                        advice="Give it another name",
                    )
                )
            ema_decay = getattr(learner_cfg.ema, "decay", None)
            if ema_decay is not None:
                raise ValueError(
                    error_message(
                        where=f"{self.path()}.learners[{name!r}].ema.decay",
                        what=f"{ema_decay!r} turns averages on in a part",
                        expected="None",
                        advice=f"Set {self.path()}.ema.decay instead, for all parameters",
                    )
                )
            if learner_cfg.forward_fn_transformation is not None:
                raise ValueError(
                    error_message(
                        where=f"{self.path()}.learners[{name!r}].forward_fn_transformation",
                        what="a part cannot transform the forward pass, which is one for all parts",
                        expected="None",
                        advice=f"Set {self.path()}.forward_fn_transformation instead",
                    )
                )
        for i, (_, name) in enumerate(cfg.rules):
            if name not in cfg.learners:
                raise ValueError(
                    error_message(
                        where=f"{self.path()}.rules[{i}]",
                        what=f"there is no learner {name!r}",
                        expected=f"one of {', '.join(cfg.learners)}",
                        nearest=nearest_names(name, list(cfg.learners))[:1],
                    )
                )

    def _learner_names(self, model_params: Nested[Any]) -> Nested[str]:
        """Whose each parameter is.

        Raises:
            ValueError: If a parameter is nobody's, or a learner has none.
        """
        rules = self.config.rules
        paths = tree_paths(model_params, is_leaf=is_opt_param)
        orphans = [path for path in jax.tree.leaves(paths) if match_regex_rules(path, rules=rules) is None]
        if orphans:
            raise ValueError(
                error_message(
                    where=f"{self.path()}.rules",
                    what=f"no rule matches {len(orphans)} parameters, the first of which is {orphans[0]!r}",
                    expected="a learner for every parameter",
                    advice="Append ('.*', NAME) to give the rest to one learner",
                )
            )
        names = jax.tree.map(lambda path: match_regex_rules(path, rules=rules), paths)
        unused = set(self._learners) - set(jax.tree.leaves(names))
        if unused:
            raise ValueError(
                error_message(
                    where=f"{self.path()}.learners[{min(unused)!r}]",
                    what="no rule gives it a parameter",
                    expected="some parameters for every learner",
                )
            )
        return names

    def _masks(self, model_params: Nested[Any]) -> dict[str, Nested[bool]]:
        """By name of learner, which parameters it has."""
        names = self._learner_names(model_params)
        return {name: jax.tree.map(lambda owner, name=name: owner == name, names) for name in self._learners}

    @nowrap
    def should_update_with_optimizers(self, model_params: Nested[Any]) -> Nested[bool]:
        """See BaseLearner."""
        return self._merged(model_params, lambda learner, own: learner.should_update_with_optimizers(own))

    @nowrap
    def gradient_is_new_value(self, model_params: Nested[Any]) -> Nested[bool]:
        """See BaseLearner."""
        return self._merged(model_params, lambda learner, own: learner.gradient_is_new_value(own))

    def _merged(
        self, model_params: Nested[Any], fn: Callable[[Any, Nested[Any]], Nested[bool]]
    ) -> Nested[bool]:
        """What `fn` says of each learner and its own parameters, put together."""
        result = jax.tree.map(lambda _: False, model_params, is_leaf=is_opt_param)
        for name, keep in self._masks(model_params).items():
            own = fn(self._learners[name], mask_tree(model_params, keep=keep))
            result = jax.tree.map(lambda kept, old, new: new if kept else old, keep, result, own)
        return result

    @nowrap
    def handles_undefined_loss(self) -> bool:
        """Whether training may go on after a loss that is not finite: only if no part minds."""
        return all(learner.handles_undefined_loss() for learner in self._learners.values())

    @nowrap
    def create_state_partition_specs(self, model_param_specs: Nested[ParameterSpec]) -> dict[str, Any]:
        """See LearnerModule."""
        masks = self._masks(model_param_specs)
        specs = {
            name: self._learners[name].create_state_partition_specs(mask_tree(model_param_specs, keep=keep))
            for name, keep in masks.items()
        }
        return {**specs, **self._ema_specs(model_param_specs)}

    def init(self, model_params: NestedOptParam) -> dict[str, Any]:
        """See LearnerModule."""
        states = {
            name: self._learners[name].init(mask_tree(model_params, keep=keep))
            for name, keep in self._masks(model_params).items()
        }
        return {**states, **self._init_ema(model_params)}

    def update(self, updates: Updates) -> NestedTensor:
        """See BaseLearner."""
        new_params = updates.param_values()
        for name, keep in self._masks(updates.opt_params).items():
            own = self._learners[name].update(_part_of(updates, keep))
            new_params = jax.tree.map(lambda kept, old, new: new if kept else old, keep, new_params, own)
        is_new_value = self.gradient_is_new_value(updates.opt_params)
        self._update_ema(new_params, is_new_value=is_new_value)
        return new_params


def _part_of(updates: Updates, keep: Nested[bool]) -> Updates:
    """The updates of some parameters. New values of what is no parameter stay in, for a part to refuse."""
    foreign = {path for path, kept in flatten_items(keep) if not kept}
    inplace_updates = prune_empty(prune_tree(updates.inplace_updates, lambda path, value: path in foreign))
    part = updates.mask(keep)
    return Updates(
        opt_params=part.opt_params,
        delta_updates=part.delta_updates,
        inplace_updates=inplace_updates,
        forward_pass=updates.forward_pass,
    )
