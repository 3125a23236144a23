"""The compiled programs of a trainer, and the shapes and places of all that goes through them."""

import functools
import math
from typing import Any, Optional

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from axlearn.common.base_layer import BaseLayer
from axlearn.common.config import InstantiableConfig, error_message
from axlearn.common.input_base import Input
from axlearn.common.learner import BaseLearner
from axlearn.common.module import Module
from axlearn.common.trainer._state import TrainerState, default_key_shape
from axlearn.common.trainer._step import as_cast_fns, init_state, train_step
from axlearn.common.utils import Nested, Tensor, TensorSpec, use_mesh


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
            ValueError: If the rows of a batch do not divide over the devices.
        """
        with use_mesh(self._mesh):
            spec = self._input.partition_spec

        def place(x: TensorSpec) -> jax.ShapeDtypeStruct:
            axes = PartitionSpec(*spec[: len(x.shape)])
            self._check_divides(x.shape, axes)
            sharding = NamedSharding(self._mesh, axes)
            return jax.ShapeDtypeStruct(tuple(x.shape), x.dtype, sharding=sharding)

        return jax.tree.map(place, self._input.element_spec())

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

    def init(self, raw_key: Tensor) -> TrainerState:
        """Makes the state of step 0; it is the same on every mesh."""
        self.expect_key(raw_key.shape)
        init = functools.partial(
            init_state, model=self._model, learner=self._learner, model_specs=self._model_specs
        )
        with use_mesh(self._mesh):
            return jax.jit(init, out_shardings=self.state_shardings())(raw_key)

    def jit_train_step(self) -> Any:
        """Returns the jitted step, which donates the state."""
        cast_params, cast_batch = as_cast_fns(self._train_dtype)
        step_fn = functools.partial(
            train_step,
            model=self._model,
            learner=self._learner,
            model_specs=self._model_specs,
            dispatch_batch=self._input.dispatch_global_batch,
            cast_params=cast_params,
            cast_batch=cast_batch,
            noise_params=self._model.apply_parameter_noise_recursively if _has_noise(self._model) else None,
        )
        replicated = NamedSharding(self._mesh, PartitionSpec())
        return jax.jit(step_fn, donate_argnums=(0,), out_shardings=(self.state_shardings(), replicated))

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
