"""Lists of blocks that others have put lists of theirs in place of, as cache-dit does while a forward runs.

cache-dit keeps the list that it finds, and puts one module in its place that calls the first of its blocks, decides by
what they changed whether the others are called, and calls the last ones. What runs here is a program, not a list. So
for each forward its list is made of the steps of the program.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ppcl_rt.model.block import PluggableBlock
from ppcl_rt.model.program import Program

Streams = tuple[torch.Tensor, torch.Tensor]
# Runs a block call of a program, by its number, on (text, image).
Step = Callable[[int, torch.Tensor, torch.Tensor], Streams]


class StepOfProgram(nn.Module):
    """One step, called as a block is; what else a block is given, the step knows."""

    def __init__(self, step: Step, number: int, text_tokens: int) -> None:
        super().__init__()
        self.step, self.number, self.text_tokens = step, number, text_tokens

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, *_: Any, **__: Any
    ) -> Any:
        """Run it: (text, image), as diffusers' blocks; of one stream, text first, where it comes as one."""
        if encoder_hidden_states is not None:
            return self.step(self.number, encoder_hidden_states, hidden_states)
        text, image = hidden_states[:, : self.text_tokens], hidden_states[:, self.text_tokens :]
        return torch.cat(self.step(self.number, text, image), 1)


def are_borrowed(model: Any) -> bool:
    """Whether others hold a list of theirs in place of one of the model's."""
    return any(model._modules[path] is not own for path, own in model._lists.items())


def run_borrowed(model: Any, program: Program, step: Step, text: torch.Tensor, image: torch.Tensor) -> Streams:
    """Run the steps of a program, those of borrowed lists through what others have put there.

    An empty list in the place of one says that what is in the place of the list before it stands for both.

    Raises:
        ValueError: they have put something there that does not hold the model's blocks.
    """
    _begin_anew(model, program)
    groups: list[tuple[Any, list[int]]] = []
    for number, call in enumerate(program.calls):
        path, _ = model.catalog.architecture.place(call.interval.first)
        held: Any = model._modules[path]
        if held is model._lists[path]:
            held = None
        elif not len(held):
            held = groups[-1][0] if groups else None
        if not groups or groups[-1][0] is not held:
            groups.append((held, []))
        groups[-1][1].append(number)
    for held, numbers in groups:
        if held is None:
            for number in numbers:
                text, image = step(number, text, image)
        else:
            text, image = _through(held, [StepOfProgram(step, n, text.shape[1]) for n in numbers], text, image)
    return text, image


def _through(held: nn.ModuleList, steps: Sequence[StepOfProgram], text: torch.Tensor, image: torch.Tensor) -> Streams:
    """Call what others have put in place of a list, over these steps in place of the list."""
    [unit, *more] = held
    lists = [name for name, child in unit._modules.items() if _holds_blocks(child)]
    if more or len(lists) != 1:
        raise ValueError(
            f"a list of blocks was replaced by {', '.join(type(each).__name__ for each in held)}: "
            "what runs here is a plan, and only what calls the blocks of the list that it found can run it"
        )
    unit._modules[lists[0]] = nn.ModuleList(steps)
    if "encoder_hidden_states" in inspect.signature(type(unit).forward).parameters:
        text, image = unit(image, text)
        return text, image
    joint = unit(torch.cat([text, image], 1))
    return joint[:, : text.shape[1]], joint[:, text.shape[1] :]


def _holds_blocks(module: Any) -> bool:
    return isinstance(module, nn.ModuleList) and all(
        isinstance(each, (PluggableBlock, StepOfProgram)) for each in module
    )


def _begin_anew(model: Any, program: Program) -> None:
    """Have cache-dit forget what another program computed."""
    last = model.__dict__.get("_borrowed_by")
    if last is not None and last() is program:
        return
    model.__dict__["_borrowed_by"] = weakref.ref(program)
    manager = getattr(model, "_context_manager", None)
    for name in getattr(model, "_context_names", ()):
        context = manager.get_context(name) if manager is not None else None
        if context is not None:
            context.clear_buffers()
            for calibrator in (*context.get_calibrators(), *context.get_cfg_calibrators()):
                if calibrator is not None:
                    calibrator.reset_cache()
