"""Reads the reference run of fuji-test-v2: three steps of AXLearn itself, see tests/fixtures/README.md."""

import dataclasses
import io
import json
import pathlib
import tarfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from axlearn.common.attention import (
    FusedGroupedQKVLinear,
    GroupedQueryAttention,
    RepeatedTransformerLayer,
    RoFormerQKVLinear,
    TransformerLayer,
)
from axlearn.common.base_layer import BaseLayer
from axlearn.common.causal_lm import Model
from axlearn.common.decoder import Decoder
from axlearn.common.layers import RMSNorm, set_bias_recursively, set_norm_recursively
from axlearn.common.param_init import PARAM_REGEXP_WEIGHT, DefaultInitializer, WeightInitializer
from axlearn.common.utils import flatten_items

TAR = pathlib.Path(__file__).parent / "fixtures" / "reference-fuji-test-v2.tar.gz"
VOCAB_SIZE = 512
DIM = 64


@dataclasses.dataclass(frozen=True)
class ReferenceRun:
    """What the reference run consumed and produced.

    Attributes:
        folder: Where the archive was unpacked.
        batches: The batch of each step, the first one of step 1.
        losses: The loss of each step, before its update.
        expected: All of expected.json.
    """

    folder: pathlib.Path
    batches: list[dict[str, np.ndarray]]
    losses: list[float]
    expected: dict[str, Any]

    @classmethod
    def unpack(cls, folder: pathlib.Path) -> "ReferenceRun":
        """Unpacks the archive into an empty folder."""
        with tarfile.open(TAR) as tar:
            tar.extractall(folder, filter="data")
        folder = folder / "fuji-v2"
        expected = json.loads((folder / "expected.json").read_text())
        stored = np.load(io.BytesIO((folder / "batches.npz").read_bytes()))
        batches: list[dict[str, np.ndarray]] = [{} for _ in expected["losses"]]
        for name in stored:
            step, _, key = name.partition("/")
            batches[int(step)][key] = stored[name]
        losses = [entry["loss"] for entry in expected["losses"]]
        return cls(folder=folder, batches=batches, losses=losses, expected=expected)

    def arrays(self, *, step: int, prefix: str = "") -> dict[str, np.ndarray]:
        """The arrays of a checkpoint (of step 0 or 3) below a path prefix, by the rest of their path."""
        checkpoint = self.folder / "checkpoints" / f"step_{step:08d}"
        paths = [path for path, _ in json.loads((checkpoint / "index").read_text())[1:]]
        return {
            path.removeprefix(prefix): _read_zarr(checkpoint / "gda" / path)
            for path in paths
            if path.startswith(prefix)
        }

    def model_params(self, *, step: int, like: Any) -> Any:
        """The parameters of a checkpoint in the structure of `like`, whose leaves only lend their paths."""
        return arrange(self.arrays(step=step, prefix="model/"), like=like)


def _read_zarr(path: pathlib.Path) -> np.ndarray:
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{path}/"}}
    return ts.open(spec, open=True, read=True).result().read().result()


def arrange(arrays: dict[str, np.ndarray], *, like: Any) -> Any:
    """Puts arrays into the tree structure of `like`; both must have the same paths."""
    paths = [path for path, _ in flatten_items(like)]
    assert sorted(paths) == sorted(arrays), sorted(set(paths) ^ set(arrays))
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[path] for path in paths])


def numpy_params(layer: BaseLayer, *, seed: int = 0, scale: float = 1.0) -> Any:
    """Parameters drawn by numpy, which compiles nothing: weights from N(0, scale / DIM), norms near 1."""
    rng = np.random.default_rng(seed)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if path.endswith("/scale"):
            return (1 + 0.1 * rng.normal(size=shape)).astype(np.float32)
        return (rng.normal(size=shape) * np.sqrt(scale / DIM)).astype(np.float32)

    specs = layer.create_parameter_specs_recursively()
    params = {path: draw(path, tuple(spec.shape)) for path, spec in flatten_items(specs)}
    return jax.tree.map(jnp.asarray, arrange(params, like=specs))


def weight_init(fan: str) -> DefaultInitializer.Config:
    """Weights from N(0, 1 / fan)."""
    return DefaultInitializer.default_config().set(
        init_by_param_name={
            PARAM_REGEXP_WEIGHT: WeightInitializer.default_config().set(
                fan=fan, distribution="normal", scale=1.0
            )
        }
    )


def fuji_model_config(
    *,
    vocab_size: int = VOCAB_SIZE,
    dim: int = DIM,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    feed_forward_dim: int = 176,
) -> Model.Config:
    """A model of the fuji family; by default of the sizes of the reference run."""
    attention = GroupedQueryAttention.default_config().set(
        num_heads=num_heads,
        causal=True,
        input_linear=RoFormerQKVLinear.default_config().set(
            input_linear=FusedGroupedQKVLinear.default_config().set(num_kv_heads=num_kv_heads),
            rotary_value=False,
        ),
    )
    norm = RMSNorm.default_config().set(eps=1e-5, forward_dtype=None)
    layer = TransformerLayer.default_config()
    layer.self_attention.set(attention=attention, structure="prenorm")
    layer.feed_forward.set(hidden_dim=feed_forward_dim, activation=("nn.silu", "linear"), structure="prenorm")
    set_bias_recursively(layer, bias=False)
    set_norm_recursively(layer, norm)
    decoder = Decoder.default_config().set(
        attention_mask=None,
        vocab_size=vocab_size,
        dim=dim,
        transformer=RepeatedTransformerLayer.default_config().set(num_layers=num_layers, layer=layer),
        output_norm=norm,
    )
    decoder.emb.token_emb.param_init = weight_init("fan_out")
    return Model.default_config().set(
        name="model", decoder=decoder, dtype=jnp.float32, param_init=weight_init("fan_in")
    )
