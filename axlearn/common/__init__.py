"""Layers, models, data, checkpoints and the trainer: one module or package for each public name."""
