"""The causal language model."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from axlearn.common.base_layer import BaseLayer
from axlearn.common.causal_lm._chunks import losses_in_chunks
from axlearn.common.causal_lm._metrics import BaseLossMetrics, LossOutputs, metrics_config
from axlearn.common.config import REQUIRED, Required, config_class, error_message
from axlearn.common.decoder import Decoder
from axlearn.common.decoding import SampleOutputs
from axlearn.common.flops import FlopsPerToken, transformer_flops_per_token
from axlearn.common.loss import TokenLosses, token_losses
from axlearn.common.module import Module, child_context, functional, nowrap
from axlearn.common.param_init import PARAM_REGEXP_WEIGHT, DefaultInitializer, WeightInitializer
from axlearn.common.sequence_order import check_num_chunks, to_head_tail_order, to_text_order
from axlearn.common.utils import Tensor, flatten_items, maybe_shard

AxisNames = Optional[Union[str, Sequence[str]]]


class Model(BaseLayer):
    """A decoder trained to predict the next token."""

    @config_class
    class Config(BaseLayer.Config):
        """Configures Model."""

        # The decoder.
        decoder: Required[Decoder.Config] = REQUIRED
        # Mesh axes that the first dimension of every input is split over; None: as it comes in.
        batch_axis_names: AxisNames = ("data",)
        # Mesh axes that the second dimension of every input is split over; counts only with batch_axis_names.
        seq_axis_names: AxisNames = None
        # The loss and the summaries.
        metrics: BaseLossMetrics.Config = metrics_config()
        # Positions per chunk in which logits and their loss terms are computed, once more in the backward
        # pass, so that logits [batch, seq_len, vocab_size] never exist in training; must divide seq_len.
        # None: all at once.
        scan_chunk: Optional[int] = None

    @classmethod
    def default_config(cls) -> Config:
        """Draws weights from a normal distribution with a standard deviation of 0.02.

        Reference:
            Radford et al., Improving Language Understanding by Generative Pre-Training, 2018, section 4.1.
        """
        cfg = super().default_config()
        cfg.param_init = DefaultInitializer.default_config().set(
            init_by_param_name={
                PARAM_REGEXP_WEIGHT: WeightInitializer.default_config().set(
                    fan=None, scale=0.02, distribution="normal"
                )
            }
        )
        return cfg

    def __init__(self, cfg: Config, *, parent: Optional[Module]):
        super().__init__(cfg, parent=parent)
        cfg = self.config
        self._add_child("decoder", cfg.decoder)
        self._add_child("metrics", cfg.metrics)

    def forward(
        self, input_batch: Mapping[str, Tensor], return_aux: bool = False
    ) -> tuple[Tensor, dict[str, Any]]:
        """Computes the loss of a batch, and adds its summaries.

        Args:
            input_batch: What `Decoder.forward` takes, and
                target_labels: [batch, seq_len] int32: the id that follows each input; negative: none to
                    predict;
                live_targets: [batch, seq_len], optional: which targets count; None: those that are not
                    negative;
                target_num_bytes: [batch] int32, optional: bytes of text that each row's targets stand for.
            return_aux: Whether to return what the loss was computed from.

        Whatever the decoder's `num_seq_chunks`: rows are given and returned in the order of the text. Everything in
        `input_batch` whose second dimension is `seq_len` long has an entry for each position.

        Returns:
            The scalar loss, and a dictionary: empty, or with `hidden_states` [batch, seq_len, dim],
            `per_target_loss` and `live_targets` [batch, seq_len], and unless in chunks, `logits` [batch,
            seq_len, vocab_size].
        """
        predictions, outputs = self._evaluate(self._arrange(input_batch))
        self.add_summary("loss", outputs.loss)
        for name, value in outputs.summaries.items():
            self.add_summary(name, value)
        if not return_aux:
            return jnp.asarray(outputs.loss.mean), {}
        predictions.pop("token_losses", None)
        aux = {
            **predictions,
            "per_target_loss": outputs.per_target_loss,
            "live_targets": outputs.live_targets,
        }
        return jnp.asarray(outputs.loss.mean), self._in_text_order(aux)

    def _evaluate(self, input_batch: Mapping[str, Tensor]) -> tuple[dict[str, Any], LossOutputs]:
        """Predicts a batch and applies the metrics to it."""
        predictions = self.decoder(input_batch)
        hidden_states = predictions["hidden_states"]
        if self.config.scan_chunk is None:
            predictions["logits"] = self._logits(hidden_states)
        else:
            predictions["token_losses"] = self._token_losses_in_chunks(
                hidden_states, target_labels=input_batch["target_labels"]
            )
        outputs = self.metrics(
            input_batch, predict_outputs=predictions, module_outputs=dict(self.get_module_outputs())
        )
        return predictions, outputs

    def _logits(self, hidden_states: Tensor) -> Tensor:
        # The decoder has been called in this context once already, hence a name of its own.
        with child_context("decoder_head", module=self.decoder):
            return self.decoder.compute_logits(hidden_states)

    def _token_losses_in_chunks(self, hidden_states: Tensor, *, target_labels: Tensor) -> TokenLosses:
        """The same as `token_losses` of all logits, a chunk of positions at a time."""
        seq_len = target_labels.shape[1]
        chunk_len = self.config.scan_chunk
        if chunk_len < 1 or seq_len % chunk_len:
            raise ValueError(
                error_message(
                    where=f"{self.path()}.scan_chunk",
                    what=f"{chunk_len} does not divide the {seq_len} positions of a row",
                    expected=f"a divisor of {seq_len}, or None",
                )
            )
        decoder, decoder_state, is_training = self.decoder, self.state["decoder"], self.is_training

        def chunk_losses(table: Tensor, hidden_states: Tensor, target_labels: Tensor) -> TokenLosses:
            logits, _ = functional(
                decoder,
                prng_key=None,
                state=decoder_state,
                inputs={"hidden_states": hidden_states, "table": table},
                method="compute_logits",
                is_training=is_training,
                drop_output_collections=("summaries", "state_updates", "module_outputs"),
            )
            return token_losses(logits, target_labels)

        with child_context("decoder_head", module=decoder):
            table = decoder.output_table()
        return losses_in_chunks(
            chunk_losses,
            table=table,
            hidden_states=hidden_states,
            target_labels=target_labels,
            chunk_len=chunk_len,
            partition_spec=(decoder.config.logits_partition_spec or ())[:2],
        )

    def _arrange(self, input_batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """Puts what has an entry for each position in the order that the decoder takes, and splits every input."""
        num_chunks = self.decoder.num_seq_chunks
        if num_chunks == 1:
            return self._constrain(input_batch)
        seq_len = input_batch["input_ids"].shape[1]
        check_num_chunks(num_chunks, seq_len=seq_len, where=f"{self.path()}.decoder.num_seq_chunks")

        def reorder(x: Tensor) -> Tensor:
            if x.ndim < 2 or x.shape[1] != seq_len:
                return x
            # Each device gets whole rows, at once, and reorders them: chunks of what is split would travel one by one.
            whole_rows = (PartitionSpec.UNCONSTRAINED, None)
            reordered = to_head_tail_order(maybe_shard(x, whole_rows), num_chunks=num_chunks)
            return maybe_shard(reordered, whole_rows)

        return self._constrain(jax.tree.map(reorder, dict(input_batch)))

    def _in_text_order(self, outputs: dict[str, Any]) -> dict[str, Any]:
        """Puts arrays [batch, seq_len, ...] that the decoder's order has made back in the order of the text."""
        num_chunks = self.decoder.num_seq_chunks
        return {
            name: x if x is None else to_text_order(x, num_chunks=num_chunks) for name, x in outputs.items()
        }

    def _constrain(self, input_batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """Splits every input over the configured mesh axes."""
        cfg = self.config
        if cfg.batch_axis_names is None:
            return dict(input_batch)
        axes = (cfg.batch_axis_names, cfg.seq_axis_names)
        return jax.tree.map(lambda x: maybe_shard(x, axes[: x.ndim]), dict(input_batch))

    def predict(self, input_batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Computes hidden states and logits.

        Args:
            input_batch: What `Decoder.forward` takes.

        Returns:
            A dictionary with hidden_states [batch, seq_len, dim] and logits [batch, seq_len, vocab_size].
        """
        predictions = self.decoder(self._arrange(input_batch))
        return self._in_text_order({**predictions, "logits": self._logits(predictions["hidden_states"])})

    def extract_logits(self, input_batch: Mapping[str, Tensor]) -> Tensor:
        """Computes logits [batch, seq_len, vocab_size] of what `Decoder.forward` takes."""
        return self.predict(input_batch)["logits"]

    def score(self, input_batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """Computes the loss of every target.

        Args:
            input_batch: What `forward` takes.

        Returns:
            A dictionary with the scalar loss, and per_target_loss and live_targets [batch, seq_len]; the
            former is in nats and zero where no target is live.
        """
        _, outputs = self._evaluate(self._arrange(input_batch))
        per_target = {"per_target_loss": outputs.per_target_loss, "live_targets": outputs.live_targets}
        return {"loss": outputs.loss.mean, **self._in_text_order(per_target)}

    def sample_decode(
        self, input_batch: Mapping[str, Tensor], *, max_len: int, num_decodes: int = 1, **kwargs: Any
    ) -> SampleOutputs:
        """Samples continuations of prompts; see `Decoder.sample_decode`.

        Args:
            input_batch: A dictionary with prefix [batch, prefix_len] int32 and optionally prefix_lens [batch]
                int32.
            max_len: Ids in a sequence at most, the prompt included.
            num_decodes: Continuations of each prompt.
            **kwargs: `logits_modifier`, `stop_decoding_condition`.

        Returns:
            The sequences.
        """
        return self.decoder.sample_decode(
            self._constrain(input_batch), max_len=max_len, num_decodes=num_decodes, **kwargs
        )

    @nowrap
    def check_host_batch(self, input_batch: Mapping[str, np.ndarray]) -> None:
        """Refuses ids that the vocabulary does not have, and positions, before they reach a device.

        On the device such an id would only show as a NaN.

        Args:
            input_batch: Host arrays: `input_ids`, and `target_labels` and `input_positions` where there are
                any.

        Raises:
            ValueError: An input id lies outside [0, vocab_size), or a label at or above vocab_size (a
                negative label is no target), or a position beyond those that the embedding has.
        """
        if "input_positions" in input_batch:
            self.decoder.emb.check_seq_len(int(np.max(input_batch["input_positions"], initial=-1)) + 1)
        vocab_size = self.config.decoder.vocab_size
        lowest_legal = {"input_ids": 0, "target_labels": None}
        for name, lowest in lowest_legal.items():
            if name not in input_batch:
                continue
            ids = np.asarray(input_batch[name])
            illegal = ids >= vocab_size
            if lowest is not None:
                illegal |= ids < lowest
            if illegal.any():
                self._raise_for_id(name, ids=ids, index=tuple(np.argwhere(illegal)[0].tolist()))

    @nowrap
    def check_vocab_size(self, vocab_size: int, *, where: str) -> None:
        """Refuses data that may hold ids which this model does not have, before any batch does.

        Args:
            vocab_size: Number of ids of the data, counted from 0.
            where: The path of the input, for the message.

        Raises:
            ValueError: If they are more than the decoder's.
        """
        known = self.config.decoder.vocab_size
        if vocab_size > known:
            raise ValueError(
                error_message(
                    where=where,
                    what=f"its tokenizer has {vocab_size} ids, {self.path()}.decoder.vocab_size is {known}",
                    expected=f"a tokenizer of at most {known} ids, or decoder.vocab_size={vocab_size}",
                )
            )

    def _raise_for_id(self, name: str, *, ids: np.ndarray, index: tuple[int, ...]) -> None:
        vocab_size = self.config.decoder.vocab_size
        legal = f"ids in [0, {vocab_size})" + (" or negative" if name == "target_labels" else "")
        raise ValueError(
            error_message(
                where=f"{name}[{', '.join(map(str, index))}]",
                what=f"id {ids[index]} is outside the vocabulary",
                expected=f"{legal}, from {self.path()}.decoder.vocab_size={vocab_size}",
                advice="The text was encoded with another tokenizer, or vocab_size is not the tokenizer's.",
            )
        )

    @nowrap
    def flops_per_token(self, seq_len: int) -> FlopsPerToken:
        """Counts the FLOPs that training this model takes per token, by two conventions.

        Args:
            seq_len: Tokens per row.

        Returns:
            The count; see `axlearn.common.flops.transformer_flops_per_token`.
        """
        cfg = self.config.decoder
        sizes = {
            path: math.prod(spec.shape)
            for path, spec in flatten_items(self.create_parameter_specs_recursively())
            if path.endswith("/weight")
        }
        num_matmul_params = sum(size for path, size in sizes.items() if not path.startswith("decoder/emb/"))
        if cfg.lm_head is None:
            num_matmul_params += cfg.vocab_size * cfg.dim
        # An output projection maps heads times per_head_dim onto dim, in every layer.
        attention_dim = (
            sum(size for path, size in sizes.items() if re.search("/o_proj/weight$", path)) // cfg.dim
        )
        return transformer_flops_per_token(
            num_matmul_params=num_matmul_params, total_attention_dim=attention_dim, seq_len=seq_len
        )
