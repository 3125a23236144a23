"""What becomes of a config.json: stacks, caches, rematerialisation."""

import jax.numpy as jnp

from axlearn.common.attention import RepeatedTransformerLayer, StackedTransformerLayer
from axlearn.common.kv_cache.kv_cache import KVCache
from axlearn.common.kv_cache.sliding_window_kv_cache import SlidingWindowKVCache
from axlearn.experiments.text.gpt import hf
from tests.parity.hf_models import NAMES, read_config


def test_layers_that_are_alike_are_repeated_and_others_stacked():
    stacks = {name: hf.model_config(read_config(name)).decoder.transformer for name in NAMES}
    assert {name for name, stack in stacks.items() if stack.klass is StackedTransformerLayer} == {
        "qwen2-sliding"
    }
    assert stacks["mistral"].klass is RepeatedTransformerLayer
    # Only in a loop can the compiler not undo the recomputation.
    assert stacks["mistral"].layer.remat_spec.prevent_cse is False
    assert [layer.remat_spec.prevent_cse for layer in stacks["qwen2-sliding"].layer] == [True] * 3
    assert hf.model_config(read_config("mistral"), remat=False).decoder.transformer.layer.remat_spec is None


def test_a_window_is_what_the_cache_keeps():
    def cache(name, layer_fn, **kwargs):
        layer = layer_fn(hf.model_config(read_config(name), **kwargs).decoder.transformer.layer)
        return layer.self_attention.attention.kv_cache

    sliding = cache("mistral", lambda layer: layer, kv_cache_dtype=jnp.bfloat16)
    # sliding_window=5 counts the query, whose key is new.
    assert (sliding.klass, sliding.cached_kv_length) == (SlidingWindowKVCache, 4)
    assert sliding.cache_dtype is jnp.bfloat16
    full = cache("qwen2-sliding", lambda layers: layers[0])
    assert (full.klass, full.cache_dtype) == (KVCache, None)
    assert cache("qwen2-sliding", lambda layers: layers[2]).cached_kv_length == 6


def test_a_window_of_one_position_needs_no_past():
    cfg = hf.model_config(read_config("mistral") | {"sliding_window": 1})
    attention = cfg.decoder.transformer.layer.self_attention.attention
    assert (attention.mask.sliding_window_size, attention.kv_cache.klass) == (0, KVCache)
    cfg.clone(name="model").instantiate(parent=None)
