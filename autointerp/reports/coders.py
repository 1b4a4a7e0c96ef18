"""Coders side by side: what each scorer gives each coder's latents, and how far that is above controls; table, text, plots.

A lift is a difference of means over latents. Where both sides are of the same latents (a score, and the same latent's under
``shuffled``, ``generic`` or ``lexical``) they are paired; a coder and its control coder (`jobs.controls`) have no latent in
common, so the two are compared as samples, by Welch's method. Intervals are 95%, over latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from autointerp.reports import svg
from autointerp.reports.index import series_names, short_names
from autointerp.reports.source import FLOORS, Source
from autointerp.reports.summary import Overview, Series, SeriesKey, middle, overview
from autointerp.reports.terminal import table
from autointerp.stats import Difference, paired_difference, welch_difference

FILES = ("coders.parquet", "coders.csv")
WIDTH = 140
"""Characters of a terminal that a block of the table may take."""
_OVER = "over_"
_NAMES = [
    "coder", "control_of", "series", "explainer", "scorer", "judge", "metric", "negatives", "num_planned", "num_scored",
    "coverage", "median", "ci_low", "ci_high", "ci_method", "mean", "chance",
]  # fmt: skip


def coders_frame(found: Overview) -> pd.DataFrame:
    """Return one row per coder and scorer, controls after the coder they are of.

    ``median`` with ``ci_low``, ``ci_high`` and ``ci_method``; ``num_scored`` latents have a value, ``num_planned`` were asked
    for, ``coverage`` is their ratio. For each control ``over_NAME`` is the mean difference to it, with ``_low``, ``_high``,
    ``_method`` (``t_paired`` or ``welch``) and ``_num``, the pairs or the smaller sample; NAME is ``shuffled``, ``generic``,
    ``lexical``, or what a control coder's name has beyond its coder's, such as ``random``. `series` is a short name of the
    scorer that sets it apart from the folder's others.
    """
    names = named_series(found)
    explainers = short_names(found.explainers())
    rows = []
    for coder in found.coders:
        for name, key in names.items():
            by_coder = found.series[key]
            if coder not in by_coder:
                continue
            series = by_coder[coder]
            values = series.scored["value"]
            median = middle(values)
            planned = len(found.requested[coder])
            row = {
                "coder": coder,
                "control_of": found.control_of.get(coder),
                "series": name,
                "explainer": explainers.get(key.explainer, key.explainer),
                "scorer": key.scorer,
                "judge": key.judge,
                "metric": key.metric,
                "negatives": key.negatives,
                "num_planned": planned,
                "num_scored": len(values),
                "coverage": len(values) / planned if planned else None,
                "median": median.value if median else None,
                "ci_low": median.low if median else None,
                "ci_high": median.high if median else None,
                "ci_method": median.method if median else None,
                "mean": float(values.mean()) if len(values) else None,
                "chance": series.chance,
            }
            for control, lift, num in _lifts(found, coder, by_coder):
                at = f"{_OVER}{control.replace('-', '_')}"
                interval = lift.interval
                row |= {at: interval.value, f"{at}_low": interval.low, f"{at}_high": interval.high}
                row |= {f"{at}_method": interval.method, f"{at}_num": num}
            rows.append(row)
    extra = dict.fromkeys(name for row in rows for name in row if name not in _NAMES)
    frame = pd.DataFrame(rows, columns=[*_NAMES, *extra])
    # Where no latent has a value a column would be of no type.
    return frame.astype(dict.fromkeys(("coverage", "median", "ci_low", "ci_high", "mean", "chance"), "float64"))


def named_series(found: Overview) -> dict[str, SeriesKey]:
    """Return the series in which any latent has a value, by short names that set them apart."""
    keys = [key for key, by in found.series.items() if any(len(series.scored) for series in by.values())]
    return dict(zip(series_names(keys), keys, strict=True))


def _lifts(found: Overview, coder: str, by_coder: Mapping[str, Series]) -> Iterator[tuple[str, Difference, int]]:
    """Yield each control of a coder in one series with the lift over it and the number of latents it rests on."""
    series = by_coder[coder]
    for name, column in ((series.control_name, "control"), *((floor, floor) for floor in FLOORS)):
        both = series.scored[["value", column]].dropna().to_numpy(float)
        if name and len(both):
            yield name, paired_difference(both[:, 0], both[:, 1]), len(both)
    own = series.scored["value"].to_numpy(float)
    for control in found.coders:
        if found.control_of.get(control) == coder and control in by_coder:
            theirs = by_coder[control].scored["value"].to_numpy(float)
            if len(own) and len(theirs):
                yield control.removeprefix(f"{coder}-"), welch_difference(own, theirs), min(len(own), len(theirs))


def lift_names(frame: pd.DataFrame) -> list[str]:
    """Return the controls that a frame of :func:`coders_frame` has lifts over, in its order."""
    columns = [str(name) for name in frame]
    return [name[len(_OVER) : -len("_num")] for name in columns if name.startswith(_OVER) and name.endswith("_num")]


def coders_table(results_folder: Path | str) -> str:
    """Return :func:`coders_frame` of a results folder as text: rows are coders, columns scorers, in blocks of `WIDTH`.

    Of the lifts, those over ``shuffled`` and over control coders are shown.
    """
    frame = coders_frame(overview(Source(results_folder)))
    if not len(frame):
        return "nothing is scored in this folder yet\n"
    rows: list[list[str]] = []
    columns = list(dict.fromkeys(frame["series"]))
    shown = [name for name in lift_names(frame) if name not in FLOORS]
    chances = frame.groupby("series")["chance"].first()
    rows.append(["chance", "", *(_number(chances.get(name)) for name in columns)])
    for coder, of_coder in frame.groupby("coder", sort=False):
        by = of_coder.set_index("series").reindex(columns).to_dict("records")
        first = [str(coder), "median", *(_cell(row, "median", "ci") for row in by)]
        lifts = [[f"over {name.replace('_', '-')}", *(_cell(row, f"{_OVER}{name}", sign="+") for row in by)] for name in shown]
        scored = ["latents scored", *(_count(row) for row in by)]
        rows += [first, *(["", *line] for line in (*lifts, scored) if any(cell != "-" for cell in line[1:]))]
    blocks = [table([["coder", "", *(columns[i] for i in block)], *([*row[:2], *(row[2 + i] for i in block)] for row in rows)],
                    right=set()) for block in _blocks(columns, rows)]  # fmt: skip
    note = (
        "Median over latents with its 95% interval; lifts are differences of means with theirs: over shuffled explanations, "
        "paired by latent;\nover a coder's control coders, whose latents are others, by Welch's method."
    )
    return "\n\n".join(["\n".join(block) for block in blocks] + [note]) + "\n"


def _blocks(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[list[int]]:
    """Return the columns of each block that fits `WIDTH`, by number."""
    widths = [max(len(columns[i]), *(len(row[2 + i]) for row in rows)) + 2 for i in range(len(columns))]
    head = sum(max(len(row[i]) for row in rows) + 2 for i in range(2))
    blocks: list[list[int]] = [[]]
    for i, width in enumerate(widths):
        if blocks[-1] and head + sum(widths[j] for j in blocks[-1]) + width > WIDTH:
            blocks.append([])
        blocks[-1].append(i)
    return blocks


def _cell(row: Mapping[Any, Any], at: str, limits: str | None = None, *, sign: str = "") -> str:
    value, low, high = row.get(at), row.get(f"{limits or at}_low"), row.get(f"{limits or at}_high")
    if value is None or not math.isfinite(value):
        return "-"
    known = low is not None and high is not None and math.isfinite(low + high)
    return f"{value:{sign}.3f}" + (f" [{low:.3f}, {high:.3f}]" if known else "")


def _count(row: Mapping[Any, Any]) -> str:
    planned = row["num_planned"]
    return f"{row['num_scored']:.0f} of {planned:.0f}" if math.isfinite(planned) else "-"


def _number(value: Any) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"


def side_by_side(found: Overview, frame: pd.DataFrame) -> dict[str, Any]:
    """Return what the page shows: a plot for each scorer, and a table with a row per coder and a cell per scorer."""
    columns = list(dict.fromkeys(frame["series"]))
    keys, lifts = named_series(found), lift_names(frame)
    plots = []
    for name in columns:
        of_series = frame[frame["series"] == name]
        shown = of_series[of_series["median"].notna()]
        if not len(shown):
            continue
        by_coder = found.series[keys[name]]
        controls = {coder: middle(series.scored["control"]) for coder, series in by_coder.items()}
        marks = [
            svg.Mark(
                name=row["coder"],
                value=row["median"],
                low=row["ci_low"],
                high=row["ci_high"],
                control=control.value if (control := controls[row["coder"]]) else None,
                is_inner=bool(found.control_of.get(row["coder"])),
            )
            for row in shown.to_dict("records")
        ]
        chance = _known(of_series["chance"].iloc[0])
        metric = str(of_series["metric"].iloc[0]).replace("_", " ")
        label = f"{name}: {metric} by coder"
        plots.append({"name": name, "metric": metric, "svg": svg.marks_plot(marks, chance=chance, label=label)})
    rows = []
    for coder, of_coder in frame.groupby("coder", sort=False):
        by = of_coder.set_index("series").reindex(columns).to_dict("records")
        cells = [
            {
                "median": _cell(row, "median"),
                "interval": _limits(row, "ci"),
                "scored": _count(row),
                "lifts": [
                    {"name": name.replace("_", "-"), "text": _cell(row, f"{_OVER}{name}", sign="+")}
                    for name in lifts
                    if _cell(row, f"{_OVER}{name}") != "-"
                ],
            }
            for row in by
        ]
        rows.append({"coder": coder, "control_of": found.control_of.get(str(coder), ""), "cells": cells})
    chances = frame.groupby("series")["chance"].first()
    return {
        "columns": [{"name": n, "chance": _known(chances.get(n))} for n in columns],
        "rows": rows,
        "plots": plots,
        "files": FILES,
    }


def _limits(row: Mapping[Any, Any], at: str) -> str:
    low, high = row.get(f"{at}_low"), row.get(f"{at}_high")
    return f"{low:.3f} to {high:.3f}" if low is not None and high is not None and math.isfinite(low + high) else ""


def _known(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
