"""Ways to choose what is replaced, one file each."""
