"""Decoders of the Hugging Face hub and ours: which configs and which tensors stand for the same model.

The four families Llama (1, 2, 3), Qwen2, Qwen3 (dense) and Mistral are one decoder with a few switches. What they
differ in is a `DecoderFacts`; it can be read from a `config.json` and from the config of one of our models, and
both can be made from it. `tensor_rules` then says tensor by tensor how the parameters translate, and
`import_weights` and `export_weights` stream them. Everything here is numpy and configs: nothing runs on a device.

From Hugging Face:

    hf_config = json.loads(text of config.json)
    model_cfg = axlearn.experiments.text.gpt.hf.model_config(hf_config)
    rules = tensor_rules(model_cfg, hf_config)
    ignored = check_tensor_names(rules, {name: shape of every tensor in the files})
    for rule in rules:
        ours = rule.to_ours({name: read(name) for name in rule.hf_shapes})
        # `ours` is all of the parameter rule.path, or entry rule.layer of its leading dim.

To Hugging Face:

    hf_config = hf_config_from_model(model_cfg, max_position_embeddings=..., ...)
    for rule in tensor_rules(model_cfg, hf_config):
        for name, array in rule.to_hf(part of the parameter).items(): write(name, array)
"""

from axlearn.common.hf._config_reader import facts_from_hf as facts_from_hf
from axlearn.common.hf._config_reader import family_from_hf as family_from_hf
from axlearn.common.hf._config_writer import hf_config_from_facts as hf_config_from_facts
from axlearn.common.hf._config_writer import hf_config_from_model as hf_config_from_model
from axlearn.common.hf._facts import DecoderFacts as DecoderFacts
from axlearn.common.hf._facts import LinearRope as LinearRope
from axlearn.common.hf._facts import Llama3Rope as Llama3Rope
from axlearn.common.hf._facts import RopeFacts as RopeFacts
from axlearn.common.hf._facts import YarnRope as YarnRope
from axlearn.common.hf._families import Family as Family
from axlearn.common.hf._families import family_for as family_for
from axlearn.common.hf._model_reader import facts_from_model as facts_from_model
from axlearn.common.hf._names import check_tensor_names as check_tensor_names
from axlearn.common.hf._rope import rope_layer_config as rope_layer_config

# Files: the weights, one tensor at a time, and tokenizers.
from axlearn.common.hf._safetensors import SafetensorsReader as SafetensorsReader
from axlearn.common.hf._safetensors import SafetensorsWriter as SafetensorsWriter
from axlearn.common.hf._safetensors import TensorInfo as TensorInfo
from axlearn.common.hf._tensor_rule import TensorRule as TensorRule
from axlearn.common.hf._tensors import parameter_shapes as parameter_shapes
from axlearn.common.hf._tensors import tensor_rules as tensor_rules
from axlearn.common.hf._text_fields import TextFields as TextFields
from axlearn.common.hf._text_fields import text_fields_from_hf as text_fields_from_hf
from axlearn.common.hf._tokenizer_files import tokenizer_files as tokenizer_files
from axlearn.common.hf._weights import WEIGHT_DTYPES as WEIGHT_DTYPES
from axlearn.common.hf._weights import ArraySink as ArraySink
from axlearn.common.hf._weights import ArraySource as ArraySource
from axlearn.common.hf._weights import Copied as Copied
from axlearn.common.hf._weights import check_weights as check_weights
from axlearn.common.hf._weights import export_weights as export_weights
from axlearn.common.hf._weights import import_weights as import_weights
