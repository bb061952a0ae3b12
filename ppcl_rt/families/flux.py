"""FLUX.1 at any ratio: what its blocks are made of, blocks at any width, and diffusers' class over a program.

Double blocks update two streams (`ppcl_rt.families.mmdit`). Single blocks, which come after them, run text and image
as one stream: q, k and v and the MLP read the same norm, and one layer reads heads and MLP channels next to each other.
Their groups are ``heads``, ``mlp`` (the channels) and ``modulation`` (the rank). All blocks are conditioned on the
timestep, the pooled text, and the guidance where the model was distilled for it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

# ModelMixin is for diffusers: a pipeline that loads a class of another package looks for it in the class's module.
from diffusers import FluxTransformer2DModel, ModelMixin  # noqa: F401
from diffusers.configuration_utils import register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import FluxLoraLoaderMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from diffusers.utils import apply_lora_scale

from ppcl_rt import ops
from ppcl_rt.families import original
from ppcl_rt.families.attending import CalledAttention, attend, call_attention, must_call
from ppcl_rt.families.mmdit import (
    Attending,
    Control,
    Layers,
    MMDiT,
    ModulatedBlock,
    TwoStreamBlock,
    in_range,
    modulation_part,
    pooled_conditions,
    residual_after,
    sides,
    two_stream_numbers,
    two_stream_spec,
)
from ppcl_rt.model.exchange import Original, Shapes
from ppcl_rt.model.program import Program
from ppcl_rt.planning.architecture import Architecture, BlockList, Tokens
from ppcl_rt.planning.block_spec import BlockSpec, Group, Part, Segment, Stream
from ppcl_rt.planning.width import LINEAR_MAP, Width

# The two kinds of blocks.
_DOUBLE, _SINGLE = "double", "single"
# Where diffusers keeps the layers of each stream of a double block.
_LAYERS: Mapping[Stream, Layers] = {
    "image": Layers("norm1.linear", "norm1.norm", "norm2", "ff"),
    "text": Layers("norm1_context.linear", "norm1_context.norm", "norm2_context", "ff_context"),
}
# Rotations of text and image: cosine and sine ``[S, E]`` as diffusers makes them, or ``[S, E / 2, 2]`` (`rotations`).
Rotations = tuple[torch.Tensor, torch.Tensor] | torch.Tensor


def double_spec(dim: int, heads: int, head_dim: int) -> BlockSpec:
    """What a double block is made of."""
    return two_stream_spec(dim, heads, head_dim, _LAYERS, {"image": 4 * dim, "text": 4 * dim})


def single_spec(dim: int, heads: int, head_dim: int) -> BlockSpec:
    """What a single block is made of."""
    inner, channels = heads * head_dim, 4 * dim
    in_heads, in_mlp = Segment("heads", 0, head_dim), Segment("mlp", 0, 1)
    parts = [
        Part(path=f"attn.{path}", rows=inner, columns=dim, axis=0, segments=(in_heads,), stream="joint")
        for path in ("to_q", "to_k", "to_v")
    ]
    parts.append(Part(path="proj_mlp", rows=channels, columns=dim, axis=0, segments=(in_mlp,), stream="joint"))
    side_by_side = (in_heads, in_mlp._replace(offset=inner))
    parts.append(
        Part(
            name="out",
            path="proj_out",
            rows=dim,
            columns=inner + channels,
            axis=1,
            segments=side_by_side,
            stream="joint",
        )
    )
    parts.append(modulation_part("modulation_joint", "norm.linear", 3 * dim, dim))
    return BlockSpec(
        dim=dim,
        head_dim=head_dim,
        groups={
            "heads": Group(count=heads),
            "mlp": Group(count=channels, mappable=True),
            "modulation": Group(count=dim, is_rank=True),
        },
        parts=tuple(parts),
        # The norms of q and k.
        other_params=2 * head_dim,
    )


class PPCLFluxAttention(CalledAttention, FluxAttention):
    """diffusers' `FluxAttention`."""


class PPCLFluxTransformerBlock(TwoStreamBlock, FluxTransformerBlock):
    """The stock double block, over the first heads and channels in rank order (`TwoStreamBlock`).

    Modules, their names and the returned order (text, image) are those of diffusers.
    """

    layers = _LAYERS
    stock_processor = FluxAttnProcessor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attn.__class__ = PPCLFluxAttention
        self.become_pluggable(double_spec(self.attn.query_dim, self.attn.heads, self.attn.head_dim))

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Rotations | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        width: Width | None = None,
        text_input: torch.Tensor | None = None,
        modulations: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the block; arguments and result as in `TwoStreamBlock.run_streams`, but for these.

        Args:
            temb: of timestep, pooled text and guidance, ``[B, D]``.
            image_rotary_emb: rotations of both streams, text first.
            joint_attention_kwargs: of an IP-adapter, for its attention processors.
        """
        rope, tokens = rotations(image_rotary_emb), encoder_hidden_states.shape[1]
        text, image = self.run_streams(
            hidden_states,
            encoder_hidden_states,
            temb,
            rotations=None if rope is None else (rope[tokens:], rope[:tokens]),
            key_mask=None,
            width=width,
            text_input=text_input,
            modulations=modulations,
            more=joint_attention_kwargs,
        )
        return in_range(text), image

    def processor_arguments(self, inputs: Attending) -> dict[str, Any]:
        """See `TwoStreamBlock.processor_arguments`."""
        rope = inputs.rotations
        return {} if rope is None else {"image_rotary_emb": stock_rotations(torch.cat([rope[1], rope[0]]))}


class PPCLFluxSingleTransformerBlock(ModulatedBlock, FluxSingleTransformerBlock):
    """The stock single block, over the first heads and channels in rank order.

    Modules, their names and the returned order (text, image) are those of diffusers. ``replacements`` holds what runs
    in place of the columns of one group of the output layer, and the two factors of the modulations.
    """

    # Of the stock block.
    norm: Any
    proj_mlp: torch.nn.Module
    proj_out: torch.nn.Module

    side_by_side = (("attn.to_q", "attn.to_k", "attn.to_v"),)
    stock_processor = FluxAttnProcessor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attn.__class__ = PPCLFluxAttention
        self.become_pluggable(single_spec(self.attn.query_dim, self.attn.heads, self.attn.head_dim))
        self._outputs = {output.segment.group: output for output in self.spec.outputs}

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Rotations | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        width: Width | None = None,
        modulations: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the block.

        Args:
            hidden_states: image stream ``[B, S_image, D]``.
            encoder_hidden_states: text stream ``[B, S_text, D]``.
            temb: of timestep, pooled text and guidance, ``[B, D]``.
            image_rotary_emb: rotations of both streams, text first.
            joint_attention_kwargs: not read: double blocks alone have an IP-adapter.
            width: what to run; None for all that the block holds.
            modulations: ``[B, 3 D]`` of the factored part by name, where they are known already.

        Returns:
            (text, image) streams, in diffusers' order.
        """
        width, tokens = width or self.width, encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        [modulation] = self.modulation("modulation_joint", temb, width, modulations)
        normed = ops.ada_layer_norm(x, self.norm.norm, modulation.scale, modulation.shift)
        inputs = [self.columns("heads", self.attention(normed, rotations(image_rotary_emb), width), width)]
        if width["mlp"] != LINEAR_MAP:
            [hidden] = ops.linears([ops.Layer(self.proj_mlp, normed, width["mlp"])], activation="gelu")
            inputs.append(self.columns("mlp", hidden, width))
        x = ops.joined(self.proj_out, inputs, modulation.gate, x)
        if width["mlp"] == LINEAR_MAP:
            # The map reads the stream with its attention: no norm, no modulation, no gate (PPCL eq. 9).
            [x] = ops.linears([ops.Layer(self.output(self._outputs["mlp"].name, LINEAR_MAP), x, residual=x)])
        x = in_range(x)
        return x[:, :tokens], x[:, tokens:]

    def columns(self, group: str, x: torch.Tensor, width: Width) -> ops.Columns:
        """What a group gives, and the columns of the output layer that read it or the layer in their place."""
        output = self._outputs[group]
        return ops.Columns(x, self.first_column(output), self.replaced(output.name, width[group]))

    def attention(self, normed: torch.Tensor, rope: torch.Tensor | None, width: Width) -> torch.Tensor:
        """Attend over text and image; gives ``[B, S, heads * E]``."""
        if not must_call(self.attn, self.stock_processor):
            return self.own_attention(normed, rope, width)
        heads, all_heads = width["heads"], self.spec.groups["heads"].count
        attended: torch.Tensor = call_attention(
            self.attn,
            self.stock_processor,
            lambda: self.own_attention(normed, rope, width),
            {"hidden_states": normed},
            lambda: {} if rope is None else {"image_rotary_emb": stock_rotations(rope)},
            "" if heads == all_heads else f"runs {heads} of {all_heads}",
        )
        return attended

    def own_attention(self, normed: torch.Tensor, rope: torch.Tensor | None, width: Width) -> torch.Tensor:
        """`attention` where the module need not be called."""
        attn = self.attn
        projection = ops.Projection(attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        stream = ops.ProjectedStream(normed, projection, rope)
        q, k, v = ops.qkv_projection([stream], width["heads"], self.spec.head_dim)
        return attend(attn, q, k, v)


# diffusers' caches look blocks up by their exact class. Both return (text, image).
for _block in (PPCLFluxTransformerBlock, PPCLFluxSingleTransformerBlock):
    TransformerBlockRegistry.register(
        _block, TransformerBlockMetadata(return_hidden_states_index=1, return_encoder_hidden_states_index=0)
    )


def rotations(rope: Rotations | None) -> torch.Tensor | None:
    """Turn cosine and sine ``[S, E]``, in which each angle stands twice, into ``[S, E / 2, 2]``."""
    if not isinstance(rope, tuple):
        return rope
    cosine, sine = rope
    return torch.stack([cosine[:, ::2], sine[:, ::2]], dim=-1)


def stock_rotations(rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn rotations ``[S, E / 2, 2]`` into cosine and sine ``[S, E]``, as diffusers makes them."""
    cosine, sine = (each.repeat_interleave(2, dim=-1) for each in rope.unbind(-1))
    return cosine, sine


class PPCLFluxTransformer2DModel(MMDiT, FluxTransformer2DModel):
    """A `FluxTransformer2DModel` that runs at any ratio.

    Built by hand it is the dense model; `load` (or ``from_pretrained``) reads a checkpoint at a ratio. Arguments are
    those of the diffusers class.
    """

    # Of the stock class.
    transformer_blocks: torch.nn.ModuleList
    single_transformer_blocks: torch.nn.ModuleList
    x_embedder: torch.nn.Module
    context_embedder: torch.nn.Module
    pos_embed: torch.nn.Module
    time_text_embed: torch.nn.Module
    norm_out: torch.nn.Module
    proj_out: torch.nn.Module
    encoder_hid_proj: Any

    family = "flux"
    # 1024 x 1024 pixels in patches of 16 x 16.
    reference = Tokens(image=4096, text=512)
    stock_name = "FluxTransformer2DModel"
    gguf_architecture = "flux"
    lora_loader = "FluxLoraLoaderMixin"
    # diffusers' plan: what the model is called with is split, what it returns is put together.
    splits_tokens = True
    stock_processor = FluxAttnProcessor
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    depth_settings = ("num_layers", "num_single_layers")
    _no_split_modules = ["PPCLFluxTransformerBlock", "PPCLFluxSingleTransformerBlock"]
    _repeated_blocks = ["PPCLFluxTransformerBlock", "PPCLFluxSingleTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
    ) -> None:
        if sum(axes_dims_rope) != attention_head_dim:
            raise ValueError(f"axes_dims_rope {list(axes_dims_rope)} does not add up to heads of {attention_head_dim}")
        # No stock blocks: at 12B parameters, building them only to throw them away would take minutes.
        self.fill_lists(
            transformer_blocks=[_DOUBLE] * num_layers, single_transformer_blocks=[_SINGLE] * num_single_layers
        )
        super().__init__(
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=0,
            num_single_layers=0,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            pooled_projection_dim=pooled_projection_dim,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=axes_dims_rope,
        )
        self.register_to_config(num_layers=num_layers, num_single_layers=num_single_layers)
        self.become_pluggable()

    @classmethod
    def make_block(
        cls, config: Mapping[str, Any], kind: str
    ) -> PPCLFluxTransformerBlock | PPCLFluxSingleTransformerBlock:
        """Build one block at full width."""
        block = PPCLFluxTransformerBlock if kind == _DOUBLE else PPCLFluxSingleTransformerBlock
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        return block(dim=heads * head_dim, num_attention_heads=heads, attention_head_dim=head_dim)

    @classmethod
    def originals(cls, shapes: Shapes) -> dict[str, Original]:
        """See `Exchange.originals`."""
        return original.originals(shapes, original.FLUX)

    @classmethod
    def architecture_of(cls, config: Mapping[str, Any], outer_params: int) -> Architecture:
        """What the dense model is made of."""
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        dim = heads * head_dim
        kinds = {_DOUBLE: double_spec(dim, heads, head_dim), _SINGLE: single_spec(dim, heads, head_dim)}
        lists = tuple(
            BlockList(path=path, kind=kind, depth=config[depth])
            for path, kind, depth in zip(cls.block_lists, kinds, cls.depth_settings, strict=True)
        )
        return Architecture(lists=lists, kinds=kinds, dim=dim, outer_params=outer_params)

    def example(self, tokens: Tokens) -> dict[str, Any]:
        """See `Residency.example`; the image is as nearly square as its number of tokens allows."""
        like = next(self.parameters())

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=like.device, dtype=like.dtype)

        return {
            "hidden_states": noise(tokens.batch, tokens.image, self.config.in_channels),
            "encoder_hidden_states": noise(tokens.batch, tokens.text, self.config.joint_attention_dim),
            "pooled_projections": noise(tokens.batch, self.config.pooled_projection_dim),
            "timestep": torch.full((tokens.batch,), 0.5, device=like.device),
            "img_ids": positions(*sides(tokens.image)).to(like.device),
            "txt_ids": torch.zeros(tokens.text, 3, device=like.device),
            "guidance": torch.full((tokens.batch,), 3.5, device=like.device) if self.config.guidance_embeds else None,
            "return_dict": False,
        }

    @classmethod
    def activation_bytes(cls, config: Mapping[str, Any], tokens: Tokens, itemsize: int) -> int:
        """See `Residency.activation_bytes`.

        Of the forward: the inputs, the text of the first block of a text run, and the rotations. Of a block the larger
        of what a double block holds (`two_stream_numbers`) and a single block does. With N tokens of both streams,
        counted over the batch, streams of width D, heads of D channels together, MLPs of 4 D, and f numbers of the
        dtype in a float32, that is: the streams as they came, next to each other, and normed (3 N D), and

        - in attention, while k is rotated in plain torch: q, k and v as projected (3 N D), q done and k normed
          (2 N D), and three float32 copies of k (3 f N D);
        - in the MLP: what attention gave (N D), and the channels twice while GELU is computed (8 N D), or once with the
          sum of the stream and the heads, the product, the gated product and the sum (4 N D + 4 N D).

        Fused kernels hold less. Adapters, ControlNet and what an attention backend allocates are not counted.
        """
        image, text = tokens.batch * tokens.image, tokens.batch * tokens.text
        dim, wide = config["num_attention_heads"] * config["attention_head_dim"], 4 / itemsize
        outer = image * config["in_channels"] + text * (config["joint_attention_dim"] + dim)
        outer += tokens.batch * (config["pooled_projection_dim"] + dim)
        outer += (tokens.image + tokens.text) * (config["attention_head_dim"] + 6) * wide
        # The embedding before and after SiLU, and three modulations.
        single = (2 + 3) * dim * tokens.batch + (image + text) * dim * (3 + max(5 + 3 * wide, 9))
        return math.ceil(itemsize * (outer + max(two_stream_numbers(tokens, dim, wide), single)))

    @classmethod
    def latents_of(cls, vae: Mapping[str, Any], tokens: Tokens) -> tuple[int, ...]:
        """See `Residency.latents_of`; a token is 2 x 2 latents, the image as nearly square as can be."""
        rows, columns = sides(tokens.image)
        return (tokens.batch, vae["latent_channels"], 2 * rows, 2 * columns)

    @apply_lora_scale("joint_attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        pooled_projections: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        img_ids: torch.Tensor | None = None,
        txt_ids: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: Sequence[torch.Tensor] | None = None,
        controlnet_single_block_samples: Sequence[torch.Tensor] | None = None,
        return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict; arguments and result are those of the diffusers class.

        Args:
            hidden_states: latents ``[B, S_image, in_channels]``.
            encoder_hidden_states: prompt embeddings ``[B, S_text, joint_attention_dim]``.
            pooled_projections: pooled prompt embeddings ``[B, pooled_projection_dim]``.
            timestep: ``[B]`` in [0, 1], not 0..1000.
            img_ids, txt_ids: positions of the tokens, ``[S_image, 3]`` and ``[S_text, 3]``.
            guidance: ``[B]``, for models with ``guidance_embeds``.
            joint_attention_kwargs: ``scale`` of adapters, and what an IP-adapter reads.
            controlnet_block_samples, controlnet_single_block_samples: residuals ``[B, S_image, D]``, spread over the
                original blocks of each list; what stands for an interval takes those of all its blocks, a skipped block
                takes its own.
            controlnet_blocks_repeat: whether those of double blocks go round; else each serves several blocks in a row.

        Raises:
            ValueError: arguments of an IP-adapter that is not loaded, or others of attention; guidance where the model
                takes none, or none where it takes one.
        """
        assert timestep is not None and img_ids is not None and txt_ids is not None, "diffusers needs them, too"
        more = self._of_ip_adapter(joint_attention_kwargs or {})
        if (guidance is not None) != self.config.guidance_embeds:
            raise ValueError(
                "this model embeds a guidance: pass guidance, [B]"
                if self.config.guidance_embeds
                else "this model has no embedding for guidance: leave it out"
            )
        # Made from positions, which are inputs, so that a graph of the blocks does not hold them. Older pipelines give
        # positions of every sample, which are all the same.
        ids = torch.cat([each[0] if each.ndim == 3 else each for each in (txt_ids, img_ids)])
        output = self._run(
            self._program(timestep),
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            rope=rotations(self.pos_embed(ids)),
            guidance=guidance,
            controlnet_block_samples=controlnet_block_samples,
            controlnet_single_block_samples=controlnet_single_block_samples,
            controlnet_blocks_repeat=controlnet_blocks_repeat,
            joint_attention_kwargs=more,
        )
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _of_ip_adapter(self, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
        """What attention processors are given, None for nothing.

        Raises:
            ValueError: there are others than an IP-adapter's, or none is loaded.
        """
        if others := sorted(set(arguments) - set(_IP_ADAPTER)):
            raise ValueError(f"joint_attention_kwargs take scale and an IP-adapter's here, not {', '.join(others)}")
        if arguments and getattr(self, "encoder_hid_proj", None) is None:
            raise ValueError("no IP-adapter is loaded: call load_ip_adapter, or leave ip_adapter_image out")
        more = dict(arguments)
        if "ip_adapter_image_embeds" in more:
            more["ip_hidden_states"] = self.encoder_hid_proj(more.pop("ip_adapter_image_embeds"))
        return more or None

    def _walk(  # type: ignore[override]  # names the inputs of `Pluggable._walk`
        self,
        program: Program,
        *,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        rope: torch.Tensor,
        guidance: torch.Tensor | None,
        controlnet_block_samples: Sequence[torch.Tensor] | None,
        controlnet_single_block_samples: Sequence[torch.Tensor] | None,
        controlnet_blocks_repeat: bool,
        joint_attention_kwargs: dict[str, Any] | None,
    ) -> torch.Tensor:
        """Run a program; args as in `forward`, but ``rope`` is the rotations of both streams ``[S, E / 2, 2]``."""
        # In a list, from which the walk takes it: nobody else then holds on to the image as it was at first.
        entered = [self.x_embedder(hidden_states)]
        conditions = [each.to(entered[0].dtype) * 1000 for each in (timestep, guidance) if each is not None]
        temb = self.time_text_embed(*conditions, pooled_projections)
        image = self._walk_blocks(
            program,
            entered.pop(),
            self.context_embedder(encoder_hidden_states),
            temb,
            control=self._control(controlnet_block_samples, controlnet_single_block_samples, controlnet_blocks_repeat),
            image_rotary_emb=rope,
            joint_attention_kwargs=joint_attention_kwargs,
        )
        output: torch.Tensor = self.proj_out(self.norm_out(image, temb))
        return output

    def every_condition(
        self, timesteps: torch.Tensor, pooled: torch.Tensor | None = None, guidance: Sequence[float] = ()
    ) -> torch.Tensor:
        """See `Modulations.every_condition`."""

        def embed(times: torch.Tensor, texts: torch.Tensor, values: torch.Tensor | None) -> torch.Tensor:
            found: torch.Tensor = self.time_text_embed(*(v * 1000 for v in (times, values) if v is not None), texts)
            return found

        wanted = (self.config.pooled_projection_dim, self.config.guidance_embeds)
        return pooled_conditions(embed, timesteps, pooled, guidance, wanted)

    def _control(
        self, double: Sequence[torch.Tensor] | None, single: Sequence[torch.Tensor] | None, repeat: bool
    ) -> Control | None:
        """ControlNet residuals by block."""
        if double is None and single is None:
            return None
        depth, single_depth = self.config.num_layers, self.config.num_single_layers

        def residual(block: int) -> torch.Tensor | None:
            if block < depth:
                return None if double is None else residual_after(double, block, depth, repeat)
            return None if single is None else residual_after(single, block - depth, single_depth)

        return residual


# Arguments of attention that are for the processors of an IP-adapter.
_IP_ADAPTER = ("ip_adapter_image_embeds", "ip_hidden_states", "ip_adapter_masks")


def positions(rows: int, columns: int) -> torch.Tensor:
    """Positions of the tokens of an image, ``[rows * columns, 3]``, as FLUX's pipelines number them."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1).float()


def _widen_nothing(name: str, instead: Callable[..., Any]) -> None:
    """Have diffusers' reader of adapters leave a model that was loaded here as it is.

    It widens layers that are narrower than an adapter's, for adapters that bring inputs of their own (Control LoRA).
    Ours are narrow because a plan is, and the model cuts the adapter (`ppcl_rt.model.adapters`).
    """
    theirs = getattr(FluxLoraLoaderMixin, name).__func__

    def asked(cls: Any, transformer: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(transformer, PPCLFluxTransformer2DModel) and transformer.cuts_adapters:
            return instead(*args, **kwargs)
        return theirs(cls, transformer, *args, **kwargs)

    setattr(FluxLoraLoaderMixin, name, classmethod(functools.update_wrapper(asked, theirs)))


_widen_nothing("_maybe_expand_transformer_param_shape_or_error_", lambda *_, **__: False)
_widen_nothing("_maybe_expand_lora_state_dict", lambda lora_state_dict: lora_state_dict)
