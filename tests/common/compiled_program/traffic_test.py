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
