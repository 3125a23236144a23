"""Tests of axlearn.common.embedding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.embedding import TransformerTextEmbeddings
from axlearn.common.layers import Embedding
from axlearn.common.module import functional

_IDS = np.array([[1, 2, 3], [4, 0, 1]])


def _config() -> TransformerTextEmbeddings.Config:
    return TransformerTextEmbeddings.default_config().set(name="emb", dim=4, vocab_size=5)


def _build(cfg):
    layer = cfg.instantiate(parent=None)
    return layer, jax.jit(layer.initialize_parameters_recursively)(jax.random.PRNGKey(0))


def _forward(layer, params, **inputs):
    return functional(layer, None, params, jax.tree.map(jnp.asarray, inputs), is_training=False)[0]


def test_tokens_are_looked_up_without_scaling():
    layer, params = _build(_config())
    np.testing.assert_array_equal(
        _forward(layer, params, input_ids=_IDS), np.asarray(params["token_emb"]["weight"])[_IDS]
    )


def test_position_and_type_embeddings_are_added():
    cfg = _config().set(
        pos_emb=Embedding.default_config().set(num_embeddings=6),
        type_emb=Embedding.default_config().set(num_embeddings=2),
    )
    layer, params = _build(cfg)
    token, pos, kind = (np.asarray(params[name]["weight"]) for name in ("token_emb", "pos_emb", "type_emb"))
    types = np.array([[0, 0, 1], [1, 0, 1]])
    positions = np.array([[0, 1, 0], [3, 4, 5]])
    expected = token[_IDS] + pos[:3] + kind[types]
    np.testing.assert_allclose(
        _forward(layer, params, input_ids=_IDS, token_type_ids=types), expected, rtol=1e-6
    )
    expected = token[_IDS] + pos[positions] + kind[types]
    outputs = _forward(layer, params, input_ids=_IDS, token_type_ids=types, positions=positions)
    np.testing.assert_allclose(outputs, expected, rtol=1e-6)


def test_attend_scores_against_the_token_table():
    layer, params = _build(_config())
    x = np.random.default_rng(0).normal(size=[2, 3, 4]).astype(np.float32)
    logits, _ = functional(layer, None, params, (jnp.asarray(x),), method="attend", is_training=False)
    np.testing.assert_allclose(logits, x @ np.asarray(params["token_emb"]["weight"]).T, rtol=1e-5, atol=1e-6)


def test_types_without_type_embedding_are_refused():
    layer, params = _build(_config())
    with pytest.raises(ValueError, match="emb: token_type_ids given"):
        _forward(layer, params, input_ids=_IDS, token_type_ids=_IDS)
