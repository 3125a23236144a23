"""Imported models continue prompts with the very ids that transformers continues them with.

The reference was written by scripts/make_hf_greedy_reference.py, where the likeliest token led by at least 0.0017 at
every step: a hundred times what float32 leaves open.
"""

import json
import pathlib

import jax
import numpy as np
import pytest

from axlearn.cli._run_files import read_config
from axlearn.cli.main import main as axlearn
from axlearn.common.checkpointer import load_checkpoint
from axlearn.common.decoding import StopOnMaxLength
from axlearn.common.logit_modifiers import scale_by
from axlearn.common.module import functional
from axlearn.common.utils import build_mesh, use_mesh

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "fixtures"
REFERENCE = json.loads((FIXTURES / "hf_greedy.json").read_text())
# One of each kind: as many key heads as heads, scaled positions, windows in all or in some layers, QK-norm.
NAMES = ["llama1", "llama3", "mistral", "qwen2-sliding", "qwen3"]


def _imported(name: str, run: pathlib.Path):
    """The model of a run that was imported, and its parameters."""
    flags = ["--tokenizer=none", "--data_dir=FAKE", f"--output={run}"]
    assert axlearn(["convert", "hf", "import", str(FIXTURES / "hf" / name), *flags]) == 0
    cfg = read_config(str(run))
    model = cfg.model.clone(name="model").instantiate(parent=None)
    specs = {"model": model.create_parameter_specs_recursively()}
    names = tuple(cfg.mesh_axis_names)
    one_device = build_mesh(mesh_shape=(1,) * len(names), mesh_axis_names=names, devices=jax.devices()[:1])
    with use_mesh(one_device):
        return model, load_checkpoint(run / "checkpoints", state=specs).state["model"]


@pytest.mark.parametrize("name", NAMES)
def test_the_likeliest_continuations_are_those_of_transformers(name, tmp_path, capsys):
    model, params = _imported(name, tmp_path / "run")
    rows = REFERENCE[name]
    prefix_lens = np.asarray([len(row["prompt"]) for row in rows], np.int32)
    num_tokens = len(rows[0]["continuation"])
    max_len = int(prefix_lens.max()) + num_tokens
    prefix = np.zeros([len(rows), max_len], np.int32)
    for i, row in enumerate(rows):
        prefix[i, : prefix_lens[i]] = row["prompt"]

    @jax.jit
    def sample(params, prefix, prefix_lens):
        inputs = {
            "input_batch": {"prefix": prefix, "prefix_lens": prefix_lens},
            "max_len": max_len,
            "num_decodes": 1,
            "logits_modifier": scale_by(0.0),
            "stop_decoding_condition": StopOnMaxLength(max_len),
        }
        return functional(
            model, jax.random.PRNGKey(0), params, inputs, method="sample_decode", is_training=False
        )[0]

    sequences = np.asarray(sample(params, prefix, prefix_lens).sequences[:, 0])
    for sequence, length, row in zip(sequences, prefix_lens, rows, strict=True):
        assert sequence[length : length + num_tokens].tolist() == row["continuation"]
    assert f"a {name.partition('-')[0].rstrip('13')}" in capsys.readouterr().out
