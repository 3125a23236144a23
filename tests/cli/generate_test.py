"""`axlearn generate` on a run directory made by hand: what it prints, what it reads, and its errors."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.cli import generate
from axlearn.cli.main import main
from axlearn.common.checkpointer import Checkpointer, export_axlearn, open_checkpoint
from axlearn.common.config import config_for_function, config_to_json
from axlearn.common.input_fake import FakeLmInput
from axlearn.common.learner import Learner
from axlearn.common.module import functional
from axlearn.common.optimizers import param_ema, sgd_optimizer
from axlearn.common.trainer import SpmdTrainer
from axlearn.common.vocabulary import SentencePieceVocabulary, load_vocabulary, train_sentencepiece
from tests.fixtures_reference import fuji_model_config, numpy_params

VOCAB_SIZE, CONTEXT_LEN = 300, 48
TEXT = ["def read_lines(path):", "    with open(path) as f:", "        return f.read().splitlines()"] * 20
PROMPT = "def read"


def _trainer_config(*, vocab_size: int = VOCAB_SIZE, ema_decay: float | None = 0.9) -> SpmdTrainer.Config:
    model = fuji_model_config(
        vocab_size=vocab_size, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, feed_forward_dim=24
    )
    return SpmdTrainer.default_config().set(
        name="t",
        model=model.set(name="model"),
        mesh_axis_names=("data", "model"),
        mesh_shape=(1, 1),
        input=FakeLmInput.default_config().set(
            is_training=True, global_batch_size=2, source_length=CONTEXT_LEN, vocab_size=vocab_size
        ),
        learner=Learner.default_config().set(
            optimizer=config_for_function(sgd_optimizer).set(learning_rate=0.1, decouple_weight_decay=True),
            ema=config_for_function(param_ema).set(decay=ema_decay),
        ),
    )


def _params(model, *, seed: int):
    return jax.tree.map(jnp.asarray, numpy_params(model, seed=seed, scale=16.0))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A run of two checkpoints, with other parameters in each and in its moving average."""
    run = tmp_path_factory.mktemp("runs") / "run"
    cfg = _trainer_config()
    model = cfg.model.instantiate(parent=None)
    checkpointer_cfg = Checkpointer.default_config().set(name="checkpointer", dir=str(run / "checkpoints"))
    checkpointer = checkpointer_cfg.instantiate(parent=None)
    for step in (10, 20):
        ema = {"ema": {"ema": _params(model, seed=step + 3)}}
        checkpointer.save(step=step, state={"model": _params(model, seed=step + 2), "learner": ema})
    checkpointer.wait_until_finished()
    checkpointer.stop()
    SentencePieceVocabulary(train_sentencepiece(TEXT, vocab_size=VOCAB_SIZE)).save(run / "tokenizer")
    (run / "trainer_config.json").write_text(config_to_json(cfg))
    return run


@pytest.fixture(autouse=True)
def _no_process_wide_setup(monkeypatch):
    # It would point the compilation cache of all tests elsewhere.
    monkeypatch.setattr(generate.launch, "setup", lambda: None)


def _generate(run, *flags: str, prompt: str = PROMPT, status: int = 0) -> None:
    assert main(["generate", str(run), f"--prompt={prompt}", *flags]) == status


def _greedy_reference(run, *, seed: int, max_tokens: int) -> str:
    """Without cache, padding or the command."""
    vocab = load_vocabulary(run / "tokenizer")
    model = _trainer_config().model.instantiate(parent=None)
    params = _params(model, seed=seed)

    @jax.jit
    def logits(input_ids):
        inputs = {"input_batch": {"input_ids": input_ids}}
        return functional(model, None, params, inputs, method="extract_logits", is_training=False)[0]

    ids = [vocab.bos_id, *vocab.encode(PROMPT)]
    for _ in range(max_tokens):
        padded = np.pad(ids, (0, CONTEXT_LEN - len(ids)))[None].astype(np.int32)
        ids.append(int(logits(padded)[0, len(ids) - 1].argmax()))
        assert ids[-1] != vocab.eos_id
    return vocab.decode(ids)


def test_temperature_zero_prints_the_likeliest_continuation_of_the_newest_step(finished_run, capsys):
    _generate(finished_run, "--temperature=0", "--max_tokens=12")
    captured = capsys.readouterr()
    assert captured.out == _greedy_reference(finished_run, seed=22, max_tokens=12) + "\n"
    assert captured.out.startswith(PROMPT)
    assert "[step 20; 12 tokens in" in captured.err


@pytest.mark.parametrize(
    ("flags", "seed"), [(["--step=10"], 12), (["--ema"], 23), (["--ema", "--step=10"], 13)]
)
def test_the_parameters_are_those_asked_for(flags, seed, finished_run, capsys):
    _generate(finished_run, "--temperature=0", "--max_tokens=4", *flags)
    captured = capsys.readouterr()
    assert captured.out == _greedy_reference(finished_run, seed=seed, max_tokens=4) + "\n"
    assert ("moving average" in captured.err) == ("--ema" in flags)


def test_samples_are_repeatable_and_differ_between_seeds_and_samples(finished_run, capsys):
    outputs = []
    for seed in (0, 0, 1):
        _generate(finished_run, "--max_tokens=8", "--num_samples=3", f"--seed={seed}", "--temperature=1.5")
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    samples = [part.partition(" of 3 ---\n")[2] for part in outputs[0].split("--- sample ")[1:]]
    assert len(set(samples)) == 3
    assert all(sample.startswith(PROMPT) for sample in samples)


def test_sampling_stops_at_the_length_that_the_model_was_trained_on(finished_run, capsys):
    _generate(finished_run, "--temperature=0", "--max_tokens=1000")
    vocab = load_vocabulary(finished_run / "tokenizer")
    num_new = CONTEXT_LEN - 1 - len(vocab.encode(PROMPT))
    err = capsys.readouterr().err
    assert f"stopped at the {CONTEXT_LEN} tokens" in err
    assert f"{num_new} tokens in" in err


def test_only_the_parameters_are_read(finished_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    for path in (run / "checkpoints" / "step_00000020" / "gda" / "learner").rglob("*"):
        if path.is_file():
            path.write_bytes(b"torn")
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    _generate(run, "--temperature=0", "--max_tokens=4")
    assert "[step 20;" in capsys.readouterr().err
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before


def test_a_checkpoint_of_axlearn_s_is_read_as_ours_is(finished_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run, ignore=shutil.ignore_patterns("checkpoints"))
    export_axlearn(open_checkpoint(finished_run / "checkpoints"), output_dir=run / "checkpoints")
    _generate(run, "--temperature=0", "--max_tokens=4")
    captured = capsys.readouterr()
    assert captured.out == _greedy_reference(finished_run, seed=22, max_tokens=4) + "\n"
    assert "[step 20;" in captured.err


def test_a_torn_checkpoint_is_passed_over_for_the_one_before(finished_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (run / "checkpoints" / "step_00000020" / "index").write_bytes(b"torn")
    _generate(run, "--temperature=0", "--max_tokens=4")
    assert "[step 10;" in capsys.readouterr().err


def _error(run, *flags: str, capsys, prompt: str = PROMPT, status: int = 2) -> str:
    _generate(run, *flags, prompt=prompt, status=status)
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.replace(str(run), "RUN")


def test_errors_say_what_to_do(finished_run, tmp_path, capsys, golden):
    no_checkpoint = tmp_path / "no-checkpoint"
    shutil.copytree(finished_run, no_checkpoint, ignore=shutil.ignore_patterns("step_*"))
    no_average = tmp_path / "no-average"
    shutil.copytree(finished_run, no_average)
    (no_average / "trainer_config.json").write_text(config_to_json(_trainer_config(ema_decay=None)))
    small_model = tmp_path / "small-model"
    shutil.copytree(finished_run, small_model)
    (small_model / "trainer_config.json").write_text(config_to_json(_trainer_config(vocab_size=256)))
    no_tokenizer = tmp_path / "no-tokenizer"
    shutil.copytree(finished_run, no_tokenizer, ignore=shutil.ignore_patterns("tokenizer"))
    empty = tmp_path / "empty"
    empty.mkdir()
    # Texts of other rooms, which have goldens of their own.
    assert "There is no checkpoint" in _error(no_checkpoint, capsys=capsys)
    assert "There is no checkpoint of step 15" in _error(finished_run, "--step=15", capsys=capsys)
    assert "RUN/tokenizer: no vocabulary" in _error(no_tokenizer, capsys=capsys)
    errors = {
        "no such run": _error(tmp_path / "nowhere", capsys=capsys),
        "a folder that is no run": _error(empty, capsys=capsys),
        "no moving average": _error(no_average, "--ema", capsys=capsys),
        "another tokenizer": _error(small_model, capsys=capsys),
        "a prompt that is too long": _error(finished_run, prompt="x " * 40, capsys=capsys),
        "a prompt that is no text": _error(finished_run, prompt="a \udcff", capsys=capsys),
        "no tokens": _error(finished_run, "--max_tokens=0", capsys=capsys),
        "a negative temperature": _error(finished_run, "--temperature=-1", capsys=capsys),
        "no probability": _error(finished_run, "--top_p=95", capsys=capsys),
    }
    golden("errors/generate.txt", "".join(f"# {name}\n{text}\n" for name, text in errors.items()))


def test_the_config_is_data_and_is_not_executed(finished_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    text = (run / "trainer_config.json").read_text()
    hostile = text.replace("axlearn.common.causal_lm", "subprocess")
    assert json.loads(hostile) != json.loads(text)
    (run / "trainer_config.json").write_text(hostile)
    assert "subprocess" in _error(run, capsys=capsys)
