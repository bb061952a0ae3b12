"""What a fit run checks: every kernel, with every tile that can be chosen here, in the forms that models use.

S tokens (image, text), D model dimension, H heads of E channels, C hidden channels of an MLP. A *form* is one variant
of a kernel's computation at one shape. All forms of one kernel and tile run in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map_only

from ppcl_kernels.ada_layer_norm import Tile as NormTile
from ppcl_kernels.ada_layer_norm import ada_layer_norm, ada_layer_norm_reference, prepare_ada_layer_norm
from ppcl_kernels.gated_residual import Tile as ResidualTile
from ppcl_kernels.gated_residual import gated_residual, gated_residual_reference, prepare_gated_residual
from ppcl_kernels.heads import NO_BIASES, joint_outputs, norm_rope_reference
from ppcl_kernels.joint_attention import Tile as AttentionTile
from ppcl_kernels.joint_attention import joint_attention, launch_key_ranges, prepare_joint_attention
from ppcl_kernels.launch import Target
from ppcl_kernels.linear import Activation, Linear, grouped_linear, prepare_linear
from ppcl_kernels.matmul import Tile
from ppcl_kernels.norm_rope import Tile as NormRopeTile
from ppcl_kernels.norm_rope import launch_norm_rope, prepare_norm_rope
from ppcl_kernels.qkv_projection import (
    Stream,
    prepare_qkv_projection,
    qkv_projection,
    qkv_projection_reference,
    tile_candidates,
)


class Shape(NamedTuple):
    """Sizes of inputs; no tile divides the odd counts of tokens."""

    heads: int
    head_dim: int
    hidden: int
    image: int
    text: int
    odd_image: int
    odd_text: int

    @property
    def dim(self) -> int:
        """The model dimension D."""
        return self.heads * self.head_dim


# A 20B two-stream model at 1024 x 1024.
FULL = Shape(heads=24, head_dim=128, hidden=12288, image=4096, text=512, odd_image=1021, odd_text=37)
# For compute-sanitizer, under which a kernel takes a hundred times as long: few tiles, with partial ones in every
# dimension.
SMALL = Shape(heads=4, head_dim=128, hidden=768, image=300, text=70, odd_image=129, odd_text=1)
# For triton's interpreter.
TINY = Shape(heads=4, head_dim=8, hidden=72, image=11, text=2, odd_image=5, odd_text=1)


# Of adapters.
_RANK = 16


@dataclass(frozen=True)
class Setting:
    """Device, dtype and shape that cases are made for."""

    device: torch.device
    dtype: torch.dtype
    shape: Shape


class Prepared(NamedTuple):
    """A prepared launch (`ppcl_kernels.prepared`).

    Attributes:
        launch: the prepared launch.
        call: calls it with the inputs that it was prepared with.
        elsewhere: calls it with copies of those inputs.
    """

    launch: Any
    call: Callable[[], Sequence[torch.Tensor]]
    elsewhere: Callable[[], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Work:
    """A form with its inputs.

    Attributes:
        call: runs the kernel. It has to allocate results by ``new_empty`` or ``empty_like``, which a check poisons.
        exact: computes the same in float64; rotations use float32 tables, whose roundings are 2^16 times finer than
            those of bf16.
        roundings, terms: those of its `ppcl_kernels.tools.judge.Limit`.
        prepare: prepares the launch for repeated calls; None if no model does that.
    """

    call: Callable[[], Sequence[torch.Tensor]]
    exact: Callable[[], Iterable[torch.Tensor]]
    roundings: int
    terms: int
    prepare: Callable[[], Prepared] | None = None


@dataclass(frozen=True)
class Case:
    """One form of one kernel with one tile; ``make`` makes its inputs."""

    kernel: str
    tile: tuple[int, ...]
    form: str
    make: Callable[[], Work]


def all_cases(setting: Setting) -> list[Case]:
    """Return the cases of all kernels."""
    return [
        *_linear_cases(setting),
        *_qkv_cases(setting),
        *_attention_cases(setting),
        *_key_range_cases(setting),
        *_norm_cases(setting),
        *_norm_rope_cases(setting),
    ]


class _Maker:
    """Makes tensors for a setting."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.shape = setting.shape

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Draw normal values."""
        return torch.randn(shape, dtype=self.setting.dtype, device=self.setting.device) * scale

    def weight(self, outputs: int, inputs: int, kept: int | None = None) -> torch.Tensor:
        """Draw a weight; products of its first ``kept`` inputs have values of size 1."""
        return self.normal(outputs, inputs, scale=(kept or inputs) ** -0.5)

    def modulation(self, rows: int) -> torch.Tensor:
        """Draw one of six modulations that are one tensor: a view, as in a model."""
        return self.normal(rows, 6 * self.shape.dim).chunk(6, dim=1)[2]

    def index(self, batch: int, tokens: int) -> torch.Tensor:
        """Draw zeros and ones."""
        return torch.randint(0, 2, (batch, tokens), device=self.setting.device)

    def rope(self, tokens: int) -> torch.Tensor:
        """Make cosines and sines of angles between 0 and 2 pi, ``[S, E / 2, 2]`` in float32."""
        angles = torch.rand(tokens, self.shape.head_dim // 2, device=self.setting.device) * 6.28
        return torch.stack((angles.cos(), angles.sin()), dim=-1)


def _double(values: Any) -> Any:
    """Return floating-point tensors as float64, everything else as it is."""
    return tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, values)


def _elsewhere(values: Any) -> Any:
    """Copy tensors to other addresses, with the same strides."""
    return tree_map_only(
        torch.Tensor,
        lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t),
        values,
    )


def _prepared(launch: Any, *arguments: Any, moved: Any = None) -> Prepared:
    """Return calls of a prepared launch with its arguments, and with ``moved`` (by default copies) in their place."""

    def results(given: Sequence[Any]) -> Sequence[torch.Tensor]:
        made = launch(*given)
        return [made] if isinstance(made, torch.Tensor) else made

    # The copies stay alive, so that results do not get their memory.
    copies = _elsewhere(arguments) if moved is None else moved
    return Prepared(launch, lambda: results(arguments), lambda: results(copies))


def _form(what: str, batch: int, *tokens: int) -> str:
    return f"{what}, {batch} x {'+'.join(map(str, tokens))} tokens"


def _linear_cases(setting: Setting) -> Iterator[Case]:
    shape = setting.shape
    whole, odd = (shape.image, shape.text), (shape.odd_image, shape.odd_text)
    # What follows the product, samples, tokens, channels that are kept (0 for a layer without channels).
    forms = (
        ("up gelu", 1, whole, shape.hidden),
        ("down gate residual", 1, whole, shape.hidden),
        ("out residual", 2, odd, 0),
        ("up gelu, half the channels", 2, odd, shape.hidden // 2),
        ("up swiglu", 1, whole, shape.hidden),
        ("up swiglu, half the channels", 2, odd, shape.hidden // 2),
        ("down gate index residual, half the channels", 2, odd, shape.hidden // 2),
        ("up swiglu, adapters", 2, odd, shape.hidden // 2),
        ("down gate residual, adapters", 1, whole, shape.hidden),
    )
    target = Target.of(setting.device)
    with_two = Tile.candidates(target, setting.dtype, two_weights=True)
    adapted = [Tile.candidates(target, setting.dtype, two, _RANK) for two in (False, True)]
    for tile in Tile.candidates(target, setting.dtype):
        for what, batch, tokens, channels in forms:
            if ("swiglu" not in what or tile in with_two) and (
                "adapters" not in what or tile in adapted["swiglu" in what]
            ):
                make = partial(_linear, setting, tile, what, batch, tokens, channels)
                yield Case("linear", tuple(tile), _form(what, batch, *tokens), make)


def _linear(setting: Setting, tile: Tile, what: str, batch: int, tokens: Sequence[int], channels: int) -> Work:
    make, shape = _Maker(setting), setting.shape
    activation: Activation = "gelu" if "gelu" in what else "swiglu" if "swiglu" in what else "none"
    groups = []
    for count in tokens:
        if activation != "none":
            x, weight = make.normal(batch, count, shape.dim), make.weight(shape.hidden, shape.dim)
            silu = make.weight(shape.hidden, shape.dim) if activation == "swiglu" else None
            layer = Linear(x, weight, make.normal(shape.hidden), channels, silu_weight=silu)
            groups.append(_with_factors(make, layer) if "adapters" in what else layer)
            continue
        inputs = channels or shape.dim
        x, residual = make.normal(batch, count, inputs), make.normal(batch, count, shape.dim)
        # The weight holds all channels; those that are kept are a prefix of its columns.
        weight = make.weight(shape.dim, shape.hidden if channels else shape.dim, inputs)
        index = make.index(batch, count) if "index" in what else None
        gate = make.modulation(batch if index is None else 2 * batch) if "gate" in what else None
        layer = Linear(x, weight, make.normal(shape.dim), None, gate, index, residual)
        groups.append(_with_factors(make, layer) if "adapters" in what else layer)

    def exact() -> Iterator[torch.Tensor]:
        for g in groups:
            yield Linear(*_double(tuple(g))).reference(activation)

    def prepare() -> Prepared:
        # Weights do not move.
        moving = ("x", "gate", "index", "residual")
        moved = [g._replace(**{name: _elsewhere(getattr(g, name)) for name in moving}) for g in groups]
        return _prepared(prepare_linear(groups, activation=activation, tile=tile), groups, moved=(moved,))

    # SwiGLU multiplies two products, each of size 1 with its own error.
    terms = groups[0].x.shape[2] * (4 if activation == "swiglu" else 1)
    # What is between the two factors of an adapter is rounded too.
    roundings = 2 if "adapters" in what else 1
    return Work(lambda: grouped_linear(groups, activation=activation, tile=tile), exact, roundings, terms, prepare)


def _with_factors(make: _Maker, layer: Linear) -> Linear:
    """The layer with an adapter for each weight; its products have values of size 1, as those of the weights have."""
    (n, k), inputs = layer.weight.shape, layer.x.shape[2]
    pairs = [(make.weight(_RANK, k, inputs), make.weight(n, _RANK)) for _ in range(2)]
    layer = layer._replace(down=pairs[0][0], up=pairs[0][1])
    return layer if layer.silu_weight is None else layer._replace(silu_down=pairs[1][0], silu_up=pairs[1][1])


def _three(make: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make one each for q, k and v."""
    return make(), make(), make()


def _streams(
    setting: Setting, batch: int, tokens: Sequence[int], queries: Sequence[bool], adapted: bool = False
) -> list[Stream]:
    make, shape = _Maker(setting), setting.shape
    downs, ups = (
        (_three(lambda: make.weight(_RANK, shape.dim)), _three(lambda: make.weight(shape.dim, _RANK)))
        if adapted
        else ((None,) * 3,) * 2
    )
    return [
        Stream(
            make.normal(batch, count, shape.dim),
            _three(lambda: make.weight(shape.dim, shape.dim)),
            _three(lambda: make.normal(shape.dim)),
            (1 + make.normal(shape.head_dim, scale=0.1), 1 + make.normal(shape.head_dim, scale=0.1)),
            make.rope(count),
            asked,
            downs,
            ups,
        )
        for count, asked in zip(tokens, queries, strict=True)
    ]


def _qkv_cases(setting: Setting) -> Iterator[Case]:
    shape = setting.shape
    whole, odd = (shape.text, shape.image), (shape.odd_text, shape.odd_image)
    # Name, samples, tokens, whether the text has queries, how many heads, whether they are given by number.
    forms = (
        ("all heads", 1, whole, True, shape.heads, False),
        ("half the heads, adapters", 2, odd, True, shape.heads // 2, False),
        ("half the heads", 2, odd, True, shape.heads // 2, False),
        ("list of heads", 2, odd, True, shape.heads // 2 - 1, True),
        ("no text queries", 1, odd, False, shape.heads, False),
    )
    target = Target.of(setting.device)
    adapted = tile_candidates(target, setting.dtype, shape.head_dim, _RANK)
    for tile in tile_candidates(target, setting.dtype, shape.head_dim):
        for what, batch, tokens, text_queries, heads, listed in forms:
            if "adapters" in what and tile not in adapted:
                continue
            make = partial(_qkv, setting, tile, batch, tokens, text_queries, heads, listed, "adapters" in what)
            yield Case("qkv_projection", tuple(tile), _form(what, batch, *tokens), make)


def _qkv(
    setting: Setting,
    tile: Tile,
    batch: int,
    tokens: Sequence[int],
    text_queries: bool,
    heads: int,
    listed: bool,
    adapted: bool,
) -> Work:
    streams, head_dim = _streams(setting, batch, tokens, (text_queries, True), adapted), setting.shape.head_dim
    chosen: int | torch.Tensor = heads
    if listed:
        chosen = torch.randperm(setting.shape.heads, device=setting.device)[:heads].to(torch.int32)

    def exact() -> Sequence[torch.Tensor]:
        return qkv_projection_reference([Stream(*_double(tuple(s))) for s in streams], chosen, head_dim)

    def prepare() -> Prepared:
        moved = [s._replace(x=_elsewhere(s.x), rope=_elsewhere(s.rope)) for s in streams]
        launch = prepare_qkv_projection(streams, chosen, head_dim, tile=tile)
        return _prepared(launch, streams, chosen, moved=(moved, _elsewhere(chosen)))

    call = partial(qkv_projection, streams, chosen, head_dim, tile=tile)
    return Work(call, exact, 2 if adapted else 1, setting.shape.dim, prepare)


def _norm_rope_cases(setting: Setting) -> Iterator[Case]:
    shape = setting.shape
    forms = (
        ("all heads", 1, (shape.text, shape.image), True, shape.heads),
        ("bias, half the heads", 2, (shape.odd_text, shape.odd_image), True, shape.heads // 2),
        ("no text queries", 1, (shape.odd_text, shape.odd_image), False, shape.heads),
    )
    for tile in NormRopeTile.candidates(Target.of(setting.device), setting.dtype):
        for what, batch, tokens, text_queries, heads in forms:
            make = partial(_norm_rope, setting, tile, batch, tokens, text_queries, heads, "bias" in what)
            yield Case("norm_rope", tuple(tile), _form(what, batch, *tokens), make)


def _norm_rope(
    setting: Setting,
    tile: NormRopeTile,
    batch: int,
    tokens: Sequence[int],
    text_queries: bool,
    heads: int,
    biased: bool,
) -> Work:
    make, head_dim, asked = _Maker(setting), setting.shape.head_dim, (text_queries, True)
    raw, norms, ropes, biases = [], [], [], []
    for count, queries in zip(tokens, asked, strict=True):
        q, k, v = _three(partial(make.normal, batch, count, heads, head_dim))
        raw.append((q if queries else None, k, v))
        norms.append((1 + make.normal(head_dim, scale=0.1), 1 + make.normal(head_dim, scale=0.1)))
        ropes.append(make.rope(count))
        # The biases are those of all heads; the first ones are used.
        biases.append(_three(partial(make.normal, setting.shape.dim)) if biased else NO_BIASES)

    def call() -> Sequence[torch.Tensor]:
        # The public function has no argument for the tile.
        outputs = joint_outputs(raw[0][1], tokens, asked, heads, head_dim)
        q_first = kv_first = 0
        for part, norm, rope, bias, count in zip(raw, norms, ropes, biases, tokens, strict=True):
            launch_norm_rope(part, norm, rope, outputs, q_first, kv_first, 1e-6, tile, bias).run()
            q_first, kv_first = q_first + (0 if part[0] is None else count), kv_first + count
        return outputs

    def prepare() -> Prepared:
        moved = (_elsewhere(raw), norms, _elsewhere(ropes), biases)
        return _prepared(prepare_norm_rope(raw, norms, ropes, 1e-6, biases), raw, norms, ropes, biases, moved=moved)

    def exact() -> Sequence[torch.Tensor]:
        parts, scales, angles, added = _double((raw, norms, ropes, biases))
        return norm_rope_reference(parts, scales, angles, biases=added)

    return Work(call, exact, 1, head_dim, prepare)


def _attention_cases(setting: Setting) -> Iterator[Case]:
    shape = setting.shape
    whole, odd = (shape.text, shape.image), (shape.odd_text, shape.odd_image)
    forms = (
        ("no mask", 1, whole, shape.heads),
        ("mask", 2, whole, shape.heads),
        ("lengths", 2, whole, shape.heads),
        ("no mask, half the heads", 2, odd, shape.heads // 2),
        ("mask without any key, half the heads", 3, odd, shape.heads // 2),
    )
    for tile in AttentionTile.candidates(Target.of(setting.device), setting.dtype, shape.head_dim):
        for what, batch, tokens, heads in forms:
            make = partial(_attention, setting, tile, what, batch, tokens, heads)
            yield Case("joint_attention", tuple(tile), _form(what, batch, *tokens), make)


def _attention(setting: Setting, tile: AttentionTile, what: str, batch: int, tokens: Sequence[int], heads: int) -> Work:
    make, (text, image) = _Maker(setting), tokens
    q, k, v = (make.normal(batch, text + image, heads, setting.shape.head_dim) for _ in range(3))
    mask = lengths = None
    if what.startswith("mask"):
        mask = _mask(setting, batch, text, image)
        if "without any key" in what:
            mask[1] = False
    elif what.startswith("lengths"):
        lengths = torch.tensor([text + image, image + 1], dtype=torch.int32, device=setting.device)

    def exact() -> Iterator[torch.Tensor]:
        counted = mask
        if lengths is not None:
            counted = torch.arange(k.shape[1], device=k.device) < lengths[:, None]
        y = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
        # Head by head, since all scores at once would take 4 GB.
        for b in range(batch):
            for h in range(heads):
                scores = q[b, :, h].double() @ k[b, :, h].double().T * q.shape[3] ** -0.5
                if counted is not None:
                    scores = scores.masked_fill(~counted[b], float("-inf"))
                if counted is None or counted[b].any():
                    y[b, :, h] = scores.softmax(1) @ v[b, :, h].double()
        yield y

    def prepare() -> Prepared:
        return _prepared(prepare_joint_attention(q, k, v, mask, tile=tile), q, k, v, mask)

    # Two roundings: the attention weights are rounded before the product with the values. No model prepares lengths.
    call, terms = partial(joint_attention, q, k, v, mask, lengths, tile=tile), k.shape[1] + q.shape[3]
    return Work(lambda: [call()], exact, 2, terms, prepare if lengths is None else None)


def _mask(setting: Setting, batch: int, text: int, image: int) -> torch.Tensor:
    """Make a key mask: a random 60 % of the text and all of the image; in the last sample only the last key."""
    mask = torch.ones(batch, text + image, dtype=torch.bool, device=setting.device)
    mask[:, :text] = torch.rand(batch, text, device=setting.device) < 0.6
    mask[-1] = False
    mask[-1, -1] = True
    return mask


def _key_range_cases(setting: Setting) -> Iterator[Case]:
    shape = setting.shape
    tiles = AttentionTile.candidates(Target.of(setting.device), setting.dtype, shape.head_dim)
    for keys in sorted({tile.keys for tile in tiles}):
        for tokens in ((shape.text, shape.image), (shape.odd_text, shape.odd_image)):
            yield Case("key_ranges", (keys,), _form("mask", 3, *tokens), partial(_key_ranges, setting, keys, tokens))


def _key_ranges(setting: Setting, keys: int, tokens: Sequence[int]) -> Work:
    mask = _mask(setting, 3, *tokens)
    mask[1] = False

    def call() -> Sequence[torch.Tensor]:
        ranges = mask.new_empty((3, 4), dtype=torch.int32)
        launch_key_ranges(mask.view(torch.uint8), ranges, keys).run()
        return [ranges]

    def exact() -> Sequence[torch.Tensor]:
        return [torch.tensor([_ranges(row, keys) for row in mask.tolist()], device=setting.device)]

    return Work(call, exact, 0, 0)


def _ranges(counted: list[bool], keys: int) -> list[int]:
    """Compute what the key-range kernel computes.

    Four tile numbers: the first tile with an unmasked key, begin and end of the last of the longest runs of full tiles,
    and the last tile with an unmasked key + 1. The kernel pads the tiles to a power of two, and returns that number
    where there is no such tile.
    """
    starts = range(0, len(counted), keys)
    padded = 1 << (len(starts) - 1).bit_length()
    some = [number for number, at in enumerate(starts) if any(counted[at : at + keys])]
    begin = end = padded
    run = 0
    for number, at in enumerate(starts):
        run = run + 1 if at + keys <= len(counted) and all(counted[at : at + keys]) else 0
        if run and run >= end - begin:
            begin, end = number + 1 - run, number + 1
    return [some[0], begin, end, some[-1] + 1] if some else [padded, begin, end, 0]


def _norm_cases(setting: Setting) -> Iterator[Case]:
    shape = setting.shape
    forms = (
        ("a modulation a sample", 1, shape.image, False),
        ("a modulation a token", 2, shape.odd_image, True),
    )
    target = Target.of(setting.device)
    for what, batch, tokens, indexed in forms:
        form = _form(what, batch, tokens)
        for tile in NormTile.candidates(target, setting.dtype, shape.dim):
            yield Case("ada_layer_norm", tuple(tile), form, partial(_norm, setting, tile, batch, tokens, indexed))
        for gate_tile in ResidualTile.candidates(target, setting.dtype):
            make = partial(_gated, setting, gate_tile, batch, tokens, indexed)
            yield Case("gated_residual", tuple(gate_tile), form, make)


def _norm(setting: Setting, tile: NormTile, batch: int, tokens: int, indexed: bool) -> Work:
    make, dim = _Maker(setting), setting.shape.dim
    x, index = make.normal(batch, tokens, dim), make.index(batch, tokens) if indexed else None
    scale, shift = (make.modulation(batch * (2 if indexed else 1)) for _ in range(2))
    return Work(
        lambda: [ada_layer_norm(x, scale, shift, index, tile=tile)],
        lambda: [ada_layer_norm_reference(*_double((x, scale, shift, index)))],
        1,
        dim,
        lambda: _prepared(prepare_ada_layer_norm(x, scale, shift, index, tile=tile), x, scale, shift, index),
    )


def _gated(setting: Setting, tile: ResidualTile, batch: int, tokens: int, indexed: bool) -> Work:
    make, dim = _Maker(setting), setting.shape.dim
    x, h = make.normal(batch, tokens, dim), make.normal(batch, tokens, dim)
    gate, index = make.modulation(batch * (2 if indexed else 1)), make.index(batch, tokens) if indexed else None
    return Work(
        lambda: [gated_residual(x, gate, h, index, tile=tile)],
        lambda: [gated_residual_reference(*_double((x, gate, h, index)))],
        1,
        1,
        lambda: _prepared(prepare_gated_residual(x, gate, h, index, tile=tile), x, gate, h, index),
    )
