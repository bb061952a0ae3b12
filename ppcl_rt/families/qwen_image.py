"""Qwen-Image at any ratio: what its blocks are made of, a block at any width, and diffusers' class over a program.

Every block updates two streams: image tokens and text tokens (MMDiT). Its groups are ``heads`` (of both streams
together), ``image`` and ``text`` (the channels of each stream's MLP), and ``modulation`` (the rank of both streams'
modulations).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch

# ModelMixin is for diffusers: a pipeline that loads a class of another package looks for it in the class's module.
from diffusers import ModelMixin, QwenImageTransformer2DModel  # noqa: F401
from diffusers.configuration_utils import register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    QwenImageTransformerBlock,
)
from diffusers.utils import apply_lora_scale

from ppcl_rt import ops
from ppcl_rt.model.block import PluggableBlock
from ppcl_rt.model.pluggable import Pluggable
from ppcl_rt.model.program import BlockCall, Program
from ppcl_rt.planning.architecture import Architecture, BlockList, Tokens
from ppcl_rt.planning.block_spec import BlockSpec, Group, Part, Segment
from ppcl_rt.planning.width import LINEAR_MAP, Width

# The one kind of block.
_KIND = "two-stream"
# Where blocks find the mask of all keys, text first.
_KEY_MASK = "key_mask"
# What diffusers calls the layers of each stream.
_MODULES = {"image": "img", "text": "txt"}


def block_spec(
    dim: int, heads: int, head_dim: int, image_channels: int | None = None, text_channels: int | None = None
) -> BlockSpec:
    """What a block is made of; streams have width ``dim``, and MLPs ``4 * dim`` channels unless told otherwise."""
    channels = {"image": image_channels or 4 * dim, "text": text_channels or 4 * dim}

    def projection(path: str, stream: Literal["image", "text"]) -> Part:
        segments = (Segment("heads", 0, head_dim),)
        return Part(path=path, rows=heads * head_dim, columns=dim, axis=0, segments=segments, stream=stream)

    parts = [projection(f"attn.{path}", "image") for path in ("to_q", "to_k", "to_v")]
    parts += [projection(f"attn.{path}", "text") for path in ("add_q_proj", "add_k_proj", "add_v_proj")]
    streams: tuple[Literal["image", "text"], ...] = ("image", "text")
    for stream, path in zip(streams, ("attn.to_out.0", "attn.to_add_out")):
        segments = (Segment("heads", 0, head_dim),)
        parts.append(
            Part(
                name=f"attn_{stream}",
                path=path,
                rows=dim,
                columns=heads * head_dim,
                axis=1,
                segments=segments,
                stream=stream,
                updates=stream,
            )
        )
    for stream in streams:
        mlp, segments = f"{_MODULES[stream]}_mlp", (Segment(stream, 0, 1),)
        where: dict[str, Any] = {"segments": segments, "stream": stream, "updates": stream}
        parts.append(Part(path=f"{mlp}.net.0.proj", rows=channels[stream], columns=dim, axis=0, **where))
        parts.append(
            Part(name=f"mlp_{stream}", path=f"{mlp}.net.2", rows=dim, columns=channels[stream], axis=1, **where)
        )
    for stream in streams:
        parts.append(
            Part(
                name=f"modulation_{stream}",
                path=f"{_MODULES[stream]}_mod.1",
                rows=6 * dim,
                columns=dim,
                stream="sample",
                updates=stream,
                factored="modulation",
            )
        )
    return BlockSpec(
        dim=dim,
        head_dim=head_dim,
        groups={
            "heads": Group(count=heads),
            "image": Group(count=channels["image"], mappable=True, updates="image"),
            "text": Group(count=channels["text"], mappable=True, updates="text"),
            "modulation": Group(count=dim, is_rank=True),
        },
        parts=tuple(parts),
        # The norms of q and k, of both streams.
        other_params=4 * head_dim,
        may_leave=("text",),
    )


class Modulation(NamedTuple):
    """What the timestep does to one half of a block, ``[B, D]`` each."""

    shift: torch.Tensor
    scale: torch.Tensor
    gate: torch.Tensor


class UpdatedStream(NamedTuple):
    """One stream on its way through a block.

    Attributes:
        name: image or text.
        x: ``[B, S, D]``.
        attention, mlp: modulations of the block's two halves.
        token_index: ``[B, S]``, which of two modulations a token takes (Qwen-Image-Edit), or None.
    """

    name: str
    x: torch.Tensor
    attention: Modulation
    mlp: Modulation
    token_index: torch.Tensor | None = None


class PPCLQwenImageTransformerBlock(PluggableBlock, QwenImageTransformerBlock):
    """The stock block, over the first heads and channels in rank order.

    Modules, their names and the returned order (text, image) are those of diffusers. ``replacements`` holds what runs
    in place of a part at a narrower width: output layers that least squares has compensated for what is left out (a
    width without one uses a prefix of the full layer), linear maps in place of MLPs, and modulations of a low rank.
    """

    # Of the stock block.
    attn: Any
    dim: int
    attention_head_dim: int

    side_by_side = (
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        heads = self.attn.to_q.out_features // self.attention_head_dim
        self.become_pluggable(block_spec(self.dim, heads, self.attention_head_dim))

    def modulations(
        self, stream: str, temb: torch.Tensor, width: Width, known: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[Modulation, Modulation]:
        """The modulations of both halves of the block, for ``temb [B, D]``; those that are ``known`` are taken."""
        name = f"modulation_{stream}"
        if known is not None:
            product = known[name][: len(temb)]
        else:
            product = self.factored(name, self.modulation_input(temb), "modulation", width["modulation"])
        parts = product.chunk(6, dim=-1)
        return Modulation(*parts[:3]), Modulation(*parts[3:])

    def attention_input(self, stream: UpdatedStream) -> torch.Tensor:
        """What q, k and v of a stream are projected from: normalised and modulated, ``[B, S, D]``."""
        norm = getattr(self, f"{_MODULES[stream.name]}_norm1")
        return ops.ada_layer_norm(stream.x, norm, stream.attention.scale, stream.attention.shift, stream.token_index)

    def text_input(
        self,
        text: torch.Tensor,
        condition: torch.Tensor,
        width: Width,
        modulations: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """See `PluggableBlock.text_input`; the condition is the timestep embedding ``[B, D]``."""
        return self.attention_input(
            UpdatedStream("text", text, *self.modulations("text", condition[: len(text)], width, modulations))
        )

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
        """Run the block.

        Args:
            hidden_states: image stream ``[B, S_image, D]``.
            encoder_hidden_states: text stream ``[B, S_text, D]``.
            encoder_hidden_states_mask: boolean ``[B, S_text]``, true on tokens that count, or None.
            temb: timestep embedding ``[B, D]`` (``[2 B, D]`` with ``modulate_index``).
            image_rotary_emb: (image, text) rotations, complex ``[S, E / 2]`` or real ``[S, E / 2, 2]``.
            joint_attention_kwargs: under ``key_mask`` what a forward makes once for all blocks, the mask of both
                streams ``[B, S_text + S_image]``; there is nothing else that it could set.
            modulate_index: ``[B, S_image]``, which of two modulations an image token takes (Qwen-Image-Edit).
            width: what to run; None for all that the block holds.
            text_input: ``[B, S_text, D]``, what to project the text's q, k and v from, in a block that does not update
                the text stream (PPCL eq. 8): no text output, no text MLP; the text is returned as it came.
            modulations: ``[B, 6 D]`` (``[2 B, 6 D]``) of each factored part by name, where they are known already.

        Returns:
            (text, image) streams, in diffusers' order.
        """
        width, text = width or self.width, encoder_hidden_states
        image_stream = UpdatedStream(
            "image", hidden_states, *self.modulations("image", temb, width, modulations), token_index=modulate_index
        )
        updated = [image_stream]
        if text_input is None:
            of_text = self.modulations("text", temb[: len(text)], width, modulations)
            updated.append(UpdatedStream("text", text, *of_text))
            text_input = self.attention_input(updated[-1])
        key_mask = (joint_attention_kwargs or {}).get(_KEY_MASK)
        if key_mask is None:
            key_mask = _joint_mask(encoder_hidden_states_mask, hidden_states.shape[1])
        attended = self.attention(self.attention_input(image_stream), text_input, key_mask, image_rotary_emb, width)
        updated = self.add_attention(updated, attended, width)
        image, *updated_text = self.add_feed_forward(updated, width)
        text = updated_text[0] if updated_text else text
        if image.dtype == torch.float16:
            image, text = image.clip(-65504, 65504), text.clip(-65504, 65504)
        return text, image

    def attention(
        self,
        image_input: torch.Tensor,
        text_input: torch.Tensor,
        key_mask: torch.Tensor | None,
        rotations: tuple[torch.Tensor, torch.Tensor] | None,
        width: Width,
    ) -> dict[str, torch.Tensor]:
        """Attend over both streams together; gives ``[B, S, heads * E]`` of each stream by name."""
        attn = self.attn
        image_rope, text_rope = map(as_real, rotations) if rotations else (None, None)
        image_qkv = ops.Projection(attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        text_qkv = ops.Projection(
            attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k
        )
        q, k, v = ops.qkv_projection(
            [
                ops.ProjectedStream(text_input, text_qkv, text_rope),
                ops.ProjectedStream(image_input, image_qkv, image_rope),
            ],
            width["heads"],
            self.attention_head_dim,
        )
        joint = ops.joint_attention(q, k, v, key_mask=key_mask, backend=attn.processor._attention_backend)
        tokens = text_input.shape[1]
        return {"text": joint[:, :tokens], "image": joint[:, tokens:]}

    def add_attention(
        self, streams: list[UpdatedStream], attended: Mapping[str, torch.Tensor], width: Width
    ) -> list[UpdatedStream]:
        """``x + gate * out(attended)`` for each stream, in one launch."""
        layers = [
            ops.Layer(
                self.output(f"attn_{s.name}", width["heads"]),
                attended[s.name],
                None,
                s.attention.gate,
                s.token_index,
                s.x,
            )
            for s in streams
        ]
        return [s._replace(x=x) for s, x in zip(streams, ops.linears(layers), strict=True)]

    def add_feed_forward(self, streams: list[UpdatedStream], width: Width) -> list[torch.Tensor]:
        """``x + gate * mlp(norm(x))`` for each stream, or ``x + map(x)`` where a linear map stands in for the MLP.

        Streams that keep their MLP share one up-projection launch and one down-projection launch.
        """
        after, ups, downs = {}, [], {}
        for s in streams:
            module, count = _MODULES[s.name], width[s.name]
            down = ops.Layer(self.output(f"mlp_{s.name}", count), s.x, None, s.mlp.gate, s.token_index, residual=s.x)
            if count == LINEAR_MAP:
                # The map reads the stream as it is: no norm, no modulation, no gate (PPCL eq. 9).
                [after[s.name]] = ops.linears([down._replace(gate=None, token_index=None)])
                continue
            norm, mlp = getattr(self, f"{module}_norm2"), getattr(self, f"{module}_mlp")
            normed = ops.ada_layer_norm(s.x, norm, s.mlp.scale, s.mlp.shift, s.token_index)
            ups.append(ops.Layer(mlp.net[0].proj, normed, count))
            downs[s.name] = down
        if ups:
            hidden = ops.linears(ups, gelu=True)
            layers = [down._replace(x=x) for down, x in zip(downs.values(), hidden, strict=True)]
            after |= dict(zip(downs, ops.linears(layers), strict=True))
        return [after[s.name] for s in streams]


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


def _joint_mask(text_mask: torch.Tensor | None, image_tokens: int) -> torch.Tensor | None:
    if text_mask is None:
        return None
    return torch.cat([text_mask, text_mask.new_ones(text_mask.shape[0], image_tokens)], dim=1)


class PPCLQwenImageTransformer2DModel(Pluggable, QwenImageTransformer2DModel):
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
    _gradient_checkpointing_func: Any
    gradient_checkpointing: bool

    family = "qwen-image"
    # 1024 x 1024 pixels in patches of 16 x 16.
    reference = Tokens(image=4096, text=512)
    stock_name = "QwenImageTransformer2DModel"
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
        self.transformer_blocks.extend(self.make_block(self.config, _KIND) for _ in range(num_layers))
        self.become_pluggable()

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

    def example(self, tokens: Tokens) -> dict[str, Any]:
        """See `Residency.example`; the image is as nearly square as its number of tokens allows."""
        like = next(self.parameters())
        rows, columns = _sides(tokens.image)

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

        With I image tokens, T text tokens and N = I + T, counted over the batch; streams of width D, heads of A = D
        channels together, MLPs of C = 4 D; f numbers of the dtype in a float32:

        - of the forward: the inputs, the text as the first block got it (T D), two copies of the rotations, the key
          mask, and where tokens choose between two modulations, their index;
        - of a block: the streams as they came (N D) and the modulations of both;
        - in attention: what q, k and v are projected from (N D); q, k and v as projected (3 N A); and while k of the
          image is rotated in plain torch, q of both streams and k of the text done (N A + T A), k normed (I A), and
          three float32 copies of it (3 f I A);
        - in the MLPs: the streams with their attention (N D), what attention gave (N A), what it read of the text
          (T D), the norms (N D), and the channels of both streams, of one twice while GELU is computed, or those of
          the image with the product, the gated product and the sum.

        Fused kernels hold less. Adapters, ControlNet and what an attention backend allocates are not counted.
        """
        image, text = tokens.batch * tokens.image, tokens.batch * tokens.text
        joint, heads = image + text, config["num_attention_heads"] * config["attention_head_dim"]
        dim, channels, wide = heads, 4 * heads, 4 / itemsize
        outer = image * config["in_channels"] + text * (config["joint_attention_dim"] + dim)
        outer += 2 * (tokens.image + tokens.text) * config["attention_head_dim"] * wide + joint / itemsize
        # The embedding of the timestep, before and after SiLU, and six parts for each stream.
        block, modulations = joint * dim, (2 + 2 * 6) * dim * tokens.batch
        if config["zero_cond_t"]:
            outer, modulations = outer + image * 8 / itemsize, 2 * modulations
        attention = joint * dim + (4 * joint + text + image + 3 * wide * image) * heads
        hidden = max(2 * image + text, image + 2 * text) * channels
        feed_forward = (2 * joint + text) * dim + joint * heads
        feed_forward += max(hidden, joint * channels + 3 * image * dim)
        return math.ceil(itemsize * (outer + block + modulations + max(attention, feed_forward)))

    @classmethod
    def latents_of(cls, vae: Mapping[str, Any], tokens: Tokens) -> tuple[int, ...]:
        """See `Residency.latents_of`; a token is 2 x 2 latents of one frame, the image as nearly square as can be."""
        rows, columns = _sides(tokens.image)
        return (tokens.batch, vae["z_dim"], 1, 2 * rows, 2 * columns)

    def adopt(self, block: Any) -> None:
        """Take over the attention backend of the blocks that are there."""
        for other in self.resident_blocks():
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
            rope=_in_one_piece(*map(as_real, rotations)),
            modulate_index=modulate_index,
            attention_kwargs=attention_kwargs,
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

    def _conditions_of(self, timestep: torch.Tensor) -> torch.Tensor:
        """The timesteps ``[B]`` of a batch; with those of its reference images ``[2 B]``."""
        return torch.cat([timestep, torch.zeros_like(timestep)]) if self.zero_cond_t else timestep

    def _conditions(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Timestep 0 too, where tokens of a reference image take it."""
        return torch.cat([timesteps, timesteps.new_zeros(1)]) if self.zero_cond_t else timesteps

    def _graph_settings(self, program: Program) -> Hashable:
        """Attention backends, as set on the blocks and by diffusers' context manager."""
        blocks: list[Any] = [call.block for call in program.calls]
        chosen = tuple(block.attn.processor._attention_backend for block in blocks)
        return (super()._graph_settings(program), chosen, _AttentionBackendRegistry.get_active_backend()[0])

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
        image = self.img_in(hidden_states)
        timestep = self._conditions_of(timestep.to(image.dtype))
        text = self.txt_in(self.txt_norm(encoder_hidden_states))
        known: Sequence[Mapping[str, torch.Tensor] | None] = [None] * len(program.calls)
        if rows is None:
            temb = self.time_text_embed(timestep, image, additional_t_cond)
        else:
            temb, known = self._from_rows(program, rows.expand(len(timestep), -1))

        if mask is not None:
            # Made once a forward.
            attention_kwargs = {**(attention_kwargs or {}), _KEY_MASK: _joint_mask(mask, image.shape[1])}
        next_block, first_input = 0, text
        for call, modulations in zip(program.calls, known, strict=True):
            # Only where there are any: hooks of others know the call as it is in diffusers.
            more: dict[str, Any] = {} if modulations is None else {"modulations": modulations}
            image = self._add_control(image, controlnet_block_samples, range(next_block, call.interval.first))
            text_input = None
            if call.text_run is not None and call.text_run.is_first:
                first_input = call.block.text_input(text, temb, call.width, **more)
            elif call.text_run is not None and call.text_run.input_map is not None:
                text_input = first_input + call.text_run.input_map(first_input)
            text, image = self._call_block(
                call,
                hidden_states=image,
                encoder_hidden_states=text,
                encoder_hidden_states_mask=mask,
                temb=temb,
                image_rotary_emb=rope,
                joint_attention_kwargs=attention_kwargs,
                modulate_index=modulate_index,
                **more,
                **({} if text_input is None else {"text_input": text_input}),
            )
            if call.text_run is not None and call.text_run.exit_map is not None:
                text = text + call.text_run.exit_map(text)
            next_block = call.interval.last + 1
            image = self._add_control(image, controlnet_block_samples, call.interval)
        image = self._add_control(image, controlnet_block_samples, range(next_block, program.plan.depth))

        output: torch.Tensor = self.proj_out(self.norm_out(image, temb[: len(image)]))
        return output

    def _call_block(self, call: BlockCall, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a block, with gradient checkpointing where that is on."""
        if not (torch.is_grad_enabled() and self.gradient_checkpointing):
            return call.block(**arguments, width=call.width)
        # Checkpointing passes arguments by place.
        names = tuple(arguments)

        def block(*values: Any) -> Any:
            return call.block(**dict(zip(names, values, strict=True)), width=call.width)

        return self._gradient_checkpointing_func(block, *arguments.values())

    def _add_control(self, image: torch.Tensor, samples: Sequence[torch.Tensor] | None, blocks: Any) -> torch.Tensor:
        """Add the ControlNet residuals that follow these blocks."""
        if samples is not None:
            share = math.ceil(self.config.num_layers / len(samples))
            for block in blocks:
                image = image + samples[block // share]
        return image


def _sides(tokens: int) -> tuple[int, int]:
    """Rows and columns of an image, as nearly square as its number of tokens allows."""
    rows = max(n for n in range(1, math.isqrt(tokens) + 1) if tokens % n == 0)
    return rows, tokens // rows


def _architecture(depth: int, heads: int, head_dim: int, outer_params: int) -> Architecture:
    return Architecture(
        lists=(BlockList(path="transformer_blocks", kind=_KIND, depth=depth),),
        kinds={_KIND: block_spec(heads * head_dim, heads, head_dim)},
        dim=heads * head_dim,
        outer_params=outer_params,
    )
