"""Tests of axlearn.common.attention: the laws that every kind of attention keeps.

A new kind is covered by adding its config to `multihead_configs`.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding

from axlearn.common.utils import flatten_items, use_mesh
from tests.common.attention.layer_configs import DIM, normal
from tests.common.attention.multihead_configs import ALL, BIDIRECTIONAL, CAUSAL, Case, build

_BATCH, _SEQ, _CHUNK = 4, 8, 4
_X = np.asarray(normal(_BATCH, _SEQ, DIM))
_seeds = st.integers(0, 1000)


@functools.cache
def _case(name: str) -> Case:
    return build(ALL[name])


@functools.cache
def _outputs(name: str) -> np.ndarray:
    return np.asarray(_case(name).forward(_X))


def _assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_token_influences_no_output_before_it(name):
    case, rows = _case(name), np.repeat(_X[:1], _BATCH, 0)
    before = np.asarray(case.forward(rows))
    first_changed = [1, 3, 6, _SEQ - 1]
    for row, t in enumerate(first_changed):
        rows[row, t:] = normal(_SEQ - t, DIM, seed=7) * 10
    after = np.asarray(case.forward(rows))
    for row, t in enumerate(first_changed):
        np.testing.assert_array_equal(after[row, :t], before[row, :t])
        assert np.abs(after[row, t] - before[row, t]).max() > 1e-3


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=3, deadline=None)
@given(lengths=st.lists(st.integers(1, _SEQ), min_size=_BATCH, max_size=_BATCH))
def test_what_stands_in_the_padding_does_not_matter(name, lengths):
    case, x = _case(name), _X.copy()
    segment_ids = np.arange(_SEQ) < np.array(lengths)[:, None]
    before = np.asarray(case.forward(x, segment_ids=segment_ids))
    x[~segment_ids] = 50.0
    after = np.asarray(case.forward(x, segment_ids=segment_ids))
    np.testing.assert_array_equal(after[segment_ids], before[segment_ids])
    assert np.isfinite(after).all()


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=3, deadline=None)
@given(cuts=st.sets(st.integers(1, _SEQ - 1), min_size=1, max_size=_BATCH - 1))
def test_packed_documents_equal_separate_ones(name, cuts):
    """The documents of one row, positions restarting, the last of them padding if there are several."""
    case = _case(name)
    starts = [0, *sorted(cuts), _SEQ]
    documents = list(itertools.pairwise(starts))
    packed = {"segment_ids": np.zeros([_BATCH, _SEQ]), "positions": np.zeros([_BATCH, _SEQ])}
    alone = np.zeros([_BATCH, _SEQ, DIM], np.float32)
    is_alone = np.zeros([_BATCH, _SEQ])
    for i, (start, end) in enumerate(documents):
        packed["segment_ids"][:, start:end] = (i + 1) % len(documents)
        packed["positions"][:, start:end] = np.arange(end - start)
        alone[i, : end - start] = _X[0, start:end]
        is_alone[i, : end - start] = 1
    outputs = case.forward(_X[:1].repeat(_BATCH, 0), **packed)
    separate = case.forward(alone, segment_ids=is_alone)
    for i, (start, end) in enumerate(documents):
        _assert_close(outputs[0, start:end], separate[i, : end - start])


@pytest.mark.parametrize("name", [name for name in ALL if "alibi" not in name and "everything" not in name])
def test_the_order_of_heads_does_not_matter(name):
    """Except with ALiBi, whose slopes are those of the first, the second, ... head."""
    case = _case(name)
    order = np.roll(np.arange(case.layer.num_kv_heads), 1)
    _assert_close(case.forward(_X, params=case.permute_heads(order)), _outputs(name))


@pytest.mark.parametrize("name", BIDIRECTIONAL)
@settings(max_examples=3, deadline=None)
@given(order=st.permutations(range(_SEQ)))
def test_without_a_mask_and_positions_the_order_of_tokens_does_not_matter(name, order):
    _assert_close(_case(name).forward(_X[:, order]), _outputs(name)[:, order])


def _decode(case: Case, rng: np.random.Generator, *, params=None) -> np.ndarray:
    """Feeds `_X` in chunks, of which each row takes as many tokens as it likes; the others are junk."""
    states = case.layer.init_states(batch_size=_BATCH, max_len=_SEQ)
    outputs, times = np.full(_X.shape, np.nan, np.float32), np.zeros([_BATCH], int)
    while times.min() < _SEQ:
        live = np.minimum(rng.integers(0, _CHUNK + 1, _BATCH), _SEQ - times)
        chunk = np.full([_BATCH, _CHUNK, DIM], np.nan, np.float32)
        for row, (time, num) in enumerate(zip(times, live, strict=True)):
            chunk[row, :num] = _X[row, time : time + num]
        states, step = case.extend(states, chunk, live, params=params)
        for row, (time, num) in enumerate(zip(times, live, strict=True)):
            outputs[row, time : time + num] = step[row, :num]
        times += live
        np.testing.assert_array_equal(states["time_step"], times)
    return outputs


@pytest.mark.parametrize("name", CAUSAL)
@settings(max_examples=3, deadline=None)
@given(seed=_seeds)
def test_ragged_steps_equal_the_whole_sequence(name, seed):
    """A chunk is longer than the ring of the window, so steps on both sides of its length come up."""
    _assert_close(_decode(_case(name), np.random.default_rng(seed)), _outputs(name))


def _placed(case: Case, mesh: Mesh):
    specs = dict(flatten_items(case.layer.create_parameter_specs_recursively()))
    leaves = [
        jax.device_put(value, NamedSharding(mesh, specs[path].mesh_axes))
        for path, value in flatten_items(case.params)
    ]
    return jax.tree.unflatten(jax.tree.structure(case.params), leaves)


_MESHES = {"fsdp": (2, 2, 1, 2), "seq": (1, 2, 2, 2)}


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        *((name, "fsdp") for name in ALL),
        ("gqa", "seq"),
        ("gqa-everything-ring", "seq"),
        ("sigmoid-full", "seq"),
    ],
)
def test_a_sharded_attention_equals_one_on_a_device(name, axes):
    mesh = Mesh(np.asarray(jax.devices()).reshape(_MESHES[axes]), ("data", "fsdp", "seq", "model"))
    case, expected = build(ALL[name]), _outputs(name)
    params = _placed(case, mesh)
    with use_mesh(mesh):
        outputs = case.forward(_X, params=params)
    _assert_close(outputs, expected)
    assert not outputs.sharding.is_fully_replicated


@pytest.mark.parametrize("name", ["gqa-everything", "gqa-everything-ring"])
def test_sharded_steps_equal_the_whole_sequence(name):
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 2, 1, 2), ("data", "fsdp", "seq", "model"))
    case = build(ALL[name])
    params = _placed(case, mesh)
    with use_mesh(mesh):
        outputs = _decode(case, np.random.default_rng(0), params=params)
    _assert_close(outputs, _outputs(name))


@pytest.mark.parametrize("name", ["mha-sink", "gqa-everything-ring", "sigmoid-full", "mha-symmetric-alibi"])
def test_bfloat16_is_close_to_float32(name):
    case = build(ALL[name])
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), case.params)
    outputs = case.forward(_X.astype(jnp.bfloat16), params=half)
    assert outputs.dtype == jnp.bfloat16
    # The rounding of bfloat16 is 2 ** -8; it is met by inputs, weights, projections and outputs.
    error = np.abs(np.asarray(outputs, np.float32) - _outputs(name)).max()
    assert error < 8 * 2**-8 * np.abs(_outputs(name)).max()


@pytest.mark.parametrize("name", ["gqa", "gqa-everything-ring"])
def test_a_second_call_does_not_trace_again(name):
    case = _case(name)
    case.forward(_X)
    _decode(case, np.random.default_rng(0))
    num_traces = case.num_traces
    case.forward(2 * _X, params=jax.tree.map(lambda w: w + 1, case.params))
    _decode(case, np.random.default_rng(1))
    assert case.num_traces == num_traces
