"""Commits one shard of one method: its tables, each whole, then the marker that says they are.

Also reads a committed shard back as records, which is how a later run keeps what is finished and redoes the rest. Rows are
sorted by key and carry no times, so equal runs write equal bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from autointerp import tables
from autointerp.digest import digest, digest_file
from autointerp.errors import StoreError
from autointerp.files import TEMPORARY_PREFIX, read_json, write_json
from autointerp.protocols import Vocabulary
from autointerp.records import UNSCORED, Examples, Explanation, LatentExamples, Score, Usage, Verdict
from autointerp.results.folder import Method, ResultsFolder

MARKER_SCHEMA = 1
Key = tuple[str, int]
"""(coder, latent)."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What went wrong with one latent, in words; a row of the failures table."""

    coder: str
    latent: int
    stage: str
    method: str
    status: str
    error: str


@dataclass(frozen=True, kw_only=True)
class TableFile:
    """One committed file, as its marker knows it."""

    path: str
    """Relative to the results folder."""
    num_rows: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class Marker:
    """State of one shard of one method; all counts are over everything done so far, also by earlier runs."""

    stage: str
    method: str
    shard: int
    status: Literal["done", "partial"]
    """``partial``: items are missing or may be tried again; the rows that are there count."""
    num_items: int
    """Latents of the shard that this stage works on."""
    num_finished: int
    """Those with rows that will not be tried again."""
    tables: Mapping[str, TableFile]
    rows_by_status: Mapping[str, int]
    """Rows of the stage's main table (explanations, scores) by status."""
    failures: Mapping[str, int]
    """Latents by what went wrong."""
    unscored: Mapping[str, int]
    """Single examples without a verdict, by status."""
    errors: Mapping[str, int]
    """Failed requests, by kind of error."""
    usage: Mapping[str, int]
    """Tokens, by field of `records.Usage`."""
    num_sent: int
    """Requests that an engine answered or refused."""
    num_logged: int
    """Requests answered from the reply log."""
    num_failed: int
    """Requests that ended in an error."""
    seconds: float
    """Wall time of the worker on this shard."""
    finished_at: float
    """Unix time of the commit."""
    worker: str = ""
    schema: int = MARKER_SCHEMA

    @property
    def is_done(self) -> bool:
        """Whether nothing of the shard is left to do."""
        return self.status == "done"


@dataclass
class ShardRows:
    """The rows of a shard by table; what is committed together."""

    explanations: list[Explanation] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def extend(self, other: ShardRows) -> None:
        """Add the rows of `other`."""
        for name in _TABLES:
            getattr(self, name).extend(getattr(other, name))

    def keys(self) -> set[Key]:
        """Return the latents that have rows."""
        return {(row.coder, row.latent) for name in _TABLES for row in getattr(self, name)}

    def without(self, keys: Iterable[Key]) -> ShardRows:
        """Return the rows of all but the given latents."""
        gone = set(keys)
        return ShardRows(**{name: [r for r in getattr(self, name) if (r.coder, r.latent) not in gone] for name in _TABLES})


def explanation_id(row: Explanation) -> str:
    """Return the digest that names an explanation: of its latent, its explainer and what it says."""
    return digest(
        {
            "coder": row.coder,
            "latent": row.latent,
            "explainer_id": row.explainer_id,
            "sample": row.sample,
            "text": row.text,
            "rule": row.rule,
        }
    )


def _failures_table(rows: Iterable[Failure]) -> Any:
    return table_of(({**asdict(row)} for row in rows), tables.FAILURES)


def table_of(rows: Iterable[Mapping[str, Any]], schema: Any) -> Any:
    """Return the rows, as mappings, as an Arrow table of `schema`."""
    return schema.empty_table().from_pylist(list(rows), schema=schema)


def _explanation_key(row: Explanation) -> tuple[Any, ...]:
    return (row.coder, row.latent, row.sample, row.explanation_id)


def _verdict_key(row: Verdict) -> tuple[Any, ...]:
    return (row.coder, row.latent, row.explanation_id, row.example_idx, row.prompt_idx, row.source)


def _score_key(row: Score) -> tuple[Any, ...]:
    quantile = -1 if row.quantile is None else row.quantile
    return (row.coder, row.latent, row.explanation_id, row.negatives, quantile, row.metric)


def _failure_key(row: Failure) -> tuple[Any, ...]:
    return (row.coder, row.latent, row.error)


@dataclass(frozen=True)
class _Table:
    to_arrow: Callable[[list[Any]], Any]
    record: type
    key: Callable[[Any], tuple[Any, ...]]


_TABLES: dict[str, _Table] = {
    "explanations": _Table(tables.explanations_table, Explanation, _explanation_key),
    "verdicts": _Table(tables.verdicts_table, Verdict, _verdict_key),
    "scores": _Table(tables.scores_table, Score, _score_key),
    "failures": _Table(_failures_table, Failure, _failure_key),
}
_STAGE_TABLES = {"explain": ("explanations",), "score": ("verdicts", "scores")}
MAIN_TABLE = {"explain": "explanations", "score": "scores"}
"""The table in which every item of a stage has a row."""


def write_tables(folder: ResultsFolder, method: Method, shard: int, rows: ShardRows) -> dict[str, TableFile]:
    """Commit the tables of a shard, the main one last; return what the marker says of them.

    The order matters to a kill in between: an item with a row in the main table has its rows in the others too.
    There is a failures file only where there are failures.
    """
    written: dict[str, TableFile] = {}
    for name in (*_STAGE_TABLES[method.stage], "failures"):
        path = folder.table(name, method, shard)
        records = sorted(getattr(rows, name), key=_TABLES[name].key)
        drop_temporary(path)
        if name == "failures" and not records:
            path.unlink(missing_ok=True)
            continue
        tables.write_parquet(path, _TABLES[name].to_arrow(records))
        written[name] = TableFile(
            path=path.relative_to(folder.path).as_posix(), num_rows=len(records), digest=digest_file(path)
        )
    return written


def write_marker(folder: ResultsFolder, marker: Marker) -> None:
    """Commit the marker of a shard; its tables are on disk."""
    path = folder.marker(marker.stage, marker.method, marker.shard)
    drop_temporary(path)
    write_json(path, asdict(marker))


def read_marker(folder: ResultsFolder, stage: str, label: str, shard: int) -> Marker | None:
    """Return the marker of a shard, or None when it was never committed.

    Raises: StoreError when it is damaged or of another version.
    """
    path = folder.marker(stage, label, shard)
    return _marker(path) if path.exists() else None


def read_markers(folder: ResultsFolder, stage: str, label: str) -> dict[int, Marker]:
    """Return the markers of a method by shard."""
    found = (_marker(path) for path in sorted(folder.state(stage, label).glob("shard-*.json")))
    return {marker.shard: marker for marker in found}


def is_whole(folder: ResultsFolder, marker: Marker) -> bool:
    """Return whether the tables of a shard are those that its marker describes; not so after a kill amid a later commit."""
    return all(
        (folder.path / table.path).is_file() and digest_file(folder.path / table.path) == table.digest
        for table in marker.tables.values()
    )


def _marker(path: Path) -> Marker:
    values = read_json(path)
    if values.get("schema") != MARKER_SCHEMA:
        raise StoreError(f"{path} has schema {values.get('schema')}, this release reads {MARKER_SCHEMA}; update autointerp")
    try:
        values["tables"] = {name: TableFile(**table) for name, table in values["tables"].items()}
        return Marker(**values)
    except (KeyError, TypeError) as error:
        raise StoreError(f"{path} is not a marker ({error}); remove it and its shard is done again") from None


def read_rows(folder: ResultsFolder, method: Method, shard: int) -> ShardRows:
    """Return the committed rows of a shard, empty where a table has no file.

    Raises: StoreError when a file is damaged.
    """
    rows = ShardRows()
    for name in (*_STAGE_TABLES[method.stage], "failures"):
        path = folder.table(name, method, shard)
        if path.exists():
            getattr(rows, name).extend(_records(tables.read_parquet(path), _TABLES[name].record))
    return rows


def _records(table: Any, record: type) -> list[Any]:
    names = {f.name for f in fields(record)}
    rows = []
    for values in table.to_pylist():
        kept = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items() if key in names}
        if record is Score:
            kept["unscored"] = {reason: values[f"num_{reason}"] for reason in UNSCORED if values.get(f"num_{reason}")}
        if record in (Verdict, Explanation):
            for key in ("request_ids", "parent_ids"):
                if key in names:
                    kept[key] = kept.get(key) or ()
        rows.append(record(**kept))
    return rows


def add_usage(total: Mapping[str, int], usage: Usage) -> dict[str, int]:
    """Return token counts with those of `usage` added."""
    return {f.name: int(total.get(f.name, 0)) + int(getattr(usage, f.name)) for f in fields(Usage)}


def drop_temporary(path: Path) -> None:
    """Remove what killed workers left of this file; the caller holds its lease, so none of it is in use."""
    for leftover in path.parent.glob(f"{TEMPORARY_PREFIX}*{path.name}"):
        leftover.unlink(missing_ok=True)


# Windows for readers without the store -------------------------------------------------------------------------------

_POOLS = (("explain", "explain"), ("explain", "explain_negatives"), ("score", "positives"), ("score", "negatives"))


def examples_batches(latent: LatentExamples, vocabulary: Vocabulary) -> list[Any]:
    """Return the chosen windows of a latent as Arrow batches of schema `tables.EXAMPLES`."""
    rows: list[dict[str, Any]] = []
    for pool, block in _POOLS:
        rows.extend(_window_rows(latent, pool, getattr(latent, block), vocabulary))
    batches: list[Any] = table_of(rows, tables.EXAMPLES).to_batches()
    return batches


def _window_rows(latent: LatentExamples, pool: str, block: Examples, vocabulary: Vocabulary) -> Iterable[dict[str, Any]]:
    for i, pieces in enumerate(vocabulary.pieces_of(block.tokens, block.lengths)):
        length = len(pieces)
        yield {
            "coder": latent.coder,
            "latent": latent.latent,
            "selection_id": latent.selection_id,
            "pool": pool,
            "source": block.sources[i],
            "quantile": int(block.quantiles[i]),
            "position": int(block.positions[i]),
            "document": int(block.documents[i]),
            "disjoint": latent.disjoint,
            "text": "".join(pieces),
            "pieces": pieces,
            "activations": block.activations[i, :length],
        }


def write_examples(path: Path, batches: Mapping[Key, Sequence[Any]]) -> None:
    """Add the windows of some latents to a shard's file; what is in it stays. The caller holds the file's lease."""
    merged: dict[Key, Sequence[Any]] = {}
    if path.exists():
        table = tables.read_parquet(path)
        merged = {key: table.slice(rows.start, len(rows)).to_batches() for key, rows in _by_latent(table).items()}
    new = {key: rows for key, rows in batches.items() if rows and key not in merged}
    if path.exists() and not new:
        return
    merged |= new
    drop_temporary(path)
    flat = [batch.replace_schema_metadata(None) for key in sorted(merged) for batch in merged[key]]
    schema: Any = tables.EXAMPLES
    tables.write_parquet(path, schema.empty_table().from_batches(flat, schema=schema))


def _by_latent(table: Any) -> dict[Key, range]:
    """Rows of each latent; a file holds the rows of a latent side by side."""
    coders, latents = table.column("coder").to_pylist(), table.column("latent").to_pylist()
    found: dict[Key, range] = {}
    for row, key in enumerate(zip(coders, latents, strict=True)):
        start = found[key].start if key in found else row
        found[key] = range(start, row + 1)
    return found
