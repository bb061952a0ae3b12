"""How stages train: the loop, its optimisers and state, processes, and the files of a run folder."""
