"""Reads the parquet tables of a results folder in bounded pieces: one pass for the headline scores, then latents file by file.

Nothing else of the folder is read, so a published copy of the tables serves as well. Knows the layout only so far: tables are
folders, and the first folder below scores/ and verdicts/ names the explainer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from autointerp import tables
from autointerp.digest import short
from autointerp.errors import StoreError
from autointerp.files import TEMPORARY_PREFIX

FLOORS = ("generic", "lexical")
"""Controls that may be run on a sample of latents, and are shown beside the main one."""
Key = tuple[str, int]
"""(coder, latent)."""
Row = dict[str, Any]

WHOLE_FILE_ROWS = 400_000
"""Files up to this many rows are read whole; of larger ones only the row groups that hold the wanted latents."""
LATENTS_PER_READ = 50

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "explanations": (
        "coder",
        "latent",
        "explanation_id",
        "explainer",
        "explainer_id",
        "selection_id",
        "sample",
        "status",
        "text",
        "rule",
        "model",
        "prompt_id",
        "origin",
        "num_examples",
        "num_negatives",
        "density",
        "reason",
    ),
    "scores": (
        "coder",
        "latent",
        "explanation_id",
        "scorer",
        "scorer_id",
        "base_id",
        "control",
        "judge",
        "explainer",
        "metric",
        "is_headline",
        "negatives",
        "quantile",
        "status",
        "value",
        "ci_low",
        "ci_high",
        "ci_method",
        "chance",
        "disjoint",
        "num_scored",
        "num_unparseable",
        "num_refused",
        "num_truncated",
        "num_no_reply",
        "num_too_long",
        "reason",
    ),
    "verdicts": (
        "coder",
        "latent",
        "explanation_id",
        "scorer",
        "scorer_id",
        "control",
        "example_idx",
        "position",
        "document",
        "source",
        "quantile",
        "truth",
        "answer",
        "probability",
        "status",
    ),
    "examples": (
        "coder",
        "latent",
        "selection_id",
        "pool",
        "source",
        "quantile",
        "position",
        "document",
        "disjoint",
        "pieces",
        "activations",
        "density",
    ),
}
"""What pages are made from. ``density`` and ``reason`` are read where a table has them."""


@dataclass(frozen=True)
class TableFile:
    """One parquet file and the latents with rows in it."""

    table: str
    path: Path
    label: str
    """First folder below the table: the explainer's, for scores and verdicts."""
    num_rows: int
    latents: Mapping[str, np.ndarray]
    """Sorted latents of each coder."""


class Source:
    """The tables of one results folder."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise StoreError(
                f"cannot report on {folder}: no such folder; give a results folder, as written by `autointerp explain`"
            )
        if not any(self.paths(name) for name in ("plan", "explanations", "scores")):
            raise StoreError(
                f"cannot report on {folder}: it holds no plan, explanations or scores; give a results folder, as written by "
                "`autointerp explain`"
            )

    def paths(self, table: str) -> list[Path]:
        """Return the finished files of a table, sorted."""
        root = self.folder / table
        return [path for path in sorted(root.rglob("*.parquet")) if not path.name.startswith(TEMPORARY_PREFIX)]

    def label(self, table: str, path: Path) -> str:
        """Return the name of the first folder below the table, or "" for a file that lies in the table's folder itself."""
        parts = path.relative_to(self.folder / table).parts
        return parts[0] if len(parts) > 1 else ""

    def frames(self, table: str, columns: Sequence[str]) -> Iterator[tuple[str, pd.DataFrame]]:
        """Yield (label, rows) of each file of a table."""
        for path in self.paths(table):
            yield self.label(table, path), tables.read_parquet(path, list(columns)).to_pandas()

    def index(self) -> list[TableFile]:
        """Return every file that pages are made from, with its latents."""
        found = []
        for table in COLUMNS:
            for path in self.paths(table):
                keys = tables.read_parquet(path, ["coder", "latent"])
                frame = keys.group_by(["coder", "latent"]).aggregate([]).to_pandas()
                latents = {str(coder): np.sort(rows.to_numpy()) for coder, rows in frame.groupby("coder")["latent"]}
                found.append(TableFile(table, path, self.label(table, path), len(keys), latents))
        return found

    def latents(
        self, keys: Sequence[Key], *, whole_file_rows: int = WHOLE_FILE_ROWS
    ) -> Iterator[tuple[Key, dict[str, list[Row]]]]:
        """Yield the rows of each latent by table, in an order that reads each file about once; control verdicts are left out.

        Scores and verdicts carry ``label``, the explainer's folder name.
        """
        files = self.index()
        groups: dict[tuple[int, ...], list[Key]] = {}
        for coder in sorted({coder for coder, _ in keys}):
            latents = np.array(sorted(latent for name, latent in keys if name == coder))
            holds = [np.isin(latents, file.latents[coder]) if coder in file.latents else None for file in files]
            for i, latent in enumerate(latents.tolist()):
                where = tuple(number for number, mask in enumerate(holds) if mask is not None and mask[i])
                groups.setdefault(where, []).append((coder, latent))
        for where in sorted(groups):
            loaded = {n: _load(files[n]) for n in where if files[n].num_rows <= whole_file_rows}
            for start in range(0, len(groups[where]), LATENTS_PER_READ):
                chunk = groups[where][start : start + LATENTS_PER_READ]
                rows: dict[Key, dict[str, list[Row]]] = {key: {table: [] for table in COLUMNS} for key in chunk}
                for number in where:
                    file = files[number]
                    found = _take(loaded[number], chunk) if number in loaded else _filtered(file, chunk)
                    for row in found:
                        key = (row["coder"], row["latent"])
                        if key in rows:
                            row["label"] = file.label
                            rows[key][file.table].append(row)
                yield from rows.items()


def _load(file: TableFile) -> Any:
    """Return what pages need of a file, still as Arrow columns: Python rows take ten times the memory."""
    table = tables.read_parquet(file.path, list(COLUMNS[file.table]))
    if file.table == "verdicts":
        # Verdicts on another latent's explanation are in no page.
        table = table.filter(table.column("control").is_null())
    return table


def _take(table: Any, keys: Sequence[Key]) -> list[Row]:
    wanted = np.isin(table.column("latent").to_numpy(), [latent for _, latent in keys])
    rows: list[Row] = table.take(np.flatnonzero(wanted)).to_pylist()
    return rows


def _filtered(file: TableFile, keys: Sequence[Key]) -> list[Row]:
    # No row group can hold a latent below 0, so this reads the columns' names and nothing else. No partitioning: a folder named
    # coder=NAME above the file must not become a column.
    known = pd.read_parquet(file.path, filters=[("latent", "<", 0)], partitioning=None).columns
    present = [name for name in COLUMNS[file.table] if name in known]
    found: list[Row] = []
    for coder in sorted({coder for coder, _ in keys}):
        latents = sorted(latent for name, latent in keys if name == coder)
        span = [("latent", ">=", latents[0]), ("latent", "<=", latents[-1])]
        filters = [("coder", "==", coder), *span, ("latent", "in", latents)]
        found.extend(_records(pd.read_parquet(file.path, columns=present, filters=filters, partitioning=None)))
    return found


def _records(frame: pd.DataFrame) -> list[Row]:
    """Return rows with None for nulls and Python integers for counts that nulls made floats."""
    columns = {}
    for name in frame.columns:
        values = frame[name].tolist()
        integral = name in ("quantile",)
        columns[name] = [
            None if (value is None or (isinstance(value, float) and value != value)) else int(value) if integral else value
            for value in values
        ]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def explainer_label(row: Mapping[str, Any]) -> str:
    """Return the folder name of the explainer that wrote an explanation's row."""
    return f"{row['explainer']}-{short(row['explainer_id'] or '')}"
