"""Z-Image at any ratio: what its blocks are made of, a block at any width, and diffusers' class over a program.

Text and image run as one stream through the ``layers``. Before that, each goes through a few refiner blocks of its own:
``noise_refiner`` over the image tokens, ``context_refiner`` over the text tokens, which have no modulations. All are
one class of block, of three kinds, named after what passes through them. Their groups are ``heads`` and ``mlp`` (the
channels of a SwiGLU MLP: gate and up rows together). Modulations read the 256 numbers of the timestep embedding, two in
a hundred of a block's parameters, and are always whole.

Refiner blocks are lists of their own, not part of what surrounds the blocks: they are a tenth of the dense parameters
and FLOPs, so a ratio that did not count their FLOPs would not be one, and no plan could go below that tenth.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch

# ModelMixin is for diffusers: a pipeline that loads a class of another package looks for it in the class's module.
from diffusers import ModelMixin, ZImageTransformer2DModel  # noqa: F401
from diffusers.configuration_utils import register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_z_image import (
    ADALN_EMBED_DIM,
    SEQ_MULTI_OF,
    ZImageTransformerBlock,
    ZSingleStreamAttnProcessor,
)
from diffusers.utils import apply_lora_scale
from torch.nn import functional as F

from ppcl_rt import ops
from ppcl_rt.families import original
from ppcl_rt.families.attending import PPCLAttention, adopt_processor, backend_of, call_attention, must_call
from ppcl_rt.families.mmdit import sides
from ppcl_rt.model.block import PluggableBlock
from ppcl_rt.model.exchange import Original, Shapes
from ppcl_rt.model.pluggable import Pluggable
from ppcl_rt.model.program import Program
from ppcl_rt.planning.architecture import Architecture, BlockList, Tokens
from ppcl_rt.planning.block_spec import BlockSpec, Group, Part, Segment
from ppcl_rt.planning.width import LINEAR_MAP, Width

# The kinds of blocks: what passes through them.
Kind = Literal["image", "text", "joint"]
# The list of blocks of each kind, in the order in which they run.
_LISTS: dict[str, Kind] = {"noise_refiner": "image", "context_refiner": "text", "layers": "joint"}


def block_spec(dim: int, heads: int, kind: Kind, qk_norm: bool = True) -> BlockSpec:
    """What a block of a kind is made of, over streams of width ``dim``."""
    head_dim, channels = dim // heads, int(dim / 3 * 8)
    of_heads, of_mlp = (Segment("heads", 0, head_dim),), (Segment("mlp", 0, 1),)

    def part(
        path: str, rows: int, columns: int, axis: Literal[0, 1], units: tuple[Segment, ...], name: str = ""
    ) -> Part:
        return Part(
            path=path, name=name, rows=rows, columns=columns, bias=False, axis=axis, segments=units, stream=kind
        )

    parts = [part(f"attention.{path}", dim, dim, 0, of_heads) for path in ("to_q", "to_k", "to_v")]
    parts += [part("attention.to_out.0", dim, dim, 1, of_heads, "attn")]
    parts += [part(f"feed_forward.{path}", channels, dim, 0, of_mlp) for path in ("w1", "w3")]
    parts += [part("feed_forward.w2", dim, channels, 1, of_mlp, "mlp")]
    if kind != "text":
        columns = min(dim, ADALN_EMBED_DIM)
        parts.append(Part(path="adaLN_modulation.0", rows=4 * dim, columns=columns, stream="sample"))
    return BlockSpec(
        dim=dim,
        head_dim=head_dim,
        heads="heads" if kind == "joint" else {"heads": kind},
        groups={"heads": Group(count=heads), "mlp": Group(count=channels, mappable=True)},
        parts=tuple(parts),
        # The norms before and after both halves, and those of q and k.
        other_params=4 * dim + (2 * head_dim if qk_norm else 0),
    )


class PPCLZImageTransformerBlock(PluggableBlock, ZImageTransformerBlock):
    """The stock block, over the first heads and channels in rank order.

    Modules and their names are those of diffusers. Unlike there, a block is called with both streams, of which it
    updates what its kind says: so blocks of all kinds are called in one way. ``replacements`` are as in the other
    families; without biases, as the layers that they stand in for.

    Attributes:
        kind: what passes through the block.
    """

    # Of the stock block.
    attention: Any
    feed_forward: Any
    attention_norm1: Any
    attention_norm2: Any
    ffn_norm1: Any
    ffn_norm2: Any
    adaLN_modulation: Any  # diffusers' name
    dim: int
    head_dim: int
    modulation: bool

    side_by_side = (("attention.to_q", "attention.to_k", "attention.to_v"),)

    def __init__(self, kind: Kind, **kwargs: Any) -> None:
        super().__init__(**kwargs, modulation=kind != "text")
        self.attention.__class__ = PPCLAttention
        self.kind = kind
        qk_norm = self.attention.norm_q is not None
        self.become_pluggable(block_spec(self.dim, self.dim // self.head_dim, kind, qk_norm))

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        adaln_input: torch.Tensor,
        rope: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        width: Width | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the block.

        Args:
            hidden_states: image stream ``[B, S_image, D]``.
            encoder_hidden_states: text stream ``[B, S_text, D]``.
            adaln_input: timestep embedding ``[B, E']``.
            rope: rotations of each sample's tokens, text first, ``[B, S_text + S_image, E / 2, 2]``.
            key_mask: boolean ``[B, S_text + S_image]``, true on tokens that count, or None.
            width: what to run; None for all that the block holds.

        Returns:
            (text, image) streams.
        """
        text, image, tokens = encoder_hidden_states, hidden_states, encoder_hidden_states.shape[1]
        own = {"image": slice(tokens, None), "text": slice(tokens), "joint": slice(None)}[self.kind]
        mask = None if key_mask is None else key_mask[:, own]
        # A joint block copies both streams next to each other: less than a hundredth of its time.
        x = {"image": image, "text": text}.get(self.kind)
        x = self.update(torch.cat([text, image], 1) if x is None else x, adaln_input, rope[:, own], mask, width)
        if self.kind == "joint":
            return x[:, :tokens], x[:, tokens:]
        return (text, x) if self.kind == "image" else (x, image)

    def update(
        self,
        x: torch.Tensor,
        adaln_input: torch.Tensor,
        rope: torch.Tensor,
        key_mask: torch.Tensor | None,
        width: Width | None,
    ) -> torch.Tensor:
        """Update the tokens ``x [B, S, D]`` that pass through the block."""
        width = width or self.width
        attention: tuple[torch.Tensor | None, ...] = (None, None)
        mlp: tuple[torch.Tensor | None, ...] = (None, None)
        if self.modulation:
            scales_and_gates = self.adaLN_modulation(adaln_input)[:, None].chunk(4, dim=-1)
            attention, mlp = scales_and_gates[:2], scales_and_gates[2:]
        attended = self.attend(_scaled(self.attention_norm1(x), attention[0]), rope, key_mask, width)
        x = x + _gated(self.attention_norm2(attended), attention[1])
        if width["mlp"] == LINEAR_MAP:
            # The map reads the stream as it is: no norm, no modulation, no gate (PPCL eq. 9).
            return ops.linears([ops.Layer(self.output("mlp", LINEAR_MAP), x, residual=x)])[0]
        return x + _gated(self.ffn_norm2(self.feed(_scaled(self.ffn_norm1(x), mlp[0]), width)), mlp[1])

    def attend(self, x: torch.Tensor, rope: torch.Tensor, key_mask: torch.Tensor | None, width: Width) -> torch.Tensor:
        """Attention over ``x [B, S, D]``, its output projected; a module that has to be called is."""
        heads, all_heads = width["heads"], self.spec.groups["heads"].count

        def compute() -> torch.Tensor:
            return self.own_attention(x, rope, key_mask, width)

        if not must_call(self.attention, ZSingleStreamAttnProcessor):
            return compute()
        attended: torch.Tensor = call_attention(
            self.attention,
            ZSingleStreamAttnProcessor,
            compute,
            {"hidden_states": x},
            lambda: {"attention_mask": key_mask, "freqs_cis": torch.view_as_complex(rope)},
            "" if heads == all_heads else f"runs {heads} of {all_heads}",
        )
        return attended

    def own_attention(
        self, x: torch.Tensor, rope: torch.Tensor, key_mask: torch.Tensor | None, width: Width
    ) -> torch.Tensor:
        """`attend` where the module need not be called."""
        attn, heads, batch = self.attention, width["heads"], len(x)
        projection = ops.Projection(attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        # Rotations differ from sample to sample, as lengths do: the operation gets all tokens as those of one sample.
        stream = ops.ProjectedStream(x.flatten(0, 1)[None], projection, rope.flatten(0, 1))
        q, k, v = (
            each.view(batch, -1, heads, self.head_dim) for each in ops.qkv_projection([stream], heads, self.head_dim)
        )
        attended = ops.joint_attention(q, k, v, key_mask=key_mask, backend=backend_of(attn))
        return ops.linears([ops.Layer(self.output("attn", heads), attended, adapter=self.beside("attn", heads))])[0]

    def feed(self, x: torch.Tensor, width: Width) -> torch.Tensor:
        """The MLP over ``x [B, S, D]``."""
        mlp, channels = self.feed_forward, width["mlp"]
        [hidden] = ops.linears([ops.Layer(mlp.w3, x, channels, silu_module=mlp.w1)], activation="swiglu")
        return ops.linears([ops.Layer(self.output("mlp", channels), hidden, adapter=self.beside("mlp", channels))])[0]


def _scaled(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    return x if scale is None else x * (1 + scale)


def _gated(x: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    return x if gate is None else gate.tanh() * x


# diffusers' tools look blocks up by their exact class. These return (text, image).
TransformerBlockRegistry.register(
    PPCLZImageTransformerBlock,
    TransformerBlockMetadata(return_hidden_states_index=1, return_encoder_hidden_states_index=0),
)


class _Lengths(NamedTuple):
    """The tokens of a batch, as counts of each sample.

    Attributes:
        words, patches: of the caption and of the image.
        text, image: the same with the padding tokens that the model computes with, up to a multiple of 32.
    """

    words: list[int]
    patches: list[int]

    @property
    def text(self) -> list[int]:
        """Words and padding tokens."""
        return [padded_length(count) for count in self.words]

    @property
    def image(self) -> list[int]:
        """Patches and padding tokens."""
        return [padded_length(count) for count in self.patches]

    @property
    def most(self) -> tuple[int, int]:
        """The longest text and the largest image: those of the two streams."""
        return max(self.text), max(self.image)


def padded_length(count: int) -> int:
    """How many tokens the model makes of a caption or an image: the next multiple of 32."""
    return count + -count % SEQ_MULTI_OF


class PPCLZImageTransformer2DModel(Pluggable, ZImageTransformer2DModel):
    """A `ZImageTransformer2DModel` that runs at any ratio.

    Built by hand it is the dense model; `load` (or ``from_pretrained``) reads a checkpoint at a ratio. Arguments are
    those of the diffusers class. Inputs and weights of the omni variant (several images a sample, SigLIP features) are
    refused.
    """

    # Of the stock class.
    noise_refiner: torch.nn.ModuleList
    context_refiner: torch.nn.ModuleList
    layers: torch.nn.ModuleList
    all_x_embedder: torch.nn.ModuleDict
    all_final_layer: torch.nn.ModuleDict
    cap_embedder: torch.nn.Module
    t_embedder: torch.nn.Module
    x_pad_token: torch.nn.Parameter
    cap_pad_token: torch.nn.Parameter
    rope_embedder: Any
    t_scale: float
    create_coordinate_grid: Any
    unpatchify: Any
    _patchify_image: Any

    family = "z-image"
    # 1024 x 1024 pixels in patches of 16 x 16, and the longest caption of its pipeline.
    reference = Tokens(image=4096, text=512)
    stock_name = "ZImageTransformer2DModel"
    # Other programs read it by the code of Lumina 2, whose layers have the same original names.
    gguf_architecture = "lumina2"
    lora_loader = "ZImageLoraLoaderMixin"
    block_lists = tuple(_LISTS)
    depth_settings = ("n_refiner_layers", "n_refiner_layers", "n_layers")
    condition = "adaln_input"
    after_blocks = "all_final_layer.2-1"
    one_context = True
    _no_split_modules = ["PPCLZImageTransformerBlock"]
    _repeated_blocks = ["PPCLZImageTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        all_patch_size: tuple[int, ...] = (2,),
        all_f_patch_size: tuple[int, ...] = (1,),
        in_channels: int = 16,
        dim: int = 3840,
        n_layers: int = 30,
        n_refiner_layers: int = 2,
        n_heads: int = 30,
        n_kv_heads: int = 30,
        norm_eps: float = 1e-5,
        qk_norm: bool = True,
        cap_feat_dim: int = 2560,
        siglip_feat_dim: int | None = None,
        rope_theta: float = 256.0,
        t_scale: float = 1000.0,
        axes_dims: tuple[int, ...] = (32, 48, 48),
        axes_lens: tuple[int, ...] = (1024, 512, 512),
    ) -> None:
        if siglip_feat_dim is not None:
            raise ValueError("siglip_feat_dim is set: the omni variant of Z-Image is not served, take one without")
        if dim % n_heads or sum(axes_dims) != dim // n_heads:
            raise ValueError(f"axes_dims {list(axes_dims)} does not add up to {n_heads} heads of a width of {dim}")
        # No stock blocks: building them only to throw them away would take minutes.
        depths = map(self.config.get, self.depth_settings)
        self.fill_lists(**{path: [_LISTS[path]] * depth for path, depth in zip(self.block_lists, depths, strict=True)})
        super().__init__(
            all_patch_size=all_patch_size,
            all_f_patch_size=all_f_patch_size,
            in_channels=in_channels,
            dim=dim,
            n_layers=0,
            n_refiner_layers=0,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            norm_eps=norm_eps,
            qk_norm=qk_norm,
            cap_feat_dim=cap_feat_dim,
            siglip_feat_dim=siglip_feat_dim,
            rope_theta=rope_theta,
            t_scale=t_scale,
            axes_dims=axes_dims,
            axes_lens=axes_lens,
        )
        self.register_to_config(n_layers=n_layers, n_refiner_layers=n_refiner_layers)
        self.become_pluggable()

    @classmethod
    def make_block(cls, config: Mapping[str, Any], kind: str) -> PPCLZImageTransformerBlock:
        """Build one block at full width."""
        return PPCLZImageTransformerBlock(
            kind=next(each for each in _LISTS.values() if each == kind),
            layer_id=0,
            **{name: config[name] for name in ("dim", "n_heads", "n_kv_heads", "norm_eps", "qk_norm")},
        )

    @classmethod
    def originals(cls, shapes: Shapes) -> dict[str, Original]:
        """See `Exchange.originals`."""
        return original.originals(shapes, original.Z_IMAGE)

    @classmethod
    def architecture_of(cls, config: Mapping[str, Any], outer_params: int) -> Architecture:
        """What the dense model is made of."""
        depths = [config[setting] for setting in cls.depth_settings]
        specs = (block_spec(config["dim"], config["n_heads"], kind, config["qk_norm"]) for kind in _LISTS.values())
        return Architecture(
            lists=tuple(
                BlockList(path=path, kind=kind, depth=depth)
                for (path, kind), depth in zip(_LISTS.items(), depths, strict=True)
            ),
            kinds=dict(zip(_LISTS.values(), specs, strict=True)),
            dim=config["dim"],
            outer_params=outer_params,
        )

    def example(self, tokens: Tokens) -> dict[str, Any]:
        """See `Residency.example`; the image is as nearly square as its number of tokens allows."""
        like, patch, frames = next(self.parameters()), self.config.all_patch_size[0], self.config.all_f_patch_size[0]

        def noise(*shape: int) -> list[torch.Tensor]:
            return list(torch.randn((tokens.batch, *shape), device=like.device, dtype=like.dtype))

        return {
            "x": noise(self.config.in_channels, frames, *(patch * side for side in sides(tokens.image))),
            "t": torch.full((tokens.batch,), 0.5, device=like.device),
            "cap_feats": noise(tokens.text, self.config.cap_feat_dim),
            "patch_size": patch,
            "f_patch_size": frames,
            "return_dict": False,
        }

    @classmethod
    def activation_bytes(cls, config: Mapping[str, Any], tokens: Tokens, itemsize: int) -> int:
        """See `Residency.activation_bytes`.

        Of the forward: the inputs as they came, as patches and with their padding, the rotations, the key mask, and the
        embedding of the timestep. Of a block what one of the ``layers`` does. With N tokens of both streams, padding
        included, counted over the batch, a width of D, and f numbers of the dtype in a float32, that is: the streams as
        they came and next to each other, and normed (3 N D), four modulations, and

        - in attention: q, k and v as projected (3 N D), q done and k normed (2 N D), and, while k is rotated in plain
          torch, three float32 copies of it (3 f N D), or afterwards k done and copies of all three (4 N D);
        - in the MLP: what attention gave (N D), and three times the channels while SwiGLU is computed (8 N D).

        Fused kernels hold less. Adapters, ControlNet and what an attention backend allocates are not counted.
        """
        dim, wide = config["dim"], 4 / itemsize
        image, text = padded_length(tokens.image), padded_length(tokens.text)
        joint = image + text
        patch = config["in_channels"] * config["all_patch_size"][0] ** 2 * config["all_f_patch_size"][0]
        outer = (2 * tokens.image + image) * patch + (tokens.text + text) * config["cap_feat_dim"]
        outer += joint * (dim // config["n_heads"] * wide + 2 / itemsize) + min(dim, ADALN_EMBED_DIM)
        block = 4 * dim + joint * dim * (3 + max(5 + 3 * wide, 9))
        return math.ceil(itemsize * tokens.batch * (outer + block))

    @classmethod
    def latents_of(cls, vae: Mapping[str, Any], tokens: Tokens) -> tuple[int, ...]:
        """See `Residency.latents_of`; a token is 2 x 2 latents, the image as nearly square as can be."""
        rows, columns = sides(tokens.image)
        return (tokens.batch, vae["latent_channels"], 2 * rows, 2 * columns)

    def adopt(self, block: Any) -> None:
        """Take over the attention backend, or the processor, of the blocks that are there."""
        for other in self.resident_blocks():
            adopt_processor(block.attention, other.attention, ZSingleStreamAttnProcessor)

    def _obstacle(self, program: Program) -> str:
        """Also where attention processors are called: what they do is not known."""
        blocks: list[Any] = [call.block for call in program.calls]
        if any(type(block.attention.processor) is not ZSingleStreamAttnProcessor for block in blocks):
            return "an attention processor"
        return super()._obstacle(program)

    @apply_lora_scale("joint_attention_kwargs")
    def forward(
        self,
        x: Sequence[torch.Tensor],
        t: torch.Tensor,
        cap_feats: Sequence[torch.Tensor],
        return_dict: bool = True,
        controlnet_block_samples: Mapping[int, torch.Tensor] | None = None,
        siglip_feats: Any = None,
        image_noise_mask: Any = None,
        patch_size: int = 2,
        f_patch_size: int = 1,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Transformer2DModelOutput | tuple[list[torch.Tensor]]:
        """Predict; arguments and result are those of the diffusers class.

        Args:
            x: latents of each sample ``[C, frames, rows, columns]``, of any sizes.
            t: ``[B]`` in [0, 1], where 0 is noise.
            cap_feats: caption embeddings of each sample ``[S_text, cap_feat_dim]``.
            controlnet_block_samples: number in ``layers`` -> residual ``[B, S, D]``, image first in each sample; what
                stands for an interval takes those of all its blocks, a skipped block takes its own.
            siglip_feats, image_noise_mask: of the omni variant, refused.

        Raises:
            ValueError: inputs of the omni variant, patches of a size that the model has not, images that they do not
                divide or that have no positions, or images and captions of different numbers.
        """
        self._refuse(x, cap_feats, siglip_feats, image_noise_mask, patch_size, f_patch_size)
        program = self._program(self.noise_of({"t": t}))
        tokens, sizes, grids = zip(*(self._patchify_image(each, patch_size, f_patch_size) for each in x), strict=True)
        lengths = _Lengths(list(map(len, cap_feats)), list(map(len, tokens)))
        text, image = lengths.most
        device = x[0].device
        # Made from numbers of the host: inputs, so that no graph holds them.
        output = self._run(
            program,
            patches=_stacked(tokens, image),
            captions=_stacked(cap_feats, text),
            padding=(_beyond(lengths.patches, image, device), _beyond(lengths.words, text, device)),
            t=t,
            rope=self._rotations(lengths, grids, device),
            key_mask=_key_mask(lengths, device),
            control=_text_first(controlnet_block_samples or {}, lengths, device),
            patch=f"{patch_size}-{f_patch_size}",
            rows=self._rows(program, t),
        )
        images = self.unpatchify(list(output.unbind()), list(sizes), patch_size, f_patch_size)
        return Transformer2DModelOutput(sample=images) if return_dict else (images,)

    def noise_of(self, arguments: Mapping[str, Any]) -> torch.Tensor | None:
        """See `Caching.noise_of`: ``t`` rises."""
        return None if arguments.get("t") is None else 1 - arguments["t"]

    def _refuse(
        self, x: Any, cap_feats: Any, siglip_feats: Any, image_noise_mask: Any, patch_size: int, f_patch_size: int
    ) -> None:
        """Refuse what is not served, by name."""
        omni = {"siglip_feats": siglip_feats, "image_noise_mask": image_noise_mask}
        given = next((name for name, value in omni.items() if value is not None), None)
        if given or any(isinstance(each, list) for each in x):
            raise ValueError(f"{given or 'a list of images a sample'} is of the omni variant of Z-Image: leave it out")
        if f"{patch_size}-{f_patch_size}" not in self.all_x_embedder:
            had = ", ".join(self.all_x_embedder)
            raise ValueError(f"patch_size and f_patch_size are {patch_size}-{f_patch_size}, the model has {had}")
        if len(x) != len(cap_feats) or not len(x):
            raise ValueError(f"there are {len(x)} images and {len(cap_feats)} captions: give one for each")
        for image, caption in zip(x, cap_feats, strict=True):
            frames, rows, columns = image.shape[1:]
            if frames % f_patch_size or rows % patch_size or columns % patch_size:
                said = f"an image is {frames} frames of {rows} x {columns} latents"
                raise ValueError(f"{said}: wanted multiples of {f_patch_size} and of {patch_size}")
            # A caption begins at 1, and its image after its padding. On a GPU a position too far ends the process.
            before = 1 + padded_length(len(caption))
            wanted = [before + frames // f_patch_size, rows // patch_size, columns // patch_size]
            if any(count > there for count, there in zip(wanted, self.config.axes_lens, strict=True)):
                said = f"a caption of {len(caption)} tokens and its image need {wanted} positions"
                most = list(self.config.axes_lens)
                raise ValueError(f"{said}, the model has {most}: take a shorter caption or a smaller image")

    def _rotations(self, lengths: _Lengths, grids: Iterable[Any], device: torch.device) -> torch.Tensor:
        """Rotations of each sample's tokens, text first, ``[B, S_text + S_image, E / 2, 2]``.

        Captions count on from 1, their padding included; an image begins after its caption, and its padding is at 0.
        """
        text, image = lengths.most
        positions = torch.zeros(len(lengths.words), text + image, 3, dtype=torch.int32, device=device)
        for sample, words, patches, grid in zip(positions, lengths.text, lengths.patches, grids, strict=True):
            sample[:words, 0] = torch.arange(1, words + 1, device=device)
            place = self.create_coordinate_grid(size=grid, start=(words + 1, 0, 0), device=device)
            sample[text : text + patches] = place.flatten(0, 2)
        rotations = torch.view_as_real(self.rope_embedder(positions.flatten(0, 1)))
        return rotations.unflatten(0, positions.shape[:2])

    def embed_timesteps(self, timesteps: torch.Tensor) -> torch.Tensor:
        """See `Modulations.embed_timesteps`."""
        embedded: torch.Tensor = self.t_embedder(timesteps * self.t_scale)
        return embedded.type_as(next(self.parameters()))

    def _graph_settings(self, program: Program) -> Hashable:
        """Attention backends, as set on the blocks and by diffusers' context manager."""
        blocks: list[Any] = [call.block for call in program.calls]
        chosen = tuple(backend_of(block.attention) for block in blocks)
        return (super()._graph_settings(program), chosen, _AttentionBackendRegistry.get_active_backend()[0])

    def _walk(  # type: ignore[override]  # names the inputs of `Pluggable._walk`
        self,
        program: Program,
        *,
        patches: torch.Tensor,
        captions: torch.Tensor,
        padding: tuple[torch.Tensor, torch.Tensor],
        t: torch.Tensor,
        rope: torch.Tensor,
        key_mask: torch.Tensor | None,
        control: Mapping[int, torch.Tensor],
        patch: str,
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run a program.

        Args:
            patches: ``[B, S_image, P]``.
            captions: ``[B, S_text, cap_feat_dim]``.
            padding: of image and text, true on tokens that a padding token takes the place of.
            t: as in `forward`.
            rope: `_rotations`.
            key_mask: ``[B, S_text + S_image]``, true on tokens of the sample; None where all are.
            control: number in ``layers`` -> residual ``[B, S_text + S_image, D]``.
            patch: which of the embedders and final layers to take.
            rows: those of `Modulations`, None where the timestep has to be embedded.

        Returns:
            ``[B, S_image, P]``.
        """
        temb = self.embed_timesteps(t) if rows is None else self._from_rows(program, rows.expand(len(t), -1))[0]
        temb = temb.type_as(patches)
        of_image, of_text = padding
        image = torch.where(of_image[..., None], self.x_pad_token, self.all_x_embedder[patch](patches))
        text = torch.where(of_text[..., None], self.cap_pad_token, self.cap_embedder(captions))
        before = len(self._refiners())
        next_block = before
        for call in program.calls:
            text, image = _add(text, image, control, range(next_block, call.interval.first), before)
            text, image = self._call_block(
                call,
                hidden_states=image,
                encoder_hidden_states=text,
                adaln_input=temb,
                rope=rope,
                key_mask=key_mask,
            )
            text, image = _add(text, image, control, call.interval, before)
            next_block = max(next_block, call.interval.last + 1)
        text, image = _add(text, image, control, range(next_block, program.plan.depth), before)
        output: torch.Tensor = self.all_final_layer[patch](image, c=temb)
        return output

    def _refiners(self) -> range:
        """Numbers of the blocks before ``layers``."""
        return range(2 * self.config.n_refiner_layers)


def _stacked(samples: Sequence[torch.Tensor], length: int) -> torch.Tensor:
    """Samples ``[S, C]`` of different lengths as one tensor ``[B, length, C]``, with zeros at the end."""
    return torch.stack([F.pad(sample, (0, 0, 0, length - len(sample))) for sample in samples])


def _beyond(counts: Sequence[int], length: int, device: torch.device) -> torch.Tensor:
    """``[B, length]``, true beyond the first so many tokens of each sample."""
    return torch.arange(length, device=device) >= torch.tensor(counts, device=device)[:, None]


def _key_mask(lengths: _Lengths, device: torch.device) -> torch.Tensor | None:
    """``[B, S_text + S_image]``, true on the tokens of each sample, padding tokens too; None where all are."""
    text, image = lengths.most
    if min(lengths.text) == text and min(lengths.image) == image:
        return None
    return ~torch.cat([_beyond(lengths.text, text, device), _beyond(lengths.image, image, device)], 1)


def _text_first(
    residuals: Mapping[int, torch.Tensor], lengths: _Lengths, device: torch.device
) -> dict[int, torch.Tensor]:
    """Residuals of ``layers`` as this model lays its tokens out: from the image first in each sample to the text."""
    if not residuals:
        return {}
    text, image = lengths.most
    at = torch.arange(text + image, device=device).repeat(len(lengths.words), 1)
    starts = torch.tensor(lengths.image, device=device)[:, None]
    places = torch.where(at < text, starts + at, at - text)
    return {
        number: residual.take_along_dim(places.clamp(max=residual.shape[1] - 1)[..., None], 1)
        for number, residual in residuals.items()
    }


def _add(
    text: torch.Tensor, image: torch.Tensor, control: Mapping[int, torch.Tensor], blocks: Iterable[int], before: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the ControlNet residuals that follow some blocks, of which ``before`` come before the first of ``layers``."""
    for number in blocks:
        if number - before in control:
            residual = control[number - before]
            text, image = text + residual[:, : text.shape[1]], image + residual[:, text.shape[1] :]
    return text, image
