"""Merging the runs of one coder into parts sorted by (latent, position).

The latents are cut into parts and those into ranges whose activations fit in the memory budget; for each range the matching
rows of every run are read, sorted and appended. A single latent too large for that is streamed run by run, which is in order
already. A part's progress file, its rows of ``latents.parquet``, is written after the part, and the runs are deleted after the
last of them; so a merge can be killed anywhere and goes on with the first part that has no progress file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
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
    numbers,
    open_parquet,
    parquet_sink,
    write_table,
)
from autointerp.store.runs import (
    POSITION_BITS,
    RUN_GROUP_ROWS,
    VALUE_BITS,
    Run,
    RunFile,
    SortedRows,
    check_rows,
    holds_values,
    run_schema,
)

BYTES_PER_MERGED = 128
"""Memory per activation of a range while it is merged."""
MIN_RANGE_ROWS = 1 << 10
_GROUPS_PER_RANGE = 32
_GROUPS_PER_BLOCK = 16
"""Row groups of a stored part that are read at a time where a latent is too large to be read at once."""
_BLOCK_ROWS = 1 << 16
"""Activations that are put in columns and summarised at a time, so that they stay in the cache."""


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
    start: int
    """Position of the run's first token."""
    value_bits: int
    """Bits of a key below the position that are the value; 0 where values have a column."""
    shift: int
    """Bits of a key below the latent: position and value."""


@dataclass(frozen=True, kw_only=True)
class StoredParts:
    """Merged parts of a coder in a smaller store: one more source of a merge."""

    paths: Sequence[Path]
    num_positions: int
    """Only positions before this one are taken."""
    dtype: str


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """One of those parts."""

    path: Path
    first_latents: np.ndarray
    """uint32, the first latent of each row group."""
    last_latent: int
    num_positions: int


class SpilledCoder:
    """All runs of one coder, and the parts merged earlier where there are any, read by ranges of latents."""

    def __init__(
        self,
        path: Path,
        coder: str,
        runs: Sequence[Run],
        *,
        width: int,
        ctx_len: int,
        contexts_per_run: int,
        stored: StoredParts | None = None,
    ) -> None:
        self.counts = np.zeros(width, np.int64)
        """Activations of each latent."""
        self._folder = folder = path / run_folder(coder)
        self._position_bits = (contexts_per_run * ctx_len).bit_length()
        """Bits of a position, counted from the start of its run."""
        self._runs = [
            [self._open(folder, file, start=run.first_context * ctx_len) for file in run.files[coder]]
            for run in runs
            if run.files[coder]
        ]
        schema = activations_schema(np.dtype(stored.dtype)) if stored else None
        self._stored = [self._scan(path, schema, stored.num_positions) for path in stored.paths] if stored else []
        dtypes = {file.dtype for run in runs for file in run.files[coder]} | ({stored.dtype} if stored else set())
        self.dtype = np.dtype(np.float32 if "float32" in dtypes else np.float16)
        """Of the merged values: float16 when every run fits."""
        last = runs[-1]
        bits = ((last.first_context + last.num_contexts) * ctx_len).bit_length()
        self._bits = max(bits, self._position_bits)
        """Bits of a position, counted from the start of the corpus."""

    def _open(self, folder: Path, file: RunFile, *, start: int) -> _Spilled:
        path = folder / file.name
        first, num_rows = [], 0
        dtype, width = np.dtype(file.dtype), len(self.counts)
        is_packed = holds_values(dtype, self._position_bits + width.bit_length())
        value_bits = VALUE_BITS if is_packed else 0
        shift = self._position_bits + value_bits
        schema = run_schema(None if is_packed else dtype, position_bits=self._position_bits)
        with open_parquet(path, schema) as opened:
            if (opened.schema_arrow.metadata or {}).get(POSITION_BITS) != schema.metadata[POSITION_BITS]:
                raise StoreError(
                    f"{path} is damaged or another version of autointerp wrote it; remove the unfinished store and build again"
                )
            for group in range(opened.num_row_groups):
                keys = numbers(opened.read_row_group(group, columns=["key"], use_threads=False)["key"])
                latents = (keys >> np.uint64(shift)).view(np.int64)
                if latents[-1] >= width:
                    raise StoreError(
                        f"{path} has latent {latents[-1]} of a coder of width {width}; remove the store and build again"
                    )
                first.append(latents[0])
                num_rows += len(latents)
                counts = np.bincount(latents - latents[0])
                self.counts[latents[0] : latents[0] + len(counts)] += counts
        check_rows(path, file, num_rows)
        return _Spilled(path=path, first_latents=np.array(first, np.uint32), start=start, value_bits=value_bits, shift=shift)

    def _scan(self, path: Path, schema: pa.Schema | None, num_positions: int) -> _Stored:
        first, last = [], -1
        for table in iterate_tables(path, ["latent", "position"], schema=schema):
            latents = numbers(table["latent"])
            first.append(latents[0])
            last = int(latents[-1])
            counts = np.bincount(latents[numbers(table["position"]) < num_positions] - first[-1])
            self.counts[first[-1] : first[-1] + len(counts)] += counts
        return _Stored(path=path, first_latents=np.array(first, np.uint32), last_latent=last, num_positions=num_positions)

    @property
    def num_files(self) -> int:
        """Sorted files that a range is read from; the parts stored earlier follow each other, so they are as one."""
        return sum(map(len, self._runs)) + bool(self._stored)

    def rows(self, low: int, high: int) -> Iterator[tuple[int, int, np.ndarray, np.ndarray, np.ndarray]]:
        """Yield all of latents low..high-1 as (first latent, last latent + 1, latents counted from the first, positions,
        values), sorted, a few latents at a time; values in the merged dtype.

        Raises: StoreError when a latent has two values at one position.
        """
        ordered = self._sorted([file for run in self._runs for file in run], low, high, stored=self._stored)
        start = 0
        for first, end in cut(self.counts[low:high], _BLOCK_ROWS):
            stop = start + int(self.counts[low + first : low + end].sum())
            yield low + first, low + end, *self._columns(ordered, start, stop, first=first)
            start = stop

    def blocks(self, latent: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (positions, values) of one latent in order: what is stored block by block, the rest run by run."""
        for stored in self._stored:
            for _, positions, values in _read_stored(stored, latent, latent + 1, groups=_GROUPS_PER_BLOCK):
                yield positions, values.astype(self.dtype)
        for run in self._runs:
            ordered = self._sorted(run, latent, latent + 1)
            if len(ordered):
                yield self._columns(ordered, 0, len(ordered), first=0)[1:]

    def _sorted(self, files: Sequence[_Spilled], low: int, high: int, *, stored: Sequence[_Stored] = ()) -> SortedRows:
        """Return latents low..high-1, with (latent - low, position) as key."""
        key_bits = self._bits + (high - low).bit_length()
        is_packed = holds_values(self.dtype, key_bits)
        blocks = [block for part in stored for block in _read_stored(part, low, high)]
        pieces = [(file, read) for file in files if len((read := _read(file, low, high))[0])]
        return SortedRows(
            chain(
                ((self._key(latents - np.uint32(low), positions), values) for latents, positions, values in blocks),
                (self._keyed(file, *read, low, is_packed=is_packed) for file, read in pieces),
            ),
            sum(len(values) for _, _, values in blocks) + sum(len(keys) for _, (keys, _) in pieces),
            dtype=self.dtype,
            key_bits=key_bits,
            is_sorted=len(blocks) + len(pieces) == 1,
        )

    def _key(self, latents: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return latents.astype(np.uint64) << np.uint64(self._bits) | positions.astype(np.uint64)

    def _keyed(
        self, file: _Spilled, keys: np.ndarray, values: np.ndarray | None, low: int, *, is_packed: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return keys of a run as keys of the corpus, and the values where those do not hold them."""
        shift = file.shift
        keys = keys - np.uint64(low << shift)
        if file.value_bits and not is_packed:
            values = keys.astype(np.uint16).view(np.float16)
            keys >>= np.uint64(file.value_bits)
            shift -= file.value_bits
        if self._bits > self._position_bits:
            below = keys & np.uint64((1 << shift) - 1)
            keys ^= below
            keys <<= np.uint64(self._bits - self._position_bits)
            keys |= below
        keys += np.uint64(file.start << (shift - self._position_bits))
        return keys, values

    def _columns(self, ordered: SortedRows, start: int, stop: int, *, first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if ordered.has_twins(start, stop):
            raise StoreError(f"{self._folder} has two values of one latent at one position; the caching job gave one twice")
        keys, values = ordered.rows(start, stop)
        latents = (keys >> np.uint64(self._bits)).view(np.int64) - first
        return latents, (keys & np.uint64((1 << self._bits) - 1)).view(np.int64), values


def _read(file: _Spilled, low: int, high: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the keys of latents low..high-1 in a file, and their values where those have a column."""
    first = max(0, int(np.searchsorted(file.first_latents, low, side="left")) - 1)
    stop = int(np.searchsorted(file.first_latents, high, side="left"))
    if stop <= first:
        return np.zeros(0, np.uint64), None
    with open_parquet(file.path) as opened:
        table = opened.read_row_groups(list(range(first, stop)), use_threads=False)
    keys = numbers(table["key"])
    at = slice(*np.searchsorted(keys, np.array([low << file.shift, high << file.shift], np.uint64)))
    return keys[at], None if file.value_bits else numbers(table["activation"])[at]


def _read_stored(
    file: _Stored, low: int, high: int, *, groups: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (latents uint32, positions int64, values) of latents low..high-1, `groups` row groups at a time."""
    first = max(0, int(np.searchsorted(file.first_latents, low, side="left")) - 1)
    stop = int(np.searchsorted(file.first_latents, high, side="left"))
    if stop <= first or low > file.last_latent:
        return
    with open_parquet(file.path) as opened:
        for start in range(first, stop, groups or stop):
            wanted = list(range(start, min(stop, start + (groups or stop))))
            table = opened.read_row_groups(wanted, use_threads=False)
            latents, positions, values = (numbers(table[name]) for name in ("latent", "position", "activation"))
            at = slice(*np.searchsorted(latents, [low, high]))
            kept = positions[at] < file.num_positions
            if kept.any():
                yield latents[at][kept], positions[at][kept], values[at][kept]


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
    summaries: list[Summary] = []
    file = path / activations_part(coder, part)
    encoding = activation_encoding(spilled.dtype)
    with parquet_sink(file, schema, encoding=encoding, statistics=["latent", "position"]) as sink:
        rows = _RowGroups(sink, options.row_group_rows)
        # Long enough that the row groups where ranges meet, decoded for both, are few; no longer, to stay in the cache.
        range_rows = min(options.range_rows, _GROUPS_PER_RANGE * RUN_GROUP_ROWS * max(1, spilled.num_files))
        for start, stop in cut(spilled.counts[low:high], range_rows):
            summaries += _merge_range(spilled, rows, options, low=low + start, high=low + stop)
        rows.close()
    assert sink.entry is not None
    table = latents_table(
        summaries, first_latent=low, part=part, num_tokens=options.num_tokens, row_group_rows=options.row_group_rows
    )
    metadata = {_ENTRY: sink.entry.model_dump_json().encode()}
    write_table(path / merged_part(coder, part), table.replace_schema_metadata(metadata))


def _merge_range(spilled: SpilledCoder, rows: _RowGroups, options: MergeOptions, *, low: int, high: int) -> Iterator[Summary]:
    """Append the rows of a range; yield the statistics of its latents."""
    if high - low == 1 and spilled.counts[low] > options.range_rows:
        for positions, values in spilled.blocks(low):
            rows.add(np.full(len(positions), low, np.uint32), positions, values)
        yield summarise_stream(lambda: spilled.blocks(low), ctx_len=options.ctx_len)
        return
    for first, end, latents, positions, values in spilled.rows(low, high):
        rows.add((latents + first).astype(np.uint32), positions, values)
        yield summarise(latents, positions, values, num_latents=end - first, ctx_len=options.ctx_len)


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
            pieces = zip(*self._pending, strict=True)
            columns = [pa.array(column[0] if len(column) == 1 else np.concatenate(column)) for column in pieces]
            self._sink.add(pa.Table.from_arrays(columns, schema=self._sink.schema))
        self._pending, self._num_pending = [], 0


_ENTRY = b"autointerp.store.part"


def _entry_of(path: Path) -> FileEntry:
    with open_parquet(path) as file:
        return FileEntry.model_validate_json(file.schema_arrow.metadata[_ENTRY])


def activations_schema(dtype: np.dtype[Any]) -> pa.Schema:
    """Return the schema of a coder's activations."""
    return pa.schema([("latent", pa.uint32()), ("position", pa.int64()), ("activation", pa.from_numpy_dtype(dtype))])
