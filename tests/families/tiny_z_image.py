"""Tiny random models and checkpoints of Z-Image, and what a plan of theirs computes, by diffusers' own blocks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ZImageTransformer2DModel
from torch import nn

import ppcl_rt
from ppcl_rt import Interval, LegalCount, LegalWidths, Width
from ppcl_rt.families.z_image import PPCLZImageTransformer2DModel

HEADS, HEAD_DIM = 4, 8
DIM, CHANNELS = 32, 85
# Two refiners of the image, two of the text, then the layers.
LISTS = {"noise_refiner": 2, "context_refiner": 2, "layers": 4}
DEPTH = sum(LISTS.values())
CONFIG = {
    "in_channels": 4,
    "dim": DIM,
    "n_layers": LISTS["layers"],
    "n_refiner_layers": LISTS["noise_refiner"],
    "n_heads": HEADS,
    "n_kv_heads": HEADS,
    "cap_feat_dim": 16,
    "axes_dims": (4, 2, 2),
    "axes_lens": (256, 32, 32),
}
# Counts that no tile divides, and linear maps.
NARROWER = {"heads": (3, 1), "mlp": (50, 17, 0)}
STUDENTS = ((0, 1), (2, 3), (4, 5), (5, 7), (7, 7))
# (words, rows and columns of patches) of each sample: more and less than a multiple of 32, and exactly that.
RAGGED = ((7, (3, 5)), (40, (8, 7)), (64, (8, 8)))


def build_stock(seed: int = 0, **changes: Any) -> ZImageTransformer2DModel:
    """diffusers' model with random weights everywhere, also where training begins with zeros."""
    torch.manual_seed(seed)
    model = ZImageTransformer2DModel(**{**CONFIG, **changes})
    _roughen(model, seed)
    return model.eval()


def _roughen(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Norms stay near 1; the last layer makes outputs of size 1.
            wide = 0.03 if "all_final_layer" in name else 0.15
            parameter.copy_(1 + 0.3 * noise if "norm" in name and parameter.ndim == 1 else wide * noise)


def build_inputs(samples: Sequence[tuple[int, tuple[int, int]]] = RAGGED, seed: int = 0) -> dict[str, Any]:
    """Arguments of a forward."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": [torch.randn(4, 1, 2 * rows, 2 * columns, generator=generator) for _, (rows, columns) in samples],
        "t": torch.rand(len(samples), generator=generator),
        "cap_feats": [torch.randn(words, CONFIG["cap_feat_dim"], generator=generator) for words, _ in samples],
    }


def residuals(inputs: dict[str, Any], numbers: Sequence[int]) -> dict[int, torch.Tensor]:
    """ControlNet residuals of some layers, over the tokens of diffusers' joint stream."""

    def padded(count: int) -> int:
        return -(-count // 32) * 32

    lengths = [padded(x.shape[2] * x.shape[3] // 4) + padded(len(c)) for x, c in zip(inputs["x"], inputs["cap_feats"])]
    generator = torch.Generator().manual_seed(len(numbers))
    return {n: torch.randn(len(lengths), max(lengths), DIM, generator=generator) for n in numbers}


class _Skipped(nn.Module):
    """In the place of a block that is not there."""

    def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        return x


class _Mapped(nn.Module):
    """A stock block with a linear map in place of its MLP: ``g + l(g)``."""

    def __init__(self, block: Any, weight: torch.Tensor) -> None:
        super().__init__()
        self.block, self.weight = block, weight

    def forward(self, x: torch.Tensor, mask: Any, rope: Any, temb: Any = None, *_: Any) -> torch.Tensor:
        block, scale, gate = self.block, 1.0, 1.0
        if block.modulation:
            scale, gate, _, _ = block.adaLN_modulation(temb).unsqueeze(1).chunk(4, dim=2)
            scale, gate = 1 + scale, gate.tanh()
        attended = block.attention(block.attention_norm1(x) * scale, attention_mask=mask, freqs_cis=rope)
        x = x + gate * block.attention_norm2(attended)
        return x + F.linear(x, self.weight)


@dataclass
class Made:
    """A checkpoint on disk, and what it was made of."""

    folder: Path
    stock: ZImageTransformer2DModel
    catalog: ppcl_rt.Catalog
    tensors: dict[str, torch.Tensor] = field(repr=False)

    def random_plan(self, rng: np.random.Generator, skip: float = 0.0, legal: bool = True) -> ppcl_rt.Plan:
        """Random disjoint students and counts; those of the catalog, or any."""

        def width(widths: LegalWidths) -> Width:
            full = {"heads": HEADS, "mlp": CHANNELS}
            if not legal:
                return Width({group: int(rng.integers(1, full[group] + 1)) for group in full})
            return Width({g: int(rng.choice([c.units for c in widths.of(g)])) for g in widths.groups})

        planned, block = [], 0
        while block < DEPTH:
            here = [student for student in self.catalog.students if student.interval.first == block]
            student = here[0] if here and rng.random() < 0.4 else None
            interval = student.interval if student else Interval(block, block)
            widths = student.widths if student else self.catalog.blocks[block]
            if student or rng.random() >= skip:
                planned.append(ppcl_rt.PlannedBlock(interval=interval, width=width(widths), student=bool(student)))
            block = interval.last + 1
        return ppcl_rt.Plan(checkpoint=self.catalog.fingerprint, depth=DEPTH, blocks=tuple(planned))

    def reference(self, plan: ppcl_rt.Plan) -> ZImageTransformer2DModel:
        """diffusers' model for a plan, by the law of it: columns zeroed, students put in, skipped blocks left out."""
        model = copy.deepcopy(self.stock)
        blocks = {planned.interval.first: planned for planned in plan.blocks}
        for n in range(DEPTH):
            path, number = self.catalog.architecture.place(n)
            model.get_submodule(path)[number] = self.reference_block(blocks[n]) if n in blocks else _Skipped()
        return model

    def reference_block(self, planned: ppcl_rt.PlannedBlock) -> nn.Module:
        """diffusers' block with output columns zeroed or fitted, or with a map in place of its MLP."""
        path, number = self.catalog.architecture.place(planned.interval.first)
        block = copy.deepcopy(self.stock.get_submodule(path)[number])
        prefix = f"{path}.{number}."
        if planned.student:
            prefix = f"students.{planned.interval.key}."
            block.load_state_dict({name: self.tensors[prefix + name] for name in block.state_dict()})
        spec = self.catalog.spec(planned.interval.first)
        for output in spec.outputs:
            group, layer = output.segment.group, block.get_submodule(output.part.path)
            count, unit = planned.width[group], output.segment.unit
            fitted = self.tensors.get(f"{prefix}replacements.{output.name}_{count}.weight")
            if count == 0:
                continue
            order = self.tensors[f"{prefix}order.{group}"][:count]
            kept = (order[:, None] * unit + torch.arange(unit)).flatten()
            with torch.no_grad():
                weight = torch.zeros_like(layer.weight)
                weight[:, kept] = layer.weight[:, kept] if fitted is None else fitted
                layer.weight.copy_(weight)
        if planned.width["mlp"] == 0:
            return _Mapped(block, self.tensors[f"{prefix}replacements.mlp_0.weight"])
        return block


def make_checkpoint(folder: Path, seed: int = 0, compensated: bool = True) -> Made:
    """Write a pluggable checkpoint with everything: students, maps, rank orders, compensated outputs if asked for."""
    stock = build_stock(seed)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    tensors = {name: tensor.detach().clone() for name, tensor in stock.state_dict().items()}
    inside = sum(t.numel() for name, t in tensors.items() if name.partition(".")[0] in LISTS)
    outer = sum(t.numel() for t in tensors.values()) - inside
    architecture = PPCLZImageTransformer2DModel.architecture_of(stock.config, outer)

    def widths(block: int) -> LegalWidths:
        found = {}
        for group, full in architecture.spec(block).full.items():
            losses = map(float, np.cumsum(rng.uniform(0.01, 1.0, len(NARROWER[group]))))
            narrower = zip(NARROWER[group], losses, strict=True)
            found[group] = (LegalCount(full, 0.0), *(LegalCount(*each) for each in narrower))
        return LegalWidths(found)

    students = []
    for n, pair in enumerate(STUDENTS):
        interval = Interval(*pair)
        students.append(ppcl_rt.Student(interval=interval, start="first", loss=1.0, widths=widths(interval.first)))
        path, number = architecture.place(interval.first)
        block = copy.deepcopy(stock.get_submodule(path)[number])
        _roughen(block, 100 * seed + n + 1)
        tensors |= {f"students.{interval.key}.{name}": tensor for name, tensor in block.state_dict().items()}
    catalog = ppcl_rt.Catalog(
        family="z-image",
        reference=ppcl_rt.Tokens(64, 32),
        architecture=architecture,
        blocks=tuple(map(widths, range(DEPTH))),
        students=tuple(students),
        compensated=compensated,
    )
    for prefix, number, legal in catalog.prefixed:
        spec = architecture.spec(number)
        for group in spec.unit_groups:
            tensors[f"{prefix}order.{group}"] = torch.randperm(spec.full[group], generator=generator)
        for output in spec.outputs:
            for count in (each.units for each in legal.of(output.segment.group)[1:]):
                if compensated or count == 0:
                    columns, name = count * output.segment.unit or DIM, spec.replacement(output.name, count)
                    random = torch.randn(DIM, columns, generator=generator) * 0.1
                    tensors[f"{prefix}replacements.{name}.weight"] = random
    config = {**dict(stock.config), "_class_name": "ZImageTransformer2DModel"}
    config.pop("_name_or_path", None)
    return Made(folder, stock, ppcl_rt.write_checkpoint(folder, config, catalog, tensors), tensors)


def pipeline_parts(folder: Path) -> dict[str, Any]:
    """Everything of a `ZImagePipeline` but its transformer, made without a network; its tokenizer in ``folder``."""
    import json

    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

    # One token a byte and no merges: all that a tokenizer needs in order to read any prompt.
    (folder / "vocab.json").write_text(json.dumps({c: n for n, c in enumerate(sorted(ByteLevel.alphabet()))}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = Qwen2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}:"
    torch.manual_seed(0)
    text = Qwen3Config(
        vocab_size=300,
        hidden_size=CONFIG["cap_feat_dim"],
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=CONFIG["in_channels"],
        sample_size=32,
        scaling_factor=0.4,
        shift_factor=0.1,
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": Qwen3Model(text).eval(),
        "vae": vae.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
