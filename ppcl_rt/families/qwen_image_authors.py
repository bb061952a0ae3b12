"""The layout in which the authors of the method publish pruned Qwen-Image models, read and written.

A packaged folder is a diffusers folder under the name of the stock class, of the blocks that remain, numbered anew.
Beside ``attn.*``, which is always complete, a block of width D holds

    full                        stock tensors
    full, with maps             ``img_mod.1`` and ``txt_mod.1`` cut to ``[3 D, D]``; ``img_ffn_proj`` and
                                ``txt_ffn_proj`` in place of both MLPs
    text not updated            ``img_mod``, ``img_mlp``, ``txt_proj``; no ``txt_mod``, no ``txt_mlp``
    text not updated, with map  ``img_ffn_proj`` and the cut ``img_mod.1``
    any                         perhaps ``ehs_proj``, which a full block passes over

With z the normalised, modulated text input of the last full block, a block that does not update the text reads
``z + txt_proj(z)`` (in the older dialect ``txt_proj(z)``), and ends with ``text += ehs_proj(text)``. A map in place of
an MLP is ``x += img_ffn_proj(x)``: no norm, no modulation, no gate.

Here that is a plan: text runs from a full block to the last block before the next full one. Nobody reads the text in
between, so all ``ehs_proj`` of a run are one linear map after it, and none where nobody reads the text after it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch

from ppcl_rt.checkpoint.converted import ConvertedCheckpoint, Stored
from ppcl_rt.checkpoint.reader import Checkpoint
from ppcl_rt.model.folder import CheckpointFolder
from ppcl_rt.model.opening import Opening
from ppcl_rt.model.program import BlockCall
from ppcl_rt.model.tensors import held_at, restore
from ppcl_rt.planning.block_spec import ALL_UPDATED, TEXT_NOT_UPDATED, BlockSpec
from ppcl_rt.planning.catalog import Catalog
from ppcl_rt.planning.interval import Interval
from ppcl_rt.planning.plan import OnePlan, Plan, PlannedBlock
from ppcl_rt.planning.width import LINEAR_MAP, Width

Dialect = Literal["newer", "older"]
Exits = Literal["published", "intended"]
# Lists of blocks in config.json: those that do not update the text, those with maps, those with an `ehs_proj`. The
# older dialect has the first alone.
KEYS = ("single_stream_index", "ffn_proj_index", "ehs_proj_index")
# The five lists of a training file.
STUDENTS, TEXT_INPUTS, MAPS, EXITS, UNUSED = LISTS = (
    "transformer_distill_blocks",
    "attn_proj_list",
    "ffn_proj_list",
    "ehs_proj_list",
    "block_proj_list",
)

_BLOCKS = "transformer_blocks"
_NAME = re.compile(rf"{_BLOCKS}\.(0|[1-9]\d{{0,5}})\.(.+)")
_NORMS = tuple(f"attn.{norm}.weight" for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"))
_TEXT_INPUT, _EXIT, _MAP = "txt_proj", "ehs_proj", {"image": "img_ffn_proj", "text": "txt_ffn_proj"}
_OWN = (_TEXT_INPUT, _EXIT, *_MAP.values())
# How far a mean diagonal may be from 0 (a map that adds to what it reads) or 1 (one that stands for it).
_NEAR = 0.25


class Affine(NamedTuple):
    """A layer ``[D, D]``; without a bias it has one of zeros."""

    weight: Stored
    bias: Stored | None

    def read_bias(self) -> torch.Tensor:
        """The bias ``[D]``."""
        return torch.zeros_like(self.weight.read()[:, 0]) if self.bias is None else self.bias.read()

    def under(self, path: str) -> Iterator[tuple[str, Stored]]:
        """Weight and bias, by the names of a layer's tensors."""
        yield f"{path}.weight", self.weight
        yield f"{path}.bias", self.bias or Stored(self.weight.shape[:1], self.read_bias)


class Remaining(NamedTuple):
    """A block that remains.

    Attributes:
        interval: the blocks of the model that is read that it stands for.
        student: whether it is a student.
        stock: tensors under the names that they have in a stock block.
        text_input: what it reads in place of the text; None for a full block.
        maps: stream -> linear map in place of its MLP.
        exit: what the text goes on with after it, None for the text as it is.
    """

    interval: Interval
    student: bool
    stock: Mapping[str, Stored]
    text_input: Affine | None
    maps: Mapping[str, Affine]
    exit: Affine | None


def is_packaged(source: Checkpoint) -> bool:
    """Whether a folder is in the authors' layout; the stock class would take it, and leave weights out."""
    if source.catalog is not None:
        return False
    own = tuple(f".{name}.weight" for name in _OWN)
    return any(key in source.config for key in KEYS) or any(name.endswith(own) for name in source.names)


def presented(model: type[Opening], source: Checkpoint, dialect: Dialect | None = None) -> ConvertedCheckpoint:
    """Read a packaged folder as a checkpoint of one plan.

    Args:
        dialect: None to tell it by ``config.json`` and the weights.

    Raises:
        ValueError: a block is missing or incomplete, ``config.json`` contradicts the tensors, or the dialect cannot be
            told; one line says which.
    """
    folder, inside, outer = source.folder, dict[int, dict[str, Stored]](), dict[str, Stored]()
    for name in source.names:
        found = _NAME.fullmatch(name)
        home, inner = (inside.setdefault(int(found[1]), {}), found[2]) if found else (outer, name)
        home[inner] = Stored.in_checkpoint(source, name)
    config = {key: value for key, value in source.config.items() if key not in KEYS}
    dense = model.dense_catalog(ConvertedCheckpoint(folder, config, None, outer))
    depth = dense.architecture.depth
    if wrong := sorted(set(inside) ^ set(range(depth))):
        there = "holds" if wrong[0] in inside else "lacks"
        raise ValueError(f"{folder} {there} block {wrong[0]}, config.json says num_layers {depth}: fetch it again")
    blocks = [
        _remaining(f"{folder}: block {n}", inside[n], dense.spec(n), Interval(n, n), student=False)
        for n in range(depth)
    ]
    _compare_lists(source, blocks)
    return _converted(source, config, dense, outer, blocks, dialect or _dialect(source, blocks, _said(source)))


def _remaining(
    where: str, held: Mapping[str, Stored], spec: BlockSpec, interval: Interval, *, student: bool
) -> Remaining:
    """Take the tensors of a block apart, and check that they are all there and of the right shapes."""
    own = {name: Affine(held[f"{name}.weight"], held.get(f"{name}.bias")) for name in _OWN if f"{name}.weight" in held}
    no_text, mapped = _TEXT_INPUT in own, _MAP["image"] in own
    streams = (("image",) if no_text else ("image", "text")) if mapped else ()
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(_NORMS, (spec.head_dim,))
    for part in spec.parts:
        of_mlp = any(segment.group in streams for segment in part.segments)
        if of_mlp or (no_text and part.updates == "text" and not part.path.startswith("attn.")):
            continue
        rows = part.rows
        if mapped and part.factored and f"{part.path}.weight" in held:
            # Cut or whole.
            rows = rows // 2 if held[f"{part.path}.weight"].shape[0] == rows // 2 else rows
        shapes |= {f"{part.path}.weight": (rows, part.columns), f"{part.path}.bias": (rows,)}
    wanted = {f"{_MAP[stream]}.weight": (spec.dim, spec.dim) for stream in streams} | shapes
    for name in own:
        wanted |= {f"{name}.weight": (spec.dim, spec.dim)}
        wanted |= {f"{name}.bias": (spec.dim,)} if f"{name}.bias" in held else {}
    for name, shape in wanted.items():
        if name not in held:
            raise ValueError(f"{where} lacks {name}: fetch it again")
        if held[name].shape != shape:
            raise ValueError(f"{where}: {name} is {list(held[name].shape)}, wanted {list(shape)}")
    if more := sorted(set(held) - set(wanted)):
        raise ValueError(f"{where} holds {more[0]}, which a block of its kind in the authors' layout does not have")
    maps = {stream: own[_MAP[stream]] for stream in streams}
    return Remaining(
        interval, student, {name: held[name] for name in shapes}, own.get(_TEXT_INPUT), maps, own.get(_EXIT)
    )


def _compare_lists(source: Checkpoint, blocks: Sequence[Remaining]) -> None:
    """Compare the lists of ``config.json`` with what the tensors say."""
    found = (
        [n for n, block in enumerate(blocks) if block.text_input is not None],
        [n for n, block in enumerate(blocks) if block.maps],
        [n for n, block in enumerate(blocks) if block.exit is not None],
    )
    for key, numbers in zip(KEYS, found, strict=True):
        listed = source.config.get(key, numbers)
        # null where there are none.
        listed = [] if listed is None else listed
        if not isinstance(listed, list) or not all(type(n) is int for n in listed) or sorted(listed) != numbers:
            raise ValueError(f"{source.folder}: config.json: {key} is {listed}, the tensors say {numbers}: fetch again")


# Dialects.


def _said(source: Checkpoint) -> Dialect:
    """The dialect of ``config.json``."""
    later = [key for key in KEYS[1:] if key in source.config]
    if len(later) == 1:
        raise ValueError(
            f"{source.folder}: config.json has {later[0]} alone, the newer dialect has {' and '.join(KEYS[1:])}, "
            "the older neither: say which by --dialect"
        )
    return "newer" if later else "older"


def _dialect(source: Checkpoint, blocks: Sequence[Remaining], said: Dialect | None) -> Dialect:
    """The dialect by the weights, which have to agree with each other and with what ``config.json`` said."""
    seen: dict[Dialect, str] = {}
    for block in blocks:
        if block.text_input is None:
            continue
        mean = block.text_input.weight.read().float().diagonal().mean().item()
        what = f"{_TEXT_INPUT} of block {block.interval.first} has a mean diagonal of {mean:.2f}"
        looks = [dialect for dialect, near in (("newer", 0), ("older", 1)) if abs(mean - near) < _NEAR]
        if not looks:
            raise ValueError(f"{source.folder}: {what}, near neither 0 (newer) nor 1 (older): say which by --dialect")
        dialect: Dialect = "newer" if looks == ["newer"] else "older"
        seen.setdefault(dialect, what)
    if len(seen) == 2:
        raise ValueError(f"{source.folder} mixes dialects: {' and '.join(seen.values())}: say which by --dialect")
    if said is not None and seen and said not in seen:
        (by_weights, what), *_ = seen.items()
        raise ValueError(
            f"{source.folder}: config.json is of the {said} dialect, but {what}, as in the {by_weights}: "
            "say which by --dialect"
        )
    if seen:
        return next(iter(seen))
    return said or "newer"


# To a checkpoint of one plan.


def _converted(
    source: Checkpoint,
    config: Mapping[str, Any],
    dense: Catalog,
    outer: Mapping[str, Stored],
    blocks: Sequence[Remaining],
    dialect: Dialect,
    notes: Iterable[str] = (),
) -> ConvertedCheckpoint:
    """Put blocks together under our names; ``dense`` is the catalog of a model of as many blocks as they stand for."""
    said, tensors, planned = list(notes), dict(outer), []
    for block in blocks:
        not_updated = ALL_UPDATED if block.text_input is None else TEXT_NOT_UPDATED
        spec = dense.spec(block.interval.first)
        counts = {group: spec.groups[group].count for group in spec.groups_without(not_updated)}
        width = Width({**counts, **dict.fromkeys(block.maps, LINEAR_MAP)})
        planned.append(PlannedBlock(interval=block.interval, width=width, student=block.student))
        path = f"students.{block.interval.key}" if block.student else f"{_BLOCKS}.{block.interval.first}"
        tensors |= {f"{path}.{name}": stored for name, stored in _block_tensors(block, spec, width, not_updated)}
    intervals = []
    for run in _runs(source, blocks):
        interval = Interval(run[0].interval.first, run[-1].interval.last)
        intervals.append(interval)
        for name, made in _run_tensors(run, interval.last < dense.architecture.depth - 1, dialect):
            tensors[f"text_runs.{interval.key}.{name}"] = made
    passed_over = sum(block.text_input is None and block.exit is not None for block in blocks)
    if passed_over:
        said.append(f"{passed_over} x ehs_proj of a full block, which the authors' code passes over, left out")
    if any(block.maps for block in blocks):
        said.append("modulations of linear maps' halves, which nothing reads, are filled up with zeros where cut")
    if intervals:
        said.append(f"the {dialect} dialect of txt_proj")
    only = OnePlan(blocks=tuple(planned), text_runs=tuple(intervals))
    return ConvertedCheckpoint(source.folder, config, Catalog(**{**dict(dense), "only": only}), tensors, tuple(said))


def _block_tensors(
    block: Remaining, spec: BlockSpec, width: Width, not_updated: Collection[Any]
) -> Iterator[tuple[str, Stored]]:
    """What runs of a block, by the names that it has here."""
    parts = {part.path: part for part in spec.parts}
    for name, stored in block.stock.items():
        part = parts.get(name.rpartition(".")[0])
        if part is None:
            yield name, stored
        elif spec.runs(part, not_updated) and not any(width.get(s.group) == LINEAR_MAP for s in part.segments):
            yield name, _filled_up(stored, part.rows) if part.factored else stored
    for stream, layer in block.maps.items():
        if stream in width:
            [output] = spec.outputs_of(stream)
            yield from layer.under(f"replacements.{spec.replacement(output.name, LINEAR_MAP)}")


def _filled_up(stored: Stored, rows: int) -> Stored:
    """A tensor with rows of zeros after those that there are."""
    missing = rows - stored.shape[0]
    if not missing:
        return stored

    def read() -> torch.Tensor:
        tensor = stored.read()
        return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])

    return Stored((rows, *stored.shape[1:]), read)


def _runs(source: Checkpoint, blocks: Sequence[Remaining]) -> list[list[Remaining]]:
    """Each full block with those after it that do not update the text, where there are any."""
    runs: list[list[Remaining]] = []
    for block in blocks:
        if block.text_input is None:
            runs.append([block])
        elif runs:
            runs[-1].append(block)
        else:
            raise ValueError(
                f"{source.folder}: block {block.interval.first} reads the text of a full block before it, and there is "
                "none"
            )
    return [run for run in runs if len(run) > 1]


def _run_tensors(run: Sequence[Remaining], is_read: bool, dialect: Dialect) -> Iterator[tuple[str, Stored]]:
    """The maps of a text run; ``is_read`` says whether anybody reads the text after it."""
    inputs = {block.interval.first: block.text_input for block in run if block.text_input is not None}
    for number, layer in inputs.items():
        yield from (layer if dialect == "newer" else _less_identity(layer)).under(f"z_{number}")
    if is_read:
        exits = [block.exit for block in run[1:] if block.exit is not None]
        yield from _one_map(exits, next(iter(inputs.values()))).under("text")


def _less_identity(layer: Affine) -> Affine:
    """The map M of which ``z + M(z)`` is what a layer gives."""

    def read() -> torch.Tensor:
        # In float32: a diagonal minus 1 may not be a number of bfloat16.
        weight = layer.weight.read().float()
        return weight - torch.eye(len(weight))

    return layer._replace(weight=Stored(layer.weight.shape, read))


def _one_map(exits: Sequence[Affine], like: Affine) -> Affine:
    """The map M of which ``x + M(x)`` is what maps of that form, one after the other, give; zero for none."""
    if len(exits) == 1:
        return exits[0]
    shape = like.weight.shape

    def weight() -> torch.Tensor:
        if not exits:
            return torch.zeros_like(like.weight.read())
        total = torch.eye(shape[0], dtype=torch.float64)
        for layer in exits:
            total += layer.weight.read().double() @ total
        return (total - torch.eye(shape[0])).float()

    def bias() -> torch.Tensor:
        if not exits:
            return torch.zeros_like(like.read_bias())
        shift = torch.zeros(shape[0], dtype=torch.float64)
        for layer in exits:
            shift += layer.weight.read().double() @ shift + layer.read_bias().double()
        return shift.float()

    return Affine(Stored(shape, weight), Stored(shape[:1], bias))


# Training files.


def assembled(
    model: type[Opening],
    base: Checkpoint,
    lists: Mapping[str, Sequence[Mapping[str, torch.Tensor]]],
    intervals: Sequence[Interval],
    text_runs: Sequence[Interval],
    exits: Exits | None = None,
    dialect: Dialect | None = None,
) -> ConvertedCheckpoint:
    """Put what training wrote onto the stock model that it began with.

    Blocks keep the numbers of that model where its text runs have no student in them, else the remaining ones are
    numbered anew.

    Args:
        base: the stock model.
        lists: `LISTS`; of each, the tensors of its entries by name.
        intervals: what each student stands for, in the order of the students.
        text_runs: ``s..e``: blocks after s, up to e, do not update the text; in the order of the file's entries.
        exits: whether every run ends with the first ``ehs_proj``, as the authors' packager writes it, or with its own.

    Raises:
        ValueError: the file does not fit the intervals, the text runs or the stock model.
    """
    dense = model.dense_catalog(base)
    students, places = lists.get(STUDENTS, ()), _places(dense.architecture.depth, intervals)
    _count(students, STUDENTS, len(intervals), f"{len(intervals)} intervals are given")
    if lists.get(UNUSED):
        _count(lists[UNUSED], UNUSED, 2 * len(intervals), f"{len(intervals)} intervals are given, two for each")
    own = _own_layers(lists, places, text_runs, exits, dense.architecture.dim)
    blocks = []
    for interval in places:
        student = interval in intervals
        if student:
            number = list(intervals).index(interval)
            held = {name: Stored.held(tensor) for name, tensor in students[number].items()}
            where = f"student {number}, of blocks {interval},"
        else:
            prefix, where = f"{_BLOCKS}.{interval.first}.", f"{base.folder}: block {interval.first}"
            names = [name for name in base.names if name.startswith(prefix)]
            held = {name.removeprefix(prefix): Stored.in_checkpoint(base, name) for name in names}
        block = _remaining(where, held, dense.spec(interval.first), interval, student=student)
        if block.text_input is not None or block.maps or block.exit is not None:
            raise ValueError(f"{where} is no stock block: training files go on top of a stock checkpoint")
        blocks.append(block._replace(**own.get(interval, {})))
    outer = {name: Stored.in_checkpoint(base, name) for name in base.names if not _NAME.fullmatch(name)}
    config, notes = dict(base.config), []
    if not all(_runs_over_teacher(run) for run in _runs(base, blocks)):
        blocks = [block._replace(interval=Interval(n, n), student=False) for n, block in enumerate(blocks)]
        config["num_layers"] = len(blocks)
        dense = model.dense_catalog(ConvertedCheckpoint(base.folder, config, None, outer))
        notes.append("a text run has students in it: the blocks that remain are numbered anew")
    return _converted(base, config, dense, outer, blocks, dialect or _dialect(base, blocks, None), notes)


def _places(depth: int, intervals: Sequence[Interval]) -> list[Interval]:
    """What each remaining block stands for, in order."""
    for interval in intervals:
        if interval.last >= depth:
            raise ValueError(f"interval {interval} reaches beyond block {depth - 1} of the stock model")
        if clash := next((other for other in intervals if other != interval and other.overlaps(interval)), None):
            raise ValueError(f"intervals {interval} and {clash} overlap: a block has one student at most")
    if len(set(intervals)) < len(intervals):
        raise ValueError("an interval is given twice")
    covered = {block for interval in intervals for block in interval}
    return sorted([*intervals, *(Interval(n, n) for n in range(depth) if n not in covered)])


def _own_layers(
    lists: Mapping[str, Sequence[Mapping[str, torch.Tensor]]],
    places: Sequence[Interval],
    text_runs: Sequence[Interval],
    exits: Exits | None,
    dim: int,
) -> dict[Interval, dict[str, Any]]:
    """The layers that stock blocks do not have, by the block that gets them, as fields of `Remaining`."""
    last = places[-1].last
    members = []
    for run in text_runs:
        if run.last > last:
            raise ValueError(f"text run {run} reaches beyond block {last} of the stock model")
        members.append([place for place in places if run.first < place.first <= run.last])
        if not members[-1]:
            raise ValueError(f"text run {run}: no block after {run.first} is left in it")
    pruned = [place for run in members for place in run]
    if len(set(pruned)) < len(pruned):
        raise ValueError(f"text runs {', '.join(map(str, text_runs))} overlap")
    inputs, maps, ends = (lists.get(name, ()) for name in (TEXT_INPUTS, MAPS, EXITS))
    _count(inputs, TEXT_INPUTS, len(pruned), f"{len(pruned)} blocks remain in the text runs")
    own: dict[Interval, dict[str, Any]] = {place: {} for place in places}
    for number, (place, layer) in enumerate(zip(pruned, inputs, strict=True)):
        own[place]["text_input"] = _affine(layer, TEXT_INPUTS, number, dim)
    if maps:
        # "Two per kept block" is said both of the blocks of text runs and of all.
        of = pruned if len(maps) == 2 * len(pruned) else places
        _count(maps, MAPS, 2 * len(of), f"{len(pruned)} blocks remain in the text runs and {len(places)} in all")
        for n, place in enumerate(of):
            entries = zip(("text", "image"), (2 * n, 2 * n + 1), strict=True)
            found = {stream: _affine(maps[entry], MAPS, entry, dim) for stream, entry in entries}
            own[place]["maps"] = {s: found[s] for s in _MAP if s == "image" or place not in pruned}
    if ends:
        _count(ends, EXITS, len(text_runs), f"{len(text_runs)} text runs are given")
        if exits is None and len(ends) > 1:
            raise ValueError(
                f"the authors' packager writes {EXITS}[0] after every text run: say --ehs published for that, or "
                "--ehs intended for the one of each run"
            )
        for n, members_of_run in enumerate(members):
            number = 0 if exits == "published" else n
            own[members_of_run[-1]]["exit"] = _affine(ends[number], EXITS, number, dim)
    return own


def _affine(layer: Mapping[str, torch.Tensor], name: str, number: int, dim: int) -> Affine:
    shapes = {which: list(tensor.shape) for which, tensor in layer.items()}
    if shapes not in ({"weight": [dim, dim], "bias": [dim]}, {"weight": [dim, dim]}):
        raise ValueError(f"{name}: entry {number} is no layer from {dim} to {dim} channels: it holds {shapes}")
    bias = layer.get("bias")
    return Affine(Stored.held(layer["weight"]), None if bias is None else Stored.held(bias))


def _count(entries: Sequence[Any], name: str, wanted: int, why: str) -> None:
    if len(entries) != wanted:
        raise ValueError(f"{name} has {len(entries)} entries, wanted {wanted}: {why}")


def _runs_over_teacher(run: Sequence[Remaining]) -> bool:
    """Whether all blocks of a text run are blocks of the stock model, none left out between them."""
    return not any(block.student for block in run) and len(run) == run[-1].interval.last - run[0].interval.first + 1


# Writing.


def layout(model: CheckpointFolder) -> tuple[dict[str, Any], Iterator[dict[str, torch.Tensor]]]:
    """The plan that a model runs, in the authors' layout (newer dialect).

    Returns:
        The content of ``config.json``, and the tensors: those outside the blocks, then block by block.

    Raises:
        ValueError: the layout cannot hold the plan; one line says why.
    """
    plan = model.plan
    for planned in plan.blocks:
        _refuse(plan, planned, model.catalog.spec(planned.interval.first))
    calls = model.prepare(plan).calls
    numbers = (
        [n for n, planned in enumerate(plan.blocks) if plan.not_updated(planned)],
        [n for n, planned in enumerate(plan.blocks) if planned.width["image"] == LINEAR_MAP],
        [n for n, call in enumerate(calls) if _exit_of(call) is not None],
    )
    config = {**model.stock_config, "num_layers": len(calls), **dict(zip(KEYS, numbers, strict=True))}

    def tensors() -> Iterator[dict[str, torch.Tensor]]:
        homes = tuple(f"{home}." for home in (*model.block_lists, "students", "text_runs"))
        yield {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(homes)}
        for n, call in enumerate(calls):
            yield {f"{_BLOCKS}.{n}.{name}": tensor for name, tensor in _in_layout(model, call, plan)}

    return config, tensors()


def _refuse(plan: Plan, planned: PlannedBlock, spec: BlockSpec) -> None:
    """Refuse what the layout cannot hold."""
    where, width = f"blocks {planned.interval}", planned.width
    for group, count in width.items():
        if count not in (LINEAR_MAP, spec.groups[group].count):
            raise ValueError(
                f"{where} run {count} of {spec.groups[group].count} {group} units, and the authors' layout holds whole "
                "blocks: plan with full widths and linear maps alone"
            )
    mapped = [stream for stream in _MAP if width.get(stream) == LINEAR_MAP]
    if len(mapped) == 1 and not plan.not_updated(planned):
        raise ValueError(
            f"{where} run a linear map for the {mapped[0]} MLP alone, and the authors' layout has one for both streams "
            "or none"
        )


def _exit_of(call: BlockCall) -> Any:
    """The layer that the text goes on with after a block, None where it goes on as it is."""
    layer = None if call.text_run is None else call.text_run.exit_map
    return layer if layer is not None and any(p.count_nonzero() for p in layer.parameters()) else None


def _in_layout(model: CheckpointFolder, call: BlockCall, plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a block in the authors' layout, heads and channels in stock order."""
    block, spec, width = call.block, call.block.spec, call.width
    [planned] = [planned for planned in plan.blocks if planned.interval == call.interval]
    not_updated = plan.not_updated(planned)
    parts = {part.path: part for part in spec.parts}
    maps = {
        f"replacements.{spec.replacement(output.name, LINEAR_MAP)}": _MAP[stream]
        for stream in _MAP
        for output in spec.outputs_of(stream)
    }
    for name, tensor in held_at(block, width, not_updated):
        path, _, which = name.rpartition(".")
        if path in maps:
            yield f"{maps[path]}.{which}", tensor
        elif path in parts and parts[path].factored:
            # Shift, scale and gate of the attention half come first.
            yield name, tensor[: len(tensor) // 2] if width["image"] == LINEAR_MAP else tensor
        elif not name.startswith("order."):
            yield name, restore(tensor, tensor, name, block)
    like = next(iter(block.parameters()))
    for part in spec.parts:
        if not spec.runs(part, not_updated) and part.path.startswith("attn."):
            # Stored there, and not read.
            yield f"{part.path}.weight", like.new_zeros(part.rows, part.columns)
            yield f"{part.path}.bias", like.new_zeros(part.rows)
    if call.text_run is not None and call.text_run.input_map is not None:
        yield from ((f"{_TEXT_INPUT}.{name}", t) for name, t in call.text_run.input_map.state_dict().items())
    if (layer := _exit_of(call)) is not None:
        yield from ((f"{_EXIT}.{name}", t) for name, t in layer.state_dict().items())
