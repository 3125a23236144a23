"""The tree of modules: children, names, paths, sharing, logging, and what goes wrong with them."""

from typing import Optional

import jax
import numpy as np
import pytest
from absl import logging

from axlearn.common.config import REQUIRED, Configurable, Required, RequiredFieldMissingError, config_class
from axlearn.common.module import (
    ChildNameConflictError,
    InvalidDescendantError,
    Module,
    functional,
    nowrap,
)


class Leaf(Module):
    """Adds its state to its input."""

    @config_class
    class Config(Module.Config):
        dim: Required[int] = REQUIRED

    def forward(self, x):
        return x + self.state["offset"]

    def twice(self, x):
        return self.forward(self.forward(x))

    def fail(self):
        raise KeyError("broken")

    def sum(self, x, y):
        return x + y

    @nowrap
    def context_name(self):
        return self.get_invocation_context().name

    def _private(self):
        return self.state


class Middle(Module):
    """Has two leaves, one of which it shares."""

    @config_class
    class Config(Module.Config):
        leaf: Leaf.Config = Leaf.default_config().set(dim=2)

    def __init__(self, cfg, *, parent):
        super().__init__(cfg, parent=parent)
        self._add_child("first", cfg.leaf)
        self._add_child("second", cfg.leaf)

    def forward(self, x):
        return self.second(self.first(x))

    def fail(self):
        self.second.fail()

    def call_shared(self, x):
        return self.get_shared_module("bias").module(x)

    def call_private_of_child(self):
        return self.first._private()


class Root(Module):
    """Shares a leaf with its descendants."""

    def __init__(self, cfg, *, parent):
        super().__init__(cfg, parent=parent)
        self._add_child("middle", Middle.default_config())
        self._add_child("shared_leaf", Leaf.default_config().set(dim=3))
        self._share_with_descendants(self.shared_leaf, shared_module_name="bias")

    def forward(self, x):
        return self.middle(x)

    def grandchild(self, x):
        return self.middle.first(x)

    def call_shared(self, x):
        return self.middle.call_shared(x)

    def fail(self):
        self.middle.fail()


STATE = {
    "middle": {"first": {"offset": np.float32(1)}, "second": {"offset": np.float32(10)}},
    "shared_leaf": {"offset": np.float32(100)},
}


@pytest.fixture
def root():
    return Root.default_config().set(name="root").instantiate(parent=None)


def run(module, method, state, *args):
    return functional(module, None, state, args, method=method, is_training=False)[0]


def test_children_have_names_and_paths(root):
    assert list(root.children) == ["middle", "shared_leaf"]
    assert root.middle.second.path() == "root.middle.second"
    assert root.middle.second.parent is root.middle
    assert root.path_to_descendant_module(root.middle.second) == ["middle", "second"]
    assert root.path_to_descendant_module(root) == []
    with pytest.raises(InvalidDescendantError, match=r"root.shared_leaf is not a descendant of root.middle"):
        root.middle.path_to_descendant_module(root.shared_leaf)


def test_the_config_of_a_child_is_not_changed(root):
    cfg = Leaf.default_config().set(dim=2)
    root._add_child("extra", cfg)
    assert cfg.name is REQUIRED
    assert root.extra.config.name == "extra"


def test_illegal_children_are_refused(root):
    leaf = Leaf.default_config().set(dim=2)
    with pytest.raises(ChildNameConflictError, match=r"root.middle: there is already a child"):
        root._add_child("middle", leaf)
    with pytest.raises(ValueError, match="'Upper' is not a legal name"):
        root._add_child("Upper", leaf)
    with pytest.raises(ValueError, match=r"has another name, 'other'. Expected none, or 'new'"):
        root._add_child("new", leaf.clone(name="other"))
    with pytest.raises(TypeError, match="Expected a config of a Module"):
        root._add_child("new", Configurable.default_config())


def test_a_failure_to_build_carries_the_path_of_the_module():
    class Outer(Module):
        def __init__(self, cfg, *, parent):
            super().__init__(cfg, parent=parent)
            self._add_child("inner", Leaf.default_config())

    with pytest.raises(RequiredFieldMissingError, match="dim") as error:
        Outer.default_config().set(name="outer").instantiate(parent=None)
    assert any("outer.inner" in note for note in error.value.__notes__)


def test_a_name_that_is_no_attribute_is_answered_with_the_nearest(root):
    with pytest.raises(AttributeError, match=r"no attribute 'midle'. Did you mean 'middle'"):
        _ = root.midle
    with pytest.raises(ValueError, match=r"root: no child is called 'midle'. Did you mean 'middle'"):
        root.child("midle")
    with pytest.raises(ValueError, match=r"has no method 'forwrd'. Did you mean 'forward'"):
        functional(root, None, STATE, (1,), method="forwrd", is_training=False)


def test_methods_of_children_run_with_the_state_of_the_child(root):
    assert run(root, "forward", STATE, 0.5) == 11.5
    assert run(root, "grandchild", STATE, 0.5) == 1.5
    assert run(root.middle.first, "twice", {"offset": 1}, 0.5) == 2.5


def test_a_shared_module_is_called_with_its_own_state(root):
    assert run(root, "call_shared", STATE, 0.5) == 100.5
    with pytest.raises(ValueError, match=r"no ancestor shares 'bias'. Shared here: nothing"):
        run(root.middle, "call_shared", STATE["middle"], 0.5)


def test_the_nearest_ancestor_that_shares_wins(root):
    root.middle._share_with_descendants(root.middle.first, shared_module_name="bias")
    assert run(root, "call_shared", STATE, 0.5) == 1.5
    with pytest.raises(ValueError, match="already shared as 'bias'"):
        root._share_with_descendants(root.middle, shared_module_name="bias")
    with pytest.raises(InvalidDescendantError):
        root.middle._share_with_descendants(root.shared_leaf, shared_module_name="other")


def test_a_module_that_is_neither_below_nor_shared_cannot_be_called(root):
    stranger = Leaf.default_config().set(name="stranger", dim=1).instantiate(parent=None)

    class Caller(Module):
        def forward(self):
            return stranger(1)

    caller = Caller.default_config().set(name="caller").instantiate(parent=None)
    with pytest.raises(RuntimeError, match="stranger was called from the context of caller"):
        run(caller, "forward", {})


def test_state_needs_a_context_and_the_right_one(root):
    with pytest.raises(RuntimeError, match=r"root.middle.first: there is no context"):
        root.middle.first(1.0)
    middle = Middle.default_config().set(name="middle").instantiate(parent=None)
    with pytest.raises(RuntimeError, match="the current context belongs to middle"):
        run(middle, "call_private_of_child", STATE["middle"])


def test_methods_that_need_no_state_run_without_a_context(root):
    assert root.shared_leaf.sum(1, 2) == 3


def test_an_error_is_noted_once_with_the_path_of_the_innermost_module(root):
    with pytest.raises(KeyError, match="broken") as error:
        run(root, "fail", STATE)
    assert error.value.__notes__ == ["Failed in module root.middle.second (Leaf.fail)"]


def test_a_type_error_is_noted_with_the_types_of_the_arguments(root):
    with pytest.raises(TypeError) as error:
        root.shared_leaf.sum(np.zeros((2, 3)), z="x")
    assert error.value.__notes__ == [
        "Failed in module root.shared_leaf (Leaf.sum), called with (ndarray, z=str)"
    ]


def test_nowrap_keeps_the_context_of_the_caller_also_in_overrides():
    class Child(Leaf):
        def context_name(self):
            return "overridden"

    assert Child.context_name.__qualname__.endswith("Child.context_name")
    assert not hasattr(Child.context_name, "__wrapped__")
    assert hasattr(Child.sum, "__wrapped__")
    assert Leaf.sum.__name__ == "sum"


def test_super_runs_in_the_same_context():
    class Shifted(Leaf):
        def forward(self, x):
            return super().forward(x) * 2

    shifted = Shifted.default_config().set(name="shifted", dim=1).instantiate(parent=None)
    assert run(shifted, "forward", {"offset": 1}, 2) == 6


def test_methods_of_mixins_are_wrapped_too():
    class Mixin:
        def scaled(self, x):
            return self.state["offset"] * x

    class Mixed(Leaf, Mixin):
        pass

    class Holder(Module):
        def __init__(self, cfg, *, parent):
            super().__init__(cfg, parent=parent)
            self._add_child("mixed", Mixed.default_config().set(dim=1))

        def forward(self, x):
            return self.mixed.scaled(x)

    holder = Holder.default_config().set(name="holder").instantiate(parent=None)
    assert run(holder, "forward", {"mixed": {"offset": 3}}, 2) == 6


def test_a_property_is_no_method():
    class WithProperty(Module):
        @property
        def size(self) -> Optional[int]:
            return 3

    assert WithProperty.default_config().set(name="x").instantiate(parent=None).size == 3


def test_vlog_follows_the_level_of_the_nearest_module_that_sets_one(capfd, monkeypatch):
    messages = []
    monkeypatch.setattr(logging, "info", lambda fmt, *args, **_: messages.append(fmt % args))
    cfg = Middle.default_config().set(name="middle", vlog=2)
    cfg.leaf.vlog = None
    middle = cfg.instantiate(parent=None)
    assert middle.first.vlog_is_on(2)
    assert not middle.first.vlog_is_on(3)
    middle.first.vlog(1, "dim=%d", 5)
    middle.first.vlog(3, "silent")
    assert messages == ["middle.first: dim=5"]
    jax.jit(lambda x: middle.first.vprint(1, "x={x}", x=x))(7)
    jax.effects_barrier()
    assert "module_test.py" in (out := capfd.readouterr().out)
    assert "x=7" in out
    quiet = Leaf.default_config().set(name="quiet", dim=1).instantiate(parent=None)
    assert not quiet.vlog_is_on(0)
