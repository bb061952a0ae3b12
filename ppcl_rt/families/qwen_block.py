"""One MMDiT block of Qwen-Image at any width."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from torch import nn

from ppcl_rt import ops
from ppcl_rt.model.pluggable import DOWN, UP, Absent, BlockLayout
from ppcl_rt.planning.plan import Width

_PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
LAYOUT = BlockLayout(
    axes={
        **{f"attn.{name}.{part}": ("heads", 0) for name in _PROJECTIONS for part in ("weight", "bias")},
        **{f"img_mlp.net.0.proj.{part}": ("image", 0) for part in ("weight", "bias")},
        **{f"txt_mlp.net.0.proj.{part}": ("text", 0) for part in ("weight", "bias")},
        "attn.to_out.0.weight": ("heads", 1),
        "attn.to_add_out.weight": ("heads", 1),
        "img_mlp.net.2.weight": ("image", 1),
        "txt_mlp.net.2.weight": ("text", 1),
    },
    outputs={
        "attn_image": ("attn.to_out.0", "heads"),
        "attn_text": ("attn.to_add_out", "heads"),
        "mlp_image": ("img_mlp.net.2", "image"),
        "mlp_text": ("txt_mlp.net.2", "text"),
    },
    inputs={"image": "img_mlp.net.0.proj", "text": "txt_mlp.net.0.proj"},
    modulations={"image": "img_mod.1", "text": "txt_mod.1"},
    side_by_side=(
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ),
)


class PPCLQwenImageTransformerBlock(QwenImageTransformerBlock):
    """The stock block, over the first heads and channels in rank order.

    Modules, their names and the returned order (text, image) are those of diffusers. ``narrow`` holds what stands in
    for a part of the block at a narrower width (`BlockLayout`): output layers that least squares has compensated for
    what is left out (a width without one uses a prefix of the full layer), linear maps in place of MLPs, and
    modulations of a low rank.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.narrow = nn.ModuleDict()

    @property
    def width(self) -> Width:
        """What the modules hold: the widest that this block can run."""
        factored = DOWN in self.narrow and isinstance(self.img_mod[1], Absent)
        return Width(
            heads=self.attn.to_q.out_features // self.attention_head_dim,
            image=getattr(self.img_mlp.net[0].proj, "out_features", 0),
            text=getattr(self.txt_mlp.net[0].proj, "out_features", 0),
            modulation=self._factor(DOWN).out_features if factored else self.dim,
        )

    def _factor(self, name: str) -> nn.Linear:
        layer = self.narrow[name]
        assert isinstance(layer, nn.Linear), "factors are linear layers"
        return layer

    def _output(self, output: str, count: int) -> nn.Module:
        name = LAYOUT.narrow_name(output, count)
        return self.narrow[name] if name in self.narrow else self.get_submodule(LAYOUT.outputs[output][0])

    def _modulation(self, stream: str, temb: torch.Tensor, rank: int) -> tuple[torch.Tensor, ...]:
        """Shift, scale and gate of both halves of the block, ``[B, D]`` each, for ``temb [B, D]``."""
        stock = self.img_mod if stream == "image" else self.txt_mod
        if rank == temb.shape[-1]:
            return stock(temb).chunk(6, dim=-1)
        down, up = self._factor(DOWN), self._factor(UP[stream])
        shared = F.linear(stock[0](temb), down.weight[:rank], down.bias[:rank])
        return F.linear(shared, up.weight[:, :rank], up.bias).chunk(6, dim=-1)

    def text_input(self, text: torch.Tensor, temb: torch.Tensor, width: Width) -> torch.Tensor:
        """What this block projects the text's q, k and v from, ``[B, S_text, D]``: normalised and modulated."""
        shift, scale, *_ = self._modulation("text", temb[: len(text)], width.modulation)
        return ops.ada_layer_norm(text, self.txt_norm1, scale, shift)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: torch.Tensor | None = None,
        width: Width | None = None,
        text_input: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the block.

        Args:
            hidden_states: image stream ``[B, S_image, D]``.
            encoder_hidden_states: text stream ``[B, S_text, D]``.
            encoder_hidden_states_mask: boolean ``[B, S_text]``, true on tokens that count, or None.
            temb: timestep embedding ``[B, D]`` (``[2 B, D]`` with ``modulate_index``).
            image_rotary_emb: (image, text) rotations, complex ``[S, E / 2]`` or real ``[S, E / 2, 2]``.
            joint_attention_kwargs: accepted for the sake of callers; there is nothing that it could set.
            modulate_index: ``[B, S_image]``, which of two modulations an image token takes (Qwen-Image-Edit).
            width: what to run; None for all that the block holds.
            text_input: ``[B, S_text, D]``, what to project the text's q, k and v from, in a block that leaves the text
                stream alone (PPCL eq. 8): no text output, no text MLP; the text is returned as it came.

        Returns:
            (text, image) streams, in diffusers' order.
        """
        width, attn, head_dim = width or self.width, self.attn, self.attention_head_dim
        image, text = hidden_states, encoder_hidden_states
        still = text_input is not None
        image_mod = self._modulation("image", temb, width.modulation)
        image_shift1, image_scale1, image_gate1, image_shift2, image_scale2, image_gate2 = image_mod
        # A stream that is left alone is not modulated: then nothing below reads these.
        text_mod = image_mod if still else self._modulation("text", temb[: len(text)], width.modulation)
        text_shift1, text_scale1, text_gate1, text_shift2, text_scale2, text_gate2 = text_mod
        image_rope, text_rope = map(as_real, image_rotary_emb) if image_rotary_emb else (None, None)

        image_qkv = ops.Projection(attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        text_qkv = ops.Projection(
            attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k
        )
        if text_input is None:
            text_input = ops.ada_layer_norm(text, self.txt_norm1, text_scale1, text_shift1)
        normed_image = ops.ada_layer_norm(image, self.img_norm1, image_scale1, image_shift1, modulate_index)
        attended = ops.joint_attention(
            *ops.qkv_projection(
                [
                    ops.ProjectedStream(text_input, text_qkv, text_rope),
                    ops.ProjectedStream(normed_image, image_qkv, image_rope),
                ],
                width.heads,
                head_dim,
            ),
            key_mask=_joint_mask(encoder_hidden_states_mask, image.shape[1]),
            backend=attn.processor._attention_backend,
        )
        attended_text, attended_image = attended[:, : text.shape[1]], attended[:, text.shape[1] :]
        image_out, text_out = self._output("attn_image", width.heads), self._output("attn_text", width.heads)
        outs = [ops.Layer(image_out, attended_image, None, image_gate1, modulate_index, image)]
        outs += [] if still else [ops.Layer(text_out, attended_text, None, text_gate1, None, text)]
        image, text = (*ops.linears(outs), text)[:2]

        # What is not mapped of both streams goes up in one launch and down in one.
        after, ups, downs = {"text": text}, [], []
        for stream, x, norm, mlp, shift, scale, gate, index in (
            ("image", image, self.img_norm2, self.img_mlp, image_shift2, image_scale2, image_gate2, modulate_index),
            ("text", text, self.txt_norm2, self.txt_mlp, text_shift2, text_scale2, text_gate2, None),
        ):
            if still and stream == "text":
                continue
            count = getattr(width, stream)
            down = ops.Layer(self._output(f"mlp_{stream}", count), x, None, gate, index, residual=x)
            if count:
                normed = ops.ada_layer_norm(x, norm, scale, shift, index)
                ups.append(ops.Layer(mlp.net[0].proj, normed, count))
                downs.append((stream, down))
            else:
                # The map reads the stream as it is: no norm, no modulation, no gate (PPCL eq. 9).
                [after[stream]] = ops.linears([down._replace(gate=None, token_index=None)])
        if ups:
            hidden = ops.linears(ups, gelu=True)
            made = ops.linears([down._replace(x=x) for (_, down), x in zip(downs, hidden, strict=True)])
            after |= {stream: out for (stream, _), out in zip(downs, made, strict=True)}
        image, text = after["image"], after["text"]

        if image.dtype == torch.float16:
            image, text = image.clip(-65504, 65504), text.clip(-65504, 65504)
        return text, image


# diffusers' caches look blocks up by their exact class. They return (text, image).
TransformerBlockRegistry.register(
    PPCLQwenImageTransformerBlock,
    TransformerBlockMetadata(return_hidden_states_index=1, return_encoder_hidden_states_index=0),
)


def as_real(rotation: torch.Tensor) -> torch.Tensor:
    """Turn a complex rotation ``[S, E / 2]`` into cosine and sine ``[S, E / 2, 2]``."""
    return torch.view_as_real(rotation) if rotation.is_complex() else rotation


def _joint_mask(text_mask: torch.Tensor | None, image_tokens: int) -> torch.Tensor | None:
    if text_mask is None:
        return None
    return torch.cat([text_mask, text_mask.new_ones(text_mask.shape[0], image_tokens)], dim=1)
