"""Tiny random models and checkpoints of Stable Diffusion 3, and what a plan of theirs computes, written out by hand."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock
from torch import nn

import ppcl_rt
from ppcl_rt import Interval, LegalCount, LegalWidths, Width
from ppcl_rt.planning.plan import text_maps

HEADS, HEAD_DIM, DEPTH = 4, 8, 7
DIM, CHANNELS = HEADS * HEAD_DIM, 4 * HEADS * HEAD_DIM
CONFIG = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": DEPTH,
    "attention_head_dim": HEAD_DIM,
    "num_attention_heads": HEADS,
    "joint_attention_dim": 16,
    "caption_projection_dim": DIM,
    "pooled_projection_dim": 12,
    "out_channels": 4,
    "pos_embed_max_size": 20,
}
# As the published models differ: 3.0, 3.5-large, 3.5-medium.
VARIANTS = {
    "sd3": {},
    "large": {"qk_norm": "rms_norm"},
    "medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1, 2)},
}
# Counts that no tile divides; linear maps; low ranks.
NARROWER = {
    "heads": (3, 2, 1),
    "image_heads": (3, 1),
    "image": (96, 50, 0),
    "text": (100, 31, 0),
    "modulation": (7, 3, 1),
}
STUDENTS = ((0, 1), (1, 2), (3, 4), (4, 5), (6, 6))
TEXT_RUNS = ((0, 1), (0, 2), (3, 4), (3, 5), (4, 5))


def build_stock(variant: str, seed: int = 0, **changes: Any) -> SD3Transformer2DModel:
    """diffusers' model with random weights everywhere, also where training begins with zeros."""
    torch.manual_seed(seed)
    model = SD3Transformer2DModel(**{**CONFIG, **VARIANTS[variant], **changes})
    _roughen(model, seed)
    return model.eval()


def _roughen(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            wide = 0.05 if "proj_out" in name else 0.15
            noise = torch.randn(parameter.shape, generator=generator)
            # Norms of q and k stay near 1.
            parameter.copy_(1 + 0.3 * noise if ".norm_" in name else wide * noise)


def build_inputs(seed: int = 0, batch: int = 2, text: int = 7, size: tuple[int, int] = (3, 5)) -> dict[str, Any]:
    """Arguments of a forward; ``size`` in tokens."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, 2 * size[0], 2 * size[1], generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, CONFIG["joint_attention_dim"], generator=generator),
        "pooled_projections": torch.randn(batch, CONFIG["pooled_projection_dim"], generator=generator),
        "timestep": 1000 * torch.rand(batch, generator=generator),
    }


def residuals(count: int, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """ControlNet residuals."""
    batch, _, rows, columns = inputs["hidden_states"].shape
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(batch, rows * columns // 4, DIM, generator=generator) for _ in range(count)]


@dataclass
class Made:
    """A checkpoint on disk, and what it was made of."""

    folder: Path
    stock: SD3Transformer2DModel
    catalog: ppcl_rt.Catalog
    tensors: dict[str, torch.Tensor] = field(repr=False)

    def random_plan(self, rng: np.random.Generator) -> ppcl_rt.Plan:
        """A legal plan: random disjoint students, text runs and counts."""

        def width(widths: LegalWidths) -> Width:
            return Width({g: int(rng.choice([c.units for c in widths.of(g)])) for g in widths.groups})

        students, kept, block = [], {}, 0
        while block < DEPTH:
            here = [student for student in self.catalog.students if student.interval.first == block]
            if here and rng.random() < 0.4:
                planned = {"interval": here[0].interval, "width": width(here[0].widths), "student": True}
                students.append(ppcl_rt.PlannedBlock(**planned))
                block = here[0].interval.last + 1
            else:
                kept[block] = width(self.catalog.blocks[block])
                block += 1
        runs: list[Interval] = []
        for n in rng.permutation(len(self.catalog.text_runs)):
            run = self.catalog.text_runs[n].interval
            if all(b in kept and not any(b in other for other in runs) for b in run) and rng.random() < 0.6:
                runs.append(run)
        return self.catalog.compose(kept.items(), students, runs)

    def stock_block(self, planned: ppcl_rt.PlannedBlock) -> JointTransformerBlock:
        """diffusers' block with the weights that a planned block names, at full width."""
        block = copy.deepcopy(self.stock.transformer_blocks[planned.interval.first])
        if planned.student:
            prefix = f"students.{planned.interval.key}."
            block.load_state_dict({name: self.tensors[prefix + name] for name in block.state_dict()})
        return block

    def reference_block(self, planned: ppcl_rt.PlannedBlock) -> tuple[JointTransformerBlock, dict[str, nn.Linear]]:
        """diffusers' block with output columns zeroed, fitted or of low rank; and the maps in place of MLPs."""
        block, maps = self.stock_block(planned), {}
        spec, width = self.catalog.spec(planned.interval.first), planned.width
        home = "students.{}" if planned.student else "transformer_blocks.{}"
        prefix = home.format(planned.interval.key if planned.student else planned.interval.first) + "."
        for output in spec.outputs:
            group, layer = output.segment.group, block.get_submodule(output.part.path)
            if group not in width or width[group] == spec.full[group]:
                continue
            path = f"{prefix}replacements.{output.name}_{width[group]}"
            fitted = {n: self.tensors[f"{path}.{n}"] for n in ("weight", "bias") if f"{path}.{n}" in self.tensors}
            if width[group] == 0:
                maps[group] = nn.Linear(DIM, DIM)
                maps[group].load_state_dict(fitted)
                continue
            unit = output.segment.unit
            order = self.tensors[f"{prefix}order.{group}"][: width[group]]
            kept = (order[:, None] * unit + torch.arange(unit)).flatten()
            with torch.no_grad():
                weight = torch.zeros_like(layer.weight)
                weight[:, kept] = fitted["weight"] if fitted else layer.weight[:, kept]
                layer.weight.copy_(weight)
                if fitted:
                    layer.bias.copy_(fitted["bias"])
        rank = width["modulation"]
        if rank < DIM:
            down = [self.tensors[f"{prefix}replacements.modulation_down.{n}"] for n in ("weight", "bias")]
            for part in spec.factored_by("modulation"):
                up = [self.tensors[f"{prefix}replacements.{part.name}.{n}"] for n in ("weight", "bias")]
                layer = block.get_submodule(part.path)
                with torch.no_grad():
                    layer.weight.copy_(up[0][:, :rank] @ down[0][:rank])
                    layer.bias.copy_(up[0][:, :rank] @ down[1][:rank] + up[1])
        return block, maps

    @torch.no_grad()
    def by_hand(
        self, plan: ppcl_rt.Plan, inputs: dict[str, Any], control: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """What a plan computes: diffusers' pieces called one after the other."""
        stock, share = self.stock, DEPTH / len(control) if control else 1
        temb = stock.time_text_embed(inputs["timestep"], inputs["pooled_projections"])
        image, text = stock.pos_embed(inputs["hidden_states"]), stock.context_embedder(inputs["encoder_hidden_states"])
        blocks = {planned.interval.first: planned for planned in plan.blocks}
        first_input = text
        for n in range(DEPTH):
            if n in blocks:
                block, maps = self.reference_block(blocks[n])
                run = next((run for run in plan.text_runs if n in run), None)
                if run is not None and n == run.first:
                    first_input = block.norm1_context(text, emb=temb)[0]
                later = run is not None and n != run.first
                z = self._mapped(f"{run.key}.z_{n}", first_input) if later else None
                text, image = block_by_hand(block, image, text, temb, maps, z)
                if later and n == run.last:
                    text = self._mapped(f"{run.key}.text", text)
            if control and n < DEPTH - 1:
                image = image + control[int(n / share)]
        tokens = stock.proj_out(stock.norm_out(image, temb))
        batch, channels, rows, columns = inputs["hidden_states"].shape
        patches = tokens.reshape(batch, rows // 2, columns // 2, 2, 2, channels)
        return torch.einsum("nhwpqc->nchpwq", patches).reshape(inputs["hidden_states"].shape)

    def _mapped(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """``x + l(x)``."""
        return x + F.linear(x, *(self.tensors[f"text_runs.{name}.{which}"] for which in ("weight", "bias")))


def block_by_hand(
    block: JointTransformerBlock,
    image: torch.Tensor,
    text: torch.Tensor,
    temb: torch.Tensor,
    maps: dict[str, nn.Linear],
    z: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stock block, written out, with maps in place of MLPs; ``z`` is what a text that is not updated reads as."""

    def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def parts(norm: Any) -> list[torch.Tensor]:
        return list(norm.linear(F.silu(temb)).split(DIM, dim=1))

    def fed(x: torch.Tensor, name: str, mlp: Any, shift: torch.Tensor, scale: torch.Tensor, gate: torch.Tensor) -> Any:
        return x + (maps[name](x) if name in maps else gate[:, None] * mlp(modulated(x, shift, scale)))

    of_image, of_text, updates = parts(block.norm1), parts(block.norm1_context), z is None
    if block.context_pre_only:
        # Scale first.
        z, updates = modulated(text, of_text[1], of_text[0]), False
    elif updates:
        z = modulated(text, *of_text[:2])
    attended, text_attended = block.attn(hidden_states=modulated(image, *of_image[:2]), encoder_hidden_states=z)
    x = image + of_image[2][:, None] * attended
    if block.use_dual_attention:
        x = x + of_image[8][:, None] * block.attn2(hidden_states=modulated(image, *of_image[6:8]))
    x = fed(x, "image", block.ff, *of_image[3:6])
    if updates:
        text = fed(text + of_text[2][:, None] * text_attended, "text", block.ff_context, *of_text[3:6])
    return text, x


def make_checkpoint(folder: Path, variant: str, seed: int = 0, compensated: bool = True) -> Made:
    """Write a pluggable checkpoint with everything: students, text runs, maps, low ranks, rank orders."""
    stock = build_stock(variant, seed)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    tensors = {name: tensor.detach().clone() for name, tensor in stock.state_dict().items()}
    inside = sum(p.numel() for p in stock.transformer_blocks.parameters())
    outer = sum(t.numel() for t in stock.state_dict().values()) - inside
    architecture = ppcl_rt.PPCLSD3Transformer2DModel.architecture_of(stock.config, outer)

    def widths(block: int) -> LegalWidths:
        found = {}
        for group, full in architecture.spec(block).full.items():
            losses = np.cumsum(rng.uniform(0.01, 1.0, len(NARROWER[group])))
            narrower = zip(NARROWER[group], map(float, losses), strict=True)
            found[group] = (LegalCount(full, 0.0), *(LegalCount(*each) for each in narrower))
        return LegalWidths(found)

    students = []
    for n, pair in enumerate(STUDENTS):
        interval = Interval(*pair)
        if not architecture.one_kind(interval):
            continue
        students.append(ppcl_rt.Student(interval=interval, start="first", loss=1.0, widths=widths(interval.first)))
        block = copy.deepcopy(stock.transformer_blocks[interval.first])
        _roughen(block, 100 * seed + n + 1)
        tensors |= {f"students.{interval.key}.{name}": tensor for name, tensor in block.state_dict().items()}
    runs = [Interval(*pair) for pair in TEXT_RUNS]
    catalog = ppcl_rt.Catalog(
        family="sd3",
        reference=ppcl_rt.Tokens(16, 7),
        architecture=architecture,
        blocks=tuple(map(widths, range(DEPTH))),
        students=tuple(students),
        text_runs=tuple(ppcl_rt.TextRun(interval=run, loss=0.5) for run in runs if architecture.one_kind(run)),
        compensated=compensated,
    )

    def random(name: str, rows: int, columns: int, wide: float = 0.1) -> None:
        tensors[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) * wide
        tensors[f"{name}.bias"] = torch.randn(rows, generator=generator) * wide

    for run in (run.interval for run in catalog.text_runs):
        for name in text_maps(run, DEPTH):
            random(f"text_runs.{run.key}.{name}", DIM, DIM)
    for prefix, number, legal in catalog.prefixed:
        spec = architecture.spec(number)
        for group in spec.unit_groups:
            tensors[f"{prefix}order.{group}"] = torch.randperm(spec.full[group], generator=generator)
        for output in spec.outputs:
            for count in (each.units for each in legal.of(output.segment.group)[1:]):
                if compensated or count == 0:
                    columns = count * output.segment.unit or DIM
                    random(f"{prefix}replacements.{output.name}_{count}", DIM, columns)
        rank = legal.highest_rank("modulation")
        random(f"{prefix}replacements.modulation_down", rank, DIM)
        for part in spec.factored_by("modulation"):
            random(f"{prefix}replacements.{part.name}", part.rows, rank)
    config = {**dict(stock.config), "_class_name": "SD3Transformer2DModel"}
    config.pop("_name_or_path", None)
    return Made(folder, stock, ppcl_rt.write_checkpoint(folder, config, catalog, tensors), tensors)


def pipeline_parts(folder: Path) -> dict[str, Any]:
    """Everything of a `StableDiffusion3Pipeline` but its transformer, made without a network; tokenizers in ``folder``.

    Prompts have 5 tokens of CLIP. Pooled text has the 768 + 1280 channels of the published models.
    """
    import json

    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        PreTrainedTokenizerFast,
        T5Config,
        T5EncoderModel,
    )

    # One token a byte and no merges: all that a tokenizer needs in order to read any prompt.
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    clip = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=5)
    of_bytes = Tokenizer(models.BPE({"<pad>": 0, "</s>": 1, **{c: n for n, c in enumerate(letters, 2)}}, []))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    of_bytes.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    t5 = PreTrainedTokenizerFast(tokenizer_object=of_bytes, pad_token="<pad>", eos_token="</s>", model_max_length=512)
    torch.manual_seed(0)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"vocab_size": len(words), "eos_token_id": len(words) - 1, "bos_token_id": len(words) - 2}
    texts = [CLIPTextModelWithProjection(CLIPTextConfig(**small, **ends, projection_dim=n)).eval() for n in (768, 1280)]
    width = CONFIG["joint_attention_dim"]
    t5_config = T5Config(vocab_size=300, d_model=width, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    channels = {"block_out_channels": (4, 4), "norm_num_groups": 2, "latent_channels": 4, "layers_per_block": 1}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(
        **channels, **blocks, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=0.4
    )
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": vae.eval(),
        "text_encoder": texts[0],
        "tokenizer": clip,
        "text_encoder_2": texts[1],
        "tokenizer_2": clip,
        "text_encoder_3": T5EncoderModel(t5_config).eval(),
        "tokenizer_3": t5,
    }
