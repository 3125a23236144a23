"""What a compiled step says about itself, and the state tree, as text for the run directory."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import jax
import numpy as np

from axlearn.common.file_system import write_text_durably
from axlearn.common.utils import Nested, TensorSpec, flatten_items

_MIB = 2**20


def write_description(run_dir: str, *, state_specs: Nested[TensorSpec], step_fn: Callable[..., Any]) -> None:
    """Writes the state tree, and what the compiler says of a compiled step, into the run directory.

    Args:
        run_dir: The run directory.
        state_specs: The specs of the trainer's state.
        step_fn: The step, compiled or not.
    """
    if jax.process_index() != 0:
        return
    os.makedirs(run_dir, exist_ok=True)
    write_text_durably(os.path.join(run_dir, "trainer_state_tree.txt"), state_tree_text(state_specs))
    if isinstance(step_fn, jax.stages.Compiled):
        text = aot_model_analysis(step_fn) + "\n"
        write_text_durably(os.path.join(run_dir, "model_analysis.txt"), text)


def aot_model_analysis(compiled: jax.stages.Compiled) -> str:
    """Returns the memory and the operations of one compiled step, as its compiler estimates them.

    The memory is per device. Donated arguments appear in the arguments and again in the outputs, so the peak
    subtracts what is aliased. A scanned layer's operations are counted once, whatever the number of its
    iterations, so the FLOPs of a model with a repeated stack stand in the metrics, computed from its shape.

    Args:
        compiled: The compiled step, such as `SpmdTrainer.compile_train_step` returns.
    """
    return "\n".join([*_memory_lines(compiled_memory(compiled)), *_cost_lines(compiled.cost_analysis())])


class CompiledMemory(NamedTuple):
    """Bytes per device of a compiled program, by its compiler.

    Attributes:
        arguments: Of what it is given.
        outputs: Of what it returns.
        aliased: Of outputs that take the place of donated arguments; they are in both of the above.
        temporary: Of what it holds in between.
        code: Of the program itself.
    """

    arguments: int
    outputs: int
    aliased: int
    temporary: int
    code: int

    @property
    def total(self) -> int:
        """All of it, what is aliased once."""
        return self.arguments + self.outputs + self.temporary + self.code - self.aliased


def compiled_memory(compiled: jax.stages.Compiled) -> Optional[CompiledMemory]:
    """Returns the memory of a compiled program; None where its backend does not say."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    return CompiledMemory(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
    )


def _memory_lines(memory: Optional[CompiledMemory]) -> list[str]:
    lines = ["======= Memory per device, by the compiler's estimate ======="]
    if memory is None:
        return [*lines, "This backend gives none."]
    sizes = {
        "arguments": memory.arguments,
        "outputs": memory.outputs,
        "aliased (donated)": memory.aliased,
        "temporary": memory.temporary,
        "code": memory.code,
        "total": memory.total,
    }
    for name, size in sizes.items():
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
