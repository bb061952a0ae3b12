"""What each stage holds and computes, as arithmetic on `Sizes`.

One function a stage, in the order of the stages. Bytes are those of one process when it holds most; what a stage holds
at different moments is not added. A process has one device: on a CPU, device and host are one memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from ppcl_train.config.stages import EndToEndConfig, LoopConfig
from ppcl_train.engine import saving
from ppcl_train.preflight.sizes import Sizes

# Bytes of a parameter in training: its float32 value and its gradient.
_VALUE, _GRADIENT = 4, 4


@dataclass(frozen=True)
class Needs:
    """What a stage takes.

    Attributes:
        device: bytes on each device at once, by what they are.
        flops: floating-point operations over all processes.
        shared: whether all processes do the work; else the first does it, and the rest wait.
        host: bytes in the memory of the host for each process, besides what is on the device.
        file: bytes of what is put together in the host's memory at a time, for each process, to be written.
        kept: bytes that are still there then; activations and gradients are gone.
        leaves: bytes on disk that the stage leaves.
        during: bytes on disk that it takes besides while it runs.
    """

    device: dict[str, float]
    flops: float
    shared: bool = True
    host: dict[str, float] = field(default_factory=dict)
    file: float = 0.0
    kept: float = 0.0
    leaves: float = 0.0
    during: float = 0.0

    @property
    def peak(self) -> float:
        """Bytes on each device at once."""
        return sum(self.device.values())

    @property
    def of_one_memory(self) -> float:
        """Bytes at once where device and host are one memory: on a CPU."""
        return max(self.peak + sum(self.host.values()), self.kept + self.file)

    @property
    def on_host(self) -> float:
        """Bytes in the memory of the host for each process, where there are devices."""
        return max(sum(self.host.values()), self.file)


def _moments(config: LoopConfig) -> int:
    """Bytes of Adam's two moments, and of a moving average, for a parameter."""
    return (2 if config.eight_bit else 8) + (4 if config.ema else 0)


def _part(state: float) -> float:
    """Bytes of the part of a state that is in memory once more while it is written."""
    return min(state, saving.FILE_BYTES)


def _teacher(sizes: Sizes, shards: int = 1) -> float:
    """Bytes of the teacher's weights; spread over processes, a block is whole while it runs, and the next one comes."""
    whole = sizes.params * sizes.itemsize
    if shards == 1:
        return whole
    return whole / shards + 2 * sizes.block_params(sizes.largest_block) * sizes.itemsize


def _samples_at_once(sizes: Sizes) -> int:
    """Samples in a call of the teacher where losses are measured: with a guidance, half of them under each prompt."""
    run = sizes.run
    return max(2, run.batch // 2 * 2) if run.sampler.guidance != 1 else run.batch


def _calls_a_sample(sizes: Sizes) -> int:
    return 2 if sizes.run.sampler.guidance != 1 else 1


def stored_numbers(sizes: Sizes) -> float:
    """The most numbers that are stored next to the teacher for its own blocks and for text runs."""
    return sum(map(sizes.stored, range(sizes.architecture.depth))) + sizes.stored_maps()


def teacher(sizes: Sizes, processes: int) -> Needs:
    """The stage *teacher*: a pretrained one is only hashed; else it is trained from nothing, by the first process."""
    run = sizes.run
    if run.teacher.pretrained is not None:
        return Needs({}, 0.0, shared=False, host={"a part of a file": 1 << 24})
    config = run.teacher
    held = sizes.params * (_VALUE + _GRADIENT + 8 + (4 if config.ema else 0))
    activations = sizes.architecture.depth * sizes.backward(config.batch, "no")
    flops = 3 * sizes.flops * config.batch * config.steps
    return Needs(
        {"weights, gradients, moments": held, "activations": activations}, flops, shared=False, leaves=4 * sizes.params
    )


def width(sizes: Sizes, processes: int) -> Needs:
    """The stage *width*: statistics of some blocks at a time, then their closed forms, then text runs."""
    run = sizes.run
    if run.width.is_empty:
        return Needs({}, 0.0)
    depth = sizes.architecture.depth
    at_once = min(run.width.blocks_at_once, depth)
    statistics = at_once * max(map(sizes.statistics, range(depth)))
    dim = sizes.architecture.dim
    later = max(sizes.text_maps()) // 2
    # One first block at a time: Gram matrices, and products with what later blocks read and with how the text moves.
    text_runs = 2 * 8 * ((dim + 1) ** 2 + later * dim * (dim + 1))
    samples = run.width.samples
    # A pass goes on where the one before ended (`data.passes`); blocks run once more without their MLPs for the maps.
    # Processes begin at the first block, each for its own blocks.
    runs = 1 + run.width.maps + 0.5 * (processes - 1)
    flops = samples * sizes.flops * runs + sum(map(sizes.closed_form_flops, range(depth)))
    kept = min(run.width.kept_bytes * processes, 2 * samples * sizes.streams(1) * processes)
    device = {
        "teacher": _teacher(sizes),
        "statistics of blocks": max(statistics, text_runs),
        "activations": sizes.forward(run.batch) + 2 * sizes.streams(run.batch),
        "closed forms of a block": sizes.closed_form(),
    }
    return Needs(device, flops, leaves=4 * stored_numbers(sizes), during=kept)


def select(sizes: Sizes, processes: int) -> Needs:
    """The stage *select*: losses of the closed forms, then a short training of every candidate."""
    run, table = sizes.run, sizes.run.table
    depth, block = sizes.architecture.depth, sizes.block_params(sizes.largest_block)
    base = {"teacher": _teacher(sizes)}
    if run.select == "table" and table.most_students == 0:
        return Needs({}, 0.0)
    if run.select != "table":
        probes, dim = run.probes, sizes.architecture.dim
        at_once = min(probes.at_once, depth)
        # One after the other: Gram matrices, training, and the states that CKA compares with all probes.
        held = max(
            {"statistics of probes": 2 * at_once * 3 * 8 * (dim + 1) ** 2},
            {"probes": 2 * at_once * dim**2 * (_VALUE + _GRADIENT + 8)},
            {"states for CKA": 2 * depth * probes.cka_tokens * dim * 4, "probes": 2 * depth * dim**2 * _VALUE},
            key=lambda held: sum(held.values()),
        )
        passes = math.ceil(depth / at_once) * (probes.samples + probes.batch * probes.steps) + probes.cka_samples
        rows = 4 * sizes.streams(max(probes.batch, run.batch)) * 4 // sizes.itemsize
        activations = sizes.forward(max(probes.batch, run.batch)) + rows
        kept = 2 * 2 * depth * dim**2 * _VALUE
        return Needs({**base, **held, "activations": activations}, sizes.flops * passes, shared=False, leaves=kept)
    measuring = _measuring(sizes)
    trial: dict[str, float] = {
        # The best so far, and another.
        "students": min(2, len(table.starts)) * block * (_VALUE + 8) + block * _GRADIENT,
        "activations": max(sizes.backward(table.batch, "no"), sizes.forward(_samples_at_once(sizes))),
        "streams": table.batches * 2 * sizes.streams(table.batch),
    }
    candidates = sum(max(0, depth - length + 1) for length in table.lengths)
    starts = len(table.starts)
    steps = starts * table.trial_steps + table.steps - table.trial_steps
    one = sizes.block_flops() * table.batch * 3 * steps
    measured = 0.5 * sizes.flops * _calls_a_sample(sizes) * (table.samples + starts * min(table.samples, run.batch))
    device = measuring.device if measuring.peak > sum(trial.values()) + _teacher(sizes) else {**base, **trial}
    return Needs(device, measuring.flops + candidates * (one + measured), host=measuring.host)


def students(sizes: Sizes, processes: int) -> Needs:
    """The stage *students*: those of one group at a time, with their moments; gradients of one of them."""
    if not sizes.most_students:
        return Needs({}, 0.0)
    config = sizes.run.students
    block = sizes.block_params(sizes.largest_block)
    at_once = min(config.at_once, sizes.most_students)
    mine = math.ceil(at_once / processes) if config.parallel == "intervals" else at_once
    groups = math.ceil(sizes.most_students / at_once)
    batch = config.batch if config.parallel == "intervals" else math.ceil(config.batch / processes)
    gradients = mine if config.accumulate > 1 else 1
    device = {
        "teacher": _teacher(sizes, processes if config.shard_teacher else 1),
        "students and moments": mine * block * (_VALUE + _moments(config)),
        "gradients": gradients * block * _GRADIENT,
        "activations": sizes.backward(batch, config.precision) + sizes.streams(batch) * 4,
    }
    state = device["students and moments"]
    kept = device["teacher"] + state
    samples = config.batch * config.steps * config.accumulate
    trained = 3 * sizes.block_flops() * sizes.most_students * samples
    flops = groups * samples * sizes.flops * (processes if config.parallel == "intervals" else 1) + trained
    saved = at_once * block * (_VALUE + _moments(config))
    leaves = sizes.most_students * block * 4
    before = (sizes.most_students - at_once) * block * 4
    # A state and the next of the last group, and the students of the groups before; or all students once more.
    during = max(2 * saved + before, leaves)
    host: dict[str, float] = {"students of the groups before": before}
    return Needs(device, flops, host=host, file=_part(state), kept=kept + before, leaves=leaves, during=during)


def compress(sizes: Sizes, processes: int) -> Needs:
    """The stage *compress*: closed forms of students."""
    run, count = sizes.run, sizes.most_students
    if not count:
        return Needs({}, 0.0, shared=False)
    block = sizes.block_params(sizes.largest_block)
    device = {
        "teacher": _teacher(sizes),
        "students": count * block * sizes.itemsize + block * 4,
        "statistics of blocks": min(run.width.blocks_at_once, count) * sizes.statistics(sizes.largest_block),
        "activations": sizes.forward(run.batch) + 2 * sizes.streams(run.batch),
        "closed forms of a block": sizes.closed_form(),
    }
    flops = run.width.samples * sizes.flops + count * sizes.closed_form_flops(sizes.largest_block)
    return Needs(device, flops, leaves=4 * count * (sizes.stored(sizes.largest_block) + block))


def _recovery(sizes: Sizes, processes: int, config: EndToEndConfig) -> Needs:
    shards = processes if config.shard else 1
    numbers = trained_numbers(sizes) + (sizes.params if config.kept_steps else 0)
    batch = math.ceil(config.batch / processes)
    saved = sizes.architecture.depth * sizes.streams(batch)
    per_block = sizes.backward(batch, config.precision)
    activations = saved + per_block if config.checkpointing else sizes.architecture.depth * per_block
    device = {
        "teacher": _teacher(sizes, shards) * (2 if config.kept_steps else 1),
        "bases of students": _bases(sizes) / shards,
        "what is trained": numbers * (_VALUE + _GRADIENT + _moments(config)) / shards,
        "weights made of factors": _composed(sizes, config.checkpointing),
        "activations": activations,
    }
    # The teacher, the plan forward and backward, and once more forward where activations are computed again.
    flops = config.batch * config.accumulate * config.all_steps * sizes.flops * (1 + 3 + config.checkpointing)
    measuring = _measuring(sizes)
    state = numbers * (_VALUE + _moments(config))
    return Needs(
        device,
        flops + measuring.flops,
        host=measuring.host,
        file=_part(state / shards),
        kept=device["teacher"] + device["bases of students"] + state / shards,
        leaves=4 * numbers,
        during=2 * state,
    )


def _composed(sizes: Sizes, checkpointing: bool) -> float:
    """The most bytes of weights that are made of factors in the forward pass and kept for the backward pass."""
    if not sizes.run.compress.share:
        return 0
    depth, count = sizes.architecture.depth, sizes.most_students
    student = sizes.block_params(sizes.largest_block) * sizes.itemsize if count else 0
    own = sizes.composed(sizes.largest_block)
    # A student runs in the place of two blocks or more.
    return max(student, own) if checkpointing else count * student + (depth - 2 * count) * own


def _bases(sizes: Sizes) -> float:
    """Bytes of the frozen weights that students are differences to, each next to its factors."""
    one = sizes.block_params(sizes.largest_block) * sizes.itemsize
    return sizes.most_students * one if sizes.run.compress.share else 0


def trained_numbers(sizes: Sizes) -> float:
    """The most numbers that recovery trains: everything that is stored next to the teacher."""
    block = sizes.block_params(sizes.largest_block)
    student = sizes.stored(sizes.largest_block) + sizes.student_numbers(block)
    return stored_numbers(sizes) + sizes.most_students * student


def recover(sizes: Sizes, processes: int) -> Needs:
    """The stage *recover*."""
    if not sizes.run.recover.all_steps:
        return Needs({}, 0.0)
    return _recovery(sizes, processes, sizes.run.recover)


def refine(sizes: Sizes, processes: int) -> Needs:
    """The stage *refine*."""
    if not sizes.run.refine.all_steps:
        return Needs({}, 0.0)
    return _recovery(sizes, processes, sizes.run.refine)


def _measuring(sizes: Sizes) -> Needs:
    """Losses of all choices, each alone: the blocks after the choice, for every sample."""
    run = sizes.run
    choices = sizes.choices
    samples = run.measure.samples * _calls_a_sample(sizes)
    device = {
        "teacher": _teacher(sizes),
        "layers": sizes.itemsize * trained_numbers(sizes) + _bases(sizes),
        "activations": sizes.forward(_samples_at_once(sizes)) + 2 * sizes.streams(_samples_at_once(sizes)),
    }
    host: dict[str, float] = {"streams of the samples": sizes.streams(samples)}
    return Needs(device, 0.5 * choices * samples * sizes.flops, host=host)


def measure(sizes: Sizes, processes: int) -> Needs:
    """The stage *measure*."""
    return _measuring(sizes)


def pack(sizes: Sizes, processes: int) -> Needs:
    """The stage *pack*: plans as a whole, then one file of the checkpoint at a time."""
    run, measuring = sizes.run, _measuring(sizes)
    plans = run.measure.candidates * (1 / run.measure.spacing + 2 / run.measure.other_spacing)
    flops = plans * run.measure.samples * _calls_a_sample(sizes) * sizes.flops * 0.6
    leaves = sizes.storage * (sizes.params + trained_numbers(sizes))
    # A file at a time, as tensors and as bytes; the model is gone by then.
    return Needs(measuring.device, flops, host=measuring.host, file=2 * min(10e9, leaves), leaves=leaves)


# By the name of the stage, in order.
STAGES: dict[str, Callable[[Sizes, int], Needs]] = {
    "teacher": teacher,
    "width": width,
    "select": select,
    "students": students,
    "compress": compress,
    "recover": recover,
    "refine": refine,
    "measure": measure,
    "pack": pack,
}
