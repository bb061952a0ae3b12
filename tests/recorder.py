"""A recorder in place of CUDA graphs, for tests on a CPU."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """Records operators with the tensors that they read and wrote, as a CUDA graph records launches with addresses."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class Recording:
    """A graph that runs its operators again on the tensors of the capture: old weights give old results."""

    def __init__(self, calls, outputs):
        self.calls, self.outputs, self.closed = calls, outputs, False

    def replay(self):
        assert not self.closed
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                    # A view shares memory that has been written already.
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    def close(self):
        self.closed = True


class Recorder:
    """The `Backend` on a CPU."""

    def __init__(self):
        self.made, self.inside, self.busy, self.marks = [], False, False, []

    def supports(self, device):
        return device.type == "cpu"

    def capturing(self):
        return self.inside

    def idle(self, device):
        return not self.busy

    def mark(self, device):
        return self.marks.pop(0)

    def warm(self, device, call):
        call()

    def capture(self, device, call):
        with Tape() as tape:
            outputs = call()
        # On a GPU a capture computes nothing.
        for output in tree_leaves(outputs):
            output.fill_(float("nan"))
        self.made.append(Recording(tape.calls, outputs))
        return self.made[-1]

    def exclusive_memory(self, device):
        return torch.no_grad()
