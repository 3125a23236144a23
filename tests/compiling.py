"""Compiling without the stored programs of earlier runs."""

import contextlib
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def compiling_anew() -> Iterator[None]:
    """Uses no stored programs: those with collectives inside and beside of a loop could hang; see `launch.setup`."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()
