"""What a calibration study found: one table of measures, the same as text, and as a page with a plot.

Everything is read from results folders whose explainers are the roles of :mod:`autointerp.studies.planted`; scores of one
scorer, judge, prompt and settings form a variant. Measures:

- ``auroc``: of scores of true explanations against those of one other role, over the same latents; interval by Newcombe (2006).
- ``wins``: how often a latent's true explanation scores above its other one, ties half; interval by Wilson. In both, a
  correlation that is `undefined` since the predictions are all equal ranks below every value; ``num_undefined`` counts these.
- ``level``: mean score of true explanations at one level of noise; ``spearman``: between share of noise and score, over levels.
- ``shuffled``, ``shuffled_mean``: median and mean score under another latent's explanation, with the chance level.
- ``shuffled_chance``: what the median of correlations is by chance, and where 95% of such medians lie. Each latent's
  predictions are shifted round its windows: they keep their number and their clusters and lose their places. The mean over all
  shifts is 0, and the median lies below, for rare predictions and rare activations mostly miss each other, and seldom meet.
- ``calibration_error``: mean distance between stated probability and share of active examples in ten bins; ``brier``: mean
  squared distance of the probabilities, ``chance`` that of a judge who always states the share of active examples. Positives
  with each source of negatives apart, true explanations only; for judges that state probabilities.
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

from autointerp import tables
from autointerp.digest import digest, generator, short
from autointerp.errors import InputError
from autointerp.reports import svg
from autointerp.reports.terminal import table
from autointerp.reports.write import write_page
from autointerp.results.folder import Method, ResultsFolder
from autointerp.results.load import load_scores, load_verdicts
from autointerp.results.write import read_markers
from autointerp.stats import Interval, auroc, auroc_newcombe, mean_t, median_order, wilson
from autointerp.studies.calibrate import retest_folder
from autointerp.studies.plant import EXACT
from autointerp.studies.planted import ROLES, planted_in

COLUMNS = [
    "scorer", "judge", "prompt", "variant", "negatives", "metric", "measure", "family", "role", "noise", "share",
    "value", "ci_low", "ci_high", "ci_method", "chance", "num_latents", "num_undefined",
]  # fmt: skip
FILE = "calibration.parquet"
_VARIANT = ["scorer", "judge", "prompt", "variant", "negatives", "metric"]
_BINS = 10
_DRAWS = 2000
"""Medians by chance."""
_RANK = "A score that is undefined since all predictions are equal ranks below every other."


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
            *_retest(plain, repeated[repeated["control"] == ""], shared),
        ]
        rows += [{**shared, **measure} for measure in measures]
    rows += _with_chance(rows, list(_by_chance(folder, scores)))
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


def _variant(method: Method) -> tuple[str, str]:
    """Return the prompt, and all that decides a scorer's answers, as short digests.

    Not what it grades, and not the seed of its examples: the repeated measurement differs in that alone.
    """
    identity = method.identity
    prompt = identity["settings"].get("prompt")
    named = {name: identity.get(name) for name in ("scorer", "settings", "judge", "embedder")}
    named["selection"] = {name: value for name, value in method.settings["selection"].items() if name != "seed"}
    return short(prompt) if isinstance(prompt, str) else "-", short(digest(named))


def _is_undefined(rows: pd.DataFrame) -> pd.Series:
    """Return which scores are `undefined` though answers came: only a correlation can be, where all predictions are equal.

    Without an answer on one side other metrics are `undefined`, too, and that says nothing of the explanation.
    """
    return (rows["metric"] == "correlation") & (rows["status"] == "undefined") & (rows["num_scored"] > 0)


def _ranking(rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    # Left out, they would be missed among the worst: an explanation that holds nowhere predicts the same everywhere.
    rows = rows.assign(value=rows["value"].astype(float).mask(_is_undefined(rows), -np.inf))
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
            num_undefined = int((np.isneginf(true) | np.isneginf(other)).sum())
            shared = {"family": family, "role": role, "num_latents": num, "num_undefined": num_undefined, "chance": 0.5}
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
    rows = rows[rows["coder"] == EXACT]
    values = rows["value"].dropna().to_numpy(float)
    if len(values):
        chance = rows["chance"].dropna()
        num_undefined = int(_is_undefined(rows).sum())
        shared = {"family": "all", "role": "true", "num_latents": len(values), "num_undefined": num_undefined}
        shared["chance"] = float(chance.iloc[0]) if len(chance) else None
        yield {"measure": "shuffled", **shared, **_interval(median_order(values))}
        yield {"measure": "shuffled_mean", **shared, **_interval(mean_t(values))}


def _by_chance(folder: ResultsFolder, scores: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield ``shuffled_chance`` of every variant that is a correlation."""
    methods = {method.id: method for method in folder.methods("score")}
    rows = scores[(scores["control"] == "shuffled") & (scores["metric"] == "correlation") & (scores["coder"] == EXACT)]
    rows = rows[rows["value"].notna()]
    for scorer_id, of_scorer in rows.groupby("scorer_id"):
        verdicts = _predictions(folder, methods[str(scorer_id)])
        for key, group in of_scorer.groupby(_VARIANT, dropna=False):
            shared = dict(zip(_VARIANT, key, strict=True))
            found = []
            for latent in sorted(group["latent"]):
                own = verdicts[verdicts["latent"] == latent]
                own = own[own["truth"].astype(bool) | (own["source"] == shared["negatives"])]
                by_shift = shifted_correlations(np.concatenate(list(own["truths"])), np.concatenate(list(own["answers"])))
                found.append(generator("chance of a median", latent).choice(by_shift, _DRAWS))
            medians = np.median(np.stack(found), axis=0)
            low, high = np.quantile(medians, [0.025, 0.975])
            interval = Interval(value=float(medians.mean()), low=float(low), high=float(high), method="shifted_predictions")
            shared |= {"measure": "shuffled_chance", "family": "all", "role": "true", "num_latents": len(found)}
            yield {**shared, **_interval(interval)}


def _predictions(folder: ResultsFolder, method: Method) -> pd.DataFrame:
    """Return the answered verdicts of one method without noise, as they were asked, with truths and answers of each token."""
    columns = ["coder", "latent", "example_idx", "source", "truth", "truths", "answers", "status"]
    paths = sorted(folder.table("verdicts", method, 0).parent.glob("[!.]*.parquet"))
    frame: pd.DataFrame = pd.concat(
        [tables.read_parquet(path, columns=columns).to_pandas() for path in paths], ignore_index=True
    )
    frame = frame[(frame["status"] == "ok") & (frame["coder"] == EXACT)]
    return frame.sort_values(["latent", "example_idx"], kind="stable")


def shifted_correlations(truths: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation of truths and answers shifted round by 0, 1, ... tokens, without tokens that have no answer.

    Neither side may be constant.
    """
    known = ~np.isnan(answers.astype(float))
    a, b = truths[known].astype(float), answers[known].astype(float)
    a, b = (a - a.mean()) / a.std(), (b - b.mean()) / b.std()
    return np.asarray(np.fft.irfft(np.fft.rfft(a) * np.conj(np.fft.rfft(b)), n=len(a)) / len(a))


def _with_chance(rows: Sequence[dict[str, Any]], chances: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give the medians their chance level; return `chances`."""
    level = {tuple(row[name] for name in _VARIANT): row["value"] for row in chances}
    for row in rows:
        if row["measure"] == "shuffled":
            row["chance"] = level.get(tuple(row[name] for name in _VARIANT), row["chance"])
    return chances


def _retest(rows: pd.DataFrame, repeated: pd.DataFrame, shared: dict[str, Any]) -> Iterator[dict[str, Any]]:
    same = repeated[np.logical_and.reduce([repeated[name] == shared[name] for name in _VARIANT])]
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
        is_active = group["truth"].astype(bool)
        for source in sorted(set(group.loc[~is_active, "source"])):
            with_source = group["latent"].isin(group.loc[group["source"] == source, "latent"])
            of_source = group[(is_active & with_source) | (group["source"] == source)]
            shared = {**variant, "negatives": source, "metric": "probability", "family": "all", "role": "true"}
            shared["num_latents"] = of_source["latent"].nunique()
            found = _calibrated(of_source["probability"].to_numpy(float), of_source["truth"].to_numpy(float))
            rows += [{**shared, "ci_method": "none", **measure} for measure in found]
    return rows


def _calibrated(p: np.ndarray, truth: np.ndarray) -> list[dict[str, Any]]:
    """Return how far probabilities are from what is active, 1 or 0."""
    place = np.minimum((p * _BINS).astype(int), _BINS - 1)
    gaps = np.abs(np.bincount(place, weights=p - truth, minlength=_BINS))
    base = float(truth.mean())
    return [
        {"measure": "calibration_error", "value": float(gaps.sum() / len(p))},
        {"measure": "brier", "value": float(np.mean(np.square(p - truth))), "chance": base * (1 - base)},
    ]


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
    greatest. Where scorer, judge and prompt do not tell variants apart, their digests do.
    """
    ranked = frame[frame["measure"] == "auroc"]
    roles = [role for role in ROLES if role in set(ranked["role"])]
    names = ["scorer", "judge", "prompt"]
    if (frame.groupby(names, dropna=False)["variant"].nunique() > 1).any():
        names.append("variant")
    head = [*names, "metric", "negatives"]
    found = [
        Section(
            "True explanations against the others",
            "AUROC over latents, with its 95% interval. 1: every true explanation scores above every other; 0.5: no telling. "
            + _RANK,
            [[*head, "latents", *roles], *_ranked(ranked[ranked["family"] == "all"], head, roles)],
        )
    ]
    won = frame[(frame["measure"] == "wins") & (frame["family"] == "all")]
    found.append(
        Section(
            "How often the true explanation wins",
            "Share of latents whose true explanation scores above their other one, ties counted half, with its 95% interval. "
            + _RANK,
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
    wanted = ["shuffled", "shuffled_mean", "retest_sd"]
    lines = []
    for key, rows in frame[frame["measure"].isin([*wanted, "shuffled_chance"])].groupby(_VARIANT, sort=False):
        named = dict(zip(_VARIANT, key, strict=True))
        by = rows.set_index("measure")
        cells = [_text(by.loc[name]) if name in by.index else "-" for name in wanted]
        chance = by["chance"].get("shuffled_mean")
        by_chance = ["-" if pd.isna(chance) else f"{chance:g}"] * 2
        if "shuffled_chance" in by.index:
            by_chance[0] = _text(by.loc["shuffled_chance"])
        lines.append([*(str(named[name]) for name in head), cells[0], by_chance[0], cells[1], by_chance[1], cells[2]])
    note = (
        "Median and mean score under another latent's explanation, each with what it is by chance; SD of a score, from two "
        "measurements. By chance the mean of correlations is 0 and their median below it, for they are skewed."
    )
    header = [*head, "shuffled: median", "by chance", "shuffled: mean", "by chance", "SD of a measurement"]
    found.append(Section("Control and spread", note, [header, *lines]))
    lines = []
    judged = frame[frame["measure"].isin(["calibration_error", "brier", "tokens"])]
    for _, rows in judged.groupby(["scorer", "judge", "prompt", "variant"], sort=False):
        tokens = "".join(f"{value:.0f}" for value in rows[rows["measure"] == "tokens"]["value"])
        first = [str(rows.iloc[0][name]) for name in names]
        stated = rows[rows["measure"] != "tokens"]
        for negatives, group in stated.groupby("negatives", sort=False):
            by = group.set_index("measure")
            error, brier = by["value"]["calibration_error"], by.loc["brier"]
            lines.append([*first, str(negatives), f"{error:.3f}", f"{brier['value']:.3f}", f"{brier['chance']:.3f}", tokens])
        if not len(stated):
            lines.append([*first, "-", "-", "-", "-", tokens])
    note = (
        "Probabilities against what is active, under true explanations, positives with each source of negatives apart. "
        "By chance: the Brier score of always stating the share of active examples."
    )
    header = [*names, "negatives", "calibration error", "Brier score", "by chance", "tokens per explanation"]
    found.append(Section("Judges", note, [header, *lines]))
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
    undefined = f" ({row['num_undefined']:.0f} undefined)" if row["num_undefined"] > 0 else ""
    if pd.isna(row["ci_low"]) or pd.isna(row["ci_high"]):
        return f"{row['value']:.3f}{undefined}"
    return f"{row['value']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]{undefined}"


def text_of(found: list[Section]) -> str:
    """Return the tables for a terminal."""
    parts = []
    for section in found:
        numeric = {
            i for i, cell in enumerate(section.rows[0]) if i > 2 and cell not in ("metric", "negatives", "prompt", "variant")
        }
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
    chances = frame[frame["measure"] == "shuffled_mean"].groupby("metric")["chance"].first()
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
