"""The compiled programs of a trainer, and the shapes and places of all that goes through them."""

import dataclasses
import functools
import math
from typing import Any, Optional

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from axlearn.common.base_layer import BaseLayer
from axlearn.common.config import InstantiableConfig, error_message
from axlearn.common.input_base import Input
from axlearn.common.learner import BaseLearner
from axlearn.common.module import Module
from axlearn.common.trainer._device_memory import memory_there
from axlearn.common.trainer._gradients import bytes_held_at_once, gradient_sizes
from axlearn.common.trainer._memory import MemoryNeeds, bytes_per_device, check_fits, state_bytes
from axlearn.common.trainer._state import TrainerState, default_key_shape
from axlearn.common.trainer._step import as_cast_fns, init_state, init_state_around, train_step
from axlearn.common.trainer._whole import WholeParameters, find_whole_parameters
from axlearn.common.utils import Nested, Tensor, TensorSpec, flatten_items, use_mesh


class Programs:
    """How the state is made and how a step changes it, on one mesh.

    Args:
        mesh: The mesh.
        model: The model.
        learner: The learner.
        input: The training data.
        train_dtype: As in `SpmdTrainer.Config`.
    """

    def __init__(self, *, mesh: Mesh, model: BaseLayer, learner: BaseLearner, input: Input, train_dtype: Any):
        self._mesh = mesh
        self._model = model
        self._learner = learner
        self._input = input
        self._train_dtype = train_dtype
        self._model_specs = model.create_parameter_specs_recursively()
        # Shape, type and place of every array of the state.
        self.state_specs = TrainerState(
            prng_key=_key_spec(default_key_shape()),
            model=self._model_specs,
            learner=learner.create_state_partition_specs(self._model_specs),
        )
        self._log_placement()

    def _log_placement(self) -> None:
        """Says which parameters lie on more devices each than their specs ask for, or than they must."""
        with use_mesh(self._mesh):
            for path, spec in flatten_items(self._model_specs):
                for dropped in spec.dropped_axes:
                    logging.warning("%s/%s: %s.", self._model.path(), path, dropped)
        for parameter in self.whole_parameters().large:
            logging.warning("%s", parameter.sentence(where=self._model.path()))

    def whole_parameters(self) -> WholeParameters:
        """Returns the parameters that are whole on every device along axes of the mesh that split others."""
        with use_mesh(self._mesh):
            return find_whole_parameters(self.state_specs, mesh=self._mesh, model_cfg=self._model.config)

    def expect_key(self, shape: tuple[int, ...]) -> None:
        """Says that the state has a raw key of this shape, maybe of another generator than the default."""
        self.state_specs = self.state_specs._replace(prng_key=_key_spec(shape))

    def state_shardings(self) -> Any:
        """Returns the sharding of every array of the state."""
        with use_mesh(self._mesh):
            return jax.tree.map(lambda spec: spec.sharding, self.state_specs)

    def batch_specs(self) -> Nested[jax.ShapeDtypeStruct]:
        """Returns shape, type and place of every array of a global batch, as the input declares it.

        Raises:
            ValueError: If the rows of a batch do not divide over the devices, or not into the parts in which
                the learner works through them.
        """
        with use_mesh(self._mesh):
            spec = self._input.partition_spec

        def place(x: TensorSpec) -> jax.ShapeDtypeStruct:
            axes = PartitionSpec(*spec[: len(x.shape)])
            self._check_divides(x.shape, axes)
            sharding = NamedSharding(self._mesh, axes)
            return jax.ShapeDtypeStruct(tuple(x.shape), x.dtype, sharding=sharding)

        specs = jax.tree.map(place, self._input.element_spec())
        self._learner.check_input_batch(jax.eval_shape(self._input.dispatch_global_batch, specs))
        return specs

    def _check_divides(self, shape: Any, spec: PartitionSpec) -> None:
        if not shape or not len(spec) or spec[0] is None:
            return
        axes = (spec[0],) if isinstance(spec[0], str) else tuple(spec[0])
        num_shards = math.prod(self._mesh.shape[axis] for axis in axes)
        if shape[0] % num_shards:
            raise ValueError(
                error_message(
                    where=self._input.path(),
                    what=f"a batch of {shape[0]} rows does not divide over the {num_shards} shards of {axes}",
                    expected=f"a multiple of {num_shards}, such as {-(-shape[0] // num_shards) * num_shards}",
                    advice="Change the batch size, mesh_shape or batch_axis_names",
                )
            )

    def memory_needs(self) -> MemoryNeeds:
        """Returns what a run takes of each device without activations, from shapes: state, gradients, batch."""
        platform = self._platform()
        with use_mesh(self._mesh):
            return MemoryNeeds(
                state=state_bytes(self.state_specs, platform=platform),
                gradients=sum(self._gradient_sizes().values()),
                batch=bytes_per_device(self.batch_specs(), platform=platform),
            )

    def check_fits(self, *, where: str) -> None:
        """Refuses a run that cannot fit into the memory there is; takes none itself.

        Args:
            where: The path of the trainer, for the message.

        Raises:
            DoesNotFitError: If it cannot.
        """
        devices = list(self._mesh.devices.flat)
        there = memory_there(devices)
        needs = self.memory_needs()
        if there is not None and needs.total > there.num_bytes:
            # Only here, where it decides: it traces the learner.
            needs = dataclasses.replace(needs, gradients=self._gradient_bytes_held_at_once())
        check_fits(needs, there=there, where=where, num_devices=len(devices))

    def _platform(self) -> str:
        platform: str = self._mesh.devices.flat[0].platform
        return platform

    def _gradient_sizes(self) -> dict[str, int]:
        return gradient_sizes(
            self._model_specs,
            learner=self._learner,
            train_dtype=self._train_dtype,
            platform=self._platform(),
        )

    def _gradient_bytes_held_at_once(self) -> int:
        with use_mesh(self._mesh):
            return bytes_held_at_once(
                self._gradient_sizes(),
                learner=self._learner,
                model_specs=self._model_specs,
                learner_specs=self.state_specs.learner,
            )

    def init(self, raw_key: Tensor) -> TrainerState:
        """Makes the state of step 0; it is the same on every mesh."""
        self.expect_key(raw_key.shape)
        init = functools.partial(
            init_state, model=self._model, learner=self._learner, model_specs=self._model_specs
        )
        with use_mesh(self._mesh):
            return jax.jit(init, out_shardings=self.state_shardings())(raw_key)

    def complete(self, state: TrainerState, raw_key: Tensor) -> TrainerState:
        """Initialises the part of a state that is not there, as a run that begins with this key would.

        Args:
            state: Arrays, on the mesh as their specs say, and specs in the place of those that are not there.
            raw_key: The key of the run.

        Returns:
            The state with arrays everywhere. What is initialised from parameters is so from those that are there.
        """
        if not isinstance(state.prng_key, jax.Array):
            self.expect_key(raw_key.shape)
        leaves, structure = jax.tree.flatten(state)
        held = [leaf if isinstance(leaf, jax.Array) else None for leaf in leaves]

        def fill(held: list[Optional[Tensor]], raw_key: Tensor) -> list[Optional[Tensor]]:
            def merge(given: TrainerState, made: TrainerState) -> TrainerState:
                return jax.tree.map(
                    lambda x, y: y if x is None else x, given, made, is_leaf=lambda x: x is None
                )

            given = jax.tree.unflatten(structure, held)
            made = init_state(
                raw_key, model=self._model, learner=self._learner, model_specs=self._model_specs
            )
            params = merge(given.model, made.model)
            made = init_state_around(params, raw_key, learner=self._learner, model_specs=self._model_specs)
            # Without what is there among its results, nothing of that is copied.
            return [y if x is None else None for x, y in zip(held, jax.tree.leaves(made), strict=True)]

        shardings = jax.tree.leaves(self.state_shardings())
        wanted = [None if leaf is not None else shardings[i] for i, leaf in enumerate(held)]
        with use_mesh(self._mesh):
            filled = jax.jit(fill, out_shardings=wanted)(held, raw_key)
        leaves = [made if leaf is None else leaf for leaf, made in zip(held, filled, strict=True)]
        completed: TrainerState = jax.tree.unflatten(structure, leaves)
        return completed

    def jit_train_step(self) -> Any:
        """Returns the jitted step, which donates the state."""
        cast_params, cast_batch = as_cast_fns(self._train_dtype)
        step_fn = functools.partial(
            train_step,
            model=self._model,
            learner=self._learner,
            model_specs=self._model_specs,
            dispatch_batch=self._input.dispatch_global_batch,
            partition_rows=self._input.partition_rows,
            cast_params=cast_params,
            cast_batch=cast_batch,
            noise_params=self._model.apply_parameter_noise_recursively if _has_noise(self._model) else None,
        )
        replicated = NamedSharding(self._mesh, PartitionSpec())
        return jax.jit(step_fn, donate_argnums=(0,), out_shardings=(self.state_shardings(), replicated))

    def trace_train_step(self) -> jax.stages.Traced:
        """Traces the step from shapes alone, which takes a fraction of a second and compiles nothing."""
        with use_mesh(self._mesh):
            traced: jax.stages.Traced = self.jit_train_step().trace(
                abstract(self.state_specs), self.batch_specs()
            )
            return traced

    def compile_train_step(
        self,
        *,
        trainer_state: Optional[Any] = None,
        input_batch: Optional[Any] = None,
        compiler_options: Optional[dict[str, Any]] = None,
    ) -> jax.stages.Compiled:
        """See `SpmdTrainer.compile_train_step`."""
        with use_mesh(self._mesh):
            state_specs = abstract(self.state_specs if trainer_state is None else trainer_state)
            batch_specs = self.batch_specs() if input_batch is None else abstract(input_batch)
            compiled: jax.stages.Compiled = (
                self.jit_train_step().lower(state_specs, batch_specs).compile(compiler_options)
            )
            return compiled

    def compute_dtype(self) -> Any:
        """Returns the type in which the step computes, as far as one type says it."""
        dtype = self._train_dtype
        return self._model.dtype() if dtype is None or isinstance(dtype, InstantiableConfig) else dtype


def abstract(tree: Any) -> Any:
    """Returns shape, type and place of a tree of arrays or specs, for `lower`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(tuple(x.shape), x.dtype, sharding=x.sharding), tree)


def _has_noise(module: Module) -> bool:
    """Returns whether a layer adds noise to its parameters in training."""
    own = getattr(module.config, "param_noise", None) is not None
    return own or any(_has_noise(child) for child in module.children.values())


def _key_spec(shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(shape=shape, dtype=jnp.uint32, mesh_axes=PartitionSpec())
