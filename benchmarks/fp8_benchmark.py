"""Products in float8 and int8: how far they are off, and what they cost, beside flax's float8 product.

The reference, in the same run, is the product in the type of the operands (`--dtype`). Errors are norms relative to the
same product in float32, at scales that fit. A step is output, gradients and new scales of one dense layer; the cases
take turns, so that a disturbance of the machine hits them alike, and the median counts. Temporary memory is the
compiler's own sum. A CPU has no float8 units: there the ratios say what converting costs, and nothing of a GPU.

    python benchmarks/fp8_benchmark.py [--steps 20] [--tokens 2048] [--dim 512] [--dtype bfloat16]

Results are kept in `fp8_benchmark.md`.
"""

import argparse
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import fp8_ops

from axlearn.common.quantized_dot_general import Contraction, Fp8Meta, Fp8Metas, fp8_dot, int8_dot

_HISTORY_LENGTH = 128
_CONTRACTION = Contraction.from_einsum("...i,io->...o", activation_rank=2)
_Product = Callable[[jax.Array, jax.Array, Fp8Metas], jax.Array]


def _flax(activation: jax.Array, kernel: jax.Array, metas: Fp8Metas) -> jax.Array:
    return fp8_ops.fp8_scaled_dot_general(
        activation,
        kernel,
        (((1,), (0,)), ((), ())),
        preferred_element_type=activation.dtype,
        lhs_scale=metas.input.scale,
        rhs_scale=metas.kernel.scale,
        grad_scale=metas.output_grad.scale,
        lhs_amax_history=metas.input.amax_history,
        rhs_amax_history=metas.kernel.amax_history,
        grad_amax_history=metas.output_grad.amax_history,
    )


_PRODUCTS: dict[str, _Product] = {
    "reference": lambda activation, kernel, metas: activation @ kernel,
    "float8": lambda activation, kernel, metas: fp8_dot(activation, kernel, metas, contraction=_CONTRACTION),
    "float8, flax": _flax,
    "int8": lambda activation, kernel, metas: int8_dot(activation, kernel, contraction=_CONTRACTION),
}


def _operands(tokens: int, dim: int, dtype: Any) -> tuple[jax.Array, jax.Array, Fp8Metas, jax.Array]:
    """Normal numbers of the sizes that they have in training, with histories that have seen them."""
    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    shapes = ((tokens, dim), (dim, 4 * dim), (tokens, 4 * dim))
    sizes = (1.0, dim**-0.5, 1.0 / tokens)
    activation, kernel, grad = (
        (size * jax.random.normal(key, shape)).astype(dtype)
        for key, shape, size in zip(keys, shapes, sizes, strict=True)
    )

    def seen(x: jax.Array) -> Fp8Meta:
        history = jnp.zeros([_HISTORY_LENGTH]).at[0].set(jnp.abs(x).max().astype(jnp.float32))
        return Fp8Meta(scale=jnp.ones([1]), amax_history=history)

    return activation, kernel, Fp8Metas(seen(activation), seen(kernel), seen(grad)), grad


class _Case:
    """One way to multiply, compiled, and the seconds of its steps."""

    def __init__(self, product: _Product, operands: tuple[Any, ...]):
        def step(activation: jax.Array, kernel: jax.Array, metas: Fp8Metas, grad: jax.Array) -> Any:
            output, vjp = jax.vjp(product, activation, kernel, metas)
            return output, *vjp(grad)

        self._operands = operands
        start = time.perf_counter()
        self._step_fn = jax.jit(step).lower(*operands).compile()
        self.compile_seconds = time.perf_counter() - start
        self.seconds: list[float] = []

    def step(self) -> Any:
        """Does one step and waits for it."""
        start = time.perf_counter()
        outputs = jax.block_until_ready(self._step_fn(*self._operands))
        self.seconds.append(time.perf_counter() - start)
        return outputs

    def temp_mib(self) -> float:
        """Temporary memory of a step."""
        return self._step_fn.memory_analysis().temp_size_in_bytes / 2**20


def _errors(found: Any, exact: Any) -> list[float]:
    pairs = [
        (np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in zip(found, exact, strict=True)
    ]
    return [float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="steps to measure, of each")
    parser.add_argument("--tokens", type=int, default=2048, help="rows of the activations")
    parser.add_argument(
        "--dim", type=int, default=512, help="dim of the activations; the outputs have four times"
    )
    parser.add_argument("--dtype", default="bfloat16", help="type of the operands")
    args = parser.parse_args()
    operands = _operands(args.tokens, args.dim, jnp.dtype(args.dtype))
    cases = {name: _Case(product, operands) for name, product in _PRODUCTS.items()}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), operands)
    exact = _Case(_PRODUCTS["reference"], wide).step()
    errors = {name: _errors(case.step()[:3], exact[:3]) for name, case in cases.items()}
    for i in range(args.steps + 2):
        for case in cases.values():
            case.step()
            if i < 2:
                case.seconds.clear()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}, Python "
        f"{platform.python_version()}, jax {jax.__version__}, {datetime.date.today()}"
    )
    print(f"[{args.tokens}, {args.dim}] @ [{args.dim}, {4 * args.dim}] in {args.dtype}, {args.steps} steps")
    print(
        f"{'':<14}{'error of output':>16}{'of input grad':>15}{'of kernel grad':>16}"
        f"{'step':>12}{'ratio':>8}{'temporary':>14}{'compiled in':>13}"
    )
    reference = statistics.median(cases["reference"].seconds)
    for name, case in cases.items():
        median = statistics.median(case.seconds)
        output, input_grad, kernel_grad = errors[name]
        print(
            f"{name:<14}{output:>16.4f}{input_grad:>15.4f}{kernel_grad:>16.4f}{1e3 * median:>9.1f} ms"
            f"{median / reference:>8.2f}{case.temp_mib():>10.1f} MiB{case.compile_seconds:>11.1f} s"
        )


if __name__ == "__main__":
    main()
