"""Races of the implementations of every operation, at the shapes that a block asks for (`bench_kernels`)."""

# Exit status of a process that lost its device.
LOST = 3
