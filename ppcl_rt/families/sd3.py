"""Stable Diffusion 3 and 3.5 at any ratio: what their blocks are made of, a block at any width, diffusers' class.

The blocks are of two streams (`ppcl_rt.families.mmdit`), in up to four kinds: *two-stream*; *dual-attention*, where the
image stream also attends over itself alone (SD3.5-medium), with a group ``image_heads`` of its own; and each of the two
as the *last* block, which does not update the text: it has no text output and no text MLP.

Latents are images ``[B, C, rows, columns]``, timesteps go from 0 to 1000, and positions are added to the image tokens:
there are no rotations. Modulations see the pooled text next to the timestep, so they cannot be computed beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch

# ModelMixin is for diffusers: a pipeline that loads a class of another package looks for it in the class's module.
from diffusers import ModelMixin, SD3Transformer2DModel  # noqa: F401
from diffusers.configuration_utils import register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale

from ppcl_rt import ops
from ppcl_rt.families import original
from ppcl_rt.families.attending import PPCLAttention, backend_of, call_attention, must_call
from ppcl_rt.families.mmdit import (
    Control,
    Layers,
    MMDiT,
    TwoStreamBlock,
    UpdatedStream,
    modulation_part,
    pooled_conditions,
    sides,
    two_stream_numbers,
    two_stream_spec,
)
from ppcl_rt.model.exchange import Original, Shapes
from ppcl_rt.model.program import Program
from ppcl_rt.planning.architecture import Architecture, BlockList, Tokens
from ppcl_rt.planning.block_spec import BlockSpec, Group, Part, Segment, Stream
from ppcl_rt.planning.width import Width

# The kinds of blocks; one that is both is called ``dual-attention-last``.
_TWO_STREAM, _DUAL, _LAST = "two-stream", "dual-attention", "last"
# Where diffusers keeps the layers of each stream.
_LAYERS: Mapping[Stream, Layers] = {
    "image": Layers("norm1.linear", "norm1.norm", "norm2", "ff"),
    "text": Layers("norm1_context.linear", "norm1_context.norm", "norm2_context", "ff_context"),
}
# q, k and v of the second attention of a dual-attention block.
_SECOND = ("attn2.to_q", "attn2.to_k", "attn2.to_v")


def block_spec(dim: int, heads: int, head_dim: int, kind: str = _TWO_STREAM, qk_norm: bool = True) -> BlockSpec:
    """What a block of a kind is made of; streams have width ``dim``, and MLPs ``4 * dim`` channels."""
    two = two_stream_spec(dim, heads, head_dim, _LAYERS, {"image": 4 * dim, "text": 4 * dim})
    dual, last = _DUAL in kind, _LAST in kind
    parts, groups = list(two.parts), dict(two.groups)
    if dual:
        in_heads = (Segment("image_heads", 0, head_dim),)
        of_image: dict[str, Any] = {"segments": in_heads, "stream": "image", "updates": "image"}
        wide = heads * head_dim
        parts = [part for part in parts if part.name != "modulation_image"]
        parts += [Part(path=path, rows=wide, columns=dim, axis=0, **of_image) for path in _SECOND]
        parts.append(Part(name="attn2_image", path="attn2.to_out.0", rows=dim, columns=wide, axis=1, **of_image))
        # A shift, a scale and a gate for each of three branches.
        parts.append(modulation_part("modulation_image", _LAYERS["image"].modulation, 9 * dim, dim, updates="image"))
        groups = {"heads": groups.pop("heads"), "image_heads": Group(count=heads, updates="image"), **groups}
    if last:
        # The text gives q, k and v alone: scale and shift, and no more.
        parts = [part for part in parts if part.updates != "text"]
        parts.append(modulation_part("modulation_text", _LAYERS["text"].modulation, 2 * dim, dim))
        del groups["text"]
    return BlockSpec(
        dim=dim,
        head_dim=head_dim,
        heads={"heads": "joint", "image_heads": "image"} if dual else "heads",
        groups=groups,
        parts=tuple(parts),
        # The norms of q and k: of both streams, and of the second attention.
        other_params=(4 + 2 * dual) * head_dim if qk_norm else 0,
        may_leave=() if last else two.may_leave,
    )


class PPCLJointTransformerBlock(TwoStreamBlock, JointTransformerBlock):
    """The stock block, over the first heads and channels in rank order (`TwoStreamBlock`).

    Modules, their names and the returned order (text, image) are those of diffusers, but for the last block, which
    returns the text as it came where the stock block returns None.
    """

    # Of the stock block.
    context_pre_only: bool
    norm1: Any
    norm1_context: Any

    layers = _LAYERS
    stock_processor = JointAttnProcessor2_0

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        context_pre_only: bool = False,
        qk_norm: str | None = None,
        use_dual_attention: bool = False,
    ) -> None:
        super().__init__(dim, num_attention_heads, attention_head_dim, context_pre_only, qk_norm, use_dual_attention)
        self.attn.__class__ = PPCLAttention
        if use_dual_attention:
            self.attn2.__class__ = PPCLAttention
        # The stock processor calls torch; with this, ``set_attention_backend`` is heeded here.
        self.attn.processor._attention_backend = None
        kind = _kind(use_dual_attention, context_pre_only)
        self.become_pluggable(block_spec(dim, num_attention_heads, attention_head_dim, kind, qk_norm is not None))

    def text_input(
        self,
        text: torch.Tensor,
        condition: torch.Tensor,
        width: Width,
        modulations: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """See `PluggableBlock.text_input`; the condition is the embedding of timestep and pooled text ``[B, D]``."""
        if not self.context_pre_only:
            return super().text_input(text, condition, width, modulations)
        product = self.factored("modulation_text", self.modulation_input(condition), "modulation", width["modulation"])
        scale, shift = product.chunk(2, dim=-1)
        return ops.ada_layer_norm(text, self.norm1_context.norm, scale, shift)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
        width: Width | None = None,
        text_input: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the block.

        Args:
            hidden_states: image stream ``[B, S_image, D]``.
            encoder_hidden_states: text stream ``[B, S_text, D]``.
            temb: embedding of timestep and pooled text ``[B, D]``.
            joint_attention_kwargs: of an IP-adapter, for its attention processors.
            width, text_input: as `TwoStreamBlock.run_streams` takes them.

        Returns:
            (text, image) streams, in diffusers' order.
        """
        width = width or self.width
        if text_input is None and self.context_pre_only:
            text_input = self.text_input(encoder_hidden_states, temb, width)
        return self.run_streams(
            hidden_states,
            encoder_hidden_states,
            temb,
            rotations=None,
            key_mask=None,
            width=width,
            text_input=text_input,
            modulations=None,
            more=joint_attention_kwargs,
        )


class PPCLDualAttentionBlock(PPCLJointTransformerBlock):
    """A block whose image stream attends over itself once more (``use_dual_attention``)."""

    # Of the stock block.
    attn2: Any

    side_by_side = (*PPCLJointTransformerBlock.side_by_side, _SECOND)

    def add_attention(
        self,
        streams: list[UpdatedStream],
        attended: Mapping[Stream, torch.Tensor],
        width: Width,
        projected: bool = False,
    ) -> list[UpdatedStream]:
        """As `TwoStreamBlock.add_attention`, and to the image what it attends to in itself as it came."""
        image, [second] = streams[0], streams[0].more
        normed = ops.ada_layer_norm(image.x, self.norm1.norm, second.scale, second.shift)
        image, *text = super().add_attention(streams, attended, width, projected)
        heads, all_heads = width["image_heads"], self.spec.groups["image_heads"].count
        out = ops.Layer(self.output("attn2_image", heads), normed, adapter=self.beside("attn2_image", heads))
        if must_call(self.attn2, self.stock_processor):
            given = call_attention(
                self.attn2,
                self.stock_processor,
                lambda: ops.linears([out._replace(x=self.own_attention(normed, heads))])[0],
                {"hidden_states": normed},
                dict,
                "" if heads == all_heads else f"runs {heads} of {all_heads} of the image",
            )
            return [image._replace(x=image.x + second.gate[:, None] * given), *text]
        own = self.own_attention(normed, heads)
        [x] = ops.linears([out._replace(x=own, gate=second.gate, residual=image.x)])
        return [image._replace(x=x), *text]

    def own_attention(self, normed: torch.Tensor, heads: int) -> torch.Tensor:
        """What the first heads of the second attention give of the image ``[B, S, D]``, ``[B, S, heads * E]``."""
        attn = self.attn2
        projection = ops.Projection(attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        q, k, v = ops.qkv_projection([ops.ProjectedStream(normed, projection, None)], heads, self.spec.head_dim)
        return ops.joint_attention(q, k, v, key_mask=None, backend=backend_of(attn))


# diffusers' hooks look blocks up by their exact class. They return (text, image).
for _block in (PPCLJointTransformerBlock, PPCLDualAttentionBlock):
    TransformerBlockRegistry.register(
        _block, TransformerBlockMetadata(return_hidden_states_index=1, return_encoder_hidden_states_index=0)
    )


class PPCLSD3Transformer2DModel(MMDiT, SD3Transformer2DModel):
    """A `SD3Transformer2DModel` that runs at any ratio.

    Built by hand it is the dense model; `load` (or ``from_pretrained``) reads a checkpoint at a ratio. Arguments are
    those of the diffusers class.
    """

    # Of the stock class.
    transformer_blocks: torch.nn.ModuleList
    pos_embed: torch.nn.Module
    time_text_embed: torch.nn.Module
    context_embedder: torch.nn.Module
    norm_out: torch.nn.Module
    proj_out: torch.nn.Module
    out_channels: int

    image_proj: Any

    family = "sd3"
    # 1024 x 1024 pixels in patches of 16 x 16; 77 tokens of CLIP and 256 of T5.
    reference = Tokens(image=4096, text=333)
    stock_name = "SD3Transformer2DModel"
    gguf_architecture = "sd3"
    lora_loader = "SD3LoraLoaderMixin"
    stock_processor = JointAttnProcessor2_0
    one_context = True
    _no_split_modules = ["PPCLJointTransformerBlock", "PPCLDualAttentionBlock"]
    # diffusers names none for its class.
    _repeated_blocks = ["PPCLJointTransformerBlock", "PPCLDualAttentionBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int | None = 16,
        pos_embed_max_size: int = 96,
        dual_attention_layers: tuple[int, ...] = (),
        qk_norm: str | None = None,
    ) -> None:
        dim = num_attention_heads * attention_head_dim
        if caption_projection_dim != dim:
            raise ValueError(f"caption_projection_dim is {caption_projection_dim}, the streams have width {dim}")
        if qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm is rms_norm or null, not {qk_norm}")
        # No stock blocks: building them only to throw them away would take minutes.
        self.fill_lists(transformer_blocks=_kinds(self.config))
        super().__init__(
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            num_layers=0,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            caption_projection_dim=caption_projection_dim,
            pooled_projection_dim=pooled_projection_dim,
            out_channels=out_channels,
            pos_embed_max_size=pos_embed_max_size,
            dual_attention_layers=dual_attention_layers,
            qk_norm=qk_norm,
        )
        self.register_to_config(num_layers=num_layers)
        self.become_pluggable()

    @classmethod
    def make_block(cls, config: Mapping[str, Any], kind: str) -> PPCLJointTransformerBlock:
        """Build one block of a kind at full width."""
        made = PPCLDualAttentionBlock if _DUAL in kind else PPCLJointTransformerBlock
        return made(
            dim=config["num_attention_heads"] * config["attention_head_dim"],
            num_attention_heads=config["num_attention_heads"],
            attention_head_dim=config["attention_head_dim"],
            context_pre_only=_LAST in kind,
            qk_norm=config["qk_norm"],
            use_dual_attention=_DUAL in kind,
        )

    @classmethod
    def settings_of(cls, architecture: Architecture, blocks: Sequence[int]) -> dict[str, Any]:
        """See `Exchange.settings_of`: the blocks of dual attention have new numbers, too."""
        dual = tuple(place for place, block in enumerate(blocks) if _DUAL in architecture.kind(block))
        return {**super().settings_of(architecture, blocks), "dual_attention_layers": dual}

    @classmethod
    def originals(cls, shapes: Shapes) -> dict[str, Original]:
        """See `Exchange.originals`."""
        return original.originals(shapes, original.SD3)

    @classmethod
    def architecture_of(cls, config: Mapping[str, Any], outer_params: int) -> Architecture:
        """What the dense model is made of: the blocks of each kind that follow one another are a list."""
        heads, head_dim, kinds = config["num_attention_heads"], config["attention_head_dim"], _kinds(config)
        dim, qk_norm = heads * head_dim, config["qk_norm"] is not None
        return Architecture(
            lists=tuple(
                BlockList(path="transformer_blocks", kind=kind, depth=len(list(blocks)))
                for kind, blocks in groupby(kinds)
            ),
            kinds={kind: block_spec(dim, heads, head_dim, kind, qk_norm) for kind in dict.fromkeys(kinds)},
            dim=dim,
            outer_params=outer_params,
        )

    def example(self, tokens: Tokens) -> dict[str, Any]:
        """See `Residency.example`; the image is as nearly square as its number of tokens allows."""
        like, config = next(self.parameters()), self.config
        rows, columns = (config.patch_size * side for side in sides(tokens.image))

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(tokens.batch, *shape, device=like.device, dtype=like.dtype)

        return {
            "hidden_states": noise(config.in_channels, rows, columns),
            "encoder_hidden_states": noise(tokens.text, config.joint_attention_dim),
            "pooled_projections": noise(config.pooled_projection_dim),
            "timestep": torch.full((tokens.batch,), 500.0, device=like.device),
            "return_dict": False,
        }

    @classmethod
    def activation_bytes(cls, config: Mapping[str, Any], tokens: Tokens, itemsize: int) -> int:
        """See `Residency.activation_bytes`.

        Of the forward: the inputs, and the text of the first block of a text run; and what a block holds
        (`two_stream_numbers`, not rotated), where a block of dual attention has three modulations more. Its second
        attention holds less than the MLPs.

        Fused kernels hold less. Adapters, ControlNet and what an attention backend allocates are not counted.
        """
        image, text = tokens.batch * tokens.image, tokens.batch * tokens.text
        dim = config["num_attention_heads"] * config["attention_head_dim"]
        outer = image * config["in_channels"] * config["patch_size"] ** 2
        outer += text * (config["joint_attention_dim"] + dim)
        outer += tokens.batch * (config["pooled_projection_dim"] + dim)
        if config["dual_attention_layers"]:
            outer += 3 * dim * tokens.batch
        return itemsize * math.ceil(outer + two_stream_numbers(tokens, dim, 4 / itemsize, rotated=False))

    @classmethod
    def latents_of(cls, vae: Mapping[str, Any], tokens: Tokens) -> tuple[int, ...]:
        """See `Residency.latents_of`; a token is 2 x 2 latents, the image as nearly square as can be."""
        rows, columns = sides(tokens.image)
        return (tokens.batch, vae["latent_channels"], 2 * rows, 2 * columns)

    def enable_forward_chunking(self, chunk_size: int | None = None, dim: int = 0) -> None:
        """Refuse: MLPs run in one piece here.

        Raises:
            ValueError: always. A narrower plan takes less memory.
        """
        raise ValueError("forward chunking is not done here: set a ratio or a memory budget instead")

    def fuse_qkv_projections(self) -> None:
        """Refuse: q, k and v are made together as they are, and parts have to keep their names.

        Raises:
            ValueError: always.
        """
        raise ValueError("q, k and v are projected together here as they are: leave fuse_qkv_projections out")

    def _load_ip_adapter_weights(self, *args: Any, **kwargs: Any) -> None:
        """As `MMDiT._load_ip_adapter_weights`.

        Raises:
            ValueError: also where blocks have a second attention, which gets nothing of an IP-adapter here.
        """
        if self.config.dual_attention_layers:
            raise ValueError(
                "IP-adapters do not run on models with dual_attention_layers: take one without, as SD3.5 large"
            )
        super()._load_ip_adapter_weights(*args, **kwargs)

    @apply_lora_scale("joint_attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        pooled_projections: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        block_controlnet_hidden_states: Sequence[torch.Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        skip_layers: Sequence[int] | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict; arguments and result are those of the diffusers class.

        Args:
            hidden_states: latents ``[B, C, rows, columns]``, sides multiples of the patch size.
            encoder_hidden_states: prompt embeddings ``[B, S_text, joint_attention_dim]``.
            pooled_projections: pooled prompt embeddings ``[B, pooled_projection_dim]``.
            timestep: ``[B]`` in 0..1000.
            block_controlnet_hidden_states: residuals ``[B, S_image, D]``, spread over the original blocks, of which the
                last takes none; what stands for an interval takes those of all its blocks, a skipped block its own.
            skip_layers: original numbers of blocks to leave out; a student runs as long as one of its blocks would.

        Raises:
            ValueError: there are arguments of an IP-adapter, and none is loaded.
        """
        assert timestep is not None, "diffusers' signature has defaults that it cannot use"
        more = dict(joint_attention_kwargs or {})
        if more and getattr(self, "image_proj", None) is None:
            raise ValueError(f"no IP-adapter is loaded: call load_ip_adapter, or leave {', '.join(sorted(more))} out")
        if "ip_adapter_image_embeds" in more:
            # As diffusers' class does.
            more["ip_hidden_states"], more["temb"] = self.image_proj(more.pop("ip_adapter_image_embeds"), timestep)
        output = self._run(
            self._program(timestep),
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            block_controlnet_hidden_states=block_controlnet_hidden_states,
            joint_attention_kwargs=more or None,
            skip_layers=() if skip_layers is None else tuple(map(int, skip_layers)),
        )
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _walk(  # type: ignore[override]  # names the inputs of `Pluggable._walk`
        self,
        program: Program,
        *,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        block_controlnet_hidden_states: Sequence[torch.Tensor] | None,
        joint_attention_kwargs: dict[str, Any] | None,
        skip_layers: tuple[int, ...],
    ) -> torch.Tensor:
        """Run a program; arguments as in `forward`."""
        patch, channels = self.config.patch_size, self.out_channels
        rows, columns = (side // patch for side in hidden_states.shape[-2:])
        temb = self.time_text_embed(timestep, pooled_projections)
        image = self._walk_blocks(
            program,
            # The stock class has the patches contiguous, too.
            self.pos_embed(hidden_states).contiguous(),
            self.context_embedder(encoder_hidden_states),
            temb,
            control=self._control(block_controlnet_hidden_states),
            skipped=skip_layers,
            joint_attention_kwargs=joint_attention_kwargs,
        )
        tokens: torch.Tensor = self.proj_out(self.norm_out(image, temb))
        patches = tokens.unflatten(1, (rows, columns)).unflatten(-1, (patch, patch, channels))
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, rows * patch, columns * patch)

    def every_condition(
        self, timesteps: torch.Tensor, pooled: torch.Tensor | None = None, guidance: Sequence[float] = ()
    ) -> torch.Tensor:
        """See `Modulations.every_condition`; here too, timesteps lie in [0, 1]."""

        def embed(times: torch.Tensor, texts: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
            found: torch.Tensor = self.time_text_embed(1000 * times, texts)
            return found

        return pooled_conditions(embed, timesteps, pooled, guidance, (self.config.pooled_projection_dim, False))

    def _control(self, samples: Sequence[torch.Tensor] | None) -> Control | None:
        """ControlNet residuals by block; the last block takes none, and shares need not be whole."""
        if samples is None:
            return None
        depth = self.config.num_layers
        return lambda block: samples[int(block / (depth / len(samples)))] if block < depth - 1 else None


def _kind(dual: bool, last: bool) -> str:
    return "-".join([_DUAL] * dual + [_LAST] * last) or _TWO_STREAM


def _kinds(config: Mapping[str, Any]) -> list[str]:
    """The kinds of all blocks."""
    depth, dual = config["num_layers"], set(config["dual_attention_layers"])
    return [_kind(n in dual, n == depth - 1) for n in range(depth)]
