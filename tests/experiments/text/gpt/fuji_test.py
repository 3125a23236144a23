"""The dump, the parameters and the regularizer of fuji-test against the reference's own files."""

import hashlib

import pytest

from axlearn.common.base_layer import BaseLayer
from axlearn.experiments.text.gpt import fuji

GOLDEN_MODULE = "axlearn.experiments.text.gpt.c4_trainer"

# SHA-256 of the lines of the reference's dump that do not depend on the data, in their order: all but `evalers[...]`
# and `input.*`. They tie our dump to the reference where its text is not at hand.
REFERENCE_SUMS = {
    fuji.Version.V1: "45a2ba768441c9ddfdffbc01f592c90c3bdaecadf7138cb6338ea427a6b7b127",
    fuji.Version.V3_TIKTOKEN: "94034c0ddcd411b42fc2b943e1feab2a93a29435ee57177d2dd214597a08b8da",
}


def _without_data(text: str) -> list[str]:
    return [line for line in text.rstrip("\n").split("\n") if not line.startswith(("evalers[", "input."))]


@pytest.mark.parametrize("version", REFERENCE_SUMS)
def test_every_line_that_does_not_depend_on_data_equals_the_reference(version, shared_dir, golden):
    ours = _without_data(fuji.trainer_config(size="test", version=version).debug_string())
    if shared_dir is not None:
        path = shared_dir / "golden" / GOLDEN_MODULE / f"fuji-test-{version.value}.txt"
        assert ours == _without_data(path.read_text(encoding="utf-8"))
    golden(f"fuji-test-{version.value}.without-data.txt", "\n".join(ours) + "\n")
    assert hashlib.sha256("\n".join(ours).encode()).hexdigest() == REFERENCE_SUMS[version]


# The sum of the reference's fuji-test-v1_init.txt, one of its published SHA256SUMS.
INIT_SUM = "08e7cda87730ac608900fbc19e9c3572abcbc85a80bd630f5e7c29df9d5e3733"


def _init_lines(layer: BaseLayer, prefix: str = "") -> list[str]:
    """One line a parameter, in the order of the module tree, as the reference's `_init` files print them."""
    lines = []
    for name, spec in layer._complete_layer_parameter_specs().items():
        initializer = spec.initializer or layer.param_init()
        text = initializer.debug_string(name=name, shape=spec.shape, axes=spec.fan_axes)
        lines.append(f"{prefix}{name}: {text}")
    for name, child in layer._child_layers().items():
        lines += _init_lines(child, f"{prefix}{name}/")
    return lines


def test_parameter_initialisers_equal_the_reference():
    cfg = fuji.trainer_config(size="test", version=fuji.Version.V1)
    model = cfg.model.set(name="init_debug_string").instantiate(parent=None)
    assert hashlib.sha256("\n".join(_init_lines(model)).encode()).hexdigest() == INIT_SUM
