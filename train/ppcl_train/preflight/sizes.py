"""What the arithmetic of a run starts from: parameters, FLOPs, and the bytes that blocks hold while they run.

Nothing is read but a teacher's ``config.json``. Activations with gradients are found by a dry run: a block of the real
width is built without memory (`FakeTensorMode`) and runs forward and backward while the bytes of all tensors that live
at once are counted.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from ppcl_rt import LINEAR_MAP, Architecture, BlockSpec, Tokens
from ppcl_rt.families import registry
from ppcl_train.config.settings import RunConfig
from ppcl_train.data.teacher_file import find_pretrained
from ppcl_train.engine.live_bytes import LiveBytes
from ppcl_train.engine.optimisers import autocast
from ppcl_train.families import base as families
from ppcl_train.stages.assembly import legal_counts


class Layer(NamedTuple):
    """A matrix that a checkpoint stores next to the teacher, and its bias."""

    rows: int
    columns: int
    bias: int = 0

    def numbers(self, most_rank: int | None) -> int:
        """The most numbers that are stored of it: two factors are stored only where they are smaller."""
        whole = self.rows * self.columns
        factors = whole if most_rank is None else most_rank * (self.rows + self.columns)
        return min(whole, factors) + self.bias


class Sizes:
    """A run's model and its shapes.

    Attributes:
        run: the settings.
        architecture: of the teacher.
        tokens: of a sample (`Tokens.batch` is 1): the family's reference shape.
        itemsize: bytes of a number in the dtype that the teacher computes in.
    """

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self._settings = json.dumps(self._settings_of(run))
        self.architecture, self._config = _described(run.task, self._settings)
        self.tokens = Tokens(*registry.reference(run.task))
        self.itemsize = getattr(torch, run.teacher.dtype).itemsize

    @staticmethod
    def _settings_of(run: RunConfig) -> Mapping[str, Any]:
        if run.teacher.pretrained is None:
            return run.teacher.architecture
        if Path(run.teacher.pretrained).exists():
            kind, place = registry.model_class(run.task), find_pretrained(run.teacher.pretrained)
            with torch.device("meta"):
                described: Mapping[str, Any] = kind.described(kind.opened(place)).config
            return {name: value for name, value in described.items() if not name.startswith("_")}
        # The defaults of diffusers' class are the published model's.
        return {}

    # Parameters.

    @property
    def params(self) -> int:
        """Of the teacher."""
        return self.architecture.dense_params

    def block_params(self, block: int = 0) -> int:
        """Of a block at full width."""
        spec = self.architecture.spec(block)
        return spec.params(spec.full)

    @functools.cached_property
    def largest_block(self) -> int:
        """Number of the block with the most parameters."""
        return max(range(self.architecture.depth), key=self.block_params)

    def layers(self, block: int) -> Iterator[Layer]:
        """The layers that run in the place of parts of a block, or of a student, at its narrower counts."""
        spec = self.architecture.spec(block)
        counts = legal_counts(self.run, spec)
        for output in spec.outputs:
            for count in counts[output.segment.group][1:]:
                columns = spec.dim if count == LINEAR_MAP else count * output.segment.unit
                yield Layer(output.part.rows, columns, output.part.rows if output.biased else 0)

    def composed(self, block: int) -> int:
        """The most bytes of narrower layers that a plan runs in a block, each whole."""
        spec, total = self.architecture.spec(block), 0
        counts = legal_counts(self.run, spec)
        for output in spec.outputs:
            narrower = [
                spec.dim if n == LINEAR_MAP else n * output.segment.unit for n in counts[output.segment.group][1:]
            ]
            total += output.part.rows * max(narrower, default=0)
        return total * self.itemsize

    def modulation_factors(self, block: int) -> int:
        """Numbers in the two factors of a block's modulations, at the highest rank."""
        spec = self.architecture.spec(block)
        counts = legal_counts(self.run, spec)
        return sum(spec.group_params(group, counts[group][1]) for group in spec.rank_groups if len(counts[group]) > 1)

    def stored(self, block: int) -> int:
        """The most numbers that are stored next to a block of the teacher, or a student, for narrower widths."""
        most = self.run.compress.most_rank
        return self.modulation_factors(block) + sum(layer.numbers(most) for layer in self.layers(block))

    def text_maps(self) -> list[int]:
        """How many maps of text runs begin at each block."""
        longest, architecture = self.run.width.longest_text_run, self.architecture
        counts = []
        for first in range(architecture.depth):
            may = "text" in architecture.spec(first).may_leave
            later = min(longest - 1, architecture.depth - 1 - first) if may else 0
            counts.append(2 * later)
        return counts

    def stored_maps(self) -> int:
        """The most numbers that are stored of maps of text runs."""
        layer = Layer(self.architecture.dim, self.architecture.dim, self.architecture.dim)
        return sum(self.text_maps()) * layer.numbers(self.run.compress.most_rank)

    @property
    def most_students(self) -> int:
        """The most students that are trained: as many as the settings allow, and as disjoint intervals there can be."""
        most = self.run.table.most_students if self.run.select == "table" else None
        disjoint = self.architecture.depth // 2
        return disjoint if most is None else min(most, disjoint)

    def student_numbers(self, block_params: int) -> int:
        """The most numbers that are stored of a student's own parts."""
        most, spec = self.run.compress.most_rank, self.architecture.spec(self.largest_block)
        if most is None or not self.run.compress.share:
            return block_params
        layers = [Layer(part.rows, part.columns) for part in spec.parts]
        whole = sum(layer.rows * layer.columns for layer in layers)
        return block_params - whole + sum(layer.numbers(most) for layer in layers)

    @property
    def choices(self) -> int:
        """How many choices are measured: counts of blocks, text runs, and students with their counts."""
        architecture, total = self.architecture, sum(self.text_maps()) // 2
        per_block = []
        for block in range(architecture.depth):
            counts = legal_counts(self.run, architecture.spec(block))
            per_block.append(sum(len(of_group) - 1 for of_group in counts.values()))
        return total + sum(per_block) + self.most_students * (1 + max(per_block))

    @property
    def storage(self) -> int:
        """Bytes of a number in the checkpoint."""
        size: int = getattr(torch, self.run.storage).itemsize
        return size

    # Closed forms.

    def statistics(self, block: int) -> int:
        """Bytes of the statistics of a block (`BlockStatistics`): Gram matrices in float64."""
        spec = self.architecture.spec(block)
        parts = {output.part.path: output.part.columns for output in spec.outputs}
        mapped = sum(spec.groups[output.segment.group].mappable for output in spec.outputs)
        dim = spec.dim + 1
        return 8 * (sum((columns + 1) ** 2 for columns in parts.values()) + mapped * 2 * dim**2)

    def _columns(self, block: int) -> list[tuple[int, int]]:
        """Rows and columns of each output of a block."""
        return [(output.part.rows, output.part.columns) for output in self.architecture.spec(block).outputs]

    def closed_form(self) -> int:
        """Bytes that the closed forms of the largest group of a block hold at once, next to its statistics.

        Brain surgery holds a Gram matrix, the covariance, its inverse and a product of the weights, and three times
        the weights, in float64; the layers of all counts wait in float32 until they are factored.
        """
        columns = max(c for block in range(self.architecture.depth) for _, c in self._columns(block))
        rows = max(r for block in range(self.architecture.depth) for r, _ in self._columns(block))
        layers = max(sum(x.rows * x.columns for x in self.layers(n)) for n in range(self.architecture.depth))
        return 8 * (4 * columns**2 + 3 * rows * columns) + 4 * layers

    def closed_form_flops(self, block: int) -> int:
        """Of Gram matrices over all samples, and of brain surgery on every output of a block."""
        samples = self.run.width.samples
        tokens = samples * (self.tokens.image + self.tokens.text)
        grams = sum(2 * tokens * columns**2 for _, columns in self._columns(block))
        # An inverse, the elimination of all columns from it and from the weights, and a solution at each count.
        surgery = sum(4 * columns**3 + 4 * rows * columns**2 for rows, columns in self._columns(block))
        return grams + surgery

    # FLOPs.

    def block_flops(self, block: int = 0) -> int:
        """Of a block, forward, one sample."""
        spec: BlockSpec = self.architecture.spec(block)
        return spec.flops(spec.full, self.tokens.image, self.tokens.text)

    @property
    def flops(self) -> int:
        """Of a forward of the teacher, one sample."""
        return self.architecture.dense_flops(self.tokens)

    # Activations.

    def streams(self, batch: int) -> int:
        """Bytes of the streams between two blocks."""
        return batch * (self.tokens.image + self.tokens.text) * self.architecture.dim * self.itemsize

    def forward(self, batch: int) -> int:
        """The most bytes that a forward of the teacher holds next to its weights, without gradients."""
        tokens = self.tokens._replace(batch=batch)
        found: int = registry.model_class(self.run.task).activation_bytes(self._config, tokens, self.itemsize)
        return found

    def backward(self, batch: int, precision: Literal["no", "bf16"]) -> int:
        """The most bytes that a block with all its parameters in training holds at once.

        Its weights do not count, nor their gradients: these are let go of as soon as each is whole.

        Args:
            batch: samples.
            precision: as in `LoopConfig`.
        """
        return _backward(self.run.task, self._settings, self.tokens._replace(batch=batch), precision)


# Asked for over and over while a setting is looked for that makes a stage fit.


@functools.lru_cache(maxsize=16)
def _described(task: str, settings: str) -> tuple[Architecture, Mapping[str, Any]]:
    """The architecture and the config of a family's class with some settings, as JSON."""
    with torch.device("meta"):
        model = families.of(task).build(json.loads(settings))
    return model.catalog.architecture, dict(model.config)


@functools.lru_cache(maxsize=256)
def _backward(task: str, settings: str, tokens: Tokens, precision: Literal["no", "bf16"]) -> int:
    """See `Sizes.backward`."""
    family, before = families.of(task), torch.get_default_dtype()
    one_each = dict.fromkeys(registry.model_class(task).depth_settings, 1)
    try:
        # Weights that are trained are in float32.
        torch.set_default_dtype(torch.float32)
        with FakeTensorMode(allow_non_fake_inputs=True):
            shallow = family.build({**json.loads(settings), **one_each})
            block, call = _first_call(shallow, shallow.example(tokens))
            for parameter in block.parameters():
                parameter.register_post_accumulate_grad_hook(_let_go)
            with LiveBytes() as live, autocast(precision, "cpu", keeps_casts=False):
                out = block(**call)
                sum(stream.float().square().sum() for stream in out).backward()
    finally:
        torch.set_default_dtype(before)
    return live.peak


def _let_go(parameter: torch.Tensor) -> None:
    """Drop a gradient that is whole."""
    parameter.grad = None


def _first_call(model: Any, given: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The largest block of a model, trainable, and the arguments that a forward calls it with."""
    block = max(model.blocks(), key=lambda each: sum(p.numel() for p in each.parameters()))
    calls: list[dict[str, Any]] = []
    hook = block.register_forward_pre_hook(lambda _, __, kwargs: calls.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        model(**given)
    hook.remove()
    block.requires_grad_(True)
    return block, tree_map_only(torch.Tensor, torch.Tensor.detach, calls[0])
