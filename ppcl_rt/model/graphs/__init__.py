"""CUDA graphs of whole forwards."""

from ppcl_rt.model.graphs.graphs import CUDA, Cuda, Graphs, Meter, Mode, Weights, check_mode

__all__ = ["CUDA", "Cuda", "Graphs", "Meter", "Mode", "Weights", "check_mode"]
