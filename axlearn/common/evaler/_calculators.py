"""What is computed of each batch of an evaluation, and how the batches become one result."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import jax
import numpy as np

from axlearn.common.config import InstantiableConfig, config_class, error_message
from axlearn.common.metrics import MetricAccumulator
from axlearn.common.module import Module, functional, nowrap
from axlearn.common.utils import NestedTensor, Tensor, cast_floats, flatten_items, maybe_shard


class BatchOutputs(NamedTuple):
    """What a calculator makes of a batch.

    Attributes:
        kept: What `summarize` needs of the batch; it is fetched to the host.
        outputs: What the model's method returned, on the device, for calculators that depend on this one;
            nobody keeps it.
    """

    kept: Any
    outputs: Any


class BaseMetricCalculator(Module):
    """Runs a model over batches and adds up what comes out; subclasses decide what is run and how."""

    @config_class
    class Config(Module.Config):
        """Configures BaseMetricCalculator."""

        # The type of the floating-point parameters and inputs in evaluation. None: as they are.
        eval_dtype: Optional[Any] = None
        # What stands before the names of the summaries, with a slash. None or "": nothing. (A composite gives
        # each of its calculators that has None its name.)
        prefix: Optional[str] = None

    def __init__(self, cfg: Config, *, parent: Optional[Module], model: Module):
        """Remembers the model; it is no child, because the trainer owns it.

        Args:
            cfg: The config.
            parent: The evaler, or the composite of which this is a part.
            model: The model, a child of the trainer.
        """
        super().__init__(cfg, parent=parent)
        self._model = model

    @property
    def input(self) -> Any:
        """The evaler's input, which knows how the batches lie on the mesh."""
        assert self.parent is not None
        return self.parent.input

    def evaluate_batch(
        self,
        input_batch: NestedTensor,
        *,
        model_params: NestedTensor,
        prng_key: Tensor,
        extra_inputs: Optional[dict[str, NestedTensor]] = None,
    ) -> BatchOutputs:
        """Dispatches one batch, without waiting for the device.

        Args:
            input_batch: A batch on the mesh.
            model_params: The parameters.
            prng_key: The key of this batch.
            extra_inputs: What other calculators made of the batch; goes to the model as further entries of
                it. None: nothing.

        Returns:
            What `summarize` gets of this batch, and what the model returned.

        Raises:
            ValueError: If the batch has an entry of the name of an extra input.
        """
        raise NotImplementedError(type(self))

    def summarize(self, kept: Sequence[Any]) -> dict[str, Any]:
        """Returns the summaries of the evaluation, below the prefix.

        Args:
            kept: What `evaluate_batch` kept of each batch, on the host.
        """
        raise NotImplementedError(type(self))

    def _with_prefix(self, summaries: dict[str, Any]) -> dict[str, Any]:
        prefix = self.config.prefix
        return {prefix: summaries} if prefix else summaries

    def _call_model(
        self,
        model_params: NestedTensor,
        prng_key: Tensor,
        input_batch: NestedTensor,
        extra_inputs: Optional[dict[str, NestedTensor]],
        *,
        method: str,
        method_kwargs: dict[str, Any],
    ) -> tuple[NestedTensor, Any, NestedTensor]:
        """Runs a method of the model; for use inside jit.

        Returns:
            (The batch that the model saw, what it returned, its summaries).
        """
        dtype = self.config.eval_dtype
        if dtype is not None:
            model_params, input_batch = cast_floats((model_params, input_batch), dtype)
        batch = {**self.input.dispatch_global_batch(input_batch)}
        for name, value in (extra_inputs or {}).items():
            if name in batch:
                raise ValueError(
                    error_message(
                        where=self.path(),
                        what=f"the batch has an entry {name!r} already, which another calculator would replace",
                        advice="Give the dependency another dst_key.",
                    )
                )
            batch[name] = value
        outputs, collection = functional(
            self._model,
            prng_key=prng_key,
            state=model_params,
            inputs={"input_batch": batch, **method_kwargs},
            method=method,
            is_training=False,
        )
        return batch, outputs, collection.summaries


class ModelSummaryAccumulator(BaseMetricCalculator):
    """Accumulates the summaries that a model adds in one of its methods.

    A `WeightedSummary` keeps its weight until the end, so a mean over the evaluation is the mean over its
    tokens (or bytes), not a mean of the batches' means.
    """

    @config_class
    class Config(BaseMetricCalculator.Config):
        """Configures ModelSummaryAccumulator."""

        # The method of the model to call as `method(input_batch=..., **model_method_kwargs)`.
        model_method: str = "forward"
        # More arguments of the method.
        model_method_kwargs: dict[str, Any] = {}
        # How summaries of batches become one.
        metric_accumulator: InstantiableConfig = MetricAccumulator.default_config()

    def __init__(self, cfg: Config, *, parent: Optional[Module], model: Module):
        super().__init__(cfg, parent=parent, model=model)
        # One function for the life of the calculator: every evaluation runs the program that the first one
        # compiled.
        self._jit_evaluate = jax.jit(self._evaluate)

    @nowrap
    def evaluate_batch(
        self,
        input_batch: NestedTensor,
        *,
        model_params: NestedTensor,
        prng_key: Tensor,
        extra_inputs: Optional[dict[str, NestedTensor]] = None,
    ) -> BatchOutputs:
        """See BaseMetricCalculator."""
        return self._jit_evaluate(model_params, prng_key, input_batch, extra_inputs)

    @nowrap
    def summarize(self, kept: Sequence[Any]) -> dict[str, Any]:
        """See BaseMetricCalculator."""
        accumulator = self.config.metric_accumulator.instantiate()
        for summaries in kept:
            accumulator.update(summaries)
        return self._with_prefix(accumulator.summaries())

    def _evaluate(self, *args: Any) -> BatchOutputs:
        cfg = self.config
        _, outputs, summaries = self._call_model(
            *args, method=cfg.model_method, method_kwargs=cfg.model_method_kwargs
        )
        # Every process needs all of what is kept.
        return BatchOutputs(kept=jax.tree.map(lambda x: maybe_shard(x, ()), summaries), outputs=outputs)


class GlobalMetricCalculator(BaseMetricCalculator):
    """For metrics that no mean over batches gives, such as an area under a curve. Abstract.

    The predictions of all batches are collected on the host, and `calculate_metrics` sees them at once.
    """

    @config_class
    class Config(BaseMetricCalculator.Config):
        """Configures GlobalMetricCalculator."""

        # The method of the model to call as `method(input_batch=...)`.
        predict_method: str = "predict"

    def __init__(self, cfg: Config, *, parent: Optional[Module], model: Module):
        super().__init__(cfg, parent=parent, model=model)
        self._jit_predict = jax.jit(self._predict)

    def calculate_metrics(
        self, *, input_batch: NestedTensor, predict_outputs: NestedTensor
    ) -> dict[str, Any]:
        """Computes the summaries.

        Args:
            input_batch: The batches as the model saw them, one behind the other along the first dimension of
                every array, on the host. Rows with which the input fills up its last batch are among them.
            predict_outputs: What the model returned of them, likewise.

        Returns:
            Nested dicts of summaries and numbers.
        """
        raise NotImplementedError(type(self))

    @nowrap
    def evaluate_batch(
        self,
        input_batch: NestedTensor,
        *,
        model_params: NestedTensor,
        prng_key: Tensor,
        extra_inputs: Optional[dict[str, NestedTensor]] = None,
    ) -> BatchOutputs:
        """See BaseMetricCalculator."""
        batch, outputs = self._jit_predict(model_params, prng_key, input_batch, extra_inputs)
        return BatchOutputs(kept=(batch, outputs), outputs=outputs)

    @nowrap
    def summarize(self, kept: Sequence[Any]) -> dict[str, Any]:
        """See BaseMetricCalculator.

        Raises:
            ValueError: If the model returned a value that is not one of rows.
        """
        for path, value in flatten_items(kept[0]):
            if np.ndim(value) == 0:
                raise ValueError(
                    error_message(
                        where=f"{self.path()}.predict_method",
                        what=f"{self.config.predict_method!r} returned a number at {path!r}",
                        expected="arrays whose first dimension is that of the batch",
                    )
                )
        input_batch, predict_outputs = jax.tree.map(lambda *values: np.concatenate(values), *kept)
        return self._with_prefix(
            self.calculate_metrics(input_batch=input_batch, predict_outputs=predict_outputs)
        )

    def _predict(self, *args: Any) -> tuple[NestedTensor, NestedTensor]:
        batch, outputs, _ = self._call_model(*args, method=self.config.predict_method, method_kwargs={})
        # Every process computes the metrics, so every process needs all rows.
        return jax.tree.map(lambda x: maybe_shard(x, ()), (batch, outputs))
