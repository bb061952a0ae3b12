"""What a training run leaves: its log, its settings, and how near its pictures are to the teacher's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeGuard

from pydantic import Field, model_validator

from ppcl_rt.messages import brief
from ppcl_rt.report.parts import Curve, Plot, Section, Table
from ppcl_rt.report.stored import Stored

# Points that are drawn of a curve, and curves of single students.
_MOST_POINTS, _MOST_CURVES = 1000, 20
# Losses that fall by more than this are drawn on a logarithmic axis.
_WIDE = 5.0
_LARGEST = 1e300


class RunLog(Stored):
    """A ``log.jsonl``: an event a line; lines that a kill cut are counted."""

    suffix: ClassVar[str] = ".jsonl"
    events: tuple[dict[str, Any], ...] = Field(min_length=1)
    cut: int = 0

    @classmethod
    def fits(cls, path: Path, content: Any) -> bool:
        """Whether some line is an event of a stage, or the file is called as logs are."""
        return path.name == "log.jsonl" or '"stage"' in content

    @classmethod
    def read(cls, path: Path, content: Any) -> RunLog:
        """Read the lines that are whole."""
        events, cut = [], 0
        for line in filter(str.strip, content.splitlines()):
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                event = None
            if isinstance(event, dict) and isinstance(event.get("stage"), str):
                events.append(event)
            else:
                cut += 1
        if not events:
            raise ValueError("no line of it is an event of a stage")
        return super().read(path, {"events": events, "cut": cut})


class Settings(Stored):
    """A ``run.json``, or the ``config.json`` of a run folder: every setting, and what made it."""

    made_by: dict[str, Any]

    @classmethod
    def fits(cls, path: Path, content: Any) -> bool:
        """Whether it is what made a checkpoint and nothing else, or the settings themselves."""
        return isinstance(content, dict) and (
            content.keys() == {"made_by"} or {"task", "teacher", "students"} <= content.keys()
        )

    @classmethod
    def read(cls, path: Path, content: Any) -> Settings:
        """Take either form."""
        return super().read(path, content if "made_by" in content else {"made_by": {"config": content}})


class Drawn(Stored):
    """A ratio of which pictures were drawn: PSNR (none where a picture is the same) and SSIM of each."""

    ratio: float
    psnr_and_ssim: tuple[tuple[float | None, float], ...] = Field(min_length=1)


class Pictures(Stored):
    """A ``pictures.json``: how near pictures are to the teacher's, or why none were drawn."""

    prompts: tuple[str, ...] = ()
    ratios: tuple[Drawn, ...] = ()
    left_out: str = ""

    @classmethod
    def fits(cls, path: Path, content: Any) -> bool:
        """Whether it has ratios with likenesses, or says why not."""
        return path.name == "pictures.json" and isinstance(content, dict) and bool({"ratios", "left_out"} & {*content})

    @model_validator(mode="after")
    def _as_many(self) -> Pictures:
        if any(len(each.psnr_and_ssim) != len(self.prompts) for each in self.ratios):
            raise ValueError("there are not as many figures as prompts")
        return self


def log_section(log: RunLog, file: str) -> Section:
    """Show a log: steps, losses and time of each stage, and the curves of losses and scores."""
    stages = list(dict.fromkeys(event["stage"] for event in log.events))
    parts: list[Plot | Table] = [_summary(log.events, stages)]
    for stage in stages:
        events = [event for event in log.events if event["stage"] == stage]
        parts += _plots(events, stage)
    cut = f"{log.cut} lines of it are no events: a kill cuts the last line." if log.cut else ""
    return Section("Training", parts, file, notes=[cut])


def _summary(events: Sequence[dict[str, Any]], stages: Sequence[str]) -> Table:
    lines = []
    for stage in stages:
        here = [event for event in events if event["stage"] == stage]
        steps, losses = _series(here, "step", "loss")
        ends = [f"{loss:.4g}" for loss in (losses[0], losses[-1])] if losses else ["", ""]
        lines.append([stage, f"{steps[-1]:g}" if steps else "", *ends, f"{_seconds(here) / 60:.1f}"])
    return Table("stages", ("stage", "steps", "first loss", "last loss", "minutes"), lines)


def _plots(events: Sequence[dict[str, Any]], stage: str) -> Iterator[Plot]:
    """The curves of a stage."""
    steps, losses = _series(events, "step", "loss")
    if len(steps) > 1:
        wide = min(losses) > 0 and max(losses) > _WIDE * min(losses)
        yield Plot(f"{stage}: loss", "step", "loss", [_thin("loss", steps, losses)], logarithmic="y" if wide else "")
    names = list(dict.fromkeys(name for event in events for name in _mapping(event, "losses")))
    apart = []
    for name in names[:_MOST_CURVES]:
        apart.append(_thin(name, *_series([{**event, **_mapping(event, "losses")} for event in events], "step", name)))
    apart = [curve for curve in apart if len(curve.x) > 1]
    if len(apart) > 1:
        positive = all(min(curve.y) > 0 for curve in apart)
        yield Plot(f"{stage}: loss of each", "step", "loss", apart, logarithmic="y" if positive else "")
    judged = [_thin(name, *_series(events, "judged", name)) for name in ("strict", "soft")]
    if len(judged[0].x) > 1:
        yield Plot(f"{stage}: scores", "step", "score", judged)


def _series(events: Sequence[dict[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
    """The values of two keys, where both are numbers; a stage that was resumed trains some steps again."""
    steps: list[float] = []
    values: list[float] = []
    for event in events:
        step, value = event.get(x), event.get(y)
        if not (_is_number(step) and _is_number(value)):
            continue
        while steps and steps[-1] >= step:
            steps.pop()
            values.pop()
        steps.append(float(step))
        values.append(float(value))
    return steps, values


def _thin(name: str, x: list[float], y: list[float]) -> Curve:
    """A curve of as many points as can be seen, the last among them."""
    stride = -(-len(x) // _MOST_POINTS) or 1
    kept = sorted({*range(0, len(x), stride), len(x) - 1} - {-1})
    return Curve(name, [x[n] for n in kept], [y[n] for n in kept])


def _seconds(events: Sequence[dict[str, Any]]) -> float:
    """The time of a stage; seconds begin anew in each process that goes on with it."""
    total = last = 0.0
    for event in events:
        seconds = event.get("seconds")
        if _is_number(seconds):
            total += last if seconds < last else 0.0
            last = float(seconds)
    return total + last


def _is_number(value: Any) -> TypeGuard[float]:
    # Not infinite, not NaN, no integer that is no float: none of them can be drawn.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST


def _mapping(event: dict[str, Any], key: str) -> dict[str, Any]:
    found = event.get(key)
    return found if isinstance(found, dict) else {}


def settings_section(settings: Settings, file: str) -> Section:
    """Show every setting, in the form that ``--set`` takes."""
    made_by = settings.made_by
    lines = [[name, brief(value)] for name, value in _flat(made_by.get("config", {}))]
    rest = [
        brief(f"{name}: {value}") for name, value in _flat({k: v for k, v in made_by.items() if k not in ("config",)})
    ]
    table = Table("every setting", ("setting", "value"), lines, folded=True)
    return Section("Settings", [table], file, notes=["; ".join(rest)])


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif name:
        yield name, value if isinstance(value, str) else json.dumps(value)


def pictures_section(pictures: Pictures, file: str) -> Section:
    """Show how near pictures are to the teacher's; the grid itself is a PNG next to it."""
    if not pictures.ratios:
        return Section("Pictures of the run", (), file, "", [brief(f"None were drawn: {pictures.left_out}.")])
    lines, single = [], []
    for each in pictures.ratios:
        differ = [psnr for psnr, _ in each.psnr_and_ssim if psnr is not None]
        alike = [ssim for _, ssim in each.psnr_and_ssim]
        mean = f"{sum(differ) / len(differ):.1f} dB" if differ else "the same"
        lines.append([f"{each.ratio:.3g}", mean, f"{sum(alike) / len(alike):.3f}"])
        for prompt, (psnr, ssim) in zip(pictures.prompts, each.psnr_and_ssim, strict=True):
            said = "the same" if psnr is None else f"{psnr:.1f} dB"
            single.append([brief(prompt), f"{each.ratio:.3g}", said, f"{ssim:.3f}"])
    notes = ["Likeness to what the teacher draws from the same noise, which is not how good a picture is."]
    means = Table("mean over prompts", ("ratio", "PSNR", "SSIM"), lines)
    apart = Table("every prompt", ("prompt", "ratio", "PSNR", "SSIM"), single, folded=True)
    return Section("Pictures of the run", [means, apart], file, "", notes)
