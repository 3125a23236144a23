"""What a compiled step says about itself, and the state tree, as text for the run directory."""

from typing import Any

import jax
import numpy as np

from axlearn.common.utils import Nested, TensorSpec, flatten_items

_MIB = 2**20


def aot_model_analysis(compiled: jax.stages.Compiled) -> str:
    """Returns the memory and the operations of one compiled step, as its compiler estimates them.

    The memory is per device. Donated arguments appear in the arguments and again in the outputs, so the peak
    subtracts what is aliased. A scanned layer's operations are counted once, whatever the number of its
    iterations, so the FLOPs of a model with a repeated stack stand in the metrics, computed from its shape.

    Args:
        compiled: The compiled step, such as `SpmdTrainer.compile_train_step` returns.
    """
    return "\n".join([*_memory_lines(compiled.memory_analysis()), *_cost_lines(compiled.cost_analysis())])


def _memory_lines(memory: Any) -> list[str]:
    lines = ["======= Memory per device, by the compiler's estimate ======="]
    if memory is None:
        return [*lines, "This backend gives none."]
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased (donated)": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    total = sum(sizes.values()) - 2 * sizes["aliased (donated)"]
    for name, size in [*sizes.items(), ("total", total)]:
        lines.append(f"{name:20s} {size:>16d} bytes {size / _MIB:>12.2f} MiB")
    return lines


def _cost_lines(cost: Any) -> list[str]:
    lines = ["======= Operations per device, by the compiler's estimate ======="]
    if not cost:
        return [*lines, "This backend gives none."]
    for key, name in (
        ("flops", "FLOPs"),
        ("transcendentals", "transcendentals"),
        ("bytes accessed", "bytes moved"),
    ):
        if key in cost:
            lines.append(f"{name:20s} {cost[key]:>20.6g}")
    return lines


def state_tree_text(specs: Nested[TensorSpec]) -> str:
    """Returns one line per leaf: path, dtype, shape and mesh axes; then the number of parameters."""
    items = [(path, spec) for path, spec in flatten_items(specs) if isinstance(spec, TensorSpec)]
    lines = [
        f"{path} {np.dtype(spec.dtype).name}{list(spec.shape)} mesh_axes={_axes_text(spec)}"
        for path, spec in items
    ]
    num_parameters = sum(int(np.prod(spec.shape)) for path, spec in items if path.startswith("model/"))
    return "\n".join([*lines, f"parameters: {num_parameters}"]) + "\n"


def _axes_text(spec: TensorSpec) -> str:
    axes = tuple(spec.mesh_axes or ())
    return str(axes) if any(axes) else "replicated"
