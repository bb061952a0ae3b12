"""Qwen-Image at any ratio: diffusers' class, walking a program instead of all its blocks."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch

# ModelMixin is for diffusers: a pipeline that loads a class of another package looks for it in the class's module.
from diffusers import ModelMixin, QwenImageTransformer2DModel  # noqa: F401
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from diffusers.utils import apply_lora_scale

from ppcl_rt.families.qwen_block import LAYOUT, PPCLQwenImageTransformerBlock, as_real
from ppcl_rt.model.pluggable import Pluggable
from ppcl_rt.model.program import Program
from ppcl_rt.planning.catalog import Shape
from ppcl_rt.planning.plan import Width


class PPCLQwenImageTransformer2DModel(Pluggable, QwenImageTransformer2DModel):
    """A `QwenImageTransformer2DModel` that runs at any ratio.

    Built by hand it is the dense model; `load` (or ``from_pretrained``) reads a checkpoint at a ratio. Arguments are
    those of the diffusers class.
    """

    family = "qwen-image"
    stock_name = "QwenImageTransformer2DModel"
    layout = LAYOUT
    _no_split_modules = ["PPCLQwenImageTransformerBlock"]
    _repeated_blocks = ["PPCLQwenImageTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 64,
        out_channels: int | None = 16,
        num_layers: int = 60,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 3584,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        zero_cond_t: bool = False,
        use_additional_t_cond: bool = False,
        use_layer3d_rope: bool = False,
    ) -> None:
        if sum(axes_dims_rope) != attention_head_dim:
            raise ValueError(f"axes_dims_rope {list(axes_dims_rope)} does not add up to heads of {attention_head_dim}")
        # No stock blocks: at 20B parameters, building them only to throw them away would take minutes.
        super().__init__(
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=0,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=axes_dims_rope,
            zero_cond_t=zero_cond_t,
            use_additional_t_cond=use_additional_t_cond,
            use_layer3d_rope=use_layer3d_rope,
        )
        self.register_to_config(num_layers=num_layers)
        self.transformer_blocks.extend(self.make_block(self.config) for _ in range(num_layers))
        self._become_pluggable()

    @classmethod
    def make_block(cls, config: Mapping[str, Any]) -> PPCLQwenImageTransformerBlock:
        """Build one block at full width."""
        return PPCLQwenImageTransformerBlock(
            dim=config["num_attention_heads"] * config["attention_head_dim"],
            num_attention_heads=config["num_attention_heads"],
            attention_head_dim=config["attention_head_dim"],
            zero_cond_t=config["zero_cond_t"],
        )

    @classmethod
    def shape_of(cls, config: Mapping[str, Any], outer_params: int) -> Shape:
        """Dimensions of the dense model."""
        dim = config["num_attention_heads"] * config["attention_head_dim"]
        return Shape(
            depth=config["num_layers"],
            dim=dim,
            head_dim=config["attention_head_dim"],
            width=Width(config["num_attention_heads"], 4 * dim, 4 * dim, dim),
            outer_params=outer_params,
        )

    def adopt(self, block: Any) -> None:
        """Take over the attention backend of the blocks that are there."""
        for other in [*self.transformer_blocks, *self.students.values()]:
            block.attn.processor._attention_backend = other.attn.processor._attention_backend

    def set_attn_processor(self, processor: Any) -> None:
        """Refuse a processor other than the stock one: attention over kept heads alone has no use for it.

        Raises:
            ValueError: any other processor. Backends are chosen with ``set_attention_backend``, which works.
        """
        given = processor.values() if isinstance(processor, dict) else [processor]
        if any(type(each) is not QwenDoubleStreamAttnProcessor2_0 for each in given):
            raise ValueError("attention processors are not called here: use set_attention_backend to choose a kernel")
        super().set_attn_processor(processor)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        img_shapes: list[Any] | None = None,
        guidance: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: Sequence[torch.Tensor] | None = None,
        additional_t_cond: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict; arguments and result are those of the diffusers class.

        Args:
            hidden_states: latents ``[B, S_image, in_channels]``.
            encoder_hidden_states: prompt embeddings ``[B, S_text, joint_attention_dim]``.
            encoder_hidden_states_mask: ``[B, S_text]``, true (or 1) on tokens that count, in any pattern; None for all.
            timestep: ``[B]`` in [0, 1], not 0..1000.
            img_shapes: a sample's images as (frames, rows, columns) of tokens.
            controlnet_block_samples: residuals ``[B, S_image, D]``, spread over the original blocks; what stands for an
                interval takes those of all its blocks, a skipped block takes its own.
            additional_t_cond: ``[B]``, for models with ``use_additional_t_cond``.
        """
        assert timestep is not None and img_shapes is not None, "diffusers' signature has defaults that it cannot use"
        program = self._program(timestep)
        mask = encoder_hidden_states_mask
        if mask is not None:
            wanted = encoder_hidden_states.shape[:2]
            if mask.shape != wanted:
                raise ValueError(f"encoder_hidden_states_mask is {list(mask.shape)}, the text {list(wanted)}")
            mask = mask.to(torch.bool)
        if guidance is not None:
            raise ValueError("Qwen-Image has no embedding for guidance: leave it out")
        # Made from numbers of the host, or kept in a cache of diffusers': inputs, so that no graph holds them.
        modulate_index = None
        if self.zero_cond_t:
            modulate_index = torch.tensor(
                [[0] * math.prod(shapes[0]) + [1] * sum(map(math.prod, shapes[1:])) for shapes in img_shapes],
                device=hidden_states.device,
            )
        rotations = self.pos_embed(
            img_shapes, max_txt_seq_len=encoder_hidden_states.shape[1], device=hidden_states.device
        )
        output = self._run(
            program,
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            mask=mask,
            timestep=timestep,
            rope=tuple(map(as_real, rotations)),
            modulate_index=modulate_index,
            attention_kwargs=attention_kwargs,
            controlnet_block_samples=controlnet_block_samples,
            additional_t_cond=additional_t_cond,
        )
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _conditions(self, program: Program) -> Hashable:
        """Attention backends, as set on the blocks and by diffusers' context manager."""
        blocks: list[Any] = [step.module for step in program.steps]
        chosen = tuple(block.attn.processor._attention_backend for block in blocks)
        return (super()._conditions(program), chosen, _AttentionBackendRegistry.get_active_backend()[0])

    def _walk(  # type: ignore[override]
        self,
        program: Program,
        *,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        mask: torch.Tensor | None,
        timestep: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        modulate_index: torch.Tensor | None,
        attention_kwargs: dict[str, Any] | None,
        controlnet_block_samples: Sequence[torch.Tensor] | None,
        additional_t_cond: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run a program.

        Args as in `forward`, but ``mask`` is boolean, ``rope`` is the rotations of image and text ``[S, E / 2, 2]``,
        and ``modulate_index [B, S_image]`` says which of two timesteps an image token takes.
        """
        image = self.img_in(hidden_states)
        timestep = timestep.to(image.dtype)
        if self.zero_cond_t:
            timestep = torch.cat([timestep, torch.zeros_like(timestep)])
        text = self.txt_in(self.txt_norm(encoder_hidden_states))
        temb = self.time_text_embed(timestep, image, additional_t_cond)

        done, kept_input = 0, text
        for step in program.steps:
            image = self._add_control(image, controlnet_block_samples, range(done, step.blocks.first))
            text_input = None
            if step.text is not None and step.text.begins:
                kept_input = step.module.text_input(text, temb, step.width)  # type: ignore[operator]
            elif step.text is not None and step.text.reads is not None:
                text_input = kept_input + step.text.reads(kept_input)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                text, image = self._gradient_checkpointing_func(
                    step.module, image, text, mask, temb, rope, attention_kwargs, modulate_index, step.width, text_input
                )
            else:
                text, image = step.module(
                    hidden_states=image,
                    encoder_hidden_states=text,
                    encoder_hidden_states_mask=mask,
                    temb=temb,
                    image_rotary_emb=rope,
                    joint_attention_kwargs=attention_kwargs,
                    modulate_index=modulate_index,
                    width=step.width,
                    # Only where there is one: hooks of others know the call as it is in diffusers.
                    **({} if text_input is None else {"text_input": text_input}),
                )
            if step.text is not None and step.text.moves_on is not None:
                text = text + step.text.moves_on(text)
            done = step.blocks.last + 1
            image = self._add_control(image, controlnet_block_samples, step.blocks)
        image = self._add_control(image, controlnet_block_samples, range(done, program.plan.depth))

        output: torch.Tensor = self.proj_out(self.norm_out(image, temb[: len(image)]))
        return output

    def _add_control(self, image: torch.Tensor, samples: Sequence[torch.Tensor] | None, blocks: Any) -> torch.Tensor:
        """Add the ControlNet residuals that follow these blocks."""
        if samples is not None:
            share = math.ceil(self.config.num_layers / len(samples))
            for block in blocks:
                image = image + samples[block // share]
        return image
