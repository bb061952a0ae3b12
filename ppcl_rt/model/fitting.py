"""What the rest of a pipeline leaves for the transformer on a device.

Counted are the weights of the other parts, what a forward of the transformer holds at once beside its weights
(`Residency.activation_bytes`), and what decoding holds at once. The last is found by a dry run: the VAE is built from
its config and decodes without memory, while the bytes of all tensors that live at once are counted.

A forward and a decoding are never there together, so the larger of the two is left free. What a text encoder computes
is not counted: for 1,024 tokens of an encoder of 8 billion parameters it is 0.6 GB (MLP, logits, states of all layers),
gone before the first forward, and a decoding of 1024 x 1024 pixels takes more. Neither is what a driver or the
workspace of a convolution takes, which are no tensors.
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ppcl_rt.checkpoint.headers import json_object, tensor_headers
from ppcl_rt.checkpoint.names import CONFIG, WEIGHTS
from ppcl_rt.files import one_line, refusing_briefly
from ppcl_rt.planning.architecture import Tokens
from ppcl_rt.planning.budget import Budget
from ppcl_rt.planning.costs import Bytes
from ppcl_rt.planning.planner import Planner

# The file of a pipeline's folder that lists its parts, and what the weights of a part of transformers are called.
_PARTS = "model_index.json"
_TRANSFORMERS_WEIGHTS = "model.safetensors"
# What diffusers calls the part that decodes.
_VAE = "vae"
_CASTED = frozenset({"F64", "F32", "F16", "BF16"})


class Room(NamedTuple):
    """Memory of a device, and what the rest of a pipeline takes of it; bytes.

    Attributes:
        fit: the memory of the device.
        parts: weights of each other part, by its name in the pipeline.
        activations: what a forward of the transformer holds at once beside its weights, at most.
        decode: what the VAE holds at once beside its weights while it decodes.
        offload: ``"model"`` where one part at a time is on the device, None where all stay there.
    """

    fit: float
    parts: dict[str, int]
    activations: int
    decode: int
    offload: str | None = None

    @property
    def rest(self) -> int:
        """What is there next to the transformer's weights."""
        if self.offload:
            return self.activations
        return sum(self.parts.values()) + max(self.activations, self.decode)

    @property
    def left(self) -> float:
        """For the transformer's weights; below zero where the rest alone is too much."""
        return self.fit - self.rest

    def __str__(self) -> str:
        weights = [f"{name} {_said(taken)}" for name, taken in self.parts.items()]
        if self.offload:
            others = [*weights, f"decode {_said(self.decode)}"] if weights else ["nothing"]
            said = f"activations {_said(self.activations)} (at other times {', '.join(others)})"
        else:
            larger = f"the larger of activations {_said(self.activations)} and decode {_said(self.decode)}"
            said = ", ".join([*weights, larger])
        return f"{_said(self.fit)}: {said}: {_said(self.left)} left for the transformer"

    def _alone(self, part: str) -> int:
        """What a part takes that is on the device by itself."""
        return self.parts[part] + (self.decode if part == _VAE else 0)

    def check(self, least: float) -> None:
        """Refuse a device that is too small.

        Args:
            least: the fewest bytes that the transformer's weights can take.

        Raises:
            ValueError: one line says the least that would do, and whether offload would help.
        """
        alone = {part: self._alone(part) for part in self.parts}
        for part, taken in alone.items() if self.offload else ():
            if taken > self.fit:
                raise ValueError(f"{_said(self.fit)} is too little for the {part} alone: it takes {_said(taken)}")
        if self.left >= least:
            return
        said = f"{_said(self.fit)} is too little: {_said(least)} are the least for the transformer"
        said += f", and the rest takes {_said(self.rest)}: together {_said(self.rest + least)}"
        offloaded = max(self.activations + least, *alone.values(), 0)
        if not self.offload and offloaded <= self.fit:
            said += f'; with offload="model" {_said(offloaded)} would do'
        raise ValueError(said)


def room_of(budget: Budget, family: Any, config: Mapping[str, Any], dtype: torch.dtype, reference: Tokens) -> Room:
    """What the pipeline of a budget with ``fit`` leaves.

    Args:
        budget: its ``shape`` is that of the forward; None for ``reference``.
        family: class of the transformer (`Residency`).
        config: of the transformer.
        dtype: of the transformer; floats of other parts in a folder count in it too, as pipelines load in one.

    Raises:
        ValueError: what the pipeline is cannot be told; one line says what was wanted.
    """
    assert budget.fit is not None, "asked for where there is a fit"
    tokens = budget.shape or reference
    activations = family.activation_bytes(config, tokens, dtype.itemsize)
    own = {family.__name__, family.stock_name}
    pipeline = budget.pipeline
    if pipeline is None:
        return Room(budget.fit, {}, activations, 0, budget.offload)
    with refusing_briefly():
        if isinstance(pipeline, (str, Path)):
            parts, vae = _of_folder(Path(pipeline), own, dtype)
            offload: str | None = budget.offload
        else:
            parts, vae = _of_object(pipeline, own)
            offload = budget.offload or ("model" if getattr(pipeline, "_all_hooks", None) else None)
        decode = 0 if vae is None else decode_bytes(vae, family, tokens)
    return Room(budget.fit, parts, activations, decode, offload)


def fitted(budget: Budget, room: Room, planner: Planner, weights: Bytes) -> Budget:
    """The budget with what is left as its ``memory``, in place of ``fit``.

    Raises:
        ValueError: no plan is that small (`Room.check`).
    """
    room.check(planner.least(weights))
    memory = min(room.left, math.inf if budget.memory is None else budget.memory)
    return budget.model_copy(update={"memory": memory, "fit": None, "pipeline": None, "offload": None})


class Vae(NamedTuple):
    """What a dry run of a VAE needs: its class, config and dtype, and settings of tiling and slicing."""

    kind: Any
    config: Mapping[str, Any]
    dtype: torch.dtype
    settings: Mapping[str, Any]


def decode_bytes(vae: Vae, family: Any, tokens: Tokens) -> int:
    """Bytes that a VAE holds at once beside its weights while it decodes, output included.

    Raises:
        ValueError: the class cannot be built from the config, or decodes something else.
    """
    try:
        with torch.device("meta"):
            model = vae.kind.from_config(dict(vae.config)).eval()
        vars(model).update(vae.settings)
        shape = family.latents_of(model.config, tokens)
        sizes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        # Fake tensors on a CPU rather than on meta: attention then takes no scores, as on real devices.
        with torch.no_grad(), FakeTensorMode():
            weights = {name: torch.empty(size, dtype=vae.dtype) for name, size in sizes.items()}
            model.load_state_dict(weights, assign=True)
            latents = torch.empty(shape, dtype=vae.dtype)
            with LiveBytes(workspaces=True) as live:
                model.decode(latents, return_dict=False)
    except Exception as error:
        # Whatever a class of another package trips over.
        raise ValueError(f"what the {vae.kind.__name__} takes cannot be told: {one_line(error)}") from None
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside a ``with`` and live at once.

    Attributes:
        now, peak: bytes that live now, and the most that did.
        workspaces: whether a convolution counts a copy of what it reads and of what it writes while it runs. Libraries
            bring both into a layout of their own.
    """

    def __init__(self, workspaces: bool = False) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.workspaces = workspaces
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it made."""
        # What came from outside is not counted, nor are views of it.
        self._see((args, kwargs), counted=False)
        made = func(*args, **(kwargs or {}))
        self._see(made, counted=True)
        if self.workspaces and func is torch.ops.aten.convolution.default:
            self.peak = max(self.peak, self.now + args[0].nbytes + made.nbytes)
        return made

    def _see(self, values: Any, counted: bool) -> None:
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if (key := storage._cdata) not in self._known:
                    self._known.add(key)
                    size = storage.nbytes() if counted else 0
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _of_folder(folder: Path, own: set[str], dtype: torch.dtype) -> tuple[dict[str, int], Vae | None]:
    """Bytes of the weights of each part but the transformer, and the VAE if there is one."""
    if not (folder / _PARTS).is_file():
        raise ValueError(f"pipeline={folder}: wanted a local folder with a {_PARTS}, or a pipeline; fetch it first")
    found: dict[str, int] = {}
    vae = None
    for name, part in json_object(folder / _PARTS).items():
        if name.startswith("_") or not (isinstance(part, list) and len(part) == 2 and all(part)) or part[1] in own:
            continue
        if Path(name).name != name:
            raise ValueError(f"{folder / _PARTS} points outside its folder, to {name}: do not use this pipeline")
        # Tokenizers and schedulers have no config under this name, and no weights.
        if not (folder / name / CONFIG).is_file():
            continue
        of_diffusers = any((folder / name / f"{WEIGHTS}{end}").is_file() for end in ("", ".index.json"))
        headers = tensor_headers(folder / name, WEIGHTS if of_diffusers else _TRANSFORMERS_WEIGHTS)
        found[name] = sum(math.prod(h.shape) * _itemsize(h.dtype, dtype) for h in headers.values())
        if name == _VAE:
            vae = Vae(_diffusers_class(part[1]), json_object(folder / name / CONFIG), dtype, {})
    return found, vae


def _of_object(pipeline: Any, own: set[str]) -> tuple[dict[str, int], Vae | None]:
    """As `_of_folder`, of a pipeline that is loaded, as it is."""
    components = getattr(pipeline, "components", None)
    if not isinstance(components, Mapping):
        raise ValueError(f"pipeline is a folder or a pipeline of diffusers, not a {type(pipeline).__name__}")
    if getattr(pipeline, "hf_device_map", None):
        raise ValueError("this pipeline is spread over several devices: fit is about one, use memory")
    found: dict[str, int] = {}
    vae = None
    for name, part in components.items():
        if not isinstance(part, torch.nn.Module) or type(part).__name__ in own:
            continue
        tensors = {id(tensor): tensor for tensor in (*part.parameters(), *part.buffers())}
        found[name] = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if name == _VAE:
            settings = {key: value for key, value in vars(part).items() if key.startswith(("use_", "tile_"))}
            config: Any = part.config
            vae = Vae(type(part), config, next(part.parameters()).dtype, settings)
    return found, vae


def _diffusers_class(name: str) -> Any:
    import diffusers

    kind = getattr(diffusers, name, None)
    if not hasattr(kind, "from_config"):
        raise ValueError(f"the VAE is a {name}, which diffusers has not: give the pipeline itself, not its folder")
    return kind


def _itemsize(stored: str, dtype: torch.dtype) -> int:
    """Bytes of a number that a file calls ``BF16`` or ``I64``, once it is loaded in a dtype."""
    if stored in _CASTED:
        return dtype.itemsize
    bits = re.search(r"\d+", stored)
    return math.ceil(int(bits[0]) / 8) if bits else 1


def _said(size: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if abs(size) >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 1e3:.3g} kB"
