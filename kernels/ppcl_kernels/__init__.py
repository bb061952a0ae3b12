"""Operations of an MMDiT block over only the heads and channels that are kept.

One operation, one file; each has a Triton kernel, called through a custom op that ``torch.compile`` and CUDA graphs
take, and a plain-torch ``*_reference``, which is its definition. What operations share (`matmul`, `heads`, `rope`,
`head_norm`, `modulation`, `tiles`) has files of its own. No diffusers inside.
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
