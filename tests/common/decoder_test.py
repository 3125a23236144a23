"""The decoder: incremental equals whole, what it passes down, its head, and sampling from it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from axlearn.common.attention import (
    ALiBiAttentionLogitBiasLayer,
    CausalAttentionLogitBiasLayer,
    FullAttentionLogitBiasLayer,
    enable_sliding_window_attention,
)
from axlearn.common.attention_bias import CausalAttentionBias, SlidingWindowAttentionBias
from axlearn.common.config import config_for_function
from axlearn.common.decoder import Decoder, LmHead
from axlearn.common.decoding import StopOnSubsequence
from axlearn.common.layers import Dropout, Embedding
from axlearn.common.logit_modifiers import scale_by, soft_cap_logits
from axlearn.common.module import functional
from axlearn.common.utils import flatten_items, use_mesh
from tests.fixtures_reference import fuji_model_config, numpy_params

VOCAB_SIZE, DIM, MAX_LEN = 32, 16, 12


def _decoder_config() -> Decoder.Config:
    model = fuji_model_config(
        vocab_size=VOCAB_SIZE, dim=DIM, num_layers=2, num_heads=4, num_kv_heads=2, feed_forward_dim=24
    )
    return model.decoder.set(name="decoder", dtype=jnp.float32, param_init=model.param_init)


@pytest.fixture(scope="module")
def decoder_and_params():
    decoder = _decoder_config().instantiate(parent=None)
    # Strong enough layers that the likeliest next id depends on all ids before, and is not the last again.
    return decoder, numpy_params(decoder, seed=7, scale=16.0)


def _call(decoder, params, *, method, prng_key=None, is_training=False, **inputs):
    return functional(decoder, prng_key, params, inputs, method=method, is_training=is_training)[0]


@functools.cache
def _jit_logits(decoder):
    @jax.jit
    def logits(params, batch):
        hidden_states = _call(decoder, params, method="forward", input_batch=batch)["hidden_states"]
        return _call(decoder, params, method="compute_logits", hidden_states=hidden_states)

    return logits


@functools.cache
def _jit_extend(decoder):
    return jax.jit(functools.partial(_call, decoder, method="extend_step"))


def _ids(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, VOCAB_SIZE, size=shape).astype(np.int32)


def _assert_ragged_steps_equal_the_whole(decoder, params, seed: int):
    rng = np.random.default_rng(seed)
    ids = _ids(seed, 3, MAX_LEN)
    whole = np.asarray(_jit_logits(decoder)(params, {"input_ids": ids}))
    cache = _call(decoder, params, method="init_states", batch_size=3, max_len=MAX_LEN)
    done = np.zeros(3, dtype=np.int32)
    # Steps of 4 tokens, so that one compiled program serves all examples; rows take from 0 to 4 of them.
    while done.min() < MAX_LEN:
        lens = np.minimum(rng.integers(0, 5, size=3), MAX_LEN - done).astype(np.int32)
        chunk = np.zeros((3, 4), dtype=np.int32)
        for row, (start, n) in enumerate(zip(done, lens, strict=True)):
            chunk[row, :n] = ids[row, start : start + n]
        cache, outputs = _jit_extend(decoder)(
            params, cached_states=cache, input_ids=chunk, live_step_len=lens
        )
        for row, (start, n) in enumerate(zip(done, lens, strict=True)):
            np.testing.assert_allclose(
                outputs["logits"][row, :n], whole[row, start : start + n], rtol=1e-4, atol=1e-4
            )
        done += lens
        assert cache["time_step"].tolist() == done.tolist()


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 100))
def test_ragged_steps_from_the_cache_equal_the_whole_sequence(decoder_and_params, seed):
    _assert_ragged_steps_equal_the_whole(*decoder_and_params, seed)


def test_no_position_depends_on_a_later_one(decoder_and_params):
    decoder, params = decoder_and_params
    ids = _ids(0, 2, MAX_LEN)
    changed = ids.copy()
    changed[:, 7:] = (changed[:, 7:] + 5) % VOCAB_SIZE
    before, after = (np.asarray(_jit_logits(decoder)(params, {"input_ids": x})) for x in (ids, changed))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.abs(before[:, 7:] - after[:, 7:]).max(axis=(0, 2)).min() > 0.1


def test_packed_documents_equal_the_documents_alone(decoder_and_params):
    decoder, params = decoder_and_params
    ids = _ids(1, 1, MAX_LEN)
    packed = {
        "input_ids": ids,
        "input_segment_ids": np.asarray([[1] * 5 + [2] * 7], dtype=np.int32),
        "input_positions": np.asarray([[*range(5), *range(7)]], dtype=np.int32),
    }
    logits = np.asarray(_jit_logits(decoder)(params, packed))
    second = np.pad(ids[:, 5:], ((0, 0), (0, 5)))
    alone = np.asarray(_jit_logits(decoder)(params, {"input_ids": second}))
    np.testing.assert_allclose(logits[:, 5:], alone[:, :7], rtol=1e-5, atol=1e-5)


def _uncached_greedy(decoder, params, prompt: list[int], *, eos: int | None = 1) -> list[int]:
    ids = list(prompt)
    while len(ids) < MAX_LEN and (len(ids) == len(prompt) or ids[-1] != eos):
        padded = np.pad(ids, (0, MAX_LEN - len(ids)))[None].astype(np.int32)
        ids.append(int(_jit_logits(decoder)(params, {"input_ids": padded})[0, len(ids) - 1].argmax()))
    return ids


def test_greedy_samples_of_ragged_prompts_equal_the_argmax_without_a_cache(decoder_and_params):
    decoder, params = decoder_and_params
    prompts = [[5, 6, 7, 8], [9], [3, 30]]
    expected = [_uncached_greedy(decoder, params, prompt) for prompt in prompts]
    assert min(len(set(ids)) for ids in expected) > 4, "these continuations could not tell a wrong cache"
    prefix = np.asarray([p + [0] * (4 - len(p)) for p in prompts], dtype=np.int32)
    sample = jax.jit(
        functools.partial(
            _call,
            decoder,
            method="sample_decode",
            max_len=MAX_LEN,
            logits_modifier=config_for_function(scale_by).set(temperature=0.0),
        )
    )
    outputs = sample(params, prng_key=jax.random.PRNGKey(0), input_batch={"prefix": prefix})
    sampled = zip(outputs.sequences[:, 0], outputs.lengths[:, 0], strict=True)
    assert [ids[:length].tolist() for ids, length in sampled] == expected


def test_sampling_stops_at_the_end_id_or_where_it_is_told_to(decoder_and_params):
    decoder, params = decoder_and_params
    prompt = [4, 9]
    greedy = _uncached_greedy(decoder, params, prompt, eos=None)
    assert greedy[3] not in greedy[:3]
    sample = functools.partial(
        _call,
        method="sample_decode",
        prng_key=jax.random.PRNGKey(0),
        input_batch={"prefix": np.asarray([prompt], dtype=np.int32)},
        max_len=MAX_LEN,
        logits_modifier=scale_by(0),
    )
    told = jax.jit(lambda p: sample(decoder, p, stop_decoding_condition=StopOnSubsequence([greedy[3:5]])))(
        params
    )
    assert told.sequences[0, 0, : told.lengths[0, 0]].tolist() == greedy[:5]
    with_end_id = _decoder_config().set(eos_token_id=greedy[3]).instantiate(parent=None)
    outputs = jax.jit(lambda p: sample(with_end_id, p))(params)
    assert outputs.sequences[0, 0, : outputs.lengths[0, 0]].tolist() == greedy[:4]


def test_a_head_of_its_own_replaces_the_tied_one():
    cfg = _decoder_config().set(lm_head=LmHead.default_config())
    decoder = cfg.instantiate(parent=None)
    assert decoder.create_parameter_specs_recursively()["lm_head"]["weight"].shape == (VOCAB_SIZE, DIM)
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(VOCAB_SIZE, DIM)).astype(np.float32)
    hidden_states = rng.normal(size=(2, 3, DIM)).astype(np.float32)
    params = {"lm_head": {"weight": jnp.asarray(weight)}}
    logits = _call(decoder, params, method="compute_logits", hidden_states=hidden_states)
    expected = hidden_states @ weight.T
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    lines = cfg.debug_string().split("\n")
    assert "lm_head.klass: 'axlearn.common.decoder.LmHead'" in lines
    assert "lm_head.param_partition_spec[0]: None" in lines
    assert "lm_head.param_partition_spec[1]: 'model'" in lines


def test_the_head_computes_in_the_type_it_is_told_and_ends_with_the_modifier(decoder_and_params):
    plain, params = decoder_and_params
    cfg = _decoder_config().set(
        logits_forward_dtype=jnp.float32,
        output_logits_modifier=config_for_function(scale_by).set(temperature=0.5),
    )
    decoder = cfg.instantiate(parent=None)
    hidden_states = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, DIM)), dtype=jnp.bfloat16)
    logits = _call(decoder, params, method="compute_logits", hidden_states=hidden_states)
    assert logits.dtype == jnp.float32
    exact = _call(plain, params, method="compute_logits", hidden_states=hidden_states.astype(jnp.float32))
    np.testing.assert_allclose(logits, 2 * exact, rtol=1e-6)


def test_the_mask_reaches_exactly_the_attentions_without_one():
    window = SlidingWindowAttentionBias.default_config(sliding_window_size=2)

    def masks(**settings):
        cfg = _decoder_config().set(attention_mask=window)
        cfg.transformer.layer.self_attention.attention.set(causal=None, mask=None).set(**settings)
        attention = cfg.instantiate(parent=None).transformer.config.layer.self_attention.attention
        return attention.causal, attention.mask

    assert masks() == (None, window)
    assert masks(causal=True) == (True, None)
    own = CausalAttentionBias.default_config()
    assert masks(mask=own) == (None, own)


def test_the_default_mask_makes_a_stack_without_masks_causal(decoder_and_params):
    decoder, params = decoder_and_params
    cfg = _decoder_config()
    cfg.attention_mask = Decoder.default_config().attention_mask
    cfg.transformer.layer.self_attention.attention.causal = None
    masked = cfg.instantiate(parent=None)
    batch = {"input_ids": _ids(3, 2, MAX_LEN)}
    np.testing.assert_array_equal(_jit_logits(masked)(params, batch), _jit_logits(decoder)(params, batch))


def _alibi_config() -> Decoder.Config:
    cfg = _decoder_config().set(attention_mask=ALiBiAttentionLogitBiasLayer.default_config().set(num_heads=4))
    # Where a layer is causal itself, the mask of ALiBi's layer is not needed, and its bias still is.
    cfg.transformer.layer.self_attention.attention.causal = None
    return cfg


def test_alibi_reaches_whole_sequences_steps_and_packed_documents(decoder_and_params):
    plain, params = decoder_and_params
    decoder = _alibi_config().instantiate(parent=None)
    _assert_ragged_steps_equal_the_whole(decoder, params, seed=3)
    ids = _ids(1, 1, MAX_LEN)
    logits = np.asarray(_jit_logits(decoder)(params, {"input_ids": ids}))
    assert np.abs(logits - _jit_logits(plain)(params, {"input_ids": ids})).max() > 0.1
    packed = {
        "input_ids": ids,
        "input_segment_ids": np.asarray([[1] * 5 + [2] * 7], dtype=np.int32),
        "input_positions": np.asarray([[*range(5), *range(7)]], dtype=np.int32),
    }
    second = np.pad(ids[:, 5:], ((0, 0), (0, 5)))
    alone = np.asarray(_jit_logits(decoder)(params, {"input_ids": second}))
    np.testing.assert_allclose(
        np.asarray(_jit_logits(decoder)(params, packed))[:, 5:], alone[:, :7], rtol=1e-5, atol=1e-5
    )


def test_a_window_with_alibi_decodes_from_a_ring(decoder_and_params):
    cfg = _alibi_config()
    enable_sliding_window_attention(cfg.transformer, 3)
    decoder, params = cfg.instantiate(parent=None), decoder_and_params[1]
    _assert_ragged_steps_equal_the_whole(decoder, params, seed=4)
    # The prompt of 5 is longer than the ring.
    prompt = [5, 6, 7, 8, 9]
    sample = jax.jit(
        functools.partial(
            _call, decoder, method="sample_decode", max_len=MAX_LEN, logits_modifier=scale_by(0)
        )
    )
    outputs = sample(params, prng_key=jax.random.PRNGKey(0), input_batch={"prefix": np.asarray([prompt])})
    expected = _uncached_greedy(decoder, params, prompt)
    assert outputs.sequences[0, 0, : outputs.lengths[0, 0]].tolist() == expected


def test_logit_bias_layers_leave_alone_what_attention_layers_say_themselves():
    def attention(layer_cfg, **settings):
        cfg = _decoder_config().set(attention_mask=layer_cfg)
        cfg.transformer.layer.self_attention.attention.set(causal=None).set(**settings)
        return cfg.instantiate(parent=None).transformer.config.layer.self_attention.attention

    causal = CausalAttentionBias.default_config()
    window = SlidingWindowAttentionBias.default_config(sliding_window_size=2)
    alibi = ALiBiAttentionLogitBiasLayer.default_config().set(num_heads=4)
    found = attention(alibi)
    assert (found.mask, found.logit_bias.num_heads) == (causal, 4)
    found = attention(alibi, causal=True)
    assert (found.causal, found.mask, found.logit_bias.num_heads) == (True, None, 4)
    assert attention(alibi, mask=window).mask == window
    found = attention(FullAttentionLogitBiasLayer.default_config())
    assert (found.causal, found.mask, found.logit_bias) == (None, None, None)
    with pytest.raises(ValueError, match=r"(?s)attention: logit_bias.num_heads=3.*num_heads=4"):
        attention(ALiBiAttentionLogitBiasLayer.default_config().set(num_heads=3))


def test_logit_bias_layers_print_as_in_the_reference_dumps(shared_dir):
    cfg = Decoder.default_config()
    assert isinstance(cfg.attention_mask, CausalAttentionLogitBiasLayer.Config)
    cfg.attention_mask = ALiBiAttentionLogitBiasLayer.default_config().set(num_heads=32)
    ours = [line for line in cfg.debug_string().split("\n") if line.startswith("attention_mask")]
    assert ours == [
        "attention_mask.klass: 'axlearn.common.attention.ALiBiAttentionLogitBiasLayer'",
        "attention_mask.num_heads: 32",
    ]
    if shared_dir is not None:
        folder = shared_dir / "golden" / "axlearn.experiments.text.gpt.pajama_trainer"
        dump = (folder / "gala-7B-hybridnorm-alibi-flash-sp-rp.txt").read_text().splitlines()
        assert {f"model.decoder.{line}" for line in ours} < set(dump)


def test_the_final_cap_is_part_of_the_model_in_training_and_decoding(decoder_and_params):
    plain, params = decoder_and_params
    cfg = _decoder_config().set(output_logits_modifier=config_for_function(soft_cap_logits).set(cap=0.5))
    capped = cfg.instantiate(parent=None)
    batch = {"input_ids": _ids(3, 2, MAX_LEN)}
    logits = np.asarray(_jit_logits(plain)(params, batch))
    assert np.abs(logits).max() > 1
    np.testing.assert_allclose(
        _jit_logits(capped)(params, batch), 0.5 * np.tanh(logits / 0.5), rtol=1e-5, atol=1e-6
    )
    _assert_ragged_steps_equal_the_whole(capped, params, seed=0)


def test_a_mask_of_none_is_printed_because_it_is_not_the_default():
    lines = _decoder_config().debug_string().split("\n")
    assert "attention_mask: None" in lines
    assert "decoding.klass: 'axlearn.common.decoder.DecodingLayer'" in lines


def test_the_dropout_rate_reaches_every_dropout_without_a_rate():
    cfg = _decoder_config().set(dropout_rate=0.25)
    cfg.emb.dropout.rate = 0.5
    decoder = cfg.instantiate(parent=None)
    rates = {decoder.emb.dropout.config.rate, decoder.output_dropout.config.rate}
    layer = decoder.transformer.config.layer
    assert rates == {0.5, 0.25}
    assert {layer.feed_forward.dropout.rate, layer.self_attention.dropout.rate} == {0.25}
    assert isinstance(decoder.output_dropout, Dropout)


def test_learned_positions_follow_the_time_step(decoder_and_params):
    cfg = _decoder_config()
    cfg.emb.pos_emb = Embedding.default_config().set(num_embeddings=MAX_LEN)
    decoder, params = cfg.instantiate(parent=None), dict(decoder_and_params[1])
    table = np.random.default_rng(0).normal(size=(MAX_LEN, DIM)).astype(np.float32)
    params["emb"] = {**params["emb"], "pos_emb": {"weight": table}}
    ids = _ids(4, 2, 8)
    whole = np.asarray(_jit_logits(decoder)(params, {"input_ids": ids}))
    cache = _call(decoder, params, method="init_states", batch_size=2, max_len=8)
    for start in (0, 4):
        cache, outputs = _jit_extend(decoder)(
            params, cached_states=cache, input_ids=ids[:, start : start + 4], live_step_len=None
        )
        np.testing.assert_allclose(outputs["logits"], whole[:, start : start + 4], rtol=1e-4, atol=1e-4)


def test_a_sharded_decoder_gives_the_logits_of_an_unsharded_one(decoder_and_params):
    decoder, params = decoder_and_params
    batch = {"input_ids": _ids(5, 4, 8)}
    expected = _jit_logits(decoder)(params, batch)
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("data", "model"))
    specs = dict(flatten_items(decoder.create_parameter_specs_recursively()))
    placed = [
        jax.device_put(value, NamedSharding(mesh, specs[path].mesh_axes))
        for path, value in flatten_items(params)
    ]
    with use_mesh(mesh):
        logits = _jit_logits(decoder)(jax.tree.unflatten(jax.tree.structure(params), placed), batch)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert logits.sharding.spec[0] == "data"
    assert logits.sharding.spec[2] == "model"


@pytest.mark.parametrize("own_head", [False, True])
def test_a_head_split_for_storage_gives_the_logits_of_an_unsharded_one(own_head, decoder_and_params):
    # On this mesh XLA's partitioner permutes the batch of a product whose weight it has to gather by itself.
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "model"))
    batch_axes, weight_spec = ("data", "fsdp"), ("fsdp", "model")
    cfg = _decoder_config().set(
        hidden_state_partition_spec=(batch_axes, None, "model"),
        logits_partition_spec=(batch_axes, None, "model"),
    )
    if own_head:
        cfg.lm_head = LmHead.default_config().set(param_partition_spec=weight_spec)
    else:
        cfg.emb.token_emb.param_partition_spec = weight_spec
    decoder = cfg.instantiate(parent=None)
    weight = decoder_and_params[1]["emb"]["token_emb"]["weight"]
    hidden_states = np.random.default_rng(0).normal(size=(4, 8, DIM)).astype(np.float32)

    @jax.jit
    def logits(weight, hidden_states):
        params = {"lm_head": {"weight": weight}, "emb": {"token_emb": {"weight": weight}}}
        return _call(decoder, params, method="compute_logits", hidden_states=hidden_states)

    with use_mesh(mesh):
        sharded = logits(
            jax.device_put(weight, NamedSharding(mesh, PartitionSpec(*weight_spec))),
            jax.device_put(hidden_states, NamedSharding(mesh, PartitionSpec(batch_axes, None, "model"))),
        )
    np.testing.assert_allclose(sharded, hidden_states @ np.asarray(weight).T, rtol=1e-5, atol=1e-5)
