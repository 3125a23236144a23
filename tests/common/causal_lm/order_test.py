"""A model whose decoder takes rows in head-tail order: from outside nobody can tell."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.attention import LearnedPositionalEmbedding, PipelinedTransformerLayer
from axlearn.common.attention_bias import CausalAttentionBias
from axlearn.common.causal_lm import Model
from axlearn.common.module import functional
from axlearn.common.sequence_order import head_tail_indices
from axlearn.common.utils import flatten_items
from tests.fixtures_reference import fuji_model_config, numpy_params

VOCAB_SIZE, SEQ_LEN, BATCH_SIZE = 32, 16, 4


def _config(num_seq_chunks=None) -> Model.Config:
    cfg = fuji_model_config(
        vocab_size=VOCAB_SIZE, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, feed_forward_dim=24
    )
    cfg.decoder.num_seq_chunks = num_seq_chunks
    return cfg


def _with_learned_positions(cfg):
    cfg.decoder.emb.pos_emb = LearnedPositionalEmbedding.default_config().set(shape=[SEQ_LEN])
    return cfg


def _with_scan_chunk(cfg):
    return cfg.set(scan_chunk=4)


def _with_pipeline(cfg):
    layer = cfg.decoder.transformer.layer
    cfg.decoder.transformer = PipelinedTransformerLayer.default_config().set(
        num_layers=2, num_stages=2, num_microbatches=2, layer=layer
    )
    return cfg


_CHANGES = {
    "as it is": lambda cfg: cfg,
    "learned positions": _with_learned_positions,
    "scan_chunk": _with_scan_chunk,
    "pipeline": _with_pipeline,
}


def _batch(*, packed: bool, has_positions: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (BATCH_SIZE, SEQ_LEN)
    batch = {
        "input_ids": rng.integers(0, VOCAB_SIZE, size=shape).astype(np.int32),
        "target_labels": rng.integers(-5, VOCAB_SIZE, size=shape).astype(np.int32),
        "target_num_bytes": rng.integers(20, 90, size=BATCH_SIZE).astype(np.int32),
    }
    if packed:
        batch["input_segment_ids"] = np.repeat(np.arange(1, 3, dtype=np.int32), [5, SEQ_LEN - 5])[
            None
        ] + np.zeros(shape, np.int32)
        batch["live_targets"] = rng.integers(0, 2, size=shape).astype(bool)
    if has_positions:
        batch["input_positions"] = np.tile(np.arange(SEQ_LEN, dtype=np.int32) % 7, (BATCH_SIZE, 1))
    return jax.tree.map(jnp.asarray, batch)


def _run(cfg, batch):
    """The gradients, and everything that a model returns of a batch."""
    model = cfg.instantiate(parent=None)

    def call(params, method="forward", is_training=False, **kwargs):
        inputs = {"input_batch": batch, **kwargs}
        return functional(model, None, params, inputs, method=method, is_training=is_training)

    @jax.jit
    def run(params):
        def loss_fn(params):
            (loss, aux), collection = call(params, is_training=True, return_aux=True)
            return loss, (aux, collection.summaries)

        (loss, (aux, summaries)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return {
            "grads": grads,
            "loss": loss,
            "aux": aux,
            "summaries": summaries,
        }

    return dict(flatten_items(run(numpy_params(model, scale=4.0))))


@functools.cache
def _expected(change: str, packed: bool, has_positions: bool):
    return _run(_CHANGES[change](_config()), _batch(packed=packed, has_positions=has_positions))


@pytest.mark.parametrize(
    ("change", "packed", "has_positions", "num_seq_chunks"),
    [
        ("learned positions", False, False, 8),
        pytest.param("scan_chunk", True, False, 4, marks=pytest.mark.scale),
        pytest.param("as it is", False, False, 4, marks=pytest.mark.scale),
        pytest.param("as it is", True, True, 8, marks=pytest.mark.scale),
        pytest.param("pipeline", True, True, 4, marks=pytest.mark.scale),
        pytest.param("learned positions", True, True, 4, marks=pytest.mark.scale),
        pytest.param("scan_chunk", False, True, 16, marks=pytest.mark.scale),
        pytest.param("pipeline", False, False, 8, marks=pytest.mark.scale),
    ],
)
def test_whatever_a_model_returns_is_the_same_and_in_the_order_of_the_text(
    change, packed, has_positions, num_seq_chunks
):
    found = _run(
        _CHANGES[change](_config(num_seq_chunks)), _batch(packed=packed, has_positions=has_positions)
    )
    expected = _expected(change, packed, has_positions)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        value = np.asarray(value, np.float32)
        error = np.abs(np.asarray(found[path], np.float32) - value).max() / max(np.abs(value).max(), 1e-3)
        assert error < 2e-5, f"{path}: {error}"


@pytest.mark.parametrize("method", ["predict", "score"])
def test_predictions_and_scores_are_in_the_order_of_the_text(method):
    def run(num_seq_chunks):
        model = _config(num_seq_chunks).instantiate(parent=None)
        inputs = {"input_batch": _batch(packed=True, has_positions=False)}
        params = numpy_params(model, scale=4.0)
        return functional(model, None, params, inputs, method=method, is_training=False)[0]

    expected = run(None)
    assert {"predict": "logits", "score": "per_target_loss"}[method] in expected
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), run(4), expected)


def test_a_decoder_takes_and_returns_its_own_order():
    indices = head_tail_indices(SEQ_LEN, num_chunks=4)
    batch = {"input_ids": _batch(packed=False, has_positions=False)["input_ids"]}

    def hidden_states(num_seq_chunks, batch):
        decoder = _config(num_seq_chunks).decoder.set(name="decoder").instantiate(parent=None)
        params = numpy_params(decoder, scale=4.0)
        return functional(decoder, None, params, {"input_batch": batch}, is_training=False)[0][
            "hidden_states"
        ]

    there = hidden_states(4, {"input_ids": batch["input_ids"][:, indices]})
    np.testing.assert_allclose(there, hidden_states(None, batch)[:, indices], rtol=1e-4, atol=1e-5)


def test_steps_of_decoding_are_in_the_order_of_the_text():
    prefix = {"prefix": _batch(packed=False, has_positions=False)["input_ids"][:, :5]}

    def decode(num_seq_chunks):
        model = _config(num_seq_chunks).instantiate(parent=None)
        inputs = {"input_batch": prefix, "max_len": 11}
        key = jax.random.PRNGKey(0)
        params = numpy_params(model, scale=4.0)
        return functional(model, key, params, inputs, method="sample_decode", is_training=False)[0]

    expected = decode(None)
    jax.tree.map(np.testing.assert_array_equal, decode(4), expected)
    assert len(np.unique(np.asarray(expected.sequences))) > 5


@pytest.mark.parametrize(
    ("num_seq_chunks", "message"),
    [
        (3, "model.decoder.num_seq_chunks: 3 chunks in head-tail order.\n  Expected an even number"),
        (0, "model.decoder.num_seq_chunks: 0 chunks in head-tail order.\n  Expected an even number"),
        (
            6,
            "model.decoder.num_seq_chunks: 6 chunks of a row of 16 positions.\n  Expected a number of chunks that",
        ),
    ],
)
def test_numbers_of_chunks_that_cannot_be_are_refused(num_seq_chunks, message):
    with pytest.raises(ValueError) as e:
        jax.eval_shape(lambda: _run(_config(num_seq_chunks), _batch(packed=False, has_positions=False)))
    assert str(e.value).startswith(message)


@pytest.mark.parametrize(("num_seq_chunks", "of_layer"), [(4, 8), (None, 4), (4, 1)])
def test_layers_that_say_otherwise_are_refused(num_seq_chunks, of_layer):
    cfg = _config(num_seq_chunks)
    cfg.decoder.transformer.layer.self_attention.attention.num_seq_chunks = of_layer
    with pytest.raises(ValueError) as e:
        cfg.instantiate(parent=None)
    assert str(e.value) == (
        f"model.decoder.num_seq_chunks: {num_seq_chunks}, and an attention layer has num_seq_chunks={of_layer}.\n"
        "  Expected one order for all layers, set here only."
    )


def test_layers_are_told_and_masks_know_the_order():
    model = _config(4).instantiate(parent=None)
    attention = model.decoder.transformer.repeat.layer.self_attention.attention
    assert attention.config.num_seq_chunks == 4
    positions = jnp.zeros([1, 4], jnp.int32)
    bias = attention._position_bias(target_positions=positions, source_positions=positions, num_chunks=4)
    assert isinstance(bias, CausalAttentionBias)
    assert bias.num_chunks == 4
