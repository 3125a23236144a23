"""The language model against the reference run, XLA's own count of FLOPs, and by its laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from axlearn.common.attention import RepeatedTransformerLayer, StackedTransformerLayer
from axlearn.common.causal_lm import Model, gpt_decoder_config, residual_initializer_cfg
from axlearn.common.decoder import LmHead
from axlearn.common.logit_modifiers import scale_by
from axlearn.common.module import functional
from axlearn.common.utils import flatten_items, use_mesh
from tests.fixtures_reference import ReferenceRun, fuji_model_config, numpy_params

VOCAB_SIZE, SEQ_LEN = 32, 16


def _small_config() -> Model.Config:
    return fuji_model_config(
        vocab_size=VOCAB_SIZE, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, feed_forward_dim=24
    )


def _batch(seed: int = 0, *, batch_size: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (batch_size, SEQ_LEN)
    return {
        "input_ids": rng.integers(0, VOCAB_SIZE, size=shape).astype(np.int32),
        "target_labels": rng.integers(-5, VOCAB_SIZE, size=shape).astype(np.int32),
        "target_num_bytes": rng.integers(20, 90, size=batch_size).astype(np.int32),
    }


@pytest.fixture(scope="module")
def model_and_params():
    model = _small_config().instantiate(parent=None)
    return model, numpy_params(model, scale=4.0)


def _call(model, params, *, method="forward", prng_key=None, is_training=False, **inputs):
    return functional(model, prng_key, params, inputs, method=method, is_training=is_training)


@functools.cache
def _jit_loss_and_grad(model):
    def loss_fn(params, batch):
        (loss, _), collection = _call(model, params, is_training=True, input_batch=batch)
        return loss, collection.summaries

    return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))


# Against the reference run.


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return ReferenceRun.unpack(tmp_path_factory.mktemp("reference"))


def test_parameters_from_seed_0_equal_the_reference_bit_for_bit(reference):
    model = fuji_model_config().instantiate(parent=None)
    with jax.default_prng_impl("rbg"):
        new_key, init_key = jax.random.split(jax.random.PRNGKey(0))
        # The last bits are those of fused multiplications and additions, which LLVM makes; see tests/launcher.py.
        optimised = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
        params = jax.jit(model.initialize_parameters_recursively, compiler_options=optimised)(init_key)
    expected = reference.model_params(step=0, like=params)
    for (path, ours), (_, theirs) in zip(flatten_items(params), flatten_items(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=path)
    np.testing.assert_array_equal(new_key, reference.arrays(step=0, prefix="prng_key")[""])


def test_the_loss_of_the_first_step_equals_the_reference(reference):
    model = fuji_model_config().instantiate(parent=None)
    params = reference.model_params(step=0, like=model.create_parameter_specs_recursively())
    (loss, aux), _ = jax.jit(functools.partial(_call, model))(params, input_batch=reference.batches[0])
    assert loss == pytest.approx(reference.losses[0], rel=1e-6)
    assert str(aux) == reference.expected["losses"][0]["aux"]


# What it returns and adds.


def test_summaries_stand_at_the_top_and_the_loss_is_their_total(model_and_params):
    model, params = model_and_params
    (loss, summaries), _ = _jit_loss_and_grad(model)(params, _batch())
    assert summaries["loss"].mean == loss
    assert summaries["cross_entropy_loss"].value() == pytest.approx(float(loss))
    for name in ("perplexity", "accuracy", "z_loss", "nats_per_byte", "bits_per_byte", "train_live_targets"):
        assert np.isfinite(summaries[name].value()), name


def test_scores_logits_and_the_loss_tell_the_same(model_and_params):
    model, params = model_and_params
    batch = _batch(1)

    @jax.jit
    def everything(params, batch):
        (loss, aux), _ = _call(model, params, input_batch=batch, return_aux=True)
        scores, _ = _call(model, params, method="score", input_batch=batch)
        logits, _ = _call(model, params, method="extract_logits", input_batch=batch)
        return loss, aux, scores, logits

    loss, aux, scores, logits = everything(params, batch)
    log_probs = np.asarray(jax.nn.log_softmax(logits), dtype=np.float64)
    live = batch["target_labels"] >= 0
    expected = (
        -np.take_along_axis(log_probs, np.maximum(batch["target_labels"], 0)[..., None], -1)[..., 0] * live
    )
    np.testing.assert_allclose(scores["per_target_loss"], expected, rtol=1e-5)
    np.testing.assert_array_equal(scores["live_targets"], live)
    np.testing.assert_array_equal(aux["per_target_loss"], scores["per_target_loss"])
    np.testing.assert_array_equal(aux["logits"], logits)
    np.testing.assert_allclose(loss, expected.sum() / live.sum(), rtol=1e-6)


def test_segments_and_positions_of_the_batch_reach_the_attention(model_and_params):
    model, params = model_and_params
    batch = _batch(2)
    packed = {
        **batch,
        "input_segment_ids": np.repeat([[1] * 6 + [2] * 10], 4, axis=0).astype(np.int32),
        "input_positions": np.repeat([[*range(6), *range(10)]], 4, axis=0).astype(np.int32),
    }
    fn = jax.jit(lambda params, batch: _call(model, params, input_batch=batch)[0][0])
    # Hide the first document's targets, then change its inputs: the second document's loss stays as it is.
    packed["target_labels"] = np.where(np.arange(SEQ_LEN) < 6, -1, batch["target_labels"])
    changed = {**packed, "input_ids": np.where(np.arange(SEQ_LEN) < 6, 3, batch["input_ids"])}
    assert fn(params, packed) == fn(params, changed)
    unpacked = {k: v for k, v in packed.items() if k in batch}
    assert fn(params, packed) != fn(params, unpacked)


def test_a_second_batch_does_not_retrace(model_and_params):
    model, params = model_and_params
    fn = _jit_loss_and_grad(model)
    fn(params, _batch(3))
    before = fn._cache_size()
    fn(params, _batch(4))
    assert fn._cache_size() == before


def test_greedy_sampling_goes_through_the_model(model_and_params):
    model, params = model_and_params
    prefix = np.asarray([[3, 4, 5]], dtype=np.int32)
    sample = jax.jit(
        functools.partial(_call, model, method="sample_decode", max_len=6, logits_modifier=scale_by(0))
    )
    outputs, _ = sample(params, prng_key=jax.random.PRNGKey(0), input_batch={"prefix": prefix})
    assert outputs.sequences.shape == (1, 1, 6)
    extract_logits = jax.jit(functools.partial(_call, model, method="extract_logits"))
    logits, _ = extract_logits(params, input_batch={"input_ids": prefix})
    assert outputs.sequences[0, 0, 3] == logits[0, -1].argmax()


# The loss in chunks.


def test_the_loss_in_chunks_has_the_value_and_gradients_of_the_whole(model_and_params):
    model, params = model_and_params
    chunked = _small_config().set(scan_chunk=4).instantiate(parent=None)
    (loss, summaries), grads = _jit_loss_and_grad(model)(params, _batch(5))
    (chunked_loss, chunked_summaries), chunked_grads = _jit_loss_and_grad(chunked)(params, _batch(5))
    np.testing.assert_allclose(chunked_loss, loss, rtol=1e-6)
    for (path, ours), (_, whole) in zip(flatten_items(chunked_grads), flatten_items(grads), strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-4, atol=1e-6, err_msg=path)
    np.testing.assert_allclose(chunked_summaries["accuracy"].mean, summaries["accuracy"].mean, rtol=1e-6)


@pytest.mark.parametrize(("scan_chunk", "exists"), [(None, True), (4, False)])
def test_only_the_whole_makes_all_logits(scan_chunk, exists, model_and_params):
    _, params = model_and_params
    model = _small_config().set(scan_chunk=scan_chunk).instantiate(parent=None)
    jaxpr = str(jax.make_jaxpr(_jit_loss_and_grad(model).__wrapped__)(params, _batch()))
    assert (f"f32[4,{SEQ_LEN},{VOCAB_SIZE}]" in jaxpr) == exists


def test_a_chunk_that_does_not_divide_the_row_is_refused(model_and_params):
    model = _small_config().set(scan_chunk=5).instantiate(parent=None)
    with pytest.raises(ValueError, match=r"(?s)model\.scan_chunk: 5 does not divide the 16 positions"):
        jax.eval_shape(_jit_loss_and_grad(model), model_and_params[1], _batch())


# On a mesh.


def test_a_sharded_step_equals_an_unsharded_one(model_and_params):
    model, params = model_and_params
    batch = _batch(6, batch_size=4)
    (expected_loss, _), expected_grads = _jit_loss_and_grad(model)(params, batch)
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("data", "model"))
    specs = dict(flatten_items(model.create_parameter_specs_recursively()))
    placed = [
        jax.device_put(value, NamedSharding(mesh, specs[path].mesh_axes))
        for path, value in flatten_items(params)
    ]
    with use_mesh(mesh):
        (loss, _), grads = _jit_loss_and_grad(model)(
            jax.tree.unflatten(jax.tree.structure(params), placed), batch
        )
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for (path, ours), (_, expected) in zip(flatten_items(grads), flatten_items(expected_grads), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6, err_msg=path)


# Ids outside the vocabulary.


def test_legal_ids_pass_with_negative_labels(model_and_params):
    model, _ = model_and_params
    batch = _batch(7)
    batch["input_ids"][0, :2] = [0, VOCAB_SIZE - 1]
    model.check_host_batch(batch)
    model.check_host_batch({"input_ids": batch["input_ids"]})


@pytest.mark.parametrize(
    ("name", "value"), [("input_ids", VOCAB_SIZE), ("input_ids", -1), ("target_labels", VOCAB_SIZE + 7)]
)
def test_ids_outside_the_vocabulary_are_refused_with_their_place(name, value, model_and_params, golden):
    batch = _batch(8)
    batch[name][2, 5] = value
    with pytest.raises(ValueError) as error:
        model_and_params[0].check_host_batch(batch)
    golden(f"errors/causal_lm/{name}_{value}.txt", f"{error.value}\n")


# FLOPs.


@pytest.mark.parametrize("seq_len", [128, 512])
def test_flops_are_within_two_percent_of_what_xla_counts(seq_len):
    cfg = fuji_model_config(vocab_size=1024, dim=256, num_layers=2, num_heads=4, feed_forward_dim=1024)
    # Not scanned: XLA counts the body of a loop once. Lowered only: the count is taken before optimization.
    cfg.decoder.transformer = StackedTransformerLayer.default_config().set(
        num_layers=2, layer=cfg.decoder.transformer.layer
    )
    model = cfg.instantiate(parent=None)
    params = jax.eval_shape(model.initialize_parameters_recursively, jax.random.PRNGKey(0))
    ids = jax.ShapeDtypeStruct((2, seq_len), jnp.int32)
    lowered = _jit_loss_and_grad(model).lower(params, {"input_ids": ids, "target_labels": ids})
    counted = lowered.cost_analysis()["flops"] / (2 * seq_len)
    assert model.flops_per_token(seq_len).full == pytest.approx(counted, rel=0.02)


def test_flops_of_a_scanned_stack_equal_the_hand_count():
    model = fuji_model_config().instantiate(parent=None)
    # 4 layers of fused qkv 64 * 8 * 16, output 4 * 16 * 64 and three feed-forward maps of 64 * 176; a head of
    # 512 * 64.
    num_params = 4 * (64 * 8 * 16 + 4 * 16 * 64 + 3 * 64 * 176) + 512 * 64
    flops = model.flops_per_token(64)
    assert flops.full == 6 * num_params + 12 * 4 * 4 * 16 * 64
    assert flops.causal == 6 * num_params + 6 * 4 * 4 * 16 * 64


def test_an_embedding_counts_only_as_far_as_it_is_the_head():
    cfg = _small_config()
    cfg.decoder.lm_head = LmHead.default_config()
    untied, tied = cfg.instantiate(parent=None), _small_config().instantiate(parent=None)
    assert untied.flops_per_token(SEQ_LEN) == tied.flops_per_token(SEQ_LEN)


# Configs.


def test_the_default_initializer_is_a_normal_distribution_of_0_02():
    init = Model.default_config().param_init.instantiate()
    weight = init.initialize("weight", prng_key=jax.random.PRNGKey(0), shape=(64, 64), dtype=jnp.float32)
    assert np.std(weight) == pytest.approx(0.02, rel=0.05)
    assert np.mean(weight) == pytest.approx(0, abs=0.002)


def test_the_metrics_print_as_the_reference_prints_them():
    lines = _small_config().debug_string().split("\n")
    assert [line for line in lines if line.startswith("metrics.")] == [
        "metrics.klass: 'axlearn.common.causal_lm.CompositeLossMetrics'",
        "metrics.metrics['lm'].klass: 'axlearn.common.causal_lm.CrossEntropyLossMetrics'",
        "metrics.metrics['aux'].klass: 'axlearn.common.causal_lm.AuxLossMetrics'",
    ]


def test_a_gpt_decoder_learns_positions_and_is_causal():
    decoder_cfg = gpt_decoder_config(
        stack_cfg=RepeatedTransformerLayer.default_config(),
        num_layers=2,
        hidden_dim=16,
        num_heads=2,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=SEQ_LEN,
    )
    model = Model.default_config().set(name="model", decoder=decoder_cfg).instantiate(parent=None)
    params = numpy_params(model)
    assert params["decoder"]["emb"]["pos_emb"]["weight"].shape == (SEQ_LEN, 16)

    @jax.jit
    def logits(params, ids):
        return _call(model, params, method="extract_logits", input_batch={"input_ids": ids})[0]

    ids = _batch(9)["input_ids"]
    changed = np.where(np.arange(SEQ_LEN) < 9, ids, 0).astype(np.int32)
    np.testing.assert_array_equal(logits(params, ids)[:, :9], logits(params, changed)[:, :9])


def test_weights_into_the_residual_stream_start_smaller_the_more_layers_there_are():
    init = residual_initializer_cfg(8).instantiate()
    weight = init.initialize("weight", prng_key=jax.random.PRNGKey(0), shape=(64, 64), dtype=jnp.float32)
    assert np.std(weight) == pytest.approx(0.02 / 4, rel=0.05)


def test_an_input_with_more_ids_than_the_vocabulary_is_refused_before_it_is_read():
    model = fuji_model_config().instantiate(parent=None)
    model.check_vocab_size(512, where="trainer.input")
    with pytest.raises(
        ValueError, match=r"trainer\.input: its tokenizer has 513 ids, model\.decoder\.vocab_size is 512"
    ):
        model.check_vocab_size(513, where="trainer.input")
