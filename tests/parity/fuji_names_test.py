"""Every fuji-test recipe trains twenty steps on one device and on eight, to the same losses: one in every run of the
tests, the others in `make test-scale`."""

import pytest

from tests.parity.runs import check_begins_and_trains_the_same, check_gradients_are_the_same, recipe, run

_VERSIONS = ("v1", "v2", "v3", "v3-tiktoken")
_NAMES = [f"fuji-test-{version}{suffix}" for version in _VERSIONS for suffix in ("", "-flash")]

_SAMPLE = "fuji-test-v3-tiktoken-flash"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == _SAMPLE else pytest.mark.scale) for name in _NAMES]
)
def test_a_recipe_trains_the_same_on_one_device_and_on_eight(name):
    cfg = recipe(name)
    one, eight = (run(cfg, num_devices=num_devices, num_steps=20) for num_devices in (1, 8))
    assert len(one.losses) == 20
    check_begins_and_trains_the_same(eight, one)
    check_gradients_are_the_same(eight, one)
    # Rows of the batch are divided between devices, and the recipe has 32.
    assert "s32[4,64]" in eight.program
