"""The page: all that a folder holds, in one HTML file that needs no other file and no network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from ppcl_rt.files import replacing
from ppcl_rt.report import comparisons, evaluations, gpu, plans, runs, sheets
from ppcl_rt.report.curves import svg
from ppcl_rt.report.folder import Results, read_folder
from ppcl_rt.report.parts import Curve, Picture, Plot, Section

# What is called so is replaced without a question: the page of a run folder.
REPORT = "report.html"
# Names of files that are not shown, before the rest is only counted.
_MOST_NAMES = 20


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the page of a folder; returns where, by default `REPORT` in the folder itself.

    Raises:
        ValueError: the folder holds no results, ``out`` cannot be written, or there are curves and no matplotlib.
    """
    path = folder / REPORT if out is None else out
    text = page(folder)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def page(folder: Path) -> str:
    """Return the page of a folder.

    Raises:
        ValueError: as `write_report`.
    """
    results = read_folder(folder)
    sections = sections_of(results)
    if not sections:
        damaged = "".join(f"; {name} is damaged: {why}" for name, why in list(results.damaged.items())[:1])
        raise ValueError(f"{folder} holds no results to report: give the folder of a run, or of --json files{damaged}")
    loader = PackageLoader("ppcl_rt", "report")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.tests.update(plot=lambda part: isinstance(part, Plot), picture=lambda part: isinstance(part, Picture))
    environment.filters.update(svg=lambda plot: Markup(svg(plot)), data_uri=_data_uri)
    return environment.get_template("page.html").render(
        title=folder.resolve().name,
        version=_version(),
        sections=sections,
        damaged=results.damaged,
        notices=results.notices,
        unknown=_names(results.unknown),
    )


def sections_of(results: Results) -> list[Section]:
    """Turn what was found into sections: quality first, then plans and pictures, training, devices, settings."""
    return [
        *_overview(results),
        *(comparisons.comparison_section(found, name) for name, found in results.of(comparisons.Comparison)),
        *(evaluations.section(found, name) for name, found in results.of(evaluations.Evaluation)),
        *(comparisons.subsets_section(found, name) for name, found in results.of(comparisons.Subsets)),
        *(plans.section(found, name) for name, found in results.of(plans.Planned)),
        *(runs.pictures_section(found, name) for name, found in results.of(runs.Pictures)),
        *(sheets.section(found, name) for name, found in results.of(sheets.Sheet)),
        *(runs.log_section(found, name) for name, found in results.of(runs.RunLog)),
        *gpu.sections(results.of(gpu.Part)),
        *(gpu.sweep_section(found, name) for name, found in results.of(gpu.Sweep)),
        *(comparisons.rows_section(found, name) for name, found in results.of(comparisons.Rows)),
        *(runs.settings_section(found, name) for name, found in results.of(runs.Settings)),
    ]


def _overview(results: Results) -> list[Section]:
    """Quality against ratio, of all evaluations and all methods together."""
    curves: dict[str, list[Curve]] = {}
    levels: dict[str, dict[str, float]] = {}
    compared = list(results.of(comparisons.Comparison))
    for name, comparison in compared:
        found, teacher = comparisons.curves(comparison, f", {name}" if len(compared) > 1 else "")
        for what in found:
            curves.setdefault(what, []).extend(found[what])
            levels.setdefault(what, {}).update(teacher[what])
    for name, evaluation in results.of(evaluations.Evaluation):
        for what, curve in evaluations.curves(evaluation, name).items():
            curves.setdefault(what, []).append(curve)
    plots = [
        Plot(f"{what} against ratio", evaluations.RATIO, what, curves[what], levels.get(what, {}))
        for what in curves
        if curves[what]
    ]
    notes = ["Bars are 95 % intervals. Files may be about different prompts: compare within a file."]
    return [Section("Quality against ratio", plots, notes=notes)] if plots else []


def _data_uri(picture: Picture) -> str:
    return f"data:{picture.mime};base64,{base64.b64encode(picture.data).decode()}"


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _version() -> str:
    try:
        return version("ppcl-rt")
    except PackageNotFoundError:
        return ""
