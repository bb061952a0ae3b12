"""Contestants that the runtime does not choose from: compiled chains, FlexAttention, a bare product, a copy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from kernel_races.cases import Case
from kernel_races.presets import Preset, Setting
from ppcl_rt.ops.implementation import TORCH

# Runs a call of an operation.
Contestant = Callable[[Any], Any]

# These rivals compute something else than the operation: their results are not compared.
UNCHECKED = ("copy", "product alone")


def rivals(case: Case, setting: Setting, preset: Preset) -> dict[str, Callable[[], Contestant]]:
    """Return the rivals of a case: name -> function that makes the contestant."""
    call, operation = case.call, case.operation
    main = setting[:4] == (*next(iter(preset.images.items())), preset.texts[0], 1)
    compiles = main and setting.width in preset.compiled
    made: dict[str, Callable[[], Contestant]] = {}
    if operation.name == "joint_attention":
        if compiles:
            made["flex"] = functools.partial(_flex, call)
        return made
    if compiles:
        made["compiled"] = lambda: _compiled(functools.partial(operation.run, implementation=TORCH))
    if operation.name == "ada_layer_norm":
        copy = torch.empty_like(call.x)
        made["copy"] = lambda: lambda call: copy.copy_(call.x)
    elif operation.name == "linear":
        weights = [g.weight[: g.out_features, : g.x.shape[2]] for g in call.groups]
        made["product alone"] = lambda: lambda call: [F.linear(g.x, w) for g, w in zip(call.groups, weights)]
    return made


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile for one shape; what was compiled for earlier shapes is dropped, since it counts towards a limit."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def _flex(call: Any) -> Contestant:
    """Make a contestant that runs a call by FlexAttention."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k = (t.transpose(1, 2) for t in call[:2])
    blocks = None
    if (mask := call.key_mask) is not None:
        blocks = create_block_mask(
            lambda b, h, i, j: mask[b, j], q.shape[0], None, q.shape[2], k.shape[2], device=q.device.type
        )
    attend = _compiled(flex_attention)
    return lambda call: attend(*(t.transpose(1, 2) for t in call[:3]), block_mask=blocks).transpose(1, 2)
