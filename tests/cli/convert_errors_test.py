"""What `axlearn convert hf` refuses, and that nothing is left of what fails."""

import errno
import json
import os
import shutil
import signal

import ml_dtypes
import pytest

from axlearn.cli import _hf_import, _new_dir, convert
from axlearn.cli._run_files import read_config
from axlearn.cli.main import main as axlearn
from axlearn.common.checkpointer import CheckpointWriter
from axlearn.common.config import config_to_json
from axlearn.common.hf import SafetensorsWriter
from axlearn.common.vocabulary import SentencePieceVocabulary
from tests.cli.hf_harness import CONFIG, TEXT, convert_hf, export_run, import_run, tensors_of, write_model


def _without(folder, tmp_path, *names, **config):
    """A copy of a model folder without some files, and with another config."""
    copy = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(*names))
    if config:
        (copy / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return copy


def _with_tensors(hf_dir, tmp_path, edit, **config):
    """A model with other tensors and the same tokenizer."""
    tensors = tensors_of({**CONFIG, **config})
    edit(tensors)
    folder = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
    write_model(folder, {**CONFIG, **config}, tensors)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(hf_dir / name, folder)
    return folder


def _truncated(hf_dir, tmp_path):
    folder = _without(hf_dir, tmp_path, "README.md")
    last = sorted(folder.glob("model-*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    return folder


def _rename(tensors):
    tensors["model.layers.1.mlp.up.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")


def _transpose(tensors):
    tensors["model.layers.0.mlp.gate_proj.weight"] = tensors["model.layers.0.mlp.gate_proj.weight"].T


def _untied_copy(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


def _as_float8(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(ml_dtypes.float8_e4m3fn)


def test_wrong_imports_are_refused_in_a_few_lines_and_leave_nothing(hf_dir, run, tmp_path, capsys, golden):
    work, outputs = tmp_path / "work", tmp_path / "outputs"
    work.mkdir()
    outputs.mkdir()
    (work / "file").write_text("")
    cases = {
        "no folder": [tmp_path / "nowhere"],
        "a folder that is no model": [work],
        "an unknown architecture": [_without(hf_dir, work, "x", model_type="gpt2", architectures=["GPT2"])],
        "a config that is no JSON": [_without(hf_dir, work, "x")],
        "a config that is too deep": [_without(hf_dir, work, "x")],
        "a generation config that is no JSON": [_without(hf_dir, work, "x")],
        "an end of text that is no id": [_without(hf_dir, work, "x", eos_token_id=[1, "</s>"])],
        "a padding that is no id": [_without(hf_dir, work, "x", pad_token_id=10**13)],
        "a length that is none": [_without(hf_dir, work, "x", max_position_embeddings=0)],
        "a tokenizer that is no text": [_without(hf_dir, work, "x")],
        "a field that would change the numbers": [_without(hf_dir, work, "x", hidden_act="gelu")],
        "weights as a pickle": [_without(hf_dir, work, "*.safetensors*")],
        "a tensor with another name": [_with_tensors(hf_dir, work, _rename)],
        "a tensor of another shape": [_with_tensors(hf_dir, work, _transpose)],
        "an extra tensor": [_with_tensors(hf_dir, work, lambda t: t.update(extra=t["model.norm.weight"]))],
        "a tied head of its own": [_with_tensors(hf_dir, work, _untied_copy, tie_word_embeddings=True)],
        "quantized weights": [_with_tensors(hf_dir, work, _as_float8)],
        "a truncated file": [_truncated(hf_dir, work)],
        "no tokenizer": [_without(hf_dir, work, "tokenizer*")],
        "a tokenizer larger than the model": [
            _with_tensors(hf_dir, work, lambda tensors: None, vocab_size=299)
        ],
        "an unknown recipe": [hf_dir, "--recipe=fuji-tinny"],
        "an override that matches nothing": [hf_dir, "--set", "max_steps=3"],
        "an override of the model": [hf_dir, "--set", "model.decoder.dim=16"],
        "an override of the type": [hf_dir, "--set", "model.dtype=bfloat16"],
        "an override of the directory": [hf_dir, "--set", f"dir={work}"],
        "text without a tokenizer": [hf_dir, "--tokenizer=none"],
        "a tokenizer that is not there": [hf_dir, f"--tokenizer={work / 'nowhere'}"],
        "an output that is there": [hf_dir, f"--output={run}"],
        "an output that is a file": [hf_dir, f"--output={work / 'file'}"],
        "an output that is a link": [hf_dir, f"--output={work / 'link'}"],
    }
    (cases["a config that is no JSON"][0] / "config.json").write_text("{")
    (cases["a config that is too deep"][0] / "config.json").write_text("[" * 100_000)
    (cases["a generation config that is no JSON"][0] / "generation_config.json").write_text("[]")
    (cases["a tokenizer that is no text"][0] / "tokenizer.json").write_bytes(b"\xff")
    os.symlink(_without(hf_dir, work, "*"), work / "link")
    (cases["weights as a pickle"][0] / "pytorch_model.bin").write_bytes(b"")
    before = sorted(path for path in run.rglob("*"))
    texts = []
    for name, (source, *flags) in cases.items():
        import_run(source, outputs / "new" / "run", *flags, status=2)
        captured = capsys.readouterr()
        assert captured.out == ""
        assert list(outputs.iterdir()) == []
        text = captured.err.replace(str(source), "HF_DIR").replace(str(run), "RUN").replace(str(work), "WORK")
        texts.append(f"# {name}\n{text}")
    assert sorted(path for path in run.rglob("*")) == before
    golden("errors/convert_import.txt", "".join(texts).replace(str(tmp_path), "TMP"))


def _edited_run(run, folder, edit):
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("hf"))
    cfg = read_config(str(run))
    edit(cfg)
    (folder / "trainer_config.json").write_text(config_to_json(cfg))
    return folder


def _layer(cfg):
    return cfg.model.decoder.transformer.layer


def test_wrong_exports_are_refused_in_a_few_lines_and_leave_nothing(run, tmp_path, capsys, golden):
    work, outputs = tmp_path / "work", tmp_path / "outputs"
    work.mkdir()
    outputs.mkdir()
    torn = work / "torn"
    shutil.copytree(run, torn)
    for path in (torn / "checkpoints/step_00000000/gda/model/decoder/emb").rglob("0"):
        path.is_file() and path.write_bytes(b"torn")
    other_tokenizer = _edited_run(run, work / "unigram", lambda cfg: None)
    shutil.rmtree(other_tokenizer / "tokenizer")
    SentencePieceVocabulary(_unigram_model(work)).save(other_tokenizer / "tokenizer")
    cases = {
        "no run": [work / "nowhere"],
        "a model that no family has": [
            _edited_run(
                run, work / "relu", lambda cfg: _layer(cfg).feed_forward.set(activation=("nn.relu", "linear"))
            )
        ],
        "a model that is not the checkpoint's": [
            _edited_run(run, work / "deep", lambda cfg: cfg.model.decoder.transformer.set(num_layers=4))
        ],
        "a tokenizer that transformers has not": [other_tokenizer],
        "no average": [run, "--ema"],
        "no such step": [run, "--step=3"],
        "a size that is none": [run, "--max_shard_size=5XB"],
        "an output that is there": [run, f"--output={run}"],
    }
    texts = []
    for name, (source, *flags) in cases.items():
        export_run(source, outputs / "new", *flags, status=2)
        captured = capsys.readouterr()
        assert captured.out == ""
        assert list(outputs.iterdir()) == []
        texts.append(f"# {name}\n{captured.err}".replace(str(source), "RUN"))
    golden("errors/convert_export.txt", "".join(texts).replace(str(tmp_path), "TMP"))
    export_run(torn, outputs / "new", status=1)
    assert "decoder/emb" in capsys.readouterr().err
    assert list(outputs.iterdir()) == []


def _unigram_model(folder) -> bytes:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_prefix=str(folder / "unigram"), vocab_size=40, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return (folder / "unigram.model").read_bytes()


def test_a_disk_without_room_is_noticed_before_anything_is_written(
    hf_dir, run, tmp_path, capsys, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(_new_dir.shutil, "disk_usage", lambda path: usage)
    import_run(hf_dir, tmp_path / "new", status=2)
    assert "the disk has 100.0 kB left, " in capsys.readouterr().err
    export_run(run, tmp_path / "new", status=2)
    assert "the disk has 100.0 kB left, " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def _full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_disk_that_fills_up_leaves_nothing_and_says_so(
    direction, hf_dir, run, tmp_path, capsys, monkeypatch
):
    # Behind the first half of the tensors.
    calls = iter(range(100))
    klass, method = {
        "import": (CheckpointWriter, "add_array"),
        "export": (SafetensorsWriter, "write"),
    }[direction]
    real = getattr(klass, method)
    monkeypatch.setattr(
        klass, method, lambda *args, **kwargs: (real if next(calls) < 5 else _full_disk)(*args, **kwargs)
    )
    source = {"import": hf_dir, "export": run}[direction]
    convert_hf(direction, source, tmp_path / "a" / "b" / "new", status=2)
    err = capsys.readouterr().err
    assert "it cannot be written: the disk is full" in err
    assert "Nothing is left of it." in err
    assert next(calls) > 5
    assert list(tmp_path.iterdir()) == []


def test_folders_above_an_output_that_cannot_be_made_are_removed_again(hf_dir, tmp_path, capsys):
    import_run(hf_dir, tmp_path / "above" / ("x" * 300) / "run", status=2)
    assert "File name too long" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_import_that_is_interrupted_leaves_nothing(interrupt, hf_dir, tmp_path, monkeypatch):
    def stop(*_, **__):
        if interrupt is SystemExit:
            # As a scheduler does it.
            os.kill(os.getpid(), signal.SIGTERM)
        raise KeyboardInterrupt

    monkeypatch.setattr(_hf_import, "import_weights", stop)
    before = signal.getsignal(signal.SIGTERM)
    arguments = ["convert", "hf", "import", str(hf_dir), f"--output={tmp_path / 'new'}"]
    if interrupt is SystemExit:
        with pytest.raises(SystemExit) as e:
            axlearn(arguments)
        assert e.value.code == 143
    else:
        assert axlearn(arguments) == 130
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("1.5 kB", 1500),
        ("2GiB", 2**31),
        ("7", 7),
        ("300mb", 3 * 10**8),
        ("9" * 400, 10**400 - 1),
    ],
)
def test_sizes_are_read_with_their_units(text, size):
    assert convert.parse_size(text, flag="--max_shard_size") == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0GB", "0.1B", "5 XB", "1e9"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="is no size"):
        convert.parse_size(text, flag="--max_shard_size")
