"""CUDA graphs of whole forwards: launches that python has made once are replayed instead of being made again.

A graph reads the memory that it was captured on: copies of the inputs, which every replay fills anew, and the weights.
So a graph is valid for one program, one set of input shapes, and the weights of its capture. Before each replay the
model is compared with its `Weights` at the capture. If weights were read again, moved, replaced or adapted since, all
graphs are dropped. A weight that is trained in place keeps its address: the next replay reads its new values.

Nothing here knows a model family: a forward is a callable, a tree of inputs and the modules that it reads.

``graphs.py`` decides whether a forward is replayed, captured or run eagerly; ``obstacles.py`` says why a forward can
have no graph; ``keys.py`` tells one graph from another; ``weights.py`` notices changed weights; ``meter.py`` finds
forwards that wait for the host; ``backend.py`` says what captures and replays, and ``cuda.py`` does so on CUDA.
"""

from ppcl_rt.model.graphs.backend import Backend, GraphHandle, Mark
from ppcl_rt.model.graphs.cuda import CUDA, Cuda
from ppcl_rt.model.graphs.graphs import CapturedGraph, Graphs, Mode, check_mode
from ppcl_rt.model.graphs.meter import Meter
from ppcl_rt.model.graphs.weights import Weights

__all__ = [
    "CUDA",
    "Backend",
    "CapturedGraph",
    "Cuda",
    "GraphHandle",
    "Graphs",
    "Mark",
    "Meter",
    "Mode",
    "Weights",
    "check_mode",
]
