"""How the values of options are read: budgets, devices, dtypes, and what a checkpoint is."""

from __future__ import annotations

import torch

import ppcl_rt
from ppcl_rt.cli.options import Amounts
from ppcl_rt.families import registry
from ppcl_rt.model.fitting import fitted, room_of
from ppcl_rt.planning.budget import Budget
from ppcl_rt.planning.costs import Bytes
from ppcl_rt.planning.milliseconds import Times

# What several budgets are where none is asked for.
_RATIOS = "1,0.7,0.5,0.35"


def opened(checkpoint: str) -> tuple[ppcl_rt.Checkpoint, ppcl_rt.Catalog, ppcl_rt.Planner]:
    """Open a checkpoint; returns it, its catalog, and the planner of it.

    Raises:
        ValueError: there is no such checkpoint, it is of no family here, or it has no catalog.
    """
    folder = ppcl_rt.locate(checkpoint)
    source = ppcl_rt.Checkpoint(folder)
    if source.catalog is None:
        # In a layout that the family alone knows, perhaps.
        source = registry.of_class(source.config.get("_class_name"), checkpoint).opened(folder)
    if source.catalog is None:
        raise ValueError(f"{checkpoint} is a stock checkpoint with no catalog: `ppcl train` makes one")
    sketches = source.sketches if source.catalog.sketch is not None else None
    return source, source.catalog, ppcl_rt.Planner(source.catalog, sketches)


def no_times(tokens: ppcl_rt.Tokens) -> Times:
    """The milliseconds of a checkpoint whose weights are not loaded: none are known."""
    raise AssertionError(f"nobody asks for milliseconds at {tokens} here")


def budget_of(default: float, ratio: float | None, amounts: Amounts) -> Budget:
    """The budget that options ask for; ``default`` is the ratio where they ask for none.

    Raises:
        ValueError: one of them is no amount.
    """
    if ratio is None and not amounts.limits:
        ratio = default
    return Budget.of(ratio, **amounts._asdict())


def budgets_of(checkpoint: str, ratios: str | None, amounts: Amounts, quantize: str | None = None) -> list[Budget]:
    """One budget for each ratio and each amount; every option takes several with commas between.

    Without any, ratios 1, 0.7, 0.5 and 0.35. Models are loaded in float32.

    Raises:
        ValueError: one of them is no number, or the checkpoint has no plan for it. What needs milliseconds is found
            when it is run.
    """
    if ratios is None and not amounts.limits:
        ratios = _RATIOS
    asked = []
    for part in ratios.split(",") if ratios is not None else []:
        try:
            asked.append(Budget.of(float(part)))
        except ValueError:
            raise ValueError(f'a ratio is a number above 0 and up to 1, not "{part.strip()}"') from None
    for name, given in amounts.limits.items():
        how = amounts.how if name == "fit" else {"shape": amounts.shape}
        asked += [Budget.of(None, **{name: part}, **how) for part in given.split(",")]
    if amounts.fit is None and (amounts.pipeline or amounts.offload):
        raise ValueError("--pipeline and --offload go with --fit")
    source, _, planner = opened(checkpoint)
    weights = bytes_of(planner.catalog, torch.float32, quantize)
    for budget in asked:
        if budget.latency is None:
            limited, _ = without_fit(budget, source, planner, torch.float32, weights)
            planner.plan_within(limited, lambda: weights, no_times)
    return asked


def bytes_of(catalog: ppcl_rt.Catalog, dtype: torch.dtype, quantize: str | None) -> Bytes:
    """How bytes of weights are counted.

    Raises:
        ValueError: no such format.
    """
    return Bytes(dtype.itemsize, ppcl_rt.Quantisation.of(quantize), catalog.compensated)


def without_fit(
    budget: Budget, source: ppcl_rt.Checkpoint, planner: ppcl_rt.Planner, dtype: torch.dtype, weights: Bytes
) -> tuple[Budget, ppcl_rt.Room | None]:
    """The budget with ``memory`` in place of ``fit``, and what the rest of the pipeline takes; no weights are read.

    Raises:
        ValueError: it does not fit.
    """
    if budget.fit is None:
        return budget, None
    catalog = planner.catalog
    room = room_of(budget, registry.model_class(catalog.family), source.config, dtype, catalog.reference)
    return fitted(budget, room, planner, weights), room


def float_of(name: str | None) -> torch.dtype | None:
    """The dtype of this name.

    Raises:
        ValueError: torch has no floating-point dtype of this name.
    """
    found = getattr(torch, name, None) if name else None
    if name and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"a dtype is float32, bfloat16 or float16, not {name}")
    return found


def check_device(device: str) -> None:
    """Try a device.

    Raises:
        ValueError: it is not on this machine, or cannot hold values.
    """
    try:
        # Reads a value back, which a device without memory (meta) cannot.
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ValueError, NotImplementedError):
        raise ValueError(f"there is no device {device} here") from None
