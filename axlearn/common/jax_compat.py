"""Every `if` on a jax version, and every jax API that moved between the versions we support, live here.

Supported: jax >= 0.10.2, < 0.13 (`pyproject.toml`). In this range the mesh API is stable: `jax.set_mesh` as a
context manager, `jax.sharding.get_mesh` outside of a trace and `jax.sharding.get_abstract_mesh` everywhere.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh


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
