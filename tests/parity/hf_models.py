"""Models of the Hugging Face families: those that transformers saved, and ours that it is to load.

    python -m tests.parity.hf_models FOLDER

writes the models of `OUR_MODELS` into a folder each, for `scripts/make_hf_reference.py --exported FOLDER`.
"""

import functools
import hashlib
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from axlearn.common.attention import (
    FusedQKVLinear,
    GroupedQKVLinear,
    QKVLinear,
    RepeatedTransformerLayer,
    StackedTransformerLayer,
)
from axlearn.common.causal_lm import Model
from axlearn.common.decoder import LmHead
from axlearn.common.hf import TensorRule, hf_config_from_model, parameter_shapes, tensor_rules
from axlearn.common.module import functional
from axlearn.common.utils import flatten_items
from axlearn.experiments.text.gpt import common, hf
from tests.fixtures_reference import arrange

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "fixtures"
MAX_LEN = 64
NAMES = sorted(path.name for path in (FIXTURES / "hf").iterdir())


def read_config(name: str) -> dict[str, Any]:
    """The config.json of a fixture."""
    return json.loads((FIXTURES / "hf" / name / "config.json").read_text(encoding="utf-8"))


def read_tensors(name: str) -> dict[str, np.ndarray]:
    """The tensors of a fixture, out of all its files."""
    files = sorted((FIXTURES / "hf" / name).glob("*.safetensors"))
    return {key: value for file in files for key, value in load_file(file).items()}


def instantiate(cfg: Model.Config) -> Model:
    """The model of a config, in float32."""
    return cfg.clone(name="model", dtype=jnp.float32).instantiate(parent=None)


def to_params(model: Model, rules: list[TensorRule], tensors: dict[str, np.ndarray]) -> Any:
    """Imports tensors: parameters in the structure that the model has."""
    arrays = {path: np.empty(shape, np.float32) for path, shape in parameter_shapes(rules).items()}
    for rule in rules:
        array = rule.to_ours({name: tensors[name] for name in rule.hf_shapes})
        assert array.shape == rule.shape
        arrays[rule.path][... if rule.layer is None else rule.layer] = array
    return arrange(arrays, like=model.create_parameter_specs_recursively())


def to_tensors(params: Any, rules: list[TensorRule]) -> dict[str, np.ndarray]:
    """Exports parameters: the tensors of the other side by name."""
    arrays = dict(flatten_items(params))
    tensors = {}
    for rule in rules:
        array = np.asarray(arrays[rule.path])
        tensors.update(rule.to_hf(array if rule.layer is None else array[rule.layer]))
    return tensors


def digest(tensors: dict[str, np.ndarray]) -> str:
    """The sum of all names and bytes."""
    result = hashlib.sha256()
    for name in sorted(tensors):
        result.update(name.encode() + tensors[name].tobytes())
    return result.hexdigest()


@functools.cache
def _jit_logits(model: Model) -> Any:
    @jax.jit
    def logits(params: Any, ids: jax.Array) -> jax.Array:
        return functional(
            model,
            None,
            params,
            {"input_batch": {"input_ids": ids}},
            method="extract_logits",
            is_training=False,
        )[0]

    return logits


def logits_of(model: Model, params: Any, ids: np.ndarray) -> np.ndarray:
    """The logits [batch, seq, vocab] of whole sequences."""
    return np.asarray(_jit_logits(model)(params, ids))


def _our_model(*, num_kv_heads: int = 2, tied: bool = True, num_layers: int = 3) -> Any:
    """Like fuji-tiny, narrower."""
    norm = common.rms_norm_config()
    layer = common.layer_config(
        attention=common.attention_config(
            num_heads=4, num_kv_heads=num_kv_heads, rope_theta=1e4, kv_cache_dtype=jnp.float32
        ),
        feed_forward_dim=common.scaled_hidden_dim(scale=8 / 3, round_up_to_multiples_of=16),
        norm=norm,
    )
    cfg = common.model_config(
        vocab_size=96, dim=24, num_layers=num_layers, layer=layer, norm=norm, remat=False
    )
    if not tied:
        cfg.decoder.lm_head = LmHead.default_config()
    return cfg


def _with_projection(cfg: Any, projection: Any) -> Any:
    cfg.decoder.transformer.layer.self_attention.attention.input_linear.input_linear = projection
    return cfg


def _fuji_tiny_like() -> Any:
    return _our_model()


def _separate_untied() -> Any:
    projection = GroupedQKVLinear.default_config().set(num_kv_heads=2)
    projection.layer.bias = False
    return _with_projection(_our_model(tied=False), projection)


def _stacked_multi_head() -> Any:
    """Multi-head attention with one stacked projection, in layers that are not repeated."""
    projection = FusedQKVLinear.default_config()
    projection.layer.bias = False
    cfg = _with_projection(_our_model(num_kv_heads=4, num_layers=2), projection)
    stack = cfg.decoder.transformer
    cfg.decoder.transformer = StackedTransformerLayer.default_config().set(num_layers=2, layer=stack.layer)
    return cfg


def _biased_as_qwen2() -> Any:
    return _with_projection(_our_model(num_kv_heads=4, num_layers=2), QKVLinear.default_config())


def _alternating_windows_as_qwen3() -> Any:
    """A repeated pair of layers of which the first looks back over a window, with QK-norm."""
    config = read_config("qwen3") | {
        "use_sliding_window": True,
        "sliding_window": 4,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    cfg: Any = hf.model_config(config, remat=False)
    pair = StackedTransformerLayer.default_config().set(
        num_layers=2, layer=list(cfg.decoder.transformer.layer[:2])
    )
    cfg.decoder.transformer = RepeatedTransformerLayer.default_config().set(num_layers=2, layer=pair)
    return cfg


OUR_MODELS = {
    "fuji-tiny-like": _fuji_tiny_like,
    "separate-untied": _separate_untied,
    "stacked-multi-head": _stacked_multi_head,
    "biased-as-qwen2": _biased_as_qwen2,
    "alternating-windows-as-qwen3": _alternating_windows_as_qwen3,
}


def our_params(model: Model) -> Any:
    """Parameters that are the same everywhere and for ever; none is near where initialisation would put it."""
    # The stream of this class never changes, unlike that of `default_rng`.
    rng = np.random.RandomState(0)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.standard_normal(shape)
        if path.endswith("/scale"):
            return (1 + 0.3 * noise).astype(np.float32)
        return (0.3 * noise).astype(np.float32)

    specs = model.create_parameter_specs_recursively()
    return arrange({path: draw(path, tuple(spec.shape)) for path, spec in flatten_items(specs)}, like=specs)


def export(name: str) -> tuple[Model, Any, dict[str, Any], dict[str, np.ndarray]]:
    """One of `OUR_MODELS`, its parameters, and the config.json and the tensors that stand for it."""
    cfg = OUR_MODELS[name]()
    model = instantiate(cfg)
    params = our_params(model)
    config = hf_config_from_model(cfg, max_position_embeddings=MAX_LEN, bos_token_id=1, eos_token_id=2)
    return model, params, config, to_tensors(params, tensor_rules(cfg, config))


def main(root: pathlib.Path) -> None:
    """Writes all of `OUR_MODELS` below `root`."""
    for name in OUR_MODELS:
        _, _, config, tensors = export(name)
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        save_file(tensors, root / name / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
