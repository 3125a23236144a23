"""Gradient accumulation: a batch in several micro-batches, one after another, with the numbers of the whole.

Only the activations of one micro-batch exist at a time, which is what makes a large batch fit.
"""

from collections.abc import Callable, Sequence
from typing import Any, Optional

import jax
import jax.numpy as jnp

from axlearn.common.config import InstantiableConfig, error_message
from axlearn.common.metrics import MetricAccumulator
from axlearn.common.module import OutputCollection
from axlearn.common.summary import Summary, is_summary
from axlearn.common.update_transformation import ForwardFn, ForwardOutputs
from axlearn.common.utils import (
    Nested,
    NestedTensor,
    Tensor,
    flatten_items,
    prune_empty,
    prune_tree,
    tree_merge,
)

# What of a forward pass' inputs differs between micro-batches: their rows, and the key of their dropout.
_BATCH = "input_batch"
_KEY = "forward_key"
# In place of a weight of 0: beside a weight of 1, what it adds is lost in the rounding of float32 (2**-24); among
# equals it still makes a mean. A power of 2, so that a multiple of it is exact.
_NO_WEIGHT = 2.0**-40


def with_minibatch_steps(
    steps: int, metric_accumulator: InstantiableConfig[MetricAccumulator], grad_dtype: Optional[Any] = None
) -> Callable[[ForwardFn], ForwardFn]:
    """Makes a forward pass work through its batch in `steps` micro-batches, as a learner's `forward_fn_transformation`.

    Loss and gradient are those of the whole batch: the mean over micro-batches, each with the weight that its
    forward pass returns as `loss_weight` (for a language model, the number of its live targets). A micro-batch
    of weight 0 does not count, unless all have weight 0: then all count the same, as they do where a forward
    pass returns no weight. A loss that is no mean over something, such as the balance loss of a router, is the
    mean of its values over micro-batches, with the same weights.

    Row `r` goes to micro-batch `r % steps`: a device that holds consecutive rows, and a multiple of `steps` of
    them, has a part of every micro-batch, and no row moves. `inputs["forward_key"]`, if any, is split into a
    key per micro-batch; all other inputs are the same for all, so that parameters with noise are noisy once.

    Gradients are computed in the forward pass, and summed up in float32 (in the parameter's type where that is
    wider). Only the loss can be differentiated. Where a "gradient" is the parameter's new value (the scales and
    histories of float8 products, `Learner.gradient_is_new_value`), the largest of the micro-batches counts. Of the
    other outputs,

    - summaries are combined by `metric_accumulator`; plain numbers are averaged;
    - state updates (new values of parameters, such as moving averages) are averaged, each micro-batch having
      started from the same old value; where they are not floats, the last one counts;
    - scalars in `aux` and module outputs are averaged as the loss is; arrays are stacked, [steps, ...].

    Args:
        steps: The number of micro-batches, at least 1; it must divide the rows of a batch. 1 changes nothing.
        metric_accumulator: The config of what combines summaries.
        grad_dtype: The type that the accumulated gradients are rounded to at the end. None: they are not.

    Returns:
        A function from a forward pass to another one, whose `inputs` must be a dictionary with `input_batch`.

    Raises:
        ValueError: If `steps` is below 1.
    """
    return MinibatchSteps(steps, metric_accumulator=metric_accumulator, grad_dtype=grad_dtype)


class MinibatchSteps:
    """See `with_minibatch_steps`, which makes these."""

    def __init__(
        self,
        steps: int,
        *,
        metric_accumulator: InstantiableConfig[MetricAccumulator],
        grad_dtype: Optional[Any],
    ):
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(
                error_message(
                    where="forward_fn_transformation.steps",
                    what=f"{steps!r} is not a number of micro-batches",
                    expected="at least 1, which accumulates nothing",
                    nearest=1,
                )
            )
        self._steps = steps
        self._metric_accumulator = metric_accumulator
        self._grad_dtype = grad_dtype

    def __call__(self, fn: ForwardFn, *, is_new_value: Optional[Nested[bool]] = None) -> ForwardFn:
        """Makes the forward pass that works in micro-batches.

        Args:
            fn: The forward pass of a batch.
            is_new_value: A tree like the parameters: whose gradient is the new value. None: no parameter's.

        Returns:
            The forward pass.
        """
        if self._steps == 1:
            return fn
        new_values = frozenset(i for i, is_new in enumerate(jax.tree.leaves(is_new_value)) if is_new)

        def forward(*, model_params: NestedTensor, inputs: dict[str, Any]) -> ForwardOutputs:
            self.check_input_batch(inputs.get(_BATCH, {}))
            per_step: dict[str, Any] = {_BATCH: jax.tree.map(self._split, inputs[_BATCH])}
            if inputs.get(_KEY) is not None:
                per_step[_KEY] = jax.random.split(inputs[_KEY], self._steps)
            shared = {name: value for name, value in inputs.items() if name not in per_step}
            return self._run(fn, model_params, per_step=per_step, shared=shared, new_values=new_values)

        return forward

    def check_input_batch(
        self, input_batch: Nested[Any], *, where: str = "forward_fn_transformation.steps"
    ) -> None:
        """Refuses a batch that does not divide into micro-batches.

        Args:
            input_batch: The arrays of a batch, or their shapes.
            where: The path of `steps`, for the message.

        Raises:
            ValueError: If there are no rows, or arrays differ in their number, or `steps` does not divide it.
        """
        num_rows = {path: x.shape[0] for path, x in flatten_items(input_batch) if len(x.shape)}
        if len(set(num_rows.values())) != 1:
            raise ValueError(
                error_message(
                    where=where,
                    what=f"the arrays of inputs['{_BATCH}'] have {num_rows or 'no'} rows",
                    expected="arrays with the same number of rows, to be split into micro-batches",
                )
            )
        batch_size = next(iter(num_rows.values()))
        if batch_size % self._steps:
            raise ValueError(
                error_message(
                    where=where,
                    what=f"{self._steps} micro-batches do not divide the {batch_size} rows of a batch",
                    expected=f"a divisor of {batch_size}",
                    nearest=_nearest_divisors(batch_size, self._steps),
                    advice="Change the batch size or the number of accumulation steps",
                )
            )

    def _split(self, x: Tensor) -> Tensor:
        """[batch, ...] to [steps, batch / steps, ...] by `row % steps`; what has no rows is repeated."""
        if x.ndim == 0:
            return jnp.broadcast_to(x, (self._steps,))
        return jnp.moveaxis(x.reshape(-1, self._steps, *x.shape[1:]), 1, 0)

    def _run(
        self,
        fn: ForwardFn,
        model_params: NestedTensor,
        *,
        per_step: Nested[Tensor],
        shared: dict[str, Any],
        new_values: frozenset[int],
    ) -> ForwardOutputs:
        """The outputs of the whole batch, with a derivative that is known when they are."""
        leaves, treedef = jax.tree.flatten(model_params)

        @jax.custom_vjp
        def run(leaves: list[Tensor], rest: Any) -> ForwardOutputs:
            return self._scan(fn, treedef, leaves, rest, differentiated=[], new_values=new_values)[0]

        def run_forward(leaves: list[Any], rest: Any) -> tuple[ForwardOutputs, dict[int, Tensor]]:
            # Parameters that nobody differentiates, such as frozen ones, cost nothing.
            differentiated = [i for i, leaf in enumerate(leaves) if leaf.perturbed]
            values, rest = jax.tree.map(lambda x: x.value, (leaves, rest))
            return self._scan(fn, treedef, values, rest, differentiated=differentiated, new_values=new_values)

        def run_backward(grads: dict[int, Tensor], cotangents: ForwardOutputs) -> tuple[list[Any], None]:
            if isinstance(cotangents.loss, jax.custom_derivatives.SymbolicZero):
                return [None] * len(leaves), None
            factors = {i: 1 if i in new_values else cotangents.loss for i in grads}
            return [
                (grads[i] * factors[i]).astype(leaf.dtype) if i in grads else None
                for i, leaf in enumerate(leaves)
            ], None

        run.defvjp(run_forward, run_backward, symbolic_zeros=True)
        return run(leaves, (per_step, shared))

    def _scan(
        self,
        fn: ForwardFn,
        treedef: Any,
        leaves: Sequence[Tensor],
        rest: tuple[Nested[Tensor], dict[str, Any]],
        *,
        differentiated: Sequence[int],
        new_values: frozenset[int],
    ) -> tuple[ForwardOutputs, dict[int, Tensor]]:
        """Works through the micro-batches.

        Args:
            fn: The forward pass of one.
            treedef: The tree of the parameters.
            leaves: The parameters.
            rest: What differs between micro-batches, stacked; and the other inputs.
            differentiated: The indices of the parameters that need a gradient.
            new_values: The indices of those whose gradient is their new value.

        Returns:
            The outputs of the whole batch, and the gradients by index.
        """
        per_step, shared = rest

        # New values are made from the gradients that flow back, which must be of the same size as those of a whole
        # batch: the loss of one of `steps` parts, and its weight only behind. Without new values the weight comes
        # first, which leaves a plain sum, and compilers can move its all-reduce out of the loop.
        has_new_values = not new_values.isdisjoint(differentiated)

        def scaled_loss(chosen: dict[int, Tensor], own: dict[str, Any]) -> tuple[Tensor, ForwardOutputs]:
            params = jax.tree.unflatten(treedef, [chosen.get(i, leaf) for i, leaf in enumerate(leaves)])
            outputs = fn(model_params=params, inputs={**shared, **own})
            factor = 1 / self._steps if has_new_values else _weights(outputs.loss_weight)
            return outputs.loss * jax.lax.stop_gradient(factor), outputs

        def body(sums: dict[int, Tensor], own: Any) -> tuple[dict[int, Tensor], ForwardOutputs]:
            grads, outputs = jax.grad(scaled_loss, has_aux=True)({i: leaves[i] for i in sums}, own)
            if not has_new_values:
                return jax.tree.map(lambda x, grad: x + grad.astype(x.dtype), sums, grads), outputs
            weight = _weights(outputs.loss_weight) * self._steps
            return {
                i: jnp.maximum(x, grads[i].astype(x.dtype))
                if i in new_values
                else x + weight.astype(x.dtype) * grads[i].astype(x.dtype)
                for i, x in sums.items()
            }, outputs

        def first(i: int) -> Tensor:
            fill = -jnp.inf if i in new_values else 0
            return jnp.full_like(leaves[i], fill, dtype=_accumulator_dtype(leaves[i]))

        sums, outputs = jax.lax.scan(body, {i: first(i) for i in differentiated}, per_step)
        weights = jnp.broadcast_to(_weights(outputs.loss_weight), [self._steps])
        total_weight = jnp.sum(weights)
        grads = {
            i: x if i in new_values else self._rounded(x / total_weight.astype(x.dtype))
            for i, x in sums.items()
        }
        return self._combine(outputs, shares=weights / total_weight), grads

    def _rounded(self, grad: Tensor) -> Tensor:
        if self._grad_dtype is None:
            return grad
        # Not by two casts, which XLA takes for excess precision and leaves out.
        precision = jnp.finfo(self._grad_dtype)
        return jax.lax.reduce_precision(grad, precision.nexp, precision.nmant)

    def _combine(self, stacked: ForwardOutputs, *, shares: Tensor) -> ForwardOutputs:
        """The outputs of the whole batch from those of its micro-batches, stacked, and what each is of the whole."""

        def mean(values: Tensor) -> Tensor:
            return jnp.sum(shares * values)

        def value(x: Any) -> Any:
            if is_summary(x):
                return self._accumulated({"value": x})["value"]
            return mean(x).astype(x.dtype) if x.ndim == 1 and _is_float(x) else x

        collection = stacked.output_collection
        combined_values = jax.tree.map(value, (stacked.aux, collection.module_outputs), is_leaf=is_summary)
        return ForwardOutputs(
            loss=mean(stacked.loss).astype(stacked.loss.dtype),
            aux=combined_values[0],
            output_collection=OutputCollection(
                summaries=self._combined_summaries(collection.summaries),
                state_updates=jax.tree.map(
                    lambda x: _mean_of_steps(x) if _is_float(x) else x[-1], collection.state_updates
                ),
                module_outputs=combined_values[1],
            ),
            loss_weight=None if stacked.loss_weight is None else jnp.sum(stacked.loss_weight),
        )

    def _combined_summaries(self, stacked: dict[str, Any]) -> dict[str, Any]:
        """One tree of summaries out of a stacked one; without dicts that are empty, as accumulators drop them."""
        numbers = prune_empty(prune_tree(stacked, lambda _, node: is_summary(node)))
        summaries = prune_empty(prune_tree(stacked, lambda _, node: not isinstance(node, Summary | dict)))
        merged: dict[str, Any] = jax.tree.map(_mean_of_steps, numbers)
        if summaries:
            merged = tree_merge(self._accumulated(summaries), secondary=merged)
        return merged

    def _accumulated(self, stacked: dict[str, Any]) -> dict[str, Any]:
        """Adds up stacked summaries, in their order."""

        def add(so_far: dict[str, Any], new: dict[str, Any]) -> tuple[dict[str, Any], None]:
            accumulator = self._metric_accumulator.instantiate()
            accumulator.update(so_far)
            accumulator.update(new)
            result: Any = accumulator.summaries()
            return jax.tree.map(lambda x, old: x.astype(old.dtype), result, so_far), None

        first, others = (jax.tree.map(lambda x, part=part: x[part], stacked) for part in (0, slice(1, None)))
        total, _ = jax.lax.scan(add, first, others)
        return total


def _weights(loss_weight: Optional[Tensor]) -> Tensor:
    """The weights of micro-batches as positive float32."""
    if loss_weight is None:
        return jnp.ones([], jnp.float32)
    return jnp.maximum(loss_weight.astype(jnp.float32), _NO_WEIGHT)


def _accumulator_dtype(x: Tensor) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


def _is_float(x: Tensor) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.floating))


def _mean_of_steps(x: Tensor) -> Tensor:
    """The mean over the first dim, computed in float32 at least; that of integers is a float32."""
    mean = jnp.mean(x.astype(_accumulator_dtype(x)), axis=0)
    return mean.astype(x.dtype) if _is_float(x) else mean


def _nearest_divisors(number: int, wanted: int) -> list[int]:
    """The next divisor below `wanted`, and above it."""
    divisors = [i for i in range(1, number + 1) if number % i == 0]
    below, above = [i for i in divisors if i < wanted], [i for i in divisors if i > wanted]
    return below[-1:] + above[:1]
