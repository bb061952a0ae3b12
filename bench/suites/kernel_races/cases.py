"""What is raced: the calls that a random Qwen-Image block makes of its operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._pytree import tree_leaves

from kernel_races.presets import Preset, Setting
from ppcl_rt.families.qwen_image import PPCLQwenImageTransformerBlock
from ppcl_rt.model.block import lay_side_by_side
from ppcl_rt.ops.implementation import TORCH
from ppcl_rt.ops.operation import Operation
from ppcl_rt.planning.width import LINEAR_MAP, Width


class Case(NamedTuple):
    """One call of one operation; ``op`` names the operation and its place in a block."""

    op: str
    operation: Operation[Any, Any]
    call: Any


class Block:
    """A random block, and the calls that it makes."""

    def __init__(self, preset: Preset) -> None:
        self.preset = preset
        dim = preset.heads * preset.head_dim
        torch.manual_seed(0)
        with torch.device(preset.device):
            self.block = PPCLQwenImageTransformerBlock(dim, preset.heads, preset.head_dim)
            for output in ("mlp_image", "mlp_text"):
                self.block.replacements[self.block.spec.replacement(output, LINEAR_MAP)] = torch.nn.Linear(dim, dim)
        self.block.to(preset.dtype).requires_grad_(False)
        lay_side_by_side(self.block)

    def cases(self, setting: Setting) -> Iterator[Case]:
        """Run the block once, in plain torch, and yield its calls in their order."""
        preset, made = self.preset, list[tuple[Operation[Any, Any], Any]]()

        def record(operation: Operation[Any, Any], call: Any) -> Any:
            made.append((operation, call))
            return operation.run(call, TORCH)

        torch.manual_seed(1)
        dim = preset.heads * preset.head_dim
        like: dict[str, Any] = {"device": preset.device, "dtype": preset.dtype}
        image, text = (torch.randn(setting.batch, count, dim, **like) for count in (setting.image, setting.text))
        angles = [
            torch.rand(n, preset.head_dim // 2, device=preset.device) * 6.28 for n in (setting.image, setting.text)
        ]
        mask = torch.rand(setting.batch, setting.text, device=preset.device) < 0.6 if setting.masked else None
        kept = preset.hidden * setting.width // 100
        heads = preset.heads * (setting.width or 100) // 100
        with mock.patch.object(Operation, "__call__", record):
            self.block(
                image,
                text,
                mask,
                torch.randn(setting.batch, dim, **like),
                tuple(torch.stack((a.cos(), a.sin()), dim=-1) for a in angles),
                width=Width(heads=heads, image=kept, text=kept, modulation=dim),
            )
        before_up = True
        for operation, call in made:
            yield Case(_place(operation, call, before_up, setting), operation, call)
            before_up = before_up and getattr(call, "activation", "none") == "none"


def _place(operation: Operation[Any, Any], call: Any, before_up: bool, setting: Setting) -> str:
    """Name an operation and its place in the block."""
    if operation.name == "ada_layer_norm":
        return operation.name if call.x.shape[1] == setting.image else f"{operation.name} of text"
    if operation.name != "linear":
        return operation.name
    if call.activation == "gelu":
        return "up_gelu"
    if call.groups[0].gate is None:
        return "map_residual"
    return "out_gate_residual" if before_up else "down_gate_residual"


def work_of(case: Case, results: Sequence[torch.Tensor]) -> tuple[int, int]:
    """Count FLOPs (0 where memory is the limit), and bytes when inputs are read once and outputs written once."""
    call, name = case.call, case.operation.name
    written = sum(t.numel() * t.itemsize for t in results)
    if name == "joint_attention":
        batch, tokens, heads, head_dim = call.q.shape
        read = sum(t.numel() * t.itemsize for t in call[:3])
        return 4 * batch * heads * tokens * call.k.shape[1] * head_dim, read + written
    if name == "ada_layer_norm":
        return 0, sum(t.numel() * t.itemsize for t in call[:3]) + written
    read = flops = 0
    if name == "linear":
        for g in call.groups:
            weights = g.x.shape[2] * (g.out_features or g.weight.shape[0])
            flops += 2 * g.x.shape[:2].numel() * weights
            others = sum(t.numel() for t in (g.x, g.bias, g.gate, g.residual) if t is not None)
            read += (weights + others) * g.x.itemsize
    else:
        for s in call.streams:
            weights = (3 if s.queries else 2) * call.heads * call.head_dim * s.x.shape[2]
            flops += 2 * s.x.shape[:2].numel() * weights
            read += (weights + s.x.numel()) * s.x.itemsize
            read += 0 if s.rope is None else sum(t.numel() * t.itemsize for t in tree_leaves(s.rope))
    return flops, read + written
