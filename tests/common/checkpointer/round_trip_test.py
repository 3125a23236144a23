"""What is saved comes back, bit for bit, on any mesh, and in the format that is promised."""

import functools
import json
import re
import tarfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from axlearn.common.checkpointer import (
    CheckpointMismatchError,
    CheckpointValidationType,
    Stateful,
    drop_learner_optimizer_cfg,
    latest_checkpoint_path,
    load_checkpoint,
    read_state_spec,
)
from axlearn.common.checkpointer._index import build_index
from axlearn.common.checkpointer._save import index_as_json
from axlearn.common.checkpointer._snapshot import ArraySnapshot, Snapshot, chunk_shape_for
from axlearn.common.summary_writer import BaseWriter
from axlearn.common.utils import TensorSpec, build_mesh, use_mesh
from tests.common.checkpointer.harness import (
    Gate,
    Position,
    all_files,
    assert_same,
    make_state,
    one_device,
    opened,
    save_steps,
    specs_of,
)
from tests.fixtures_reference import TAR as REFERENCE_RUN


def test_a_state_comes_back_as_it_was_saved(tmp_path):
    states = save_steps(tmp_path / "a" / "b", 3)
    with opened(tmp_path / "a" / "b") as checkpointer:
        specs = specs_of(states[3])
        step, restored = checkpointer.restore(state=specs)
        assert step == 3
        assert_same(restored, states[3])
        # The position is the object that was passed, moved.
        assert restored["input_iter"] is specs["input_iter"]


def test_without_a_checkpoint_restore_returns_what_it_was_given(tmp_path):
    with opened(tmp_path / "new") as checkpointer:
        specs = specs_of(make_state(0))
        step, restored = checkpointer.restore(state=specs)
        assert step is None
        assert restored is specs


_ARRAYS = {
    "f32": (np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8), P("a", "b")),
    "bf16": (np.arange(128).reshape(16, 8).astype(ml_dtypes.bfloat16), P(("a", "b"), None)),
    "i32": (np.arange(-96, 96, dtype=np.int32).reshape(8, 3, 8), P(None, None, "b")),
    "u32": (np.array([0, 2**32 - 1], np.uint32), P()),
    "nan": (np.array([np.nan, -0.0, np.inf, 1e-45], np.float32), P()),
    "scalar": (np.array(7, np.int32), P()),
    "empty": (np.zeros((0, 8), np.float32), P(None, "a")),
    "bools": (np.array([True, False] * 4), P("b")),
    "f8": (np.arange(8).astype(ml_dtypes.float8_e4m3fn), P("a")),
}
_OTHER_SPECS = {
    name: P(*reversed([*spec, *[None] * (x.ndim - len(spec))])) if x.ndim > 1 else P()
    for name, (x, spec) in _ARRAYS.items()
}


def _mesh(a: int, b: int):
    return build_mesh(mesh_shape=(a, b), mesh_axis_names=("a", "b"), devices=jax.devices()[: a * b])


@pytest.mark.parametrize("shape", [(4, 2), (1, 1)])
def test_arrays_restore_on_other_meshes_bit_for_bit(tmp_path, shape):
    with use_mesh(_mesh(*shape)):
        state = {
            name: jax.device_put(x, TensorSpec(x.shape, x.dtype, spec).sharding)
            for name, (x, spec) in _ARRAYS.items()
        }
    with opened(tmp_path) as checkpointer:
        checkpointer.save(step=1, state=state)
        checkpointer.wait_until_finished()
        for other, specs in [((4, 2), None), ((2, 4), _OTHER_SPECS), ((2, 2), None), ((1, 1), None)]:
            with use_mesh(_mesh(*other)):
                wanted = {
                    name: TensorSpec(x.shape, x.dtype, (specs or {name: spec})[name])
                    for name, (x, spec) in _ARRAYS.items()
                }
                _, restored = checkpointer.restore(state=wanted)
                for name, (x, _) in _ARRAYS.items():
                    assert np.asarray(restored[name]).tobytes() == x.tobytes(), (name, other)
                    assert restored[name].sharding == wanted[name].sharding
    num_shards = len(list((tmp_path / "step_00000001/gda/f32/c").rglob("*/*")))
    assert num_shards == shape[0] * shape[1], "each shard is a file of its own"


def test_a_restored_replicated_array_can_be_donated(tmp_path):
    x = np.arange(1024, dtype=np.float32)
    with opened(tmp_path) as checkpointer, use_mesh(_mesh(4, 2)):
        spec = TensorSpec(x.shape, x.dtype, P())
        checkpointer.save(step=1, state={"x": jax.device_put(x, spec.sharding)})
        checkpointer.wait_until_finished()
        _, restored = checkpointer.restore(state={"x": spec})
        stepped = jax.jit(lambda x: x + 1, donate_argnums=0)(restored["x"])
        for shard in stepped.addressable_shards:
            np.testing.assert_array_equal(shard.data, x + 1)


def test_the_next_step_may_overwrite_what_is_being_saved(tmp_path):
    gate = Gate()
    with opened(tmp_path, files=gate) as checkpointer:
        state = {"x": jnp.zeros(4096), "it": Position(1)}
        checkpointer.save(step=1, state=state)
        pointer = state["x"].unsafe_buffer_pointer()
        stepped = jax.jit(lambda x: x + 1, donate_argnums=0)(state["x"])
        assert stepped.unsafe_buffer_pointer() == pointer, (
            "the buffer was not donated: the test shows nothing"
        )
        state["it"].record = 2
        gate.open()
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(state={"x": TensorSpec((4096,), jnp.float32), "it": Position()})
        np.testing.assert_array_equal(restored.state["x"], np.zeros(4096))
        assert restored.state["it"].record == 1


def test_numpy_arrays_and_read_only_views_are_copied(tmp_path):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    gate = Gate()
    with opened(tmp_path, files=gate) as checkpointer:
        checkpointer.save(step=1, state={"x": x.T})
        expected = x.T.copy()
        x[:] = 0
        gate.open()
        checkpointer.wait_until_finished()
        _, restored = checkpointer.restore(state={"x": TensorSpec((3, 2), jnp.float32)})
        np.testing.assert_array_equal(restored["x"], expected)


def test_a_newer_save_of_the_same_step_replaces_the_older_one(tmp_path):
    with opened(tmp_path) as checkpointer:
        for seed in (1, 2):
            checkpointer.save(step=5, state=make_state(seed))
        checkpointer.wait_until_finished()
        assert_same(checkpointer.restore(state=specs_of(make_state(2))).state, make_state(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".writer", "step_00000005"]


def test_a_given_step_is_restored_and_no_other(tmp_path):
    states = save_steps(tmp_path, 1, 2, 3)
    with opened(tmp_path) as checkpointer:
        step, restored = checkpointer.restore(step=2, state=specs_of(states[2]))
        assert step == 2
        assert_same(restored, states[2])
        with pytest.raises(ValueError, match=r"no checkpoint of step 7.\n  Expected one of 1, 2, 3"):
            checkpointer.restore(step=7, state=specs_of(states[2]))


# What is on disk.


def _crc32c(data: bytes) -> int:
    """The Castagnoli checksum, bit by bit (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_chunks_are_plain_little_endian_numbers_and_their_crc32c(tmp_path):
    state = save_steps(tmp_path, 1)[1]
    folder = tmp_path / "step_00000001/gda"
    for path, x in [("model/w", state["model"]["w"]), ("learner/mu", state["learner"]["mu"])]:
        x = np.asarray(x)
        chunk = (folder / path / ("c/0/0" if x.ndim == 2 else "c/0")).read_bytes()
        assert chunk[:-4] == x.tobytes()
        assert int.from_bytes(chunk[-4:], "little") == _crc32c(chunk[:-4])
    assert (folder / "learner/count/c").read_bytes()[:-4] == (1).to_bytes(4, "little")


def test_tensorstore_reads_an_array_without_our_help(tmp_path):
    import tensorstore

    state = save_steps(tmp_path, 1)[1]
    kvstore = {"driver": "file", "path": f"{tmp_path}/step_00000001/gda/model/w/"}
    array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()
    np.testing.assert_array_equal(array.read().result(), state["model"]["w"])


def test_the_index_is_the_json_that_axlearn_writes(tmp_path):
    save_steps(tmp_path, 12)
    text = (tmp_path / "step_00000012/index").read_text()
    name = "tests.common.checkpointer.harness.Position"
    assert re.sub(r"<class '[^']*harness.Position'>", f"<class '{name}'>", text) == (
        f'[["step", 12], ["input_iter", "<class \'{name}\'>"], '
        '["learner/count", {"dtype": "int32", "shape": "()"}], '
        '["learner/mu", {"dtype": "bfloat16", "shape": "(6,)"}], '
        '["model/w", {"dtype": "float32", "shape": "(4, 6)"}], '
        '["prng_key", {"dtype": "uint32", "shape": "(2,)"}]]'
    )


def test_the_index_of_the_reference_is_rebuilt_byte_for_byte():
    with tarfile.open(REFERENCE_RUN) as archive:
        member = next(m for m in archive.getmembers() if m.name.endswith("step_00000003/index"))
        text = archive.extractfile(member).read().decode()
    arrays = {}
    for path, entry in json.loads(text)[1:]:
        shape = tuple(int(n) for n in re.findall(r"\d+", entry["shape"]))
        arrays[path] = ArraySnapshot(shape, np.dtype(entry["dtype"]), shape, ())
    assert len(arrays) > 20
    assert index_as_json(build_index(Snapshot(arrays, {}, {}, {}), step=3)) == text


def test_two_saves_of_one_state_have_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        save_steps(tmp_path / name, 1)
    contents = [
        {path.relative_to(tmp_path / name): path.read_bytes() for path in all_files(tmp_path / name)}
        for name in ("a", "b")
    ]
    for content in contents:
        content.pop(next(path for path in content if path.name == ".writer"))
    assert contents[0] == contents[1]


def test_large_shards_are_split_into_chunks_that_divide_them(tmp_path, monkeypatch):
    small = functools.partial(chunk_shape_for, max_bytes=64)
    monkeypatch.setattr("axlearn.common.checkpointer._snapshot.chunk_shape_for", small)
    x = np.arange(6 * 10, dtype=np.float32).reshape(6, 10)
    with opened(tmp_path) as checkpointer, use_mesh(_mesh(2, 1)):
        spec = TensorSpec(x.shape, x.dtype, P("a"))
        checkpointer.save(step=1, state={"x": jax.device_put(x, spec.sharding)})
        checkpointer.wait_until_finished()
        sizes = [path.stat().st_size - 4 for path in (tmp_path / "step_00000001/gda/x/c").rglob("*/*")]
        assert len(sizes) > 2
        assert max(sizes) <= 64
        assert sum(sizes) == x.nbytes
        np.testing.assert_array_equal(checkpointer.restore(state={"x": spec}).state["x"], x)


def test_chunks_stay_below_their_limit_and_divide_the_shard():
    for shape in [(), (0, 3), (7,), (1024, 48), (3, 5, 7, 11), (2**20,)]:
        chunk = chunk_shape_for(shape, itemsize=4, max_bytes=256)
        assert len(chunk) == len(shape)
        assert all(c >= 1 and n % c == 0 for n, c in zip(shape, chunk, strict=True))
        assert np.prod(chunk) * 4 <= 256


# Parts of states, and other states.


def test_a_part_of_a_state_is_read_next_to_the_writer(tmp_path):
    states = save_steps(tmp_path, 1, 2)
    with opened(tmp_path) as writer:
        writer.restore(state=specs_of(states[2]))
        model = {"model": specs_of(states[2]["model"])}
        step, restored = load_checkpoint(tmp_path, state=model)
        assert step == 2
        assert_same(restored, {"model": states[2]["model"]})
        assert_same(
            load_checkpoint(tmp_path / "step_00000001", state=model).state, {"model": states[1]["model"]}
        )
        assert load_checkpoint(tmp_path, step=1, state=model).step == 1


def test_reading_where_there_is_no_checkpoint_is_an_error_and_makes_no_folder(tmp_path):
    with pytest.raises(ValueError, match="There is no checkpoint here"):
        load_checkpoint(tmp_path / "none", state={})
    assert not (tmp_path / "none").exists()


def test_differences_are_all_named_and_nothing_is_renamed(tmp_path):
    save_steps(tmp_path, 1)
    wanted = {
        "prng_key": TensorSpec((4,), jnp.uint32),
        "model": {"w": TensorSpec((4, 6), jnp.bfloat16), "bias": TensorSpec((6,), jnp.float32)},
        "learner": {"count": TensorSpec((), jnp.int32)},
        "input_iter": Position(),
    }
    with opened(tmp_path) as checkpointer, pytest.raises(CheckpointMismatchError) as e:
        checkpointer.restore(state=wanted)
    assert isinstance(e.value, ValueError)
    assert str(e.value) == (
        f"{tmp_path}/step_00000001: the checkpoint holds other arrays than are asked for. "
        "Expected what was saved with this config (validation EXACT).\n"
        "  Missing:\n    model/bias\n"
        "  Unexpected:\n    learner/mu\n"
        "  Shape:\n    prng_key: (2,) in the checkpoint, (4,) asked for\n"
        "  Dtype:\n    model/w: float32 in the checkpoint, bfloat16 asked for\n"
        "  Set back what has changed (the run's trainer_config says how it was), or use another directory."
    )
    assert (tmp_path / "step_00000001").is_dir()


def test_an_array_where_the_checkpoint_has_a_position_is_missing(tmp_path):
    save_steps(tmp_path, 1)
    with one_device(), pytest.raises(CheckpointMismatchError, match=r"Missing:\n    input_iter"):
        load_checkpoint(tmp_path, state={"input_iter": TensorSpec((), jnp.int32)})


@pytest.mark.parametrize("validation", list(CheckpointValidationType))
def test_validation_allows_what_its_name_says(tmp_path, validation):
    state = save_steps(tmp_path, 1)[1]
    fewer = {"model": specs_of(state["model"])}
    cast = specs_of(state)
    cast["model"]["w"] = TensorSpec((4, 6), jnp.bfloat16)
    with opened(tmp_path, validation=validation) as checkpointer:
        if validation.is_partial:
            assert_same(checkpointer.restore(state=fewer).state, {"model": state["model"]})
        else:
            with pytest.raises(CheckpointMismatchError, match="Unexpected"):
                checkpointer.restore(state=fewer)
        if validation.is_cast_allowed:
            restored = checkpointer.restore(state=cast).state["model"]["w"]
            np.testing.assert_array_equal(restored, state["model"]["w"].astype(jnp.bfloat16))
        else:
            with pytest.raises(CheckpointMismatchError, match="Dtype"):
                checkpointer.restore(state=cast)


def test_a_spec_without_dtype_takes_that_of_the_checkpoint(tmp_path):
    save_steps(tmp_path, 1)
    with one_device():
        restored = load_checkpoint(tmp_path, state={"learner": {"mu": TensorSpec((6,))}}).state
    assert restored["learner"]["mu"].dtype == jnp.bfloat16


def test_the_filter_leaves_specs_as_they_are(tmp_path):
    state = {"model": {"w": jnp.ones(3)}, "learner": {"optimizer": {"mu": jnp.ones(3)}, "ema": jnp.ones(1)}}
    with opened(tmp_path, restore_state_filter=drop_learner_optimizer_cfg()) as checkpointer:
        checkpointer.save(step=1, state=state)
        checkpointer.wait_until_finished()
        specs = specs_of(state)
        specs["learner"]["optimizer"] = {"nu": TensorSpec((9,), jnp.float32)}
        restored = checkpointer.restore(state=specs).state
    assert restored["learner"]["optimizer"] == specs["learner"]["optimizer"]
    assert_same([restored["model"], restored["learner"]["ema"]], [state["model"], state["learner"]["ema"]])


def test_the_spec_of_a_checkpoint_lists_its_arrays(tmp_path):
    save_steps(tmp_path, 1)
    assert read_state_spec(latest_checkpoint_path(tmp_path)) == {
        "prng_key": TensorSpec((2,), np.dtype("uint32")),
        "model": {"w": TensorSpec((4, 6), np.dtype("float32"))},
        "learner": {
            "count": TensorSpec((), np.dtype("int32")),
            "mu": TensorSpec((6,), np.dtype("bfloat16")),
        },
    }
    with pytest.raises(ValueError, match="not the name of a checkpoint"):
        read_state_spec(tmp_path)


# What cannot be saved.


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": jax.random.key(0)}, r"leaf a is a PRNG key of type key<fry>. Expected its words"),
        ({"a": 3}, r"leaf a is a int \(3\). Expected an array"),
        ({"a": TensorSpec((3,), jnp.float32)}, "leaf a is a TensorSpec. Expected an array with values"),
        ({"a": np.array(["x"])}, "leaf a has dtype str32. Expected one of bool, "),
        ({"..": {"etc": np.ones(1)}}, r"'../etc' cannot be the path of a leaf"),
        ({"a/b": np.ones(1), "a": {"b": np.ones(1)}}, "two leaves of the state have the path 'a/b'"),
        ({"a/b": np.ones(1), "a": np.ones(1)}, "a/b has a path below that of the leaf a"),
    ],
)
def test_what_cannot_be_stored_is_refused_at_once(tmp_path, state, message):
    with opened(tmp_path) as checkpointer, pytest.raises((TypeError, ValueError), match=message):
        checkpointer.save(step=1, state=state)
    assert not list(tmp_path.glob("step_*"))


@pytest.mark.parametrize("value", [{1: 2}, {"a": (1, 2)}, {"a": float("nan")}, {"a": np.int32(3)}, object()])
def test_a_position_that_json_does_not_return_as_it_was_is_refused(tmp_path, value):
    class Bad(Position):
        def get_state(self):
            return value

    assert isinstance(Bad(), Stateful)
    with opened(tmp_path) as checkpointer, pytest.raises(TypeError, match=r"the state of it \(Bad\)"):
        checkpointer.save(step=1, state={"it": Bad()})


class _Recorder(BaseWriter):
    """Keeps what it is given."""

    written: list = []

    def __call__(self, step, values):
        self.written.append((step, values))


def test_sizes_and_durations_are_summarised_when_a_save_has_ended(tmp_path):
    _Recorder.written.clear()
    writer = _Recorder.default_config().set(dir="unused")
    with opened(tmp_path, summary_writer=writer) as checkpointer:
        checkpointer.save(step=4, state=make_state(4))
        checkpointer.wait_until_finished()
    ((step, values),) = _Recorder.written
    files = all_files(tmp_path / "step_00000004")
    listed = sum(path.stat().st_size for path in files if path.name != "MANIFEST.json")
    assert step == 4
    assert values["checkpointer"]["num_bytes"] == listed
    assert values["checkpointer"]["write_seconds"] > 0
