"""Every `if` on a jax version, and every jax API that moved between the versions we support, live here.

Supported: jax >= 0.10.2, < 0.13 (`pyproject.toml`). In this range the mesh API is stable: `jax.set_mesh` as a
context manager, `jax.sharding.get_mesh` outside of a trace and `jax.sharding.get_abstract_mesh` everywhere.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from axlearn.common.config import error_message


def auto_mesh(devices: np.ndarray, axis_names: Sequence[str]) -> Mesh:
    """A mesh on all of whose axes the compiler propagates shardings.

    `jax.make_mesh` makes axes of type Explicit by default, under which `x @ x.T` raises; we always want Auto.

    Args:
        devices: The devices, one array dimension per mesh axis.
        axis_names: One name per dimension of `devices`.

    Returns:
        The mesh.
    """
    return Mesh(devices, tuple(axis_names), axis_types=(AxisType.Auto,) * len(axis_names))


def set_mesh(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
    """Makes `mesh` the mesh of the current thread inside a `with` block; not to be entered inside a trace."""
    return jax.set_mesh(mesh)


def get_mesh() -> Mesh | AbstractMesh | None:
    """The mesh of the current thread, or None; inside of `jit`, its abstract form."""
    abstract_mesh = jax.sharding.get_abstract_mesh()
    if abstract_mesh.empty:
        return None
    if abstract_mesh.manual_axes:
        return abstract_mesh
    try:
        return jax.sharding.get_mesh()
    except ValueError:  # Only the abstract mesh can be had while jit traces.
        return abstract_mesh


def auto_axes_of(mesh: Mesh | AbstractMesh | None) -> dict[str, int]:
    """The axes of a mesh with their sizes, without those that are manual here, inside of `shard_map`.

    Args:
        mesh: The mesh, such as `get_mesh` returns; None: there is none.
    """
    if mesh is None:
        return {}
    manual = set(getattr(mesh, "manual_axes", ()))
    return {axis: size for axis, size in mesh.shape.items() if axis not in manual}


def default_platform(mesh: Mesh | AbstractMesh | None) -> str:
    """The platform that a program is traced for: that of the mesh's devices, which need not be here.

    Args:
        mesh: The mesh, also the abstract one that there is while jit traces. None: there is none.

    Returns:
        The name of the platform, such as "tpu"; without a mesh that knows, the default one of this process.
    """
    if isinstance(mesh, Mesh):
        return mesh.devices.flat[0].platform
    # It knows its device from the mesh that it was made from; one that was made by hand may not.
    device = getattr(mesh, "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


class Coordination(NamedTuple):
    """The service through which the processes of a run find each other.

    Attributes:
        client: Its client in this process: a store of keys and values, and barriers.
        process_index: Which of the processes this one is.
        num_processes: How many there are; more than one.
    """

    client: Any
    process_index: int
    num_processes: int


def coordination() -> Optional[Coordination]:
    """The service that `jax.distributed.initialize` connected to; None where this process is the only one.

    It needs no device.

    Raises:
        RuntimeError: If there are several processes, but not by `jax.distributed.initialize`.
    """
    # jax offers its client to nobody outside (jax 0.10 to 0.12); Orbax takes it from the same place.
    from jax._src import distributed

    state = distributed.global_state
    if state.client is not None:
        if state.num_processes == 1:
            return None
        return Coordination(state.client, process_index=state.process_id, num_processes=state.num_processes)
    if jax.process_count() > 1:
        raise RuntimeError(
            error_message(
                what=f"There are {jax.process_count()} processes that cannot talk to each other",
                expected="a call of jax.distributed.initialize() in each of them before anything else",
            )
        )
    return None


# The parameters that hold the program of a call, by whatever name its primitive goes.
_CALL_PARAMS = ("jaxpr", "call_jaxpr", "fun_jaxpr")
# These have a program too, but it is a loop's, or sees parts of arrays and not whole ones.
_NO_CALLS = ("scan", "shard_map", "pallas_call")


def _load_jaxpr_types() -> Any:
    """`jax.extend.core`; it takes 30 ms to load (jax 0.10.2), which a start that looks at no program is spared."""
    from jax.extend import core

    return core


def called_jaxpr(eqn: Any) -> Optional[Any]:
    """Returns the program that an equation of a jaxpr does nothing but call, such as that of a nested `jit`.

    Args:
        eqn: The equation.

    Returns:
        The program, with as many inputs and outputs as the equation; None if the equation is something else.
    """
    core = _load_jaxpr_types()
    if eqn.primitive.name in _NO_CALLS:
        return None
    for name in _CALL_PARAMS:
        callee = eqn.params.get(name)
        if isinstance(callee, core.ClosedJaxpr):
            callee = callee.jaxpr
        if not isinstance(callee, core.Jaxpr):
            continue
        if len(callee.invars) == len(eqn.invars) and len(callee.outvars) == len(eqn.outvars):
            return callee
    return None


def has_jaxpr(eqn: Any) -> bool:
    """Returns whether an equation of a jaxpr has a program of its own, such as a loop's body or a branch."""
    core = _load_jaxpr_types()
    values = [x for value in eqn.params.values() for x in (value if isinstance(value, tuple) else (value,))]
    return any(isinstance(value, core.Jaxpr | core.ClosedJaxpr) for value in values)


def is_literal(atom: Any) -> bool:
    """Returns whether what an equation of a jaxpr reads is a constant that stands there."""
    return isinstance(atom, _load_jaxpr_types().Literal)


def scan_operand_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """Returns how many operands of a `scan` equation are constants of its body, and how many are carried.

    The others are what it scans over.

    Args:
        params: The parameters of the equation.
    """
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    # From jax 0.12 on, the trees of all three stand in the place of their sizes.
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


class ShardMapSpecs(NamedTuple):
    """How a `shard_map` equation cuts arrays up.

    Attributes:
        axes: The mesh axes that are manual inside.
        outputs: For each result the mesh axes of each of its first dims, those of one device left out.
    """

    axes: frozenset[str]
    outputs: tuple[tuple[tuple[str, ...], ...], ...]


def shard_map_specs(params: Mapping[str, Any]) -> ShardMapSpecs:
    """Returns how a `shard_map` equation cuts arrays up.

    Args:
        params: The parameters of the equation.
    """
    sizes = params["mesh"].shape
    axes = params.get("manual_axes") or params.get("newly_manual_axes") or frozenset(sizes)

    def entries(spec: Any) -> tuple[tuple[str, ...], ...]:
        named = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]
        return tuple(tuple(axis for axis in entry if sizes[axis] > 1) for entry in named)

    return ShardMapSpecs(frozenset(axes), tuple(entries(spec) for spec in params["out_specs"]))
