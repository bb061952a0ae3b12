"""Methods that leave out whole blocks, or put one student in place of several."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ppcl_rt
from ppcl_rt import Catalog, Interval, Plan
from ppcl_train import pipeline
from ppcl_train.compare.entry import Entry, UnreachableError
from ppcl_train.compare.training import calibration_loss, prediction_loss, train, train_end_to_end
from ppcl_train.config.settings import RunConfig
from ppcl_train.data import calibration, streams
from ppcl_train.engine.files import read_content, read_tensors, write_json
from ppcl_train.engine.log import Log
from ppcl_train.losses.matching import matching_loss
from ppcl_train.selectors import selection
from ppcl_train.selectors.gates import learn_gates
from ppcl_train.selectors.greedy import removal_order
from ppcl_train.selectors.selection import Selected
from ppcl_train.selectors.uniform import uniform_intervals

# Weights of students by parameter name, by interval.
StudentWeights = Mapping[Interval, Mapping[str, torch.Tensor]]


def _end_steps(entry: Entry) -> int:
    """Count the steps of the end-to-end stage, for methods with two stages."""
    return entry.run.compare.steps - entry.run.compare.distil_steps


def _plan(model: Any, kept: Collection[int]) -> Plan:
    """Make the plan that runs these blocks at full width."""
    catalog: Catalog = model.catalog
    return catalog.compose((block, catalog.spec(block).full) for block in sorted(kept))


def _keep(model: Any, kept: Collection[int]) -> Any:
    """Leave out all other blocks for good."""
    model.set_plan(_plan(model, kept))
    model.trim()
    return model


def _put_in(model: Any, students: Mapping[Interval, nn.Module]) -> Any:
    """Put each student where the first block of its interval was, and leave out the other blocks of the interval."""
    left_out: set[int] = set()
    for interval, student in students.items():
        path, number = model.catalog.architecture.place(interval.first)
        model.get_submodule(path)[number] = student
        left_out |= set(interval) - {interval.first}
    return _keep(model, [n for n in range(model.catalog.architecture.depth) if n not in left_out])


# Blocks that are left out.


def drop(entry: Entry) -> Any:
    """Leave out blocks, one after the other, each time the block that is missed least; train nothing."""
    model = entry.teacher()
    architecture = model.catalog.architecture
    dropped = _removal_order(entry)[: architecture.depth - entry.whole_blocks(architecture)]
    return _keep(model, [n for n in range(architecture.depth) if n not in dropped])


def _removal_order(entry: Entry) -> list[int]:
    """Order blocks by greedy removal; measured once a seed."""
    file = entry.shared / "dropped.json"
    if not file.exists():
        model, teacher = entry.teacher(), entry.teacher()

        def loss(kept: Collection[int]) -> float:
            with model.at(plan=_plan(model, kept)):
                return calibration_loss(entry, model, teacher)

        write_json(file, {"order": removal_order(model.catalog.architecture.depth, loss)})
    order: list[int] = read_content(file)["order"]
    return order


def drop_and_train(entry: Entry) -> Any:
    """Leave out the same blocks as `drop`, then train the others end to end for all steps."""
    return train_end_to_end(entry, drop(entry), entry.run.compare.steps)


def gates(entry: Entry) -> Any:
    """Learn which blocks to keep (TinyFusion, arXiv 2412.01199), then train these end to end."""
    model = entry.teacher()
    kept = learnt_blocks(entry, model, entry.whole_blocks(model.catalog.architecture))
    Log(entry.folder, "gates")(kept=" ".join(map(str, kept)))
    return train_end_to_end(entry, _keep(model, kept), _end_steps(entry))


def learnt_blocks(entry: Entry, model: Any, kept: int) -> list[int]:
    """Learn which blocks of a model to keep, on batches of the entry; adapters are merged into the model."""
    teacher = entry.teacher()

    def loss(number: int) -> torch.Tensor:
        return prediction_loss(entry, model, teacher, calibration.STUDENTS + number)

    def train_gates(
        parameters: Mapping[str, nn.Parameter],
        step_loss: Callable[[int], float],
        optimisers: Sequence[torch.optim.Optimizer],
    ) -> None:
        train(entry, "gates", parameters, step_loss, entry.run.compare.distil_steps, optimisers)

    return learn_gates(entry.run, model, kept, loss, train_gates)


# Students in place of several blocks.


def _distilled(folder: Path, run: RunConfig) -> StudentWeights:
    """Read the students of a run folder; what is missing is selected and distilled first."""
    pipeline.run_stages(run, folder, last="students")
    weights: dict[Interval, dict[str, torch.Tensor]] = {}
    for name, tensor in read_tensors(folder / "students.safetensors").items():
        _, key, parameter = name.split(".", 2)
        weights.setdefault(Interval.of_key(key), {})[parameter] = tensor
    return weights


def _with_students(model: Any, weights: StudentWeights) -> Any:
    """Put in students, by their weights."""
    students = {}
    for interval, tensors in weights.items():
        students[interval] = selection.new_student(model.blocks(), Selected(interval, "first"))
        students[interval].load_state_dict(tensors)
    return _put_in(model, students)


def _begin_as_published(entry: Entry, folder: Path, steps: int, select: str = "eq5") -> RunConfig:
    """Begin a run folder whose students are distilled as PPCL is published: by eq. 6 alone."""
    batch = entry.run.compare.batch
    # Depth alone: there is nothing narrower to solve for.
    whole = {"width__heads": (), "width__channels": (), "width__maps": False, "width__ranks": ()}
    return entry.begin(
        folder,
        select=select,
        students__steps=steps,
        students__batch=batch,
        probes__batch=batch,
        width__longest_text_run=1,
        **whole,
    )


def _student_steps(entry: Entry) -> int:
    """Count the steps for students: those before the end-to-end stage, less those of the probes.

    Raises:
        ValueError: none is left.
    """
    left = entry.run.compare.distil_steps - entry.run.probes.steps
    if left < 1:
        raise ValueError(
            f"probes.steps={entry.run.probes.steps} leaves no step of the {entry.run.compare.distil_steps} before the "
            "end-to-end stage: raise compare.steps"
        )
    return left


def uniform(entry: Entry) -> Any:
    """Give each of equal intervals a student, distilled as those of `eq5`; then train end to end."""
    model = entry.teacher()
    architecture = model.catalog.architecture
    folder = entry.folder / "students"
    run = _begin_as_published(entry, folder, entry.run.compare.distil_steps)
    intervals = [i for i in uniform_intervals(architecture.depth, entry.whole_blocks(architecture)) if len(i) > 1]
    selection.write(folder, [Selected(interval, "first") for interval in intervals])
    return train_end_to_end(entry, _with_students(model, _distilled(folder, run)), _end_steps(entry))


def _eq5_students(entry: Entry, select: str = "eq5") -> StudentWeights:
    """Choose among the intervals of eq. 5 as many as the ratio needs; returns their students' weights.

    Each student is measured alone; those whose losses sum to the least are chosen. The students are distilled once a
    seed.

    Raises:
        UnreachableError: with all of them, too many blocks are left.
    """
    folder = entry.shared / select
    weights = _distilled(folder, _begin_as_published(entry, folder, _student_steps(entry), select))
    teacher = entry.teacher()
    losses = {
        interval: calibration_loss(entry, _with_students(entry.teacher(), {interval: tensors}), teacher)
        for interval, tensors in weights.items()
    }
    depth, most = teacher.catalog.architecture.depth, entry.whole_blocks(teacher.catalog.architecture)
    possible = [
        intervals
        for count in range(len(weights) + 1)
        for intervals in itertools.combinations(weights, count)
        if depth - sum(len(interval) - 1 for interval in intervals) <= most
    ]
    if not possible:
        raise UnreachableError(f"eq. 5 found {', '.join(map(str, sorted(weights)))}: more than {most} blocks are left")
    best = min(possible, key=lambda intervals: sum(losses[interval] for interval in intervals))
    return {interval: weights[interval] for interval in best}


def eq5(entry: Entry) -> Any:
    """Compress as PPCL is published (probes, eq. 5, eq. 6), then train end to end."""
    return train_end_to_end(entry, _with_students(entry.teacher(), _eq5_students(entry)), _end_steps(entry))


def eq5_literal(entry: Entry) -> Any:
    """Compress as `eq5` does, with the intervals that eq. 5 has as it is printed: no block is left single."""
    students = _eq5_students(entry, "eq5-literal")
    return train_end_to_end(entry, _with_students(entry.teacher(), students), _end_steps(entry))


def sequential(entry: Entry) -> Any:
    """Distil students for the intervals of `eq5` on what the students before them put out; then train end to end."""
    model, teacher = entry.teacher(), entry.teacher()
    students = {
        interval: selection.new_student(teacher.blocks(), Selected(interval, "first"))
        for interval in sorted(_eq5_students(entry))
    }
    starting = {interval.first: interval for interval in students}
    replaced = {n for interval in students for n in interval}

    def step_loss(number: int) -> float:
        batch = entry.inputs(calibration.STUDENTS + number, teacher)
        trace = streams.trace(teacher, batch)
        state, total = trace.streams[0], 0.0
        for n in range(len(trace.streams) - 1):
            if n in starting:
                interval = starting[n]
                out = streams.run_block(students[interval], state, trace.context)
                loss = matching_loss(out, trace.streams[interval.last + 1], batch.mask, magnitude=0.0)
                loss.backward()
                total += loss.item() / len(students)
                # No gradient flows into the students before: each answers for its own interval.
                state = ppcl_rt.Streams(out.image.detach(), out.text.detach())
            elif n not in replaced:
                with torch.no_grad():
                    state = streams.run_block(teacher.blocks()[n], state, trace.context)
        return total

    parameters = {f"{i.key}.{name}": p for i, student in students.items() for name, p in student.named_parameters()}
    train(entry, "sequential", parameters, step_loss, _student_steps(entry), lr=entry.run.students.lr)
    return train_end_to_end(entry, _put_in(model, students), _end_steps(entry))
