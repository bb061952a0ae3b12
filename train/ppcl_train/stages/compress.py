"""The stage *compress*: what recovery left, stored as differences of low rank (`ppcl_rt.checkpoint.composed`).

The rank is the least at which the squared error that truncation adds to a layer's output, on calibration inputs, stays
below a share of the error that the choice itself makes: of a compensated output against the full one, of a linear map
against what it stands in for. A student is stored as a difference to the block that it was copied from; there the error
is a share of what training changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ppcl_rt import LINEAR_MAP, Interval
from ppcl_rt.checkpoint.composed import Bases, ComposedCheckpoint, composed
from ppcl_rt.model.tensors import held_index
from ppcl_train.closed_form.block_statistics import BlockStatistics
from ppcl_train.closed_form.compression import moments, output_error, truncated, truncated_map
from ppcl_train.closed_form.text_runs import later_blocks, observe_text_runs
from ppcl_train.config.settings import RunConfig
from ppcl_train.data.passes import Passes
from ppcl_train.engine.files import read_tensors, write_tensors
from ppcl_train.engine.log import Log
from ppcl_train.stages import recover
from ppcl_train.stages.draft import open_draft, write_draft
from ppcl_train.stages.width import modulation_inputs, observe, portions

OUTPUT = "compressed.safetensors"


@torch.no_grad()
def compress(run: RunConfig, folder: Path) -> None:
    """Store layers as factors where these are smaller and near enough; writes ``compressed.safetensors``."""
    log, config = Log(folder, "compress"), run.compress
    tensors = read_tensors(folder / recover.REFINED)
    before = _bytes(tensors)
    if config.share:
        write_draft(run, folder, tensors, narrower=True)
        model = open_draft(run, folder)
        _Compressor(run, model, tensors).all()
    if before:
        log(megabytes=_bytes(tensors) / 1e6, of=before / 1e6)
    write_tensors(folder / OUTPUT, tensors, {"share": config.share})


def _bytes(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes at two a number, as a checkpoint in half precision."""
    return sum(2 * tensor.numel() for tensor in tensors.values())


class _Compressor:
    """Compresses ``tensors`` in place.

    Attributes:
        model: the draft that they make, everything resident.
    """

    def __init__(self, run: RunConfig, model: Any, tensors: dict[str, torch.Tensor]) -> None:
        self.run, self.model, self.tensors, self.share = run, model, tensors, run.compress.share
        self.dtype = getattr(torch, run.storage)
        self.bases = Bases(model.catalog)
        assert isinstance(model._source, ComposedCheckpoint), "a draft is loaded from its folder"
        self.source = model._source

    def all(self) -> None:
        """Compress students, what replaces outputs of blocks and students, and maps of text runs."""
        model, samples = self.model, self.run.compress.samples
        architecture = model.catalog.architecture
        runnable = [("{}.{}".format(*architecture.place(n)), block, n) for n, block in enumerate(model.blocks())]
        runnable += [(f"students.{key}", block, Interval.of_key(key).first) for key, block in model.students.items()]
        read = modulation_inputs(self.run, model)
        runnable.sort(key=lambda each: each[2])
        passes = Passes(self.run, model, samples)
        for portion, _ in portions(runnable, self.run.width.blocks_at_once):
            statistics = observe(passes, portion)
            for prefix, _, first in portion:
                if prefix.startswith("students."):
                    self._student(prefix, statistics[prefix], read.get(architecture.kind(first)))
                self._replacements(prefix, statistics[prefix])
        if model.catalog.text_runs:
            reach = later_blocks(model, self.run.width.longest_text_run)
            for path, fit, rows in observe_text_runs(passes, reach).maps(architecture.depth):
                if f"{path}.weight" in self.tensors:
                    weight, bias = self.tensors[f"{path}.weight"], self.tensors[f"{path}.bias"]
                    self._store(path, truncated_map(fit, rows, weight, bias, self.share, self.dtype))

    def _read(self, name: str) -> torch.Tensor:
        """A weight as it will be read from the checkpoint, in float32."""
        path = name.rpartition(".")[0]
        if f"{path}.up" in self.tensors:
            base = self.bases.base(path, self._read)
            return composed(base, self.tensors[f"{path}.up"].to(self.dtype), self.tensors[f"{path}.down"])
        tensor = self.tensors[name] if name in self.tensors else self.source.read(name)
        return tensor.to(self.dtype).float() if tensor.is_floating_point() else tensor

    def _store(self, path: str, factors: tuple[torch.Tensor, torch.Tensor] | None) -> bool:
        if factors is None:
            return False
        del self.tensors[f"{path}.weight"]
        # In float32 as all that stages write; the numbers are those of the storage dtype.
        self.tensors[f"{path}.up"], self.tensors[f"{path}.down"] = (factor.float() for factor in factors)
        return True

    def _student(self, prefix: str, statistics: BlockStatistics, read: torch.Tensor | None) -> None:
        block = statistics.block
        of_modulations = None if read is None else read.double().T @ read.double() / len(read)
        for part in block.spec.parts:
            path = f"{prefix}.{part.path}"
            base = self.bases.base(path, self._read)
            assert base is not None, "a student was copied from a block"
            change = self.tensors[f"{path}.weight"].to(base) - base
            second = of_modulations if part.factored else None
            if part.path in statistics.inputs:
                held, _ = moments(statistics.inputs[part.path].gram, centred=False)
                # The block holds columns in rank order, the checkpoint in that of the dense block.
                index = held_index(part, block.held[part.path], block.orders).to(held.device)
                second = torch.zeros_like(held)
                second[index[:, None], index] = held
            energy = change.square().sum().item() if second is None else output_error(change, second)
            self._store(path, truncated(change, second, self.run.compress.student_share * energy, self.dtype))

    def _replacements(self, prefix: str, statistics: BlockStatistics) -> None:
        spec = statistics.block.spec
        for output in spec.outputs:
            counts = [
                count
                for count in range(spec.groups[output.segment.group].count)
                if f"{prefix}.replacements.{spec.replacement(output.name, count)}.weight" in self.tensors
            ]
            for count in counts:
                path = f"{prefix}.replacements.{spec.replacement(output.name, count)}"
                weight, bias = self.tensors[f"{path}.weight"], self.tensors.get(f"{path}.bias")
                if count == LINEAR_MAP:
                    fit = statistics.maps[output.name]
                    self._store(path, truncated_map(fit, slice(None), weight, bias, self.share, self.dtype))
                    continue
                second, mean = moments(statistics.gram(output), centred=bias is not None)
                base = self.bases.base(path, self._read)
                assert base is not None, "a compensated output replaces a part"
                columns, change = weight.shape[1], (weight.to(base) - base).double().to(second)
                whole = statistics.columns(output).weight.to(second)
                error = output_error(torch.cat([change, -whole[:, columns:]], 1), second)
                factors = truncated(change, second[:columns, :columns], self.share * error, self.dtype)
                if self._store(path, factors) and bias is not None and factors is not None:
                    up, down = (factor.to(change) for factor in factors)
                    # The bias makes up for the mean of what was left out.
                    self.tensors[f"{path}.bias"] = bias + ((change - up @ down) @ mean[:columns]).to(bias)
