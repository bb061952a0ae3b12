"""What training has to know of a model family, one file each."""
