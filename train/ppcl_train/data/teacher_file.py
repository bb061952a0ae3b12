"""The teacher of a run: where its weights lie, whether they are the right ones, and loading them.

A teacher that the run trained lies in ``teacher.safetensors`` of the run folder. A pretrained teacher is read where it
lies; ``teacher.safetensors`` is then a note without tensors, which names the teacher's files with their sizes, dates
and SHA-256, so that a run resumes with the teacher that it began with or not at all.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch

import ppcl_rt
from ppcl_rt import Catalog, Checkpoint
from ppcl_rt.checkpoint.converted import Stored
from ppcl_rt.checkpoint.places import locate_transformer
from ppcl_rt.families import registry
from ppcl_rt.ops.quantised import QuantisedLinear
from ppcl_rt.planning.quantisation import Quantisation
from ppcl_train.config.settings import RunConfig
from ppcl_train.engine.distributed import join
from ppcl_train.engine.files import read_note, read_tensors, stored_in, write_tensors
from ppcl_train.engine.log import Log

TEACHER_FILE = "teacher.safetensors"


def check_teacher(run: RunConfig, file: Path) -> None:
    """Compare a teacher file with the network that a config asks for.

    Raises:
        ValueError: there is no such file, its tensors are not those of the network, or the config has a pretrained
            teacher.
    """
    _check_not_pretrained(run)
    if not file.is_file():
        raise ValueError(f"there is no teacher at {file}")
    if _shapes(run) != {name: tensor.shape for name, tensor in read_tensors(file).items()}:
        raise ValueError(f"{file} holds other tensors than the teacher of this config has")


def _check_not_pretrained(run: RunConfig) -> None:
    if run.teacher.pretrained is not None:
        raise ValueError(
            f"the config's teacher is {run.teacher.pretrained}: leave out --teacher; "
            "teacher.pretrained takes a folder, null stands for none"
        )


def _shapes(run: RunConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = run.family.build(run.teacher.architecture)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def extract_teacher(run: RunConfig, checkpoint: Path, file: Path) -> None:
    """Write the teacher of a checkpoint folder, its stock tensors in float32, as a teacher file.

    The catalog is not read, so a teacher can be extracted from a checkpoint of an older format too. Where kept blocks
    were trained, the teacher file holds what ratio 1 runs, not the teacher that the checkpoint was made from.

    Raises:
        ValueError: the folder does not hold all tensors of the network that the config asks for.
    """
    _check_not_pretrained(run)
    stored: dict[str, torch.Tensor] = {}
    for shard in sorted(checkpoint.glob("*.safetensors")):
        stored |= read_tensors(shard)
    missing = _shapes(run).keys() - stored
    if missing:
        raise ValueError(f"{checkpoint} is no checkpoint of this config's teacher: it lacks {min(missing)}")
    write_tensors(file, {name: stored[name].float() for name in _shapes(run)}, {"checkpoint": checkpoint.name})


def load_teacher(run: RunConfig, folder: Path) -> Any:
    """Load the teacher, rounded to what the checkpoint will store, in the dtype that the teacher computes in.

    These are the exact weights, whatever ``teacher.quantize`` says; `only_read` holds them otherwise. They are read a
    tensor at a time; those of a pretrained teacher to this process's device, or, where they will be held otherwise, to
    the host.

    Raises:
        ValueError: a pretrained teacher is gone, or differs from the one that the run began with.
    """
    storage, compute = (getattr(torch, name) for name in (run.storage, run.teacher.dtype))
    if run.teacher.pretrained is not None:
        source = find_pretrained(run.teacher.pretrained)
        _compare_with_note(source, folder)
        device = "cpu" if run.teacher.held_otherwise else join().device
        model = ppcl_rt.load(source, dtype=storage, device=device)
        return (model if storage == compute else model.to(compute)).requires_grad_(False)
    model = run.family.build(run.teacher.architecture)
    stored = stored_in(folder / TEACHER_FILE)
    for name, parameter in model.named_parameters():
        parameter.data = stored[name].rounded(storage).read().to(compute)
    return model.eval().requires_grad_(False)


def only_read(run: RunConfig, teacher: Any, log: Log) -> Any:
    """Hold a loaded teacher as ``teacher.quantize`` and ``teacher.offload`` say, for a stage that only reads it.

    Returns:
        The same model: on this process's device, or, where it is offloaded, there block by block while each runs.
    """
    config, device = run.teacher, join().device
    if config.quantize != "none":
        _quantise(teacher, Quantisation(format=config.quantize))
    if config.held_otherwise:
        log(teacher_weights=config.quantize, offloaded=config.offload)
    if not config.offload:
        return teacher.to(device)
    teacher.enable_group_offload(device, use_stream=device.type == "cuda")
    return teacher


def _quantise(model: Any, quantisation: Quantisation) -> None:
    """Round the weights of a model's blocks in place, to what ``ppcl_rt.load`` makes of them with ``quantize``."""
    for block in model.blocks():
        for part in filter(quantisation.takes, block.spec.parts):
            layer, held = block.get_submodule(part.path), QuantisedLinear(quantisation.format)
            held.hold(layer.weight)
            held.bias = layer.bias
            block.set_submodule(part.path, held)


class Teacher(NamedTuple):
    """The dense model where it lies: nothing of it is read yet.

    Attributes:
        config: what diffusers' class is built from, as ``config.json`` has it.
        catalog: of the dense model.
        tensors: by name; each is read rounded to what the checkpoint will store.
    """

    config: dict[str, Any]
    catalog: Catalog
    tensors: dict[str, Stored]


def find_teacher(run: RunConfig, folder: Path) -> Teacher:
    """Find the teacher of a run.

    Raises:
        ValueError: as `load_teacher`.
    """
    storage = getattr(torch, run.storage)
    if run.teacher.pretrained is None:
        with torch.device("meta"):
            model = run.family.build(run.teacher.architecture)
        stored = stored_in(folder / TEACHER_FILE)
        config, catalog = model.stock_config, model.catalog
    else:
        place = find_pretrained(run.teacher.pretrained)
        _compare_with_note(place, folder)
        kind = registry.model_class(run.task)
        source = kind.opened(place)
        catalog = kind.dense_catalog(source)
        with torch.device("meta"):
            config = kind.described(source).stock_config
        stored = {name: Stored.in_checkpoint(source, name) for name in source.names}
    return Teacher(config, catalog, {name: each.rounded(storage) for name, each in stored.items()})


def find_pretrained(source: str) -> Path:
    """Find the folder of a stock transformer: ``source`` itself, or that of the pipeline that ``source`` is.

    Raises:
        ValueError: there is none, it is of no family here, or it is a pluggable checkpoint already.
    """
    folder = locate_transformer(source)
    found = Checkpoint(folder)
    model = registry.of_class(found.config.get("_class_name"), folder)
    # A layout that the family alone knows is no stock transformer either.
    if found.catalog is not None or model.opened(folder).catalog is not None:
        raise ValueError(f"{folder} is a pluggable or pruned checkpoint: a teacher is a stock transformer")
    return folder


def note_pretrained(run: RunConfig, folder: Path) -> None:
    """Write ``teacher.safetensors`` for a pretrained teacher: no tensors, and a note of the teacher's files.

    Raises:
        ValueError: as `find_pretrained`, or the teacher is of another family than the task.
    """
    source = run.teacher.pretrained
    assert source is not None, "the stage asks for a pretrained teacher"
    found, log, wanted = find_pretrained(source), Log(folder, "teacher"), registry.model_class(run.task)
    class_name = Checkpoint(found).config.get("_class_name")
    if registry.of_class(class_name, found) is not wanted:
        raise ValueError(f"{source} is a {class_name}, the task {run.task} trains a {wanted.stock_name}")
    files = {}
    for path in _files(found):
        files[path.name] = [*_size_and_date(path), _sha256(path)]
        log(read=path.name, gigabytes=path.stat().st_size / 1e9)
    write_tensors(folder / TEACHER_FILE, {}, {"pretrained": source, "files": files})


def _compare_with_note(source: Path, folder: Path) -> None:
    """Compare a pretrained teacher with the note of the run; files are hashed only where the size or date differs."""
    noted, found = read_note(folder / TEACHER_FILE)["files"], _files(source)
    same = noted.keys() == {path.name for path in found} and all(
        noted[path.name][:2] == _size_and_date(path) or noted[path.name][2] == _sha256(path) for path in found
    )
    if not same:
        raise ValueError(f"{source} is not the teacher that {folder} began with: bring it back, or begin a new run")


def _size_and_date(path: Path) -> list[int]:
    return [path.stat().st_size, path.stat().st_mtime_ns]


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            total.update(part)
    return total.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name == "config.json" or path.suffix == ".safetensors")
