"""Scenes: a task of captioned 16x16 images with an exact judge."""
