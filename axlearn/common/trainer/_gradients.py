"""How large the gradients of a step are, and which of them it cannot help but hold at once."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from axlearn.common.base_layer import ParameterSpec
from axlearn.common.jax_compat import called_jaxpr, has_jaxpr, is_literal
from axlearn.common.learner import BaseLearner
from axlearn.common.module import functional
from axlearn.common.optimizer_base import make_opt_params
from axlearn.common.trainer._memory import array_bytes, is_on_host
from axlearn.common.trainer._state import default_key_shape
from axlearn.common.trainer._step import as_cast_fns
from axlearn.common.update_transformation import ForwardPass, Updates, mask_tree
from axlearn.common.utils import Nested, flatten_items


def gradient_sizes(
    model_specs: Nested[ParameterSpec], *, learner: BaseLearner, train_dtype: Any, platform: str
) -> dict[str, int]:
    """Returns the bytes per device of the gradient of each parameter that is optimized, by its path.

    A parameter that is cast for the forward pass has its gradient in the narrower type first; the compiler is
    free never to hold the wider one as a whole.

    Args:
        model_specs: The parameters.
        learner: Knows which of them are optimized.
        train_dtype: As in `SpmdTrainer.Config`.
        platform: Of the devices. Elsewhere than on a CPU, parameters in the memory of the host do not count.
    """
    cast_params, _ = as_cast_fns(train_dtype)
    cast = dict(flatten_items(jax.eval_shape(cast_params, _structs(model_specs))))
    is_optimized = dict(flatten_items(learner.should_update_with_optimizers(model_specs)))
    sizes = {}
    for path, spec in flatten_items(model_specs):
        if is_optimized[path] and (platform == "cpu" or not is_on_host(spec)):
            shape = spec.sharding.shard_shape(tuple(spec.shape))
            sizes[path] = min(array_bytes(shape, spec.dtype), array_bytes(shape, cast[path].dtype))
    return sizes


def bytes_held_at_once(
    sizes: Mapping[str, int],
    *,
    learner: BaseLearner,
    model_specs: Nested[ParameterSpec],
    learner_specs: Nested[Any],
) -> int:
    """Returns the bytes of the gradients that all have to be there before the first of them can be used up.

    That is so among parameters each of whose new values depends on the gradients of all of them, as clipping by
    the norm of all gradients makes them. Without it the compiler is free to update a parameter, in its place, as
    soon as it has its gradient, and to make the next one then. The learner is traced; nothing is computed.

    Args:
        sizes: The bytes of each gradient, by the path of its parameter.
        learner: The learner.
        model_specs: The parameters.
        learner_specs: The learner's state.
    """
    try:
        gradients_of = _dependences(learner, model_specs=model_specs, learner_specs=learner_specs)
    except _NeedsForwardPassError:
        return 0
    groups: dict[frozenset[str], int] = {}
    for path, size in sizes.items():
        if path in gradients_of[path]:
            groups[gradients_of[path]] = groups.get(gradients_of[path], 0) + size
    return max((size for gradients, size in groups.items() if len(gradients) > 1), default=0)


class _NeedsForwardPassError(Exception):
    """An optimizer looks at the forward pass, which is not traced here."""


class _NoForwardPasses(dict[str, ForwardPass]):
    """Takes the place of the forward passes."""

    def __missing__(self, name: str) -> ForwardPass:
        raise _NeedsForwardPassError(name)


def _dependences(
    learner: BaseLearner, *, model_specs: Nested[ParameterSpec], learner_specs: Nested[Any]
) -> dict[str, frozenset[str]]:
    """Returns for each parameter the paths of the gradients on which its new value depends for certain."""

    def update(gradients: Any, params: Any, state: Any, prng_key: Any) -> Any:
        updates = Updates(
            opt_params=make_opt_params(params, model_param_specs=model_specs),
            delta_updates=gradients,
            forward_pass=_NoForwardPasses(),
        )
        new_params, _ = functional(
            learner,
            prng_key=prng_key,
            state=state,
            inputs={"updates": updates},
            method="update",
            is_training=True,
            # The copy would be a plain dict.
            copy_args_tree=False,
        )
        return new_params

    params = _structs(model_specs)
    gradients = mask_tree(params, keep=learner.should_update_with_optimizers(model_specs))
    prng_key = jax.ShapeDtypeStruct(default_key_shape(), "uint32")
    jaxpr = jax.make_jaxpr(update)(gradients, params, _structs(learner_specs), prng_key).jaxpr
    paths = [path for path, _ in flatten_items(gradients)]
    known = [1 << i for i in range(len(paths))]
    sets = _flow(jaxpr, [*known, *[0] * (len(jaxpr.invars) - len(known))])
    return {
        path: frozenset(name for i, name in enumerate(paths) if bits >> i & 1)
        for (path, _), bits in zip(flatten_items(params), sets, strict=True)
    }


def _flow(jaxpr: Any, inputs: Sequence[int]) -> list[int]:
    """Returns the sets that come out of a program, as bits, given those that go in.

    What a loop or a branch makes is taken to depend on nothing: too little is said, never too much.
    """
    sets: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> int:
        return 0 if is_literal(atom) else sets.get(atom, 0)

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        callee = called_jaxpr(eqn)
        if callee is not None:
            results = _flow(callee, operands)
        elif has_jaxpr(eqn):
            results = [0] * len(eqn.outvars)
        else:
            union = 0
            for bits in operands:
                union |= bits
            results = [union] * len(eqn.outvars)
        sets.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _structs(specs: Nested[Any]) -> Nested[jax.ShapeDtypeStruct]:
    return jax.tree.map(lambda spec: jax.ShapeDtypeStruct(tuple(spec.shape), spec.dtype), specs)
