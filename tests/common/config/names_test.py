"""How things are called."""

import importlib
import inspect
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest

import axlearn.common.config
from axlearn.common.config import (
    Configurable,
    config_class,
    nearest_names,
    public_name,
    public_qualname,
    similar_names,
)

ROOT = pathlib.Path(__file__).resolve().parents[3]


def _named(module, name):
    return type(name, (), {"__module__": module})


@pytest.mark.parametrize(
    ("module", "name", "expected"),
    [
        ("axlearn.common.attention._qkv", "QKVLinear", "axlearn.common.attention.QKVLinear"),
        (
            "axlearn.common.attention._repeat",
            "_TransformerRepeat",
            "axlearn.common.attention._TransformerRepeat",
        ),
        ("axlearn.common.a._b.c._d", "X", "axlearn.common.a.X"),
        ("axlearn.experiments.text.gpt.common", "scale_fn", "axlearn.experiments.text.gpt.common.scale_fn"),
        ("jax._src.ad_checkpoint", "dots_saveable", "jax._src.ad_checkpoint.dots_saveable"),
        ("axlearned._private", "X", "axlearned._private.X"),
        ("__main__", "main", "__main__.main"),
    ],
)
def test_private_files_of_our_own_tree_are_no_addresses(module, name, expected):
    assert public_name(_named(module, name)) == expected


def test_a_public_name_is_the_name_alone_and_a_qualified_one_has_what_encloses_it():
    class Layer(Configurable):
        @config_class
        class Config(Configurable.Config):
            pass

    assert public_name(Configurable.Config.instantiate) == "axlearn.common.config.instantiate"
    assert public_qualname(Configurable.Config) == "axlearn.common.config.Configurable.Config"
    assert public_qualname(Layer.Config).endswith(".Layer.Config")
    assert public_name(jnp.float32) == "jax.numpy.float32"


def test_every_exported_name_resolves_back():
    exported = [
        obj
        for name, obj in vars(axlearn.common.config).items()
        if not name.startswith("_") and (inspect.isclass(obj) or inspect.isfunction(obj))
    ]
    assert len(exported) > 30
    for obj in exported:
        module, _, name = public_qualname(obj).rpartition(".")
        assert module == "axlearn.common.config"
        assert getattr(importlib.import_module(module), name) is obj


def test_similar_names_share_more_than_half_of_their_substrings():
    assert similar_names("num_layer", ["num_layers", "num_heads", "layer"]) == ["num_layers"]
    assert similar_names("abcd", ["xbcd", "abcx", "abcd_", "abcd"]) == ["abcd", "abcd_"]
    assert similar_names("ab", ["ab", "abc"]) == []


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("num_head", "num_heads"),
        ("hiden_dim", "hidden_dim"),
        ("dropout_rat", "dropout_rate"),
        ("vobab_size", "vocab_size"),
        ("heads", "num_heads"),
    ],
)
def test_the_nearest_name_is_what_was_meant(typed, meant):
    names = ["num_heads", "num_layers", "hidden_dim", "dim", "dropout_rate", "vocab_size", "pad_token_id"]
    assert nearest_names(typed, names)[0] == meant
    assert nearest_names("zzz", names) == []


def test_importing_configs_loads_neither_jax_nor_numpy():
    code = "import sys, axlearn.common.config; print({'jax', 'numpy', 'attr', 'absl'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
