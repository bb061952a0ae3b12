"""Emoji: text to pictures of OpenMoji at 64 x 64, drawn through a whole diffusers pipeline, with a judge."""
