"""Evaluation: the whole of a finite input, through the model as it is at a step, into one set of numbers."""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Optional, Protocol

import jax

from axlearn.common.config import (
    REQUIRED,
    ConfigOr,
    InstantiableConfig,
    Required,
    config_class,
    config_for_function,
    error_message,
    maybe_instantiate,
)
from axlearn.common.metrics import MetricAccumulator
from axlearn.common.module import Module, functional, nowrap
from axlearn.common.summary_writer import BaseWriter, SummaryWriter
from axlearn.common.utils import (
    NestedTensor,
    Tensor,
    cast_floats,
    host_to_global_array,
)

# Batches on their way through the device; more would only hold memory.
_MAX_IN_FLIGHT = 4


class EvalPolicy(Protocol):
    """Decides whether an evaler runs at a step."""

    def __call__(self, *, step: int, train_summaries: Optional[dict[str, Any]] = None) -> bool: ...


def every_n_steps_policy(n: int = 1, *, min_step: int = 1, max_step: Optional[int] = None) -> EvalPolicy:
    """Returns a policy that evaluates at every multiple of `n` from `min_step` on, and at `max_step`.

    Args:
        n: The distance in steps, at least 1.
        min_step: The first step at which to evaluate.
        max_step: A step at which to evaluate whatever `n` says; None for none. (The trainer evaluates after
            its last step in any case.)

    Raises:
        ValueError: If `n` is below 1.
    """
    if n < 1:
        raise ValueError(error_message(where="every_n_steps_policy", what=f"n={n}", expected="at least 1"))

    def policy(*, step: int, train_summaries: Optional[dict[str, Any]] = None) -> bool:
        del train_summaries
        return step >= min_step and (step % n == 0 or step == max_step)

    return policy


class BaseMetricCalculator(Module):
    """Runs a model over batches and adds up what comes out; subclasses decide what is run and how."""

    @config_class
    class Config(Module.Config):
        # The type of the floating-point parameters and inputs in evaluation. None: as they are.
        eval_dtype: Optional[Any] = None

    def __init__(self, cfg: Config, *, parent: Optional[Module], model: Module):
        """Remembers the model; it is no child, because the trainer owns it.

        Args:
            cfg: The config.
            parent: The evaler.
            model: The model, a child of the trainer.
        """
        super().__init__(cfg, parent=parent)
        self._model = model

    def evaluate_batch(
        self, input_batch: NestedTensor, *, model_params: NestedTensor, prng_key: Tensor
    ) -> dict[str, Any]:
        """Dispatches one batch, without waiting for the device.

        Args:
            input_batch: A batch on the mesh.
            model_params: The parameters.
            prng_key: The key of this batch.

        Returns:
            What `summarize` gets of this batch: a tree with "summaries" and whatever else there is.
        """
        raise NotImplementedError(type(self))

    def summarize(self, batch_outputs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Returns the summaries of the evaluation.

        Args:
            batch_outputs: What `evaluate_batch` returned for each batch, fetched to the host.
        """
        raise NotImplementedError(type(self))


class ModelSummaryAccumulator(BaseMetricCalculator):
    """Accumulates the summaries that a model adds in one of its methods.

    A `WeightedSummary` keeps its weight until the end, so a mean over the evaluation is the mean over its
    tokens (or bytes), not a mean of the batches' means.
    """

    @config_class
    class Config(BaseMetricCalculator.Config):
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
        self, input_batch: NestedTensor, *, model_params: NestedTensor, prng_key: Tensor
    ) -> dict[str, Any]:
        return self._jit_evaluate(model_params, prng_key, input_batch)

    @nowrap
    def summarize(self, batch_outputs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        accumulator = self.config.metric_accumulator.instantiate()
        for outputs in batch_outputs:
            accumulator.update(outputs["summaries"])
        return accumulator.summaries()

    def _evaluate(
        self, model_params: NestedTensor, prng_key: Tensor, input_batch: NestedTensor
    ) -> dict[str, Any]:
        cfg = self.config
        if cfg.eval_dtype is not None:
            model_params, input_batch = cast_floats((model_params, input_batch), cfg.eval_dtype)
        assert self.parent is not None
        input_batch = self.parent.input.dispatch_global_batch(input_batch)
        _, collection = functional(
            self._model,
            prng_key=prng_key,
            state=model_params,
            inputs=dict(input_batch=input_batch, **cfg.model_method_kwargs),
            method=cfg.model_method,
            is_training=False,
        )
        return {"summaries": collection.summaries}


class SpmdEvaler(Module):
    """Evaluates a model on the whole of a finite input, on the mesh of the trainer."""

    @config_class
    class Config(Module.Config):
        # The evaluation data: an input whose batches end.
        input: Required[InstantiableConfig] = REQUIRED
        # Where the summaries go; its folder is set by the trainer.
        summary_writer: BaseWriter.Config = SummaryWriter.default_config()
        # At which steps to evaluate, besides the last one.
        eval_policy: ConfigOr[Callable[..., bool]] = config_for_function(every_n_steps_policy)
        # Batches, counted from 0, at which to record a profile into the folder of the summary writer.
        trace_at_iters: Sequence[int] = []
        # The type in which to evaluate. None: that of the parameters.
        eval_dtype: Optional[Any] = None
        # What is computed per batch, and how it adds up.
        metric_calculator: BaseMetricCalculator.Config = ModelSummaryAccumulator.default_config()

    def __init__(self, cfg: Config, *, parent: Optional[Module], model: Module):
        """Builds the input and what is computed; touches no file.

        Args:
            cfg: The config.
            parent: The trainer.
            model: The model to evaluate.
        """
        super().__init__(cfg, parent=parent)
        self._model = model
        self._eval_policy = maybe_instantiate(cfg.eval_policy)
        self._add_child("input", maybe_set_fields(cfg.input, is_training=False))
        self._add_child("metric_calculator", _calculator_config(cfg), model=model)
        self._add_child("summary_writer", cfg.summary_writer)

    @nowrap
    def is_due(self, *, step: int, train_summaries: Optional[dict[str, Any]] = None) -> bool:
        """Returns whether the policy asks for an evaluation at `step`."""
        return self._eval_policy(step=step, train_summaries=train_summaries)

    @nowrap
    def eval_step(
        self,
        step: int,
        *,
        prng_key: Tensor,
        model_params: NestedTensor,
        train_summaries: Optional[dict[str, Any]] = None,
        force_run: bool = False,
    ) -> tuple[Tensor, Optional[dict[str, Any]], None]:
        """Evaluates, if it is due.

        The key of a batch depends on `prng_key` and the batch's number alone, and the key is handed back as
        it came: whether and when a run is evaluated leaves no trace in its training.

        Args:
            step: The step whose parameters these are.
            prng_key: The key from which those of the batches are derived.
            model_params: The parameters.
            train_summaries: The summaries of the step, for policies that look at them; None if there are
                none.
            force_run: Evaluate whatever the policy says.

        Returns:
            (`prng_key`, the summaries with values as numbers and `eval_time_secs`, or None if no evaluation
            was due, None).

        Raises:
            ValueError: If the input has no batches.
        """
        if not force_run and not self.is_due(step=step, train_summaries=train_summaries):
            return prng_key, None, None
        start = time.perf_counter()
        outputs = self._evaluate_batches(step, prng_key=prng_key, model_params=model_params)
        if not outputs:
            raise ValueError(
                error_message(
                    where=f"{self.path()}.input",
                    what="has no batches",
                    expected="at least one to evaluate on",
                )
            )
        summaries = self.metric_calculator.summarize(jax.device_get(outputs))
        summaries["eval_time_secs"] = time.perf_counter() - start
        self.summary_writer(step, summaries)
        return prng_key, summaries, None

    def _evaluate_batches(
        self, step: int, *, prng_key: Tensor, model_params: NestedTensor
    ) -> list[NestedTensor]:
        outputs: list[NestedTensor] = []
        in_flight: collections.deque[NestedTensor] = collections.deque()
        check_host_batch = getattr(self._model, "check_host_batch", None)
        for i, batch in enumerate(self.input.batches()):
            if check_host_batch is not None:
                check_host_batch(batch)
            with self._maybe_trace(step, iteration=i):
                output = self.metric_calculator.evaluate_batch(
                    host_to_global_array(batch, partition=self.input.partition_spec),
                    model_params=model_params,
                    prng_key=jax.random.fold_in(prng_key, i),
                )
                outputs.append(output)
            in_flight.append(output)
            if len(in_flight) > _MAX_IN_FLIGHT:
                jax.block_until_ready(in_flight.popleft())
        return outputs

    @contextlib.contextmanager
    def _maybe_trace(self, step: int, *, iteration: int) -> Iterator[None]:
        cfg = self.config
        if iteration not in cfg.trace_at_iters:
            yield
            return
        with (
            jax.profiler.trace(cfg.summary_writer.dir),
            jax.profiler.StepTraceAnnotation(cfg.name, step_num=step),
        ):
            yield


def maybe_set_fields(cfg: InstantiableConfig, **fields: Any) -> Any:
    """Returns a copy of `cfg` with those of `fields` set that it has and leaves at None or REQUIRED.

    Args:
        cfg: A config; it stays as it is.
        **fields: What its owner knows, such as the folder of a writer.
    """
    is_open = lambda name: name in cfg and (getattr(cfg, name) is None or getattr(cfg, name) is REQUIRED)  # noqa: E731
    return cfg.clone(**{name: value for name, value in fields.items() if is_open(name)})


def _calculator_config(cfg: SpmdEvaler.Config) -> BaseMetricCalculator.Config:
    return maybe_set_fields(cfg.metric_calculator, eval_dtype=cfg.eval_dtype)
