"""`axlearn convert hf`: a model becomes a run that generates, trains and becomes the same model again."""

import json
import shutil
import tracemalloc

import jax
import ml_dtypes
import numpy as np

from axlearn.cli import _hf_export, _hf_import, generate
from axlearn.cli._run_files import read_config
from axlearn.cli.main import main as axlearn
from axlearn.common.checkpointer import CheckpointWriter, open_checkpoint
from axlearn.common.hf import SafetensorsReader, SafetensorsWriter, TensorInfo
from axlearn.common.module import functional
from axlearn.common.trainer import SpmdTrainer
from axlearn.common.vocabulary import HuggingFaceVocabulary, SentencePieceVocabulary, load_vocabulary
from tests.cli.hf_harness import (
    CONFIG,
    GENERATION_CONFIG,
    MODEL,
    TEXT,
    export_run,
    hf_shapes,
    import_run,
    tensors_of,
    write_model,
)


def _read_tensors(folder) -> dict[str, np.ndarray]:
    reader = SafetensorsReader(folder)
    return {name: reader.read(name) for name in reader.tensors}


def _names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_run_has_everything_that_a_run_has_and_what_came_with_the_model(run, hf_dir):
    assert _names(run) == {
        *("trainer_config", "trainer_config.json", "overrides.json", "tokenizer", "hf", "checkpoints")
    }
    assert _names(run / "hf") == {"config.json", "generation_config.json"}
    carried = ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"]
    for name in [*carried, "chat_template.jinja"]:
        assert (run / "tokenizer" / name).read_bytes() == (hf_dir / name).read_bytes()
    assert load_vocabulary(run / "tokenizer").encode(TEXT[2]) == SentencePieceVocabulary(MODEL).encode(
        TEXT[2]
    )
    reader = open_checkpoint(run / "checkpoints")
    assert reader.step == 0
    assert all(path.startswith("model/") for path in reader.arrays)
    assert {entry.dtype.name for entry in reader.arrays.values()} == {"float32"}
    assert oct((run).stat().st_mode & 0o777) == oct((run / "hf").stat().st_mode & 0o777)


def test_the_config_is_the_recipe_with_the_model_its_tokenizer_and_its_length(run, text_dir):
    cfg = read_config(str(run))
    assert cfg.dir == str(run)
    assert cfg.max_step == 2
    assert cfg.model.decoder.vocab_size == 320
    assert cfg.learner.optimizer.args[1].learning_rate == 5e-3
    for input_cfg in (cfg.input, cfg.evalers["heldout"].input):
        assert input_cfg.source.max_sequence_length == 64
        assert input_cfg.source.corpus.path == str(text_dir)
        assert input_cfg.source.vocab_cfg.directory == str(run / "tokenizer")
    assert "max_step: 2" in (run / "trainer_config").read_text().splitlines()
    assert json.loads((run / "overrides.json").read_text())[0]["overrides"][0]["path"] == "max_step"


def test_the_run_trains_from_the_weights_that_were_imported(run, tmp_path):
    trained = tmp_path / "run"
    shutil.copytree(run, trained)
    # The tokenizer is the one in this folder, wherever the run was imported to.
    cfg = read_config(str(trained)).set(evalers={})
    assert cfg.input.source.vocab_cfg.directory == str(trained / "tokenizer")
    trainer: SpmdTrainer = cfg.clone().instantiate(parent=None)
    batch = next(iter(trainer.input.batches()))
    assert trainer.run(jax.random.PRNGKey(0)) is not None
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    params = _params(run)
    model = cfg.model.clone(name="model").instantiate(parent=None)
    (loss, _), _ = jax.jit(
        lambda params, batch: functional(
            model, None, params, {"input_batch": batch, "return_aux": True}, is_training=True
        )
    )(params, batch)
    assert records[0]["step"] == 1
    np.testing.assert_allclose(records[0]["loss"], float(loss), rtol=1e-5)
    assert open_checkpoint(trained / "checkpoints").step == 2


def _params(run):
    reader = open_checkpoint(run / "checkpoints")
    tree: dict = {}
    for path in reader.arrays:
        *parents, leaf = path.split("/")[1:]
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = reader.read(path)
    return tree


def test_the_run_generates_until_any_of_the_ends_that_the_model_has(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generate.launch, "setup", lambda: None)
    flags = ["--prompt=def read", "--temperature=0", "--max_tokens=200"]
    assert axlearn(["generate", str(run), *flags]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("def read")
    assert "[step 0;" in captured.err
    # A model of random weights does not come to an end before its length: 64, rather than the 256 of the recipe.
    assert "stopped at the 64 tokens" in captured.err
    vocab = load_vocabulary(run / "tokenizer")
    num_prompt = len(vocab.encode_prompt("def read"))
    continuation = _greedy_ids(run, vocab.encode_prompt("def read"), num_tokens=8)
    assert captured.out.startswith(vocab.decode(vocab.encode("def read") + continuation[:4]))
    ended = tmp_path / "run"
    shutil.copytree(run, ended)
    settings = {**GENERATION_CONFIG, "eos_token_id": [1, continuation[5]]}
    (ended / "hf" / "generation_config.json").write_text(json.dumps(settings))
    assert axlearn(["generate", str(ended), *flags]) == 0
    num_tokens = continuation.index(continuation[5])
    assert f"[step 0; {num_tokens} tokens" in capsys.readouterr().err
    assert num_prompt + num_tokens < 64


def _greedy_ids(run, ids: list[int], *, num_tokens: int) -> list[int]:
    """The likeliest continuation, without a cache."""
    model = read_config(str(run)).model.clone(name="model").instantiate(parent=None)

    @jax.jit
    def logits(params, input_ids):
        inputs = {"input_batch": {"input_ids": input_ids}}
        return functional(model, None, params, inputs, method="extract_logits", is_training=False)[0]

    params, sequence = _params(run), list(ids)
    for _ in range(num_tokens):
        padded = np.pad(sequence, (0, 64 - len(sequence)))[None].astype(np.int32)
        sequence.append(int(logits(params, padded)[0, len(sequence) - 1].argmax()))
    return sequence[len(ids) :]


def test_an_export_of_an_import_is_the_same_model_bit_by_bit(run, hf_dir, tmp_path, capsys):
    export_run(run, tmp_path / "out", "--max_shard_size=30kB")
    assert "step 0 as a llama of" in capsys.readouterr().out
    expected, actual = _read_tensors(hf_dir), _read_tensors(tmp_path / "out")
    assert actual.keys() == expected.keys()
    assert all(actual[name].tobytes() == x.tobytes() for name, x in expected.items())
    assert _names(tmp_path / "out") == _names(hf_dir) - {"README.md"}
    for path in hf_dir.glob("*.json"):
        assert json.loads((tmp_path / "out" / path.name).read_text()) == json.loads(path.read_text())
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}\n"


def test_bfloat16_goes_through_bit_by_bit(hf_dir, tmp_path):
    config = {**CONFIG, "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    tensors = tensors_of(CONFIG, dtype=ml_dtypes.bfloat16)
    source = write_model(tmp_path / "bf16", config, tensors)
    flags = [f"--tokenizer={hf_dir}", "--dtype=bfloat16"]
    import_run(source, tmp_path / "narrow", *flags)
    export_run(tmp_path / "narrow", tmp_path / "out")
    assert {name: x.tobytes() for name, x in _read_tensors(tmp_path / "out").items()} == {
        name: x.tobytes() for name, x in tensors.items()
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    # Through float32 and back, too; and the model of the run says what its parameters are.
    import_run(source, tmp_path / "wide", f"--tokenizer={hf_dir}")
    assert [read_config(str(tmp_path / name)).model.dtype for name in ("narrow", "wide")] == [
        ml_dtypes.bfloat16,
        np.float32,
    ]
    export_run(tmp_path / "wide", tmp_path / "again", "--dtype=bfloat16")
    assert {name: x.tobytes() for name, x in _read_tensors(tmp_path / "again").items()} == {
        name: x.tobytes() for name, x in tensors.items()
    }
    export_run(tmp_path / "wide", tmp_path / "float32")
    exported = _read_tensors(tmp_path / "float32")
    widened = json.loads((tmp_path / "float32" / "config.json").read_text())
    assert widened == {**config, "dtype": "float32", "torch_dtype": "float32"}
    assert all(np.array_equal(exported[name], x.astype(np.float32)) for name, x in tensors.items())


def test_a_run_of_our_own_becomes_a_folder_with_everything_that_transformers_asks_for(run, tmp_path, capsys):
    """The average of the parameters, of a step that is not the newest, without anything that was imported."""
    ours = tmp_path / "ours"
    shutil.copytree(run, ours, ignore=shutil.ignore_patterns("hf", "checkpoints", "tokenizer"))
    SentencePieceVocabulary(MODEL).save(ours / "tokenizer")
    arrays = open_checkpoint(run / "checkpoints")
    for step, factor in ((4, 2), (8, 3)):
        with CheckpointWriter(ours / "checkpoints", step=step) as writer:
            for path, entry in arrays.arrays.items():
                for prefix, scale in (("model/", 1), ("learner/ema/ema/", factor)):
                    value = arrays.read(path) * np.float32(scale)
                    whole = tuple(slice(0, n) for n in entry.shape)
                    name = prefix + path.removeprefix("model/")
                    writer.add_array(name, shape=entry.shape, dtype=entry.dtype, parts=[(whole, value)])
    export_run(ours, tmp_path / "out", "--ema", "--step=4")
    assert "the moving average of step 4 as a llama" in capsys.readouterr().out
    originals, exported = tensors_of(CONFIG), _read_tensors(tmp_path / "out")
    assert all(np.array_equal(exported[name], 2 * x) for name, x in originals.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    facts = {name: config[name] for name in ("model_type", "vocab_size", "max_position_embeddings")}
    assert facts == {"model_type": "llama", "vocab_size": 320, "max_position_embeddings": 64}
    assert [config[f"{role}_token_id"] for role in ("pad", "eos", "bos")] == [0, 1, 2]
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    vocab = HuggingFaceVocabulary.from_dir(tmp_path / "out")
    assert vocab.encode_prompt(TEXT[0]) == SentencePieceVocabulary(MODEL).encode_prompt(TEXT[0])
    # The newest step, and the parameters themselves, unless asked otherwise.
    export_run(ours, tmp_path / "newest")
    assert np.array_equal(_read_tensors(tmp_path / "newest")["lm_head.weight"], originals["lm_head.weight"])


def test_a_tokenizer_of_sentencepiece_alone_is_used_and_goes_back_as_it_came(tmp_path):
    source = write_model(tmp_path / "hf", {**CONFIG, "pad_token_id": None}, tensors_of(CONFIG))
    (source / "tokenizer.model").write_bytes(MODEL)
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    import_run(source, tmp_path / "run")
    vocab = load_vocabulary(tmp_path / "run" / "tokenizer")
    assert vocab.encode(TEXT[0]) == SentencePieceVocabulary(MODEL).encode(TEXT[0])
    export_run(tmp_path / "run", tmp_path / "out")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_a_tokenizer_may_be_a_file_elsewhere(tmp_path):
    source = write_model(tmp_path / "hf", CONFIG, tensors_of(CONFIG))
    (tmp_path / "bpe.model").write_bytes(MODEL)
    import_run(source, tmp_path / "run", f"--tokenizer={tmp_path / 'bpe.model'}")
    assert load_vocabulary(tmp_path / "run" / "tokenizer").encode(TEXT[0]) == SentencePieceVocabulary(
        MODEL
    ).encode(TEXT[0])
    export_run(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == MODEL


def test_a_copy_of_a_tied_head_is_left_out_with_a_word(hf_dir, tmp_path, capsys):
    config = {**CONFIG, "tie_word_embeddings": True}
    tensors = tensors_of(config)
    source = write_model(
        tmp_path / "hf", config, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    )
    import_run(source, tmp_path / "run", f"--tokenizer={hf_dir}")
    assert "Left out: lm_head.weight: the head is tied to the token embedding." in capsys.readouterr().out
    export_run(tmp_path / "run", tmp_path / "out")
    assert _read_tensors(tmp_path / "out").keys() == tensors.keys()


def test_memory_holds_a_few_tensors_whatever_the_size_of_the_model(tmp_path, monkeypatch):
    # The embedding is the largest tensor, the layers together many times larger.
    config = {
        **CONFIG,
        "hidden_size": 128,
        "intermediate_size": 512,
        "vocab_size": 1024,
        "num_hidden_layers": 32,
    }
    shapes = hf_shapes(config)
    sizes = {name: 4 * int(np.prod(shape)) for name, shape in shapes.items()}
    total, largest = sum(sizes.values()), max(sizes.values())
    assert total > 40 * largest
    source = tmp_path / "hf"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    infos = {name: TensorInfo(np.dtype(np.float32), shape) for name, shape in shapes.items()}
    with SafetensorsWriter(source, tensors=infos, max_shard_bytes=total) as writer:
        for name, shape in shapes.items():
            writer.write(name, np.zeros(shape, np.float32))
    peaks = {}

    def measured(module, name):
        real = getattr(module, name)

        def call(*args, **kwargs):
            tracemalloc.start()
            try:
                return real(*args, **kwargs)
            finally:
                peaks[name] = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()

        monkeypatch.setattr(module, name, call)

    measured(_hf_import, "import_weights")
    measured(_hf_export, "export_weights")
    import_run(source, tmp_path / "run", "--tokenizer=none", "--data_dir=FAKE")
    export_run(tmp_path / "run", tmp_path / "out")
    # Read, translated, compressed and on its way to the disk; a quarter of a megabyte for each of four threads that
    # verify, and modules that are imported meanwhile. Seen at most: 4.73 MB, once, on a busy machine.
    assert set(peaks) == {"import_weights", "export_weights"}
    assert all(largest < peak < 6 * largest + 2e6 < total / 4 for peak in peaks.values()), peaks


def test_an_empty_folder_is_as_good_as_none(hf_dir, tmp_path):
    (tmp_path / "new").mkdir()
    import_run(hf_dir, tmp_path / "new", "--data_dir=FAKE")
    cfg = read_config(str(tmp_path / "new"))
    assert (cfg.input.vocab_size, cfg.input.source_length) == (320, 64)
