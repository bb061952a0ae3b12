"""Checkpoint folders: reading, writing, and formats of the past."""
