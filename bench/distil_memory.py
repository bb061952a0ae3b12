"""Peak memory of distilling 1, 4 and 11 students of one teacher, beside a teacher pass and one student alone.

    python bench/distil_memory.py [--dim 512] [--tokens 1024] [--batch 4] [--device cuda]

Activations are bytes of tensors that come into being during a step and are alive together: streams, what backward
needs, and gradients, but neither weights nor the optimisers' state, which grow with the students whatever one does. On
a CPU they are counted operation by operation (`ppcl_train.engine.live_bytes.LiveBytes`), on a GPU by its allocator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torch import nn

from ppcl_rt import Interval, Streams
from ppcl_rt.families.qwen_image import PPCLQwenImageTransformer2DModel
from ppcl_train.config.stages import StudentsConfig
from ppcl_train.data import calibration, streams
from ppcl_train.engine.distributed import World
from ppcl_train.engine.live_bytes import LiveBytes
from ppcl_train.engine.optimisers import autocast
from ppcl_train.selectors import selection
from ppcl_train.stages import students

DEPTH, HEAD_DIM, TEXT_DIM, TEXT_TOKENS = 12, 64, 128, 64
Flag = typer.Option


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Bytes alive together that a step makes; it has run once before, so that state which stays is there."""
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        step()
    return live.peak


def main(
    dim: Annotated[int, Flag(help="width of the teacher, a multiple of 64")] = 512,
    tokens: Annotated[int, Flag(help="image tokens, a square")] = 1024,
    batch: int = 4,
    device: str = "cpu",
    precision: Annotated[str, Flag(help="no or bf16")] = "no",
    checkpointing: bool = False,
) -> None:
    """Print one line a case."""
    place = torch.device(device)
    config = StudentsConfig.model_validate({"precision": precision, "checkpointing": checkpointing, "magnitude": 1.0})
    model = PPCLQwenImageTransformer2DModel(
        patch_size=1,
        in_channels=16,
        out_channels=16,
        num_layers=DEPTH,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=dim // HEAD_DIM,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=(16, 24, 24),
    )
    model.eval().requires_grad_(False)
    generator, side = torch.Generator().manual_seed(0), round(tokens**0.5)
    x, t = torch.randn(batch, side**2, 16, generator=generator), torch.rand(batch, generator=generator)
    call = {
        "hidden_states": x,
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, TEXT_DIM, generator=generator),
        "encoder_hidden_states_mask": torch.ones(batch, TEXT_TOKENS, dtype=torch.bool),
        "timestep": t,
        "img_shapes": [(1, side, side)] * batch,
        "return_dict": False,
    }
    given = calibration.Inputs(x, t, call).to(place)
    world = World(device=place)

    def learner(interval: Interval) -> students.Learner:
        block = selection.new_student(model.transformer_blocks, selection.Selected(interval, "first"))
        return students.Learner(block.float().to(place), config, 1.0, world)

    eleven = {interval: learner(interval) for interval in (Interval(n, n + 1) for n in range(DEPTH - 1))}
    nn.Module.to(model, place, torch.bfloat16 if precision == "bf16" else torch.float32)

    def distil(intervals: list[Interval]) -> None:
        def learn(interval: Interval, before: Streams, after: Streams, context: dict) -> None:
            eleven[interval].learn(before, after, context, given.mask)

        with autocast(config.precision, world.device.type, keeps_casts=False):
            streams.walk_intervals(model, given, intervals, learn)

    def forward() -> None:
        with autocast(config.precision, world.device.type, keeps_casts=False):
            streams.walk(model, given, lambda *_: None)

    with autocast(config.precision, world.device.type, keeps_casts=False):
        passed = streams.trace(model, given)
    first = functools.partial(eleven[Interval(0, 1)].learn, passed.streams[0], passed.streams[2], passed.context)
    alone = peak_bytes(lambda: first(given.mask), place)
    teacher = peak_bytes(forward, place)
    all_intervals = list(eleven)
    print(f"{DEPTH} blocks of width {dim}, {side**2} + {TEXT_TOKENS} tokens x {batch}, {precision}, {device}")
    print(f"teacher pass {teacher / 1e6:.1f} MB; one student's step {alone / 1e6:.1f} MB")
    for chosen in (all_intervals[:1], all_intervals[::3], all_intervals):
        peak = peak_bytes(lambda chosen=chosen: distil(chosen), place)
        held = sum(p.numel() * p.element_size() for i in chosen for p in eleven[i].student.parameters())
        print(
            f"{len(chosen):>3} students: activations {peak / 1e6:.1f} MB, "
            f"{peak / (teacher + alone):.2f} of both together; "
            f"weights of students {held / 1e6:.1f} MB, their optimisers' state {2 * held / 1e6:.1f} MB"
        )


if __name__ == "__main__":
    typer.run(main)
