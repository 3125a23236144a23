"""Bytes to and from memory, counted in programs of which they are known."""

import jax
import jax.numpy as jnp

from axlearn.common.compiled_program import bytes_accessed


def _bytes(fn, *shapes):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return bytes_accessed(jax.jit(fn).lower(*args).compile().as_text()).total


def test_an_elementwise_chain_reads_its_input_and_writes_its_output_once():
    assert _bytes(lambda x: jnp.sin(x) * 2 + 1, (1000,)) == 2 * 4000


def test_a_product_reads_both_matrices_and_writes_the_third():
    n = 256
    assert _bytes(lambda x, y: x @ y, (n, n), (n, n)) == 3 * 4 * n * n


def test_a_loop_over_layers_reads_one_layer_of_the_stack_each_time():
    num_layers, n = 16, 128

    def stack(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    found = _bytes(stack, (n, n), (num_layers, n, n))
    matrix = 4 * n * n
    # Each layer reads its weight and its input at least and writes its output; the whole stack in each layer would
    # be sixteen times as much.
    assert 3 * num_layers * matrix <= found <= 10 * num_layers * matrix


def test_storing_the_outputs_of_a_loop_writes_each_once():
    num_layers, n = 16, 128

    def outputs(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(x), jnp.cos(x)), x, length=num_layers)[1]

    assert _bytes(outputs, (n, n)) <= 10 * num_layers * 4 * n * n


def test_products_are_told_apart_from_all_else():
    n = 256

    def product_and_sum(x, y):
        return x @ y, jnp.sin(x)

    args = [jax.ShapeDtypeStruct((n, n), jnp.float32)] * 2
    found = bytes_accessed(jax.jit(product_and_sum).lower(*args).compile().as_text())
    assert (found.products, found.others) == (3 * 4 * n * n, 2 * 4 * n * n)


# As XLA for TPU writes a layer that takes its slice of a stack within a fusion of a fusion, and keeps its result in the
# vector units' memory, and what it moves to the host.
_NESTED = """HloModule step

%slice (p0: f32[16,8,8], p1: s32[]) -> f32[8,8] {
  %p0 = f32[16,8,8]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %taken = f32[1,8,8]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,8}
  ROOT %flat = f32[8,8]{1,0} bitcast(%taken)
}

%product (q0: f32[8,8], q1: f32[16,8,8], q2: s32[]) -> f32[8,8] {
  %q0 = f32[8,8]{1,0} parameter(0)
  %q1 = f32[16,8,8]{2,1,0} parameter(1)
  %q2 = s32[] parameter(2)
  %weight = f32[8,8]{1,0} fusion(%q1, %q2), kind=kLoop, calls=%slice
  ROOT %out = f32[8,8]{1,0} convolution(%q0, %weight), dim_labels=bf_io->bf
}

ENTRY %main (x: f32[8,8], stack: f32[16,8,8], i: s32[]) -> f32[8,8] {
  %x = f32[8,8]{1,0:T(8,128)} parameter(0)
  %stack = f32[16,8,8]{2,1,0:T(8,128)} parameter(1)
  %i = s32[] parameter(2)
  %near = f32[8,8]{1,0:T(8,128)S(1)} fusion(%x, %stack, %i), kind=kOutput, calls=%product
  %start = (f32[8,8]{1,0:T(8,128)S(5)}, f32[8,8]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %host = f32[8,8]{1,0:T(8,128)S(5)} copy-done(%start)
  ROOT %y = f32[8,8]{1,0:T(8,128)} copy(%near)
}
"""


def test_a_slice_within_a_fusion_of_a_fusion_counts_as_the_slice():
    matrix = 8 * 8 * 4
    # The product reads x and its weight, and four bytes of the counter.
    assert bytes_accessed(_NESTED, spaces=[0]).products == 2 * matrix + 4
    assert bytes_accessed(_NESTED).products == 3 * matrix + 4


def test_only_the_memory_that_is_asked_for_counts():
    matrix = 8 * 8 * 4
    # What goes to the host is read here, and the copy's result is written.
    assert bytes_accessed(_NESTED, spaces=[0]).others == 2 * matrix
    assert bytes_accessed(_NESTED, spaces=[1]).total == 2 * matrix
    assert bytes_accessed(_NESTED, spaces=[5]).total == matrix
