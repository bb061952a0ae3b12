"""Qwen-Image at any ratio: what its blocks are made of, a block at any width, and diffusers' class over a program.

Every block updates two streams: image tokens and text tokens (MMDiT). Its groups are ``heads`` (of both streams
together), ``image`` and ``text`` (the channels of each stream's MLP), and ``modulation`` (the rank of both streams'
modulations).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

# ModelMixin is for diffusers: a pipeline that loads a class of another package looks for it in the class's module.
from diffusers import ModelMixin, QwenImageTransformer2DModel  # noqa: F401
from diffusers.configuration_utils import register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    QwenImageTransformerBlock,
)
from diffusers.utils import apply_lora_scale

from ppcl_rt.checkpoint.composed import ComposedCheckpoint
from ppcl_rt.families import qwen_image_authors
from ppcl_rt.families.attending import PPCLAttention
from ppcl_rt.families.mmdit import (
    KEY_MASK,
    Attending,
    Control,
    Layers,
    MMDiT,
    TwoStreamBlock,
    in_range,
    joint_mask,
    residual_after,
    sides,
    two_stream_numbers,
    two_stream_spec,
)
from ppcl_rt.model.exchange import Original, Shapes
from ppcl_rt.model.program import Program
from ppcl_rt.planning.architecture import Architecture, BlockList, Tokens
from ppcl_rt.planning.block_spec import BlockSpec, Stream
from ppcl_rt.planning.width import Width

# The one kind of block.
_KIND = "two-stream"
# Where diffusers keeps the layers of each stream.
_LAYERS: Mapping[Stream, Layers] = {
    "image": Layers("img_mod.1", "img_norm1", "img_norm2", "img_mlp"),
    "text": Layers("txt_mod.1", "txt_norm1", "txt_norm2", "txt_mlp"),
}


def block_spec(
    dim: int, heads: int, head_dim: int, image_channels: int | None = None, text_channels: int | None = None
) -> BlockSpec:
    """What a block is made of; streams have width ``dim``, and MLPs ``4 * dim`` channels unless told otherwise."""
    channels: dict[Stream, int] = {"image": image_channels or 4 * dim, "text": text_channels or 4 * dim}
    return two_stream_spec(dim, heads, head_dim, _LAYERS, channels)


class PPCLQwenImageTransformerBlock(TwoStreamBlock, QwenImageTransformerBlock):
    """The stock block, over the first heads and channels in rank order (`TwoStreamBlock`).

    Modules, their names and the returned order (text, image) are those of diffusers.
    """

    # Of the stock block.
    dim: int
    attention_head_dim: int

    layers = _LAYERS
    stock_processor = QwenDoubleStreamAttnProcessor2_0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attn.__class__ = PPCLAttention
        heads = self.attn.to_q.out_features // self.attention_head_dim
        self.become_pluggable(block_spec(self.dim, heads, self.attention_head_dim))

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
        modulations: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the block; arguments and result as in `TwoStreamBlock.run_streams`, but for these.

        Args:
            encoder_hidden_states_mask: boolean ``[B, S_text]``, true on tokens that count, or None.
            image_rotary_emb: (image, text) rotations, complex ``[S, E / 2]`` or real ``[S, E / 2, 2]``.
            joint_attention_kwargs: under ``key_mask`` what a forward makes once for all blocks, the mask of both
                streams ``[B, S_text + S_image]``; there is nothing else that it could set.
            modulate_index: ``[B, S_image]``, which of two modulations an image token takes (Qwen-Image-Edit).
        """
        key_mask = (joint_attention_kwargs or {}).get(KEY_MASK)
        if key_mask is None:
            key_mask = joint_mask(encoder_hidden_states_mask, hidden_states.shape[1])
        image_rope, text_rope = image_rotary_emb or (None, None)
        text, image = self.run_streams(
            hidden_states,
            encoder_hidden_states,
            temb,
            rotations=None if image_rope is None or text_rope is None else (as_real(image_rope), as_real(text_rope)),
            key_mask=key_mask,
            width=width,
            text_input=text_input,
            modulations=modulations,
            token_index=modulate_index,
        )
        return in_range(text), in_range(image)

    def processor_arguments(self, inputs: Attending) -> dict[str, Any]:
        """See `TwoStreamBlock.processor_arguments`."""
        key_mask, rotations, text_tokens = inputs.key_mask, inputs.rotations, inputs.text.shape[1]
        return {
            "encoder_hidden_states_mask": None if key_mask is None else key_mask[:, :text_tokens],
            "attention_mask": key_mask,
            "image_rotary_emb": None if rotations is None else tuple(map(torch.view_as_complex, rotations)),
        }


# diffusers' caches look blocks up by their exact class. They return (text, image).
TransformerBlockRegistry.register(
    PPCLQwenImageTransformerBlock,
    TransformerBlockMetadata(return_hidden_states_index=1, return_encoder_hidden_states_index=0),
)


def as_real(rotation: torch.Tensor) -> torch.Tensor:
    """Turn a complex rotation ``[S, E / 2]`` into cosine and sine ``[S, E / 2, 2]``."""
    return torch.view_as_real(rotation) if rotation.is_complex() else rotation


def _in_one_piece(image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotations of image and text; on a CPU, as pieces of one tensor: text, then image."""
    if image.device.type != "cpu":
        return image, text
    joint = torch.cat([text, image])
    return joint[len(text) :], joint[: len(text)]


class PPCLQwenImageTransformer2DModel(MMDiT, QwenImageTransformer2DModel):
    """A `QwenImageTransformer2DModel` that runs at any ratio.

    Built by hand it is the dense model; `load` (or ``from_pretrained``) reads a checkpoint at a ratio. Arguments are
    those of the diffusers class.
    """

    # Of the stock class.
    transformer_blocks: torch.nn.ModuleList
    img_in: torch.nn.Module
    txt_in: torch.nn.Module
    txt_norm: torch.nn.Module
    pos_embed: torch.nn.Module
    time_text_embed: torch.nn.Module
    norm_out: torch.nn.Module
    proj_out: torch.nn.Module

    family = "qwen-image"
    # 1024 x 1024 pixels in patches of 16 x 16.
    reference = Tokens(image=4096, text=512)
    stock_name = "QwenImageTransformer2DModel"
    stock_processor = PPCLQwenImageTransformerBlock.stock_processor
    gguf_architecture = "qwen_image"
    lora_loader = "QwenImageLoraLoaderMixin"
    splits_tokens = True
    # Unlike diffusers' plan, at no block: the first may be left out.
    _cp_plan = {
        "img_in": {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)},
        "txt_in": {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)},
        "pos_embed": {place: ContextParallelInput(split_dim=0, expected_dims=2, split_output=True) for place in (0, 1)},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }
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
        self.fill_lists(transformer_blocks=[_KIND] * num_layers)
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
        self.become_pluggable()

    @classmethod
    def opened(cls, folder: Path, variant: str | None = None) -> ComposedCheckpoint:
        """See `Opening.opened`; the authors' layout names the stock class, which would leave weights out."""
        source = super().opened(folder, variant)
        return qwen_image_authors.presented(cls, source) if qwen_image_authors.is_packaged(source) else source

    @classmethod
    def make_block(cls, config: Mapping[str, Any], kind: str) -> PPCLQwenImageTransformerBlock:
        """Build one block at full width."""
        return PPCLQwenImageTransformerBlock(
            dim=config["num_attention_heads"] * config["attention_head_dim"],
            num_attention_heads=config["num_attention_heads"],
            attention_head_dim=config["attention_head_dim"],
            zero_cond_t=config["zero_cond_t"],
        )

    @classmethod
    def architecture_of(cls, config: Mapping[str, Any], outer_params: int) -> Architecture:
        """What the dense model is made of."""
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        return _architecture(config["num_layers"], heads, head_dim, outer_params)

    @classmethod
    def architecture_of_format_1(cls, shape: Mapping[str, Any]) -> Architecture:
        """What the ``shape`` in a catalog of format 1 says.

        Raises:
            ValueError: its numbers contradict each other.
        """
        heads, head_dim = shape["width"][0], shape["head_dim"]
        architecture = _architecture(shape["depth"], heads, head_dim, shape["outer_params"])
        dim, wanted = shape["dim"], list(architecture.kinds[_KIND].full.values())
        if dim != heads * head_dim or list(shape["width"]) != wanted:
            raise ValueError(f"a model of width {dim} has blocks of {wanted}, not {list(shape['width'])}")
        return architecture

    @classmethod
    def originals(cls, shapes: Shapes) -> dict[str, Original]:
        """See `Exchange.originals`: it was first published under diffusers' names."""
        return {name: Original((name,)) for name in shapes}

    def example(self, tokens: Tokens) -> dict[str, Any]:
        """See `Residency.example`; the image is as nearly square as its number of tokens allows."""
        like = next(self.parameters())
        rows, columns = sides(tokens.image)

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=like.device, dtype=like.dtype)

        return {
            "hidden_states": noise(tokens.batch, tokens.image, self.config.in_channels),
            "encoder_hidden_states": noise(tokens.batch, tokens.text, self.config.joint_attention_dim),
            "timestep": torch.full((tokens.batch,), 0.5, device=like.device),
            "img_shapes": [[(1, rows, columns)]] * tokens.batch,
            "return_dict": False,
        }

    @classmethod
    def activation_bytes(cls, config: Mapping[str, Any], tokens: Tokens, itemsize: int) -> int:
        """See `Residency.activation_bytes`.

        Of the forward: the inputs, the text of the first block of a text run, two copies of the rotations, the key
        mask, and where tokens choose between two modulations, their index; and what a block holds
        (`two_stream_numbers`).

        Fused kernels hold less. Adapters, ControlNet and what an attention backend allocates are not counted.
        """
        image, text = tokens.batch * tokens.image, tokens.batch * tokens.text
        dim, wide = config["num_attention_heads"] * config["attention_head_dim"], 4 / itemsize
        outer = image * config["in_channels"] + text * (config["joint_attention_dim"] + dim)
        outer += 2 * (tokens.image + tokens.text) * config["attention_head_dim"] * wide + (image + text) / itemsize
        if config["zero_cond_t"]:
            outer += image * 8 / itemsize
        block = two_stream_numbers(tokens, dim, wide, timesteps=2 if config["zero_cond_t"] else 1)
        return math.ceil(itemsize * (outer + block))

    @classmethod
    def latents_of(cls, vae: Mapping[str, Any], tokens: Tokens) -> tuple[int, ...]:
        """See `Residency.latents_of`; a token is 2 x 2 latents of one frame, the image as nearly square as can be."""
        rows, columns = sides(tokens.image)
        return (tokens.batch, vae["z_dim"], 1, 2 * rows, 2 * columns)

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
        if self._parallel_config is not None and (mask is not None or self.zero_cond_t):
            raise ValueError(
                "with context parallel, the text has no mask and there are no reference images: leave "
                "encoder_hidden_states_mask out where all tokens count, or run on one device"
            )
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
            rope=_in_one_piece(*map(as_real, rotations)),
            modulate_index=modulate_index,
            # Without the scale of adapters, which diffusers takes out of it.
            attention_kwargs=attention_kwargs or None,
            controlnet_block_samples=controlnet_block_samples,
            additional_t_cond=additional_t_cond,
            rows=self._rows(program, self._conditions_of(timestep.to(hidden_states.dtype))),
        )
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def embed_timesteps(self, timesteps: torch.Tensor) -> torch.Tensor:
        """See `Modulations.embed_timesteps`."""
        if self.config.use_additional_t_cond:
            return super().embed_timesteps(timesteps)
        return self.time_text_embed(timesteps, next(self.parameters()))

    def every_condition(
        self, timesteps: torch.Tensor, pooled: torch.Tensor | None = None, guidance: Sequence[float] = ()
    ) -> torch.Tensor:
        """See `Modulations.every_condition`: with each value of the additional condition, where there is one."""
        if not self.config.use_additional_t_cond:
            return super().every_condition(timesteps, pooled, guidance)
        additional: Any = self.time_text_embed.addition_t_embedding
        values = range(additional.num_embeddings)
        each = [timesteps.new_full(timesteps.shape, value, dtype=torch.long) for value in values]
        like = next(self.parameters())
        return torch.cat([self.time_text_embed(timesteps, like, value) for value in each])

    def _conditions_of(self, timestep: torch.Tensor) -> torch.Tensor:
        """The timesteps ``[B]`` of a batch; with those of its reference images ``[2 B]``."""
        return torch.cat([timestep, torch.zeros_like(timestep)]) if self.zero_cond_t else timestep

    def _conditions(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Timestep 0 too, where tokens of a reference image take it."""
        return torch.cat([timesteps, timesteps.new_zeros(1)]) if self.zero_cond_t else timesteps

    def _walk(  # type: ignore[override]  # names the inputs of `Pluggable._walk`
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
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run a program.

        Args as in `forward`, but ``mask`` is boolean, ``rope`` is the rotations of image and text ``[S, E / 2, 2]``,
        and ``modulate_index [B, S_image]`` says which of two timesteps an image token takes;
        ``rows`` are those of `Modulations`, None where modulations have to be computed.
        """
        # In a list, from which the walk takes it: nobody else then holds on to the image as it was at first.
        entered = [self.img_in(hidden_states)]
        timestep = self._conditions_of(timestep.to(entered[0].dtype))
        known: Sequence[Mapping[str, torch.Tensor] | None] | None = None
        if rows is None:
            temb = self.time_text_embed(timestep, entered[0], additional_t_cond)
        else:
            temb, known = self._from_rows(program, rows.expand(len(timestep), -1))
        if mask is not None:
            # Made once a forward.
            attention_kwargs = {**(attention_kwargs or {}), KEY_MASK: joint_mask(mask, hidden_states.shape[1])}
        image = self._walk_blocks(
            program,
            entered.pop(),
            self.txt_in(self.txt_norm(encoder_hidden_states)),
            temb,
            known,
            control=self._control(controlnet_block_samples),
            encoder_hidden_states_mask=mask,
            image_rotary_emb=rope,
            joint_attention_kwargs=attention_kwargs,
            modulate_index=modulate_index,
        )
        output: torch.Tensor = self.proj_out(self.norm_out(image, temb[: len(image)]))
        return output

    def _control(self, samples: Sequence[torch.Tensor] | None) -> Control | None:
        """ControlNet residuals by block."""
        if samples is None:
            return None
        return lambda block: residual_after(samples, block, self.config.num_layers)


def _architecture(depth: int, heads: int, head_dim: int, outer_params: int) -> Architecture:
    return Architecture(
        lists=(BlockList(path="transformer_blocks", kind=_KIND, depth=depth),),
        kinds={_KIND: block_spec(heads * head_dim, heads, head_dim)},
        dim=heads * head_dim,
        outer_params=outer_params,
    )
