"""Changes to a trainer's config that go with a kind of machine: what `mesh_rules` hold besides plain mesh shapes.

A path is what a dump prints before the colon, such as "model.decoder.transformer.layer". One that leads nowhere,
and a modifier that would change nothing, are errors.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

from axlearn.common.base_layer import RematSpec
from axlearn.common.config import (
    REQUIRED,
    ConfigBase,
    ConfigModifier,
    ConfigOr,
    InstantiableConfig,
    InvalidConfigValueError,
    PathError,
    Required,
    UnknownFieldError,
    config_class,
    config_for_function,
    error_message,
    maybe_instantiate,
    public_name,
    set_by,
    set_value_at,
    value_at,
    with_same_fields,
)
from axlearn.common.gradient_accumulation import with_minibatch_steps
from axlearn.common.metrics import MetricAccumulator
from axlearn.common.utils import (
    HybridMeshShape,
    MeshShape,
    replace_layer_config_recursively,
)


class GradientAccumulationModifier(ConfigModifier):
    """Works through each batch in several micro-batches, one after another.

    It replaces an accumulation that the config has already. See
    `axlearn.common.gradient_accumulation.with_minibatch_steps`.
    """

    @config_class
    class Config(ConfigModifier.Config):
        """Configures GradientAccumulationModifier."""

        # The number of micro-batches, at least 1; it must divide the rows of a batch.
        grad_acc_steps: Required[int] = REQUIRED
        # Combines the summaries of the micro-batches.
        metric_accumulator: InstantiableConfig = MetricAccumulator.default_config()

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        # Refuses a number of steps that cannot be, now and not when the learner is built.
        with_minibatch_steps(cfg.grad_acc_steps, cfg.metric_accumulator)

    def __call__(self, cfg: InstantiableConfig) -> InstantiableConfig:
        """Sets `learner.forward_fn_transformation`.

        Args:
            cfg: A trainer's config, changed in place.

        Returns:
            `cfg`.

        Raises:
            ValueError: If the learner has another transformation, which it would lose.
        """
        learner = _config_at(cfg, "learner", where=_name(self))
        transformation = config_for_function(with_minibatch_steps)
        old = learner.forward_fn_transformation  # type: ignore[attr-defined]
        if old is not None and type(old) is not type(transformation):
            raise ValueError(
                error_message(
                    where=f"{_name(self)}: learner.forward_fn_transformation",
                    what="another transformation is set, which would be lost",
                    expected=f"None, or {public_name(with_minibatch_steps)}",
                )
            )
        transformation.set(
            steps=self.config.grad_acc_steps, metric_accumulator=self.config.metric_accumulator
        )
        learner.set(forward_fn_transformation=transformation)
        return cfg


class RematSpecModifier(ConfigModifier):
    """Sets what layers keep for the backward pass."""

    @config_class
    class Config(ConfigModifier.Config):
        """Configures RematSpecModifier."""

        # The `remat_spec` of each layer, by the path of the layer's config; None: everything is kept.
        remat_policies: Required[dict[str, Optional[RematSpec]]] = REQUIRED

    def __call__(self, cfg: InstantiableConfig) -> InstantiableConfig:
        """Sets `<path>.remat_spec` for each path of a trainer's config, in place, and returns it."""
        _check_names_something(self.config.remat_policies, where=f"{_name(self)}.remat_policies")
        for path, remat_spec in self.config.remat_policies.items():
            where = f"{_name(self)}.remat_policies"
            layer = _config_at(cfg, path, where=where)
            _set(layer, "remat_spec", remat_spec, where=f"{where}: {path}")
        return cfg


class ScanChunkModifier(ConfigModifier):
    """Has the loss computed in chunks of positions, so that the logits of a batch never exist as a whole."""

    @config_class
    class Config(ConfigModifier.Config):
        """Configures ScanChunkModifier."""

        # Positions per chunk, a divisor of the sequence length; None: all at once. See `causal_lm.Model.Config`.
        scan_chunk: Required[Optional[int]] = REQUIRED

    def __call__(self, cfg: InstantiableConfig) -> InstantiableConfig:
        """Sets `model.scan_chunk` of a trainer's config, in place, and returns it."""
        model = _config_at(cfg, "model", where=_name(self))
        _set(model, "scan_chunk", self.config.scan_chunk, where=f"{_name(self)}: model")
        return cfg


class MeshShapeModifier(ConfigModifier):
    """Sets the shape of the mesh."""

    @config_class
    class Config(ConfigModifier.Config):
        """Configures MeshShapeModifier."""

        # The shape; None: the recipe has none for such machines, which is refused.
        mesh_shape: Required[Optional[Union[MeshShape, HybridMeshShape]]] = REQUIRED

    def __call__(self, cfg: InstantiableConfig) -> InstantiableConfig:
        """Sets `mesh_shape` of a trainer's config, in place, and returns it.

        Raises:
            ValueError: If there is no shape, or one of other axes.
        """
        shape, names = self.config.mesh_shape, cfg.mesh_axis_names
        if shape is None:
            raise ValueError(
                error_message(
                    where=f"{_name(self)}.mesh_shape",
                    what="the recipe has no mesh for such machines",
                    expected="a mesh shape",
                )
            )
        if names is not REQUIRED and len(shape) != len(names):
            raise ValueError(
                error_message(
                    where=f"{_name(self)}.mesh_shape",
                    what=f"{shape} has {len(shape)} axes",
                    expected=f"a size for each of the {len(names)} axes {tuple(names)}",
                )
            )
        _set(cfg, "mesh_shape", shape, where=_name(self))
        return cfg


class PartitionSpecModifier(ConfigModifier):
    """Sets how parameters and activations of layers lie on the mesh."""

    @config_class
    class Config(ConfigModifier.Config):
        """Configures PartitionSpecModifier."""

        # By the path of a layer's config: fields such as `param_partition_spec`, and their values.
        partition_specs: Required[dict[str, dict[str, Any]]] = REQUIRED

    def __call__(self, cfg: InstantiableConfig) -> InstantiableConfig:
        """Sets `<path>.<field>` for each path and field of a trainer's config, in place, and returns it."""
        where = f"{_name(self)}.partition_specs"
        _check_names_something(self.config.partition_specs, where=where)
        for path, fields in self.config.partition_specs.items():
            _check_names_something(fields, where=f"{where}[{path!r}]")
            layer = _config_at(cfg, path, where=where)
            for field, spec in fields.items():
                _set(layer, field, spec, where=f"{where}: {path}")
        return cfg


class ModuleConfigModifier(ConfigModifier):
    """Puts another module in the place of one, with the values of the fields that both have."""

    @config_class
    class Config(ConfigModifier.Config):
        """Configures ModuleConfigModifier."""

        # The path of the config to replace, ending in the name of a field.
        target_config: Required[str] = REQUIRED
        # The config that comes in its place. Where the old one has a field of the same name, the old one's
        # value counts, but for `klass`.
        modification: Required[InstantiableConfig] = REQUIRED

    def __call__(self, cfg: InstantiableConfig) -> InstantiableConfig:
        """Replaces the config at `target_config` in a trainer's config, in place, and returns it."""
        where = f"{_name(self)}.target_config"
        path = self.config.target_config
        old = _config_at(cfg, path, where=where)
        try:
            set_value_at(cfg, path, with_same_fields(self.config.modification, old=old))
        except InvalidConfigValueError as e:
            raise InvalidConfigValueError(f"{where}: {path}: {e}") from e
        return cfg


class ReplaceLayerConfigModifier(ConfigModifier):
    """Replaces all layers of a class, wherever in the trainer's config they are.

    See `axlearn.common.utils.replace_layer_config_recursively`.
    """

    @config_class
    class Config(ConfigModifier.Config):
        """Configures ReplaceLayerConfigModifier."""

        # The class of the layers to replace.
        target_cls: Required[type] = REQUIRED
        # What comes in their place, with the values of the fields that both have.
        source_config: Required[InstantiableConfig] = REQUIRED
        # Fields whose values are those of `source_config` all the same. None: only `klass`.
        exclude_keys: Optional[Sequence[str]] = None

    def __call__(self, cfg: InstantiableConfig) -> InstantiableConfig:
        """Replaces the layers of a trainer's config, in place, and returns it.

        Args:
            cfg: A trainer's config.

        Raises:
            ValueError: If there is no such layer.
        """
        own = self.config
        # The rules, of which this may be one, are no part of what is trained.
        mesh_rules = cfg.mesh_rules
        cfg.mesh_rules = None
        try:
            count = replace_layer_config_recursively(
                cfg,
                target_cls=own.target_cls,
                source_config=own.source_config,
                exclude_keys=own.exclude_keys,
            )
        finally:
            cfg.mesh_rules = mesh_rules
        if count == 0:
            raise ValueError(
                error_message(
                    where=f"{_name(self)}.target_cls",
                    what=f"the config has no {public_name(own.target_cls)}",
                    expected="the class of at least one layer",
                )
            )
        return cfg


class ChainConfigModifier(ConfigModifier):
    """Applies several modifiers, one after another."""

    @config_class
    class Config(ConfigModifier.Config):
        """Configures ChainConfigModifier."""

        # The modifiers, or their configs, in order.
        config_modifiers: Required[Sequence[ConfigOr[ConfigModifier]]] = REQUIRED

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        self._modifiers = [maybe_instantiate(modifier) for modifier in cfg.config_modifiers]

    def __call__(self, cfg: InstantiableConfig) -> InstantiableConfig:
        """Applies the modifiers to a trainer's config, in place, and returns what the last one returns."""
        for i, modifier in enumerate(self._modifiers):
            element = f"config_modifiers[{i}] ({_name(modifier)})"
            try:
                with set_by(element):
                    cfg = modifier(cfg)
            except Exception as e:
                e.add_note(f"While applying {element}")
                raise
            if not isinstance(cfg, ConfigBase):
                raise TypeError(
                    error_message(
                        where=f"{_name(self)}.{element}",
                        what=f"it returned {cfg!r}",
                        expected="the changed trainer config",
                    )
                )
        return cfg


def _name(modifier: ConfigModifier) -> str:
    return type(modifier).__name__


def _check_names_something(named: Mapping[str, Any], *, where: str) -> None:
    if not named:
        raise ValueError(
            error_message(where=where, what="it is empty, so it would change nothing", expected="an entry")
        )


def _config_at(cfg: ConfigBase, path: str, *, where: str) -> ConfigBase:
    """The config at a path; raises ValueError where there is none."""
    try:
        found = value_at(cfg, path, closed=("mesh_rules",))
    except PathError as e:
        raise ValueError(f"{where}: {e}") from e
    if not isinstance(found, ConfigBase):
        raise ValueError(
            error_message(
                where=f"{where}: {path}", what=f"{found!r} is no config", expected="a module's config"
            )
        )
    return found


def _set(cfg: ConfigBase, field: str, value: Any, *, where: str) -> None:
    """Sets a field; one that is not there, or does not take the value, is an error that says where."""
    try:
        cfg.set(**{field: value})
    except (InvalidConfigValueError, UnknownFieldError) as e:
        kind = ValueError if isinstance(e, UnknownFieldError) else InvalidConfigValueError
        raise kind(f"{where}: {e}") from e
