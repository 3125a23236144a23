"""The two programs of a run as pure functions: how its state begins, and one step of training."""

from collections.abc import Callable
from typing import Any, Optional

import jax
import jax.numpy as jnp

from axlearn.common.base_layer import BaseLayer, ParameterSpec
from axlearn.common.config import InstantiableConfig, maybe_instantiate
from axlearn.common.learner import BaseLearner
from axlearn.common.metrics import WeightedSummary
from axlearn.common.module import OutputCollection, functional
from axlearn.common.optimizer_base import make_opt_params
from axlearn.common.trainer._state import TrainerState, as_key, as_raw_key
from axlearn.common.update_transformation import ForwardOutputs
from axlearn.common.utils import Nested, NestedTensor, Tensor, cast_floats, maybe_shard

# Casts the parameters, or a batch, to the types of the step.
CastFn = Callable[[NestedTensor], NestedTensor]


def as_cast_fns(train_dtype: Any) -> tuple[CastFn, CastFn]:
    """Returns how the step casts (its parameters, its batch).

    Args:
        train_dtype: A dtype: floating-point parameters and inputs are cast to it. A config of a function from
            the parameters to a tree of their types: each parameter is cast to its own, and inputs stay.
            None: all stays.
    """
    if not isinstance(train_dtype, InstantiableConfig):
        cast = lambda tree: cast_floats(tree, train_dtype)  # noqa: E731
        return cast, cast
    per_param_dtype = maybe_instantiate(train_dtype)
    return lambda params: jax.tree.map(cast_floats, params, per_param_dtype(params)), lambda batch: batch


def init_state(
    prng_key: Tensor, *, model: BaseLayer, learner: BaseLearner, model_specs: Nested[ParameterSpec]
) -> TrainerState:
    """Returns the state before the first step.

    Args:
        prng_key: The run's key. Of its split in two, the first is the key of the state and the second that of
            the model.
        model: The model.
        learner: The learner.
        model_specs: The specs of the model's parameters.
    """
    _, model_key = jax.random.split(as_key(prng_key))
    params = model.initialize_parameters_recursively(model_key)
    return init_state_around(params, prng_key, learner=learner, model_specs=model_specs)


def init_state_around(
    params: NestedTensor, prng_key: Tensor, *, learner: BaseLearner, model_specs: Nested[ParameterSpec]
) -> TrainerState:
    """Returns the state before the first step with given parameters; see `init_state`."""
    prng_key, _ = jax.random.split(as_key(prng_key))
    learner_state, _ = functional(
        learner,
        prng_key=None,
        state={},
        inputs={"model_params": make_opt_params(params, model_param_specs=model_specs)},
        method="init",
        is_training=True,
    )
    return TrainerState(prng_key=as_raw_key(prng_key), model=params, learner=learner_state)


def train_step(
    state: TrainerState,
    input_batch: NestedTensor,
    *,
    model: BaseLayer,
    learner: BaseLearner,
    model_specs: Nested[ParameterSpec],
    dispatch_batch: CastFn,
    partition_rows: CastFn,
    cast_params: CastFn,
    cast_batch: CastFn,
    noise_params: Optional[Callable[[Tensor, Any], NestedTensor]],
) -> tuple[TrainerState, dict[str, Any]]:
    """Does one step of training.

    Args:
        state: The state; it may be donated.
        input_batch: The global batch.
        model: The model; its `forward(input_batch)` returns (loss, aux).
        learner: The learner.
        model_specs: The specs of the model's parameters.
        dispatch_batch: The input's last word on how the batch lies on the mesh.
        partition_rows: The same for some rows of the dispatched batch: those that one forward pass gets.
        cast_params: How the parameters are cast for the forward pass.
        cast_batch: How the batch is cast.
        noise_params: Adds noise to the parameters of the forward pass, given a key; None adds none.

    Returns:
        The next state, and `loss`, `aux` and `summaries` ("model" and "learner") of the step.
    """
    new_key, noise_key, forward_key, learner_key = jax.random.split(as_key(state.prng_key), 4)

    def forward(*, model_params: NestedTensor, inputs: dict[str, Any]) -> ForwardOutputs:
        # The gradients too lie as the parameters do: what is accumulated of them is not held whole everywhere.
        params = jax.tree.map(lambda x, spec: maybe_shard(x, spec.mesh_axes), model_params, model_specs)
        params = cast_params(params)
        if noise_params is not None:
            params = noise_params(inputs["noise_key"], params)
        (loss, aux), collection = functional(
            model,
            prng_key=inputs["forward_key"],
            state=params,
            inputs={"input_batch": partition_rows(inputs["input_batch"])},
            is_training=True,
        )
        return ForwardOutputs(
            loss=loss, aux=aux, output_collection=collection, loss_weight=_loss_weight(collection)
        )

    forward_backward, learner_outputs = functional(
        learner,
        prng_key=learner_key,
        state=state.learner,
        inputs={
            "fn": forward,
            "inputs": {
                "input_batch": dispatch_batch(cast_batch(input_batch)),
                "forward_key": forward_key,
                "noise_key": noise_key,
            },
            "opt_params": make_opt_params(state.model, model_param_specs=model_specs),
        },
        method="forward_and_backward",
        is_training=True,
    )
    outputs = forward_backward.forward_outputs
    new_state = TrainerState(
        prng_key=as_raw_key(new_key),
        model=forward_backward.backward_outputs.updated_params,
        learner=learner_outputs.state_updates,
    )
    return new_state, {
        "loss": outputs.loss,
        "aux": outputs.aux,
        "summaries": {"model": outputs.output_collection.summaries, "learner": learner_outputs.summaries},
    }


def _loss_weight(collection: OutputCollection) -> Optional[Tensor]:
    """Returns what the loss of a forward pass is a mean over, as a model says by its summary "loss".

    A model whose summary of this name is a `WeightedSummary` has a loss that is a mean of so many equal parts,
    such as targets; then the loss of a batch is the mean of those of its parts by these weights. None: the
    model does not say.
    """
    loss = collection.summaries.get("loss")
    return jnp.asarray(loss.weight) if isinstance(loss, WeightedSummary) else None
