"""Processes that train together: who they are, how they share samples, gradients and students.

A single process is a world of size 1, so callers never ask how many processes there are. A world is started from
outside, one process a device: ``torchrun --nproc_per_node 2 -m ppcl_rt.cli train run``, or ``accelerate launch`` on
GPUs.
"""

from __future__ import annotations

import atexit
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

Value = TypeVar("Value")

# In a stage that one process runs, the others wait as long as it takes. A process that dies is noticed at once.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class World:
    """This process among all that train together.

    Every method but `share` is called by all processes, in the same order.

    Attributes:
        rank: the number of this process; rank 0 alone writes files.
        size: how many processes there are.
        device: the device of this process.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    @property
    def alone(self) -> World:
        """This process as a world of its own: computing with it exchanges nothing."""
        return World(device=self.device)

    def share(self, samples: int) -> slice:
        """Return which samples of a batch this process takes; shares differ by one sample at most.

        Raises:
            ValueError: fewer samples than processes.
        """
        if samples < self.size:
            raise ValueError(f"a batch of {samples} cannot be shared by {self.size} processes: make it larger")
        each, more = divmod(samples, self.size)
        first = self.rank * each + min(self.rank, more)
        return slice(first, first + each + (self.rank < more))

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Average over processes, with the same bits in all of them; no gradient flows through the result.

        Take a loss that is a sum over tokens, divided by the mean over processes of their token counts: averaged over
        processes, it is the loss of the whole batch, however uneven the shares are.
        """
        if self.size == 1:
            return values
        total = values.detach().clone()
        dist.all_reduce(total)
        return total / self.size

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over processes; a parameter has one on all of them or on none."""
        if self.size > 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= self.size

    def agree(self, value: Value) -> Value:
        """Return in all processes the value of rank 0, which is pickled."""
        if self.size == 1:
            return value
        held: list[Any] = [value]
        dist.broadcast_object_list(held, device=torch.device("cpu"))
        return held[0]

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process, once every process has called this."""
        return bool(self.mean(torch.tensor(float(flag))) > 0)

    def wait(self) -> None:
        """Return once every process has called this."""
        # Not a barrier: with NCCL, a barrier keeps the waiting GPUs busy for as long as rank 0 works.
        self.any(False)

    def gather(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return on rank 0 the tensors of all processes by name, those of others on the CPU; ``{}`` elsewhere."""
        whole = dict(tensors)
        forms = self._collect({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
        known = set(forms[0])
        for rank, form in enumerate(forms):
            for name, (shape, dtype) in form.items():
                if name not in known:
                    known.add(name)
                    if self.rank == rank:
                        dist.send(tensors[name].detach().cpu().contiguous(), 0)
                    elif self.is_main:
                        whole[name] = torch.empty(shape, dtype=dtype)
                        dist.recv(whole[name], rank)
        return whole if self.is_main else {}

    def union(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Return in all processes what all of them hold by name; the lowest rank wins a name. Values are pickled."""
        return {name: value for held in reversed(self._collect(dict(values))) for name, value in held.items()}

    def _collect(self, value: Value) -> list[Value]:
        held = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(held, value)
        return held

    def shard(self, model: Any) -> None:
        """Spread a frozen model's weights over all processes (FSDP2), on their devices.

        A block is whole in a process only while it runs. The streams between blocks are the same bits as without.
        """
        if self.size > 1:
            mesh = init_device_mesh(self.device.type, (self.size,))
            for module in (*model.blocks(), model):
                fully_shard(module, mesh=mesh, reshard_after_forward=True)


ALONE = World()


@functools.cache
def join() -> World:
    """Return the world that this process was started in, from the environment that torchrun and accelerate set."""
    size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if size == 1:
        return World(device=device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
        # The threads of the group must end before the interpreter does, or the process aborts.
        atexit.register(dist.destroy_process_group)
    return World(dist.get_rank(), size, device)


def owners(costs: Sequence[float], size: int) -> list[int]:
    """Assign items to ``size`` processes, balanced by cost; returns the process of each item.

    The most expensive item goes first, each item to the process with the least cost so far.
    """
    load, chosen = [0.0] * size, [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        chosen[item] = min(range(size), key=load.__getitem__)
        load[chosen[item]] += costs[item]
    return chosen
