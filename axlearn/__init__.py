"""A JAX/XLA SPMD trainer in which everything is a hierarchical config."""

__version__ = "0.1.0"
