"""Operations of an MMDiT block over only the heads and channels that are kept.

One operation, one file; each has a plain-torch ``*_reference``, which is its definition. No diffusers inside.
"""

from ppcl_kernels.ada_layer_norm import ada_layer_norm_reference, gated_residual_reference
from ppcl_kernels.joint_attention import joint_attention_reference
from ppcl_kernels.linear import linear_reference
from ppcl_kernels.mlp import mlp_reference
from ppcl_kernels.qkv_projection import apply_rope_reference, qkv_projection_reference

__all__ = [
    "ada_layer_norm_reference",
    "apply_rope_reference",
    "gated_residual_reference",
    "joint_attention_reference",
    "linear_reference",
    "mlp_reference",
    "qkv_projection_reference",
]
