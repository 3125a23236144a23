"""Tests of axlearn.common.flash_attention compiled for TPUs that are not there: kernels, and how often they run.

Each takes libtpu (the extra `tpu-aot`) and some seconds.
"""

import collections
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from axlearn.common.aot_compilation import topology_devices
from axlearn.common.attention_kernels import collect_attention_choices
from axlearn.common.base_layer import RematSpec
from axlearn.common.compiled_program import parse_program
from axlearn.common.flash_attention import remat
from axlearn.common.machines import Machine
from axlearn.common.utils import build_mesh, save_and_offload_only_these_names_regex, use_mesh
from tests.common.flash_attention.kernel_cases import CASES, NUM_HEADS, SEQ, build, forward_and_grads

pytest.importorskip("libtpu")
pytestmark = pytest.mark.tpu_aot

_TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
_AXES = ("data", "seq", "model")
_BATCH = 8
_WHOLE = P()
_HEADS_SPLIT = {
    "btnh": P("data", None, ("seq", "model"), None),
    "bsnh": P("data", None, ("seq", "model"), None),
}
_QUERIES_SPLIT = {"btnh": P("data", "seq", "model", None), "bsnh": P("data", None, "model", None)}
_ALL_SPLIT = {name: P("data", "seq", "model", None) for name in ("btnh", "bsnh")}
_TPU_CASES = [
    (name, kernel) for name, case in CASES.items() for kernel in case.accepted_by if kernel.startswith("tpu")
]


def _compile(name: str, *, topology: str, per_head_dim: int = 128, specs=None, kernel=None, **layer_kwargs):
    """Compiles outputs and gradients in bfloat16; returns the program and the choices."""
    case = CASES[name]
    machine = Machine("", "tpu", "", num_slices=1, devices_per_slice=0, memory_bytes=0, topology=topology)
    devices = topology_devices(machine)
    is_context = specs in (_QUERIES_SPLIT, _ALL_SPLIT)
    shape = (len(devices) // 2, 2, 1) if is_context else (len(devices) // 2, 1, 2)
    mesh = build_mesh(mesh_shape=shape, mesh_axis_names=_AXES, devices=devices)
    dim = NUM_HEADS * per_head_dim
    forced = build(
        case, implementation=kernel or "xla", dim=dim, mha_dim_to_partition_spec=specs or _HEADS_SPLIT
    )
    cfg = forced.config.clone(dtype=jnp.bfloat16, **layer_kwargs)
    if kernel is None:
        cfg.backend_overrides = None
    layer = cfg.instantiate(parent=None)

    def abstract(*shape, dtype=jnp.bfloat16, spec=_WHOLE):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    specs_of_params = layer.create_parameter_specs_recursively()
    inputs = {
        "params": jax.tree.map(lambda spec: abstract(*spec.shape), specs_of_params),
        "query": abstract(_BATCH, SEQ, dim, spec=P("data", "seq")),
    }
    if case.has_bias:
        inputs["attention_logit_biases"] = abstract(1, NUM_HEADS, SEQ, SEQ)
    if case.packed:
        inputs["segment_ids"] = abstract(_BATCH, SEQ, dtype=jnp.int32, spec=P("data", "seq"))
    with use_mesh(mesh), collect_attention_choices() as choices:
        compiled = jax.jit(lambda x: forward_and_grads(layer, x)).lower(inputs).compile()
    return compiled.as_text(), choices


def _kernels(program: str) -> collections.Counter:
    """How often each kernel stands in a program, by the name that it gives itself."""
    calls = [line for line in program.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    return collections.Counter(
        re.sub(r"[.\d]*$", "", line.split()[0 if "ROOT" not in line else 1]) for line in calls
    )


def _check_compiles(name: str, *, kernel: str, topology: str):
    program, choices = _compile(name, kernel=kernel, topology=topology)
    assert [choice.name for choice in choices] == [kernel]
    assert _kernels(program).total() == 3


@pytest.mark.parametrize(("name", "kernel"), _TPU_CASES)
def test_every_case_that_a_kernel_accepts_compiles(name, kernel):
    _check_compiles(name, kernel=kernel, topology="v5p:2x2x1")


@pytest.mark.parametrize("topology", _TOPOLOGIES)
@pytest.mark.parametrize(
    ("name", "kernel"),
    [("two-sided window, cap, sink", "tpu_splash"), ("causal, ALiBi, packed", "tpu_flash")],
)
def test_kernels_compile_for_every_tpu(name, kernel, topology):
    _check_compiles(name, kernel=kernel, topology=topology)


@pytest.mark.parametrize("topology", _TOPOLOGIES)
def test_splash_attention_is_what_a_tpu_takes_by_itself(topology):
    _, choices = _compile("causal, packed", topology=topology)
    assert [(choice.name, choice.refused) for choice in choices] == [("tpu_splash", ())]


@pytest.mark.parametrize("per_head_dim", [64, 80, 96, 192, 256])
@pytest.mark.parametrize("kernel", ["tpu_splash", "tpu_flash"])
def test_heads_of_any_size_that_models_have_compile_or_are_refused(kernel, per_head_dim):
    if kernel == "tpu_flash" and per_head_dim == 192:
        with pytest.raises(
            ValueError, match="needs heads of a multiple of 128 where they are larger, not of 192"
        ):
            _compile("causal, packed", kernel=kernel, topology="v5p:2x2x1", per_head_dim=per_head_dim)
        return
    _compile("causal, packed", kernel=kernel, topology="v5p:2x2x1", per_head_dim=per_head_dim)


@pytest.mark.parametrize("name", ["causal, packed", "two-sided window, cap, sink", "prefix, sink, packed"])
def test_splash_attention_compiles_with_queries_split_and_all_keys_gathered(name):
    program, choices = _compile(name, specs=_QUERIES_SPLIT, topology="v5p:2x2x1")
    assert [(choice.name, choice.task.num_target_shards) for choice in choices] == [("tpu_splash", 2)]
    assert _kernels(program).total() == 3


@pytest.mark.parametrize("topology", _TOPOLOGIES)
def test_ring_attention_compiles_and_keys_travel_while_it_computes(topology):
    program, choices = _compile("causal, packed", specs=_ALL_SPLIT, topology=topology)
    assert [(choice.name, choice.task.num_source_shards) for choice in choices] == [("ring", 2)]
    under_way, num_hidden = set(), 0
    for computation in parse_program(program).values():
        for name, instruction in computation.instructions.items():
            if instruction.operation == "collective-permute-start":
                under_way.add(name)
            elif instruction.operation == "collective-permute-done":
                under_way -= set(instruction.operands)
            elif instruction.operation in ("while", "conditional") and under_way:
                num_hidden += 1
    # Of keys in the first of two steps forward, and gradients in the second of the backward pass, at least one: these
    # are so small that the compiler does not always care.
    assert num_hidden >= 1
    assert "all-gather" not in program


_NAMED = save_and_offload_only_these_names_regex(
    names_which_can_be_saved=".*flash_residuals|.*[kqv]_proj|.*o_proj", names_which_can_be_offloaded=None
)


@pytest.mark.parametrize(
    ("policy", "num_forward"), [(None, 2), (remat.policy, 1), (_NAMED, 1)], ids=["nothing", "policy", "names"]
)
@pytest.mark.parametrize("kernel", ["tpu_splash", "tpu_flash"])
def test_the_backward_pass_runs_no_forward_kernel_where_its_residuals_are_saved(kernel, policy, num_forward):
    program, _ = _compile(
        "causal, packed",
        kernel=kernel,
        topology="v5p:2x2x1",
        remat_spec=RematSpec(prevent_cse=True, policy=policy),
    )
    assert _kernels(program).total() == num_forward + 2


def test_no_array_of_logits_is_in_the_program_of_a_kernel():
    """With heads of 96, no other array has two dims of the length of the sequence."""
    logits = re.compile(rf"\[(\d+,)+{SEQ},{SEQ}\]")
    plain, _ = _compile("causal, packed", kernel="xla", topology="v5p:2x2x1", per_head_dim=96)
    assert logits.search(plain)
    program, _ = _compile("causal, packed", topology="v5p:2x2x1", per_head_dim=96)
    assert not logits.search(program)
