"""Processes that train together: who they are, how they share samples, gradients and students.

A single process is a world of size 1, so callers never ask how many processes there are. A world is started from
outside, one process a device: ``torchrun --nproc_per_node 2 -m ppcl_rt.cli train run``, or ``accelerate launch`` on
GPUs.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.tensor import DTensor

from ppcl_rt.files import one_line

Value = TypeVar("Value")

# In a stage that one process runs, the others wait as long as it takes. A process that dies is noticed at once.
_PATIENCE = timedelta(days=30)
# The slowest disk may hold the others up for as long as a state of training takes to write.
_WRITING = timedelta(hours=1)
# Bytes of the gradients that are reduced together: DDP's default. Smaller ones wait for the network, not on it.
_BUCKET = 25 << 20


# What torch says where another process is at fault: it raises a plain RuntimeError for most of it.
_FROM_OTHERS = re.compile("gloo|NCCL|monitoredBarrier|Connection (closed|reset)")


def timeout() -> timedelta:
    """How long work waits for another process: 10 minutes, or ``PPCL_TIMEOUT`` seconds.

    Raises:
        ValueError: ``PPCL_TIMEOUT`` is no number above 0.
    """
    given = os.environ.get("PPCL_TIMEOUT", "600")
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"PPCL_TIMEOUT={given}: it takes the seconds after which a process counts as hung")
    return timedelta(seconds=seconds)


@functools.cache
def group(use: str) -> Any:
    """A group of all processes for one use, through the CPU: ``saving``, ``waiting`` or ``calling``.

    Collectives of one group keep their order, so a thread that writes, or a process that waits, has one of its own.
    All of them are made in `join`.
    """
    patience = {"saving": _WRITING, "waiting": _PATIENCE, "calling": timeout() / 4}
    return dist.new_group(backend="gloo", timeout=patience[use])


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
        """Replace every gradient by its mean over processes; a parameter has one on all of them or on none.

        Gradients of shards are left alone: FSDP has averaged them.
        """
        if self.size == 1:
            return
        whole = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
        for bucket in buckets(whole, _BUCKET):
            total = _flatten_dense_tensors(bucket)
            dist.all_reduce(total)
            total /= self.size
            for gradient, mean in zip(bucket, _unflatten_dense_tensors(total, bucket), strict=True):
                gradient.copy_(mean)

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

    def wait(self, *, patient: bool = False) -> None:
        """Return once every process has called this; what rank 0 alone does may take as long as it takes.

        Args:
            patient: whether rank 0 too waits as long as it takes: at the end of work that processes share unevenly.

        Raises:
            RuntimeError: a process died; or, of rank 0, does not come in the time that work has (see `naming`).
        """
        if self.size > 1:
            # Not a barrier of NCCL: that keeps the waiting GPUs busy for as long as rank 0 works.
            longest = timeout() if self.is_main and not patient else _PATIENCE
            dist.monitored_barrier(group("waiting"), longest, wait_all_ranks=True)

    @contextlib.contextmanager
    def naming(self, stage: str) -> Iterator[None]:
        """Turn what a collective raises where a process died or hangs into one line that names process and stage.

        Raises:
            ValueError: that line. Other errors pass.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not (isinstance(error, dist.DistError) or _FROM_OTHERS.search(str(error))):
                raise
            raise ValueError(
                f"{stage} stopped: {self._missing()}; what was saved is kept ({one_line(error)})"
            ) from None

    def _missing(self) -> str:
        """Say which processes do not answer, by a call that those that do answer in a quarter of the time for work."""
        try:
            dist.monitored_barrier(group("calling"), timeout() / 4, wait_all_ranks=True)
        except RuntimeError as error:
            if not self.is_main:
                return "process 0 died or hangs, or names the process that does"
            ranks = re.search(r"Ranks? ([\d, ]+) failed", str(error))
            return f"process {ranks.group(1) if ranks else 'unknown'} of 0..{self.size - 1} died or hangs"
        return f"the processes 0..{self.size - 1} answer, but one of them was late: raise PPCL_TIMEOUT (seconds)"

    def whole(self, tensors: Mapping[str, torch.Tensor], *, everywhere: bool = False) -> dict[str, torch.Tensor]:
        """Put shards together, one tensor at a time, on the CPU of rank 0; ``{}`` elsewhere, unless ``everywhere``."""
        kept = {}
        for name, tensor in tensors.items():
            full = tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
            if self.is_main or everywhere:
                kept[name] = full.cpu()
        return kept

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
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timeout())
        for use in ("saving", "waiting", "calling"):
            group(use)
        # The threads of the group must end before the interpreter does, or the process aborts.
        atexit.register(dist.destroy_process_group)
    return World(dist.get_rank(), size, device)


def processes_of_a_node() -> int:
    """How many processes of the world share this machine, as torchrun says; all of them where nothing says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))


def buckets(tensors: Sequence[torch.Tensor], size: int) -> Iterator[list[torch.Tensor]]:
    """Divide tensors, in order, into lists of one dtype and device and of about ``size`` bytes."""
    filling: dict[Any, list[torch.Tensor]] = {}
    for tensor in tensors:
        bucket = filling.setdefault((tensor.dtype, tensor.device), [])
        bucket.append(tensor)
        if sum(each.nbytes for each in bucket) >= size:
            yield filling.pop((tensor.dtype, tensor.device))
    yield from filling.values()


def owners(costs: Sequence[float], size: int) -> list[int]:
    """Assign items to ``size`` processes, balanced by cost; returns the process of each item.

    The most expensive item goes first, each item to the process with the least cost so far.
    """
    load, chosen = [0.0] * size, [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        chosen[item] = min(range(size), key=load.__getitem__)
        load[chosen[item]] += costs[item]
    return chosen
