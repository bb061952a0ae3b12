"""A page on this machine that draws at any ratio: ``ppcl web``."""
