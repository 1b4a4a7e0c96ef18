"""Merging the runs of one coder into parts sorted by (latent, position).

The latents are cut into parts and those into ranges whose activations fit in the memory budget; for each range the matching
rows of every run are read, sorted and appended. What a range leaves of a row group is held for the next one, so that each is
decoded once; where there are too many files for that, ``premerge`` makes fewer of them first. A single latent too large to be
sorted is streamed run by run, which is in order already. A part's progress file, its rows of ``latents.parquet``, is written
after the part, and the runs are deleted after the last of them; so a merge can be killed anywhere and goes on with the first
part that has no progress file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from autointerp.errors import StoreError
from autointerp.store.latents import Summary, latents_table, summarise, summarise_stream
from autointerp.store.layout import FileEntry, activations_part, merged_part
from autointerp.store.parquet import (
    ACTIVATION_COMPRESSION,
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
    SortedRows,
    check_rows,
    holds_values,
    run_schema,
)

_GROUPS_PER_RANGE = 32
_GROUPS_PER_BLOCK = 16
"""Row groups that are read at a time where a latent is too large to be read at once."""
_BLOCK_ROWS = 1 << 16
"""Activations that are put in columns and summarised at a time, so that they stay in the cache."""
_Columns = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """What every part of a merge needs to know."""

    ctx_len: int
    num_tokens: int
    row_group_rows: int
    part_rows: int
    poll: Callable[[], None]
    """Called between two ranges; what it raises ends the merge, which can be gone on with."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One sorted file to be merged: of a run, or of several files that were merged before."""

    name: str
    """File name in the coder's folder of runs."""
    num_rows: int
    """Activations in it."""
    dtype: str
    """``float16`` or ``float32``, of the values."""
    start: int
    """Position from which those in the file are counted."""
    position_bits: int
    """Bits of a position in the file."""
    runs: tuple[int, int]
    """The first run in it and the last; files that share a run have positions among each other's, and others have not."""
    files: tuple[int, int]
    """The first file of a run in it and the last + 1, numbered over all runs."""


@dataclass(frozen=True, kw_only=True)
class _Held:
    """What was not wanted yet of the row group that was decoded last."""

    group: int
    low: int
    """From which latent on."""
    keys: np.ndarray
    values: np.ndarray | None


@dataclass(kw_only=True)
class _Spilled:
    """A source, opened."""

    path: Path
    runs: tuple[int, int]
    first_latents: np.ndarray
    """uint32, the first latent of each row group."""
    start: int
    position_bits: int
    value_bits: int
    """Bits of a key below the position that are the value; 0 where values have a column."""
    held: _Held | None = None

    @property
    def shift(self) -> int:
        """Bits of a key below the latent: position and value."""
        return self.position_bits + self.value_bits


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
    """Sorted files of one coder, and the parts merged earlier where there are any, read by ranges of latents."""

    def __init__(
        self,
        folder: Path,
        sources: Sequence[Source],
        *,
        width: int,
        position_bits: int,
        range_rows: int,
        poll: Callable[[], None],
        stored: StoredParts | None = None,
    ) -> None:
        """`position_bits` are those of a position counted from the start of the corpus; `range_rows` are held in memory."""
        self.counts = np.zeros(width, np.int64)
        """Activations of each latent."""
        self._folder = folder
        self._bits = position_bits
        self._range_rows = range_rows
        self._groups = max(1, min(_GROUPS_PER_BLOCK, range_rows // RUN_GROUP_ROWS))
        self._files = []
        for source in sources:
            poll()
            self._files.append(self._open(source))
        schema = activations_schema(np.dtype(stored.dtype)) if stored else None
        self._stored = [self._scan(path, schema, stored.num_positions) for path in stored.paths] if stored else []
        dtypes = {source.dtype for source in sources} | ({stored.dtype} if stored else set())
        self.dtype = np.dtype(np.float32 if "float32" in dtypes else np.float16)
        """Of the merged values: float16 when every file fits."""
        self.holds_values = holds_values(self.dtype, position_bits + width.bit_length())
        """Whether keys of all latents have room for the values."""

    def _open(self, source: Source) -> _Spilled:
        path = self._folder / source.name
        first, num_rows = [], 0
        dtype, width, position_bits = np.dtype(source.dtype), len(self.counts), source.position_bits
        is_packed = holds_values(dtype, position_bits + width.bit_length())
        value_bits = VALUE_BITS if is_packed else 0
        schema = run_schema(None if is_packed else dtype, position_bits=position_bits)
        with open_parquet(path, schema) as opened:
            if (opened.schema_arrow.metadata or {}).get(POSITION_BITS) != schema.metadata[POSITION_BITS]:
                raise StoreError(
                    f"{path} is damaged or another version of autointerp wrote it; remove the unfinished store and build again"
                )
            for group in range(opened.num_row_groups):
                keys = numbers(opened.read_row_group(group, columns=["key"], use_threads=False)["key"])
                latents = (keys >> np.uint64(position_bits + value_bits)).view(np.int64)
                if latents[-1] >= width:
                    raise StoreError(
                        f"{path} has latent {latents[-1]} of a coder of width {width}; remove the store and build again"
                    )
                first.append(latents[0])
                num_rows += len(latents)
                counts = np.bincount(latents - latents[0])
                self.counts[latents[0] : latents[0] + len(counts)] += counts
        check_rows(path, source.num_rows, num_rows)
        return _Spilled(
            path=path,
            runs=source.runs,
            first_latents=np.array(first, np.uint32),
            start=source.start,
            position_bits=position_bits,
            value_bits=value_bits,
        )

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
    def best_range(self) -> int:
        """How many activations to sort at a time: enough that files are opened seldom; no more, to stay in the cache."""
        num_files = len(self._files) + bool(self._stored)  # the parts stored earlier follow each other, so they are as one
        return min(self._range_rows, _GROUPS_PER_RANGE * RUN_GROUP_ROWS * max(1, num_files))

    def is_streamed(self, low: int, high: int) -> bool:
        """Return whether latents low..high-1 are a single one that is too large to be sorted in memory."""
        return high - low == 1 and bool(self.counts[low] > self._range_rows)

    def comes_in_pieces(self, low: int, high: int) -> bool:
        """Return whether :meth:`rows` gives latents low..high-1, a single large one, in several pieces."""
        return high - low == 1 and bool(self.counts[low] > min(self._range_rows, _BLOCK_ROWS))

    def rows(self, low: int, high: int) -> Iterator[tuple[int, int, Callable[[], Iterator[_Columns]]]]:
        """Yield all of latents low..high-1, a few or a single large one at a time: the first, the last + 1, and what gives
        their activations in order, in one piece, or in several where it is a large one.

        Pieces are (latents counted from the first, positions, values), with values in the merged dtype.
        Raises: StoreError when a latent has two values at one position.
        """
        if self.is_streamed(low, high):
            yield low, high, partial(self._blocks, low)
            return
        ordered = self._sorted(self._files, low, high, stored=self._stored)
        start = 0
        for first, end in cut(self.counts[low:high], _BLOCK_ROWS):
            stop = start + int(self.counts[low + first : low + end].sum())
            yield low + first, low + end, partial(self._pieces, ordered, start, stop, first=first)
            start = stop

    def _pieces(self, ordered: SortedRows, start: int, stop: int, *, first: int) -> Iterator[_Columns]:
        for at in range(start, max(stop, start + 1), _BLOCK_ROWS):
            yield self._columns(ordered, at, min(stop, at + _BLOCK_ROWS), first=first)

    def _blocks(self, latent: int) -> Iterator[_Columns]:
        """Yield one latent in order: what is in one file block by block, the rest run by run."""
        for stored in self._stored:
            for latents, positions, values in _read_stored(stored, latent, latent + 1, groups=self._groups):
                yield np.zeros(len(latents), np.int64), positions, values.astype(self.dtype)
        for ordered in self._streamed(latent):
            yield from self._pieces(ordered, 0, len(ordered), first=0)

    def keys(self, low: int, high: int) -> Iterator[Sequence[np.ndarray]]:
        """Yield all of latents low..high-1 as columns of a run's file with positions counted from the start of the corpus.

        Raises: StoreError when a latent has two values at one position.
        """
        base = np.uint64(low << self._bits + (VALUE_BITS if self.holds_values else 0))
        for ordered in self._streamed(low) if self.is_streamed(low, high) else [self._sorted(self._files, low, high)]:
            for start in range(0, len(ordered), _BLOCK_ROWS):
                stop = min(len(ordered), start + _BLOCK_ROWS)
                self._check_twins(ordered, start, stop)
                keys, *values = ordered.columns(start, stop) if self.holds_values else ordered.rows(start, stop)
                yield keys + base, *values

    def _streamed(self, latent: int) -> Iterator[SortedRows]:
        """Yield one latent in order."""
        for files in self._runs():
            if len(files) > 1:
                yield self._sorted(files, latent, latent + 1)
                continue
            for read in _read(files[0], latent, latent + 1, groups=self._groups):
                yield self._joined([(files[0], *read)], latent, latent + 1)

    def _runs(self) -> list[list[_Spilled]]:
        """Return the files, those together whose positions are among each other's."""
        runs: list[list[_Spilled]] = []
        for file in self._files:
            if runs and file.runs[0] <= runs[-1][-1].runs[1]:
                runs[-1].append(file)
            else:
                runs.append([file])
        return runs

    def _sorted(self, files: Sequence[_Spilled], low: int, high: int, *, stored: Sequence[_Stored] = ()) -> SortedRows:
        """Return latents low..high-1, with (latent - low, position) as key."""
        blocks = [block for part in stored for block in _read_stored(part, low, high)]
        return self._joined([(file, *read) for file in files for read in _read(file, low, high)], low, high, blocks=blocks)

    def _joined(
        self,
        pieces: Sequence[tuple[_Spilled, np.ndarray, np.ndarray | None]],
        low: int,
        high: int,
        *,
        blocks: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]] = (),
    ) -> SortedRows:
        key_bits = self._bits + (high - low).bit_length()
        is_packed = holds_values(self.dtype, key_bits)
        return SortedRows(
            chain(
                ((self._key(latents - np.uint32(low), positions), values) for latents, positions, values in blocks),
                (self._keyed(*piece, low, is_packed=is_packed) for piece in pieces),
            ),
            sum(len(values) for _, _, values in blocks) + sum(len(keys) for _, keys, _ in pieces),
            dtype=self.dtype,
            key_bits=key_bits,
            is_sorted=len(blocks) + len({file.path for file, _, _ in pieces}) <= 1,
        )

    def _key(self, latents: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return latents.astype(np.uint64) << np.uint64(self._bits) | positions.astype(np.uint64)

    def _keyed(
        self, file: _Spilled, keys: np.ndarray, values: np.ndarray | None, low: int, *, is_packed: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return keys of a file as keys of the corpus, and the values where those do not hold them."""
        shift = file.shift
        keys = keys - np.uint64(low << shift)
        if file.value_bits and not is_packed:
            values = keys.astype(np.uint16).view(np.float16)
            keys >>= np.uint64(file.value_bits)
            shift -= file.value_bits
        if self._bits > file.position_bits:
            below = keys & np.uint64((1 << shift) - 1)
            keys ^= below
            keys <<= np.uint64(self._bits - file.position_bits)
            keys |= below
        keys += np.uint64(file.start << (shift - file.position_bits))
        return keys, values

    def _columns(self, ordered: SortedRows, start: int, stop: int, *, first: int) -> _Columns:
        self._check_twins(ordered, start, stop)
        keys, values = ordered.rows(start, stop)
        latents = (keys >> np.uint64(self._bits)).view(np.int64) - first
        return latents, (keys & np.uint64((1 << self._bits) - 1)).view(np.int64), values

    def _check_twins(self, ordered: SortedRows, start: int, stop: int) -> None:
        if ordered.has_twins(start, stop):
            raise StoreError(f"{self._folder} has two values of one latent at one position; the caching job gave one twice")


def _read(file: _Spilled, low: int, high: int, *, groups: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yield the keys of latents low..high-1 in a file, and the values where those have a column, `groups` row groups at a time.

    The file holds what is left of the last row group, so that who reads on from `high` decodes nothing twice.
    """
    first = max(0, int(np.searchsorted(file.first_latents, low, side="left")) - 1)
    stop = int(np.searchsorted(file.first_latents, high, side="left"))
    if stop <= first:
        return
    edges = np.array([low << file.shift, high << file.shift], np.uint64)
    held, file.held = file.held, None
    if held is not None and held.group == first and held.low <= low:
        begin, end = np.searchsorted(held.keys, edges)
        values = None if held.values is None else held.values[begin:end]
        if begin < end:
            yield held.keys[begin:end], values
        first += 1
        rest = held.keys[end:], None if held.values is None else held.values[end:]
    if first < stop:
        with open_parquet(file.path) as opened:
            for start in range(first, stop, groups or stop):
                wanted = list(range(start, min(stop, start + (groups or stop))))
                table = opened.read_row_groups(wanted, use_threads=False)
                keys = numbers(table["key"])
                values = None if file.value_bits else numbers(table["activation"])
                begin, end = np.searchsorted(keys, edges)
                # Copies: views would keep all that was decoded in memory.
                rest = keys[end:].copy(), None if values is None else values[end:].copy()
                if begin < end:
                    yield keys[begin:end].copy(), None if values is None else values[begin:end].copy()
    file.held = _Held(group=stop - 1, low=high, keys=rest[0], values=rest[1])


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
    encoding, statistics = activation_encoding(spilled.dtype), ["latent", "position"]
    with parquet_sink(file, schema, encoding=encoding, statistics=statistics, compression=ACTIVATION_COMPRESSION) as sink:
        rows = RowGroups(sink, options.row_group_rows)
        for start, stop in cut(spilled.counts[low:high], spilled.best_range):
            options.poll()
            summaries += _merge_range(spilled, rows, options, low=low + start, high=low + stop)
        rows.close()
    assert sink.entry is not None
    table = latents_table(
        summaries, first_latent=low, part=part, num_tokens=options.num_tokens, row_group_rows=options.row_group_rows
    )
    metadata = {_ENTRY: sink.entry.model_dump_json().encode()}
    write_table(path / merged_part(coder, part), table.replace_schema_metadata(metadata))


def _merge_range(spilled: SpilledCoder, rows: RowGroups, options: MergeOptions, *, low: int, high: int) -> Iterator[Summary]:
    """Append the rows of a range; yield the statistics of its latents."""
    for first, end, pieces in spilled.rows(low, high):
        appended = _appended(pieces(), rows, options, first=first)
        if spilled.comes_in_pieces(first, end):
            yield _summarise_pieces(appended, pieces, ctx_len=options.ctx_len)
        else:
            [columns] = appended
            yield summarise(*columns, num_latents=end - first, ctx_len=options.ctx_len)


def _appended(pieces: Iterator[_Columns], rows: RowGroups, options: MergeOptions, *, first: int) -> Iterator[_Columns]:
    for latents, positions, values in pieces:
        options.poll()
        rows.add((latents + first).astype(np.uint32), positions, values)
        yield latents, positions, values


def _summarise_pieces(pieces: Iterator[_Columns], again: Callable[[], Iterator[_Columns]], *, ctx_len: int) -> Summary:
    def pairs(columns: Iterator[_Columns]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return ((positions, values) for _, positions, values in columns)

    return summarise_stream(pairs(pieces), lambda: pairs(again()), ctx_len=ctx_len)


class RowGroups:
    """Cuts a stream of sorted columns into row groups of one size, wherever its blocks end."""

    def __init__(self, sink: ParquetSink, rows: int) -> None:
        self._sink, self._size = sink, rows
        self._pending: list[tuple[np.ndarray, ...]] = []
        self._num_pending = 0

    def add(self, *columns: np.ndarray) -> None:
        """Append rows."""
        start, num_rows = 0, len(columns[0])
        while start < num_rows:
            stop = min(num_rows, start + self._size - self._num_pending)
            self._pending.append(tuple(column[start:stop] for column in columns))
            self._num_pending += stop - start
            start = stop
            if self._num_pending == self._size:
                self.close()
        # What waits for the next block must not keep the whole of this one in memory.
        self._pending = [tuple(column.copy() for column in piece) for piece in self._pending]

    def close(self) -> None:
        """Write what is left."""
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
