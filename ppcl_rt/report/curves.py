"""Curves as SVG that stands in the page itself, in the page's own colour of text."""

from __future__ import annotations

import html
import io
import re
from typing import Any

from ppcl_rt.report.parts import Curve, Plot

# Inches of a plot: text is still read where a phone shows it at two thirds.
_SIZE = (5.4, 3.8)
# Stands for the colour of text until the SVG is written, which then follows light and dark.
_INK = "#010203"
# Any: matplotlib lists the names that it takes, which is not always installed.
_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    "grid.color": _INK,
    "legend.frameon": False,
    "font.family": "sans-serif",
    "font.size": 10,
    # Text stays text: smaller, and found by a search in the page.
    "svg.fonttype": "none",
    # Names come from files: a dollar in one is a dollar.
    "text.parse_math": False,
    "lines.markersize": 4,
}
# Points of a line that are marked one by one.
_MOST_MARKED = 40
# One more dash for every ten colours.
_DASHES = ("-", "--", ":", "-.")


def svg(plot: Plot) -> str:
    """Draw a plot.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        # Imported here: it is of an extra, and only those who draw wait for it.
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("drawing curves takes matplotlib: pip install ppcl-rt[train]") from None
    # The salt makes ids of clips that no other plot of the page has.
    salt = repr((plot.title, plot.x, plot.y))
    with rc_context({**_STYLE, "svg.hashsalt": salt}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        _draw(figure, plot)
        text = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=metadata)
    return _inline(text.getvalue(), plot.title)


def _draw(figure: Any, plot: Plot) -> None:
    axes = figure.subplots()
    for number, curve in enumerate(plot.curves):
        _curve(axes, curve, number)
    for name, value in plot.levels.items():
        axes.axhline(value, color="grey", linestyle="--", linewidth=1, label=name)
    axes.set(xlabel=plot.x, ylabel=plot.y)
    for axis in plot.logarithmic:
        axes.set(**{f"{axis}scale": "log"})
        _plain_numbers(getattr(axes, f"{axis}axis"))
    axes.grid(alpha=0.2)
    names = [*(curve.name for curve in plot.curves), *plot.levels]
    if len(names) > 1:
        figure.legend(loc="outside lower center", ncols=2 if max(map(len, names)) > 16 else 3, fontsize=9)


def _plain_numbers(axis: Any) -> None:
    """Write 0.01 in place of a power of ten, which is mathematics to matplotlib."""
    from matplotlib.ticker import LogFormatter

    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.4)))


def _curve(axes: Any, curve: Curve, number: int) -> None:
    colour, dash = f"C{number % 10}", _DASHES[number // 10 % len(_DASHES)]
    marker = "o" if not curve.joined or len(curve.x) <= _MOST_MARKED else ""
    how = {"color": colour, "label": curve.name, "marker": marker, "linestyle": dash if curve.joined else ""}
    if not curve.low:
        axes.plot(curve.x, curve.y, linewidth=1.5, **how)
        return
    # By rounding, the end of an interval may lie on the wrong side of the mean.
    below = [max(0.0, y - low) for y, low in zip(curve.y, curve.low, strict=True)]
    above = [max(0.0, high - y) for y, high in zip(curve.y, curve.high, strict=True)]
    axes.errorbar(curve.x, curve.y, [below, above], linewidth=1.5, capsize=2, **how)


def _inline(text: str, title: str) -> str:
    """The element alone, without a size, names of namespaces, and ids that nothing refers to."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    head, rest = text.split(">", 1)
    head = re.sub(r'\s(xmlns(:\w+)?|width|height|version)="[^"]*"', "", head)
    rest = re.sub(r' id="[A-Za-z.0-9]+_\d+"', "", rest)
    # It would style the whole page.
    rest = re.sub(r"<style[^>]*>.*?</style>", "", rest, flags=re.DOTALL)
    whole = f'{head} role="img" aria-label="{html.escape(title)}">{rest}'
    return whole.replace(_INK, "currentColor").strip()
