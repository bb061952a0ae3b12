"""Races of whole forwards, and a sweep over the widths of a block (`bench_gpu_model`).

This file imports nothing, so that the parent of the measuring processes need not import torch.
"""

# Exit status of a process that lost its device.
FAULT = 3
