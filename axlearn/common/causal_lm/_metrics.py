"""Losses of a language model, and the summaries that go with them.

Each summary knows its weight, so that the summaries of many batches add up to exactly what one large batch
would have given.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

import jax
import jax.numpy as jnp

from axlearn.common.base_layer import BaseLayer
from axlearn.common.config import REQUIRED, Required, config_class, error_message
from axlearn.common.loss import average_token_losses, token_losses
from axlearn.common.metrics import WeightedSummary
from axlearn.common.module import Module
from axlearn.common.summary import Summary
from axlearn.common.utils import Tensor, flatten_items


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerplexitySummary(Summary):
    """The exponential of a cross entropy. Over several batches: of their mean, not the mean of exponentials.

    Attributes:
        cross_entropy: In nats per target.
    """

    cross_entropy: WeightedSummary

    def value(self) -> Tensor:
        return jnp.exp(self.cross_entropy.mean)

    def accumulate(self, other: Summary) -> "PerplexitySummary":
        assert isinstance(other, PerplexitySummary), type(other)
        return PerplexitySummary(self.cross_entropy + other.cross_entropy)


class LossOutputs(NamedTuple):
    """What a metric says about a batch.

    Attributes:
        loss: The loss to minimize, with the number of targets that it is the mean of.
        summaries: For the logs, by name.
        per_target_loss: [batch, seq_len], zero where no target is live; None: the loss is not one of targets.
        live_targets: [batch, seq_len], None likewise.
    """

    loss: WeightedSummary
    summaries: dict[str, Any]
    per_target_loss: Optional[Tensor] = None
    live_targets: Optional[Tensor] = None


class BaseLossMetrics(BaseLayer):
    """Turns a model's predictions into a loss and summaries. Abstract; it has no parameters."""

    def forward(
        self,
        input_batch: Mapping[str, Tensor],
        *,
        predict_outputs: Mapping[str, Any],
        module_outputs: Mapping[str, Any],
    ) -> LossOutputs:
        """Computes loss and summaries of a batch.

        All arrays with positions lie in the order of the decoder, see `Decoder.Config.num_seq_chunks`.

        Args:
            input_batch: The model's input, with `target_labels` [batch, seq_len].
            predict_outputs: A dictionary with either `logits` [batch, seq_len, vocab_size] or `token_losses`,
                the terms that `loss.token_losses` makes of them.
            module_outputs: What the layers below the model added as module outputs.

        Returns:
            The loss and the summaries. `loss` is no name for a summary: it is the total's.
        """
        raise NotImplementedError(type(self))


def live_targets_of(input_batch: Mapping[str, Tensor]) -> Tensor:
    """Which targets count, [batch, seq_len]: `live_targets` if given, else those not negative."""
    live_targets = input_batch.get("live_targets")
    return input_batch["target_labels"] >= 0 if live_targets is None else live_targets


class CrossEntropyLossMetrics(BaseLossMetrics):
    """The cross entropy of next-token prediction.

    Summaries: `cross_entropy_loss` (nats per target), `perplexity`, `accuracy`, `z_loss` (before its scale),
    `train_live_targets` (per row of the batch; while training), and where the batch says how many bytes its
    targets stand for, `bits_per_byte` and `nats_per_byte`.
    """

    @config_class
    class Config(BaseLossMetrics.Config):
        """Configures CrossEntropyLossMetrics."""

        # Weight of the mean squared log-normalizer in the loss; None: 0.
        z_loss_scale: Optional[float] = None

    def forward(
        self,
        input_batch: Mapping[str, Tensor],
        *,
        predict_outputs: Mapping[str, Any],
        module_outputs: Mapping[str, Any],
    ) -> LossOutputs:
        """See `BaseLossMetrics.forward`."""
        del module_outputs
        terms = predict_outputs.get("token_losses")
        if terms is None:
            terms = token_losses(predict_outputs["logits"], input_batch["target_labels"])
        live_targets = live_targets_of(input_batch)
        loss, details = average_token_losses(
            terms, live_targets=live_targets, z_loss_scale=self.config.z_loss_scale or 0.0
        )
        num_targets = jnp.sum(live_targets.astype(jnp.float32))
        cross_entropy = details["cross_entropy_loss"]
        summaries = {
            "cross_entropy_loss": WeightedSummary(cross_entropy, num_targets),
            "perplexity": PerplexitySummary(WeightedSummary(cross_entropy, num_targets)),
            "accuracy": WeightedSummary(details["accuracy"], num_targets),
            "z_loss": WeightedSummary(details["z_loss"], num_targets),
        }
        if self.is_training:
            num_rows = float(live_targets.shape[0])
            summaries["train_live_targets"] = WeightedSummary(num_targets / num_rows, num_rows)
        num_bytes = input_batch.get("target_num_bytes")
        if num_bytes is not None:
            # The sum over the targets, and not the mean: a batch without any has neither nats nor bytes.
            summaries |= _per_byte(cross_entropy * num_targets, num_bytes=num_bytes)
        return LossOutputs(
            loss=WeightedSummary(loss, num_targets),
            summaries=summaries,
            per_target_loss=details["per_target_loss"],
            live_targets=live_targets,
        )


def _per_byte(total_nats: Tensor, *, num_bytes: Tensor) -> dict[str, WeightedSummary]:
    """Nats of a batch over the bytes of its targets [batch], weighted by bytes: batches add up exactly."""
    total_bytes = jnp.sum(num_bytes.astype(jnp.float32))
    nats_per_byte = total_nats / jnp.maximum(total_bytes, 1)
    return {
        "nats_per_byte": WeightedSummary(nats_per_byte, total_bytes),
        "bits_per_byte": WeightedSummary(nats_per_byte / math.log(2), total_bytes),
    }


class AuxLossMetrics(BaseLossMetrics):
    """The mean of losses that layers emit as module outputs, such as a router's balance loss.

    Summary: `aux_loss`, if a pattern is given.
    """

    @config_class
    class Config(BaseLossMetrics.Config):
        """Configures AuxLossMetrics."""

        # Matched against the whole path of each module output; a layer's values are averaged first, then the
        # layers. None: no auxiliary loss.
        aux_loss_regex: Optional[str] = None

    def forward(
        self,
        input_batch: Mapping[str, Tensor],
        *,
        predict_outputs: Mapping[str, Any],
        module_outputs: Mapping[str, Any],
    ) -> LossOutputs:
        """See `BaseLossMetrics.forward`.

        Raises:
            ValueError: A pattern is given and matches nothing.
        """
        del predict_outputs
        num_targets = jnp.sum(live_targets_of(input_batch).astype(jnp.float32))
        pattern = self.config.aux_loss_regex
        if pattern is None:
            return LossOutputs(loss=WeightedSummary(jnp.zeros([]), num_targets), summaries={})
        outputs = dict(flatten_items(module_outputs))
        losses = [jnp.mean(value) for path, value in outputs.items() if re.fullmatch(pattern, path)]
        if not losses:
            raise ValueError(
                error_message(
                    where=f"{self.path()}.aux_loss_regex",
                    what=f"{pattern!r} matches no module output",
                    expected=f"a pattern of one of: {', '.join(sorted(outputs)) or '(there are none)'}",
                    advice="A scanned stack drops module outputs unless its repeat.drop_output keeps them.",
                )
            )
        aux_loss = WeightedSummary(sum(losses) / len(losses), num_targets)
        return LossOutputs(loss=aux_loss, summaries={"aux_loss": aux_loss})


class CompositeLossMetrics(BaseLossMetrics):
    """The weighted sum of several losses."""

    @config_class
    class Config(BaseLossMetrics.Config):
        """Configures CompositeLossMetrics."""

        # The losses by name.
        metrics: Required[dict[str, BaseLossMetrics.Config]] = REQUIRED
        # Weight of each loss by name, of at least one; losses not named do not count. None: all count 1.
        loss_weights: Optional[dict[str, float]] = None
        # Names of the metrics whose summaries go without the metric's name in front. None: all of them.
        flatten_metrics: Optional[Sequence[str]] = None

    def __init__(self, cfg: Config, *, parent: Optional[Module]):
        super().__init__(cfg, parent=parent)
        cfg = self.config
        for name, metric_cfg in cfg.metrics.items():
            self._add_child(name, metric_cfg)
        for field in ("loss_weights", "flatten_metrics"):
            for name in getattr(cfg, field) or ():
                if name not in cfg.metrics:
                    raise ValueError(
                        error_message(
                            where=f"{self.path()}.{field}",
                            what=f"there is no metric {name!r}",
                            expected=f"names out of: {', '.join(sorted(cfg.metrics))}",
                        )
                    )

    def forward(
        self,
        input_batch: Mapping[str, Tensor],
        *,
        predict_outputs: Mapping[str, Any],
        module_outputs: Mapping[str, Any],
    ) -> LossOutputs:
        """See `BaseLossMetrics.forward`. Targets are those of the first metric that has any."""
        cfg = self.config
        outputs = {
            name: getattr(self, name)(
                input_batch, predict_outputs=predict_outputs, module_outputs=module_outputs
            )
            for name in cfg.metrics
        }
        weights = dict.fromkeys(cfg.metrics, 1.0) if cfg.loss_weights is None else cfg.loss_weights
        total = sum(weight * outputs[name].loss.mean for name, weight in weights.items())
        main = next((x for x in outputs.values() if x.live_targets is not None), None)
        main = next(iter(outputs.values())) if main is None else main
        return LossOutputs(
            loss=WeightedSummary(total, main.loss.weight),
            summaries=self._join({name: output.summaries for name, output in outputs.items()}),
            per_target_loss=main.per_target_loss,
            live_targets=main.live_targets,
        )

    def _join(self, summaries: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """One dictionary of all summaries, with or without the names of their metrics in front."""
        flatten = self.config.flatten_metrics
        joined: dict[str, Any] = {}
        for metric, named in summaries.items():
            is_flat = flatten is None or metric in flatten
            for name, value in named.items():
                target = joined if is_flat else joined.setdefault(metric, {})
                if name in target:
                    raise ValueError(
                        error_message(
                            where=f"{self.path()}.{metric}",
                            what=f"two metrics have a summary {name!r}",
                            advice="Name the metrics that may go without a prefix in flatten_metrics.",
                        )
                    )
                target[name] = value
        return joined


def metrics_config() -> CompositeLossMetrics.Config:
    """The usual metrics: the cross entropy `lm`, and the layers' auxiliary losses `aux`."""
    return CompositeLossMetrics.default_config().set(
        metrics={"lm": CrossEntropyLossMetrics.default_config(), "aux": AuxLossMetrics.default_config()}
    )
