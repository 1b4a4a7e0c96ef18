"""Merging the runs of one coder into parts sorted by (latent, position).

The latents are cut into parts and those into ranges whose activations fit in the memory budget; for each range the matching
rows of every run are read, sorted and appended. A single latent too large for that is streamed run by run, which is in order
already. A part's progress file, its rows of ``latents.parquet``, is written after the part, and the runs are deleted after the
last of them; so a merge can be killed anywhere and goes on with the first part that has no progress file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from autointerp.errors import StoreError
from autointerp.store.latents import Summary, latents_table, summarise, summarise_stream
from autointerp.store.layout import FileEntry, activations_part, merged_part, run_folder
from autointerp.store.parquet import (
    ParquetSink,
    activation_encoding,
    iterate_tables,
    open_parquet,
    parquet_sink,
    write_table,
)
from autointerp.store.runs import Run, RunFile, check_rows, run_schema, sort_by_key

BYTES_PER_MERGED = 128
"""Memory per activation of a range while it is merged."""
MIN_RANGE_ROWS = 1 << 10


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """What every part of a merge needs to know."""

    ctx_len: int
    num_tokens: int
    range_rows: int
    row_group_rows: int
    part_rows: int


@dataclass(frozen=True, kw_only=True)
class _Spilled:
    """One sorted file of one run."""

    path: Path
    first_latents: np.ndarray
    """uint32, the first latent of each row group."""
    last_latent: int
    start: int = 0
    """Position of the run's first token."""
    stop: int | None = None
    """Positions from here on are left out; None takes all."""


@dataclass(frozen=True, kw_only=True)
class StoredParts:
    """Merged parts of a coder in a smaller store: one more source of a merge."""

    paths: Sequence[Path]
    num_positions: int
    """Only positions before this one are taken."""
    dtype: str


class SpilledCoder:
    """All runs of one coder, and the parts merged earlier where there are any, read by ranges of latents."""

    def __init__(
        self, path: Path, coder: str, runs: Sequence[Run], *, width: int, ctx_len: int, stored: StoredParts | None = None
    ) -> None:
        self.counts = np.zeros(width, np.int64)
        """Activations of each latent."""
        folder = path / run_folder(coder)
        self._runs = [
            [self._open(folder, file, start=run.first_context * ctx_len) for file in run.files[coder]]
            for run in runs
            if run.files[coder]
        ]
        schema = activations_schema(np.dtype(stored.dtype)) if stored else None
        self._stored = [self._scan(path, schema, stop=stored.num_positions)[0] for path in stored.paths] if stored else []
        dtypes = {file.dtype for run in runs for file in run.files[coder]} | ({stored.dtype} if stored else set())
        self.dtype = np.dtype(np.float32 if "float32" in dtypes else np.float16)
        """Of the merged values: float16 when every run fits."""
        last = runs[-1]
        self._position_bits = np.uint64(((last.first_context + last.num_contexts) * ctx_len).bit_length())

    def _open(self, folder: Path, file: RunFile, *, start: int) -> _Spilled:
        spilled, num_rows = self._scan(folder / file.name, run_schema(np.dtype(file.dtype)), start=start)
        check_rows(spilled.path, file, num_rows)
        return spilled

    def _scan(self, path: Path, schema: pa.Schema | None, *, start: int = 0, stop: int | None = None) -> tuple[_Spilled, int]:
        """Add a file's activations to the counts; return the file and how many it has."""
        first, last, num_rows = [], -1, 0
        for table in iterate_tables(path, ["latent"] if stop is None else ["latent", "position"], schema=schema):
            latents = table["latent"].to_numpy()
            first.append(latents[0])
            last = int(latents[-1])
            kept = latents if stop is None else latents[table["position"].to_numpy() < stop]
            num_rows += len(kept)
            counts = np.bincount(kept - first[-1])
            self.counts[first[-1] : first[-1] + len(counts)] += counts
        return _Spilled(path=path, first_latents=np.array(first, np.uint32), last_latent=last, start=start, stop=stop), num_rows

    def rows(self, low: int, high: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (latents counted from `low`, positions, values) of latents low..high-1, sorted; values in the merged dtype.

        Raises: StoreError when a latent has two values at one position.
        """
        return self._sorted([*self._stored, *(file for run in self._runs for file in run)], low, high)

    def blocks(self, latent: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (positions, values) of one latent in order: what is stored block by block, the rest run by run."""
        for file in self._stored:
            for _, positions, values in _blocks(file, latent, latent + 1, groups=_GROUPS_PER_BLOCK):
                if len(positions):
                    yield positions.astype(np.int64), values.astype(self.dtype)
        for run in self._runs:
            _, positions, values = self._sorted(run, latent, latent + 1)
            if len(positions):
                yield positions, values

    def _sorted(self, files: Sequence[_Spilled], low: int, high: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        keys, values = [np.zeros(0, np.uint64)], [np.zeros(0, self.dtype)]
        for file in files:
            latents, positions, some = _read(file, low, high)
            relative = (latents - np.uint32(low)).astype(np.uint64)
            keys.append(relative << self._position_bits | (positions + np.uint64(file.start)))
            values.append(some.astype(self.dtype))
        key, merged = np.concatenate(keys), np.concatenate(values)
        del keys, values
        key, merged = sort_by_key(key, merged, key_bits=int(self._position_bits) + (high - low).bit_length())
        if (key[1:] == key[:-1]).any():
            raise StoreError(
                f"{files[0].path.parent} has two values of one latent at one position; the caching job gave one twice"
            )
        latents = (key >> self._position_bits).astype(np.int64)
        positions = (key & ((np.uint64(1) << self._position_bits) - np.uint64(1))).astype(np.int64)
        return latents, positions, merged


_GROUPS_PER_BLOCK = 16
"""Row groups of a stored part that are read at a time where a latent is too large to be read at once."""


def _read(file: _Spilled, low: int, high: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (latents, positions uint64, values) of latents low..high-1."""
    for block in _blocks(file, low, high):
        return block
    return np.zeros(0, np.uint32), np.zeros(0, np.uint64), np.zeros(0, np.float16)


def _blocks(
    file: _Spilled, low: int, high: int, *, groups: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield what `_read` returns, so many row groups at a time (None: all at once)."""
    first = max(0, int(np.searchsorted(file.first_latents, low, side="left")) - 1)
    stop = int(np.searchsorted(file.first_latents, high, side="left"))
    if stop <= first or low > file.last_latent:
        return
    with open_parquet(file.path) as opened:
        for start in range(first, stop, groups or stop):
            wanted = list(range(start, min(stop, start + (groups or stop))))
            table = opened.read_row_groups(wanted, use_threads=False)
            latents = table["latent"].to_numpy()
            at = slice(*np.searchsorted(latents, [low, high]))
            positions = table["position"].to_numpy()[at]
            block = latents[at], positions.astype(np.uint64), table["activation"].to_numpy()[at]
            if file.stop is not None and len(positions) and positions.max() >= file.stop:
                kept = positions < file.stop
                block = block[0][kept], block[1][kept], block[2][kept]
            yield block


def cut(counts: np.ndarray, max_rows: int) -> list[tuple[int, int]]:
    """Return ranges [low, high) over all latents with at most `max_rows` activations each, or of a single latent that fires."""
    cumulated = np.concatenate([[0], np.cumsum(counts)])
    ranges, low = [], 0
    while low < len(counts):
        high = int(np.searchsorted(cumulated, cumulated[low] + max_rows, side="right")) - 1
        high = max(low + 1, high)
        ranges.append((low, high))
        low = high
    return ranges


def merge_parts(path: Path, coder: str, spilled: SpilledCoder, options: MergeOptions) -> list[FileEntry]:
    """Write the parts of a coder that are not there yet; return what all of them are."""
    entries = []
    for part, (low, high) in enumerate(cut(spilled.counts, options.part_rows)):
        if not (path / merged_part(coder, part)).exists():
            _merge_part(path, coder, spilled, options, part=part, low=low, high=high)
        entries.append(_entry_of(path / merged_part(coder, part)))
    return entries


def _merge_part(
    path: Path, coder: str, spilled: SpilledCoder, options: MergeOptions, *, part: int, low: int, high: int
) -> None:
    schema = activations_schema(spilled.dtype)
    summaries = []
    file = path / activations_part(coder, part)
    encoding = activation_encoding(spilled.dtype)
    with parquet_sink(file, schema, encoding=encoding, statistics=["latent", "position"]) as sink:
        rows = _RowGroups(sink, options.row_group_rows)
        for start, stop in cut(spilled.counts[low:high], options.range_rows):
            summaries.append(_merge_range(spilled, rows, options, low=low + start, high=low + stop))
        rows.close()
    assert sink.entry is not None
    table = latents_table(
        summaries, first_latent=low, part=part, num_tokens=options.num_tokens, row_group_rows=options.row_group_rows
    )
    metadata = {_ENTRY: sink.entry.model_dump_json().encode()}
    write_table(path / merged_part(coder, part), table.replace_schema_metadata(metadata))


def _merge_range(spilled: SpilledCoder, rows: _RowGroups, options: MergeOptions, *, low: int, high: int) -> Summary:
    if high - low == 1 and spilled.counts[low] > options.range_rows:
        for positions, values in spilled.blocks(low):
            rows.add(np.full(len(positions), low, np.uint32), positions, values)
        return summarise_stream(lambda: spilled.blocks(low), ctx_len=options.ctx_len)
    latents, positions, values = spilled.rows(low, high)
    rows.add((latents + low).astype(np.uint32), positions, values)
    return summarise(latents, positions, values, num_latents=high - low, ctx_len=options.ctx_len)


class _RowGroups:
    """Cuts a stream of sorted activations into row groups of one size, wherever its blocks end."""

    def __init__(self, sink: ParquetSink, rows: int) -> None:
        self._sink, self._size = sink, rows
        self._pending: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._num_pending = 0

    def add(self, latents: np.ndarray, positions: np.ndarray, values: np.ndarray) -> None:
        start = 0
        while start < len(latents):
            stop = min(len(latents), start + self._size - self._num_pending)
            self._pending.append((latents[start:stop], positions[start:stop], values[start:stop]))
            self._num_pending += stop - start
            start = stop
            if self._num_pending == self._size:
                self.close()
        # What waits for the next block must not keep the whole of this one in memory.
        self._pending = [(a.copy(), b.copy(), c.copy()) for a, b, c in self._pending]

    def close(self) -> None:
        if self._pending:
            columns = [pa.array(np.concatenate(column)) for column in zip(*self._pending, strict=True)]
            self._sink.add(pa.Table.from_arrays(columns, schema=self._sink.schema))
        self._pending, self._num_pending = [], 0


_ENTRY = b"autointerp.store.part"


def _entry_of(path: Path) -> FileEntry:
    with open_parquet(path) as file:
        return FileEntry.model_validate_json(file.schema_arrow.metadata[_ENTRY])


def activations_schema(dtype: np.dtype[Any]) -> pa.Schema:
    """Return the schema of a coder's activations."""
    return pa.schema([("latent", pa.uint32()), ("position", pa.int64()), ("activation", pa.from_numpy_dtype(dtype))])
