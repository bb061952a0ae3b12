"""What the closed forms of one block are computed from: statistics whose size does not grow with the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ppcl_rt import Streams
from ppcl_rt.planning.block_spec import Input, Output
from ppcl_train.closed_form.least_squares import LeastSquares
from ppcl_train.data import streams
from ppcl_train.data.calibration import Inputs


class Columns(NamedTuple):
    """Some columns of a linear layer, ``[out, n]``, and their bias: what `eliminate` removes units from."""

    weight: torch.Tensor
    bias: torch.Tensor


class _Rows:
    """Chooses the rows that count of what passes through a part: all image tokens, and of the text the words."""

    def __init__(self, batch: Inputs) -> None:
        self._mask, self._weight = batch.mask, batch.weight

    def of(self, x: torch.Tensor, stream: Input) -> torch.Tensor:
        """Flatten ``x [N, S, C]`` to rows ``[n, C]``; in a joint sequence the text comes first."""
        if stream == "text":
            return x[self._mask]
        if stream == "joint":
            image = self._mask.new_ones(len(x), x.shape[1] - self._mask.shape[1])
            return x[torch.cat([self._mask, image], 1)]
        return x.flatten(0, 1) if stream == "image" else x

    def weights(self, x: torch.Tensor, stream: Input) -> torch.Tensor:
        """Return the weight of each row that `of` returns, ``[n]``."""
        weight = self._weight if stream == "sample" else self._weight[:, None].expand(x.shape[:2])
        return self.of(weight, stream)


def _passing(state: Streams, stream: Input) -> torch.Tensor:
    """Return what a state holds of a part's input."""
    return torch.cat([state.text, state.image], 1) if stream == "joint" else getattr(state, stream)


class BlockStatistics:
    """Gram matrices of one block: the inputs of its outputs, and what its MLPs add to what they read.

    Attributes:
        block: the block, at full width.
        inputs: for each part with outputs, by its path: statistics of all its columns.
        maps: for each output of a group that a linear map may replace, by its name: regression of what the group adds
            to its stream on what the stream is without it.
    """

    def __init__(self, block: Any, maps: bool = True) -> None:
        """Begin with no data.

        Args:
            block: at full width.
            maps: whether the regressions of maps are wanted; they take another run of the block.
        """
        self.block, spec = block, block.spec
        self.inputs = {output.part.path: LeastSquares(output.part.columns) for output in spec.outputs}
        self._mapped = [output for output in spec.outputs if maps and spec.groups[output.segment.group].mappable]
        self.maps = {output.name: LeastSquares(spec.dim, spec.dim) for output in self._mapped}

    @torch.no_grad()
    def add(self, state: Streams, batch: Inputs, context: dict[str, Any]) -> Streams:
        """Run the block on the teacher's streams and add what it computes.

        Regressions of maps take a second run, in which the block's MLPs put out nothing.

        Args:
            state: what enters the block.
            context: keyword arguments that the block is called with.

        Returns:
            What the block returns: of a block of the teacher, what enters the next one.
        """
        rows = _Rows(batch)

        def add_inputs(path: str, stream: Input, x: torch.Tensor) -> None:
            self.inputs[path].add(rows.of(x, stream), weight=rows.weights(x, stream))

        after = _run(self.block, state, context, _watch(self.block, add_inputs))
        if self._mapped:
            before = _run(self.block, state, context, [self._silence(output) for output in self._mapped])
        for output in self._mapped:
            stream = output.part.stream
            x, y = _passing(before, stream), _passing(after, stream)
            self.maps[output.name].add(rows.of(x, stream), rows.of(y - x, stream), rows.weights(x, stream))
        return after

    def _silence(self, output: Output) -> Any:
        """Make an output put out zero: a block whose MLPs do returns what its MLPs read."""
        layer, columns = self.block.get_submodule(output.part.path), self._slice(output)
        if not output.shared:
            return layer.register_forward_hook(lambda _, __, out: torch.zeros_like(out))

        def clear(_: nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
            x = args[0].clone()
            x[..., columns] = 0
            return (x, *args[1:])

        return layer.register_forward_pre_hook(clear)

    def _slice(self, output: Output) -> slice:
        """The columns of an output in its part."""
        _, offset, unit = output.segment
        return slice(offset, offset + unit * self.block.spec.groups[output.segment.group].count)

    def columns(self, output: Output) -> Columns:
        """Return the weights that an output is made of; the bias is zero where it has none of its own."""
        layer, columns = self.block.get_submodule(output.part.path), self._slice(output)
        bias = layer.bias if output.biased else layer.weight.new_zeros(len(layer.weight))
        return Columns(layer.weight[:, columns], bias)

    def gram(self, output: Output) -> torch.Tensor:
        """Return the Gram matrix of an output's inputs and a constant (`LeastSquares.gram`).

        Where what stands in for the output has no bias, the inputs are taken as if they had no mean.
        """
        whole, columns = self.inputs[output.part.path].gram, self._slice(output)
        if output.biased:
            return whole
        index = torch.tensor([*range(columns.start, columns.stop), len(whole) - 1], device=whole.device)
        return without_constant(whole[index][:, index])

    def linear_map(self, output: Output, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Solve for the map that replaces an output; its bias is zero where the output has none of its own."""
        return self.maps[output.name].solve(ridge, output.biased)


def without_constant(gram: torch.Tensor) -> torch.Tensor:
    """Return a Gram matrix as if inputs had no mean, so that what is fitted with it has no bias of its own."""
    gram = gram.clone()
    gram[:-1, -1] = gram[-1, :-1] = 0
    return gram


@torch.no_grad()
def pass_by(block: Any, state: Streams, context: dict[str, Any]) -> Streams:
    """Run a block of the teacher and add nothing: the same bits as `BlockStatistics.add` returns.

    Layers with hooks are run one by one, others fused: the streams of a teacher that is watched here and there would
    depend on where, by rounding.
    """
    return _run(block, state, context, _watch(block, lambda *_: None))


def _watch(block: Any, visit: Callable[[str, Input, torch.Tensor], None]) -> list[Any]:
    """Have what every part with outputs reads visited: (path, stream, input)."""

    def hook(path: str, stream: Input) -> Callable[..., None]:
        return lambda _, args: visit(path, stream, args[0])

    passing = {output.part.path: output.part.stream for output in block.spec.outputs}
    return [block.get_submodule(path).register_forward_pre_hook(hook(path, stream)) for path, stream in passing.items()]


def _run(block: nn.Module, state: Streams, context: dict[str, Any], hooks: list[Any]) -> Streams:
    """Run a block with hooks in place, and remove them."""
    try:
        return streams.run_block(block, state, context)
    finally:
        for hook in hooks:
            hook.remove()
