"""Whole pipelines: prompts to pictures, at any ratio."""
