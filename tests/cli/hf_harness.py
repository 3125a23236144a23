"""A small Llama as Hugging Face keeps models, and the commands that convert it."""

import json

import numpy as np

from axlearn.cli.main import main as axlearn
from axlearn.common.hf import SafetensorsWriter, TensorInfo, tensor_rules
from axlearn.common.vocabulary import train_sentencepiece
from axlearn.experiments.text.gpt import hf

TEXT = ["def read_lines(path):", "    with open(path) as f:", "        return f.read().splitlines()"] * 20
MODEL = train_sentencepiece(TEXT, vocab_size=300)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "some_field_of_the_future": None,
}
GENERATION_CONFIG = {"eos_token_id": [1, 7], "temperature": 0.6}


def hf_shapes(config) -> dict[str, tuple[int, ...]]:
    rules = tensor_rules(hf.model_config(config), config)
    return {name: tuple(shape) for rule in rules for name, shape in rule.hf_shapes.items()}


def tensors_of(config, *, dtype=np.float32, seed=0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(size=shape) * (0.3 if len(shape) > 1 else 0.1) + (len(shape) == 1)).astype(dtype)
        for name, shape in hf_shapes(config).items()
    }


def write_model(folder, config, tensors, *, max_shard_bytes=30_000):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    infos = {name: TensorInfo(x.dtype, x.shape) for name, x in tensors.items()}
    with SafetensorsWriter(folder, tensors=infos, max_shard_bytes=max_shard_bytes) as writer:
        for name, x in tensors.items():
            writer.write(name, x)
    return folder


def convert_hf(direction, source, output, *flags, status=0):
    assert axlearn(["convert", "hf", direction, str(source), f"--output={output}", *flags]) == status


def import_run(source, output, *flags, status=0):
    convert_hf("import", source, output, *flags, status=status)


def export_run(run, output, *flags, status=0):
    convert_hf("export", run, output, *flags, status=status)
