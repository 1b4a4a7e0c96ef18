"""Shows results as plain text: one latent, or a table of headline scores. Escape sequences in texts are disarmed."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autointerp.errors import InputError
from autointerp.jobs.control_gaps import recorded_gaps
from autointerp.reports.index import density_rows, headline_rows, series_names
from autointerp.reports.pages import STATUS_WORDS, Page, latent_page
from autointerp.reports.source import Row, Source
from autointerp.reports.summary import Overview, overview
from autointerp.reports.text import one_line, visible, window_ansi


def show_latent(
    results_folder: Path | str, coder: str, latent: int, *, colour: bool = False, width: int = 110, max_examples: int = 10
) -> str:
    """Return explanations, scores and contexts of one latent as text of lines up to about `width` characters.

    Active tokens stand on a coloured background with `colour`, else within ``<< >>``.
    Raises: InputError naming what there is, when the folder has no rows of that latent.
    """
    source = Source(results_folder)
    _, rows = next(source.latents([(coder, latent)]))
    if not any(rows.values()):
        raise InputError(_unknown(source, coder, latent))
    page = latent_page(coder, latent, rows, max_examples=max_examples)
    lines = [_bold(f"{one_line(coder)}/{latent}", colour)]
    lines += _explanation_lines(page, width, colour)
    lines += ["", *_score_lines(page)]
    lines += _context_lines(page, rows["examples"], colour, max_examples)
    return "\n".join(lines) + "\n"


def _unknown(source: Source, coder: str, latent: int) -> str:
    found = overview(source)
    known = ", ".join(found.coders) or "none"
    if coder not in found.requested:
        return f"{source.folder} has no coder {one_line(coder)!r}; coders: {one_line(known, 200)}"
    latents = found.requested[coder]
    if latent in latents:
        return f"{coder}/{latent} is planned in {source.folder} and not explained yet; run `autointerp explain`"
    shown = ", ".join(str(i) for i in latents[:8].tolist()) + (", ..." if len(latents) > 8 else "")
    return f"{source.folder} has no rows of {coder}/{latent}; it holds {len(latents)} latents of that coder: {shown}"


def _bold(text: str, colour: bool) -> str:
    return f"\x1b[1m{text}\x1b[0m" if colour else text


def _explanation_lines(page: Page, width: int, colour: bool) -> list[str]:
    lines: list[str] = []
    for row in page.explanations:
        head = " ".join(part for part in (row["letter"], row["explainer"], f"({row['model']})" if row["model"] else "") if part)
        lines += ["", _bold(one_line(head), colour)]
        text = (
            visible(row["text"] or "") if row["status"] == "ok" else f"no explanation: {visible(row['why'])} ({row['status']})"
        )
        for paragraph in text.splitlines():
            lines += textwrap.wrap(paragraph, width - 2, initial_indent="  ", subsequent_indent="  ")
    return lines


def _score_lines(page: Page) -> list[str]:
    if not page.scores:
        return ["not scored yet"]
    rows = [["", "scorer", "judge", "metric", "negatives", "value", "95% interval", "chance", "control", "scored", ""]]
    for group in page.scores:
        for row in group["rows"]:
            notes = [f"{count} {reason}" for reason, count in row["unscored"].items()]
            notes += ["same model"] if group["same_model"] else []
            notes += ["pools unknown"] if row["disjoint"] == "unknown" else []
            notes += ["pools overlap"] if row["disjoint"] == "none" else []
            value = _number(row["value"]) if row["status"] == "ok" else row["status"]
            rows.append(
                [
                    group["letter"],
                    group["scorer"],
                    group["judge"],
                    row["metric"],
                    group["negatives"],
                    value,
                    _between(row["ci_low"], row["ci_high"]),
                    _number(row["chance"]),
                    _number(row["control_value"]),
                    str(row["num_scored"]),
                    ", ".join(notes),
                ]
            )
    return table(rows, right={5, 7, 8, 9})


def _context_lines(page: Page, examples: Sequence[Row], colour: bool, max_examples: int) -> list[str]:
    groups = {
        "strongest contexts the explainer saw": [r for r in examples if r["source"] == "positive" and r["pool"] == "explain"],
        "contexts it was scored on": [r for r in examples if r["source"] == "positive" and r["pool"] == "score"],
        "silent contexts it was scored on": [r for r in examples if r["source"] != "positive" and r["pool"] == "score"],
    }
    lines: list[str] = []
    for title, rows in groups.items():
        if rows:
            lines += ["", _bold(title, colour)]
            lines += [_context_line(row, page.scale, colour) for row in _spread(rows, max_examples)]
    return lines or ["", "this folder holds no windows of this latent"]


def _spread(rows: Sequence[Row], num: int) -> list[Row]:
    """Evenly spaced rows; they lie in order of strength, so every quantile has its share."""
    step = max(1.0, len(rows) / num)
    return [rows[int(i * step)] for i in range(min(num, len(rows)))]


def _context_line(row: Row, scale: float, colour: bool) -> str:
    peak = max((abs(a) for a in row["activations"]), default=0.0)
    quantile = f"q{row['quantile']}" if row["source"] == "positive" else row["source"]
    return f"  {quantile:<7} {peak:7.3g}  {window_ansi(row['pieces'], row['activations'], scale, colour=colour)}"


def summary_table(results_folder: Path | str) -> str:
    """Return headline scores: median over latents with interval, control, lift and chance, a row per coder and scorer.

    Where sources of negatives stand on different latents, also the median over those that have a score against each.
    Below: means, also weighted by firing rate, lifts over each control with intervals, coverage by firing rate, and coders of
    which few latents have controls.
    """
    found = overview(Source(results_folder))
    rows = [
        [
            "coder",
            "control of",
            "explainer",
            "scorer",
            "scorer_id",
            "judge",
            "metric",
            "negatives",
            "latents",
            "median",
            "95% interval",
            "with every source",
            "control",
            "lift",
            "chance",
        ]
    ]
    for row in headline_rows(found, plots=False):
        median, control, lift, shared = row["median"], row["control"], row["lift"], row["shared"]
        total = f"{row['num_scored']}/{row['num_rows']}" if row["num_rows"] > row["num_scored"] else str(row["num_scored"])
        rows.append(
            [
                row["coder"],
                row["control_of"],
                row["explainer"],
                row["scorer"],
                row["settings"],
                row["judge"],
                row["metric"],
                row["negatives"],
                total,
                _number(median and median.value),
                _between(median and median.low, median and median.high),
                f"{_number(shared['median'] and shared['median'].value)} ({shared['num']})" if shared else "",
                _number(control and control.value),
                f"{lift.value:+.3f}" if lift else "-",
                _number(row["chance"]),
            ]
        )
    lines = table(rows, right={8, 9, 11, 12, 13, 14}) if len(rows) > 1 else ["nothing is scored in this folder yet"]
    lines += [*_lifts(found), *_by_density(found)]
    missing = _without(found.coders, {c: [found.status(c, int(i)) for i in found.requested[c]] for c in found.coders})
    gaps = [one_line(gap) for gap in recorded_gaps(results_folder)]
    return "\n".join([*lines, *missing, *gaps]) + "\n"


def _lifts(found: Overview) -> list[str]:
    """Means, and how far each series is above its controls, as median over latents with interval."""
    rows = [
        [
            "coder",
            "explainer",
            "scorer",
            "scorer_id",
            "judge",
            "negatives",
            "mean",
            "by firing rate",
            "above",
            "lift",
            "95% interval",
            "latents",
        ]
    ]
    for row in headline_rows(found, plots=False):
        named = [row["coder"], row["explainer"], row["scorer"], row["settings"], row["judge"], row["negatives"]]
        means = [_number(row[name] and row[name].value) for name in ("mean", "weighted")]
        lifts = [{"name": row["control_name"], "lift": row["lift"], "num": None}] if row["lift"] else []
        for lift in [*lifts, *row["floors"]]:
            interval = lift["lift"]
            num = "" if lift["num"] is None else f"{lift['num']}"
            rows.append([*named, *means, lift["name"], f"{interval.value:+.3f}", _between(interval.low, interval.high), num])
    return ["", *table(rows, right={6, 7, 9, 11})] if len(rows) > 1 else []


def _by_density(found: Overview) -> list[str]:
    """Coverage and medians by decade of the firing rate."""
    names = series_names(list(found.series))
    rows = [["coder", "share of tokens it fires on", "latents", "scored", *names]]
    for row in density_rows(found):
        rows.append(
            [row["coder"], row["range"], str(row["num"]), str(row["ok"]), *(_number(value) for value in row["medians"])]
        )
    return ["", *table(rows, right=set(range(2, len(rows[0]))))] if len(rows) > 1 and found.series else []


def _without(coders: Sequence[str], statuses: Mapping[str, Sequence[str]]) -> list[str]:
    lines = []
    for coder in coders:
        counts = {word: statuses[coder].count(word) for word in sorted(set(statuses[coder])) if word != "ok"}
        if counts:
            reasons = "; ".join(f"{count} {word} ({STATUS_WORDS.get(word, word)})" for word, count in counts.items())
            lines.append(
                f"{one_line(coder)}: {sum(counts.values())} of {len(statuses[coder])} latents without a score: {reasons}"
            )
    return lines


def table(rows: Sequence[Sequence[Any]], *, right: set[int]) -> list[str]:
    """Return rows as aligned lines, the first one the header; columns that are empty throughout are left out."""
    texts = [[one_line(str(cell)) for cell in row] for row in rows]
    used = [i for i in range(len(texts[0])) if any(row[i] for row in texts[1:])]
    widths = {i: max(len(row[i]) for row in texts) for i in used}
    lines = [
        "  ".join(row[i].rjust(widths[i]) if i in right else row[i].ljust(widths[i]) for i in used).rstrip() for row in texts
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _between(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None or not math.isfinite(low + high) else f"{low:.3f} to {high:.3f}"
