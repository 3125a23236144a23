"""What holds of every field of real recipes: a dump is a list of overrides, and a mistyped path is answered."""

import ast
import random
import re

import pytest

from axlearn.common.config import InvalidOverrideError, apply_overrides, value_at
from axlearn.experiments import registry

_NAMES = ("fuji-tiny", "fuji-70B-v2-flash", "fuji-7B-v1-flash-fp8", "fuji-golden-run-test-v2")


def _config(name: str):
    return registry.find_trainer_config(name)(data_dir="FAKE")


def _dump(cfg) -> str:
    """Every field, those that hold their default too."""
    return cfg.debug_string(omit_default_values=())


def _as_overrides(text: str) -> list[str]:
    return [line.replace(": ", "=", 1) for line in text.splitlines()]


@pytest.mark.parametrize("name", _NAMES)
def test_each_line_of_a_dump_is_an_override_that_changes_nothing(name):
    cfg, before = _config(name), _config(name)
    overrides = apply_overrides(cfg, _as_overrides(_dump(before)))
    assert len(overrides) > 500
    assert cfg == before
    assert _dump(cfg) == _dump(before)
    assert not any(override.dropped for override in overrides)


@pytest.mark.parametrize(
    ("name", "other"), [("fuji-7B-v1", "fuji-test-v1"), ("fuji-70B-v2-flash", "fuji-7B-v2-flash")]
)
def test_the_dump_of_a_recipe_makes_another_of_the_same_shape_into_it(name, other):
    cfg, wanted = _config(other), _config(name)
    cfg.set(mesh_rules=None)
    wanted.set(mesh_rules=None)
    lines = _as_overrides(_dump(wanted))
    if wanted.model.decoder.lm_head is not None and cfg.model.decoder.lm_head is None:
        # A config can be put there by its class, from which on its fields can be set.
        lines.sort(key=lambda line: not line.startswith("model.decoder.lm_head.klass"))
    assert cfg != wanted
    apply_overrides(cfg, lines)
    assert cfg == wanted
    assert _dump(cfg) == _dump(wanted)


def _mistyped(path: str, rng: random.Random) -> str:
    """A path with one letter left out, doubled or swapped with the next, in a name of at least four."""
    name = rng.choice(list(re.finditer(r"[A-Za-z_]{4,}", path)))
    i = rng.randrange(name.start(), name.end() - 1)
    return rng.choice(
        [
            path[:i] + path[i + 1 :],
            path[:i] + path[i] + path[i:],
            path[:i] + path[i + 1] + path[i] + path[i + 2 :],
        ]
    )


def test_a_mistyped_path_is_answered_with_the_one_that_was_meant():
    cfg = _config("fuji-7B-v2-flash")
    paths = [line.partition(": ")[0] for line in _dump(cfg).splitlines()]
    rng = random.Random(4)
    mistyped = [(path, _mistyped(path, rng)) for path in paths if re.search(r"[A-Za-z_]{4,}", path)]
    mistyped = [(path, typed) for path, typed in mistyped if typed not in paths]
    assert len(mistyped) > 300
    for path, typed in rng.sample(mistyped, 300):
        with pytest.raises(InvalidOverrideError) as e:
            apply_overrides(cfg, [f"{typed}=None"])
        (suggestions,) = re.findall(r"Did you mean (.*)\?", str(e.value))
        nearest = [ast.literal_eval(text) for text in re.split(r", | or (?=['\"])", suggestions)]
        for suggestion in nearest:
            value_at(cfg, suggestion)
        # The nearest mends the step that was mistyped; what follows it was not looked at yet.
        assert any(path == near or path.startswith((f"{near}.", f"{near}[")) for near in nearest), typed
