"""What families of two streams share (MMDiT): image and text tokens with weights of their own, which attend together.

`two_stream_spec` says what such a block is made of, `TwoStreamBlock` runs one at any width, and `MMDiT` is the part of
a model that does not depend on the family: walking a program, ControlNet residuals, attention
backends. A family says where its layers lie (`Layers`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import nn

import ppcl_kernels as kernels
from ppcl_rt import ops
from ppcl_rt.families.attending import adopt_processor, attend, backend_of, call_attention, must_call
from ppcl_rt.model.block import PluggableBlock
from ppcl_rt.model.borrowed import are_borrowed, run_borrowed
from ppcl_rt.model.offloading import arrive
from ppcl_rt.model.pluggable import Pluggable
from ppcl_rt.model.program import BlockCall, Program
from ppcl_rt.planning.architecture import Tokens
from ppcl_rt.planning.block_spec import BlockSpec, Group, Part, Segment, Stream
from ppcl_rt.planning.width import LINEAR_MAP, Width

# Timesteps with pooled texts and guidances that factors of modulations are fitted on: 50 MB at width 3,072.
_MOST_CONDITIONS = 4096
# Under this name of ``joint_attention_kwargs``, blocks find the mask of all keys, text first.
KEY_MASK = "key_mask"
_STREAMS: tuple[Stream, ...] = ("image", "text")
# Paths of what diffusers' joint attention has for each stream: q, k, v, the norms of q and k, and the output.
_PROJECTIONS: Mapping[Stream, tuple[str, ...]] = {
    "image": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "text": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_NORMS: Mapping[Stream, tuple[str, str]] = {
    "image": ("attn.norm_q", "attn.norm_k"),
    "text": ("attn.norm_added_q", "attn.norm_added_k"),
}
_OUTPUTS: Mapping[Stream, str] = {"image": "attn.to_out.0", "text": "attn.to_add_out"}


class Layers(NamedTuple):
    """Where the layers of one stream lie in a block, beside those of its attention.

    Attributes:
        modulation: the linear layer of its modulations, ``[6 D, D]``: shift, scale and gate of the attention half, then
            those of the MLP half.
        norm1, norm2: the norms of both halves.
        mlp: the MLP, a `diffusers.models.attention.FeedForward` with tanh-GELU.
    """

    modulation: str
    norm1: str
    norm2: str
    mlp: str


def two_stream_spec(
    dim: int, heads: int, head_dim: int, layers: Mapping[Stream, Layers], channels: Mapping[Stream, int]
) -> BlockSpec:
    """What a block is made of that updates two streams of width ``dim``, whose MLPs have so many ``channels``.

    Its groups are ``heads`` (of both streams together), ``image`` and ``text`` (the channels of each stream's MLP), and
    ``modulation`` (the rank of both streams' modulations).
    """
    in_heads = (Segment("heads", 0, head_dim),)
    parts = [
        Part(path=path, rows=heads * head_dim, columns=dim, axis=0, segments=in_heads, stream=stream)
        for stream in _STREAMS
        for path in _PROJECTIONS[stream]
    ]
    for stream in _STREAMS:
        attends: dict[str, Any] = {"segments": in_heads, "stream": stream, "updates": stream}
        columns = heads * head_dim
        parts.append(Part(name=f"attn_{stream}", path=_OUTPUTS[stream], rows=dim, columns=columns, axis=1, **attends))
    for stream in _STREAMS:
        mlp, many = layers[stream].mlp, channels[stream]
        where: dict[str, Any] = {"segments": (Segment(stream, 0, 1),), "stream": stream, "updates": stream}
        parts.append(Part(path=f"{mlp}.net.0.proj", rows=many, columns=dim, axis=0, **where))
        parts.append(Part(name=f"mlp_{stream}", path=f"{mlp}.net.2", rows=dim, columns=many, axis=1, **where))
    for stream in _STREAMS:
        path = layers[stream].modulation
        parts.append(modulation_part(f"modulation_{stream}", path, 6 * dim, dim, updates=stream))
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


def modulation_part(name: str, path: str, rows: int, dim: int, updates: Stream | None = None) -> Part:
    """The linear layer of a block's modulations, which the group ``modulation`` factors."""
    return Part(name=name, path=path, rows=rows, columns=dim, stream="sample", updates=updates, factored="modulation")


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
        more: modulations of what a block has besides its two halves.
    """

    name: Stream
    x: torch.Tensor
    attention: Modulation
    mlp: Modulation
    token_index: torch.Tensor | None = None
    more: tuple[Modulation, ...] = ()


class Attending(NamedTuple):
    """What the attention of a block reads.

    Attributes:
        image: what q, k and v of the image are projected from, ``[B, S_image, D]``.
        text: the same of the text, ``[B, S_text, D]``.
        key_mask: boolean ``[B, S_text + S_image]``, true on tokens that count, or None.
        rotations: of image and text, ``[S, E / 2, 2]`` each, or None.
        more: what processors of others read besides (IP-adapters).
    """

    image: torch.Tensor
    text: torch.Tensor
    key_mask: torch.Tensor | None
    rotations: tuple[torch.Tensor, torch.Tensor] | None
    more: Mapping[str, Any] = MappingProxyType({})


class _Found(NamedTuple):
    """How to get at the modules of one stream; each function takes the block."""

    norm1: Callable[[Any], Any]
    norm2: Callable[[Any], Any]
    up: Callable[[Any], Any]
    projection: tuple[Callable[[Any], Any], ...]


def _at(path: str) -> Callable[[Any], Any]:
    """Find what lies at a path in a block; unlike `operator.attrgetter`, Dynamo can trace this."""
    names = path.split(".")

    def find(block: Any) -> Any:
        for name in names:
            block = getattr(block, name)
        return block

    return find


class ModulatedBlock(PluggableBlock):
    """A block whose halves are shifted, scaled and gated by what it is conditioned on."""

    # Of diffusers' blocks.
    attn: Any

    def modulation(
        self, name: str, temb: torch.Tensor, width: Width, known: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[Modulation, ...]:
        """The modulations that a factored part makes of ``temb [B, D]``; those that are ``known`` are taken."""
        if known is not None:
            product = known[name][: len(temb)]
        else:
            product = self.factored(name, self.modulation_input(temb), "modulation", width["modulation"])
        parts = product.chunk(product.shape[-1] // self.spec.dim, dim=-1)
        return tuple(Modulation(*parts[n : n + 3]) for n in range(0, len(parts), 3))


class TwoStreamBlock(ModulatedBlock):
    """A diffusers block of two streams, over the first heads and channels in rank order.

    ``replacements`` holds what runs in place of a part at a narrower width: output layers that least squares has
    compensated for what is left out (a width without one uses a prefix of the full layer), linear maps in place of
    MLPs, and modulations of a low rank.

    Attributes:
        layers: where the layers of each stream lie.
        stock_processor: diffusers' attention processor, whose work is done here.
    """

    layers: ClassVar[Mapping[Stream, Layers]]
    stock_processor: ClassVar[type]
    _found: ClassVar[dict[Stream, _Found]]

    side_by_side = tuple(_PROJECTIONS.values())

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "layers" in cls.__dict__:
            cls._found = {
                stream: _Found(
                    _at(paths.norm1),
                    _at(paths.norm2),
                    _at(f"{paths.mlp}.net.0.proj"),
                    tuple(map(_at, (*_PROJECTIONS[stream], *_NORMS[stream]))),
                )
                for stream, paths in cls.layers.items()
            }

    def attention_input(self, stream: UpdatedStream) -> torch.Tensor:
        """What q, k and v of a stream are projected from: normalised and modulated, ``[B, S, D]``."""
        norm = self._found[stream.name].norm1(self)
        return ops.ada_layer_norm(stream.x, norm, stream.attention.scale, stream.attention.shift, stream.token_index)

    def updated_text(
        self, text: torch.Tensor, condition: torch.Tensor, width: Width, known: Mapping[str, torch.Tensor] | None
    ) -> UpdatedStream:
        """The text stream with its modulations; reference images, which only the image has, come last in a batch."""
        attention, mlp = self.modulation("modulation_text", condition[: len(text)], width, known)
        return UpdatedStream("text", text, attention, mlp)

    def text_input(
        self,
        text: torch.Tensor,
        condition: torch.Tensor,
        width: Width,
        modulations: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """See `PluggableBlock.text_input`; the condition is the timestep embedding ``[B, D]``."""
        return self.attention_input(self.updated_text(text, condition, width, modulations))

    def run_streams(
        self,
        image: torch.Tensor,
        text: torch.Tensor,
        temb: torch.Tensor,
        *,
        rotations: tuple[torch.Tensor, torch.Tensor] | None,
        key_mask: torch.Tensor | None,
        width: Width | None,
        text_input: torch.Tensor | None,
        modulations: Mapping[str, torch.Tensor] | None,
        token_index: torch.Tensor | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the block.

        Args:
            image: ``[B, S_image, D]``.
            text: ``[B, S_text, D]``.
            temb: what modulations are made of ``[B, D]`` (``[2 B, D]`` with ``token_index``).
            rotations: of image and text, ``[S, E / 2, 2]`` each, or None.
            key_mask: boolean ``[B, S_text + S_image]``, true on tokens that count, or None.
            width: what to run; None for all that the block holds.
            text_input: ``[B, S_text, D]``, what to project the text's q, k and v from, in a block that does not update
                the text stream (PPCL eq. 8): no text output, no text MLP; the text is returned as it came.
            modulations: ``[B, 6 D]`` (``[2 B, 6 D]``) of each factored part by name, where they are known already.
            token_index: ``[B, S_image]``, which of two modulations an image token takes.
            more: see `Attending`.

        Returns:
            (text, image) streams, in diffusers' order.
        """
        width = width or self.width
        attention, mlp, *others = self.modulation("modulation_image", temb, width, modulations)
        updated = [UpdatedStream("image", image, attention, mlp, token_index, tuple(others))]
        if text_input is None:
            updated.append(self.updated_text(text, temb, width, modulations))
            text_input = self.attention_input(updated[-1])
        called = must_call(self.attn, self.stock_processor)
        inputs = Attending(self.attention_input(updated[0]), text_input, key_mask, rotations, more or {})
        names, added = [s.name for s in updated], None
        if called:
            attended, added = self.called_attention(names, inputs, width)
        else:
            attended = self.attention(inputs, width)
        # What the image's q, k and v were made of is held no longer (`two_stream_numbers`).
        del inputs
        updated = self.add_attention(updated, attended, width, projected=called)
        image, *updated_text = self.add_feed_forward(updated, width)
        if added is not None:
            order = self.orders.get("heads")
            # It is added as the heads give it, without an output layer that knows their order.
            heads = (
                added if order is None else added.unflatten(-1, (len(order), -1))[..., order.argsort(), :].flatten(-2)
            )
            image = image + heads
        return updated_text[0] if updated_text else text, image

    def attention(self, inputs: Attending, width: Width) -> dict[Stream, torch.Tensor]:
        """Attend over both streams together; gives ``[B, S, heads * E]`` of each stream by name."""
        image_rope, text_rope = inputs.rotations or (None, None)
        image_qkv, text_qkv = (
            ops.Projection(*(at(self) for at in self._found[stream].projection)) for stream in _STREAMS
        )
        q, k, v = ops.qkv_projection(
            [
                ops.ProjectedStream(inputs.text, text_qkv, text_rope),
                ops.ProjectedStream(inputs.image, image_qkv, image_rope),
            ],
            width["heads"],
            self.spec.head_dim,
        )
        joint = attend(self.attn, q, k, v, inputs.key_mask)
        tokens = inputs.text.shape[1]
        return {"text": joint[:, :tokens], "image": joint[:, tokens:]}

    def called_attention(
        self, names: Sequence[Stream], inputs: Attending, width: Width
    ) -> tuple[dict[Stream, torch.Tensor], torch.Tensor | None]:
        """As `attention`, by a call of the module (`ppcl_rt.families.attending`).

        Returns:
            Outputs of ``names``, projected, and what an IP-adapter adds to the image after the MLP, None for nothing.
        """
        heads, all_heads = width["heads"], self.spec.groups["heads"].count
        narrow = "" if heads == all_heads else f"runs {heads} of {all_heads}"
        if "text" not in names and self.spec.may_leave:
            narrow = "does not update the text"

        def compute() -> Any:
            attended = self.attention(inputs, width)
            layers = [
                ops.Layer(
                    self.output(f"attn_{name}", heads), attended[name], adapter=self.beside(f"attn_{name}", heads)
                )
                for name in names
            ]
            projected = ops.linears(layers)
            return projected[0] if len(projected) == 1 else tuple(projected)

        result = call_attention(
            self.attn,
            self.stock_processor,
            compute,
            {"hidden_states": inputs.image, "encoder_hidden_states": inputs.text},
            lambda: {**self.processor_arguments(inputs), **inputs.more},
            narrow,
        )
        results: tuple[Any, ...] = (result,) if isinstance(result, torch.Tensor) else result
        return dict(zip(names, results, strict=False)), results[2] if len(results) > 2 else None

    def processor_arguments(self, inputs: Attending) -> dict[str, Any]:
        """What diffusers' block gives its processor next to the hidden states."""
        return {}

    def add_attention(
        self,
        streams: list[UpdatedStream],
        attended: Mapping[Stream, torch.Tensor],
        width: Width,
        projected: bool = False,
    ) -> list[UpdatedStream]:
        """``x + gate * out(attended)`` for each stream, in one launch; with ``projected``, ``x + gate * attended``."""
        if projected:
            return [
                s._replace(x=s.x + kernels.per_token(s.attention.gate, s.token_index) * attended[s.name])
                for s in streams
            ]
        layers = [
            ops.Layer(
                self.output(f"attn_{s.name}", width["heads"]),
                attended[s.name],
                None,
                s.attention.gate,
                s.token_index,
                s.x,
                adapter=self.beside(f"attn_{s.name}", width["heads"]),
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
            count, found = width[s.name], self._found[s.name]
            output, adapter = self.output(f"mlp_{s.name}", count), self.beside(f"mlp_{s.name}", count)
            down = ops.Layer(output, s.x, None, s.mlp.gate, s.token_index, residual=s.x, adapter=adapter)
            if count == LINEAR_MAP:
                # The map reads the stream as it is: no norm, no modulation, no gate (PPCL eq. 9).
                [after[s.name]] = ops.linears([down._replace(gate=None, token_index=None)])
                continue
            normed = ops.ada_layer_norm(s.x, found.norm2(self), s.mlp.scale, s.mlp.shift, s.token_index)
            ups.append(ops.Layer(found.up(self), normed, count))
            downs[s.name] = down
        if ups:
            hidden = ops.linears(ups, activation="gelu")
            layers = [down._replace(x=x) for down, x in zip(downs.values(), hidden, strict=True)]
            after |= dict(zip(downs, ops.linears(layers), strict=True))
        return [after[s.name] for s in streams]


def in_range(x: torch.Tensor) -> torch.Tensor:
    """A stream in float16 without infinities, as diffusers' blocks return it."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def joint_mask(text_mask: torch.Tensor | None, image_tokens: int) -> torch.Tensor | None:
    """The mask of all keys ``[B, S_text + S_image]``, text first, of one of the text; None where there is none."""
    if text_mask is None:
        return None
    return torch.cat([text_mask, text_mask.new_ones(text_mask.shape[0], image_tokens)], dim=1)


def sides(tokens: int) -> tuple[int, int]:
    """Rows and columns of an image, as nearly square as its number of tokens allows."""
    rows = max(n for n in range(1, math.isqrt(tokens) + 1) if tokens % n == 0)
    return rows, tokens // rows


def two_stream_numbers(tokens: Tokens, dim: int, wide: float, timesteps: int = 1, rotated: bool = True) -> float:
    """The most numbers of its dtype that a dense block holds at once, in plain torch.

    With I image tokens, T text tokens and N = I + T, counted over the batch; streams of width D, heads of A = D
    channels together, MLPs of C = 4 D; f numbers of the dtype in a float32:

    - always: the streams as they came (N D), the embedding of the timestep before and after SiLU, and six modulations
      for each stream;
    - in attention, where q and k are rotated: what q, k and v are projected from (N D); q, k and v as projected
      (3 N A); and while k of the image is rotated, q of both streams and k of the text done (N A + T A), k normed
      (I A), and three float32 copies of it (3 f I A). Where they are not, the MLPs hold more;
    - in the MLPs: the streams with their attention (N D), what attention gave (N A), what it read of the text (T D),
      the norms (N D), and the channels of both streams, of one twice while GELU is computed, or those of the image
      with the product, the gated product and the sum.

    Args:
        tokens: of the forward.
        dim: D.
        wide: f.
        timesteps: of a sample, each with modulations of its own.
        rotated: whether q and k are.
    """
    image, text = tokens.batch * tokens.image, tokens.batch * tokens.text
    joint, channels = image + text, 4 * dim
    modulations = (2 + 2 * 6) * dim * tokens.batch * timesteps
    attention = (5 * joint + text + image + 3 * wide * image) * dim if rotated else 0
    hidden = max(2 * image + text, image + 2 * text) * channels
    feed_forward = (3 * joint + text) * dim + max(hidden, joint * channels + 3 * image * dim)
    return joint * dim + modulations + max(attention, feed_forward)


def residual_after(samples: Sequence[torch.Tensor], block: int, depth: int, repeat: bool = False) -> torch.Tensor:
    """The ControlNet residual that follows a block.

    Args:
        samples: residuals, for a list of ``depth`` blocks.
        block: its number in the list.
        repeat: whether residuals go round; else each serves as many blocks in a row.
    """
    return samples[block % len(samples) if repeat else block // math.ceil(depth / len(samples))]


# Gives the ControlNet residual that follows a block of the dense model, None where there is none.
Control = Callable[[int], torch.Tensor | None]


class MMDiT(Pluggable):
    """Mixin for a model of two streams, between the family's class and diffusers' class.

    Attributes:
        stock_processor: diffusers' attention processor, whose work blocks do themselves.
    """

    stock_processor: ClassVar[type]

    def adopt(self, block: Any) -> None:
        """Take over the attention backend, or the processor, of the blocks that are there."""
        for other in self.resident_blocks():
            if type(other) is type(block) or type(other.attn.processor) is self.stock_processor:
                adopt_processor(block.attn, other.attn, self.stock_processor)

    def _load_ip_adapter_weights(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers' class, which counts blocks and gives each weights of its own; heads then go in rank order.

        Raises:
            ValueError: not all blocks of the dense model are there, or others are.
        """
        if len(self.blocks()) != self.catalog.architecture.depth or self.students:
            raise ValueError("IP-adapters run at ratio 1 alone: call set_ratio(1) and trim() before load_ip_adapter")
        theirs: Any = super()
        theirs._load_ip_adapter_weights(*args, **kwargs)
        for block in self.blocks():
            order = block.orders.get("heads")
            if order is None or type(block.attn.processor) is self.stock_processor:
                continue
            for path, layer in block.attn.processor.named_modules():
                if isinstance(layer, nn.Linear) and path.split(".")[0] in ("to_k_ip", "to_v_ip"):
                    for tensor in layer.parameters():
                        tensor.data = tensor.data.unflatten(0, (len(order), -1))[order].flatten(0, 1)

    def _obstacle(self, program: Program) -> str:
        """Also where attention processors are called: what they do is not known."""
        blocks: list[Any] = [call.block for call in program.calls]
        if any(type(block.attn.processor) is not self.stock_processor for block in blocks):
            return "an attention processor"
        return super()._obstacle(program)

    def _graph_settings(self, program: Program) -> Hashable:
        """Attention backends, as set on the blocks and by diffusers' context manager."""
        blocks: list[Any] = [call.block for call in program.calls]
        chosen = tuple(backend_of(block.attn) for block in blocks)
        return (super()._graph_settings(program), chosen, _AttentionBackendRegistry.get_active_backend()[0])

    def _walk_blocks(
        self,
        program: Program,
        image: torch.Tensor,
        text: torch.Tensor,
        temb: torch.Tensor,
        known: Sequence[Mapping[str, torch.Tensor] | None] | None = None,
        control: Control | None = None,
        skipped: Collection[int] = (),
        **arguments: Any,
    ) -> torch.Tensor:
        """Run the blocks of a program; returns the image stream ``[B, S_image, D]``.

        Args:
            image, text: the streams as they enter the first block.
            temb: what blocks are conditioned on.
            known: for each block call, modulations that are known already.
            control: residuals by the numbers of the dense model's blocks; what stands for an interval takes those of
                all its blocks, a skipped block takes its own.
            skipped: blocks of the dense model that this forward leaves out of the plan; what stands for an interval
                runs as long as one of its blocks would.
            arguments: that all blocks are called with.
        """
        if control is not None and self._parallel_config is not None:
            raise ValueError(
                "ControlNet residuals are of all tokens, and processes share them: leave one of the two out"
            )
        calls = program.calls
        first_inputs: dict[int, torch.Tensor] = {}

        def first_input(number: int, text: torch.Tensor) -> torch.Tensor:
            """What the first block of a text run read, by its number; a cache may have left it out."""
            if number not in first_inputs:
                more = {} if known is None or known[number] is None else {"modulations": known[number]}
                arrive(calls[number].block)
                first_inputs[number] = calls[number].block.text_input(text, temb, calls[number].width, **more)
            return first_inputs[number]

        def step(number: int, text: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            call, run = calls[number], calls[number].text_run
            # Only where there are any: hooks of others know the call as it is in diffusers.
            more: dict[str, Any] = {}
            if known is not None and known[number] is not None:
                more["modulations"] = known[number]
            image = _controlled(image, control, range(end_before(calls, number), call.interval.first))
            if run is not None and run.is_first:
                first_input(number, text)
            elif run is not None and run.input_map is not None:
                read = first_input(_first_of_run(calls, number), text)
                more["text_input"] = read + run.input_map(read)
            if not all(block in skipped for block in call.interval):
                text, image = self._call_block(
                    call, hidden_states=image, encoder_hidden_states=text, temb=temb, **arguments, **more
                )
            if run is not None and run.exit_map is not None:
                text = text + run.exit_map(text)
            return text, _controlled(image, control, call.interval)

        if are_borrowed(self):
            text, image = run_borrowed(self, program, step, text, image)
        else:
            for number in range(len(calls)):
                text, image = step(number, text, image)
        return _controlled(image, control, range(end_before(calls, len(calls)), program.plan.depth))


def end_before(calls: Sequence[BlockCall], number: int) -> int:
    """The block after those that the calls before a number stand for."""
    return calls[number - 1].interval.last + 1 if number else 0


def _first_of_run(calls: Sequence[BlockCall], number: int) -> int:
    """The call with which the text run of another begins."""
    while (run := calls[number].text_run) is not None and not run.is_first:
        number -= 1
    return number


def pooled_conditions(
    embed: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor],
    timesteps: torch.Tensor,
    pooled: torch.Tensor | None,
    guidance: Sequence[float],
    wanted: tuple[int, bool],
) -> torch.Tensor:
    """What blocks are conditioned on at every timestep with some pooled texts and guidances each, ``[m, E]``.

    Texts and guidances are paired, and the pairs go round: neighbouring timesteps meet others.

    Args:
        embed: of timesteps ``[n]``, pooled texts ``[n, E']`` and guidances ``[n]``.
        timesteps: ``[n]`` in [0, 1].
        pooled: ``[N, E']``.
        guidance: values.
        wanted: E', and whether the model embeds a guidance.

    Raises:
        ValueError: prompts are missing or have another size, or a guidance is missing or out of place.
    """
    size, guided = wanted
    if pooled is None:
        raise ValueError("modulations of this family see the pooled text: say --prompts FILE")
    if pooled.ndim != 2 or pooled.shape[1] != size or not len(pooled):
        raise ValueError(f"pooled text embeddings are [N, {size}], not {list(pooled.shape)}")
    if guided != bool(guidance):
        raise ValueError("this model embeds a guidance: say --guidance" if guided else "this model embeds no guidance")
    pairs = len(pooled) * max(1, len(guidance))
    each = min(pairs, max(1, _MOST_CONDITIONS // len(timesteps)))
    pair = torch.arange(len(timesteps) * each, device=timesteps.device) % pairs
    values = timesteps.new_tensor(guidance)[pair // len(pooled)] if guided else None
    return embed(timesteps.repeat_interleave(each), pooled.to(timesteps)[pair % len(pooled)], values)


def _controlled(image: torch.Tensor, control: Control | None, blocks: Iterable[int]) -> torch.Tensor:
    """Add the ControlNet residuals that follow these blocks."""
    if control is not None:
        for residual in map(control, blocks):
            image = image if residual is None else image + residual
    return image
