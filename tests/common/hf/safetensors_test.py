"""Our reader and writer of safetensors against the library's own, and what they say of damaged folders."""

import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from axlearn.common.hf import SafetensorsReader, SafetensorsWriter, TensorInfo

DTYPES = [
    *(np.bool_, np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64),
    *(np.float16, ml_dtypes.bfloat16, np.float32, np.float64),
]
# The library has no numpy arrays for these.
FLOAT8_DTYPES = [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


def _tensors(dtypes=DTYPES) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors = {
        f"t.{np.dtype(dtype).name}": rng.normal(size=(2, i + 1)).astype(dtype)
        for i, dtype in enumerate(dtypes)
    }
    return {**tensors, "scalar": np.array(1.5, np.float32), "empty": np.zeros((0, 3), np.float32)}


def _write(folder, tensors, *, max_shard_bytes=10**9):
    folder.mkdir(exist_ok=True)
    infos = {name: TensorInfo(x.dtype, x.shape) for name, x in tensors.items()}
    with SafetensorsWriter(folder, tensors=infos, max_shard_bytes=max_shard_bytes) as writer:
        # In another order than that of the file.
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    return folder


def _assert_equal(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (x.dtype, x.shape)
        assert actual[name].tobytes() == x.tobytes()


def _read_all(folder) -> dict[str, np.ndarray]:
    reader = SafetensorsReader(folder)
    return {name: reader.read(name) for name in reader.tensors}


def test_what_the_library_writes_is_read_bit_by_bit(tmp_path):
    safetensors.numpy.save_file(_tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    _assert_equal(_read_all(tmp_path), _tensors())


def test_the_library_reads_what_is_written_bit_by_bit(tmp_path):
    path = _write(tmp_path / "m", _tensors()) / "model.safetensors"
    _assert_equal(safetensors.numpy.load_file(path), _tensors())
    with safetensors.safe_open(path, framework="numpy") as f:
        assert f.metadata() == {"format": "pt"}
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_eight_bit_floats_come_back_as_they_were(tmp_path):
    tensors = _tensors(FLOAT8_DTYPES)
    folder = _write(tmp_path / "m", tensors)
    _assert_equal(_read_all(folder), tensors)
    header = (folder / "model.safetensors").read_bytes()[8:]
    assert b'"dtype":"F8_E4M3"' in header
    assert b'"dtype":"F8_E5M2"' in header


def test_shards_hold_no_more_than_asked_and_the_index_finds_everything(tmp_path):
    tensors = {f"layer.{i}": np.full([4, 5], i, np.float32) for i in range(5)}
    tensors["large"] = np.ones([100], np.float32)
    folder = _write(tmp_path / "m", tensors, max_shard_bytes=170)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 80 + 400
    assert index["weight_map"] == {
        **{f"layer.{i}": f"model-{i // 2 + 1:05d}-of-00004.safetensors" for i in range(5)},
        "large": "model-00004-of-00004.safetensors",
    }
    assert len(list(folder.iterdir())) == 5
    for path in folder.glob("*.safetensors"):
        assert all(index["weight_map"][name] == path.name for name in safetensors.numpy.load_file(path))
    _assert_equal(_read_all(folder), tensors)


def test_a_tensor_that_is_never_written_is_a_slip_of_ours(tmp_path):
    infos = {"a": TensorInfo(np.dtype(np.float32), (1,))}
    with (
        pytest.raises(AssertionError, match="never written"),
        SafetensorsWriter(tmp_path, tensors=infos, max_shard_bytes=10),
    ):
        pass


def test_reading_and_writing_hold_one_tensor_in_memory(tmp_path):
    shape, num_tensors = (256, 1024), 32
    num_bytes = 4 * 256 * 1024
    infos = {f"t{i}": TensorInfo(np.dtype(np.float32), shape) for i in range(num_tensors)}
    tracemalloc.start()
    try:
        with SafetensorsWriter(tmp_path, tensors=infos, max_shard_bytes=10 * num_bytes) as writer:
            for i, name in enumerate(infos):
                writer.write(name, np.full(shape, i, np.float32))
        reader = SafetensorsReader(tmp_path)
        for i, name in enumerate(infos):
            assert reader.read(name)[-1, -1] == i
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert num_bytes < peak < 3 * num_bytes


def _sharded(folder):
    return _write(
        folder, {name: np.ones([8], np.float32) for name in ("a", "b", "c", "d")}, max_shard_bytes=64
    )


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def _edit_index(folder, **files):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {
        name: file for name, file in {**index["weight_map"], **files}.items() if file is not None
    }
    (folder / INDEX).write_text(json.dumps(index))


def _edit_header(path, edit):
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    text = edit(data[8:end].decode())
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data[end:])


def _remove_all(folder):
    for path in folder.iterdir():
        path.unlink()


def _pickle(folder):
    _remove_all(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")


def _other_name(folder):
    _remove_all(folder)
    (folder / "consolidated.safetensors").write_bytes(b"")


def _cut(folder):
    path = folder / SECOND
    path.write_bytes(path.read_bytes()[:-5])


def _lengthen(folder):
    path = folder / SECOND
    path.write_bytes(path.read_bytes() + b"x")


def _hide_overlap(text):
    return text.replace('"data_offsets":[32,64]', '"data_offsets":[0,32]')


DAMAGES = {
    "nothing there": _remove_all,
    "pickled weights": _pickle,
    "another name": _other_name,
    "one file and an index": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "a missing file": lambda folder: (folder / SECOND).unlink(),
    "a file that is cut off": _cut,
    "a file that is too long": _lengthen,
    "a file without a header": lambda folder: (folder / SECOND).write_bytes(b"abc"),
    "a header longer than its file": lambda folder: (folder / SECOND).write_bytes(b"\xff" * 99),
    "a header that is no JSON": lambda folder: _edit_header(folder / SECOND, lambda text: text[:-9]),
    "a type that is not known": lambda folder: _edit_header(
        folder / SECOND, lambda t: t.replace("F32", "F4")
    ),
    "a header that is too deep": lambda folder: _edit_header(folder / SECOND, lambda _: "[" * 100_000),
    "an offset that is no integer": lambda folder: _edit_header(
        folder / SECOND, lambda t: t.replace("[0,32]", "[0.0,32.0]")
    ),
    "a shape of another size": lambda folder: _edit_header(
        folder / SECOND, lambda t: t.replace("[8]", "[9]")
    ),
    "tensors over each other": lambda folder: _edit_header(folder / SECOND, _hide_overlap),
    "a name twice in a header": lambda folder: _edit_header(
        folder / SECOND, lambda t: t.replace('"d":', '"c":')
    ),
    "a tensor in two files": lambda folder: (
        _edit_header(folder / SECOND, lambda t: t.replace('"c":', '"a":')),
        _edit_index(folder, c=None),
    ),
    "a tensor that the index does not list": lambda folder: _edit_index(folder, d=None),
    "a tensor in another file than listed": lambda folder: _edit_index(folder, d=FIRST),
    "a tensor that is nowhere": lambda folder: _edit_index(folder, e=SECOND),
    "a file outside of the folder": lambda folder: _edit_index(folder, d="../" + SECOND),
    "an index that is too deep": lambda folder: (folder / INDEX).write_text(
        '{"weight_map": ' + "[" * 100_000
    ),
    "an index without a map": lambda folder: (folder / INDEX).write_text("{}"),
}


def test_every_damage_is_refused_with_the_name_of_the_file(tmp_path, golden):
    texts = []
    for i, (name, damage) in enumerate(DAMAGES.items()):
        folder = _sharded(tmp_path / str(i))
        damage(folder)
        with pytest.raises(ValueError) as e:
            SafetensorsReader(folder)
        texts.append(f"# {name}\n{e.value}\n".replace(str(folder), "FOLDER"))
    golden("errors/hf/safetensors.txt", "".join(texts))


def test_a_file_that_is_cut_off_while_it_is_open_is_noticed(tmp_path):
    folder = _write(tmp_path / "m", {"a": np.ones([8], np.float32)})
    reader = SafetensorsReader(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="the file ends within a"):
        reader.read("a")


def test_a_name_that_is_not_there_names_the_nearest(tmp_path):
    reader = SafetensorsReader(_write(tmp_path / "m", {"model.norm.weight": np.ones([8], np.float32)}))
    with pytest.raises(ValueError, match=r"Did you mean 'model\.norm\.weight'"):
        reader.read("model.norm.weights")
