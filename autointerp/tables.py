"""Schemas of the result tables, and parquet files written whole.

The schema number lies in the footer of each file (key ``autointerp.schema``). Nullable columns may be added under the same
number; readers keep one number back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from autointerp.digest import digest
from autointerp.errors import StoreError
from autointerp.files import committed
from autointerp.records import UNSCORED, Explanation, Score, Verdict

SCHEMA_VERSION = 1
_KEY = b"autointerp.schema"
_COLUMNS_KEY = b"autointerp.columns"

_LIST_OF = re.compile(r"<(item|element): ")
_AGAIN = "restore it, or remove the marker of its shard under state/ and the shard is done again"

_LATENT_KEY = [("coder", pa.string()), ("latent", pa.uint32())]

PLAN = pa.schema([("shard", pa.int32()), *_LATENT_KEY, ("purpose", pa.string()), ("control_of", pa.string())])
"""``purpose``: ``requested``, or ``partner`` for a latent explained only because a shuffled control needs it. ``control_of``:
the coder that this one is a control of, null for others."""

EXPLANATIONS = pa.schema(
    [
        *_LATENT_KEY,
        ("explanation_id", pa.string()),
        ("explainer", pa.string()),
        ("explainer_id", pa.string()),
        ("selection_id", pa.string()),
        ("sample", pa.int32()),
        ("status", pa.string()),
        ("text", pa.string()),
        ("rule", pa.string()),
        ("model", pa.string()),
        ("prompt_id", pa.string()),
        ("parent_ids", pa.list_(pa.string())),
        ("origin", pa.string()),
        ("num_examples", pa.int32()),
        ("num_negatives", pa.int32()),
        ("num_attempts", pa.int32()),
        ("prompt_tokens", pa.int64()),
        ("output_tokens", pa.int64()),
        ("density", pa.float64()),
        ("candidate", pa.string()),
        ("validate_score", pa.float64()),
        ("judge", pa.string()),
        ("reason", pa.string()),
    ]
)

VERDICTS = pa.schema(
    [
        *_LATENT_KEY,
        ("explanation_id", pa.string()),
        ("scorer", pa.string()),
        ("scorer_id", pa.string()),
        ("control", pa.string()),
        ("example_idx", pa.int32()),
        ("position", pa.int64()),
        ("document", pa.int64()),
        ("source", pa.string()),
        ("quantile", pa.int16()),
        ("truth", pa.bool_()),
        ("answer", pa.bool_()),
        ("probability", pa.float64()),
        ("status", pa.string()),
        ("request_ids", pa.list_(pa.string())),
        ("prompt_idx", pa.int32()),
        ("truths", pa.list_(pa.float32())),
        ("answers", pa.list_(pa.float32())),
        ("value", pa.float64()),
    ]
)

SCORES = pa.schema(
    [
        *_LATENT_KEY,
        ("explanation_id", pa.string()),
        ("scorer", pa.string()),
        ("scorer_id", pa.string()),
        ("base_id", pa.string()),
        ("selection_id", pa.string()),
        ("control", pa.string()),
        ("judge", pa.string()),
        ("explainer", pa.string()),
        ("metric", pa.string()),
        ("is_headline", pa.bool_()),
        ("negatives", pa.string()),
        ("quantile", pa.int16()),
        ("status", pa.string()),
        ("value", pa.float64()),
        ("ci_low", pa.float64()),
        ("ci_high", pa.float64()),
        ("ci_method", pa.string()),
        ("chance", pa.float64()),
        ("disjoint", pa.string()),
        ("num_scored", pa.int32()),
        *((f"num_{reason}", pa.int32()) for reason in UNSCORED),
        ("reason", pa.string()),
    ]
)
"""``base_id``: the ``scorer_id`` that a row has without its control, so that a score and its controls share it."""

FAILURES = pa.schema(
    [
        *_LATENT_KEY,
        ("stage", pa.string()),
        ("method", pa.string()),
        ("status", pa.string()),
        ("error", pa.string()),
    ]
)

EXAMPLES = pa.schema(
    [
        *_LATENT_KEY,
        ("selection_id", pa.string()),
        ("pool", pa.string()),
        ("source", pa.string()),
        ("quantile", pa.int16()),
        ("position", pa.int64()),
        ("document", pa.int64()),
        ("disjoint", pa.string()),
        ("text", pa.string()),
        ("pieces", pa.list_(pa.string())),
        ("activations", pa.list_(pa.float32())),
    ]
)
"""``pieces`` are the window's tokens as text; joined they give ``text``."""


def explanations_table(rows: Iterable[Explanation]) -> pa.Table:
    """Return the rows as a table of schema `EXPLANATIONS`."""
    return _table([_plain(row) for row in rows], EXPLANATIONS)


def verdicts_table(rows: Iterable[Verdict]) -> pa.Table:
    """Return the rows as a table of schema `VERDICTS`."""
    return _table([_plain(row) for row in rows], VERDICTS)


def scores_table(rows: Iterable[Score]) -> pa.Table:
    """Return the rows as a table of schema `SCORES`, with one ``num_<reason>`` column per reason."""
    plain = []
    for row in rows:
        values = _plain(row)
        unscored = values.pop("unscored")
        plain.append(values | {f"num_{reason}": unscored.get(reason, 0) for reason in UNSCORED})
    return _table(plain, SCORES)


def explanations_from(table: pa.Table) -> list[Explanation]:
    """Return the explanations of a table, in its order; the inverse of :func:`explanations_table`."""
    names = {field.name for field in fields(Explanation)}
    rows = []
    for values in table.to_pylist():
        kept = {key: value for key, value in values.items() if key in names}
        kept["parent_ids"] = tuple(kept.get("parent_ids") or ())
        rows.append(Explanation(**kept))
    return rows


def _plain(record: Any) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}


def _table(rows: Sequence[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    columns = [pa.array([row[name] for row in rows], type=schema.field(name).type) for name in schema.names]
    return pa.Table.from_arrays(columns, schema=schema)


def write_parquet(path: Path, table: pa.Table) -> None:
    """Commit `table` to `path`, zstd-compressed, with the schema number in the footer.

    Pages carry a checksum and the footer a digest of the columns' names and types, so that a flipped bit is an error where it
    is read. Equal tables give equal bytes. Raises: ResourceError when the disk is full.
    """
    metadata = {**(table.schema.metadata or {}), _KEY: str(SCHEMA_VERSION).encode(), _COLUMNS_KEY: _columns(table.schema)}
    with committed(path) as temporary:
        pq.write_table(table.replace_schema_metadata(metadata), temporary, compression="zstd", write_page_checksum=True)


def _columns(schema: pa.Schema) -> bytes:
    """Return a digest of names and types; what parquet calls the values of a list is left out."""
    return digest([[field.name, _LIST_OF.sub("<", str(field.type))] for field in schema]).encode()


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Return one parquet file.

    Raises: StoreError when it is missing, damaged or of a newer schema.
    """
    try:
        # ParquetFile, not read_table: a folder named coder=NAME must not become a column.
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            metadata = file.schema_arrow.metadata or {}
            version = int(metadata.get(_KEY, b"1"))
            if version > SCHEMA_VERSION:
                raise StoreError(f"{path} has schema {version}, this release reads up to {SCHEMA_VERSION}; update autointerp")
            if metadata.get(_COLUMNS_KEY, b"") not in (b"", _columns(file.schema_arrow)):
                raise StoreError(f"{path} has other columns than were written; it is damaged, {_AGAIN}")
            return file.read(columns=columns)
    except FileNotFoundError:
        raise StoreError(f"{path} does not exist") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise StoreError(f"{path} cannot be read as parquet ({reason}); it is damaged or truncated, {_AGAIN}") from error
