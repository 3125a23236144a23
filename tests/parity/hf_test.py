"""Models of the Hugging Face families compute what transformers computes, in both directions.

`scripts/make_hf_reference.py` made the references and says with which versions.
"""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from axlearn.common.hf import facts_from_hf, facts_from_model, hf_config_from_model, tensor_rules
from axlearn.common.module import functional
from axlearn.common.utils import use_mesh
from axlearn.experiments.text.gpt import common, hf
from tests.parity.hf_models import (
    FIXTURES,
    MAX_LEN,
    NAMES,
    OUR_MODELS,
    digest,
    export,
    instantiate,
    logits_of,
    read_config,
    read_tensors,
    to_params,
    to_tensors,
)

# Issue 3 asks for it in float32. Measured on a CPU: 6e-6 to 2e-5, at logits of up to 11.
ATOL = 1e-4


def _reference(folder: str, name: str) -> dict[str, np.ndarray]:
    path = FIXTURES / folder / (f"{name}/reference.npz" if folder == "hf" else f"{name}.npz")
    with np.load(path) as arrays:
        return dict(arrays)


@functools.cache
def _imported(name: str):
    """The model of a fixture with its parameters, and the rules that made them."""
    config = read_config(name)
    cfg = hf.model_config(config, remat=False)
    model, rules = instantiate(cfg), tensor_rules(cfg, config)
    return model, to_params(model, rules, read_tensors(name)), rules


@pytest.mark.parametrize("name", NAMES)
def test_an_imported_model_has_the_logits_of_transformers(name):
    model, params, _ = _imported(name)
    reference = _reference("hf", name)
    # Logits of this size make the tolerance mean something.
    assert 1 < reference["logits"].std() < 5
    np.testing.assert_allclose(
        logits_of(model, params, reference["input_ids"]), reference["logits"], rtol=0, atol=ATOL
    )


@pytest.mark.parametrize("name", NAMES)
def test_an_imported_model_is_exported_as_it_came(name):
    model, params, rules = _imported(name)
    exported, tensors = to_tensors(params, rules), read_tensors(name)
    assert exported.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert exported[key].dtype == tensor.dtype
        np.testing.assert_array_equal(exported[key], tensor)
    config = read_config(name)
    written = hf_config_from_model(model.config, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
    assert facts_from_hf(written) == facts_from_hf(config)
    assert [written[key] for key in ("model_type", "architectures")] == [
        config[key] for key in ("model_type", "architectures")
    ]


@pytest.mark.parametrize("name", OUR_MODELS)
def test_transformers_computes_the_logits_of_a_model_that_we_export(name):
    """The references are what transformers computed from exactly these tensors and such a config.json."""
    model, params, config, tensors = export(name)
    reference = _reference("hf_export", name)
    assert digest(tensors) == str(reference["sha256"])
    np.testing.assert_allclose(
        logits_of(model, params, reference["input_ids"]), reference["logits"], rtol=0, atol=ATOL
    )
    assert facts_from_model(model.config) == facts_from_hf(config)


@pytest.mark.parametrize("name", ["mistral", "qwen2-sliding", "qwen3"])
def test_prefill_and_single_steps_equal_the_whole_sequence(name):
    """With windows of 5 and 7 positions, the caches of which are as short."""
    model, params, _ = _imported(name)
    reference = _reference("hf", name)
    ids, prompt_len = reference["input_ids"], 16

    @jax.jit
    def extend(params, cache, step_ids):
        inputs = {"cached_states": cache, "input_ids": step_ids}
        (cache, outputs), _ = functional(
            model.decoder, None, params, inputs, method="extend_step", is_training=False
        )
        return cache, outputs["logits"]

    cache, _ = functional(
        model.decoder,
        None,
        params["decoder"],
        {"batch_size": ids.shape[0], "max_len": MAX_LEN},
        method="init_states",
        is_training=False,
    )
    cache, logits = extend(params["decoder"], cache, ids[:, :prompt_len])
    found = [np.asarray(logits)]
    for i in range(prompt_len, ids.shape[1]):
        cache, logits = extend(params["decoder"], cache, ids[:, i : i + 1])
        found.append(np.asarray(logits))
    np.testing.assert_allclose(np.concatenate(found, axis=1), reference["logits"], rtol=0, atol=ATOL)


def test_an_imported_model_computes_the_same_on_a_mesh():
    """Biases, heads that are not the model's width and a head of its own, split over data, fsdp and tensor."""
    model, params, _ = _imported("llama-bias")
    reference = _reference("hf", "llama-bias")
    mesh_shape = common.mesh_shape_from_axes(data=2, fsdp=2, model=2)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(mesh_shape), common.MESH_AXIS_NAMES)
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec.mesh_axes), model.create_parameter_specs_recursively()
    )
    with use_mesh(mesh):
        placed = jax.tree.map(jax.device_put, params, shardings)
        # Not that of the other tests, which was traced without a mesh.
        other = instantiate(model.config)
        logits = logits_of(other, placed, np.tile(reference["input_ids"], (2, 1)))
    np.testing.assert_allclose(logits, np.tile(reference["logits"], (2, 1, 1)), rtol=0, atol=ATOL)
    weight = placed["decoder"]["lm_head"]["weight"]
    assert weight.sharding.shard_shape(weight.shape) == (96, 16)


def test_windows_and_repetition_of_an_exported_model_come_back():
    """A model that repeats a pair of layers is imported as four layers that differ."""
    _, _, config, tensors = export("alternating-windows-as-qwen3")
    assert config["layer_types"] == ["sliding_attention", "full_attention"] * 2
    cfg = hf.model_config(config, remat=False)
    model = instantiate(cfg)
    params = to_params(model, tensor_rules(cfg, config), tensors)
    reference = _reference("hf_export", "alternating-windows-as-qwen3")
    np.testing.assert_allclose(
        logits_of(model, params, reference["input_ids"]), reference["logits"], rtol=0, atol=ATOL
    )
