"""Result tables as pandas data frames, all methods of a folder together, and the summary people look at first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from autointerp import tables
from autointerp.results.folder import ResultsFolder
from autointerp.stats import summarise
from autointerp.store import open_store

_GROUP = ["coder", "explainer", "scorer", "judge", "control", "negatives", "metric", "scorer_id", "base_id"]
_INTERVALS = [f"{name}{end}" for name in ("median", "mean", "weighted_mean") for end in ("", "_low", "_high")]
_SUMMARY = ["is_headline", "num_latents", "num_missing", *_INTERVALS, "chance"]


def load_explanations(folder: Path | str) -> pd.DataFrame:
    """Return all committed explanations, one row each, sorted by coder and latent.

    Raises: StoreError when `folder` is no results folder.
    """
    return _load(folder, "explanations", ["coder", "latent", "explainer_id", "sample"])


def load_verdicts(folder: Path | str, *, columns: list[str] | None = None) -> pd.DataFrame:
    """Return all committed verdicts, one row per judged example; `columns` keeps big folders small.

    Raises: StoreError when `folder` is no results folder.
    """
    return _load(folder, "verdicts", ["coder", "latent", "scorer_id", "explanation_id", "example_idx"], columns=columns)


def load_scores(folder: Path | str) -> pd.DataFrame:
    """Return all committed scores, one row per metric of a (latent, explanation, scorer).

    Raises: StoreError when `folder` is no results folder.
    """
    frame = _load(folder, "scores", ["coder", "latent", "scorer_id", "explanation_id", "metric"])
    # A folder from before the first release may lack the column.
    return frame.assign(base_id=frame.get("base_id", frame["scorer_id"]).fillna(frame["scorer_id"]))


def load_examples(folder: Path | str) -> pd.DataFrame:
    """Return the windows that were shown and scored, with their text and activations."""
    return _load(folder, "examples", ["coder", "latent", "pool", "source", "quantile", "position"])


def load_failures(folder: Path | str) -> pd.DataFrame:
    """Return what went wrong, one row per latent and method."""
    return _load(folder, "failures", ["coder", "latent", "stage", "method"])


def _load(folder: Path | str, table: str, order: list[str], *, columns: list[str] | None = None) -> pd.DataFrame:
    root = ResultsFolder.open(folder).path / table
    schema: Any = getattr(tables, table.upper())
    frames = []
    # By file, not by folder: a file that is replaced while this runs is read whole, before or after.
    for path in sorted(p for p in root.rglob("*.parquet") if not p.name.startswith(".")):
        frames.append(_frame(tables.read_parquet(path, columns=columns)))
    if not frames:
        return _frame(schema.empty_table() if columns is None else schema.empty_table().select(columns))
    frame = pd.concat([f for f in frames if len(f)] or frames[:1], ignore_index=True)
    return frame.sort_values([name for name in order if name in frame.columns], kind="stable", ignore_index=True)


def _frame(table: Any) -> pd.DataFrame:
    """Return an Arrow table as a frame whose columns keep their types where values are missing."""
    types: dict[str, Any] = {"int16": pd.Int16Dtype(), "bool": pd.BooleanDtype(), "string": pd.StringDtype()}
    frame: pd.DataFrame = table.to_pandas(types_mapper=lambda kind: types.get(str(kind)))
    return frame


def summary(folder: Path | str) -> pd.DataFrame:
    """Return one row per coder, scorer and its settings (`scorer_id`), control, source of negatives and metric.

    A scorer and its controls share `base_id`.

    Medians and means are over latents with 95% intervals for more latents of the kind, whatever the number of examples each
    had; ``weighted_mean`` counts each latent by the share of tokens it fires on, where the explanations table says.
    ``num_latents`` had a value, ``num_missing`` had none, whatever the reason. Metrics by quantile are left out.
    """
    frame = load_scores(folder)
    frame = frame[frame["quantile"].isna()]
    explained = load_explanations(folder)
    rates = dict(
        zip(zip(explained["coder"], explained["latent"], strict=True), explained["density"].astype(float), strict=True)
    )
    frame = frame.assign(density=[rates.get(key, np.nan) for key in zip(frame["coder"], frame["latent"], strict=True)])
    frame = frame.assign(control=frame["control"].fillna("none"))
    rows = [dict(zip(_GROUP, key, strict=True)) | _summary_row(group) for key, group in frame.groupby(_GROUP, sort=True)]
    return pd.DataFrame(rows, columns=[*_GROUP, *_SUMMARY])


def _summary_row(group: pd.DataFrame) -> dict[str, Any]:
    values = [None if pd.isna(value) else float(value) for value in group["value"]]
    weights = group["density"].tolist() if group["density"].notna().all() else None
    found = summarise(values, latents=group["latent"].tolist(), weights=weights)
    chance = group["chance"].dropna().unique()
    row: dict[str, Any] = {
        "is_headline": bool(group["is_headline"].any()),
        "num_latents": found.num_latents,
        "num_missing": found.num_missing,
        "chance": float(chance[0]) if len(chance) == 1 else None,
    }
    for name in ("median", "mean", "weighted_mean"):
        interval = getattr(found, name)
        row[name] = interval.value if interval else None
        row[f"{name}_low"] = interval.low if interval else None
        row[f"{name}_high"] = interval.high if interval else None
    return row


def coverage(folder: Path | str, *, store: Path | str | None = None) -> pd.DataFrame:
    """Return how many requested latents of each decile of firing rate were explained and scored, and why others were not.

    Deciles are those of the live latents of the coder, 0 the rarest; silent latents have decile -1. One row per coder, decile,
    method (folder name) and source of negatives (``none`` for explanations), with ``num_rows`` and a column per status: a
    latent that is scored against random windows may have none of another source. `store`: where the densities are; None = the
    store that the folder was made from.
    """
    opened = ResultsFolder.open(folder)
    plan = _load(folder, "plan", ["coder", "latent"])
    requested = plan.loc[plan["purpose"] == "requested", ["coder", "latent"]]
    densities = open_store(store or Path(opened.provenance()["store"]))
    explanations, scores = load_explanations(folder), load_scores(folder)
    first = scores[scores["is_headline"] & scores["quantile"].isna()]
    explanations = explanations.assign(negatives="none")
    stages = [(m.label, explanations[explanations["explainer_id"] == m.id]) for m in opened.methods("explain")]
    stages += [(m.label, first[first["scorer_id"] == m.id]) for m in opened.methods("score")]
    frames = []
    for label, rows in stages:
        if not len(rows):
            continue
        # Of several explanations of a latent, and of their scores, the usable one counts: what was not chosen is no gap.
        rows = rows.sort_values("status", key=lambda column: column != "ok", kind="stable")
        rows = rows.drop_duplicates(["coder", "latent", "negatives"]).merge(requested, on=["coder", "latent"])
        for (coder, source), group in rows.groupby(["coder", "negatives"]):
            columns = densities.coder(str(coder)).latents
            decile = density_deciles(np.asarray(columns["density"]))[group["latent"].to_numpy(np.int64)]
            counts = pd.crosstab(decile, group["status"].astype(object))
            counts.insert(0, "num_rows", counts.sum(axis=1))
            frames.append(
                counts.rename_axis("decile").reset_index().assign(coder=str(coder), method=label, negatives=str(source))
            )
    named = ["coder", "method", "negatives", "decile", "num_rows"]
    if not frames:
        return pd.DataFrame(columns=named)
    joined = pd.concat(frames, ignore_index=True)
    statuses = sorted(set(joined.columns) - set(named))
    joined[statuses] = joined[statuses].fillna(0).astype(int)
    return joined[[*named, *statuses]]


def density_deciles(density: np.ndarray) -> np.ndarray:
    """Return the decile of each latent among those that fire, 0 the rarest to 9; -1 for silent ones."""
    found = np.full(len(density), -1, np.int64)
    live = np.flatnonzero(density > 0)
    order = live[np.argsort(density[live], kind="stable")]
    found[order] = np.arange(len(order)) * 10 // max(len(order), 1)
    return found
