"""The authors' layout by its description: makes tiny random folders and training files, and runs them in a plain loop.

Nothing of the runtime is used here: blocks are diffusers' modules, called by hand.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import save_file
from torch import nn

HEADS, HEAD_DIM = 4, 8
DIM = HEADS * HEAD_DIM
CONFIG = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "attention_head_dim": HEAD_DIM,
    "num_attention_heads": HEADS,
    "joint_attention_dim": 16,
    "axes_dims_rope": (2, 2, 4),
}
# Every kind of block: full (f) or text-pruned (p), with maps (m), with an exit map (e).
EVERY_KIND = ("f", "p", "pm", "pe", "pme", "f", "fm", "pe", "p", "pe", "fe", "fme", "p", "f", "p", "pe")


def stock(depth: int, seed: int) -> QwenImageTransformer2DModel:
    torch.manual_seed(seed)
    model = QwenImageTransformer2DModel(**CONFIG, num_layers=depth).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.15)
    return model


def affine(seed: int, size: float = 0.1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(DIM, DIM, generator=generator) * size,
        "bias": torch.randn(DIM, generator=generator) * size,
    }


def under(path: str, layer: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{path}.{which}": tensor for which, tensor in layer.items()}


def block_state(block: nn.Module, kind: str, seed: int, older: bool = False) -> dict[str, torch.Tensor]:
    """What the layout holds of a block of a kind."""
    held = {name: tensor.detach().clone() for name, tensor in block.state_dict().items()}
    if "m" in kind:
        held = {name: tensor for name, tensor in held.items() if not name.startswith(("img_mlp", "txt_mlp"))}
        held |= {name: tensor[: 3 * DIM].clone() for name, tensor in held.items() if "_mod." in name}
        held |= under("img_ffn_proj", affine(seed)) | (under("txt_ffn_proj", affine(seed + 1)) if "f" in kind else {})
    if "p" in kind:
        held = {name: tensor for name, tensor in held.items() if not name.startswith(("txt_mod", "txt_mlp"))}
        text = affine(seed + 2)
        if older:
            text["weight"] += torch.eye(DIM)
        held |= under("txt_proj", text)
    if "e" in kind:
        held |= under("ehs_proj", affine(seed + 3))
    return held


def make(
    folder: Path,
    kinds: tuple[str, ...] = EVERY_KIND,
    *,
    older: bool = False,
    seed: int = 0,
    files: int = 1,
    dtype: torch.dtype = torch.float32,
    config: dict[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """Write a packaged folder; returns its tensors. ``config`` changes what config.json says (None drops a key)."""
    model = stock(len(kinds), seed)
    state = {n: t.detach().clone() for n, t in model.state_dict().items() if not n.startswith("transformer_blocks.")}
    for n, kind in enumerate(kinds):
        held = block_state(model.transformer_blocks[n], kind, 1000 * seed + 10 * n, older)
        state |= {f"transformer_blocks.{n}.{name}": tensor for name, tensor in held.items()}
    state = {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}
    lists = {"single_stream_index": [n for n, kind in enumerate(kinds) if "p" in kind]}
    if not older:
        lists |= {"ffn_proj_index": [n for n, kind in enumerate(kinds) if "m" in kind]}
        lists |= {"ehs_proj_index": [n for n, kind in enumerate(kinds) if "e" in kind]}
    said = {"_class_name": "QwenImageTransformer2DModel", **CONFIG, "num_layers": len(kinds), **lists, **(config or {})}
    write(folder, {k: v for k, v in said.items() if (config or {}).get(k, 0) is not None}, state, files)
    return state


def write(folder: Path, config: dict[str, Any], state: dict[str, torch.Tensor], files: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if files == 1:
        save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        return
    places = {}
    for number in range(files):
        name = f"diffusion_pytorch_model-{number + 1:05d}-of-{files:05d}.safetensors"
        members = sorted(state)[number::files]
        save_file({member: state[member] for member in members}, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(members, name)
    index = {"metadata": {}, "weight_map": places}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def _attend(attn: Any, image: torch.Tensor, text: torch.Tensor, rope: Any, mask: torch.Tensor | None) -> Any:
    return attn(hidden_states=image, encoder_hidden_states=text, encoder_hidden_states_mask=mask, image_rotary_emb=rope)


def _norm(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.layer_norm(x, (DIM,), eps=1e-6)


class Loop(nn.Module):
    """The layout's meaning, a block after the other; drops into the pipeline in place of the transformer."""

    def __init__(self, state: dict[str, torch.Tensor], older: bool = False, use_mask: bool = True) -> None:
        super().__init__()
        self.depth = 1 + max(int(n.split(".")[1]) for n in state if n.startswith("transformer_blocks."))
        self.stock = stock(self.depth, 0)
        self.state_ = {name: tensor.float() for name, tensor in state.items()}
        self.older, self.use_mask = older, use_mask
        # What the layout does not hold is never called: poison it.
        with torch.no_grad():
            for name, parameter in self.stock.named_parameters():
                held = self.state_.get(name)
                whole = held is not None and held.shape == parameter.shape
                parameter.copy_(held if whole else torch.full_like(parameter, torch.nan))

    def layer(self, n: int, name: str, x: torch.Tensor) -> torch.Tensor:
        path = f"transformer_blocks.{n}.{name}"
        return nn.functional.linear(x, self.state_[f"{path}.weight"], self.state_[f"{path}.bias"])

    def has(self, n: int, name: str) -> bool:
        return f"transformer_blocks.{n}.{name}.weight" in self.state_

    def block(self, n: int, image: Any, text: Any, temb: Any, rope: Any, mask: Any, anchor: Any) -> Any:
        block, pruned, mapped = self.stock.transformer_blocks[n], self.has(n, "txt_proj"), self.has(n, "img_ffn_proj")
        silu = nn.functional.silu(temb)
        shift, scale, gate, *rest = self.layer(n, "img_mod.1", silu).unsqueeze(1).chunk(3 if mapped else 6, dim=-1)
        image_input = _norm(image) * (1 + scale) + shift
        if pruned:
            text_input = self.layer(n, "txt_proj", anchor) + (0 if self.older else anchor)
        else:
            t = self.layer(n, "txt_mod.1", silu).unsqueeze(1).chunk(3 if mapped else 6, dim=-1)
            anchor = text_input = _norm(text) * (1 + t[1]) + t[0]
        image_out, text_out = _attend(block.attn, image_input, text_input, rope, mask)
        image = image + gate * image_out
        if mapped:
            image = image + self.layer(n, "img_ffn_proj", image)
        else:
            image = image + rest[2] * block.img_mlp(_norm(image) * (1 + rest[1]) + rest[0])
        if pruned:
            if self.has(n, "ehs_proj"):
                text = text + self.layer(n, "ehs_proj", text)
            return image, text, anchor
        text = text + t[2] * text_out
        if mapped:
            text = text + self.layer(n, "txt_ffn_proj", text)
        else:
            text = text + t[5] * block.txt_mlp(_norm(text) * (1 + t[4]) + t[3])
        return image, text, anchor

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None,
        timestep: torch.Tensor,
        img_shapes: Any,
        controlnet_block_samples: Any = None,
        **_: Any,
    ) -> tuple[torch.Tensor]:
        model, mask = self.stock, encoder_hidden_states_mask if self.use_mask else None
        image, text = model.img_in(hidden_states), model.txt_in(model.txt_norm(encoder_hidden_states))
        temb = model.time_text_embed(timestep, image)
        rope, anchor = model.pos_embed(img_shapes, max_txt_seq_len=text.shape[1], device=image.device), None
        for n in range(self.depth):
            image, text, anchor = self.block(n, image, text, temb, rope, mask, anchor)
            if controlnet_block_samples is not None:
                share = math.ceil(self.depth / len(controlnet_block_samples))
                image = image + controlnet_block_samples[n // share]
        return (model.proj_out(model.norm_out(image, temb)),)
