"""After a real step, the state of every optimizer lies on the mesh as its parameters do, and in as many pieces."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from axlearn.common.base_layer import FactorizationSpec, ParameterSpec
from axlearn.common.optimizer_base import make_opt_params
from axlearn.common.utils import VDict, build_mesh, flatten_items, use_mesh
from tests.common.optimizers.conformance_test import EXAMPLES

_AXES = ("data", "fsdp", "model")
# Of different shapes, so that a shape tells whose state an array is. The last does not divide over "fsdp".
_SPECS = {
    "bias": ParameterSpec((24,), jnp.float32, PartitionSpec("model")),
    "repeat": VDict(weight=ParameterSpec((2, 8, 16), jnp.float32, PartitionSpec(None, "model", "fsdp"))),
    "uneven": ParameterSpec((6, 8), jnp.float32, PartitionSpec("fsdp", "model")),
    "weight": ParameterSpec(
        (16, 8),
        jnp.float32,
        PartitionSpec("fsdp", "model"),
        factorization=FactorizationSpec(axes=("row", "col")),
    ),
}


def _one_step_of_all(mesh_shape: tuple[int, ...]):
    """Returns parameters, and the state of every optimizer after one step: one program for all of them."""
    transformations = {name: make() for name, make in EXAMPLES.items()}
    with use_mesh(build_mesh(mesh_shape=mesh_shape, mesh_axis_names=_AXES)):
        shardings = jax.tree.map(lambda spec: spec.sharding, _SPECS)
        state_shardings = {
            name: jax.tree.map(lambda spec: spec.sharding, transformation.partition(_SPECS))
            for name, transformation in transformations.items()
        }

        def step(params):
            opt_params = make_opt_params(params, model_param_specs=_SPECS)
            grads = jax.tree.map(jnp.cos, params)
            states = {}
            for name, transformation in transformations.items():
                _, states[name] = transformation.update(grads, transformation.init(opt_params), opt_params)
            return params, states

        values = jax.tree.map(lambda spec: np.ones(spec.shape, np.float32), _SPECS)
        run = jax.jit(step, out_shardings=(shardings, state_shardings))
        return run(jax.device_put(values, shardings))


@pytest.mark.parametrize(
    ("mesh_shape", "num_shards"),
    [
        ((1, 8, 1), {"bias": 1, "repeat/weight": 8, "uneven": 1, "weight": 8}),
        ((2, 2, 2), {"bias": 2, "repeat/weight": 4, "uneven": 4, "weight": 4}),
    ],
)
def test_the_state_of_every_optimizer_lies_as_its_parameters_do(mesh_shape, num_shards):
    params, states = _one_step_of_all(mesh_shape)
    by_shape = {x.shape: (path, x) for path, x in flatten_items(params)}
    seen = set()
    for state_path, x in flatten_items(states):
        if x.shape not in by_shape:
            continue
        path, param = by_shape[x.shape]
        # Offloaded, it lies in the memory of the host, in the same pieces.
        place = x.sharding.with_memory_kind(param.sharding.memory_kind)
        assert place.is_equivalent_to(param.sharding, x.ndim), state_path
        num_local_bytes = {shard.data.nbytes for shard in x.addressable_shards}
        assert num_local_bytes == {math.prod(x.shape) * x.dtype.itemsize // num_shards[path]}, state_path
        seen.add((state_path.split("/")[0], path))
    # A moment each, of every parameter, at the least.
    for name in (
        "scale_by_adam",
        "scale_by_lion",
        "trace",
        "ema",
        "param_ema",
        "skip_and_clip_by_global_norm",
    ):
        assert {path for optimizer, path in seen if optimizer == name} == set(num_shards)
