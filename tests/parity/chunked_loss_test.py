"""The loss in chunks of positions: what it computes on every mesh, and what the compiled train step holds and moves.

One step of plain gradient descent, so that new parameters show every gradient.
"""

import functools
import re
from typing import NamedTuple, Optional

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.causal_lm import CrossEntropyLossMetrics, metrics_config
from axlearn.common.compiled_program import collectives_of
from axlearn.common.config import config_for_function
from axlearn.common.input_fake import FakeLmInput
from axlearn.common.learner import Learner
from axlearn.common.optimizers import sgd_optimizer
from axlearn.common.trainer import SpmdTrainer, compiled_memory
from axlearn.common.utils import flatten_items, host_to_global_array
from axlearn.experiments.text.gpt import common, fuji_tiny

# A program for several CPU devices that comes out of the compilation cache can wait for ever.
pytestmark = pytest.mark.usefixtures("compiling_anew")

_BATCH_SIZE, _SEQ_LEN, _VOCAB_SIZE, _DIM = 8, 64, 1536, 16
_CHUNK = 8
_NUM_CHUNKS = _SEQ_LEN // _CHUNK

_MESHES = {
    "one device": {},
    "fsdp 8": {"fsdp": 8},
    "model 8": {"model": 8},
    "seq 4, fsdp 2": {"seq": 4, "fsdp": 2},
    "data 2, fsdp 2, model 2": {"data": 2, "fsdp": 2, "model": 2},
}
# Those of every run of the tests; the others are in `make test-scale`.
_FEW = ("one device", "seq 4, fsdp 2", "data 2, fsdp 2, model 2")


class _Step(NamedTuple):
    loss: float
    accuracy: float
    params: dict[str, np.ndarray]
    text: str
    temporary: int
    mesh: dict[str, int]

    def shapes(self) -> set[tuple[str, tuple[int, ...]]]:
        """Type and shape of every array in the program."""
        found = re.findall(r"\b([a-z]+[0-9]+)\[([0-9,]+)\]", self.text)
        return {(dtype, tuple(map(int, dims.split(",")))) for dtype, dims in found}


def _trainer(
    axes: dict[str, int],
    *,
    scan_chunk: Optional[int],
    dtype=jnp.float32,
    seq_len: int = _SEQ_LEN,
    tied_head: bool = True,
    table_spec: Optional[tuple] = None,
) -> SpmdTrainer:
    cfg = fuji_tiny.trainer_config()
    mesh_shape = common.mesh_shape_from_axes(**axes)
    cfg.set(dir="unused", evalers={}, mesh_shape=mesh_shape, train_dtype=dtype)
    cfg.model.scan_chunk = scan_chunk
    cfg.model.metrics = metrics_config()
    cfg.model.metrics.metrics["lm"] = CrossEntropyLossMetrics.default_config().set(z_loss_scale=1e-3)
    cfg.model.decoder.set(dim=_DIM, vocab_size=_VOCAB_SIZE)
    if not tied_head:
        norm, layer = cfg.model.decoder.output_norm, cfg.model.decoder.transformer.layer
        sizes = {"vocab_size": _VOCAB_SIZE, "dim": _DIM, "num_layers": 1}
        head = common.model_config(layer=layer, norm=norm, tied_head=False, **sizes).decoder.lm_head
        cfg.model.decoder.lm_head = head
    cfg.model.decoder.transformer.num_layers = 1
    if table_spec is not None:
        cfg.model.decoder.emb.token_emb.param_partition_spec = table_spec
    cfg.learner = Learner.default_config().set(
        optimizer=config_for_function(sgd_optimizer).set(learning_rate=1.0, decouple_weight_decay=True)
    )
    cfg.input = FakeLmInput.default_config().set(
        global_batch_size=_BATCH_SIZE,
        source_length=seq_len,
        vocab_size=_VOCAB_SIZE,
        input_partitioner=cfg.input.input_partitioner,
    )
    devices = np.array(jax.devices()[: np.prod(mesh_shape)]).reshape(mesh_shape)
    return cfg.klass(cfg.clone(), parent=None, devices=devices)


def _made_up_state(trainer: SpmdTrainer):
    """A state of numbers drawn on the host: `init` would have to be compiled for every mesh."""
    rng = np.random.default_rng(0)

    def draw(spec):
        if not jnp.issubdtype(spec.dtype, jnp.floating):
            value = np.ones(spec.shape, spec.dtype)
        else:
            value = rng.normal(size=spec.shape, scale=0.1).astype(spec.dtype)
        return jax.device_put(value, spec.sharding)

    return jax.tree.map(draw, trainer.programs.state_specs)


@functools.cache
def _step(mesh_name: str, **kwargs) -> _Step:
    trainer = _trainer(_MESHES[mesh_name], **kwargs)
    with trainer.mesh() as mesh:
        state = _made_up_state(trainer)
        compiled = trainer.compile_train_step()
        batch = next(trainer.input.batches())
        batch = host_to_global_array(batch, partition=trainer.input.partition_spec)
        state, outputs = compiled(state, batch)
    memory = compiled_memory(compiled)
    assert memory is not None
    return _Step(
        loss=float(outputs["loss"]),
        accuracy=float(outputs["summaries"]["model"]["accuracy"].mean),
        params={path: np.asarray(x) for path, x in flatten_items(state.model)},
        text=compiled.as_text(),
        temporary=memory.temporary,
        mesh=dict(mesh.shape),
    )


def _collectives(step: _Step) -> list:
    return collectives_of(step.text, mesh_shape=step.mesh)


def _only_at_scale(*values):
    return pytest.param(*values, marks=pytest.mark.scale)


_FEW_OR_ALL = [name if name in _FEW else _only_at_scale(name) for name in _MESHES]


@pytest.mark.parametrize(
    ("mesh_name", "tied_head"),
    [
        *((name, True) if name in _FEW else _only_at_scale(name, True) for name in _MESHES),
        _only_at_scale("data 2, fsdp 2, model 2", False),
    ],
)
def test_losses_and_gradients_are_those_of_the_whole(mesh_name, tied_head):
    whole = _step("one device", scan_chunk=None, tied_head=tied_head)
    chunked = _step(mesh_name, scan_chunk=_CHUNK, tied_head=tied_head)
    assert chunked.loss == pytest.approx(whole.loss, rel=1e-6)
    assert chunked.accuracy == pytest.approx(whole.accuracy, abs=1e-7)
    for path, value in whole.params.items():
        np.testing.assert_allclose(chunked.params[path], value, rtol=1e-6, atol=1e-6, err_msg=path)


def _vocab_arrays(step: _Step) -> list[tuple[str, tuple[int, ...]]]:
    """Arrays with a dim of ids, or of a device's part of them, and more positions of it than a chunk has."""
    num_ids = _VOCAB_SIZE // step.mesh["model"]
    rows = _BATCH_SIZE // (step.mesh["data"] * step.mesh["fsdp"])
    positions = rows * _SEQ_LEN // step.mesh["seq"]
    return [
        (dtype, shape)
        for dtype, shape in step.shapes()
        if num_ids in shape and np.prod(shape) >= num_ids * positions
    ]


@pytest.mark.parametrize("mesh_name", _FEW_OR_ALL)
def test_logits_of_all_positions_are_nowhere_in_the_compiled_step(mesh_name):
    assert not _vocab_arrays(_step(mesh_name, scan_chunk=_CHUNK, tied_head=True))


def test_logits_of_all_positions_are_in_the_step_without_chunks():
    shapes = _vocab_arrays(_step("one device", scan_chunk=None, tied_head=True))
    assert ("f32", (_BATCH_SIZE, _SEQ_LEN, _VOCAB_SIZE)) in shapes


def test_in_bfloat16_the_peak_follows_the_chunk():
    chunked = _step("one device", scan_chunk=_CHUNK, dtype=jnp.bfloat16)
    coarser = _step("one device", scan_chunk=2 * _CHUNK, dtype=jnp.bfloat16)
    whole = _step("one device", scan_chunk=None, dtype=jnp.bfloat16)
    assert not _vocab_arrays(chunked)
    logits_of_a_chunk = _BATCH_SIZE * _CHUNK * _VOCAB_SIZE * 4
    # Logits in float32 and their gradient: those of all positions are gone, those of a chunk are there. (6.5 times as
    # many bytes: on a CPU bfloat16 is held in float32, too, jax 0.10.2.)
    assert whole.temporary - chunked.temporary > 2 * (_NUM_CHUNKS - 1) * logits_of_a_chunk
    assert logits_of_a_chunk < coarser.temporary - chunked.temporary < 8 * logits_of_a_chunk


@pytest.mark.scale
def test_in_bfloat16_the_gradient_of_the_head_is_summed_up_in_float32():
    fine = _step("one device", scan_chunk=1, dtype=jnp.bfloat16)
    whole = _step("one device", scan_chunk=None, dtype=jnp.bfloat16)
    exact = _step("one device", scan_chunk=None, tied_head=True)
    path = "decoder/emb/token_emb/weight"
    errors = [np.linalg.norm(step.params[path] - exact.params[path]) for step in (fine, whole)]
    assert errors[0] < 1.2 * errors[1]


@pytest.mark.parametrize("mesh_name", _FEW_OR_ALL[1:])
def test_the_table_and_its_gradient_move_once_and_not_once_a_chunk(mesh_name):
    step = _step(mesh_name, scan_chunk=_CHUNK, tied_head=True)
    table = _VOCAB_SIZE * _DIM * 4 // step.mesh["model"]
    found = _collectives(step)
    assert not [x for x in found if x.num_runs >= _NUM_CHUNKS and x.whole_bytes >= table], found
    # Nor do hidden states leave the devices that have their positions, but for the products over "model".
    assert not [x for x in found if x.num_runs >= _NUM_CHUNKS and x.axes != ("model",)], found


@pytest.mark.scale
def test_chunks_send_no_more_than_the_whole_does():
    sent = [
        sum(x.sent_bytes for x in _collectives(_step("seq 4, fsdp 2", scan_chunk=chunk, tied_head=True)))
        for chunk in (_CHUNK, None)
    ]
    assert sent[0] <= 1.01 * sent[1]


@pytest.mark.scale
@pytest.mark.parametrize("mesh_name", ["fsdp 8", "data 2, fsdp 2, model 2"])
def test_a_table_that_is_split_as_advised_gives_the_same_numbers(mesh_name):
    spec = (None, ("model", "fsdp"))
    whole = _step("one device", scan_chunk=None, tied_head=True)
    split = _step(mesh_name, scan_chunk=_CHUNK, table_spec=spec)
    assert split.loss == pytest.approx(whole.loss, rel=1e-6)
    for path, value in whole.params.items():
        np.testing.assert_allclose(split.params[path], value, rtol=1e-6, atol=1e-6, err_msg=path)
    # Its gradient is summed over devices once, too, and the table gathered once, before the loop.
    table = _VOCAB_SIZE * _DIM * 4 // split.mesh["model"]
    assert not [x for x in _collectives(split) if x.num_runs >= _NUM_CHUNKS and x.whole_bytes >= table]
