"""Parquet files of a store: written in row groups under a temporary name, read with their damage told in one sentence.

Pages carry a checksum, so that a flipped bit is an error where it is read and never another number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from autointerp.errors import StoreError
from autointerp.files import committed
from autointerp.store.layout import SCHEMA_VERSION, FileEntry, file_entry

_KEY = b"autointerp.store.schema"


ACTIVATION_COMPRESSION = {"latent": "none", "position": "none", "activation": "zstd"}
"""Of a table of activations: to compress packed differences too saves 6% of the bytes and takes a quarter more time to read."""


def activation_encoding(dtype: np.dtype[Any]) -> dict[str, str]:
    """Return the encoding of a table of activations; by measurement, 3.0 bytes per activation, 4.9 with parquet's defaults.

    Splitting the bytes would make float16 1% smaller still, and DuckDB could not read it.
    """
    values = "PLAIN" if dtype == np.float16 else "BYTE_STREAM_SPLIT"
    return {"latent": "DELTA_BINARY_PACKED", "position": "DELTA_BINARY_PACKED", "activation": values}


class ParquetSink:
    """A parquet file being written; each table added is one row group."""

    def __init__(self, writer: Any, schema: pa.Schema) -> None:
        self._writer = writer
        self.schema = schema
        """What added tables must have."""
        self.num_rows = 0
        self.entry: FileEntry | None = None
        """The committed file; None before that, and where no digest was asked for."""

    def add(self, table: pa.Table) -> None:
        """Append a table as one row group."""
        if table.num_rows:
            self._writer.write_table(table, row_group_size=table.num_rows)
            self.num_rows += table.num_rows


@contextmanager
def parquet_sink(
    path: Path,
    schema: pa.Schema,
    *,
    encoding: Mapping[str, str] | None = None,
    statistics: list[str] | bool = False,
    compression: str | Mapping[str, str] = "zstd",
    with_digest: bool = True,
) -> Iterator[ParquetSink]:
    """Yield a sink; on success `path` is committed and ``sink.entry`` says what it is, else nothing is left.

    Equal tables give equal bytes. Raises: ResourceError when the disk is full.
    """
    schema = schema.with_metadata({**(schema.metadata or {}), _KEY: str(SCHEMA_VERSION).encode()})
    with committed(path) as temporary:
        with pq.ParquetWriter(
            temporary,
            schema,
            compression=compression if isinstance(compression, str) else dict(compression),
            use_dictionary=not encoding,
            column_encoding=dict(encoding) if encoding else None,
            write_statistics=statistics,
            write_page_checksum=True,
        ) as writer:
            sink = ParquetSink(writer, schema)
            yield sink
        entry = file_entry(temporary, num_rows=sink.num_rows) if with_digest else None
    sink.entry = entry


def write_table(path: Path, table: pa.Table, *, row_group_rows: int = 1 << 20) -> FileEntry:
    """Commit a whole table and return its record."""
    with parquet_sink(path, table.schema) as sink:
        for start in range(0, table.num_rows, row_group_rows):
            sink.add(table.slice(start, row_group_rows).replace_schema_metadata(sink.schema.metadata))
    assert sink.entry is not None
    return sink.entry


@contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises over a missing or damaged file into one sentence.

    Raises: StoreError.
    """
    try:
        yield
    except FileNotFoundError:
        raise StoreError(f"{path} is missing from the store; restore it, or build the store again") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise StoreError(f"{path} cannot be read ({reason}); it is damaged or truncated, restore it or build again") from error


@contextmanager
def open_parquet(path: Path, schema: pa.Schema | None = None) -> Iterator[Any]:
    """Yield a ``pyarrow.parquet.ParquetFile``, with the columns of `schema`.

    Raises: StoreError when it is missing or damaged, there or while it is read.
    """
    with damage_told(path), parquet_file(path, schema) as file:
        yield file


def parquet_file(path: Path, schema: pa.Schema | None = None) -> Any:
    """Open one file. Not a dataset: a folder named ``coder=NAME`` must not become a column.

    The footer has no checksum, and a flipped bit there may rename a column or change its type.

    Raises: pa.ArrowInvalid when a column of `schema` is not there as it says; the file may have more.
    """
    file = pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False)
    if schema is not None:
        try:
            found = {field.name: field.type for field in file.schema_arrow}
            for field in schema:
                if found.get(field.name) != field.type:
                    raise pa.ArrowInvalid(f"it has no column {field.name!r} of type {field.type}")
        except BaseException:
            file.close(force=True)
            raise
    return file


def read_table(path: Path, columns: list[str] | None = None, *, schema: pa.Schema | None = None) -> pa.Table:
    """Return a whole file, which has the columns of `schema`.

    Raises: StoreError when it is missing or damaged.
    """
    with open_parquet(path, schema) as file:
        return file.read(columns=columns, use_threads=False)


def iterate_tables(path: Path, columns: list[str] | None = None, *, schema: pa.Schema | None = None) -> Iterator[pa.Table]:
    """Yield a file, which has the columns of `schema`, row group by row group.

    Raises: StoreError when it is missing or damaged.
    """
    with open_parquet(path, schema) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=columns, use_threads=False)


def numbers(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Return a column of numbers; nulls, which only floats may have, are NaN. Read-only, not copied where it need not be.

    Not ``to_numpy``: its first call imports pandas where that is installed, which takes longer than to open a store.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if not column.null_count:
        return np.from_dlpack(column)
    validity, data = column.buffers()
    values = np.from_dlpack(pa.Array.from_buffers(column.type, len(column), [None, data], offset=column.offset)).copy()
    bits = np.unpackbits(np.frombuffer(validity, np.uint8), bitorder="little")
    values[bits[column.offset : column.offset + len(column)] == 0] = np.nan
    return values
