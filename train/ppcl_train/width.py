"""Rank orders of heads and channels, and output layers compensated by least squares for what a width leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppcl_rt import Interval, Width
from ppcl_train import states
from ppcl_train.config import RunConfig
from ppcl_train.draft import open_draft, write_draft
from ppcl_train.probes import LeastSquares, ridged
from ppcl_train.runs import Log, read_tensors, write_tensors


def legal_counts(run: RunConfig, full: Width) -> dict[str, list[int]]:
    """Counts of each group, widest first."""
    counts = {}
    for group, count in full._asdict().items():
        shares = run.width.heads if group == "heads" else run.width.channels
        counts[group] = sorted({count, *(max(1, round(share * count)) for share in shares)}, reverse=True)
    return counts


class OutputInputs:
    """Gram matrices of what the output layers of a block read, per output of its layout."""

    def __init__(self, block: nn.Module, outputs: Mapping[str, tuple[str, str]]) -> None:
        self.layers: dict[str, Any] = {name: block.get_submodule(path) for name, (path, _) in outputs.items()}
        self.fits = {name: LeastSquares(layer.in_features) for name, layer in self.layers.items()}

    def watch(self, mask: torch.Tensor) -> list[Any]:
        """Hook the layers: what passes through them is taken in, words alone where it is text."""

        def hook(name: str) -> Any:
            def take(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
                x = given[0]
                self.fits[name].add(x[mask] if name.endswith("_text") else x.flatten(0, 1))

            return take

        return [layer.register_forward_pre_hook(hook(name)) for name, layer in self.layers.items()]


def prune(run: RunConfig, folder: Path) -> None:
    """Rank and compensate all blocks and students; writes ``width.safetensors``."""
    log = Log(folder, "width")
    write_draft(run, folder, read_tensors(folder / "tuned.safetensors"))
    model = open_draft(folder)
    blocks: dict[str, tuple[nn.Module, int]] = {
        f"transformer_blocks.{n}": (block, n) for n, block in enumerate(model.transformer_blocks)
    }
    blocks |= {f"students.{key}": (block, Interval.of_key(key).first) for key, block in model.students.items()}
    watchers = {prefix: OutputInputs(block, model.layout.outputs) for prefix, (block, _) in blocks.items()}
    for batch in states.batches(run, run.width.samples, states.WIDTH):
        passed = states.trace(model, batch)
        for prefix, (block, first) in blocks.items():
            hooks = watchers[prefix].watch(batch.mask)
            with torch.no_grad():
                states.run_block(block, passed.states[first], passed.context)
            for hook in hooks:
                hook.remove()
    tensors: dict[str, torch.Tensor] = {}
    for prefix, watcher in watchers.items():
        made = compress_block(run, watcher, model.layout, model.catalog.shape.width)
        tensors |= {f"{prefix}.{name}": tensor for name, tensor in made.items()}
    log(blocks=len(blocks), samples=run.width.samples, tensors=len(tensors))
    write_tensors(folder / "width.safetensors", tensors, {"samples": run.width.samples})


def compress_block(run: RunConfig, watcher: OutputInputs, layout: Any, full: Width) -> dict[str, torch.Tensor]:
    """Rank orders (``order.*``) and compensated layers (``narrow.*``) of one block."""
    made = {}
    counts = legal_counts(run, full)
    for group, count in full._asdict().items():
        outputs = [name for name, (_, its_group) in layout.outputs.items() if its_group == group]
        # Heads are shared by both streams, so their importance is the sum over both, each relative to its stream.
        scores = [importance(watcher.layers[name], watcher.fits[name].gram, count) for name in outputs]
        order = torch.stack(scores).sum(0).argsort(descending=True, stable=True)
        made[f"order.{group}"] = order.to(torch.int32)
        for name in outputs:
            layer, gram = watcher.layers[name], watcher.fits[name].gram
            for kept in counts[group][1:]:
                columns = (order[:kept, None] * (layer.in_features // count)).add(
                    torch.arange(layer.in_features // count)
                )
                weight, bias = compensate(layer, gram, columns.flatten(), run.width.ridge)
                narrow = layout.narrow_name(name, kept)
                made |= {f"narrow.{narrow}.weight": weight, f"narrow.{narrow}.bias": bias}
    return made


def importance(layer: nn.Linear, gram: torch.Tensor, units: int) -> torch.Tensor:
    """Share ``[units]`` of a layer's mean squared output that each unit alone makes: activation times weight."""
    weight = layer.weight.double().unflatten(1, (units, -1))  # [out, units, e]
    inner = gram[:-1, :-1].unflatten(0, (units, -1)).unflatten(2, (units, -1))  # [units, e, units, e]
    own = inner.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [units, e, e]
    score = torch.einsum("oue,uef,ouf->u", weight, own, weight)
    return score / score.sum()


def compensate(
    layer: nn.Linear, gram: torch.Tensor, kept: torch.Tensor, ridge: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight ``[out, kept]`` and bias that reproduce a layer's output from some of its inputs with the least error.

    With ``W`` the weight and bias side by side, ``G`` the Gram matrix of inputs and constant, ``K`` the kept columns
    and the constant, ``P`` the rest, the least-squares solution is ``W_K + W_P G[P, K] G[K, K]^-1``. It is written as
    a change of what is kept, so that the ridge pulls towards the layer as it was, not towards zero.
    """
    columns = torch.cat([kept, torch.tensor([layer.in_features])])
    full = torch.cat([layer.weight, layer.bias[:, None]], dim=1).double()
    own = gram[columns][:, columns]
    lost = full @ gram[:, columns] - full[:, columns] @ own
    solution = (full[:, columns] + torch.linalg.solve(ridged(own, ridge), lost.T).T).float()
    return solution[:, :-1].contiguous(), solution[:, -1].contiguous()
