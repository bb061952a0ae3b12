"""Operations of a block: the only place where models and kernels meet.

The functions below take modules, whose heads and channels are in rank order, and counts: a count means the first so
many units. A function reads the weights of its modules and hands tensors to an `Operation`, which chooses an
implementation and runs it. What adapters add is among the tensors, as two matrices for each layer (``stacked.py``).
Where a kernel may not read the weights (hooks, quantised weights) or cannot do what is asked (gradients, autocast), the
function calls the modules themselves, in plain torch.

``operation.py`` dispatches calls, one file an operation defines its implementations, ``table.py`` knows which is the
fastest.
"""

from ppcl_rt.ops.ada_layer_norm import ada_layer_norm
from ppcl_rt.ops.joined import Columns, joined
from ppcl_rt.ops.joint_attention import joint_attention
from ppcl_rt.ops.linear import Layer, linears
from ppcl_rt.ops.modules import Branch, Streams, adapted, linear
from ppcl_rt.ops.operation import OPERATIONS, Operation, drop_prepared_calls
from ppcl_rt.ops.qkv_projection import ProjectedStream, Projection, qkv_projection
from ppcl_rt.ops.stacked import let_go, settled

__all__ = [
    "OPERATIONS",
    "Branch",
    "Columns",
    "Layer",
    "Operation",
    "ProjectedStream",
    "Projection",
    "Streams",
    "ada_layer_norm",
    "adapted",
    "drop_prepared_calls",
    "joined",
    "joint_attention",
    "let_go",
    "linear",
    "linears",
    "qkv_projection",
    "settled",
]
