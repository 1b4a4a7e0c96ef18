"""What the index says about a folder as a whole: headline scores beside their controls, coverage, and which latents to look at.

One pass over plan, explanations and scores, kept as arrays: a few bytes per latent and series, whatever the texts weigh.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from autointerp.digest import hash64, seed_of
from autointerp.reports.source import FLOORS, Key, Source, explainer_label
from autointerp.stats import Interval, median_order

PICKS = 5

_SCORE_COLUMNS = (
    "coder", "latent", "explainer", "scorer", "scorer_id", "base_id", "judge", "negatives", "metric", "control", "is_headline",
    "quantile", "status", "value", "ci_low", "ci_high", "chance", "disjoint",
)  # fmt: skip
_EXPLANATION_COLUMNS = ("coder", "latent", "explainer", "explainer_id", "status", "model", "origin", "density")


@dataclass(frozen=True)
class SeriesKey:
    """One headline metric of one scorer over the explanations of one explainer, for every coder."""

    explainer: str
    """Folder name of the explainer, or its plain name where the tables lie in one folder."""
    scorer: str
    judge: str
    negatives: str
    metric: str
    scorer_id: str
    """Parts scorers of one name with other settings."""


@dataclass(frozen=True)
class Series:
    """The headline scores of one coder in one series, a row per latent; several samples of a latent are averaged."""

    frame: pd.DataFrame
    """Indexed by latent: value, ci_low, ci_high, chance, status, disjoint, control (value under the control), and one column
    for each of `FLOORS` (value under it, missing where it was not run)."""
    control_name: str | None

    @property
    def scored(self) -> pd.DataFrame:
        """The rows with a value."""
        return self.frame[self.frame["value"].notna()]

    @property
    def chance(self) -> float | None:
        """The chance level, where all rows agree on one."""
        levels = self.frame["chance"].dropna().unique()
        return float(levels[0]) if len(levels) == 1 else None


@dataclass
class Overview:
    """Everything the index needs but the texts."""

    requested: dict[str, np.ndarray] = field(default_factory=dict)
    """Latents of each coder that have a page, sorted: the requested ones, and any with rows outside the plan."""
    partners: Counter[str] = field(default_factory=Counter)
    """Latents explained only because a control needs them, by coder."""
    unplanned: bool = False
    explained: dict[tuple[str, str], dict[int, str]] = field(default_factory=dict)
    """Status of each latent's explanation by (coder, explainer): ``ok`` when any sample is."""
    models: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Models that wrote for each explainer."""
    series: dict[SeriesKey, dict[str, Series]] = field(default_factory=dict)
    """Scores by series, then by coder."""
    density: dict[str, dict[int, float]] = field(default_factory=dict)
    control_of: dict[str, str] = field(default_factory=dict)
    """The coder that each control is of, by the control's name."""

    @property
    def coders(self) -> list[str]:
        """All coders, sorted; a control follows the coder it is of."""
        return sorted(self.requested, key=lambda name: (self.control_of.get(name, name), name in self.control_of, name))

    @property
    def num_latents(self) -> int:
        """Latents that could have a page."""
        return sum(len(latents) for latents in self.requested.values())

    def explainers(self) -> list[str]:
        """Folder names of all explainers, sorted."""
        return sorted({label for _, label in self.explained} | {key.explainer for key in self.series} - {"latent"})

    def status(self, coder: str, latent: int) -> str:
        """Return one word for a latent: ``ok`` when scored, else why not; ``explained`` or ``planned`` when work is left."""
        scores = [by[coder].frame["status"].get(latent) for by in self.series.values() if coder in by]
        found = [str(status) for status in scores if status is not None]
        if "ok" in found:
            return "ok"
        texts = [rows[latent] for (name, _), rows in self.explained.items() if name == coder and latent in rows]
        if texts and "ok" not in texts:
            return texts[0]
        return found[0] if found else "explained" if texts else "planned"


def overview(source: Source) -> Overview:
    """Read plan, explanations and headline scores."""
    result = Overview()
    seen: dict[str, list[np.ndarray]] = {}
    _read_explanations(source, result, seen)
    _read_scores(source, result, seen)
    _read_plan(source, result, seen)
    return result


def _read_plan(source: Source, result: Overview, seen: Mapping[str, list[np.ndarray]]) -> None:
    planned: dict[str, list[np.ndarray]] = {}
    partners: dict[str, list[np.ndarray]] = {}
    for _, frame in source.frames("plan", ["coder", "latent", "purpose", "control_of"]):
        if "control_of" in frame:
            known = frame[["coder", "control_of"]].dropna().drop_duplicates()
            result.control_of.update(zip(known["coder"].map(str), known["control_of"].map(str), strict=True))
        for (coder, purpose), latents in frame.groupby(["coder", "purpose"])["latent"]:
            (partners if purpose == "partner" else planned).setdefault(str(coder), []).append(latents.to_numpy(np.int64))
    for coder in sorted({*planned, *partners, *seen}):
        wanted = _union(planned.get(coder, []))
        helpers = np.setdiff1d(_union(partners.get(coder, [])), wanted)
        strangers = np.setdiff1d(_union(seen.get(coder, [])), np.union1d(wanted, helpers))
        result.requested[coder] = np.union1d(wanted, strangers)
        result.unplanned |= bool(len(strangers))
        if len(helpers):
            result.partners[coder] = len(helpers)


def _union(parts: Iterable[np.ndarray]) -> np.ndarray:
    arrays = list(parts)
    return np.unique(np.concatenate(arrays)) if arrays else np.zeros(0, np.int64)


def _read_explanations(source: Source, result: Overview, seen: dict[str, list[np.ndarray]]) -> None:
    models: dict[str, set[str]] = {}
    for _, frame in source.frames("explanations", _EXPLANATION_COLUMNS):
        for (coder, name, identity), rows in frame.groupby(["coder", "explainer", "explainer_id"], dropna=False):
            label = explainer_label({"explainer": name, "explainer_id": identity})
            models.setdefault(label, set()).update(rows["model"].dropna())
            statuses = result.explained.setdefault((str(coder), label), {})
            for latent, status in zip(rows["latent"].tolist(), rows["status"].tolist(), strict=True):
                if statuses.get(latent) != "ok":
                    statuses[latent] = status
            seen.setdefault(str(coder), []).append(rows["latent"].to_numpy(np.int64))
            if "density" in rows:
                known = rows[rows["density"].notna()]
                result.density.setdefault(str(coder), {}).update(
                    zip(known["latent"].tolist(), known["density"].tolist(), strict=True)
                )
    result.models = {label: tuple(sorted(names)) for label, names in sorted(models.items())}


def _read_scores(source: Source, result: Overview, seen: dict[str, list[np.ndarray]]) -> None:
    parts: dict[tuple[str, ...], list[pd.DataFrame]] = {}
    for label, frame in source.frames("scores", _SCORE_COLUMNS):
        # A floor may be judged by rule, whose headline can be another metric.
        wanted = frame["is_headline"].fillna(False).astype(bool) | frame["control"].notna()
        kept = frame[wanted & frame["quantile"].isna()]
        if "base_id" not in kept:  # a folder from before the first release
            kept = kept.assign(base_id=kept["scorer_id"])
        by = ["coder", "explainer", "scorer", "judge", "negatives", "metric", "scorer_id", "base_id", "control"]
        for group, rows in kept.groupby(by, dropna=False):
            coder, explainer, *rest, control = ("" if isinstance(v, float) else str(v) for v in group)
            parts.setdefault((coder, label or explainer, *rest, control), []).append(rows)
            if not control:
                seen.setdefault(coder, []).append(rows["latent"].to_numpy(np.int64))
    controls: dict[tuple[str, ...], list[tuple[str, pd.Series]]] = {}
    for (coder, label, _, _, negatives, metric, _, base_id, control), frames in sorted(parts.items()):
        if control:
            rows = pd.concat(frames)
            values = rows[rows["value"].notna()].groupby("latent")["value"].mean()
            controls.setdefault((coder, label, negatives, metric, base_id), []).append((control, values))
    for (coder, label, scorer, judge, negatives, metric, scorer_id, base_id, control), frames in sorted(parts.items()):
        if not control:
            key = SeriesKey(label, scorer, judge, negatives, metric, scorer_id)
            beside = controls.get((coder, label, negatives, metric, base_id), [])
            result.series.setdefault(key, {})[coder] = _series(pd.concat(frames), beside)


def _series(rows: pd.DataFrame, controls: Sequence[tuple[str, pd.Series]]) -> Series:
    """`controls`: name and values by latent of each control of this very scorer."""
    # Per latent: a row with a value before one without, and samples averaged.
    rows = rows.sort_values(["latent", "value"], kind="stable", na_position="last")
    grouped = rows.groupby("latent")
    frame = grouped[["value", "ci_low", "ci_high", "chance"]].mean()
    frame[["status", "disjoint"]] = grouped[["status", "disjoint"]].first()
    main = [name for name, _ in controls if name not in FLOORS]
    frame["control"] = _together([values for name, values in controls if name in main])
    for floor in FLOORS:
        frame[floor] = _together([values for name, values in controls if name == floor])
    return Series(frame.sort_index(), main[0] if main else None)


def _together(values: Sequence[pd.Series]) -> Any:
    """Return the mean value by latent; NaN without any."""
    return pd.concat(values).groupby(level=0).mean() if values else np.nan


def middle(values: pd.Series) -> Interval | None:
    """Return the median over latents with its interval (limits NaN for a handful of latents), or None of no values."""
    data = values.dropna().to_numpy(np.float64)
    return median_order(data) if len(data) else None


def seeded_order(coder: str, latents: np.ndarray) -> np.ndarray:
    """Return the latents in an order that looks random and never changes, whatever other latents there are."""
    keys = hash64(seed_of("report", coder), np.asarray(latents, np.uint64))
    return np.asarray(latents)[np.lexsort((latents, keys))]


def picks(series: Series, coder: str, num: int = PICKS) -> dict[str, list[int]]:
    """Return the best, the worst and random scored latents; no latent twice."""
    scored = series.scored
    order = np.lexsort((scored.index.to_numpy(), -scored["value"].to_numpy()))
    ranked = scored.index.to_numpy()[order].tolist()
    size = min(num, len(ranked) // 3 or 1)
    best = ranked[:size]
    worst = [latent for latent in ranked[::-1][:size] if latent not in best]
    rest = [int(latent) for latent in seeded_order(coder, scored.index.to_numpy(np.int64)) if latent not in {*best, *worst}]
    return {"best": best, "worst": worst, "random": rest[:size]}


def choose(found: Overview, limit: int | None) -> list[Key]:
    """Return the latents that get a page: all, or `limit`: the picks of the first series, then others in seeded order."""
    everyone = [(coder, int(latent)) for coder in found.coders for latent in found.requested[coder]]
    if limit is None or len(everyone) <= limit:
        return everyone
    first: list[Key] = []
    for by_coder in list(found.series.values())[:1]:
        for coder, series in by_coder.items():
            first.extend((coder, latent) for group in picks(series, coder).values() for latent in group)
    orders = {coder: seeded_order(coder, found.requested[coder]).tolist() for coder in found.coders}
    longest = max(map(len, orders.values()))
    turns = [(coder, orders[coder][i]) for i in range(longest) for coder in orders if i < len(orders[coder])]
    return sorted(list(dict.fromkeys([*first, *turns]))[:limit])
