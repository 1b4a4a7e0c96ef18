"""What a calibration study found: one table of measures, the same as text, and as a page with a plot.

Everything is read from results folders whose explainers are the roles of :mod:`autointerp.studies.planted`; scores of one
scorer, judge, prompt and settings form a variant. Measures:

- ``auroc``: of scores of true explanations against those of one other role, over the same latents; interval by Newcombe (2006).
- ``wins``: how often a latent's true explanation scores above its other one, ties half; interval by Wilson.
- ``level``: mean score of true explanations at one level of noise; ``spearman``: between share of noise and score, over levels.
- ``shuffled``, ``shuffled_mean``: median and mean score under another latent's explanation, with the chance level.
- ``calibration_error``: mean distance between stated probability and share of active examples in ten bins; ``brier``: mean
  squared distance of the probabilities. True explanations only; for judges that state probabilities.
- ``retest_sd``: standard deviation of one measurement, from the difference of two on other windows.
- ``tokens``: prompt and output tokens per explanation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from autointerp.digest import digest, short
from autointerp.errors import InputError
from autointerp.reports import svg
from autointerp.reports.terminal import table
from autointerp.reports.write import write_page
from autointerp.results.folder import ResultsFolder
from autointerp.results.load import load_scores, load_verdicts
from autointerp.results.write import read_markers
from autointerp.stats import Interval, auroc, auroc_newcombe, mean_t, median_order, wilson
from autointerp.studies.calibrate import retest_folder
from autointerp.studies.plant import EXACT
from autointerp.studies.planted import ROLES, planted_in

COLUMNS = [
    "scorer", "judge", "prompt", "variant", "negatives", "metric", "measure", "family", "role", "noise", "share",
    "value", "ci_low", "ci_high", "ci_method", "chance", "num_latents",
]  # fmt: skip
FILE = "calibration.parquet"
_VARIANT = ["scorer", "judge", "prompt", "variant", "negatives", "metric"]
_BINS = 10


def calibration(results: Path | str) -> pd.DataFrame:
    """Return the measures of a calibration's results folder, one row each; columns that a measure lacks are empty.

    Raises: StoreError when there is no results folder; InputError when it is none of a calibration.
    """
    folder = ResultsFolder.open(results)
    planted = planted_in(folder.provenance()["store"])
    scores = _scores(folder, planted)
    if not len(scores):
        raise InputError(f"{results} holds no scores of planted latents; run `autointerp calibrate` on it")
    again = retest_folder(Path(results))
    repeated = _scores(ResultsFolder.open(again), planted) if (again / "results.json").is_file() else scores.iloc[:0]
    rows: list[dict[str, Any]] = []
    for key, group in scores.groupby(_VARIANT, dropna=False):
        shared = dict(zip(_VARIANT, key, strict=True))
        plain = group[group["control"] == ""]
        measures = [
            *_ranking(plain[plain["coder"] == EXACT]),
            *_noise(plain[plain["role"] == "true"]),
            *_shuffled(group[group["control"] == "shuffled"]),
            *_retest(plain, repeated[(repeated["variant"] == shared["variant"]) & (repeated["control"] == "")], shared),
        ]
        rows += [{**shared, **measure} for measure in measures]
    rows += _probabilities(folder, scores)
    rows += _tokens(folder, scores)
    return pd.DataFrame(rows, columns=COLUMNS)


def _scores(folder: ResultsFolder, planted: dict[str, Any]) -> pd.DataFrame:
    """Return the headline scores with a value, with role, family, noise and variant of each."""
    frame = load_scores(folder.path)
    frame = frame[frame["is_headline"] & frame["quantile"].isna() & frame["explainer"].isin(ROLES)]
    variants = {method.id: _variant(method) for method in folder.methods("score")}
    families = np.array([latent["family"] for latent in planted["latents"]])
    return frame.assign(
        role=frame["explainer"].astype(str),
        family=families[frame["latent"].to_numpy(np.int64)],
        control=frame["control"].fillna("").astype(str),
        prompt=[variants[i][0] for i in frame["scorer_id"]],
        variant=[variants[i][1] for i in frame["scorer_id"]],
        noise=[planted["coders"][coder]["kind"] for coder in frame["coder"]],
        share=[float(planted["coders"][coder]["share"]) for coder in frame["coder"]],
    )


def _variant(method: Any) -> tuple[str, str]:
    """Return the prompt and the settings of a scorer, whatever it grades, as short digests."""
    identity = method.identity
    prompt = identity["settings"].get("prompt")
    named = {"scorer": identity["scorer"], "settings": identity["settings"], "judge": identity["judge"]}
    return short(prompt) if isinstance(prompt, str) else "-", short(digest(named))


def _ranking(rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    by_role = rows.pivot_table(index="latent", columns="role", values="value", aggfunc="mean")
    families = rows.groupby("latent")["family"].first()
    if "true" not in by_role:
        return
    for role in [role for role in ROLES if role in by_role and role != "true"]:
        both = by_role[["true", role]].dropna().astype(float)
        for family in ["all", *sorted(families[both.index].unique())]:
            pairs = both if family == "all" else both[families[both.index] == family]
            num = len(pairs)
            true, other = pairs["true"].to_numpy(), pairs[role].to_numpy()
            shared = {"family": family, "role": role, "num_latents": num, "chance": 0.5}
            yield {"measure": "auroc", **shared, **_interval(auroc_newcombe(auroc(true, other), num, num))}
            won = float((true > other).sum() + 0.5 * (true == other).sum())
            yield {"measure": "wins", **shared, **_interval(wilson(won, num))}


def _noise(rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for kind in ("moved", "missed"):
        levels = rows[(rows["noise"] == kind) | (rows["coder"] == EXACT)].dropna(subset=["value"])
        # Over the same latents at every level, so that none leaves when it has no score under much noise.
        by_level = levels.pivot_table(index="latent", columns="share", values="value", aggfunc="mean").astype(float).dropna()
        if len(by_level) < 2 or len(by_level.columns) < 2:
            continue
        shared = {"family": "all", "role": "true", "noise": kind, "num_latents": len(by_level)}
        for share in by_level:
            yield {"measure": "level", **shared, "share": share, **_interval(mean_t(by_level[share].to_numpy()))}
        if len(by_level.columns) >= 5:
            x = pd.Series(by_level.columns.to_numpy(float))
            value = _spearman(x, by_level.mean().reset_index(drop=True))
            own = np.array([_spearman(x, row.reset_index(drop=True)) for _, row in by_level.iterrows()])
            yield {"measure": "spearman", **shared, "value": value, "ci_method": "none"}
            yield {"measure": "spearman_by_latent", **shared, **_interval(mean_t(own[np.isfinite(own)]))}


def _spearman(x: pd.Series, y: pd.Series) -> float:
    return float(x.rank().corr(y.rank())) if y.nunique() > 1 else math.nan


def _shuffled(rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    values = rows[rows["coder"] == EXACT]["value"].dropna().to_numpy(float)
    if len(values):
        chance = rows["chance"].dropna()
        shared = {"family": "all", "role": "true", "num_latents": len(values)}
        shared["chance"] = float(chance.iloc[0]) if len(chance) else None
        yield {"measure": "shuffled", **shared, **_interval(median_order(values))}
        yield {"measure": "shuffled_mean", **shared, **_interval(mean_t(values))}


def _retest(rows: pd.DataFrame, repeated: pd.DataFrame, shared: dict[str, Any]) -> Iterator[dict[str, Any]]:
    same = repeated[(repeated["negatives"] == shared["negatives"]) & (repeated["metric"] == shared["metric"])]
    by = ["coder", "latent", "role"]
    both = rows.groupby(by)["value"].mean().to_frame("one").join(same.groupby(by)["value"].mean().rename("two")).dropna()
    if len(both) > 1:
        difference = (both["one"] - both["two"]).to_numpy(float)
        # The variance of a difference of two measurements is twice that of one.
        value = float(np.sqrt(np.mean(np.square(difference)) / 2))
        yield {"measure": "retest_sd", "family": "all", "value": value, "ci_method": "none", "num_latents": len(both)}


def _probabilities(folder: ResultsFolder, scores: pd.DataFrame) -> list[dict[str, Any]]:
    columns = ["coder", "scorer_id", "control", "source", "truth", "probability", "status", "latent"]
    frame = load_verdicts(folder.path, columns=columns)
    kept = scores[(scores["role"] == "true") & (scores["coder"] == EXACT)].drop_duplicates("scorer_id").set_index("scorer_id")
    usable = (frame["status"] == "ok") & frame["control"].isna() & frame["probability"].notna() & (frame["coder"] == EXACT)
    rows = []
    for scorer_id, group in frame[usable & frame["scorer_id"].isin(kept.index)].groupby("scorer_id"):
        variant = {name: kept[name].get(scorer_id) for name in ("scorer", "judge", "prompt", "variant")}
        p, truth = group["probability"].to_numpy(float), group["truth"].to_numpy(float)
        place = np.minimum((p * _BINS).astype(int), _BINS - 1)
        count = np.bincount(place, minlength=_BINS)
        gaps = np.abs(np.bincount(place, weights=p - truth, minlength=_BINS))
        shared = {**variant, "negatives": "all", "metric": "probability", "family": "all", "role": "true"}
        shared |= {"ci_method": "none", "num_latents": group["latent"].nunique()}
        rows.append({**shared, "measure": "calibration_error", "value": float(gaps.sum() / count.sum())})
        rows.append({**shared, "measure": "brier", "value": float(np.mean(np.square(p - truth)))})
    return rows


def _tokens(folder: ResultsFolder, scores: pd.DataFrame) -> list[dict[str, Any]]:
    rows = []
    for key, group in scores[scores["control"] == ""].groupby(["scorer", "judge", "prompt", "variant"], dropna=False):
        used, num = 0, 0
        for method in folder.methods("score"):
            if method.id in set(group["scorer_id"]):
                for marker in read_markers(folder, "score", method.label).values():
                    used += marker.usage.get("prompt_tokens", 0) + marker.usage.get("output_tokens", 0)
        num = len(group[["coder", "latent", "scorer_id"]].drop_duplicates())
        shared = dict(zip(("scorer", "judge", "prompt", "variant"), key, strict=True))
        rows.append(
            {**shared, "negatives": "all", "metric": "tokens", "measure": "tokens", "family": "all",
             "value": used / max(num, 1), "ci_method": "none", "num_latents": num}
        )  # fmt: skip
    return rows


def _interval(interval: Interval) -> dict[str, Any]:
    return {"value": interval.value, "ci_low": interval.low, "ci_high": interval.high, "ci_method": interval.method}


@dataclass(frozen=True)
class Section:
    """A table for people."""

    title: str
    note: str
    rows: list[list[str]]
    """The first is the header."""


def sections(frame: pd.DataFrame) -> list[Section]:
    """Return the tables of :func:`calibration` that people look at.

    Where a role's scores have no value for some latents, its own number of latents is in the frame, and the table has the
    greatest.
    """
    ranked = frame[frame["measure"] == "auroc"]
    roles = [role for role in ROLES if role in set(ranked["role"])]
    head = ["scorer", "judge", "prompt", "metric", "negatives"]
    found = [
        Section(
            "True explanations against the others",
            "AUROC over latents, with its 95% interval. 1: every true explanation scores above every other; 0.5: no telling.",
            [[*head, "latents", *roles], *_ranked(ranked[ranked["family"] == "all"], head, roles)],
        )
    ]
    won = frame[(frame["measure"] == "wins") & (frame["family"] == "all")]
    found.append(
        Section(
            "How often the true explanation wins",
            "Share of latents whose true explanation scores above their other one, ties counted half, with its 95% interval.",
            [[*head, "latents", *roles], *_ranked(won, head, roles)],
        )
    )
    lesson = ranked[(ranked["family"] == "topic") & (ranked["role"] == "too_broad")]
    if len(lesson):
        note = (
            "Latents that fire on a topic's words in one context only; the explanation names the topic and forgets the context."
        )
        found.append(
            Section(
                "The topic alone is no explanation, and random negatives do not show it",
                note,
                [[*head, "latents", "too_broad"], *_ranked(lesson, head, ["too_broad"])],
            )
        )
    found += _noise_sections(frame, head)
    wanted = {"shuffled": "shuffled: median", "shuffled_mean": "mean", "retest_sd": "SD of a measurement"}
    lines = []
    for key, rows in frame[frame["measure"].isin(wanted)].groupby(_VARIANT, sort=False):
        named = dict(zip(_VARIANT, key, strict=True))
        by = rows.set_index("measure")
        chance = by["chance"].get("shuffled")
        cells = [_text(by.loc[name]) if name in by.index else "-" for name in wanted]
        lines.append([*(str(named[name]) for name in head), *cells, "-" if pd.isna(chance) else f"{chance:g}"])
    found.append(
        Section(
            "Control and spread",
            "Median and mean score under another latent's explanation; SD of a score, from two measurements.",
            [[*head, *wanted.values(), "chance"], *lines],
        )
    )
    wanted = {"calibration_error": "calibration error", "brier": "Brier score", "tokens": "tokens per explanation"}
    lines = []
    for key, rows in frame[frame["measure"].isin(wanted)].groupby([*head[:3], "variant"], sort=False):
        value = dict(zip(rows["measure"], rows["value"], strict=True))
        cells = [f"{value[n]:.0f}" if n == "tokens" else f"{value[n]:.3f}" if n in value else "-" for n in wanted]
        lines.append([*map(str, key[:3]), *cells])
    found.append(
        Section(
            "Judges", "Probabilities against what is active, under true explanations.", [[*head[:3], *wanted.values()], *lines]
        )
    )
    return found


def _ranked(rows: pd.DataFrame, head: Sequence[str], roles: Sequence[str]) -> list[list[str]]:
    lines = []
    for key, group in rows.groupby(_VARIANT, sort=False):
        named = dict(zip(_VARIANT, key, strict=True))
        by = group.set_index("role")
        num = int(group["num_latents"].max())
        cells = [_text(by.loc[role]) if role in by.index else "-" for role in roles]
        lines.append([*(str(named[name]) for name in head), str(num), *cells])
    return lines


def _noise_sections(frame: pd.DataFrame, head: list[str]) -> list[Section]:
    found = []
    words = {"moved": "moved to random positions", "missed": "missed: the latent is silent where its rule holds"}
    for kind, what in words.items():
        levels = frame[(frame["measure"] == "level") & (frame["noise"] == kind)]
        shares = sorted(levels["share"].unique())
        if not shares:
            continue
        lines = []
        for key, group in levels.groupby(_VARIANT, sort=False):
            named = dict(zip(_VARIANT, key, strict=True))
            by = group.set_index("share")["value"]
            same = (frame["measure"] == "spearman") & (frame["noise"] == kind)
            for name in _VARIANT:
                same &= frame[name] == named[name]
            rho = frame[same]["value"]
            cells = [f"{by[share]:.3f}" if share in by.index else "-" for share in shares]
            lines.append([*(str(named[n]) for n in head), *cells, f"{rho.iloc[0]:+.2f}" if len(rho) else "-"])
        found.append(
            Section(
                f"Noise: a share of the firings {what}",
                "Mean score of true explanations, and Spearman's correlation between share and score.",
                [[*head, *(f"{share:.0%}" for share in shares), "Spearman"], *lines],
            )
        )
    return found


def _text(row: Any) -> str:
    if pd.isna(row["ci_low"]) or pd.isna(row["ci_high"]):
        return f"{row['value']:.3f}"
    return f"{row['value']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"


def text_of(found: list[Section]) -> str:
    """Return the tables for a terminal."""
    parts = []
    for section in found:
        numeric = {i for i, cell in enumerate(section.rows[0]) if i > 2 and cell not in ("metric", "negatives", "prompt")}
        parts.append("\n".join([section.title, section.note, "", *table(section.rows, right=numeric)]))
    return "\n\n".join(parts) + "\n"


def markdown_of(found: list[Section]) -> str:
    """Return the tables as Markdown."""
    parts = []
    for section in found:
        lines = ["| " + " | ".join(row) + " |" for row in section.rows]
        lines.insert(1, "|---" * len(section.rows[0]) + "|")
        parts.append("\n".join([f"## {section.title}", "", section.note, "", *lines]))
    return "\n\n".join(parts) + "\n"


def write_calibration(results: Path | str) -> tuple[pd.DataFrame, Path]:
    """Write the table and the page into ``RESULTS/calibration`` and return the table and the page's path."""
    frame = calibration(results)
    out = Path(results) / "calibration"
    page = write_page(
        out,
        "calibration.html.j2",
        name=Path(results).resolve().name,
        sections=sections(frame),
        plots=list(_plots(frame)),
    )
    frame.to_parquet(out / FILE, index=False)
    return frame, page


def _plots(frame: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield score against noise, a plot for each kind of noise and metric: metrics differ in what chance gives."""
    chances = frame[frame["measure"] == "shuffled"].groupby("metric")["chance"].first()
    for (kind, metric), levels in frame[frame["measure"] == "level"].groupby(["noise", "metric"], sort=False):
        shares = sorted(levels["share"].unique())
        # Every scorer has random negatives, so with them all are seen before any is seen twice.
        variants = sorted(levels.groupby(_VARIANT, sort=False), key=lambda group: group[0][4] != "random")
        curves = []
        for key, group in variants[: svg.MAX_CURVES]:
            ordered = group.sort_values("share")
            numbers = ordered[["value", "ci_low", "ci_high"]].to_numpy(float).tolist()
            points: list[tuple[int, float, float | None, float | None]] = [
                (shares.index(share), value, low, high)
                for share, (value, low, high) in zip(ordered["share"], numbers, strict=True)
            ]
            curves.append(svg.Curve(name=f"{key[0]}, {key[4]} negatives, judge {key[1]}", points=points, control=[]))
        label = f"{str(metric).replace('_', ' ').capitalize()} of true explanations by share of firings {kind}"
        left_out = f" ({len(variants) - len(curves)} more in the table)" if len(variants) > len(curves) else ""
        chance = chances.get(metric)
        drawing = svg.quantile_plot(
            curves,
            chance=None if chance is None or pd.isna(chance) else float(chance),
            label=label,
            ticks=[f"{share:.0%}" for share in shares],
            caption=f"share of firings {kind}",
        )
        yield {"title": label + left_out, "svg": drawing, "names": [curve.name for curve in curves]}
