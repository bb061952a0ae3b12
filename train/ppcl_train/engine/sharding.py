"""A model that is trained, spread over processes by FSDP2: weights, gradients and moments.

Bytes a process, for a model of F frozen numbers in bfloat16 and T trained ones in float32, over S processes of a node:
``2 F / S`` for what is frozen, ``4 T / S`` for weights and for each of gradients and Adam's two moments, and what one
block is as a whole while it runs, twice (the next one is gathered in the meantime). A model of F = 20.4e9 in 60
blocks of 340e6 with T = 4e9: on 8 GPUs 5.1 GB + 8.0 GB + 2 x 0.95 GB = 15.0 GB; on 4 nodes of 8, where each node
holds the whole, the same, and each step reduces T / 8 gradients (2.0 GB) across the nodes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ppcl_train.engine.distributed import World, processes_of_a_node


def mesh_of(world: World) -> DeviceMesh:
    """The processes of a world: one dimension on one node; on several, shards in a node and replicas across nodes.

    A gradient then crosses the slow network once, and a block never.
    """
    local = processes_of_a_node()
    if world.size <= local or world.size % local:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    names = ("replicate", "shard")
    return init_device_mesh(world.device.type, (world.size // local, local), mesh_dim_names=names)


class Sharding:
    """Spreads a model over the processes of a world, module by module; every process does the same.

    A block is one group: whole in a process only while it runs, in either direction. FSDP2 gathers weights of several
    dtypes together as long as those that are trained have one dtype, so frozen weights in bfloat16 and trained ones in
    float32 need no groups apart. A block that a plan does not run is neither gathered nor reduced; layers of a block
    that a plan does not run are gathered with it, and get no gradient. All processes have to run one plan.

    Args:
        world: with one process nothing is divided.
        read: ``name of a parameter -> its tensor``, for modules on the meta device; None where there are none.
    """

    def __init__(self, world: World, read: Callable[[str], torch.Tensor] | None = None) -> None:
        self._world, self._read = world, read
        self._mesh = mesh_of(world) if world.size > 1 else None

    def add_block(self, block: nn.Module, parameters: dict[Any, nn.Parameter], prefix: str = "") -> None:
        """Divide a block, on the device of this process; what it held whole is let go.

        Args:
            parameters: by any name; those of the block become the shards that have taken their place.
            prefix: of the names by which its tensors are read.
        """
        with _following(block, parameters):
            self._divide(block)
            self._fill(block, prefix)
        if self._mesh is not None and callable(getattr(block, "text_input", None)):
            # The first block of a text run is asked for what it reads before it is called.
            register_fsdp_forward_method(block, "text_input")

    def add_rest(self, model: Any, parameters: dict[Any, nn.Parameter]) -> None:
        """Divide what lies outside of the blocks: the maps of text runs each by itself, then the root, which is last.

        Args:
            parameters: as for `add_block`.
        """
        with _following(model, parameters):
            for layer in dict.fromkeys(layer for maps in model.text_runs.values() for layer in maps.children()):
                self._divide(layer)
            self._divide(model)
            self._fill(model, "")

    def add(self, model: Any, parameters: dict[Any, nn.Parameter] | None = None) -> None:
        """Divide a whole model, block by block; with `Sharding.read`, one tensor at a time is whole in host memory."""
        parameters = {} if parameters is None else parameters
        prefixes = {id(module): f"{path}." for path, module in model.named_modules()}
        for block in model.resident_blocks():
            self.add_block(block, parameters, prefixes[id(block)])
        self.add_rest(model, parameters)

    def _divide(self, module: nn.Module) -> None:
        if self._mesh is not None and not isinstance(module, FSDPModule):
            fully_shard(module, mesh=self._mesh, reshard_after_forward=True)

    def _fill(self, module: nn.Module, prefix: str) -> None:
        """Give what is on the meta device its values: each process its own shard."""
        on_meta = {name: p for name, p in module.named_parameters() if p.is_meta}
        if not on_meta:
            return
        assert self._read is not None, "a model on the meta device needs a reader"
        for path, child in module.named_modules():
            if any(p.is_meta for p in child.parameters(recurse=False)):
                child.to_empty(device=self._world.device, recurse=False)
                with torch.no_grad():
                    for name, parameter in child.named_parameters(recurse=False):
                        whole = self._read(f"{prefix}{path}.{name}" if path else f"{prefix}{name}")
                        _copy(whole, parameter)


@contextlib.contextmanager
def _following(module: nn.Module, parameters: dict[Any, nn.Parameter]) -> Iterator[None]:
    """Put what takes a parameter's place in a module, inside the ``with`` block, into a mapping of parameters."""
    paths = {id(parameter): path for path, parameter in module.named_parameters()}
    taken = {name: paths[id(parameter)] for name, parameter in parameters.items() if id(parameter) in paths}
    yield
    now = dict(module.named_parameters())
    parameters.update({name: now[path] for name, path in taken.items()})


def _copy(whole: torch.Tensor, into: torch.Tensor) -> None:
    if isinstance(into, DTensor):
        # Without a source every process cuts its shard out of what it has read itself.
        mesh, placements = into.device_mesh, into.placements
        whole = distribute_tensor(whole.to(into.to_local().device), mesh, placements, src_data_rank=None)
    into.copy_(whole)


def drop_unreached(parameters: Iterable[torch.Tensor], world: World) -> None:
    """Drop the gradients of shards of what ran to no effect: a text output that nobody reads, say.

    FSDP2 gives it a gradient of zeros, by which Adam would move it on, as far as its moments say. Without FSDP2 it has
    none, and stays. Every process calls this.
    """
    sharded = [p for p in parameters if isinstance(p.grad, DTensor)]
    if sharded:
        local = [p.grad.to_local() for p in sharded if isinstance(p.grad, DTensor)]
        largest = torch.stack([each.abs().amax() if each.numel() else each.new_zeros(()) for each in local])
        for parameter, reached in zip(sharded, world.mean(largest) > 0, strict=True):
            if not reached:
                parameter.grad = None


def clip(parameters: Iterable[torch.Tensor], limit: float) -> None:
    """Scale gradients down to a norm of at most ``limit``, over all of them: whole ones and shards."""
    held = [p for p in parameters if p.grad is not None]
    sharded = [p for p in held if isinstance(p.grad, DTensor)]
    if not sharded:
        torch.nn.utils.clip_grad_norm_(held, limit)
        return
    norms = []
    for some in (sharded, [p for p in held if not isinstance(p.grad, DTensor)]):
        if some:
            norm = get_total_norm([p.grad for p in some if p.grad is not None])
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.stack(norms).norm()
    for parameter in held:
        # One by one: tensors and shards do not go through one call.
        clip_grads_with_norm_([parameter], limit, total)
