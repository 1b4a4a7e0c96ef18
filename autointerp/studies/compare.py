"""``compare``: by how much two explainers, prompts, judges, coders or controls differ, on the same latents.

A side is a results folder and, where that holds several methods, which of them. The two sides' scores are paired by (coder's
digest, latent), so equal names of different coders never meet; sides without a latent in common are compared as two samples.
Reads the tables of results folders and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from autointerp.digest import digest, short
from autointerp.errors import ConfigError, InputError, nearest
from autointerp.files import read_json
from autointerp.reports.index import short_names
from autointerp.reports.terminal import table
from autointerp.results.folder import ResultsFolder
from autointerp.results.load import load_scores
from autointerp.stats import holm, paired_difference, welch_difference

FIELDS = ("coder", "explainer", "scorer", "judge", "prompt", "control", "negatives", "metric", "scorer_id")
"""What a side can be narrowed by."""
COLUMNS = [
    "scorer", "metric", "negatives", "first", "second", "num_first", "num_second", "num_pairs", "mean_first", "mean_second",
    "difference", "ci_low", "ci_high", "ci_method", "wins", "p", "p_holm", "same_examples",
]  # fmt: skip
_KEYS = ["scorer", "metric", "negatives"]
_Series = Mapping[str, str]
_SIDE = re.compile(r"(?s)(.*?)(?::(\w+=[^,]*(?:,\w+=[^,]*)*))?")
_METHOD = ["label", "judge", "prompt", "settings", "selection"]
"""What parts two series of one coder and control; ``label`` is the explainer's folder name where its name says too little."""
_SERIES = ["coder", "explainer", *_METHOD, "control", "base_id", "scorer_id"]
"""What sets series apart. Whatever a control is run with, it counts as the judge, prompt and settings of its scorer."""
_NAMED = ["coder", "label", "judge", "prompt", "control"]
"""What a series is called by; for the rest it is called by the start of its `scorer_id`."""


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

    A field of which both sides hold the same values (two judges, say) is held equal, and so is a coder that both have, and the
    scorer that a control is of. Two sides that are the same give each pair of their series that differ in the explainer
    alone, in the scorer (judge, prompt, settings) alone, or in the examples alone.
    ``difference`` is the mean of first minus second over latents that both scored, ``wins`` the share of them on which the
    first is greater (ties half). ``p_holm`` is adjusted for the number of rows.
    Raises: InputError when a side has no scores or the two have no scorer in common.
    """
    one = first if isinstance(first, Side) else Side.parse(first)
    two = second if isinstance(second, Side) else Side.parse(second, before=one)
    a, b = _read(one), _read(two)
    is_one_folder = one.folder.resolve() == two.folder.resolve()
    fits = _matching(a, b, is_one_folder)
    theirs = {key: list(rows.groupby(_SERIES)) for key, rows in b.groupby(_KEYS)}
    pairs: list[tuple[_Series, _Series]] = []
    rows = []
    for key, mine in a.groupby(_KEYS):
        done = set()
        for name, left in mine.groupby(_SERIES):
            for other, right in theirs.get(key, ()):
                x, y = ({f: str(v) for f, v in zip(_SERIES, names, strict=True)} for names in (name, other))
                if not fits(x, y) or (is_one_folder and frozenset((name, other)) in done):
                    continue
                done.add(frozenset((name, other)))
                shared = {f: str(v) for f, v in zip(_KEYS, key, strict=True)}
                pairs.append((x | shared, y | shared))
                rows.append(shared | _row(left, right))
    if not rows:
        raise InputError(
            f"{one.folder} and {two.folder} have no scorer, metric and source of negatives in common, or the two sides are the "
            f"same: {_held(a)} against {_held(b)}"
        )
    folders = ("", "") if is_one_folder else (str(one.folder), str(two.folder))
    frame = pd.DataFrame(rows).assign(**_names(pairs, folders))
    frame["p_holm"] = holm(frame["p"].to_numpy(float))
    return frame[COLUMNS].sort_values(["scorer", "metric", "negatives", "first", "second"], ignore_index=True)


def _matching(a: pd.DataFrame, b: pd.DataFrame, is_one_folder: bool) -> Callable[[_Series, _Series], bool]:
    """Return whether two series are to be compared, given all series of both sides."""
    values = [{field: set(side[field]) for field in _SERIES} for side in (a, b)]
    shared = {field: values[0][field] & values[1][field] for field in _SERIES}
    equal = [field for field in ("explainer", *_METHOD, "control") if values[0][field] == values[1][field]]
    is_same = is_one_folder and values[0]["scorer_id"] == values[1]["scorer_id"]

    def fits(first: _Series, second: _Series) -> bool:
        differs = {field for field in _SERIES if first[field] != second[field]}
        if (is_one_folder and not differs) or ("coder" in differs and shared["coder"]):
            return False
        if is_same:
            return ("label" in differs) + ("selection" in differs) + bool(differs & {"judge", "prompt", "settings"}) <= 1
        if "control" in differs and "base_id" in differs and shared["base_id"]:
            return False
        return not differs & {*equal}

    return fits


def _read(side: Side) -> pd.DataFrame:
    """Return the scores of one side: a row per latent and series, samples averaged."""
    folder = ResultsFolder.open(side.folder)
    frame = load_scores(folder.path)
    frame = frame[frame["quantile"].isna()]
    known = _methods(folder)
    ids = {path.stem: read_json(path)["coder_id"] for path in sorted((folder.path / "state" / "coders").glob("*.json"))}
    frame = frame.assign(
        control=frame["control"].fillna("none").astype(str),
        coder_id=[ids.get(coder, coder) for coder in frame["coder"]],
        base_id=[known.get(scorer_id, {}).get("base_id", scorer_id) for scorer_id in frame["scorer_id"]],
    )
    for field in _METHOD:
        if field != "judge":
            frame[field] = [known.get(scorer_id, {}).get(field, "-") for scorer_id in frame["scorer_id"]]
    names = short_names(frame["label"].tolist())
    judges = frame[frame["control"] == "none"].groupby("scorer_id")["judge"].first()
    frame["judge"] = frame["base_id"].map(judges).fillna(frame["judge"])
    if "metric" not in side.only:
        frame = frame[frame["is_headline"]]
    for field, value in {"control": "none", **side.only}.items():
        chosen = _chosen(frame, field, value)
        if not chosen.any():
            there = {*frame[field].astype(str), *(names[label] for label in frame["label"] if field == "explainer")}
            raise InputError(f"{side.folder} has no scores with {field} = {value!r}; {nearest(value, there)}")
        frame = frame[chosen]
    frame = frame[frame["status"] == "ok"]
    if not len(frame):
        raise InputError(f"{side.folder} has no scores with a value on this side; run `autointerp score` first")
    grouped = frame.assign(label=frame["label"].map(names)).groupby([*_KEYS, *_SERIES, "coder_id", "latent"])
    return grouped["value"].mean().to_frame().join(grouped["selection_id"].first()).reset_index()


def _chosen(frame: pd.DataFrame, field: str, value: str) -> pd.Series:
    """Return which rows have `value` in `field`: an explainer by either of its names, a scorer by the start of its digest."""
    if field == "explainer":
        return (frame["explainer"] == value) | (frame["label"] == value)
    if field == "scorer_id":
        starts = [frame[name].str.removeprefix("sha256:").str.startswith(value) for name in ("scorer_id", "base_id")]
        return starts[0] | starts[1]
    return frame[field].astype(str) == value


def _methods(folder: ResultsFolder) -> dict[str, dict[str, str]]:
    """Return what sets each scorer of a folder apart, by its id; a control has the fields of the scorer that it is of."""
    methods = {method.id: method for method in folder.methods("score")}
    found = {}
    for method in methods.values():
        base = methods.get(method.base_id, method)
        settings = dict(base.identity.get("settings") or {})
        prompt = settings.pop("prompt", None)
        found[method.id] = {
            "label": base.explainer or "-",
            "prompt": short(prompt) if isinstance(prompt, str) else "-",
            "settings": digest(settings),
            "selection": str(base.identity.get("selection")),
            "base_id": base.id,
        }
    return found


def _names(pairs: Sequence[tuple[_Series, _Series]], folders: tuple[str, str]) -> dict[str, list[str]]:
    """Name the series of each pair by what sets the two apart, and then by what sets this pair apart from others so named."""
    fields = [{field for field in _NAMED if first[field] != second[field]} for first, second in pairs]
    named: list[tuple[str, str]] = []
    for more in ((), _NAMED, ("scorer_id",)):
        groups: dict[tuple[str, ...], list[int]] = {}
        for i, names in enumerate(named):
            groups.setdefault((*(pairs[i][0][key] for key in _KEYS), *names), []).append(i)
        for members in groups.values():
            varies = {field for field in more if len({(pairs[i][0][field], pairs[i][1][field]) for i in members}) > 1}
            for i in members:
                fields[i] |= varies
        named = [_called(*pair, shown, folders) for pair, shown in zip(pairs, fields, strict=True)]
    return {"first": [first for first, _ in named], "second": [second for _, second in named]}


def _called(first: _Series, second: _Series, fields: set[str], folders: tuple[str, str]) -> tuple[str, str]:
    shown = [field for field in _NAMED if field in fields]
    # A digest says something only where nothing else does.
    if "scorer_id" in fields or not (shown or any(folders)):
        shown.append("scorer_id")
    words = [[short(side[field]) if field == "scorer_id" else side[field] for field in shown] for side in (first, second)]
    return " ".join(filter(None, [folders[0], *words[0]])), " ".join(filter(None, [folders[1], *words[1]]))


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
