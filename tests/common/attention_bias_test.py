"""Tests of axlearn.common.attention_bias."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from axlearn.common.attention_bias import (
    NEG_INF,
    BoolTensorAttentionBias,
    CausalAttentionBias,
    CompositeAttentionBias,
    LeftRightWindowAttentionBias,
    MaskFnAttentionBias,
    SegmentIdAttentionBias,
    SlidingWindowAttentionBias,
    TensorAttentionBias,
    ZeroAttentionBias,
    alibi_attention_bias,
    alibi_slopes,
    and_masks,
    as_attention_bias,
    bool_to_bias,
    causal_mask,
    left_right_window_mask,
    make_causal_biases,
    make_segment_mask,
    or_masks,
    sliding_window_causal_mask,
    split,
    truncated_key_mask,
)

_POSITIONS = jnp.arange(5)[None]


def _allowed(bias) -> np.ndarray:
    """Where a bias is zero; everywhere else it must be NEG_INF."""
    value = np.asarray(bias.value())
    assert ((value == 0) | (value == np.float32(NEG_INF))).all()
    return value == 0


@pytest.mark.parametrize(
    ("bias", "rule"),
    [
        (CausalAttentionBias(_POSITIONS, _POSITIONS), lambda t, s: s <= t),
        (
            SlidingWindowAttentionBias(_POSITIONS, _POSITIONS, sliding_window_size=2),
            lambda t, s: t - 2 <= s <= t,
        ),
        (SlidingWindowAttentionBias(_POSITIONS, _POSITIONS, sliding_window_size=0), lambda t, s: t == s),
        (
            LeftRightWindowAttentionBias(_POSITIONS, _POSITIONS, left_size=1, right_size=2),
            lambda t, s: t - 1 <= s <= t + 2,
        ),
        (
            MaskFnAttentionBias(
                _POSITIONS, _POSITIONS, mask=or_masks(left_right_window_mask(0, 0), lambda t, s: s == 0)
            ),
            lambda t, s: t == s or s == 0,
        ),
        (
            MaskFnAttentionBias(_POSITIONS, _POSITIONS, mask=and_masks(causal_mask, lambda t, s: s != 1)),
            lambda t, s: s <= t and s != 1,
        ),
    ],
)
def test_masks_of_positions_equal_a_double_loop(bias, rule):
    expected = [[[[rule(t, s) for s in range(5)] for t in range(5)]]]
    np.testing.assert_array_equal(_allowed(bias), expected)


_WINDOWS = st.integers(0, 5)
_RULES = {
    "causal": lambda n, m: (CausalAttentionBias, lambda t, s: s <= t),
    "sliding": lambda n, m: (
        functools.partial(SlidingWindowAttentionBias, sliding_window_size=n),
        lambda t, s: t - n <= s <= t,
    ),
    "left_right": lambda n, m: (
        functools.partial(LeftRightWindowAttentionBias, left_size=n, right_size=m),
        lambda t, s: t - n <= s <= t + m,
    ),
    "truncated": lambda n, m: (
        functools.partial(MaskFnAttentionBias, mask=truncated_key_mask(n)),
        lambda t, s: s < n,
    ),
    "and": lambda n, m: (
        functools.partial(
            MaskFnAttentionBias, mask=and_masks(sliding_window_causal_mask(n), truncated_key_mask(m))
        ),
        lambda t, s: t - n <= s <= t and s < m,
    ),
    "or": lambda n, m: (
        functools.partial(MaskFnAttentionBias, mask=or_masks(truncated_key_mask(n), causal_mask)),
        lambda t, s: s < n or s <= t,
    ),
}


@pytest.mark.parametrize("name", _RULES)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), n=_WINDOWS, m=_WINDOWS)
def test_masks_of_any_positions_equal_a_double_loop(name, seed, n, m):
    rng = np.random.default_rng(seed)
    target, source = rng.integers(0, 8, [2, 4]), rng.integers(0, 8, [2, 6])
    make, rule = _RULES[name](n, m)
    bias = make(jnp.asarray(target), jnp.asarray(source))
    expected = [[[[rule(t, s) for s in source[b]] for t in target[b]]] for b in range(2)]
    np.testing.assert_array_equal(_allowed(bias), expected)
    assert bias.eval_shape() == (2, 1, 4, 6)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), symmetric=st.booleans())
def test_alibi_of_any_positions_equals_a_double_loop(seed, symmetric):
    rng = np.random.default_rng(seed)
    target, source = rng.integers(0, 50, [2, 4]), rng.integers(0, 50, [1, 6])
    bias = alibi_attention_bias(jnp.asarray(target), jnp.asarray(source), num_heads=3, symmetric=symmetric)
    slopes = (1 / 16, 1 / 256, 1 / 4)
    distance = abs if symmetric else lambda x: max(x, 0)
    expected = [
        [[[-m * distance(int(t - s)) for s in source[0]] for t in target[b]] for m in slopes]
        for b in range(2)
    ]
    np.testing.assert_allclose(bias.value(), expected, rtol=1e-6)
    assert bias.has_value()
    assert bias.eval_shape() == (2, 3, 4, 6)
    assert bias.astype(jnp.bfloat16).value().dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("num_heads", "slopes"),
    [
        (1, [2**-8]),
        (8, [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]),
        (6, [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]),
        # As transformers 5.23.0 has them for BLOOM.
        (12, [*(2.0**-i for i in range(1, 9)), 0.70710677, 0.35355338, 0.17677668, 0.08838834]),
    ],
)
def test_alibi_slopes_are_those_of_the_paper_and_its_code(num_heads, slopes):
    np.testing.assert_allclose(alibi_slopes(num_heads), slopes, rtol=1e-6)


def test_alibi_of_slots_that_were_never_written_stays_finite():
    never = jnp.full([1, 2], np.iinfo(np.int32).max)
    bias = alibi_attention_bias(jnp.array([[0]]), never, num_heads=2)
    np.testing.assert_array_equal(bias.value(), 0)
    assert (CausalAttentionBias(jnp.array([[0]]), never) + bias).value().max() < 0.99 * NEG_INF
    with pytest.raises(ValueError, match="num_heads=0"):
        alibi_slopes(0)


def test_each_part_of_a_cut_up_bias_is_the_part_of_the_bias():
    """Inside `shard_map`, which hands each device its part of positions, segments, slopes and tensors."""
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 2, 2), ("data", "seq", "model"))
    positions = jnp.arange(4)[None]
    segments = jnp.asarray([[1, 1, 2, 2], [1, 2, 2, 0]])
    rng = np.random.default_rng(0)
    bias = (
        CausalAttentionBias(jnp.asarray([[3, 1, 2, 0], [0, 1, 2, 3]]), positions)
        + SlidingWindowAttentionBias(positions, positions, sliding_window_size=2)
        + SegmentIdAttentionBias(segments, segments)
        + alibi_attention_bias(positions, positions, num_heads=4)
        + TensorAttentionBias.from_tensor(jnp.asarray(rng.normal(size=[1, 4, 1, 4]), jnp.float32))
        + BoolTensorAttentionBias.from_tensor(jnp.asarray(rng.random([2, 1, 4, 1]) > 0.3))
    )
    spec = PartitionSpec("data", "model", "seq", None)
    specs = bias.partition_spec({"bnts": spec})
    assert specs.leaves()[0].target_positions == PartitionSpec("data", "seq")
    assert specs.leaves()[3].slopes == PartitionSpec("model")
    value = jax.jit(
        jax.shard_map(
            lambda bias: bias.value(), mesh=mesh, in_specs=(specs,), out_specs=spec, check_vma=False
        )
    )(bias)
    np.testing.assert_array_equal(value, bias.value())
    assert ZeroAttentionBias().partition_spec({"bnts": spec}) == ZeroAttentionBias()
    # One array of segments cannot be cut in two ways.
    assert SegmentIdAttentionBias(segments).partition_spec({"bnts": PartitionSpec("data")})
    with pytest.raises(ValueError, match=r"(?s)split over 'seq' and sources over None.*two arrays"):
        SegmentIdAttentionBias(segments).partition_spec({"bnts": spec})
    with pytest.raises(ValueError, match=r"(?s)spec for \['btnh'\].*'bnts'"):
        bias.partition_spec({"btnh": spec})


def test_masks_use_the_positions_of_each_row():
    # One query at time 3 and one at time 1, over a cache of 5.
    bias = CausalAttentionBias(jnp.array([[3], [1]]), _POSITIONS)
    assert bias.eval_shape() == (2, 1, 1, 5)
    np.testing.assert_array_equal(_allowed(bias).sum(-1).ravel(), [4, 2])


def test_segments_see_themselves_only():
    segments = jnp.array([[1, 1, 2, 0, 0]])
    expected = segments[0][:, None] == segments[0][None]
    np.testing.assert_array_equal(_allowed(SegmentIdAttentionBias(segments))[0, 0], expected)
    np.testing.assert_array_equal(make_segment_mask(target_segments=segments)[0, 0] == 0, expected)
    source = jnp.array([[2, 1]])
    np.testing.assert_array_equal(
        _allowed(SegmentIdAttentionBias(segments, source))[0, 0], segments[0][:, None] == source
    )


def test_causal_biases_equal_a_triangle():
    np.testing.assert_array_equal(make_causal_biases(4) == 0, np.tril(np.ones([4, 4], bool)))


def test_sums_join_masks_and_add_tensors():
    rng = np.random.default_rng(0)
    tensor = rng.normal(size=[2, 1, 5, 5]).astype(np.float32)
    segments = jnp.array([[1, 1, 2, 2, 2], [1, 1, 1, 1, 1]])
    causal, segment = CausalAttentionBias(_POSITIONS, _POSITIONS), SegmentIdAttentionBias(segments)
    total = ZeroAttentionBias() + causal + segment + TensorAttentionBias.from_tensor(jnp.asarray(tensor))
    allowed = _allowed(causal) & _allowed(segment)
    np.testing.assert_allclose(total.value(), np.where(allowed, 0, np.float32(NEG_INF)) + tensor, rtol=1e-6)
    # Forbidden by both masks is not forbidden twice.
    assert total.value().min() >= 1.001 * NEG_INF
    assert isinstance(total, CompositeAttentionBias)
    assert [type(leaf) for leaf in total.leaves()] == [
        CausalAttentionBias,
        SegmentIdAttentionBias,
        TensorAttentionBias,
    ]


def test_sums_are_lazy():
    """Adding up and asking for a value touch no array: here there is none."""
    total = CausalAttentionBias(None, None) + ZeroAttentionBias() + SegmentIdAttentionBias(None)
    assert total.has_value()
    assert len(total.leaves()) == 2


def test_zero_is_neutral():
    causal = CausalAttentionBias(_POSITIONS, _POSITIONS)
    assert ZeroAttentionBias() + causal is causal
    assert causal + ZeroAttentionBias() is causal
    nothing = ZeroAttentionBias() + ZeroAttentionBias()
    assert not nothing.has_value()
    assert nothing.value() is None
    assert nothing.eval_shape() is None
    assert CompositeAttentionBias(()).value() is None


def test_split_sorts_summands_by_class():
    causal, segment = CausalAttentionBias(_POSITIONS, _POSITIONS), SegmentIdAttentionBias(_POSITIONS)
    tensor = TensorAttentionBias.from_tensor(jnp.zeros([5, 5]))
    parts = split(causal + segment + tensor, MaskFnAttentionBias, SegmentIdAttentionBias)
    assert parts[:2] == (causal, segment)
    assert parts[2] is tensor
    found, rest = (causal + tensor).bias_and_residual(CausalAttentionBias)
    assert found is causal
    assert rest is tensor
    found, rest = tensor.bias_and_residual(SegmentIdAttentionBias)
    assert found is None
    assert rest is tensor
    with pytest.raises(ValueError, match="2 summands are CausalAttentionBias"):
        (causal + causal).bias_and_residual(CausalAttentionBias)


@pytest.mark.parametrize(("shape", "expected"), [((3, 4), (1, 1, 3, 4)), ((2, 3, 4), (2, 1, 3, 4))])
def test_arrays_of_lower_rank_get_batch_and_heads(shape, expected):
    assert as_attention_bias(jnp.zeros(shape)).eval_shape() == expected
    assert BoolTensorAttentionBias.from_tensor(jnp.ones(shape, bool)).bool_value().shape == expected


def test_an_array_of_rank_1_is_refused():
    with pytest.raises(ValueError, match=r"(?s)shape \(3,\).*Expected \[target, source\]"):
        as_attention_bias(jnp.zeros([3]))


@pytest.mark.parametrize("dtype", [bool, np.int32])
def test_an_array_that_may_be_meant_as_a_mask_is_refused(dtype):
    # Added to logits, the "may attend" of a mask would hardly count, and its "may not" not at all.
    with pytest.raises(TypeError, match=r"(?s)attention bias of .*BoolTensorAttentionBias"):
        as_attention_bias(jnp.ones([3, 4], dtype))


def test_biases_pass_through_jit_and_equal_windows_do_not_retrace():
    num_traces = 0

    @jax.jit
    def value(bias):
        nonlocal num_traces
        num_traces += 1
        return bias.value()

    for window in (2, 2, 3):
        bias = SlidingWindowAttentionBias(_POSITIONS, _POSITIONS, sliding_window_size=window)
        np.testing.assert_array_equal(value(bias), bias.value())
    assert num_traces == 2
    assert sliding_window_causal_mask(7) is sliding_window_causal_mask(7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_masked_rows_are_finite_and_uniform_in_every_dtype(dtype):
    bias = bool_to_bias(jnp.zeros([4], bool), dtype=dtype)
    assert bias.dtype == dtype
    assert jnp.isfinite(bias).all()
    np.testing.assert_array_equal(jax.nn.softmax(bias), np.full([4], 0.25))
    masked = BoolTensorAttentionBias.from_tensor(jnp.zeros([1, 1], bool)).astype(dtype)
    assert masked.value().dtype == dtype


@pytest.mark.parametrize(
    "make", [sliding_window_causal_mask, lambda n: left_right_window_mask(1, n), truncated_key_mask]
)
def test_negative_windows_are_refused(make):
    with pytest.raises(ValueError, match=r"(?s)=-1.*Expected"):
        make(-1)
