"""The loop of a run: take a batch, dispatch a step, and only when something is due wait for the device."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Optional, Protocol

import jax

from axlearn.common.measurement import EventType
from axlearn.common.progress import Progress, progress_text
from axlearn.common.trainer._agreement import StopAgreement
from axlearn.common.trainer._finite import non_finite_paths
from axlearn.common.trainer._metrics_file import MetricsFile
from axlearn.common.trainer._prefetch import BatchPrefetcher
from axlearn.common.trainer._state import StoppedBySignal, TrainerState, UndefinedLossException
from axlearn.common.trainer._summaries import scalars
from axlearn.common.trainer._throughput import Peak, Reading, Throughput
from axlearn.common.trainer._trace import StepTracer

# The first steps of a run are all logged, and the first one of each process: that is when one looks.
_LAST_OF_THE_FIRST_STEPS = 5


class Trainable(Protocol):
    """What the loop asks of its trainer; `SpmdTrainer` documents each."""

    progress: Progress
    summary_writer: Callable[[int, dict[str, Any]], None]

    @property
    def max_step(self) -> float: ...

    @property
    def step(self) -> int: ...

    @property
    def restored_step(self) -> Optional[int]: ...

    @property
    def trainer_state(self) -> TrainerState: ...

    @property
    def evalers(self) -> Mapping[str, Any]: ...

    @property
    def handles_undefined_loss(self) -> bool: ...

    def advance(self, *, step: int, state: TrainerState, position: Optional[dict[str, Any]]) -> None: ...

    def evaluate(self, name: str, *, train_summaries: dict[str, Any]) -> dict[str, Any]: ...

    def evaluates_ema(self, name: str) -> bool: ...

    def save_is_due(self, *, evaler_summaries: dict[str, Any]) -> bool: ...

    def save(self, *, evaler_summaries: dict[str, Any]) -> None: ...

    def wait_until_saved(self) -> None: ...

    def record_event(self, event: EventType) -> AbstractContextManager: ...

    def log_config(self) -> None: ...

    def note_peak(self, peak: Peak) -> None: ...

    def vlog(self, level: int, msg: str, *args: Any) -> None: ...


class TrainLoop:
    """One run of a trainer whose state is ready.

    Args:
        trainer: The trainer; the loop moves its step and its state.
        step_fn: The compiled step, from (state, batch) to (state, outputs).
        prefetcher: The batches.
        stops: Tells when to stop early.
        throughput: Counts tokens.
        metrics_file: Where records go; None on all processes but the first.
        tracer: Records profiles.
        log_every_n_steps: Steps between two lines of the log.
    """

    def __init__(
        self,
        trainer: Trainable,
        *,
        step_fn: Callable[..., Any],
        prefetcher: BatchPrefetcher,
        stops: StopAgreement,
        throughput: Throughput,
        metrics_file: Optional[MetricsFile],
        tracer: StepTracer,
        log_every_n_steps: int,
    ):
        self._trainer = trainer
        self._step_fn = step_fn
        self._prefetcher = prefetcher
        self._stops = stops
        self._throughput = throughput
        self._metrics_file = metrics_file
        self._tracer = tracer
        self._log_every_n_steps = log_every_n_steps
        # Losses of dispatched steps that nobody has looked at yet.
        self._unseen_losses: list[tuple[int, jax.Array]] = []
        self._last_reading: dict[str, float] = {}
        self._last_saved_step: Optional[int] = trainer.restored_step
        self._last_evaled: tuple[Optional[int], dict[str, Any]] = (None, {})
        self._outputs: Optional[dict[str, Any]] = None
        self._started: Optional[tuple[int, float]] = None

    def run(self) -> Optional[dict[str, Any]]:
        """Trains to `max_step` or the end of the data; returns the last step's outputs, None without any."""
        trainer = self._trainer
        if trainer.step == 0:
            self._evaluate_and_save({})
        while trainer.step < trainer.max_step:
            signum = self._stops.signal_behind(trainer.step)
            if signum is not None:
                self._stop(signum)
            try:
                batch = self._prefetcher.get()
            except StopIteration:
                trainer.progress.message(f"The training data ended after step {trainer.step}.")
                self._finish_early()
                break
            except Exception:
                # The losses up to here are worth having; if one of them is the reason, this raises it again.
                self._write_records(self._fetch_losses())
                raise
            self._do_step(batch)
        return self._outputs

    def evaler_summaries(self) -> dict[str, Any]:
        """Returns the summaries of the last evaluation, by evaler."""
        return self._last_evaled[1]

    def _do_step(self, batch: Any) -> None:
        trainer = self._trainer
        step = trainer.step + 1
        self._tracer.before_step(step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, outputs = self._step_fn(trainer.trainer_state, batch.arrays)
        trainer.advance(step=step, state=state, position=batch.position)
        self._prefetcher.step_dispatched(step, outputs["loss"])
        self._unseen_losses.append((step, outputs["loss"]))
        self._throughput.count(num_tokens=batch.num_tokens)
        self._outputs = outputs
        self._tracer.after_step(step, outputs, is_last=step >= trainer.max_step)
        if self._log_is_due(step):
            self._log(step, outputs)
        trainer.summary_writer(step, dict(loss=outputs["loss"], **outputs["summaries"], **self._last_reading))
        # Whatever the policies say, the last step is evaluated and saved.
        self._evaluate_and_save(outputs["summaries"], force=step >= trainer.max_step)

    def _log_is_due(self, step: int) -> bool:
        return (
            self._started is None
            or step <= _LAST_OF_THE_FIRST_STEPS
            or step % self._log_every_n_steps == 0
            or step == self._trainer.max_step
        )

    def _log(self, step: int, outputs: dict[str, Any]) -> None:
        """Waits for the step, and tells all who want to know."""
        trainer = self._trainer
        # The loss first: the reading below is of steps that are done.
        losses = self._fetch_losses()
        is_first = self._started is None
        reading = self._read_throughput(step)
        self._last_reading = {} if reading is None else _reading_scalars(reading)
        loss = losses[-1][1]
        self._write_records(losses, **scalars(outputs["summaries"]), **self._last_reading, time=time.time())
        trainer.vlog(1, "step %d: loss=%s aux=%s", step, loss, outputs["aux"])
        text = progress_text(
            step=step,
            max_step=trainer.max_step,
            loss=loss,
            tokens_per_second=None if reading is None else reading.tokens_per_second,
            mfu_full=None if reading is None else reading.mfu_full,
            mfu_causal=None if reading is None else reading.mfu_causal,
            seconds_left=self._seconds_left(step),
        )
        trainer.progress.update(text)
        if is_first:
            # Only now: the writer's library takes a second to load, and the first step should not wait.
            with self._throughput.pause():
                trainer.log_config()

    def _read_throughput(self, step: int) -> Optional[Reading]:
        """Returns the pace since the last line of the log; None for the first step of a process.

        That one includes what is done once, such as loading the program: its pace says nothing.
        """
        if self._started is None:
            self._started = (step, time.perf_counter())
            self._throughput.restart()
            return None
        reading = self._throughput.read()
        if reading.peak is not None:
            self._trainer.note_peak(reading.peak)
        return reading

    def _seconds_left(self, step: int) -> Optional[float]:
        assert self._started is not None
        first_step, started = self._started
        if step == first_step:
            return None
        return (self._trainer.max_step - step) * (time.perf_counter() - started) / (step - first_step)

    def _fetch_losses(self) -> list[tuple[int, float]]:
        """Waits for the losses of all steps since the last look.

        Raises:
            UndefinedLossException: If one of them is not finite, naming the first.
        """
        losses = [
            (step, float(loss))
            for (step, _), loss in zip(
                self._unseen_losses, jax.device_get([loss for _, loss in self._unseen_losses]), strict=True
            )
        ]
        self._unseen_losses.clear()
        for i, (step, loss) in enumerate(losses):
            if not math.isfinite(loss) and not self._trainer.handles_undefined_loss:
                self._write_records(losses[: i + 1])
                raise undefined_loss(step, loss)
        return losses

    def _write_records(self, losses: list[tuple[int, float]], **last: Any) -> None:
        """Writes a record per step; `last` goes into that of the last one."""
        if self._metrics_file is not None and losses:
            records: list[dict[str, Any]] = [{"step": step, "loss": loss} for step, loss in losses]
            records[-1].update({k: v for k, v in last.items() if k not in records[-1]})
            self._metrics_file.write(records)

    def _evaluate_and_save(self, train_summaries: dict[str, Any], *, force: bool = False) -> None:
        """Evaluates and saves the current step: what is due, or with `force` all that is not done yet."""
        trainer = self._trainer
        done = self._last_evaled[1] if self._last_evaled[0] == trainer.step else {}
        due = [
            name
            for name, evaler in trainer.evalers.items()
            if name not in done
            and (force or evaler.is_due(step=trainer.step, train_summaries=train_summaries))
        ]
        evaler_summaries = {**done, **self._evaluate(due, train_summaries=train_summaries)}
        if self._last_saved_step != trainer.step and (
            trainer.save_is_due(evaler_summaries=evaler_summaries) or force
        ):
            self._save(evaler_summaries=evaler_summaries)

    def _evaluate(self, names: list[str], *, train_summaries: dict[str, Any]) -> dict[str, Any]:
        """Runs some evalers at the current step."""
        if not names:
            return {}
        trainer = self._trainer
        step = trainer.step
        # Before the clock of the evaluation: the steps before it are training.
        jax.block_until_ready(trainer.trainer_state.model)
        results: dict[str, Any] = {}
        with self._throughput.pause(), trainer.record_event(EventType.EVAL):
            for name in names:
                results[name] = trainer.evaluate(name, train_summaries=train_summaries)
                self._report_eval(name, scalars(results[name]))
        done = self._last_evaled[1] if self._last_evaled[0] == step else {}
        self._last_evaled = (step, {**done, **results})
        return results

    def _report_eval(self, name: str, values: dict[str, float]) -> None:
        step = self._trainer.step
        # Said only where it is not the parameters, as it is in most runs.
        weights = {"weights": "ema"} if self._trainer.evaluates_ema(name) else {}
        if self._metrics_file is not None:
            self._metrics_file.write([{"step": step, "evaler": name, **weights, "summaries": values}])
        text = "  ".join(f"{key} {value:.4f}" for key, value in values.items())
        of_ema = " (averaged weights)" if weights else ""
        self._trainer.progress.message(f"eval {name}{of_ema} at step {step}  {text}")

    def _save(self, *, evaler_summaries: dict[str, Any]) -> None:
        """Saves the state of the current step, once what is saved is known to be finite."""
        trainer = self._trainer
        step = trainer.step
        self._write_records(self._fetch_losses())
        with self._throughput.pause(), trainer.record_event(EventType.CHECKPOINT_SAVE):
            bad_paths = non_finite_paths(trainer.trainer_state._asdict())
            if bad_paths:
                raise _undefined_state(step, bad_paths)
            trainer.save(evaler_summaries=evaler_summaries)
        self._last_saved_step = step

    def _finish_early(self) -> None:
        """Evaluates and saves the step that turned out to be the last one."""
        if self._outputs is not None:
            self._evaluate_and_save(self._outputs["summaries"], force=True)
            self._write_records(self._fetch_losses())

    def _stop(self, signum: int) -> None:
        """Saves and leaves, because somebody asked to."""
        if self._outputs is not None and self._last_saved_step != self._trainer.step:
            self._save(evaler_summaries={})
        self._trainer.wait_until_saved()
        is_saved = self._last_saved_step == self._trainer.step
        raise StoppedBySignal(step=self._trainer.step, signum=signum, is_saved=is_saved)


def undefined_loss(step: int, loss: float) -> UndefinedLossException:
    """Returns the error for a loss that is not finite."""
    return UndefinedLossException(
        f"The loss of step {step} is {loss}. Nothing after it is saved; the checkpoints before it stay.",
        step=step,
    )


def _undefined_state(step: int, bad_paths: list[str]) -> UndefinedLossException:
    more = f" and {len(bad_paths) - 1} more" if len(bad_paths) > 1 else ""
    return UndefinedLossException(
        f"The state after step {step} is not finite: {bad_paths[0]}{more}. It was not saved; the checkpoints "
        "before it stay.",
        step=step,
    )


def _reading_scalars(reading: Reading) -> dict[str, float]:
    values = reading._replace(peak=None)._asdict()
    return {name: value for name, value in values.items() if value is not None}
