"""The program ``ppcl``, a file a command group."""
