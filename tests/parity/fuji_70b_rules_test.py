"""Five steps by every distinct mesh rule of fuji-8B, fuji-70B and fuji-405B, on a small model and eight devices.

What else the rules set is in `tests/experiments/text/gpt/fuji_mesh_rules_test.py`.
"""

import pytest

from tests.parity.fuji_rules import RULES, check_trains, to_train


@pytest.mark.parametrize("rule", to_train(rule for rule in RULES if rule.size != "7B"))
def test_a_rule_trains_what_one_device_trains(rule):
    check_trains(rule)
