"""Training in float8."""

from typing import Any

from axlearn.common.config import (
    REQUIRED,
    ConfigBase,
    ConfigModifier,
    InstantiableConfig,
    Required,
    config_class,
    error_message,
)
from axlearn.common.layers import for_each_config
from axlearn.common.learner import CompositeLearner
from axlearn.common.quantized_dot_general import (
    DenseGeneralBaseLayer,
    DotGeneralQuantizationType,
    QuantizedDotGeneral,
    get_all_fp8_param_names,
)
from axlearn.common.update_transformation import OverrideInplaceUpdateTransformation


class FP8ConfigModifier(ConfigModifier):
    """Lets all dense layers of the model multiply in float8 with delayed scaling. See `docs/quantization.md`.

    The optimizer is told not to touch the scales and histories that come with it.
    """

    @config_class
    class Config(ConfigModifier.Config):
        """Configures FP8ConfigModifier."""

        # Over how many steps the largest absolute values are remembered, at least 1.
        fp8_amax_history_length: Required[int] = REQUIRED

    def __call__(self, cfg: InstantiableConfig) -> InstantiableConfig:
        """Sets `quantized_dot_general` of every `DenseGeneralBaseLayer`, and wraps the optimizer.

        Args:
            cfg: A trainer's config, changed in place.

        Returns:
            `cfg`.

        Raises:
            ValueError: If the model has no dense layer, or its learner no optimizer.
        """
        quantized = QuantizedDotGeneral.default_config().set(
            quantization_type=DotGeneralQuantizationType.FP_8,
            fp8_amax_history_length=self.config.fp8_amax_history_length,
        )
        layers: list[ConfigBase] = []

        def add(layer: ConfigBase) -> None:
            if isinstance(layer, DenseGeneralBaseLayer.Config):
                layers.append(layer)

        for_each_config(cfg.model, add)
        if not layers:
            raise ValueError(
                error_message(
                    where=f"{type(self).__name__}: model",
                    what="there is no dense layer to multiply in float8",
                    expected="at least one DenseGeneralBaseLayer, such as a Linear",
                    advice="Take the modifier away",
                )
            )
        for layer in layers:
            layer.set(quantized_dot_general=quantized)
        for learner in _learners(cfg.learner):
            learner.set(optimizer=_with_new_values(learner.optimizer))
        return cfg


def _learners(learner: Any) -> list[Any]:
    """The learners that have an optimizer."""
    if isinstance(learner, CompositeLearner.Config):
        return list(learner.learners.values())
    if isinstance(learner, ConfigBase) and "optimizer" in learner:
        return [learner]
    raise ValueError(
        error_message(
            where=f"{FP8ConfigModifier.__name__}: learner",
            what="the learner has no optimizer, which would have to leave scales alone",
            expected="a Learner or a CompositeLearner",
        )
    )


def _with_new_values(optimizer: Any) -> OverrideInplaceUpdateTransformation.Config:
    """The optimizer, kept off the parameters whose gradient is their new value; it stays if it is so already."""
    rules = [f".*/{name}" for name in get_all_fp8_param_names()]
    if isinstance(optimizer, OverrideInplaceUpdateTransformation.Config):
        kept = [rule for rule in optimizer.rules if rule not in rules]
        return optimizer.clone(rules=[*kept, *rules])
    return OverrideInplaceUpdateTransformation.default_config().set(transformation=optimizer, rules=rules)
