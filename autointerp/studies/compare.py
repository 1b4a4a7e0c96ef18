"""``compare``: by how much two explainers, prompts, judges, coders or controls differ, on the same latents.

A side is a results folder and, where that holds several methods, which of them. The two sides' scores are paired by (coder's
digest, latent), so equal names of different coders never meet; sides without a latent in common are compared as two samples.
Reads the tables of results folders and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from autointerp.digest import short
from autointerp.errors import ConfigError, InputError, nearest
from autointerp.files import read_json
from autointerp.reports.terminal import table
from autointerp.results.folder import Method, ResultsFolder
from autointerp.results.load import load_scores
from autointerp.stats import holm, paired_difference, welch_difference

FIELDS = ("coder", "explainer", "scorer", "judge", "prompt", "control", "negatives", "metric", "scorer_id")
"""What a side can be narrowed by."""
COLUMNS = [
    "scorer", "metric", "negatives", "first", "second", "num_first", "num_second", "num_pairs", "mean_first", "mean_second",
    "difference", "ci_low", "ci_high", "ci_method", "wins", "p", "p_holm", "same_examples",
]  # fmt: skip
_SIDE = re.compile(r"(?s)(.*?)(?::(\w+=[^,]*(?:,\w+=[^,]*)*))?")
_SERIES = ["coder", "explainer", "judge", "prompt", "control", "scorer_id"]
"""What sets series apart; the last follows from the others and the scorer's settings."""


@dataclass(frozen=True)
class Side:
    """One of the two things compared."""

    folder: Path
    only: Mapping[str, str]
    """Field of `FIELDS` -> its value; ``control`` is ``none`` unless said otherwise."""

    @staticmethod
    def parse(text: str, *, before: Side | None = None) -> Side:
        """Return the side of ``FOLDER[:FIELD=VALUE,...]``; without a folder, the side before, fields put over.

        Raises: ConfigError when a field is unknown or there is no folder.
        """
        match = _SIDE.fullmatch(text)
        assert match is not None
        only: dict[str, str] = {} if match[1] or before is None else dict(before.only)
        for part in (match[2] or "").split(",") if match[2] else ():
            field, _, value = part.partition("=")
            if field not in FIELDS:
                raise ConfigError(f"{text!r} names {field!r}, by which scores cannot be chosen; {nearest(field, FIELDS)}")
            only[field] = value
        if not match[1] and before is None:
            raise ConfigError(f"{text!r} names no results folder; expected FOLDER or FOLDER:FIELD=VALUE")
        return Side(Path(match[1]) if match[1] or before is None else before.folder, only)


def compare(first: str | Side, second: str | Side) -> pd.DataFrame:
    """Return one row per scorer, metric, source of negatives and pair of series, sorted; only headline metrics unless named.

    A field of which both sides hold the same values (two judges, say) is held equal, and so is a coder that both have.
    ``difference`` is the mean of first minus second over latents that both scored, ``wins`` the share of them on which the
    first is greater (ties half). ``p_holm`` is adjusted for the number of rows.
    Raises: InputError when a side has no scores or the two have no scorer in common.
    """
    one = first if isinstance(first, Side) else Side.parse(first)
    two = second if isinstance(second, Side) else Side.parse(second, before=one)
    a, b = _read(one), _read(two)
    keys = ["scorer", "metric", "negatives"]
    equal = [i for i, field in enumerate(_SERIES[:-1]) if set(a[field]) == set(b[field])]
    if set(a["coder"]) & set(b["coder"]):
        equal.append(_SERIES.index("coder"))
    rows = []
    for key, mine in a.groupby(keys):
        theirs = b
        for field, value in zip(keys, key, strict=True):
            theirs = theirs[theirs[field] == value]
        for name, left in mine.groupby(_SERIES):
            for other, right in theirs.groupby(_SERIES):
                is_same = one.folder.resolve() == two.folder.resolve() and name == other
                if is_same or any(name[i] != other[i] for i in equal):
                    continue
                labels = _labels(dict(zip(_SERIES, name, strict=True)), dict(zip(_SERIES, other, strict=True)), one, two)
                rows.append(dict(zip(keys, key, strict=True)) | labels | _row(left, right))
    if not rows:
        raise InputError(
            f"{one.folder} and {two.folder} have no scorer, metric and source of negatives in common, or the two sides are the "
            f"same: {_held(a)} against {_held(b)}"
        )
    frame = pd.DataFrame(rows)
    frame["p_holm"] = holm(frame["p"].to_numpy(float))
    return frame[COLUMNS].sort_values(["scorer", "metric", "negatives", "first", "second"], ignore_index=True)


def _read(side: Side) -> pd.DataFrame:
    """Return the scores of one side: a row per latent and series, samples averaged."""
    folder = ResultsFolder.open(side.folder)
    frame = load_scores(folder.path)
    frame = frame[frame["quantile"].isna()]
    prompts = {method.id: _prompt(method) for method in folder.methods("score")}
    ids = {path.stem: read_json(path)["coder_id"] for path in sorted((folder.path / "state" / "coders").glob("*.json"))}
    frame = frame.assign(
        control=frame["control"].fillna("none").astype(str),
        prompt=[prompts.get(scorer_id, "-") for scorer_id in frame["scorer_id"]],
        coder_id=[ids.get(coder, coder) for coder in frame["coder"]],
    )
    if "metric" not in side.only:
        frame = frame[frame["is_headline"]]
    for field, value in {"control": "none", **side.only}.items():
        known = sorted(frame[field].astype(str).unique())
        chosen = (
            frame[field].astype(str).str.removeprefix("sha256:").str.startswith(value)
            if field == "scorer_id"
            else (frame[field].astype(str) == value)
        )
        if not chosen.any():
            raise InputError(f"{side.folder} has no scores with {field} = {value!r}; it has {', '.join(known) or 'none'}")
        frame = frame[chosen]
    frame = frame[frame["status"] == "ok"]
    if not len(frame):
        raise InputError(f"{side.folder} has no scores with a value on this side; run `autointerp score` first")
    keys = ["scorer", "metric", "negatives", *_SERIES, "coder_id", "latent"]
    grouped = frame.groupby(keys)
    return grouped["value"].mean().to_frame().join(grouped["selection_id"].first()).reset_index()


def _prompt(method: Method) -> str:
    prompt = (method.identity.get("settings") or {}).get("prompt")
    return short(prompt) if isinstance(prompt, str) else "-"


def _labels(first: Mapping[str, Any], second: Mapping[str, Any], one: Side, two: Side) -> dict[str, str]:
    """Name the series by what sets them apart."""
    differs = [field for field in _SERIES if first[field] != second[field]]
    # A scorer's digest holds its explainer, judge and control; it says something only when nothing else does.
    shown = [field for field in differs if field != "scorer_id"]
    parts = {"first": [str(first[field]) for field in shown], "second": [str(second[field]) for field in shown]}
    if one.folder.resolve() != two.folder.resolve():
        parts["first"].insert(0, str(one.folder))
        parts["second"].insert(0, str(two.folder))
    elif not shown:
        parts = {"first": [short(str(first["scorer_id"]))], "second": [short(str(second["scorer_id"]))]}
    return {side: " ".join(values) for side, values in parts.items()}


def _row(first: pd.DataFrame, second: pd.DataFrame) -> dict[str, Any]:
    both = first.merge(second, on=["coder_id", "latent"], suffixes=("_a", "_b"))
    a, b = (frame["value"].to_numpy(float) for frame in (first, second))
    if len(both):
        a, b = both["value_a"].to_numpy(float), both["value_b"].to_numpy(float)
        found = paired_difference(a, b)
        wins = float(np.mean(a > b) + np.mean(a == b) / 2)
    else:
        found, wins = welch_difference(a, b), None
    return {
        "num_first": len(first),
        "num_second": len(second),
        "num_pairs": len(both),
        "mean_first": float(a.mean()),
        "mean_second": float(b.mean()),
        "difference": found.interval.value,
        "ci_low": found.interval.low,
        "ci_high": found.interval.high,
        "ci_method": found.interval.method,
        "wins": wins,
        "p": found.p,
        "same_examples": bool((both["selection_id_a"] == both["selection_id_b"]).all()) if len(both) else False,
    }


def _held(frame: pd.DataFrame) -> str:
    found = frame[["scorer", "metric", "negatives"]].drop_duplicates().astype(str).agg(" ".join, axis=1)
    return "; ".join(found[:6])


def comparison_table(frame: pd.DataFrame) -> str:
    """Return a comparison for people, with what to keep in mind when reading it."""
    rows: list[Sequence[Any]] = [
        [
            "scorer",
            "metric",
            "negatives",
            "first",
            "second",
            "latents",
            "mean",
            "mean",
            "difference",
            "95% interval",
            "wins",
            "p (Holm)",
        ]
    ]
    for row in frame.to_dict("records"):
        paired = row["num_pairs"] > 0
        rows.append(
            [
                row["scorer"],
                row["metric"],
                row["negatives"],
                row["first"],
                row["second"],
                str(row["num_pairs"]) if paired else f"{row['num_first']}, {row['num_second']}",
                f"{row['mean_first']:.3f}",
                f"{row['mean_second']:.3f}",
                f"{row['difference']:+.3f}",
                "-" if np.isnan(row["ci_low"]) else f"{row['ci_low']:+.3f} to {row['ci_high']:+.3f}",
                f"{row['wins']:.2f}" if paired else "-",
                "-" if np.isnan(row["p_holm"]) else f"{row['p_holm']:.2g}",
            ]
        )
    notes = []
    if len(frame) > 1:
        notes.append(
            f"{len(frame)} comparisons: p is adjusted by Holm's method; the intervals are not, so read them one at a time."
        )
    if (frame["num_pairs"] == 0).any():
        notes.append("Rows without wins compare different latents (Welch): they have no latent in common.")
    if ((frame["num_pairs"] > 0) & ~frame["same_examples"]).any():
        notes.append("Some latents were scored on other examples on the two sides, which adds to the difference's spread.")
    left = frame[(frame["num_pairs"] > 0) & (frame[["num_first", "num_second"]].max(axis=1) > frame["num_pairs"])]
    if len(left):
        notes.append("Latents that only one side scored are left out; when one side fails on hard latents, that favours it.")
    return "\n".join([*table(rows, right={5, 6, 7, 8, 10, 11}), *notes]) + "\n"
