"""Contexts: keys, outputs, purity, threads."""

import functools
import hashlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.module import (
    InvocationContext,
    Module,
    OutputCollection,
    OutputConflictError,
    child_context,
    clone_context_stack,
    current_context,
    functional,
    install_context_stack,
    new_output_collection,
    set_current_context,
)


class Noise(Module):
    """Draws from its key, and tells."""

    def forward(self, x):
        self.add_summary("x", x)
        self.add_module_output("x_out", x)
        if self.prng_key is None:
            return x
        return x + jax.random.normal(self.prng_key, x.shape)

    def update(self, x):
        self.add_state_update("count", self.state["count"] + 1)
        self.state["count"] = None
        return x


class Pair(Module):
    """Has two children of a kind."""

    def __init__(self, cfg, *, parent):
        super().__init__(cfg, parent=parent)
        self._add_child("left", Noise.default_config())
        self._add_child("right", Noise.default_config())

    def forward(self, x):
        return self.left(x), self.right(x)

    def left_twice(self, x):
        self.left(x)
        return self.left(x)

    def left_twice_by_name(self, x):
        self.left(x)
        with child_context("left_again", module=self.left):
            self.left(x)
        return self.get_module_outputs()

    def update(self, x):
        return self.left.update(x)

    def training(self):
        return self.is_training

    def scope(self, x):
        return self.left(x)


@pytest.fixture(scope="module")
def pair():
    return Pair.default_config().set(name="pair").instantiate(parent=None)


def test_the_key_of_a_child_is_folded_with_the_hash_of_its_name(pair):
    key = jax.random.PRNGKey(3)
    x = np.zeros(4, np.float32)
    (left, right), _ = functional(pair, key, {}, (x,), is_training=True)
    for name, value in (("left", left), ("right", right)):
        name_hash = int(hashlib.md5(name.encode()).hexdigest(), 16) % (2**31 - 1)
        expected = jax.random.normal(jax.random.fold_in(key, name_hash), x.shape)
        assert np.array_equal(value, expected)


def test_outputs_are_nested_by_module_and_module_outputs_dropped_by_default(pair):
    x = np.float32(2)
    _, outputs = functional(pair, None, {}, (x,), is_training=False)
    assert outputs.summaries == {"left": {"x": x}, "right": {"x": x}}
    assert outputs.module_outputs == {}
    _, outputs = functional(
        pair, None, {}, (x,), is_training=False, drop_output_collections=("summaries", "state_updates")
    )
    assert outputs.summaries == {}
    assert outputs.module_outputs == {"left": {"x_out": x}, "right": {"x_out": x}}
    with pytest.raises(ValueError, match=r"unknown name 'sumaries'"):
        functional(pair, None, {}, (x,), is_training=False, drop_output_collections=("sumaries",))


def test_a_child_called_twice_needs_two_names(pair):
    with pytest.raises(OutputConflictError, match="The outputs of 'left' are there already") as error:
        functional(pair, None, {}, (1,), method="left_twice", is_training=False)
    assert "child_context('left_again', module=self.left)" in str(error.value)
    outputs, _ = functional(pair, None, {}, (1,), method="left_twice_by_name", is_training=False)
    assert outputs == {"left": {"x_out": 1}, "left_again": {"x_out": 1}}


def test_two_outputs_of_one_name_conflict(pair):
    context = _context(pair)
    context.add_summary("x", 1)
    with pytest.raises(OutputConflictError, match="root: summaries already has a value called 'x'"):
        context.add_summary("x", 2)
    with pytest.raises(OutputConflictError):
        context.output_collection.add_child("x")
    with pytest.raises(ValueError, match="'Bad' is not a legal name"):
        context.output_collection.add_child("Bad")


def test_functional_leaves_its_arguments_alone(pair):
    state = {"left": {"count": 1}, "right": {}}
    _, outputs = functional(pair, None, state, {"x": 0}, method="update", is_training=True)
    assert state == {"left": {"count": 1}, "right": {}}
    assert outputs.state_updates == {"left": {"count": 2}}
    functional(pair, None, state, {"x": 0}, method="update", is_training=True, copy_args_tree=False)
    assert state["left"]["count"] is None


def test_a_state_that_contains_itself_is_refused(pair):
    state = {}
    state["left"] = state
    with pytest.raises(ValueError, match="state contains itself"):
        functional(pair, None, state, (0,), is_training=False)


def test_is_training_reaches_the_module(pair):
    for is_training in (False, True):
        assert functional(pair, None, {}, (), method="training", is_training=is_training)[0] is is_training


def test_a_jitted_functional_traces_once_and_names_its_operations(pair):
    traces = []

    def call(x):
        traces.append(None)
        return functional(pair, None, {}, (x,), method="scope", is_training=False)

    jitted = jax.jit(call)
    jitted(jnp.ones(3))
    jitted(jnp.zeros(3))
    assert len(traces) == 1

    @jax.jit
    def scoped(x):
        with set_current_context(_context(pair)), child_context("left"):
            return jnp.sin(x)

    text = scoped.lower(1.0).as_text(debug_info=True)
    assert "root[Pair]" in text
    assert "left[Noise]" in text


def _context(module, **kwargs):
    fields = {
        "name": "root",
        "parent": None,
        "module": module,
        "state": {"left": {"w": 1}, "right": {}},
        "is_training": False,
        "prng_key": None,
        "output_collection": new_output_collection(),
        **kwargs,
    }
    return InvocationContext(**fields)


def test_a_child_context_takes_its_part_and_overrides(pair):
    context = _context(pair, is_training=True)
    child = context.add_child("left")
    assert child.state == {"w": 1}
    assert child.module is pair.left
    assert child.is_training
    assert child.path() == "root.left"
    assert context.add_child("other", module=pair.left, state=3, is_training=False).state == 3
    assert context.add_child("self_again", module=pair).state is context.state
    with pytest.raises(ValueError, match="parent of a child context cannot be overridden"):
        context.add_child("right", parent=None)
    with pytest.raises(ValueError, match="pair: no child is called 'middle'"):
        _context(pair).add_child("middle")
    assert _context(pair, state=None).add_child("left").state is None


def test_contexts_are_entered_below_their_parent(pair):
    context = _context(pair)
    child = context.add_child("left")
    with (
        pytest.raises(RuntimeError, match=r"root.left: its parent is not the current context, which is None"),
        set_current_context(child),
    ):
        pass
    with set_current_context(context), set_current_context(child):
        assert current_context() is child
    assert current_context() is None
    with (
        pytest.raises(RuntimeError, match="There is no context that 'x' could be a child of"),
        child_context("x"),
    ):
        pass


def test_set_state_update_replaces_the_subtree(pair):
    context = _context(pair)
    child = context.add_child("left")
    child.add_state_update("ignored", 1)
    child.set_state_update((1, 2))
    assert context.output_collection.state_updates == {"left": (1, 2)}
    context.set_state_update("all")
    assert context.output_collection.state_updates == "all"


def test_a_context_makes_functions_pure(pair):
    context = _context(pair)
    with set_current_context(context):
        output, outputs = context.functional(lambda x: pair(x))(5)
        assert context.output_collection == new_output_collection()
    assert output == (5, 5)
    assert outputs.summaries == {"left": {"x": 5}, "right": {"x": 5}}
    child = context.add_child("left")
    child.functional(lambda: current_context().set_state_update(1))()
    assert context.output_collection.state_updates == {"left": {}}


def test_a_context_is_a_pytree(pair):
    context = _context(pair, prng_key=jax.random.PRNGKey(0))
    doubled = jax.tree.map(lambda x: 2 * x, context)
    assert doubled.state["left"]["w"] == 2
    assert doubled.module is pair


def test_threads_have_contexts_of_their_own(pair):
    context = _context(pair)
    seen = {}

    def work(name, stack):
        seen[name] = [current_context()]
        if stack is not None:
            install_context_stack(stack)
            seen[name].append(current_context())

    with set_current_context(context):
        stack = clone_context_stack()
        with pytest.raises(RuntimeError, match="Expected to be in a new thread"):
            install_context_stack(stack)
        for name, given in (("empty", None), ("cloned", stack)):
            thread = threading.Thread(target=work, args=(name, given))
            thread.start()
            thread.join()
    assert seen == {"empty": [None], "cloned": [None, context]}


def test_concurrent_threads_do_not_mix_their_outputs(pair):
    barrier = threading.Barrier(4)
    results = {}

    def work(i):
        for _ in range(20):
            barrier.wait()
            _, outputs = functional(pair, None, {}, (i,), is_training=False)
            results.setdefault(i, []).append(outputs.summaries)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [{"left": {"x": i}, "right": {"x": i}}] * 20 for i in range(4)}


def test_collections_merge_level_by_level():
    first = OutputCollection({"a": {"b": 1}}, {}, {})
    first.update(OutputCollection({"a": {"c": 2}}, {"s": 3}, {}))
    assert first == OutputCollection({"a": {"b": 1, "c": 2}}, {"s": 3}, {})
    with pytest.raises(OutputConflictError, match="summaries already has a value called 'c'"):
        first.update(OutputCollection({"a": {"c": 4}}, {}, {}))


def test_functional_can_be_partially_applied(pair):
    f = jax.jit(functools.partial(functional, pair, is_training=True))
    (left, _), _ = f(jax.random.PRNGKey(0), {}, (jnp.zeros(2),))
    assert left.shape == (2,)
