"""The trainer: one mesh, one state, one compiled step, and the loop around it."""

import contextlib
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Optional, Union

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from axlearn.common.checkpointer import Checkpointer
from axlearn.common.config import (
    REQUIRED,
    InstantiableConfig,
    Required,
    RequiredFieldMissingError,
    config_class,
    error_message,
    join_messages,
    maybe_instantiate,
)
from axlearn.common.evaler import SpmdEvaler, maybe_set_fields, set_writer_fields
from axlearn.common.measurement import Event, EventType, maybe_build_recorder, maybe_record_event
from axlearn.common.module import Module, nowrap
from axlearn.common.processes import wait_for_all
from axlearn.common.progress import Progress
from axlearn.common.summary_writer import SummaryWriter
from axlearn.common.trainer._agreement import StopAgreement
from axlearn.common.trainer._analysis import write_description
from axlearn.common.trainer._checks import (
    batch_axis_names,
    check_new_values,
    check_trainer_config,
    check_vocabularies,
    collecting_missing,
)
from axlearn.common.trainer._evaluation import (
    check_evaled_weights,
    evaler_configs,
    evaluate,
    evaluates_ema,
    train_summaries_dir,
)
from axlearn.common.trainer._loop import TrainLoop, undefined_loss
from axlearn.common.trainer._metrics_file import MetricsFile
from axlearn.common.trainer._position import DataPosition, PositionedIterator
from axlearn.common.trainer._prefetch import BatchPrefetcher
from axlearn.common.trainer._programs import Programs
from axlearn.common.trainer._restoring import begin_text, complete_state, state_to_restore
from axlearn.common.trainer._saved_step import load_train_step
from axlearn.common.trainer._signals import StopSignals
from axlearn.common.trainer._state import TrainerState, as_raw_key
from axlearn.common.trainer._throughput import Peak, Throughput
from axlearn.common.trainer._trace import step_tracer
from axlearn.common.trainer._watchdog import Watchdog
from axlearn.common.utils import (
    HybridMeshShape,
    MeshShape,
    Nested,
    NestedTensor,
    Tensor,
    build_mesh,
    host_to_global_array,
    use_mesh,
)

# How long the first process that has its data, or its state, waits for the last one, which may read more slowly.
_READY_SECONDS = 3600.0
# Such meetings need names of their own for each run of this process, the same in all processes.
_runs = itertools.count()
# Steps between two lines of the log where nobody says otherwise.
_LOG_EVERY_N_STEPS = 100


class SpmdTrainer(Module):
    """Trains a model on a mesh of devices, as one program over all of them.

    The position in the data is part of every checkpoint, for every input whose iterator can tell it: such a
    position is one small JSON value, the same for any number of processes, and a run that lost it would train
    on the same data twice. `save_input_iterator=True` adds that an input which cannot tell its position is
    refused.
    """

    @config_class
    class Config(Module.Config):
        """Configures SpmdTrainer."""

        # The training data.
        input: Required[InstantiableConfig] = REQUIRED
        # Where the numbers of a run go besides metrics.jsonl; its folder is <dir>/summaries/train_train if it
        # has none.
        summary_writer: InstantiableConfig = SummaryWriter.default_config()
        # The folder of the run.
        dir: Required[str] = REQUIRED
        # Initialises from other checkpoints. None: from the model's initializers. Not available in this
        # version.
        init_state_builder: Optional[InstantiableConfig] = None
        # The step after which training ends; infinity for the end of the data.
        max_step: Union[int, float] = math.inf
        # The size of each mesh axis; at most one may be -1, to be inferred from the number of devices.
        mesh_shape: Required[Union[MeshShape, HybridMeshShape]] = REQUIRED
        # The name of each mesh axis.
        mesh_axis_names: Required[Sequence[str]] = REQUIRED
        # The mesh axes over which the rows of a batch are split.
        batch_axis_names: Union[str, Sequence[str]] = "data"
        # (regular expression, mesh shape or config modifier or None) in order, for `select_mesh_config`.
        # None: none.
        mesh_rules: Optional[Sequence[tuple[str, Any]]] = None
        # The model: a BaseLayer whose forward(input_batch) returns (loss, aux).
        model: Required[InstantiableConfig] = REQUIRED
        # The optimizer and what it may update.
        learner: Required[InstantiableConfig] = REQUIRED
        # When and how the state is saved; its folder is <dir>/checkpoints if it has none.
        checkpointer: InstantiableConfig = Checkpointer.default_config()
        # Evaluations by name.
        evalers: dict[str, SpmdEvaler.Config] = {}
        # Whether an input that cannot tell its position is an error; see the class.
        save_input_iterator: bool = False
        # The steps at which to begin a profile.
        start_trace_steps: Sequence[int] = []
        # Steps of each profile. None: 3.
        n_steps_for_each_trace: Optional[int] = None
        # The processes that record profiles, or "all".
        start_trace_process_indices: Union[Literal["all"], Sequence[int]] = [0]
        # The mode of the TPU profiler. None: its own default.
        tpu_trace_mode: Optional[str] = None
        # Levels of detail of the profiler. None: its own defaults.
        host_tracer_level: Optional[int] = None
        device_tracer_level: Optional[int] = None
        python_tracer_level: Optional[int] = None
        # At which steps TPUs check their own arithmetic. None: never. Not available in this version.
        xsc_check_policy: Optional[InstantiableConfig] = None
        # Part of old dumps; only True means something.
        prune_empty_state_updates: bool = True
        # The type in which the forward pass sees parameters and inputs, or a config of a function from the
        # parameters to a tree of types. None: as they are.
        train_dtype: Optional[Any] = None
        # Seconds without a new step after which all stacks are written to standard error. None: never.
        watchdog_timeout_seconds: Optional[float] = None
        # Seconds without a new step after which the process kills itself. None: never.
        crash_on_hang_timeout_seconds: Optional[float] = None
        # Watches the devices. None: nothing does. Not available in this version.
        device_monitor: Optional[InstantiableConfig] = None
        # Told when what happens. None: nobody is.
        recorder: Optional[InstantiableConfig] = None
        # A function that makes a context to train in, or its config. None: none.
        context_manager: Optional[
            Union[InstantiableConfig, Callable[[], contextlib.AbstractContextManager]]
        ] = None
        # None or True: the step is compiled once, for the shapes that the input declares, and another shape
        # is an error. False: it is compiled again for each new shape of a batch.
        cache_compiled_train_step: Optional[bool] = None
        # The folder with the compiled step that `axlearn plan --save_executable` keeps: it is loaded. None: the step is
        # compiled.
        executable_dir: Optional[str] = None
        # True: the step is compiled, with a warning, where the one in executable_dir is for something else. None or
        # False: that is an error.
        executable_fallback: Optional[bool] = None
        # Steps between two lines of the log and of metrics.jsonl's full records. None: 100.
        log_every_n_steps: Optional[int] = None
        # None or True: a run that cannot fit into the memory there is refused before it begins. False: it is
        # tried.
        check_memory: Optional[bool] = None

    def __init__(self, cfg: Config, *, parent: Optional[Module], devices: Optional[np.ndarray] = None):
        """Builds the mesh and everything on it; touches no file and starts no computation.

        Args:
            cfg: The config.
            parent: None, usually.
            devices: The devices of the mesh in the shape of the mesh; None for all devices of all processes.

        Raises:
            ValueError: If the mesh does not fit the devices, the model has no dtype, or a field has a value
                that this version does not support.
        """
        super().__init__(cfg, parent=parent)
        check_trainer_config(cfg)
        self._mesh = build_mesh(
            mesh_shape=cfg.mesh_shape,
            mesh_axis_names=cfg.mesh_axis_names,
            devices=None if devices is None else list(devices.flatten()),
        )
        self._step = 0
        self._restored_step: Optional[int] = None
        self._trainer_state: Optional[TrainerState] = None
        self._position: Optional[DataPosition] = None
        self._peak: Optional[Peak] = None
        self._recorder = maybe_build_recorder(cfg.recorder)
        # One process speaks for all.
        self.progress = Progress(is_silent=jax.process_index() != 0)
        with self.mesh():
            self._add_children()
            self._programs = Programs(
                mesh=self._mesh,
                model=self.model,
                learner=self.learner,
                input=self.input,
                train_dtype=cfg.train_dtype,
            )
            check_new_values(self.model, learner=self.learner, model_specs=self.trainer_state_specs.model)
            # Here already, so that a batch that does not divide is refused before anything runs.
            self._programs.batch_specs()
            check_evaled_weights(self._evalers, has_ema="ema" in self.trainer_state_specs.learner)

    def _add_children(self) -> None:
        """Adds all children; what is missing in several of them is one error."""
        cfg = self.config
        partition_spec = PartitionSpec(batch_axis_names(cfg.batch_axis_names))
        children = {
            "input": maybe_set_fields(cfg.input, is_training=True, partition_spec=partition_spec),
            "model": cfg.model,
            "learner": cfg.learner,
            "summary_writer": set_writer_fields(cfg.summary_writer, dir=train_summaries_dir(cfg.dir)),
            "checkpointer": maybe_set_fields(
                cfg.checkpointer, dir=os.path.join(cfg.dir, "checkpoints"), trainer_dir=cfg.dir
            ),
        }
        missing: list[RequiredFieldMissingError] = []
        for name, child_cfg in children.items():
            with collecting_missing(missing):
                self._add_child(name, child_cfg)
        self._evalers: dict[str, SpmdEvaler] = {}
        for name, evaler_cfg in evaler_configs(cfg.evalers, run_dir=cfg.dir, partition_spec=partition_spec):
            with collecting_missing(missing):
                self._evalers[name] = self._add_child(name, evaler_cfg, model=self.children.get("model"))
        if len(missing) == 1:
            raise missing[0]
        if missing:
            heading = f"{len(missing)} parts of {self.path()} lack required fields:"
            raise RequiredFieldMissingError(join_messages([str(e) for e in missing], heading=heading))

    # What a run is made of.

    @property
    def max_step(self) -> float:
        """The step after which training ends."""
        return self.config.max_step

    @property
    def step(self) -> int:
        """The last step that was dispatched; 0 before the first."""
        return self._step

    @property
    def restored_step(self) -> Optional[int]:
        """The step of the checkpoint from which this run continues; None if it began from scratch."""
        return self._restored_step

    @property
    def trainer_state(self) -> TrainerState:
        """The state after `step`. The next step donates it: keep no reference to its arrays."""
        assert self._trainer_state is not None, "run() or restore_or_init() makes the state."
        return self._trainer_state

    @property
    def trainer_state_specs(self) -> TrainerState:
        """Shape, type and place of every array of the state."""
        return self._programs.state_specs

    @property
    def trainer_state_partition_specs(self) -> Nested[NamedSharding]:
        """The sharding of every array of the state."""
        return self._programs.state_shardings()

    @property
    def programs(self) -> Programs:
        """The programs of this trainer, not compiled yet, and the specs of all that goes through them."""
        return self._programs

    @property
    def evalers(self) -> dict[str, SpmdEvaler]:
        """The evalers by name."""
        return self._evalers

    @property
    def handles_undefined_loss(self) -> bool:
        """Whether the learner makes nothing of a loss that is not finite, so that training may go on."""
        return bool(self.learner.handles_undefined_loss())

    @nowrap
    def mesh(self) -> contextlib.AbstractContextManager:
        """Returns a context in which the mesh of this trainer is the mesh of the thread."""
        return use_mesh(self._mesh)

    @nowrap
    def record(self, event: Event, **facts: Any) -> None:
        """Tells the recorder of a moment."""
        if self._recorder is not None:
            self._recorder.record(event, **facts)

    @nowrap
    def record_event(self, event: EventType) -> contextlib.AbstractContextManager:
        """Returns a context whose duration goes to the recorder."""
        return maybe_record_event(self._recorder, event)

    # A run.

    @nowrap
    def run(
        self,
        prng_key: Tensor,
        *,
        return_evaler_summaries: bool = False,
        on_ready: Optional[Callable[[], None]] = None,
    ) -> Optional[dict[str, Any]]:
        """Trains from the newest checkpoint, or from scratch where there is none, until `max_step`.

        Whatever the policies say, the last step is evaluated and saved. SIGTERM and SIGINT end the run after
        the step it is in, with a save; a second one ends the process at once.

        Args:
            prng_key: The key of a run that begins from scratch; a run that continues has its own.
            return_evaler_summaries: Whether the returned dict has the last evaluation as `evaler_summaries`.
            on_ready: Called once when the state is there, before anything is written into the folder of the
                run by this run: a run that cannot continue leaves what stands there as it is.

        Returns:
            `loss` and `aux` of the last step; None if there was none to do.

        Raises:
            DoesNotFitError: If there is not enough memory; nothing was read and nothing was made then.
            UndefinedLossException: If the loss or the state is not finite.
            StoppedBySignal: If a signal ended the run.
            Exception: Whatever reading the data, restoring and saving raise.
        """
        cfg, run = self.config, next(_runs)
        if cfg.check_memory is not False:
            self._programs.check_fits(where=self.path())
        with StopSignals() as signals, self._surroundings():
            self.record(Event.START_JOB)
            with self.record_event(EventType.TRAINING_PREPARATION):
                iterator = self._open_input()
                for evaler in self._evalers.values():
                    # Data that is not there is an error now, and not at the first evaluation.
                    evaler.input.batches()
                inputs = (self.input, *(evaler.input for evaler in self._evalers.values()))
                check_vocabularies(self.model, inputs=inputs)
                # A process that refuses the run does so before another makes the folder of checkpoints and tidies it.
                wait_for_all(f"trainer/checked/{run}", timeout_seconds=_READY_SECONDS)
                self.restore_or_init(prng_key)
                # Likewise, before another writes anything.
                wait_for_all(f"trainer/ready/{run}", timeout_seconds=_READY_SECONDS)
            if on_ready is not None:
                on_ready()
            if self._step >= cfg.max_step:
                self.progress.message(
                    f"There is nothing to do: step {self._step} is max_step={cfg.max_step} or beyond."
                )
                return None
            with self._loop(iterator, signals=signals) as loop:
                outputs = loop.run()
                self.wait_until_saved()
            self.record(Event.END_JOB)
            self.progress.message(f"Finished at step {self._step}.")
            if outputs is None:
                return None
            result = {"loss": outputs["loss"], "aux": outputs["aux"]}
            if return_evaler_summaries:
                result["evaler_summaries"] = loop.evaler_summaries()
            return result

    @nowrap
    def restore_or_init(self, prng_key: Tensor) -> None:
        """Makes the state: from the newest checkpoint that verifies; where there is none, from initializers.

        Args:
            prng_key: The key of a run that begins from scratch.

        Raises:
            ValueError: If the newest checkpoint is of another model or of other data.
            Exception: If there are checkpoints, but none can be read.
        """
        with self.mesh():
            if self.restore_checkpoint(prng_key=prng_key) is None:
                self.init(prng_key)

    @nowrap
    def restore_checkpoint(
        self, restore_step: Optional[int] = None, *, prng_key: Optional[Tensor] = None
    ) -> Optional[int]:
        """Restores the state and the position in the data, and says so.

        A checkpoint without a position in the data, or with one of AXLearn's, goes on behind the batch of its step.

        Args:
            restore_step: The step; None for the newest that verifies.
            prng_key: The key from which the rest is made, where a checkpoint of step 0 holds nothing but parameters or
                `checkpointer.restore_state_filter` leaves parts out. None: all must be restored.

        Returns:
            The step; None if there is no checkpoint.

        Raises:
            ValueError: If the checkpoint is of another model or data, or the rest has no key.
            Exception: If there are checkpoints, but none can be read.
        """
        choose_state = functools.partial(
            state_to_restore,
            programs=self._programs,
            position=self._position,
            may_begin=prng_key is not None,
        )
        step, restored = self.checkpointer.restore(step=restore_step, state={}, state_fn=choose_state)
        anew: list[str] = []
        if step is not None:
            self._trainer_state, anew = complete_state(
                restored, programs=self._programs, prng_key=prng_key, where=self.path()
            )
            self._step = self._restored_step = step
        text = begin_text(
            step=step,
            is_parameters_only=step is not None and "learner" not in restored,
            anew=anew,
            follows_step=self._position is not None and self._position.follows_step,
        )
        self.progress.message(text)
        return step

    @nowrap
    def init(self, prng_key: Tensor) -> None:
        """Makes the state of step 0 on the mesh; it is the same on every mesh."""
        self._trainer_state = self._programs.init(as_raw_key(prng_key))
        self._step = 0

    @nowrap
    def compile_train_step(
        self,
        *,
        trainer_state: Optional[Nested[Any]] = None,
        input_batch: Optional[Nested[Any]] = None,
        compiler_options: Optional[dict[str, Any]] = None,
    ) -> jax.stages.Compiled:
        """Compiles the step from shapes alone; no array and no data are needed.

        Args:
            trainer_state: Specs or arrays of the state; None for those of this trainer.
            input_batch: Specs or arrays of a global batch; None for what the input declares.
            compiler_options: For XLA; None for its defaults.

        Returns:
            The compiled step: (state, batch) -> (state, dict(loss, aux, summaries)). It donates the state.
        """
        return self._programs.compile_train_step(
            trainer_state=trainer_state, input_batch=input_batch, compiler_options=compiler_options
        )

    # The parts of `run`.

    @contextlib.contextmanager
    def _surroundings(self) -> Iterator[None]:
        """What a run stands in: its mesh, those who watch it, and what has to be closed behind it."""
        cfg = self.config
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.mesh())
            if self._recorder is not None:
                stack.enter_context(self._recorder.maybe_monitor_all())
            if cfg.context_manager is not None:
                stack.enter_context(_context_of(cfg.context_manager))
            stack.callback(self.progress.close)
            for owner in (self, *self._evalers.values()):
                stack.callback(owner.summary_writer.close)
            stack.callback(self.checkpointer.stop)
            yield

    def _open_input(self) -> Iterator[dict[str, np.ndarray]]:
        iterator = self.input.batches()
        if isinstance(iterator, PositionedIterator):
            self._position = DataPosition(iterator)
        elif self.config.save_input_iterator:
            raise ValueError(
                error_message(
                    where=f"{self.path()}.save_input_iterator",
                    what=f"True, but the iterator of {type(self.input).__name__} cannot tell its position",
                    expected="an iterator with get_state() and set_state(state)",
                )
            )
        return iterator

    @contextlib.contextmanager
    def _loop(
        self, iterator: Iterator[dict[str, np.ndarray]], *, signals: StopSignals
    ) -> Iterator[TrainLoop]:
        """Builds the loop, with the thread that feeds it running while the step compiles."""
        cfg = self.config
        tracer = step_tracer(cfg, folder=train_summaries_dir(cfg.dir))
        watchdog = Watchdog(
            lambda: self._step,
            timeout_seconds=cfg.watchdog_timeout_seconds,
            crash_timeout_seconds=cfg.crash_on_hang_timeout_seconds,
        )
        prefetcher = BatchPrefetcher(
            iterator,
            prepare=self._prepare_batch,
            on_finished=self._check_loss,
            logical_rows=self.input.logical_rows,
            num_feeds=self.input.num_feeds,
            thread_context=self.mesh,
        )
        stops = StopAgreement(signals, step=self._step, num_processes=jax.process_count())
        with watchdog, stops, prefetcher, contextlib.closing(tracer):
            step_fn = self._compile()
            write_description(cfg.dir, state_specs=self.trainer_state_specs, step_fn=step_fn)
            yield TrainLoop(
                self,
                step_fn=step_fn,
                prefetcher=prefetcher,
                stops=stops,
                throughput=self._throughput(),
                metrics_file=self._metrics_file(),
                tracer=tracer,
                log_every_n_steps=cfg.log_every_n_steps or _LOG_EVERY_N_STEPS,
            )

    def _compile(self) -> Callable[..., Any]:
        if self.config.cache_compiled_train_step is False:
            return self._programs.jit_train_step()
        with self.record_event(EventType.COMPILATION):
            if self.config.executable_dir is not None:
                return load_train_step(self.config, programs=self._programs, mesh=self._mesh)
            return self.compile_train_step()

    def _throughput(self) -> Throughput:
        input_ids = self.input.element_spec().get("input_ids")
        # The others report nothing, and need not measure their devices for it.
        is_reporting = jax.process_index() == 0
        flops_fn = getattr(self.model, "flops_per_token", None) if is_reporting else None
        return Throughput(
            devices=list(self._mesh.devices.flat),
            dtype=self._programs.compute_dtype(),
            flops_per_token=None if input_ids is None or flops_fn is None else flops_fn(input_ids.shape[-1]),
        )

    def _metrics_file(self) -> Optional[MetricsFile]:
        if jax.process_index() != 0:
            return None
        return MetricsFile(os.path.join(self.config.dir, "metrics.jsonl"))

    def _prepare_batch(self, batch: dict[str, np.ndarray]) -> NestedTensor:
        """Checks a batch of the host and puts it on the mesh; runs in the thread that reads."""
        check_host_batch = getattr(self.model, "check_host_batch", None)
        if check_host_batch is not None:
            check_host_batch(batch)
        return host_to_global_array(batch, partition=self.input.partition_spec)

    def _check_loss(self, step: int, loss: jax.Array) -> None:
        """Runs in the thread that reads, when the device has done a step."""
        value = float(loss)
        if not math.isfinite(value) and not self.handles_undefined_loss:
            raise undefined_loss(step, value)

    # What the loop asks for.

    @nowrap
    def advance(self, *, step: int, state: TrainerState, position: Optional[dict[str, Any]]) -> None:
        """Takes over the state after a dispatched step, and the position behind its batch."""
        self.record(Event.START_STEP, step=step)
        self._step = step
        self._trainer_state = state
        if self._position is not None:
            self._position.advance(position)

    @nowrap
    def evaluate(self, name: str, *, train_summaries: dict[str, Any]) -> dict[str, Any]:
        """Runs one evaler on the state of the current step."""
        return evaluate(
            self._evalers[name], step=self._step, state=self.trainer_state, train_summaries=train_summaries
        )

    @nowrap
    def evaluates_ema(self, name: str) -> bool:
        """Returns whether an evaler evaluates the averaged parameters at the current step."""
        return evaluates_ema(self._evalers[name], step=self._step, state=self.trainer_state)

    @nowrap
    def save_is_due(self, *, evaler_summaries: dict[str, Any]) -> bool:
        """Returns whether the checkpointer's policy asks for a save at the current step."""
        return self.checkpointer.is_due(step=self._step, evaler_summaries=evaler_summaries)

    @nowrap
    def save(self, *, evaler_summaries: dict[str, Any]) -> None:
        """Saves the state of the current step, whatever the policy says."""
        state = self.trainer_state._asdict()
        if self._position is not None:
            state["input_iter"] = self._position
        self.checkpointer.save(step=self._step, state=state, evaler_summaries=evaler_summaries, force=True)

    @nowrap
    def wait_until_saved(self) -> None:
        """Returns when all saves are committed; raises what went wrong in one of them."""
        self.checkpointer.wait_until_finished()

    @nowrap
    def log_config(self) -> None:
        """Writes the config where the summaries are."""
        self.summary_writer.log_config(self.config, step=self._step)

    @nowrap
    def note_peak(self, peak: Peak) -> None:
        """Says once what the utilisation is measured against."""
        if self._peak is None:
            self._peak = peak
            self.progress.message(f"MFU is of {peak.flops_per_second / 1e9:,.1f} GFLOP/s: {peak.source}.")


def _context_of(context_manager: Any) -> contextlib.AbstractContextManager[Any]:
    made = maybe_instantiate(context_manager)
    return made() if callable(made) else made
