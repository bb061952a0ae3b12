"""The training loop, processes, and the files of a run."""
