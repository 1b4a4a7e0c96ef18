"""Turns the rows of one latent into what its page shows: explanations, scores beside controls, contexts with verdicts.

Pure: rows in, plain values and safe markup out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from autointerp.digest import short
from autointerp.records import UNSCORED
from autointerp.reports.source import FLOORS, Row, explainer_label
from autointerp.reports.svg import MAX_CURVES, Curve, domain_of, interval_bar, quantile_plot
from autointerp.reports.text import window_html

_Controls = Mapping[tuple[Any, ...], Mapping[str, float]]
"""Values under each control, by `_metric`."""
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
STATUS_WORDS: Mapping[str, str] = {
    "ok": "scored",
    "unparseable": "the reply could not be read",
    "refused": "the model refused",
    "truncated": "the reply was cut off",
    "no_reply": "the engine gave no reply; the next run asks again",
    "too_few_examples": "it fires in too few distinct windows",
    "too_dense": "too few windows in which it is silent",
    "too_long": "the prompt is longer than the engine's context",
    "undefined": "the metric is not defined on these verdicts",
    "not_applicable": "the method does not apply to this latent",
    "planned": "not explained yet",
    "explained": "not scored yet",
}


@dataclass(frozen=True)
class Mark:
    """What one scorer said of one window."""

    text: str
    kind: str
    """``right``, ``miss``, ``alarm`` or ``none``."""
    title: str


@dataclass(frozen=True)
class Window:
    """One context as shown."""

    html: Markup
    pool: str
    title: str
    source: str
    marks: tuple[Mark, ...]
    wrong: str
    """``miss``, ``alarm`` or "" when no scorer erred."""


@dataclass
class Page:
    """All of one latent's page."""

    coder: str
    latent: int
    explanations: list[dict[str, Any]] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)
    plots: list[dict[str, Any]] = field(default_factory=list)
    quantiles: list[dict[str, Any]] = field(default_factory=list)
    """Activating windows of both pools, strongest first."""
    more_missed: list[Window] = field(default_factory=list)
    """Activating windows a judge missed, beside those under `quantiles`."""
    num_missed: int = 0
    silent: list[Window] = field(default_factory=list)
    """Scored windows in which it is silent, false alarms first."""
    num_silent: int = 0
    num_alarms: int = 0
    scale: float = 0.0
    """Largest activation of any window, shown or not."""
    disjoint: tuple[str, ...] = ()
    has_control: bool = False
    same_model: tuple[str, ...] = ()
    """Models that both explained and judged."""
    status: str = "ok"
    density: float | None = None


def latent_page(coder: str, latent: int, rows: Mapping[str, Sequence[Row]], *, max_examples: int = 20) -> Page:
    """Return the page of one latent from its rows by table; at most `max_examples` windows per kind are shown."""
    page = Page(coder, latent)
    named = _explanations(rows["explanations"])
    page.explanations = named
    own = [row for row in rows["scores"] if not row["control"]]
    beside = _control_values(row for row in rows["scores"] if row["control"])
    scorers = _scorer_names(own)
    _scores(page, named, own, beside, scorers)
    _plots(page, named, own, beside, scorers)
    verdicts = [row for row in rows["verdicts"] if not row["control"]]
    judges = {row["scorer_id"]: row["judge"] for row in own}
    marks = _marks(verdicts, named, judges, scorers)
    _windows(page, _one_selection(rows["examples"], named), marks, max_examples)
    known = {row.get("disjoint") for row in [*own, *rows["examples"]]}
    page.disjoint = tuple(sorted(str(unit) for unit in known if unit))
    return page


def _explanations(rows: Sequence[Row]) -> list[dict[str, Any]]:
    usable = {explainer_label(row) for row in rows if row["status"] == "ok"}
    # What an explainer wrote and did not choose is in the tables only.
    shown = [row for row in rows if row["status"] == "ok" or explainer_label(row) not in usable]
    ordered = sorted(shown, key=lambda row: (explainer_label(row), row["sample"] or 0, row["explanation_id"] or ""))
    several = len(ordered) > 1
    return [
        {
            **row,
            "label": explainer_label(row),
            "letter": _LETTERS[i % len(_LETTERS)] if several else "",
            "prompt": short(row["prompt_id"] or ""),
            "why": row.get("reason") or STATUS_WORDS.get(row["status"], row["status"]),
        }
        for i, row in enumerate(ordered)
    ]


def _order(named: Sequence[Mapping[str, Any]], explanation_id: str | None) -> int:
    ids = [row["explanation_id"] for row in named]
    return ids.index(explanation_id) if explanation_id in ids else len(ids)


def _letter(named: Sequence[Mapping[str, Any]], explanation_id: str | None) -> str:
    at = _order(named, explanation_id)
    return str(named[at]["letter"]) if at < len(named) else ""


def _scorer_names(own: Iterable[Row]) -> dict[str, str]:
    """Name of each scorer by its id; those of one name and judge are told apart by the start of their digest."""
    alike: dict[tuple[str, ...], set[str]] = {}
    for row in own:
        alike.setdefault((row["label"] or row["explainer"], row["scorer"], row["judge"]), set()).add(row["scorer_id"] or "")
    return {i: f"{key[1]} {short(i)}" if len(ids) > 1 else key[1] for key, ids in alike.items() for i in ids}


def _control_values(controls: Iterable[Row]) -> _Controls:
    """Mean value under each control by its name, by what names a metric apart from the explanation."""
    found: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for row in controls:
        if row["value"] is not None:
            found.setdefault(_metric(row), {}).setdefault(row["control"], []).append(row["value"])
    return {key: {name: sum(values) / len(values) for name, values in by.items()} for key, by in found.items()}


def _metric(row: Row) -> tuple[Any, ...]:
    """What a score and its controls share."""
    return (
        row["label"] or row["explainer"],
        row.get("base_id") or row["scorer_id"],
        row["negatives"],
        row["metric"],
        row["quantile"],
    )


def _main(beside: Mapping[str, float]) -> tuple[float, str] | None:
    """Return value and name of the control that is no floor."""
    return next(((value, name) for name, value in sorted(beside.items()) if name not in FLOORS), None)


def _scores(
    page: Page, named: Sequence[Mapping[str, Any]], own: Sequence[Row], controls: _Controls, scorers: Mapping[str, str]
) -> None:
    models = {row["explanation_id"]: row["model"] for row in named}
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in own:
        if row["quantile"] is None:
            groups.setdefault(_method(row, named), []).append(row)
    for method, rows in sorted(groups.items()):
        model, judge = models.get(rows[0]["explanation_id"]), rows[0]["judge"]
        page.scores.append(
            {
                "letter": _letter(named, rows[0]["explanation_id"]),
                "scorer": scorers[method[4]],
                "judge": judge,
                "negatives": method[3],
                "same_model": model is not None and model == judge,
                "unknown": any(row["disjoint"] == "unknown" for row in rows),
                "rows": [_score(row, controls.get(_metric(row), {})) for row in sorted(rows, key=_headline_first)],
            }
        )
    page.has_control = any(_main(beside) for beside in controls.values())
    page.same_model = tuple(sorted({group["judge"] for group in page.scores if group["same_model"]}))


def _method(row: Row, named: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
    """What rows of one verdict set share, in the order they are shown."""
    order = _order(named, row["explanation_id"])
    return (
        order,
        row["scorer"],
        row["judge"] or "",
        row["negatives"] or "",
        row["scorer_id"] or "",
        row["explanation_id"] or "",
    )


def _headline_first(row: Row) -> tuple[Any, ...]:
    return (not row["is_headline"], row["metric"])


def _score(row: Row, controls: Mapping[str, float]) -> dict[str, Any]:
    value, (beside, name) = row["value"], _main(controls) or (None, None)
    domain = domain_of([value, row["ci_low"], row["ci_high"], row["chance"], beside])
    unscored = {reason: row.get(f"num_{reason}") or 0 for reason in UNSCORED}
    return {
        **row,
        "control_value": beside,
        "control_name": name,
        "floors": {name: controls[name] for name in FLOORS if name in controls},
        "lift": value - beside if value is not None and beside is not None else None,
        "bar": interval_bar(
            value, row["ci_low"], row["ci_high"], chance=row["chance"], control=beside, domain=domain, width=124
        ),
        "unscored": {reason: count for reason, count in unscored.items() if count},
        "why": row.get("reason") or STATUS_WORDS.get(row["status"], row["status"]),
    }


def _plots(
    page: Page, named: Sequence[Mapping[str, Any]], own: Sequence[Row], controls: _Controls, scorers: Mapping[str, str]
) -> None:
    by_metric: dict[str, dict[tuple[Any, ...], list[Row]]] = {}
    for row in own:
        if row["quantile"] is not None and row["quantile"] >= 0 and row["value"] is not None:
            by_metric.setdefault(row["metric"], {}).setdefault(_method(row, named), []).append(row)
    for metric, methods in sorted(by_metric.items()):
        curves = [_curve(rows, named, controls, scorers) for _, rows in sorted(methods.items())][:MAX_CURVES]
        levels = {row["chance"] for rows in methods.values() for row in rows if row["chance"] is not None}
        chance = levels.pop() if len(levels) == 1 else None
        page.plots.append(
            {
                "metric": metric,
                "svg": quantile_plot(curves, chance=chance, label=f"{metric} by activation quantile"),
                "names": [curve.name for curve in curves],
                "has_control": any(curve.control for curve in curves),
            }
        )


def _curve(rows: Sequence[Row], named: Sequence[Mapping[str, Any]], controls: _Controls, scorers: Mapping[str, str]) -> Curve:
    rows = sorted(rows, key=lambda row: int(row["quantile"]))
    letter = _letter(named, rows[0]["explanation_id"])
    return Curve(
        name=f"{letter} {scorers[rows[0]['scorer_id'] or '']}".strip(),
        points=[(int(row["quantile"]), row["value"], row["ci_low"], row["ci_high"]) for row in rows],
        control=[(int(row["quantile"]), main[0]) for row in rows if (main := _main(controls.get(_metric(row), {})))],
    )


def _marks(
    verdicts: Iterable[Row], named: Sequence[Mapping[str, Any]], judges: Mapping[str, str], scorers: Mapping[str, str]
) -> dict[tuple[int, str], tuple[Mark, ...]]:
    ordered = sorted(
        verdicts, key=lambda row: (_order(named, row["explanation_id"]), row["scorer"], row["scorer_id"], row["example_idx"])
    )
    found: dict[tuple[int, str], list[Mark]] = {}
    for row in ordered:
        # Scorers that rank windows or predict every token say neither yes nor no.
        if row["answer"] is not None or row["status"] != "ok":
            found.setdefault((row["position"], row["source"]), []).append(_mark(row, named, judges, scorers))
    return {key: tuple(marks) for key, marks in found.items()}


def _mark(row: Row, named: Sequence[Mapping[str, Any]], judges: Mapping[str, str], scorers: Mapping[str, str]) -> Mark:
    scorer = scorers.get(row["scorer_id"], row["scorer"])
    name = " ".join(word for word in (_letter(named, row["explanation_id"]), scorer) if word)
    if row["source"] == "shuffled_highlight":
        name += " (other tokens marked)"
    judge = judges.get(row["scorer_id"]) or "the judge"
    said = f", probability {row['probability']:.2f}" if row["probability"] is not None else ""
    if row["answer"] is None:
        return Mark(f"{name}: {row['status']}", "none", f"no verdict: {STATUS_WORDS.get(row['status'], row['status'])}")
    if row["answer"] == row["truth"]:
        return Mark(name, "right", f"{judge} was right: {'yes' if row['answer'] else 'no'}{said}")
    if row["truth"]:
        return Mark(f"{name}: missed", "miss", f"{judge} said no, and the latent fires here{said}")
    wrong = (
        "the marked tokens are not the ones it fires on"
        if row["source"] == "shuffled_highlight"
        else "the latent is silent here"
    )
    return Mark(f"{name}: false alarm", "alarm", f"{judge} said yes, and {wrong}{said}")


def _one_selection(examples: Sequence[Row], named: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Windows of the selection that the first explanation was made from; another may hold the same windows again."""
    present = {row["selection_id"] for row in examples}
    wanted = [row["selection_id"] for row in named if row["selection_id"] in present] or sorted(present, key=str)
    return [row for row in examples if row["selection_id"] == wanted[0]] if wanted else []


def _windows(page: Page, examples: Sequence[Row], marks: Mapping[tuple[int, str], tuple[Mark, ...]], max_examples: int) -> None:
    seen = [_seen(row, marks) for row in examples]
    page.scale = max((window.peak for window in seen), default=0.0)
    positives: dict[int, dict[str, list[_Seen]]] = {}
    silent: list[_Seen] = []
    for window in seen:
        if window.row["source"] == "positive":
            positives.setdefault(int(window.row["quantile"]), {}).setdefault(window.row["pool"], []).append(window)
        elif window.row["pool"] != "explain":
            silent.append(window)
    each = max(1, max_examples // max(1, len(positives)))
    more: list[_Seen] = []
    for quantile, pools in sorted(positives.items()):
        everything = [window for pool in sorted(pools) for window in pools[pool]]
        shown = [window for pool in sorted(pools) for window in pools[pool][:each]]
        more += [window for pool in sorted(pools) for window in pools[pool][each:] if window.wrong]
        page.num_missed += sum(bool(window.wrong) for window in everything)
        page.quantiles.append(
            {
                "quantile": quantile,
                "top": max(window.peak for window in everything),
                "windows": [_window(window, page.scale) for window in shown],
                "num": len(everything),
            }
        )
    page.more_missed = [_window(window, page.scale) for window in more[:max_examples]]
    page.num_silent, page.num_alarms = len(silent), sum(bool(window.wrong) for window in silent)
    silent.sort(key=lambda window: not window.wrong)
    page.silent = [_window(window, page.scale) for window in silent[:max_examples]]


@dataclass(frozen=True)
class _Seen:
    """A window before anything is rendered: few of them are shown."""

    row: Row
    peak: float
    marks: tuple[Mark, ...]
    wrong: str


def _seen(row: Row, marks: Mapping[tuple[int, str], tuple[Mark, ...]]) -> _Seen:
    found: tuple[Mark, ...] = ()
    if row["pool"] != "explain":
        found = marks.get((row["position"], row["source"]), ())
        if row["source"] == "positive":
            found += marks.get((row["position"], "shuffled_highlight"), ())
    wrong = next((mark.kind for mark in found if mark.kind in ("miss", "alarm")), "")
    return _Seen(row, max((abs(a) for a in row["activations"]), default=0.0), found, wrong)


def _window(seen: _Seen, scale: float) -> Window:
    row = seen.row
    return Window(
        html=window_html(row["pieces"], row["activations"], scale),
        pool=row["pool"],
        title=f"document {row['document']}, position {row['position']}",
        source=row["source"],
        marks=seen.marks,
        wrong=seen.wrong,
    )
