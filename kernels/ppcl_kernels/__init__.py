"""Operations of an MMDiT block that compute only the heads and channels that a plan keeps.

One file holds one operation: a plain-torch ``*_reference``, which defines the result, and a Triton kernel behind a
custom op that works under ``torch.compile`` and in CUDA graphs. Code that operations share is in `matmul`, `heads`,
`rope`, `head_norm`, `modulation` and `tiles`. Nothing here imports diffusers.
"""

from ppcl_kernels.ada_layer_norm import ada_layer_norm, ada_layer_norm_reference
from ppcl_kernels.gated_residual import gated_residual, gated_residual_reference
from ppcl_kernels.heads import norm_rope_reference
from ppcl_kernels.joint_attention import joint_attention, joint_attention_reference
from ppcl_kernels.launch import Target, can_run
from ppcl_kernels.linear import Linear, grouped_linear, linear, linear_reference
from ppcl_kernels.mlp import Mlp, grouped_mlp, mlp, mlp_reference
from ppcl_kernels.modulation import per_token
from ppcl_kernels.norm_rope import norm_rope
from ppcl_kernels.qkv_projection import Stream, qkv_projection, qkv_projection_reference
from ppcl_kernels.rope import apply_rope_reference

__all__ = [
    "Linear",
    "Mlp",
    "Stream",
    "Target",
    "ada_layer_norm",
    "ada_layer_norm_reference",
    "apply_rope_reference",
    "can_run",
    "gated_residual",
    "gated_residual_reference",
    "grouped_linear",
    "grouped_mlp",
    "joint_attention",
    "joint_attention_reference",
    "linear",
    "linear_reference",
    "mlp",
    "mlp_reference",
    "norm_rope",
    "norm_rope_reference",
    "per_token",
    "qkv_projection",
    "qkv_projection_reference",
]
