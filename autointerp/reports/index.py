"""Turns an overview into what the index shows: headline rows, plots, coverage, picks and the data of the table of latents."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from autointerp.digest import short
from autointerp.reports import svg
from autointerp.reports.pages import STATUS_WORDS
from autointerp.reports.source import FLOORS, Key
from autointerp.reports.summary import Overview, Series, SeriesKey, middle, picks
from autointerp.reports.text import json_for_html, one_line, visible
from autointerp.stats import summarise

TEXT_CHARACTERS = 280
"""Longest explanation in the table of latents."""
_ID = re.compile(r"-[0-9a-f]{8}$")


def coder_folder(coder: str) -> str:
    """Return a coder's name as a folder that needs no quoting in links: other characters become ``~`` and their hex code."""
    name = re.sub(r"[^A-Za-z0-9._-]", lambda match: f"~{ord(match.group()):x}", coder)
    return name if name.strip(".") else name.replace(".", "~2e") or "~"


def short_names(labels: Sequence[str]) -> dict[str, str]:
    """Return explainers' folder names without their digest wherever that stays unambiguous."""
    plain = Counter(_ID.sub("", label) for label in set(labels))
    return {label: _ID.sub("", label) if plain[_ID.sub("", label)] == 1 else label for label in labels}


def series_names(keys: Sequence[SeriesKey]) -> list[str]:
    """Return a short name of each series: its scorer, and as many of its other parts as set it apart."""
    explainers = short_names([key.explainer for key in keys])
    parts = [
        (key.scorer, explainers[key.explainer], key.metric, key.negatives, key.judge, short(key.scorer_id)) for key in keys
    ]
    used = [0]
    for i in range(1, 6):
        named = {tuple(row[j] for j in used) for row in parts}
        if len({tuple(row[j] for j in [*used, i]) for row in parts}) > len(named):
            used.append(i)
    return [" ".join(row[j] for j in used) for row in parts]


def headline_rows(found: Overview, *, plots: bool = True) -> list[dict[str, Any]]:
    """Return one row per coder and series; `plots` adds the drawings.

    ``settings`` is the start of the `scorer_id` where scorers of one name, judge and metric differ in nothing else.
    """
    explainers = short_names(found.explainers())
    names = dict(zip(found.series, series_names(list(found.series)), strict=True))
    alike = Counter(replace(key, scorer_id="") for key in found.series)
    rows = []
    for coder in found.coders:
        for key, by_coder in found.series.items():
            if coder in by_coder:
                series = by_coder[coder]
                explainer = explainers.get(key.explainer, key.explainer)
                row = _headline_row(found, coder, key, series, explainer) | {"name": names[key]}
                if alike[replace(key, scorer_id="")] > 1:
                    row["settings"] = short(key.scorer_id)
                rows.append(row | _plots(found, coder, row, series) if plots else row)
    return rows


def _headline_row(found: Overview, coder: str, key: SeriesKey, series: Series, explainer: str) -> dict[str, Any]:
    scored = series.scored
    return {
        "coder": coder,
        "control_of": found.control_of.get(coder, ""),
        "explainer": explainer,
        "scorer": key.scorer,
        "settings": "",
        "judge": key.judge,
        "metric": key.metric,
        "negatives": key.negatives,
        "same_model": key.judge in found.models.get(key.explainer, ()),
        "num_unknown": int((scored["disjoint"] == "unknown").sum()),
        "num_scored": len(scored),
        "num_rows": len(series.frame),
        "median": middle(scored["value"]),
        "control": middle(scored["control"]),
        "control_name": series.control_name,
        "lift": middle(scored["value"] - scored["control"]),
        "floors": [
            {"name": name, "num": int(scored[name].notna().sum()), "lift": lift}
            for name in FLOORS
            if (lift := middle(scored["value"] - scored[name])) is not None
        ],
        **_means(found, coder, scored),
        "shared": _shared(found, coder, key, scored),
        "chance": series.chance,
    }


def _shared(found: Overview, coder: str, key: SeriesKey, scored: pd.DataFrame) -> dict[str, Any] | None:
    """Return the median over the latents that have a score against every source of negatives; None where all have.

    Medians against other sources are of other latents, and cannot be compared, where a latent has no windows of one.
    """
    sources = [by[coder].scored.index for other, by in found.series.items() if coder in by and _twins(key, other)]
    sources = [latents for latents in sources if len(latents)]
    both = scored.index
    for latents in sources:
        both = both.intersection(latents)
    if not len(scored) or all(len(latents) == len(both) for latents in sources):
        return None
    return {"num": len(both), "num_sources": len(sources), "median": middle(scored["value"].loc[both])}


def _twins(key: SeriesKey, other: SeriesKey) -> bool:
    """Whether two series differ in nothing but the source of negatives."""
    return replace(other, negatives=key.negatives) == key


def _means(found: Overview, coder: str, scored: pd.DataFrame) -> dict[str, Any]:
    """Return the mean over latents, each counted once, and weighted by how often it fires where that is known."""
    rates = pd.Series(found.density.get(coder, {}), dtype=float).reindex(scored.index)
    known = rates.notna().all() and len(rates) > 0
    summary = summarise(scored["value"].tolist(), weights=rates.tolist() if known else None)
    return {"mean": summary.mean, "weighted": summary.weighted_mean}


def _plots(found: Overview, coder: str, row: Mapping[str, Any], series: Series) -> dict[str, Any]:
    scored, chance = series.scored, series.chance
    if row["median"] is None:
        return {"bar": None, "histogram": None, "scatter": None}
    values = scored["value"].to_numpy(float)
    control = row["control"].value if row["control"] else None
    low, high = _finite(row["median"].low), _finite(row["median"].high)
    label = f"{coder}, {row['explainer']}, {row['scorer']}: {row['metric']} over {len(scored)} latents"
    density = pd.Series(found.density.get(coder, {}), dtype=float).reindex(scored.index)
    density = density[density > 0]
    domain = svg.domain_of([*values.tolist(), chance])
    return {
        "bar": svg.interval_bar(row["median"].value, low, high, chance=chance, control=control, domain=domain),
        "histogram": svg.histogram(values, scored["control"].dropna().to_numpy(float), chance=chance, label=label),
        "scatter": svg.scatter(
            density.to_numpy(float),
            scored["value"].loc[density.index].to_numpy(float),
            chance=chance,
            label=f"{label}, against the share of tokens a latent fires on",
        )
        if len(density)
        else None,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def coverage_rows(found: Overview) -> list[dict[str, Any]]:
    """Return, for each coder and method, how many latents have a result and why the others have none."""
    names = short_names(found.explainers())
    scored_by = dict(zip(found.series, series_names(list(found.series)), strict=True))
    rows = []
    for coder in found.coders:
        latents = found.requested[coder]
        for label in found.explainers():
            statuses = found.explained.get((coder, label), {})
            stage = f"explained: {names[label]}"
            rows.append(_coverage_row(coder, stage, Counter(statuses.get(int(i), "planned") for i in latents)))
        for key, by_coder in found.series.items():
            frame = by_coder[coder].frame if coder in by_coder else pd.DataFrame({"status": []})
            counts = Counter(frame["status"].reindex(latents).fillna("explained").tolist())
            rows.append(_coverage_row(coder, f"scored: {scored_by[key]}", counts))
    return rows


def _coverage_row(coder: str, stage: str, counts: Counter[str]) -> dict[str, Any]:
    planned = sum(counts.values())
    left = {"planned": "not explained yet", "explained": "not scored yet"}
    without = sorted((left.get(status, status), count) for status, count in counts.items() if status != "ok")
    return {
        "coder": coder,
        "stage": stage,
        "planned": planned,
        "ok": counts["ok"],
        "without": without,
        "bar": _share(counts["ok"], planned),
    }


def _share(part: int, whole: int) -> Markup:
    width = round(80 * part / whole) if whole else 0
    return Markup(
        '<svg class="share" width="80" height="8" viewBox="0 0 80 8" aria-hidden="true">'
        '<rect class="track" width="80" height="8" rx="3"/>'
        f'<rect class="dot" width="{width}" height="8" rx="3"/></svg>'
    )  # numbers only


def pool_rows(found: Overview) -> list[dict[str, Any]]:
    """Return, for each coder, how many scored latents have pools parted by which unit."""
    rows = []
    for coder in found.coders:
        frames = [by_coder[coder].scored["disjoint"] for by_coder in found.series.values() if coder in by_coder]
        if frames:
            units = pd.concat(frames).groupby(level=0).first()
            rows.append({"coder": coder, "counts": sorted(units.value_counts().items())})
    return rows


def density_rows(found: Overview) -> list[dict[str, Any]]:
    """Return coverage and median scores by decade of the firing rate."""
    rows = []
    for coder in found.coders:
        rates = found.density.get(coder, {})
        latents = [int(i) for i in found.requested[coder] if rates.get(int(i), 0) > 0]
        decades: dict[int, list[int]] = {}
        for latent in latents:
            decades.setdefault(math.floor(math.log10(rates[latent])), []).append(latent)
        for decade, members in sorted(decades.items()):
            frames = [by[coder].frame.reindex(members) if coder in by else None for by in found.series.values()]
            medians = [middle(frame["value"]) if frame is not None else None for frame in frames]
            ok = sum(found.status(coder, latent) == "ok" for latent in members)
            rows.append(
                {
                    "coder": coder,
                    "range": f"1e{decade} to 1e{decade + 1}",
                    "num": len(members),
                    "ok": ok,
                    "bar": _share(ok, len(members)),
                    "medians": [median.value if median else None for median in medians],
                }
            )
    return rows


def pick_groups(found: Overview, texts: Mapping[Key, Sequence[str | None]]) -> tuple[list[dict[str, Any]], str]:
    """Return best, worst and random latents by the first series, of those that have pages; and that series in words."""
    if not found.series:
        return [], ""
    key, by_coder = next(iter(found.series.items()))
    groups = []
    for title, group in (("Best", "best"), ("Worst", "worst"), ("Random", "random")):
        latents = [
            {
                "coder": visible(coder),
                "latent": latent,
                "value": float(series.frame["value"][latent]),
                "href": f"latents/{coder_folder(coder)}/{latent}.html",
                "text": next((text for text in texts[coder, latent] if text), "-"),
            }
            for coder, series in sorted(by_coder.items())
            for latent in picks(series, coder)[group]
            if (coder, latent) in texts
        ]
        if latents:
            groups.append({"title": title, "latents": latents})
    name = short_names(found.explainers()).get(key.explainer, key.explainer)
    return groups, f"{key.scorer} {key.metric} of {name} explanations, judge {key.judge}"


def table_data(found: Overview, chosen: Sequence[Key], texts: Mapping[Key, Sequence[str | None]]) -> Markup:
    """Return the table of latents by column, as JSON for the page's script."""
    coders = found.coders
    number = {coder: i for i, coder in enumerate(coders)}
    keys = list(found.series)
    status = [found.status(coder, latent) for coder, latent in chosen]
    statuses = sorted(set(status), key=lambda word: (word != "ok", word))
    names = short_names(found.explainers())
    return json_for_html(
        {
            "coders": [visible(coder) for coder in coders],
            "folders": [coder_folder(coder) for coder in coders],
            "statuses": statuses,
            "words": {word: STATUS_WORDS.get(word, word) for word in statuses},
            "explainers": [visible(names[label]) for label in found.explainers()],
            "series": [_series_data(found, key, name) for key, name in zip(keys, series_names(keys), strict=True)],
            "has_density": any(found.density.values()),
            "rows": {
                "coder": [number[coder] for coder, _ in chosen],
                "latent": [latent for _, latent in chosen],
                "density": [_rounded(found.density.get(coder, {}).get(latent), 7) for coder, latent in chosen],
                "status": [statuses.index(word) for word in status],
                "texts": [list(texts[key]) for key in chosen],
                "values": [_values(found.series[key], chosen) for key in keys],
            },
        }
    )


def _series_data(found: Overview, key: SeriesKey, name: str) -> dict[str, Any]:
    by_coder = found.series[key]
    chances = {series.chance for series in by_coder.values()}
    values = [value for series in by_coder.values() for value in series.scored["value"].tolist()]
    explainer = short_names(found.explainers()).get(key.explainer, key.explainer)
    title = f"{key.scorer} {key.metric}, {explainer}, judge {key.judge}, {key.negatives} negatives"
    return {
        "name": visible(name),
        "title": visible(title),
        "chance": chances.pop() if len(chances) == 1 else None,
        "domain": list(svg.domain_of(values)),
    }


def _values(by_coder: Mapping[str, Series], chosen: Sequence[Key]) -> list[list[float | None]]:
    """Value, interval and control of each chosen latent, by column."""
    columns = ("value", "ci_low", "ci_high", "control")
    out: list[list[float | None]] = [[None] * len(chosen) for _ in columns]
    places: dict[str, list[int]] = {}
    for i, (coder, _) in enumerate(chosen):
        places.setdefault(coder, []).append(i)
    for coder, series in by_coder.items():
        where = places.get(coder, [])
        frame = series.frame.reindex([chosen[i][1] for i in where])
        for column, values in zip(columns, out, strict=True):
            for i, value in zip(where, frame[column].to_numpy(np.float64).tolist(), strict=True):
                values[i] = _rounded(value, 4)
    return out


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, digits)


def table_texts(labels: Sequence[str], explanations: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """Return a latent's explanation by each explainer, short and harmless; None where there is none."""
    by_label: dict[str, str] = {}
    for row in explanations:
        if row["status"] == "ok" and row["text"]:
            by_label.setdefault(row["label"], one_line(row["text"], TEXT_CHARACTERS))
    return [by_label.get(label) for label in labels]
