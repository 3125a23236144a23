"""Decoders that embed positions, and with a head of their own: from ids to logits and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from axlearn.common.attention import (
    LearnedPositionalEmbedding,
    MultiheadAttention,
    QKVLinear,
    SinusoidalPositionalEmbedding,
)
from axlearn.common.causal_lm import Model
from axlearn.common.decoder import LmHead
from axlearn.common.layers import Embedding, set_bias_recursively
from axlearn.common.module import functional
from axlearn.common.utils import use_mesh
from tests.fixtures_reference import fuji_model_config, numpy_params

_VOCAB_SIZE, _DIM, _SEQ, _BATCH = 32, 16, 8, 4
_IDS = np.random.default_rng(0).integers(0, _VOCAB_SIZE, size=[_BATCH, _SEQ]).astype(np.int32)

_POSITIONS = {
    "learned": LearnedPositionalEmbedding.default_config().set(
        shape=[_SEQ], param_partition_spec=(None, "model")
    ),
    "table": Embedding.default_config().set(num_embeddings=_SEQ),
    "sinusoidal": SinusoidalPositionalEmbedding.default_config(),
}


def _config() -> Model.Config:
    cfg = fuji_model_config(
        vocab_size=_VOCAB_SIZE, dim=_DIM, num_layers=2, num_heads=4, num_kv_heads=2, feed_forward_dim=24
    )
    return cfg.set(batch_axis_names=None)


def _with_positions(pos_emb) -> Model:
    """A model that knows positions from its embedding alone."""
    cfg = _config()
    cfg.decoder.emb.pos_emb = pos_emb
    layer = cfg.decoder.transformer.layer
    layer.self_attention.attention = MultiheadAttention.default_config().set(
        num_heads=4, causal=True, input_linear=QKVLinear.default_config()
    )
    set_bias_recursively(layer, False)
    return cfg.instantiate(parent=None)


@functools.cache
def _jit(layer, method: str):
    return jax.jit(functools.partial(_call, layer, method))


def _call(layer, method, params, **inputs):
    return functional(layer, None, params, inputs, method=method, is_training=False)[0]


@pytest.mark.parametrize("name", _POSITIONS)
def test_steps_see_the_positions_that_the_whole_sequence_sees(name):
    model = _with_positions(_POSITIONS[name])
    params = numpy_params(model, scale=4.0)
    logits = np.asarray(_jit(model, "extract_logits")(params, input_batch={"input_ids": _IDS}))
    # Without positions the order of the first tokens would not matter to the last.
    swapped = _IDS[:, [1, 0, *range(2, _SEQ)]]
    other = _jit(model, "extract_logits")(params, input_batch={"input_ids": swapped})
    assert np.abs(other[:, -1] - logits[:, -1]).max() > 1e-2
    decoder = model.decoder
    states = _call(decoder, "init_states", params["decoder"], batch_size=_BATCH, max_len=_SEQ)
    done = np.zeros([_BATCH], np.int32)
    # The second chunk reaches beyond the last position, with tokens that are not live.
    for live in ([5, 3, 0, 5], [3, 5, 4, 0], [0, 0, 4, 3]):
        chunk = np.zeros([_BATCH, 5], np.int32)
        for row, num in enumerate(live):
            chunk[row, :num] = _IDS[row, done[row] : done[row] + num]
        states, outputs = _jit(decoder, "extend_step")(
            params["decoder"],
            cached_states=states,
            input_ids=chunk,
            live_step_len=np.array(live, np.int32),
        )
        for row, num in enumerate(live):
            expected = logits[row, done[row] : done[row] + num]
            np.testing.assert_allclose(outputs["logits"][row, :num], expected, rtol=1e-4, atol=1e-4)
        done += np.array(live, np.int32)
    assert done.tolist() == [8, 8, 8, 8]


def test_packed_documents_begin_at_position_0():
    model = _with_positions(_POSITIONS["learned"])
    params = numpy_params(model, scale=4.0)
    positions = np.array([0, 1, 2, 0, 1, 2, 3, 4], np.int32)
    packed = {
        "input_ids": _IDS,
        "input_segment_ids": np.broadcast_to(np.array([1] * 3 + [2] * 5, np.int32), _IDS.shape),
        "input_positions": np.broadcast_to(positions, _IDS.shape),
    }
    alone = np.concatenate([_IDS[:, 3:], _IDS[:, :3]], axis=1)
    run = _jit(model, "extract_logits")
    expected = run(params, input_batch={"input_ids": alone})
    np.testing.assert_allclose(run(params, input_batch=packed)[:, 3:], expected[:, :5], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["learned", "table"])
def test_sequences_longer_than_the_table_are_refused(name):
    model = _with_positions(_POSITIONS[name])
    ids = jax.ShapeDtypeStruct((_BATCH, _SEQ + 1), jnp.int32)
    params = jax.eval_shape(model.initialize_parameters_recursively, jax.random.PRNGKey(0))
    message = rf"(?s)model\.decoder\.emb: a sequence of {_SEQ + 1} tokens.*at most {_SEQ}"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            functools.partial(_call, model, "extract_logits"), params, input_batch={"input_ids": ids}
        )
    with pytest.raises(ValueError, match=message):
        _call(model.decoder, "init_states", {}, batch_size=1, max_len=_SEQ + 1)
    # Positions of packed documents are known on the host alone.
    batch = {"input_ids": _IDS, "input_positions": np.full_like(_IDS, _SEQ)}
    with pytest.raises(ValueError, match=message):
        model.check_host_batch(batch)
    model.check_host_batch(batch | {"input_positions": batch["input_positions"] - 1})


def test_sinusoidal_positions_never_end():
    model = _with_positions(_POSITIONS["sinusoidal"])
    assert model.decoder.emb.num_positions is None
    model.check_host_batch({"input_ids": _IDS, "input_positions": np.full_like(_IDS, 10**6)})


# A head of its own.


def _untied_config() -> Model.Config:
    """Head, table of ids and table of positions, each split in its own way on a mesh that has the axes."""
    cfg = _config()
    cfg.decoder.lm_head = LmHead.default_config().set(param_partition_spec=("model", "fsdp"))
    cfg.decoder.emb.pos_emb = _POSITIONS["learned"].clone(param_partition_spec=("fsdp", "model"))
    cfg.decoder.logits_partition_spec = (("data", "fsdp"), None, "model")
    return cfg


_BATCH_WITH_LABELS = {"input_ids": _IDS, "target_labels": np.roll(_IDS, -1, axis=1)}


def _loss_and_grads(model: Model, params):
    def loss_fn(params):
        inputs = {"input_batch": jax.tree.map(jnp.asarray, _BATCH_WITH_LABELS)}
        (loss, _), _ = functional(model, None, params, inputs, is_training=True)
        return loss

    return jax.jit(jax.value_and_grad(loss_fn))(params)


@pytest.fixture(scope="module")
def untied():
    """The model, parameters whose head equals the table of ids, and the loss with its gradients."""
    model = _untied_config().instantiate(parent=None)
    params = numpy_params(model, scale=4.0)
    params["decoder"]["lm_head"]["weight"] = params["decoder"]["emb"]["token_emb"]["weight"]
    return model, params, _loss_and_grads(model, params)


def test_a_head_of_its_own_trains_like_the_tied_one_whose_gradient_it_shares(untied):
    model, params, (loss, grads) = untied
    tied = _untied_config()
    tied.decoder.lm_head = None
    tied = tied.instantiate(parent=None)
    tied_params = {"decoder": {name: x for name, x in params["decoder"].items() if name != "lm_head"}}
    expected, tied_grads = _loss_and_grads(tied, tied_params)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    grads, tied_grads = grads["decoder"], tied_grads["decoder"]
    total = np.asarray(grads["emb"]["token_emb"]["weight"]) + np.asarray(grads["lm_head"]["weight"])
    np.testing.assert_allclose(total, tied_grads["emb"]["token_emb"]["weight"], rtol=1e-4, atol=1e-6)
    assert np.abs(grads["lm_head"]["weight"]).max() > 1e-3
    assert model.flops_per_token(_SEQ) == tied.flops_per_token(_SEQ)


def test_a_split_head_and_split_positions_train_like_whole_ones(untied):
    model, params, expected = untied
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "model"))
    with use_mesh(mesh):
        shardings = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec.mesh_axes), model.create_parameter_specs_recursively()
        )
        actual = _loss_and_grads(model, jax.device_put(params, shardings))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), actual, expected)
