"""Recipes for decoder-only language models."""
