"""Where layers say that their inputs, their tables and their outputs lie: in the program, and with the same numbers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import PartitionSpec

from axlearn.common.layers import Embedding, LayerNorm, Linear, RMSNorm
from axlearn.common.module import functional
from axlearn.common.utils import build_mesh, use_mesh

_BATCH = ("data", "fsdp")
# The specs of Trainium's mesh rule.
_TOKENS = (_BATCH, None)
_WHOLE_SEQ = (_BATCH, None, None)
_SPLIT_SEQ = (_BATCH, "model", None)
_IDS = np.array([[0, 3, 5, 7], [1, 1, 6, 2]], np.int32)
_X = np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)


class _Case(NamedTuple):
    cfg: object
    method: str
    x: np.ndarray
    # The constraints that the specs stand for: shape of the array, and spec.
    constraints: list[tuple[tuple[int, ...], tuple]]


def _embedding() -> Embedding.Config:
    return Embedding.default_config().set(
        num_embeddings=8,
        dim=8,
        param_partition_spec=("model", ("fsdp",)),
        input_partition_spec=_TOKENS,
        output_partition_spec=_WHOLE_SEQ,
        embedding_partition_spec=("model", None),
    )


def _norm(cls) -> _Case:
    cfg = cls.default_config().set(
        input_dim=8, input_partition_spec=_SPLIT_SEQ, output_partition_spec=_WHOLE_SEQ
    )
    return _Case(cfg, "forward", _X, [((2, 4, 8), _SPLIT_SEQ), ((2, 4, 8), _WHOLE_SEQ)])


def _linear() -> _Case:
    cfg = Linear.default_config().set(
        input_dim=8, output_dim=6, param_partition_spec=("model", "fsdp"), output_partition_spec=_WHOLE_SEQ
    )
    return _Case(cfg, "forward", _X, [((2, 4, 6), _WHOLE_SEQ)])


_CASES = {
    "embedding": lambda: _Case(
        _embedding(),
        "forward",
        _IDS,
        [((8, 8), ("model", None)), ((2, 4), _TOKENS), ((2, 4, 8), _WHOLE_SEQ)],
    ),
    "tied head": lambda: _Case(_embedding(), "attend", _X, [((8, 8), ("model", None))]),
    "RMSNorm": lambda: _norm(RMSNorm),
    "LayerNorm": lambda: _norm(LayerNorm),
    "linear": _linear,
}


@pytest.fixture
def mesh():
    # Programs with collectives on several CPU devices are not to come from the compilation cache.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    with use_mesh(build_mesh(mesh_shape=(1, 2, 4), mesh_axis_names=("data", "fsdp", "model"))):
        yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def _program(case: _Case):
    """The layer as a function of a batch, with weights that follow from its shapes alone."""
    layer = case.cfg.clone(name="layer").instantiate(parent=None)
    params = {
        name: jnp.asarray(np.random.default_rng(1).normal(size=spec.shape), jnp.float32)
        for name, spec in layer.create_parameter_specs_recursively().items()
    }

    def run(params, x):
        return functional(layer, jax.random.PRNGKey(0), params, (x,), method=case.method, is_training=True)[0]

    return run, params


def _constraints(jaxpr) -> list[tuple[tuple[int, ...], PartitionSpec]]:
    """Shapes and specs of all sharding constraints, in order, also of those inside of nested calls."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "sharding_constraint":
            found.append((eqn.invars[0].aval.shape, eqn.params["sharding"].spec))
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found += _constraints(inner)
    return found


def _placed_nowhere(cfg):
    return cfg.clone(**{name: None for name, _ in cfg.items() if name.endswith("partition_spec")})


@pytest.mark.parametrize("name", _CASES)
def test_each_spec_is_a_constraint_of_the_program(name, mesh):
    case = _CASES[name]()
    run, params = _program(case)
    expected = [(shape, PartitionSpec(*spec)) for shape, spec in case.constraints]
    assert _constraints(jax.make_jaxpr(run)(params, case.x).jaxpr) == expected

    run, params = _program(case._replace(cfg=_placed_nowhere(case.cfg)))
    assert _constraints(jax.make_jaxpr(run)(params, case.x).jaxpr) == []


@pytest.mark.parametrize("name", _CASES)
def test_specs_change_no_number(name, mesh):
    case = _CASES[name]()

    def loss_and_gradients(case):
        run, params = _program(case)

        def loss(params, x):
            y = run(params, x)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.grad(loss, has_aux=True))(params, case.x)

    ours, theirs = loss_and_gradients(case), loss_and_gradients(case._replace(cfg=_placed_nowhere(case.cfg)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)


def test_a_table_that_is_stored_in_pieces_is_gathered_along_its_vectors_alone(mesh):
    run, params = _program(_CASES["embedding"]())
    stored = jax.sharding.NamedSharding(jax.sharding.get_mesh(), PartitionSpec("model", ("fsdp",)))
    program = jax.jit(run).lower(jax.device_put(params, stored), _IDS).compile().as_text()
    gathers = [line for line in program.splitlines() if " all-gather(" in line]
    # 8 rows on 4 devices of "model", 8 columns on 2 of "fsdp": the piece in use is 2 rows of 8, never the table.
    assert any("f32[2,8]" in line.split(" all-gather(")[0] for line in gathers)
    assert not any("f32[8,8]" in line for line in gathers)
