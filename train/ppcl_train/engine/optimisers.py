"""Optimisers, learning-rate schedules and autocast: built in one place for every stage."""

from __future__ import annotations

import gc
import importlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LambdaLR

from ppcl_train.config.stages import LoopConfig
from ppcl_train.engine.log import Log


def adamw(
    parameters: Iterable[torch.Tensor], *, lr: float, weight_decay: float = 0.0, kind: Any = torch.optim.AdamW
) -> torch.optim.Optimizer:
    """Build AdamW as in the paper: betas (0.9, 0.95), and no weight decay of biases and norms.

    Args:
        parameters: what is trained.
        lr: peak learning rate.
        weight_decay: of tensors with two or more dimensions.
        kind: the class (`adamw_class`).
    """
    held = list(parameters)
    groups = [
        {"params": [p for p in held if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in held if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser: torch.optim.Optimizer = kind(groups, lr=lr, betas=(0.9, 0.95))
    return optimiser


def muon(
    parameters: Mapping[str, torch.Tensor],
    matrices: Collection[str],
    *,
    muon_lr: float,
    adamw_lr: float,
    weight_decay: float = 0.0,
    kind: Any = torch.optim.AdamW,
) -> list[torch.optim.Optimizer]:
    """Build Muon for some matrices, by name, and AdamW for all other parameters.

    Args:
        muon_lr, adamw_lr: peak learning rates.
        weight_decay, kind: as of `adamw`; Muon decays its matrices by as much.
    """
    others = [parameter for name, parameter in parameters.items() if name not in matrices]
    held = [parameter for name, parameter in parameters.items() if name in matrices]
    return [
        torch.optim.Muon(held, lr=muon_lr, weight_decay=weight_decay),
        adamw(others, lr=adamw_lr, weight_decay=weight_decay, kind=kind),
    ]


def adamw_class(config: LoopConfig, log: Log) -> Any:
    """Return the class for `adamw`: with 8-bit moments if the config asks for them and bitsandbytes is installed."""
    if config.eight_bit:
        try:
            return importlib.import_module("bitsandbytes").optim.AdamW8bit
        except ImportError:
            log(eight_bit="bitsandbytes is not installed: AdamW keeps its moments in full precision")
    return torch.optim.AdamW


def take_step(optimisers: Iterable[torch.optim.Optimizer]) -> None:
    """Update the weights of every optimiser and drop the gradients."""
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad()


def cosine(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at a step: linear up over ``warmup``, then half a cosine down to zero."""
    return min((step + 1) / max(warmup, 1), 0.5 * (1 + math.cos(math.pi * step / max(steps, 1))))


def schedule(optimiser: torch.optim.Optimizer, rate: Callable[[int], float], done: int = 0) -> LambdaLR:
    """Set the learning rate to ``peak * rate(step)``: call ``step()`` on what this returns after every step.

    Args:
        optimiser: its learning rate now is the peak.
        rate: called with the number of the next step, after the last step as well.
        done: steps done before. The schedule itself has no state to save.
    """
    for group in optimiser.param_groups:
        # A LambdaLR that begins later than step 0 asks for this key.
        group["initial_lr"] = group["lr"]
    return LambdaLR(optimiser, rate, last_epoch=done - 1)


def autocast(precision: Literal["no", "bf16"], device_type: str, *, keeps_casts: bool = True) -> torch.autocast:
    """Compute in bfloat16 inside a ``with`` block if ``precision`` is ``bf16``.

    Args:
        precision: as in `LoopConfig`.
        device_type: ``cpu`` or ``cuda``.
        keeps_casts: keep the bfloat16 copies of weights until the block ends. With false they do not pile up, which
            many models inside one block need.
    """
    return torch.autocast(device_type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=keeps_casts)


def free_optimisers() -> None:
    """Free the optimisers that nobody uses any more, their moments and what they trained.

    An optimiser and its schedule (`schedule`) hold each other; the collector of its own would come to them late.
    """
    gc.collect()
