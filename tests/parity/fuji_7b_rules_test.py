"""Five steps by every distinct mesh rule of fuji-7B, on a small model and eight devices.

What else the rules set is in `tests/experiments/text/gpt/fuji_mesh_rules_test.py`.
"""

import pytest

from tests.parity.fuji_rules import NUM_DEVICES, RULES, check_trains, run_once, small, to_train

_RULES = [rule for rule in RULES if rule.size == "7B"]


@pytest.mark.parametrize("rule", to_train(_RULES))
def test_a_rule_trains_what_one_device_trains(rule):
    check_trains(rule)


@pytest.mark.parametrize("rule", to_train(rule for rule in _RULES if rule.trainium))
def test_between_layers_trainium_has_a_part_of_every_sequence_on_each_device(rule):
    program = run_once(small(rule), num_devices=NUM_DEVICES).program
    # 32 rows over fsdp=2, 16 positions over model=4, width 64; in attention all positions and 2 of 8 heads of 8.
    assert "f32[16,4,64]" in program
    assert "f32[16,16,2,8]" in program
