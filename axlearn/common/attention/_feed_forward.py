"""The feed-forward block of a transformer layer."""

from collections.abc import Sequence
from typing import Any, Optional, Union

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from axlearn.common.attention._structure import BaseResidualLayer
from axlearn.common.base_layer import BaseLayer, ParameterSpec, TensorRMSNorm
from axlearn.common.config import (
    REQUIRED,
    InstantiableConfig,
    Required,
    config_class,
    error_message,
    nearest_names,
)
from axlearn.common.layers import Linear, get_activation_fn
from axlearn.common.metrics import WeightedSummary
from axlearn.common.param_init import ConstantInitializer


class TransformerFeedForwardLayer(BaseResidualLayer):
    """Two dense layers with an activation between them, or three with a gate; norm and residual connection.

    With one activation f: `linear2(f(linear1(x)))`. With two, f and g: `linear2(f(linear1_0(x)) *
    g(linear1_1(x)))`.

    Reference: Shazeer, GLU Variants Improve Transformer, https://arxiv.org/abs/2002.05202, section 2.
    """

    @config_class
    class Config(BaseResidualLayer.Config):
        """Configures `TransformerFeedForwardLayer`."""

        # Size of the last dim of inputs and outputs.
        input_dim: Required[int] = REQUIRED
        # Size between the dense layers: a number, or the config of a function of `input_dim`.
        hidden_dim: Required[Union[int, InstantiableConfig]] = REQUIRED
        # The dense layers to and from the hidden dim, which by default is split over the axis "model".
        linear1: BaseLayer.Config = Linear.default_config().set(param_partition_spec=[None, "model"])
        linear2: BaseLayer.Config = Linear.default_config().set(param_partition_spec=["model", None])
        # Names for `get_activation_fn`: one, or a pair for a gate.
        activation: Union[str, tuple[str, str]] = "nn.relu"
        # Factor of the outputs of the block in the residual sum.
        residual_weight: float = 1.0
        # First value of a further factor that is learned, the parameter `residual_gate`; 0 makes the block the
        # identity at first (Bachlechner et al., ReZero, https://arxiv.org/abs/2003.04887). None: no such
        # factor.
        residual_gate_init: Optional[float] = None
        # Whether to add the summary `dead_neurons`: the fraction of hidden units whose first activation is
        # positive for no token of the batch. None: no.
        add_dead_neuron_summary: Optional[bool] = None
        # Which of `linear1_outputs` (or `linear1_0_outputs` and `linear1_1_outputs`, with a gate) and
        # `linear2_outputs` to add the root mean square of, as summaries `<name>/rms_norm`. Both kinds of
        # summary count all positions of the batch, padding included. None: of nothing.
        add_value_rms_norm_summary: Optional[Sequence[str]] = None

    def __init__(self, cfg: Config, *, parent: Optional[BaseLayer]):
        super().__init__(cfg, parent=parent)
        self._check_config()
        self._add_norms(cfg.input_dim)
        hidden_dim = self._compute_hidden_dim()
        self._activations = [get_activation_fn(name) for name in self._activation_names()]
        for name in self._linear1_names():
            self._add_child(name, cfg.linear1.clone(input_dim=cfg.input_dim, output_dim=hidden_dim))
        self._add_child("linear2", cfg.linear2.clone(input_dim=hidden_dim, output_dim=cfg.input_dim))
        self._add_child("dropout1", cfg.dropout)
        self._add_child("dropout2", cfg.dropout)
        self._add_child("stochastic_depth", cfg.stochastic_depth)

    def _check_config(self) -> None:
        cfg: TransformerFeedForwardLayer.Config = self.config
        for name, neutral in (("residual_weight", 1), ("residual_gate_init", None)):
            value = getattr(cfg, name)
            if value != neutral and cfg.structure == "nonorm":
                raise ValueError(
                    error_message(
                        where=self.path(),
                        what=f"{name}={value} with structure='nonorm'",
                        expected=f"a structure with a residual sum, or {name}={neutral}",
                    )
                )
        names = [f"{name}_outputs" for name in (*self._linear1_names(), "linear2")]
        for name in cfg.add_value_rms_norm_summary or ():
            if name not in names:
                raise ValueError(
                    error_message(
                        where=self.path(),
                        what=f"add_value_rms_norm_summary: unknown value {name!r}",
                        expected=f"some of {', '.join(names)}",
                        nearest=nearest_names(name, names),
                    )
                )

    def _create_layer_parameter_specs(self) -> dict[str, ParameterSpec]:
        init = self.config.residual_gate_init
        if init is None:
            return {}
        initializer = ConstantInitializer.default_config().set(value=init).instantiate()
        return {"residual_gate": ParameterSpec(shape=(), initializer=initializer)}

    def _compute_hidden_dim(self) -> int:
        cfg: TransformerFeedForwardLayer.Config = self.config
        if isinstance(cfg.hidden_dim, int):
            return cfg.hidden_dim
        return cfg.hidden_dim.instantiate(input_dim=cfg.input_dim)

    def _activation_names(self) -> tuple[str, ...]:
        activation = self.config.activation
        return (activation,) if isinstance(activation, str) else activation

    def _linear1_names(self) -> tuple[str, ...]:
        return ("linear1",) if len(self._activation_names()) == 1 else ("linear1_0", "linear1_1")

    def forward(self, inputs: Float[Array, "batch seq input_dim"]) -> Float[Array, "batch seq input_dim"]:
        """Applies the block."""
        cfg: TransformerFeedForwardLayer.Config = self.config
        weight: Any = cfg.residual_weight
        if cfg.residual_gate_init is not None:
            weight = weight * self.parameters["residual_gate"]
        data, _ = self._apply_structure(
            inputs, lambda x: (self._feed_forward(x), None), residual_weight=weight
        )
        return data

    def _feed_forward(self, x: Array) -> Array:
        hidden = None
        for i, (name, activation) in enumerate(zip(self._linear1_names(), self._activations, strict=True)):
            linear: Any = self.children[name]
            # Without a gate the name is linear1_0 too: one pattern finds it in either kind of layer.
            branch = self._remat_name(linear(x), f"linear1_{i}")
            self._maybe_add_rms_norm(f"{name}_outputs", branch)
            branch = activation(branch)
            if i == 0 and self.config.add_dead_neuron_summary:
                is_dead = jnp.max(branch, axis=(0, 1)) <= 0  # [hidden_dim]
                mean, weight = jnp.mean(is_dead.astype(jnp.float32)), jnp.ones((), jnp.float32)
                self.add_summary("dead_neurons", WeightedSummary(mean=mean, weight=weight))
            hidden = branch if hidden is None else hidden * branch
        outputs = self._remat_name(self.linear2(self.dropout1(hidden)), "linear2")
        self._maybe_add_rms_norm("linear2_outputs", outputs)
        return self.dropout2(outputs)

    def _maybe_add_rms_norm(self, name: str, value: Array) -> None:
        if name in (self.config.add_value_rms_norm_summary or ()):
            TensorRMSNorm.default_config().instantiate().add_stats(name, value)

    def init_states(self, *, batch_size: int, max_len: int) -> dict[str, Any]:
        """Nothing: the layer looks at one token at a time."""
        return {}

    def extend_step(
        self,
        cached_states: dict[str, Any],
        inputs: Float[Array, "batch step input_dim"],
        *,
        live_step_len: Optional[Int[Array, "batch"]] = None,
    ) -> tuple[dict[str, Any], Float[Array, "batch step input_dim"]]:
        """The same as `forward`, with the signature of layers that have a state."""
        return cached_states, self.forward(inputs)
