"""The wanted figures, and what was measured of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

# 1024 x 1024 pixels, 4096 image and 512 text tokens: the shape that the goals are set at.
_MAIN = {"image": 4096, "text": 512}
# Columns that describe the case of a row.
CASE = ("pixels", "image", "text", "batch", "width")

Row = dict[str, Any]
# Contents of the results of one device, by part.
Parts = dict[str, dict[str, Any]]


class Goal(NamedTuple):
    """A wanted figure, and what was measured of it.

    Attributes:
        name: what is compared with what.
        sign: ``>=`` or ``<=``.
        bound: the wanted figure.
        measured: (value, where) of every case that the goal is about; the worst counts.
    """

    name: str
    sign: str
    bound: float
    measured: list[tuple[float, str]]

    def judged(self) -> dict[str, Any]:
        """Return the goal with its worst value; ``value``, ``where`` and ``met`` are None if nothing was measured."""
        pick = min if self.sign == ">=" else max
        value, where = pick(self.measured) if self.measured else (None, None)
        met = None if value is None else value >= self.bound if self.sign == ">=" else value <= self.bound
        return {
            "target": self.name,
            "wanted": f"{self.sign} {self.bound:g}",
            "value": value,
            "met": met,
            "where": where,
        }


class Race:
    """All contestants of one operation at one shape."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.case = rows[0]
        self.by_name = {row["contestant"]: row for row in rows if row.get("ms")}

    def ms(self, name: str) -> float | None:
        """Return milliseconds of a contestant; ``taken`` is the chosen implementation, ``ours`` our fastest tile."""
        rows = self.by_name.values()
        if name == "taken":
            return next((row["ms"] for row in rows if row["taken"]), None)
        if name == "ours":
            return min((row["ms"] for row in rows if row["contestant"].split()[0] == "triton"), default=None)
        return self.by_name.get(name, {}).get("ms")

    def speed(self, name: str, *rivals: str) -> float | None:
        """Return the time of the fastest rival over that of a contestant; None if one of the two was not timed."""
        mine, theirs = self.ms(name), [ms for rival in rivals if (ms := self.ms(rival))]
        return min(theirs) / mine if mine and theirs else None

    def __str__(self) -> str:
        return describe(self.case)

    @property
    def taken(self) -> str:
        """Name of the chosen implementation."""
        return next((name for name, row in self.by_name.items() if row["taken"]), "nothing")


def describe(row: Row) -> str:
    """Describe the case of a row."""
    width = "maps" if not row["width"] else f"{row['width']} % wide" if row["width"] != 100 else ""
    named = (f"{row['image']} + {row['text']} tokens, batch {row['batch']}", width, "masked" if row["masked"] else "")
    return ", ".join(filter(None, named))


def races(rows: Iterable[Row]) -> list[Race]:
    """Group the rows of ``choose.json`` by operation and shape."""
    by_key: dict[str, list[Row]] = {}
    for row in rows:
        by_key.setdefault(row["key"], []).append(row)
    return [Race(rows) for rows in by_key.values()]


def goals(parts: Parts) -> list[Goal]:
    """Return the goals for an H100 or H200, with what was measured there."""
    raced = races(parts.get("choose", {}).get("results", []))
    return [*_fit_goals(parts.get("fit", {})), *_kernel_goals(raced), *_model_goals(parts.get("model", {}))]


def _fit_goals(content: Row) -> list[Goal]:
    errors = [
        (max(row["error_rms"], row["error_max"]) / row["limit"], f"{row['kernel']} {row['tile']}, {row['form']}")
        for row in content.get("results", [])
        if row.get("limit") and row.get("error_rms") is not None
    ]
    return [Goal("error of a 64 x 64 tile against float64, to its limit", "<=", 1.0, errors)]


def _kernel_goals(raced: Sequence[Race]) -> list[Goal]:
    def matching(op: str, **where: Any) -> list[Race]:
        wanted = {**_MAIN, "op": op, **where}
        return [race for race in raced if wanted.items() <= race.case.items()]

    def speed_to(op: str, *rivals: str, **where: Any) -> list[tuple[float, str]]:
        return [
            (speed, f"{race}: {race.taken} taken")
            for race in matching(op, **where)
            if (speed := race.speed("taken", *rivals)) is not None
        ]

    def attention() -> list[tuple[float, str]]:
        found = []
        for race in matching("joint_attention", masked=False):
            speed, ours = (race.speed(name, "cudnn", "flash") for name in ("taken", "ours"))
            if speed is not None:
                own = "not timed" if ours is None else f"{ours:.3f}"
                found.append((speed, f"{race}: {race.taken} taken, our kernel {own}"))
        return found

    def share_of(op: str, other: dict[str, Any], of: Callable[[float, float], float], **where: Any) -> Any:
        """Compare with the race whose shape differs only in ``other``."""
        found = []
        for race in matching(op, **where):
            shape = {name: race.case[name] for name in (*CASE, "masked")} | other
            for full in matching(op):
                mine, theirs = race.ms("taken"), full.ms("taken")
                if shape.items() <= full.case.items() and mine and theirs:
                    found.append((of(mine, theirs), str(race)))
        return found

    full, half = {"width": 100}, {"width": 50, "masked": False}
    return [
        Goal("attention: speed to the best of cuDNN and FlashAttention, as chosen", ">=", 0.99, attention()),
        Goal("up + GELU: speed to cuBLAS + eager", ">=", 1.08, speed_to("up_gelu", "torch")),
        Goal("down + gate + residual: speed to cuBLAS + eager", ">=", 1.0, speed_to("down_gate_residual", "torch")),
        Goal("q/k/v: speed to the stock chain, compiled", ">=", 1.05, speed_to("qkv_projection", "compiled")),
        Goal("ada_layer_norm: speed to a copy of the same bytes", ">=", 0.9, speed_to("ada_layer_norm", "copy")),
        Goal(
            "masked attention: speed to unmasked",
            ">=",
            0.97,
            share_of("joint_attention", {"masked": False}, lambda mine, theirs: theirs / mine, masked=True),
        ),
        *(
            Goal(f"{op}: time at half width to full", "<=", 0.55, share_of(op, full, lambda a, b: a / b, **half))
            for op in ("qkv_projection", "up_gelu", "down_gate_residual")
        ),
        Goal(
            "joint_attention, batch 2: time at half width to full",
            "<=",
            0.55,
            share_of("joint_attention", full, lambda a, b: a / b, batch=2, **half),
        ),
    ]


def _model_goals(content: Row) -> list[Goal]:
    def found(what: str, keep: Callable[[Row], bool]) -> list[tuple[float, str]]:
        return [
            (row["value"], f"{row['contestant']}, {row['plan']} {row['ratio']:g}, {row['size']} x {row['size']}")
            for row in content.get("ratios", [])
            if row["what"] == what and row["value"] is not None and keep(row)
        ]

    def dense(contestant: str, size: int) -> Callable[[Row], bool]:
        wanted = {"contestant": contestant, "size": size, "plan": "dense", "group": f"dense-{size}"}
        return lambda row: wanted.items() <= row.items()

    return [
        Goal("whole forward, 1024 x 1024: speed to diffusers", ">=", 1.5, found("speed to eager", dense("ours", 1024))),
        Goal(
            "whole forward, 1024 x 1024: speed to diffusers compiled",
            ">=",
            1.05,
            found("speed to compiled", dense("ours", 1024)),
        ),
        Goal(
            "whole forward, 512 x 512, graphs: speed to diffusers",
            ">=",
            1.5,
            found("speed to eager", dense("ours graphs", 512)),
        ),
        Goal(
            "whole forward, 512 x 512, graphs: speed to diffusers compiled",
            ">=",
            1.05,
            found("speed to compiled", dense("ours graphs", 512)),
        ),
        Goal(
            "time(r) / time(1), to the ratio that was planned",
            "<=",
            1.03,
            found("time ratio over planned ratio", lambda row: True),
        ),
        Goal(
            "a narrow plan: speed to the physically sliced model, compiled",
            ">=",
            0.98,
            found("speed to compiled", lambda row: row["plan"] != "dense"),
        ),
    ]
