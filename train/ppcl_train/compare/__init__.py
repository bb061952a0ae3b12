"""Comparison with other ways to make a model smaller."""
