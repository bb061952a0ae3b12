"""Peak memory of distilling 1, 4 and 11 students of one teacher, next to that of a teacher pass and of one student.

    python bench/studies/distil_memory.py [--dim 512] [--tokens 1024] [--batch 4] [--device cuda]

*Activations* are the bytes of tensors that a step makes and that are alive at the same time: streams, what backward
needs, and gradients. Weights and the state of the optimisers are not counted, since both grow with the number of
students in any method. On a CPU the bytes are counted operation by operation
(`ppcl_train.engine.live_bytes.LiveBytes`), on a GPU by its allocator.
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
    """Return the most bytes made by a step that are alive at once; the step runs once before, to make lasting state."""
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        step()
    return live.peak


class Distilling:
    """A random teacher, its inputs, and one student for each pair of neighbouring blocks."""

    def __init__(self, dim: int, side: int, batch: int, place: torch.device, config: StudentsConfig) -> None:
        self.place, self.config, self.world = place, config, World(device=place)
        self.model = PPCLQwenImageTransformer2DModel(
            patch_size=1,
            in_channels=16,
            out_channels=16,
            num_layers=DEPTH,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=dim // HEAD_DIM,
            joint_attention_dim=TEXT_DIM,
            axes_dims_rope=(16, 24, 24),
        )
        self.model.eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        x, t = torch.randn(batch, side**2, 16, generator=generator), torch.rand(batch, generator=generator)
        call = {
            "hidden_states": x,
            "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, TEXT_DIM, generator=generator),
            "encoder_hidden_states_mask": torch.ones(batch, TEXT_TOKENS, dtype=torch.bool),
            "timestep": t,
            "img_shapes": [(1, side, side)] * batch,
            "return_dict": False,
        }
        self.given = calibration.Inputs(x, t, call).to(place)
        intervals = [Interval(n, n + 1) for n in range(DEPTH - 1)]
        self.learners = {interval: self._learner(interval) for interval in intervals}
        nn.Module.to(self.model, place, torch.bfloat16 if config.precision == "bf16" else torch.float32)

    def _learner(self, interval: Interval) -> students.Learner:
        block = selection.new_student(self.model.blocks(), selection.Selected(interval, "first"))
        return students.Learner(block.float().to(self.place), self.config, 1.0, self.world)

    def distil(self, intervals: list[Interval]) -> None:
        """Make one step of the students of these intervals, in one pass of the teacher."""

        def learn(interval: Interval, before: Streams, after: Streams, context: dict) -> None:
            self.learners[interval].learn(before, after, context, self.given.mask)

        with autocast(self.config.precision, self.world.device.type, keeps_casts=False):
            streams.walk_intervals(self.model, self.given, intervals, learn)

    def teacher_pass(self) -> None:
        """Run the teacher alone."""
        with autocast(self.config.precision, self.world.device.type, keeps_casts=False):
            streams.walk(self.model, self.given, lambda *_: None)

    def first_student(self) -> Callable[[], object]:
        """Return one step of the first student, on states of the teacher that are already there."""
        with autocast(self.config.precision, self.world.device.type, keeps_casts=False):
            passed = streams.trace(self.model, self.given)
        learn = self.learners[Interval(0, 1)].learn
        return functools.partial(learn, passed.streams[0], passed.streams[2], passed.context, self.given.mask)


def main(
    dim: Annotated[int, Flag(help="channels of a token, a multiple of 64")] = 512,
    tokens: Annotated[int, Flag(help="image tokens, a square")] = 1024,
    batch: int = 4,
    device: str = "cpu",
    precision: Annotated[str, Flag(help="no or bf16")] = "no",
    checkpointing: bool = False,
) -> None:
    """Print one line for each number of students."""
    place, side = torch.device(device), round(tokens**0.5)
    config = StudentsConfig.model_validate({"precision": precision, "checkpointing": checkpointing, "magnitude": 1.0})
    distilling = Distilling(dim, side, batch, place, config)
    alone = peak_bytes(distilling.first_student(), place)
    teacher = peak_bytes(distilling.teacher_pass, place)
    all_intervals = list(distilling.learners)
    print(f"{DEPTH} blocks of width {dim}, {side**2} + {TEXT_TOKENS} tokens x {batch}, {precision}, {device}")
    print(f"teacher pass {teacher / 1e6:.1f} MB; one student's step {alone / 1e6:.1f} MB")
    for chosen in (all_intervals[:1], all_intervals[::3], all_intervals):
        peak = peak_bytes(functools.partial(distilling.distil, chosen), place)
        held = sum(p.numel() * p.element_size() for i in chosen for p in distilling.learners[i].student.parameters())
        print(
            f"{len(chosen):>3} students: activations {peak / 1e6:.1f} MB, "
            f"{peak / (teacher + alone):.2f} of both together; "
            f"weights of students {held / 1e6:.1f} MB, their optimisers' state {2 * held / 1e6:.1f} MB"
        )


if __name__ == "__main__":
    typer.run(main)
