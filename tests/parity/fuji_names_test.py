"""Every fuji-test recipe trains twenty steps on one device and on eight, to the same losses: two in every run of the
tests, the others in `make test-scale`."""

import numpy as np
import pytest

from tests.parity.fuji_runs import recipe, run

_VERSIONS = ("v1", "v2", "v3", "v3-tiktoken")
_NAMES = [f"fuji-test-{version}{suffix}" for version in _VERSIONS for suffix in ("", "-flash")]

_SAMPLES = ("fuji-test-v1", "fuji-test-v3-tiktoken-flash")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in _SAMPLES else pytest.mark.scale) for name in _NAMES]
)
def test_a_recipe_trains_the_same_on_one_device_and_on_eight(name):
    cfg = recipe(name)
    one, eight = (run(cfg, num_devices=num_devices, num_steps=20) for num_devices in (1, 8))
    assert len(one.losses) == 20
    np.testing.assert_allclose(eight.losses, one.losses, rtol=1e-5)
    for path, gradient in one.gradients.items():
        error = np.abs(eight.gradients[path] - gradient).max() / np.abs(gradient).max()
        assert error < 1e-5, (path, error)
    # Rows of the batch are divided between devices, and the recipe has 32.
    assert "s32[4,64]" in eight.program
