"""A family in one file, for a test of the seams: two lists of blocks of two kinds, packed q/k/v + SwiGLU, joint output.

A stream's input layer makes q, k, v, gate and up in one product; its output layer reads heads and channels next to each
other. ``double`` blocks hold such a pair for each stream, ``single`` blocks one pair for both streams together.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from ppcl_rt.families import registry
from ppcl_rt.model.block import PluggableBlock
from ppcl_rt.model.pluggable import Pluggable
from ppcl_rt.planning.architecture import Architecture, BlockList, Tokens
from ppcl_rt.planning.block_spec import BlockSpec, Group, Part, Segment
from ppcl_train.families.base import Samples

# The layers of each kind of block: those of each stream, or those of both streams together.
KINDS = {"double": ("image", "text"), "single": ("joint",)}


def spec_of(kind, heads, head_dim, channels):
    dim, parts, groups = heads * head_dim, [], {"heads": Group(count=heads)}
    for stream in KINDS[kind]:
        wide, group = 3 * dim + 2 * channels, f"{stream}_channels"
        groups[group] = Group(count=channels)
        qkv = tuple(Segment("heads", n * dim, head_dim) for n in range(3))
        gate_up = (Segment(group, 3 * dim, 1), Segment(group, 3 * dim + channels, 1))
        read, joint = (Segment("heads", 0, head_dim), Segment(group, dim, 1)), {"columns": dim + channels}
        parts += [
            Part(path=f"{stream}_in", rows=wide, columns=dim, axis=0, segments=qkv + gate_up, stream=stream),
            Part(path=f"{stream}_out", name=stream, rows=dim, axis=1, segments=read, stream=stream, **joint),
            Part(path=f"{stream}_mod", name=f"{stream}_mod", rows=dim, columns=dim, stream="sample", factored="rank"),
        ]
    groups["rank"] = Group(count=dim, is_rank=True)
    return BlockSpec(dim=dim, head_dim=head_dim, groups=groups, parts=tuple(parts))


class ToyBlock(PluggableBlock):
    def __init__(self, kind, heads, head_dim, channels):
        super().__init__()
        self.streams, self.norm = KINDS[kind], nn.LayerNorm(heads * head_dim, elementwise_affine=False)
        spec = spec_of(kind, heads, head_dim, channels)
        for part in spec.parts:
            self.add_module(part.path, nn.Linear(part.columns, part.rows))
        self.become_pluggable(spec)
        self.parts = {part.path: part for part in spec.parts}

    def packed(self, path, x, width):
        """The products of each segment of an input layer, over the first units of what is held."""
        layer, held, start = self.get_submodule(path), self.held[path], 0
        for s in self.parts[path].segments:
            rows = slice(start, start + width[s.group] * s.unit)
            yield F.linear(x, layer.weight[rows], layer.bias[rows])
            start += held[s.group] * s.unit

    def joined(self, path, inputs, width):
        """The sum over the groups that an output layer reads; a group may have a replacement at its count."""
        layer, held, start = self.get_submodule(path), self.held[path], 0
        outputs = [output for output in self.spec.outputs if output.part.path == path]
        names = [self.spec.replacement(o.name, width[o.segment.group]) for o in outputs]
        if held == self.counts_of(self.parts[path], width) and not any(name in self.replacements for name in names):
            return layer(torch.cat(inputs, -1))
        y = layer.bias
        for output, name, x in zip(outputs, names, inputs):
            columns = slice(start, start + x.shape[-1])
            y = y + (self.replacements[name](x) if name in self.replacements else F.linear(x, layer.weight[:, columns]))
            start += held[output.segment.group] * output.segment.unit
        return y

    def forward(self, hidden_states, encoder_hidden_states, temb, width=None):
        width, text = width or self.width, encoder_hidden_states.shape[1]
        both = torch.cat([encoder_hidden_states, hidden_states], 1)
        streams = {"joint": both, "text": encoder_hidden_states, "image": hidden_states}
        made = {}
        for name in self.streams:
            shift = self.factored(f"{name}_mod", self.modulation_input(temb), "rank", width["rank"])
            made[name] = list(self.packed(f"{name}_in", self.norm(streams[name]) + shift[:, None], width))
        # Text first, as in the joint stream.
        order = [name for name in ("joint", "text", "image") if name in made]
        q, k, v = (torch.cat([made[name][n] for name in order], 1) for n in range(3))
        heads = (x.unflatten(-1, (width["heads"], self.spec.head_dim)).transpose(1, 2) for x in (q, k, v))
        attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        parts = {"joint": attended, "text": attended[:, :text], "image": attended[:, text:]}
        for name in self.streams:
            hidden = F.silu(made[name][3]) * made[name][4]
            streams[name] = streams[name] + self.joined(f"{name}_out", [parts[name], hidden], width)
        if "joint" in made:
            return streams["joint"][:, :text], streams["joint"][:, text:]
        return streams["text"], streams["image"]


class Toy(Pluggable, ModelMixin, ConfigMixin):
    family, stock_name = "toy", "Toy"
    reference = Tokens(image=6, text=4)
    block_lists, depth_settings = ("double_blocks", "single_blocks"), ("num_double", "num_single")

    @register_to_config
    def __init__(self, num_double=3, num_single=3, heads=2, head_dim=4, channels=12, latents=6, embedding=5):
        super().__init__()
        dim = heads * head_dim
        self.image_in, self.text_in = nn.Linear(latents, dim), nn.Linear(embedding, dim)
        self.time_in = nn.Linear(1, dim)
        for kind, depth in (("double", num_double), ("single", num_single)):
            self.add_module(f"{kind}_blocks", nn.ModuleList(self.make_block(self.config, kind) for _ in range(depth)))
        self.norm_out, self.proj_out = nn.LayerNorm(dim), nn.Linear(dim, latents)
        self.become_pluggable()

    @classmethod
    def make_block(cls, config, kind):
        return ToyBlock(kind, config["heads"], config["head_dim"], config["channels"])

    @classmethod
    def architecture_of(cls, config, outer_params):
        kinds = {kind: spec_of(kind, config["heads"], config["head_dim"], config["channels"]) for kind in KINDS}
        lists = tuple(BlockList(path=f"{kind}_blocks", kind=kind, depth=config[f"num_{kind}"]) for kind in KINDS)
        return Architecture(lists=lists, kinds=kinds, dim=kinds["double"].dim, outer_params=outer_params)

    def forward(self, hidden_states, encoder_hidden_states, timestep, return_dict=False):
        inputs = {"image": hidden_states, "text": encoder_hidden_states, "timestep": timestep}
        return (self._run(self._program(timestep), **inputs),)

    def _walk(self, program, *, image, text, timestep):
        image, text, temb = self.image_in(image), self.text_in(text), self.time_in(timestep[:, None].to(image.dtype))
        for call in program.calls:
            text, image = call.block(hidden_states=image, encoder_hidden_states=text, temb=temb, width=call.width)
        return self.proj_out(self.norm_out(image))


class ToyTraining:
    predicts = "velocity"

    def build(self, architecture):
        return Toy(**architecture)

    def arguments(self, x, t, embeddings, mask, shape):
        return {"hidden_states": x, "encoder_hidden_states": embeddings, "timestep": t}

    def make(self, draws, dropped):
        drawn = [[rng.standard_normal(shape, dtype=np.float32) for shape in ((9, 6), (4, 5))] for rng in draws]
        latents, text = (torch.from_numpy(np.stack(each)) for each in zip(*drawn, strict=True))
        return Samples(latents, text, torch.ones(len(draws), 4, dtype=torch.bool), (1, 3, 3))

    def open(self, pipeline, *, device, dtype, draws):
        raise ValueError("toys have no pipeline")


registry.register("toy", "toy_family:Toy", "toy_family:ToyTraining", stock="Toy")
