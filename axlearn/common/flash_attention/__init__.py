"""Attention by fused kernels: the layer, the modifier of its block sizes, and what to save for the backward pass."""
