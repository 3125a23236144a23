"""One evaluation set: its data, when it is due, what is computed of it, where that is written."""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Optional

import jax
from absl import logging

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
from axlearn.common.evaler._calculators import BaseMetricCalculator, ModelSummaryAccumulator
from axlearn.common.evaler._fields import maybe_set_fields
from axlearn.common.evaler._policy import every_n_steps_policy
from axlearn.common.module import Module, nowrap
from axlearn.common.profiling import profile
from axlearn.common.summary_writer import BaseWriter, SummaryWriter
from axlearn.common.utils import NestedTensor, Tensor, host_to_global_array

# Batches on their way through the device; more would only hold memory.
_MAX_IN_FLIGHT = 4


class SpmdEvaler(Module):
    """Evaluates a model on the whole of a finite input, on the mesh of the trainer."""

    @config_class
    class Config(Module.Config):
        """Configures SpmdEvaler."""

        # The evaluation data: an input whose batches end.
        input: Required[InstantiableConfig] = REQUIRED
        # Where the summaries go; its folder is set by the trainer.
        summary_writer: BaseWriter.Config = SummaryWriter.default_config()
        # At which steps to evaluate, besides the last one.
        eval_policy: ConfigOr[Callable[..., bool]] = config_for_function(every_n_steps_policy)
        # Batches of each evaluation, counted from 0, of which to record a profile into the folder of the
        # summary writer.
        trace_at_iters: Sequence[int] = []
        # The type in which to evaluate. None: that of the parameters.
        eval_dtype: Optional[Any] = None
        # What is computed per batch, and how it adds up.
        metric_calculator: BaseMetricCalculator.Config = ModelSummaryAccumulator.default_config()
        # Whether to evaluate the moving averages of the parameters. None: where the learner keeps them
        # (`learner.ema.decay`). True: they are evaluated, and a learner without them is an error. False: the
        # parameters themselves are.
        use_ema: Optional[bool] = None

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
        calculator = maybe_set_fields(cfg.metric_calculator, eval_dtype=cfg.eval_dtype)
        self._add_child("metric_calculator", calculator, model=model)
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
        kept = self._evaluate_batches(step, prng_key=prng_key, model_params=model_params)
        if not kept:
            raise ValueError(
                error_message(
                    where=f"{self.path()}.input",
                    what="has no batches",
                    expected="at least one to evaluate on",
                )
            )
        summaries = self.metric_calculator.summarize(kept)
        summaries["eval_time_secs"] = time.perf_counter() - start
        self.summary_writer(step, summaries)
        return prng_key, summaries, None

    def _evaluate_batches(self, step: int, *, prng_key: Tensor, model_params: NestedTensor) -> list[Any]:
        """Returns what the calculator keeps of each batch, on the host."""
        kept: list[Any] = []
        in_flight: collections.deque[Any] = collections.deque()
        check_host_batch = getattr(self._model, "check_host_batch", None)
        for i, batch in enumerate(self.input.batches()):
            if check_host_batch is not None:
                check_host_batch(batch)
            with self._maybe_trace(step, iteration=i, in_flight=in_flight):
                result = self.metric_calculator.evaluate_batch(
                    host_to_global_array(batch, partition=self.input.partition_spec),
                    model_params=model_params,
                    prng_key=jax.random.fold_in(prng_key, i),
                )
                in_flight.append(result.kept)
            if len(in_flight) > _MAX_IN_FLIGHT:
                kept.append(jax.device_get(in_flight.popleft()))
        kept += jax.device_get(list(in_flight))
        not_there = [i for i in self.config.trace_at_iters if i >= len(kept)]
        if not_there:
            logging.warning(
                "%s.trace_at_iters: there are %d batches, and no %s to record.",
                self.path(),
                len(kept),
                ", ".join(map(str, not_there)),
            )
        return kept

    @contextlib.contextmanager
    def _maybe_trace(self, step: int, *, iteration: int, in_flight: collections.deque[Any]) -> Iterator[None]:
        """A context that is recorded if this batch is to be; then nothing but this batch is in the profile."""
        cfg = self.config
        if iteration not in cfg.trace_at_iters:
            yield
            return
        jax.block_until_ready(list(in_flight))
        with (
            profile(cfg.summary_writer.dir, session=f"step_{step:08d}_batch_{iteration:04d}"),
            jax.profiler.StepTraceAnnotation(cfg.name, step_num=iteration),
        ):
            yield
            jax.block_until_ready(list(in_flight))
