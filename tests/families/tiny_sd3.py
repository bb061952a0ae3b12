"""Tiny random models and checkpoints of Stable Diffusion 3, and what a plan of theirs computes, written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock
from random_checkpoint import RandomCheckpoint, roughen

import ppcl_rt

# What stands in for an MLP, by group.
Maps = dict[str, Callable[[torch.Tensor], torch.Tensor]]

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
    roughen(model, seed)
    return model.eval()


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


def make_checkpoint(folder: Path, variant: str, seed: int = 0, compensated: bool = True) -> Made:
    """Write a pluggable checkpoint with everything: students, text runs, maps, low ranks, rank orders."""
    counts = dict.fromkeys(("two-stream", "dual-attention", "last"), NARROWER)
    stock = build_stock(variant, seed)
    return Made.make(
        folder,
        ppcl_rt.PPCLSD3Transformer2DModel,
        stock,
        counts,
        STUDENTS,
        TEXT_RUNS,
        compensated=compensated,
        seed=seed,
    )


class Made(RandomCheckpoint):
    """A checkpoint on disk, and what it was made of."""

    def maps(self, planned: ppcl_rt.PlannedBlock) -> Maps:
        """The linear maps in place of MLPs."""
        spec, prefix = self.catalog.spec(planned.interval.first), f"{self.prefix(planned)}replacements."
        found = (each for each in spec.outputs if planned.width.get(each.segment.group) == 0)
        return {
            each.segment.group: self._linear(f"{prefix}{spec.replacement(each.name, ppcl_rt.LINEAR_MAP)}")
            for each in found
        }

    def _linear(self, path: str) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: F.linear(x, self.tensors[f"{path}.weight"], self.tensors[f"{path}.bias"])

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
                block, maps = self.block(blocks[n]), self.maps(blocks[n])
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
        return x + self._linear(f"text_runs.{name}")(x)


def block_by_hand(
    block: JointTransformerBlock,
    image: torch.Tensor,
    text: torch.Tensor,
    temb: torch.Tensor,
    maps: Maps,
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


def pipeline_parts(folder: Path) -> dict[str, Any]:
    """Everything of a `StableDiffusion3Pipeline` but its transformer, made without a network; tokenizers in ``folder``.

    Prompts have 5 tokens of CLIP. Pooled text has the 768 + 1280 channels of the published models.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler
    from tiny_pipelines import CLIP_WORDS, clip_tokenizer, t5, vae
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    configs = [CLIPTextConfig(**small, **CLIP_WORDS, projection_dim=channels) for channels in (768, 1280)]
    texts, clip = [CLIPTextModelWithProjection(config).eval() for config in configs], clip_tokenizer(folder, 5)
    tokenizer, encoder = t5(CONFIG["joint_attention_dim"])
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": vae(),
        "text_encoder": texts[0],
        "tokenizer": clip,
        "text_encoder_2": texts[1],
        "tokenizer_2": clip,
        "text_encoder_3": encoder,
        "tokenizer_3": tokenizer,
    }
