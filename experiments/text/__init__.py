"""Recipes for text models."""
