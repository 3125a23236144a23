"""Block sizes for TPU v6e, as a mesh rule sets them."""

import logging

import pytest

from axlearn.common.trainer import select_mesh_config
from axlearn.experiments.text.gpt import fuji
from axlearn.experiments.trainer_config_utils import V6eFlashConfigModifier


def _trainer_config(*, flash: bool):
    return fuji.trainer_config(fuji.Variant(size="7B", version="v2", flash=flash))


def _attention(cfg):
    return cfg.model.decoder.transformer.layer.self_attention.attention


def test_it_prints_as_the_reference_prints_it():
    assert V6eFlashConfigModifier.default_config().debug_string() == (
        "klass: 'axlearn.experiments.trainer_config_utils.V6eFlashConfigModifier'\ntpu_block_size: 1024"
    )


@pytest.mark.parametrize("size", [1024, 2048])
def test_it_sets_the_tpu_block_size_and_nothing_else(size):
    cfg = _trainer_config(flash=True)
    _attention(cfg).gpu_block_size = 64
    before = cfg.debug_string().splitlines()
    assert V6eFlashConfigModifier.default_config().set(tpu_block_size=size).instantiate()(cfg) is cfg
    changed = [line for line in cfg.debug_string().splitlines() if line not in before]
    path = "model.decoder.transformer.layer.self_attention.attention"
    assert changed == [f"{path}.tpu_block_size: {size}"]


def test_without_flash_attention_it_changes_nothing_and_says_so(caplog):
    cfg = _trainer_config(flash=False)
    before = cfg.model.debug_string()
    with caplog.at_level(logging.WARNING):
        select_mesh_config(cfg, mesh_selector="tpu-v6e-256-4")
    assert "V6eFlashConfigModifier: " in caplog.text
    assert "nothing to set" in caplog.text
    changed = [line for line in cfg.model.debug_string().splitlines() if line not in before.splitlines()]
    # The rest of the rule applies.
    assert changed == [
        "decoder.transformer.layer.remat_spec['policy']: "
        "'axlearn.experiments.text.gpt.fuji.offload_attention_proj_policy'"
    ]
