"""What remat policies keep on a TPU, what they move to the host and what they compute again.

The step of fuji-7B-v2-flash, cut down to a few layers, is compiled ahead of time for a TPU slice: no TPU is needed, but
libtpu is (the extra `tpu-aot`). Memory is the compiler's own sum, of one device: temporary memory is where activations
and gradients are. Work is that of all matrix products of the step, by the jaxpr; the reference, in the same run, is the
step that keeps everything.

    python benchmarks/remat_benchmark.py [--mesh_selector tpu-v5litepod-4] [--num_layers 4] [--policy NAME ...]

Results are kept in `remat_benchmark.md`.
"""

import argparse
import datetime
import os
import platform
import sys
from typing import Any, Optional

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from axlearn.common.aot_compilation import compile_trainer_step, flops_of, topology_devices
from axlearn.common.attention import build_remat_spec
from axlearn.common.base_layer import RematSpec
from axlearn.common.config import apply_overrides
from axlearn.common.data_dir import FAKE
from axlearn.common.flash_attention import remat as flash_remat
from axlearn.common.machines import Machine, machine_of
from axlearn.common.utils import combine_remat_policies
from axlearn.experiments.registry import find_trainer_config
from axlearn.experiments.text.gpt import fuji

_RECIPE = "fuji-7B-v2-flash"
_GIB = 2**30
_EVERYTHING = "everything"


def _policies() -> dict[str, Any]:
    """Policies by the words of `docs/parallelism.md`; the names are jax's, ours and the recipes'."""
    dots = jax.checkpoint_policies.dots_saveable
    return {
        _EVERYTHING: None,
        "nothing": jax.checkpoint_policies.nothing_saveable,
        "by name: [qkvo]_proj, context": "recipe",
        "dots": dots,
        "flash residuals and dots": combine_remat_policies(flash_remat.policy, dots),
        "dots, on the host": fuji.offload_dots_saveable_policy,
        "attention, on the host": fuji.offload_attention_proj_policy,
    }


def _remat_spec(policy: Any, *, stack: Any) -> Optional[RematSpec]:
    if policy is None:
        return None
    return build_remat_spec(stack) if policy == "recipe" else RematSpec(prevent_cse=False, policy=policy)


def _compiled(policy: Any, *, machine: Machine, num_layers: int) -> tuple[Any, float, float]:
    """The compiler's account of memory, the operations of the step, and the seconds that compiling took."""
    cfg = find_trainer_config(_RECIPE)(data_dir=FAKE).set(dir="unused", evalers={})
    stack = cfg.model.decoder.transformer
    stack.layer.remat_spec = _remat_spec(policy, stack=stack)
    apply_overrides(
        cfg,
        [
            f"model.decoder.transformer.num_layers={num_layers}",
            f"mesh_shape=(1, 1, 1, {machine.num_devices}, 1, 1)",
            f"input.input_dispatcher.global_logical_batch_size={machine.num_devices}",
        ],
    )
    step = compile_trainer_step(cfg, devices=topology_devices(machine))
    return step.compiled.memory_analysis(), flops_of(step.traced.jaxpr), step.seconds


def main() -> None:
    """Prints one line a policy."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mesh_selector", default="tpu-v5litepod-4")
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--policy", action="append", choices=_policies(), help="by default all")
    args = parser.parse_args()

    machine = machine_of(args.mesh_selector)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(
        f"jax {jax.__version__}, compiled for {machine.name}, {datetime.date.today()}: "
        f"{_RECIPE} with {args.num_layers} layers, one row of 4096 tokens a device"
    )
    print(f"{'kept':>30}  {'temporary, device':>17}  {'host':>9}  {'work':>5}  {'compiled in':>11}")
    names = list(dict.fromkeys([_EVERYTHING, *(args.policy or _policies())]))
    reference = 0.0
    for name in names:
        memory, flops, seconds = _compiled(_policies()[name], machine=machine, num_layers=args.num_layers)
        reference = reference or flops
        print(
            f"{name:>30}  {memory.temp_size_in_bytes / _GIB:>13.2f} GiB  "
            f"{memory.host_temp_size_in_bytes / _GIB:>5.2f} GiB  {flops / reference:>5.2f}  {seconds:>9.0f} s"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
