"""Checkpoints from other layouts, and into them."""
