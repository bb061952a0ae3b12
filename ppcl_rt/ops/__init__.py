"""The one seam between models and kernels: every operation of a block goes through here, on modules and on counts.

Modules hold their heads and channels in rank order, so a count means a prefix. A function takes what modules hold to
an `Operation`, which picks the implementation; what no kernel may read (adapters, hooks, quantised weights, gradients,
autocast) goes through the modules themselves, in plain torch.
"""

from ppcl_rt.ops.ada_layer_norm import ada_layer_norm
from ppcl_rt.ops.joint_attention import joint_attention
from ppcl_rt.ops.linear import Layer, linears
from ppcl_rt.ops.modules import Streams, linear
from ppcl_rt.ops.operation import OPERATIONS, Operation, forget
from ppcl_rt.ops.qkv_projection import ProjectedStream, Projection, qkv_projection

__all__ = [
    "OPERATIONS",
    "Layer",
    "Operation",
    "ProjectedStream",
    "Projection",
    "Streams",
    "ada_layer_norm",
    "forget",
    "joint_attention",
    "linear",
    "linears",
    "qkv_projection",
]
