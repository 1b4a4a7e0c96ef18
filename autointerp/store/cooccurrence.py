"""Nearest neighbours of latents by co-firing: Jaccard similarity of the sets of positions they fire on.

``C_ij`` counts the positions on which latents i and j both fire; the similarity is ``C_ij / (C_ii + C_jj - C_ij)``. The counts
come from sorting pairs that stay in the cache, a few latents at a time: no array of (latents x latents) exists, and no count is
approximate. Where the activations do not fit the budget, their position-major copy lies in a temporary file and they themselves
are read from the store once more, in order.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import IO, Any

import numpy as np
from scipy import sparse

from autointerp.errors import StoreError
from autointerp.files import TEMPORARY_PREFIX, disk_errors
from autointerp.store.neighbours import Ranked, joined, ranked
from autointerp.store.reader import CoderReader

BUDGET_BYTES = 1 << 30
"""Memory for the activations, latent-major and position-major."""
PAIRS_PER_BLOCK = 1 << 22
"""Pairs of activations on one position that a block of latents multiplies, hence most of its non-zero counts."""
_CACHED_PAIRS = 1 << 17
"""Pairs that are counted at a time."""
_CELLS_PER_PAIR = 8
"""With at least one pair to so many latents an array of all of them is the faster way to count; with fewer, to sort is."""
_BYTES_PER_ACTIVATION = 16
_CHUNK = 1 << 22
_POSITIONS = 1 << 14
"""Positions looked up at a time for a latent with many pairs."""


def cooccurring(
    reader: CoderReader,
    *,
    k: int,
    num_positions: int,
    budget_bytes: int = BUDGET_BYTES,
    pairs_per_block: int = PAIRS_PER_BLOCK,
) -> Iterator[Ranked]:
    """Yield for every latent in order its `k` nearest by Jaccard similarity, in blocks of latents.

    Only latents that fire together are neighbours, so a list may be shorter; equal similarities are ordered by index.

    Raises: StoreError when the activations are damaged; ResourceError when the temporary file does not fit.
    """
    count = np.asarray(reader.latents["count"], np.int64)
    if reader.num_activations * _BYTES_PER_ACTIVATION <= budget_bytes:
        yield from _blocks(_InMemory(reader, count, num_positions), count, k=k, pairs_per_block=pairs_per_block)
        return
    for left in reader.folder.glob(f"{TEMPORARY_PREFIX}cooccurrence-*"):
        shutil.rmtree(left, ignore_errors=True)  # of killed processes of earlier releases; what is made now has no name
    with disk_errors(reader.folder), tempfile.TemporaryFile(dir=reader.folder) as file:
        spilled = _OnDisk(reader, count, num_positions, file)
        yield from _blocks(spilled, count, k=k, pairs_per_block=pairs_per_block)


def _blocks(source: _InMemory | _OnDisk, count: np.ndarray, *, k: int, pairs_per_block: int) -> Iterator[Ranked]:
    pairs = np.cumsum(source.pairs)
    sizes = count.astype(_number(count))
    first = 0
    while first < len(count):
        before = int(pairs[first - 1]) if first else 0
        stop = max(first + 1, int(np.searchsorted(pairs, before + pairs_per_block, side="right")))
        yield joined([_nearest(both, sizes, k=k) for both in source.counts(first, stop)])
        first = stop


@dataclass(frozen=True)
class _Both:
    """How often each of consecutive latents fires together with others; rows as those of a sparse matrix."""

    first: int
    starts: np.ndarray
    columns: np.ndarray
    counts: np.ndarray


def _nearest(both: _Both, sizes: np.ndarray, *, k: int) -> Ranked:
    num = len(both.starts) - 1
    counts = both.counts.astype(sizes.dtype, copy=False)
    union = np.repeat(sizes[both.first : both.first + num], np.diff(both.starts))
    union += sizes[both.columns]
    union -= counts
    similarity = np.divide(counts, union, out=union).astype(np.float32, copy=False)
    return ranked(both.first, both.starts, both.columns, similarity, k=k, counts=counts)


def _number(count: np.ndarray) -> Any:
    """Return the smallest float that holds every count and union: then quotients rounded to float32 are the same in both."""
    return np.float32 if 2 * int(count.max(initial=0)) < 1 << 24 else np.float64


class _Source(ABC):
    """Activations by latent and by position."""

    def __init__(self, count: np.ndarray) -> None:
        self._ends, self._width = _ends(count), len(count)
        self.pairs = np.zeros(len(count), np.int64)
        """How many pairs on one position a latent is the first of."""

    @abstractmethod
    def _others(self, low: int, high: int) -> np.ndarray:
        """Return the latents on the positions of activations low..high-1, position by position; asked for in order."""

    def counts(self, first: int, stop: int) -> Iterator[_Both]:
        """Yield how often each of latents first..stop-1 fires together with each latent that it ever does with."""
        ends = _ends(self.pairs[first:stop])
        low = 0
        while low < stop - first:
            high = max(low + 1, int(np.searchsorted(ends, ends[low] + _CACHED_PAIRS, side="right")) - 1)
            if ends[high] - ends[low] > _CACHED_PAIRS:
                yield self._counts_of_one(first + low)
            else:
                yield self._counts_of_few(first + low, first + high)
            low = high

    def _counts_of_few(self, first: int, stop: int) -> _Both:
        others = self._others(int(self._ends[first]), int(self._ends[stop]))
        if len(others) * _CELLS_PER_PAIR >= (stop - first) * self._width:
            return self._added_up(first, stop, others)
        return self._sorted(first, stop, others)

    def _added_up(self, first: int, stop: int, others: np.ndarray) -> _Both:
        """Count in an array of all latents, for one latent after the other."""
        columns, counts = [], []
        for low, high in pairwise(_ends(self.pairs[first:stop]).tolist()):
            found = np.bincount(others[low:high], minlength=self._width)
            columns.append(found.nonzero()[0])
            counts.append(found[columns[-1]])
        starts = _ends(np.array([len(column) for column in columns]))
        return _Both(first, starts, np.concatenate(columns), np.concatenate(counts))

    def _sorted(self, first: int, stop: int, others: np.ndarray) -> _Both:
        """Sort (latent, other) as one integer each; equal ones are then neighbours."""
        number = np.uint32 if (stop - first) * self._width < 1 << 32 else np.uint64
        rows = (np.arange(stop - first) * self._width).astype(number)
        pairs = np.repeat(rows, self.pairs[first:stop])
        pairs += others.astype(number, copy=False)
        pairs.sort()
        is_last = np.ones(len(pairs), bool)
        np.not_equal(pairs[1:], pairs[:-1], out=is_last[:-1])
        ends = np.flatnonzero(is_last)
        distinct = pairs[ends]
        starts = np.append(np.searchsorted(distinct, rows), len(distinct))
        distinct -= np.repeat(rows, np.diff(starts))
        return _Both(first, starts, distinct, np.diff(ends, prepend=-1))

    def _counts_of_one(self, latent: int) -> _Both:
        counts = np.zeros(self._width, np.int64)
        for low in range(int(self._ends[latent]), int(self._ends[latent + 1]), _POSITIONS):
            others = self._others(low, min(low + _POSITIONS, int(self._ends[latent + 1])))
            counts += np.bincount(others, minlength=self._width)
        columns = np.flatnonzero(counts)
        return _Both(latent, np.array([0, len(columns)]), columns, counts[columns])


class _InMemory(_Source):
    """Activations as a sparse matrix and its transpose."""

    def __init__(self, reader: CoderReader, count: np.ndarray, num_positions: int) -> None:
        super().__init__(count)
        total = int(count.sum())
        index = np.int32 if max(num_positions, len(count), total) < 1 << 31 else np.int64
        positions, filled = np.empty(total, index), 0
        for _, some, _ in reader.blocks():
            positions[filled : filled + len(some)] = some
            filled += len(some)
        ends = self._ends
        self._positions = positions
        by_latent = sparse.csr_matrix(
            (np.ones(total, np.int8), positions, ends.astype(index)), shape=(len(count), num_positions)
        )
        self._by_position = by_latent.T.tocsr()
        fired = np.diff(self._by_position.indptr).astype(np.int64)
        first = 0
        while first < len(count):
            stop = max(first + 1, int(np.searchsorted(ends, ends[first] + _CHUNK, side="right")) - 1)
            partial = _ends(fired[positions[ends[first] : ends[stop]]])
            self.pairs[first:stop] = np.diff(partial[ends[first : stop + 1] - ends[first]])
            first = stop

    def _others(self, low: int, high: int) -> np.ndarray:
        return np.asarray(self._by_position[self._positions[low:high]].indices)


class _OnDisk(_Source):
    """Activations by latent in the store, by position in a file."""

    def __init__(self, reader: CoderReader, count: np.ndarray, num_positions: int, file: IO[bytes]) -> None:
        super().__init__(count)
        self._reader = reader
        fired = np.zeros(num_positions, np.uint32)
        for _, positions, _ in reader.blocks():
            np.add.at(fired, positions, 1)
        self._starts = _ends(fired)
        total = int(self._starts[-1])
        if total != self._ends[-1]:
            raise StoreError(
                f"{reader.folder} holds {total} activations and its latents.parquet {self._ends[-1]}; restore both"
            )
        _allocate(file, total * np.dtype(np.uint32).itemsize)
        self._latents = np.memmap(file, np.uint32, "r+", shape=(total,))
        free = self._starts[:-1].copy()
        for latents, positions, _ in reader.blocks():
            order = np.argsort(positions, kind="stable")
            ordered = positions[order]
            run = np.flatnonzero(np.diff(ordered, prepend=-1))
            sizes = np.diff(run, append=len(ordered))
            at = free[ordered] + _within(sizes)
            self._latents[at] = latents[order]
            free[ordered[run]] += sizes
            np.add.at(self.pairs, latents, fired[positions])
        self._unread = self._read()
        self._at, self._positions = 0, np.zeros(0, np.int64)

    def _read(self) -> Iterator[np.ndarray]:
        for _, positions, _ in self._reader.blocks():
            yield positions

    def _others(self, low: int, high: int) -> np.ndarray:
        assert low == self._at, "activations are read once, in order"
        pieces, self._at = [self._positions], high
        missing = high - low - len(self._positions)
        while missing > 0:
            pieces.append(next(self._unread))
            missing -= len(pieces[-1])
        positions = np.concatenate(pieces) if len(pieces) > 1 else pieces[0]
        positions, self._positions = positions[: high - low], positions[high - low :]
        starts = self._starts[positions]
        sizes = self._starts[positions + 1] - starts
        return np.asarray(self._latents[np.repeat(starts, sizes) + _within(sizes)])


def _allocate(file: IO[bytes], num_bytes: int) -> None:
    """Reserve a file's room, since a full disk is a deadly signal where memory is mapped.

    Raises: OSError when the disk is full.
    """
    try:
        os.posix_fallocate(file.fileno(), 0, num_bytes)
    except (AttributeError, OSError) as error:  # not there on macOS, and not on every disk
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        for start in range(0, num_bytes, _CHUNK):
            file.write(bytes(min(_CHUNK, num_bytes - start)))
    file.flush()


def _ends(sizes: np.ndarray) -> np.ndarray:
    """Return int64 [n + 1]: where each of consecutive runs begins, and the end."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def _within(sizes: np.ndarray) -> np.ndarray:
    """Return 0, 1, ... counted anew in each run."""
    return np.asarray(np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes))
