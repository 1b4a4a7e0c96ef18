"""Nearest neighbours of latents by co-firing: Jaccard similarity of the sets of positions they fire on.

``C_ij`` counts the positions on which latents i and j both fire; the similarity is ``C_ij / (C_ii + C_jj - C_ij)``. The counts
come from sorting pairs that stay in the cache, a few latents at a time: no array of (latents x latents) exists, and no count is
approximate. Where the activations do not fit the budget, their position-major copy lies in a temporary file, and the counts
come from products of sparse matrices.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from autointerp.files import TEMPORARY_PREFIX, disk_errors
from autointerp.store.neighbours import Ranked, joined, ranked
from autointerp.store.reader import CoderReader

BUDGET_BYTES = 1 << 30
"""Memory for the activations, latent-major and position-major."""
PAIRS_PER_BLOCK = 1 << 22
"""Pairs of activations on one position that a block of latents multiplies, hence most of its non-zero counts."""
_CACHED_PAIRS = 1 << 17
"""Pairs that are sorted at a time."""
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
    with (
        disk_errors(reader.folder),
        tempfile.TemporaryDirectory(prefix=f"{TEMPORARY_PREFIX}cooccurrence-", dir=reader.folder) as folder,
    ):
        spilled = _OnDisk(reader, count, num_positions, Path(folder), limit=pairs_per_block)
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


class _InMemory:
    """Activations as a sparse matrix and its transpose."""

    def __init__(self, reader: CoderReader, count: np.ndarray, num_positions: int) -> None:
        total = int(count.sum())
        index = np.int32 if max(num_positions, len(count), total) < 1 << 31 else np.int64
        positions, filled = np.empty(total, index), 0
        for _, some, _ in reader.blocks():
            positions[filled : filled + len(some)] = some
            filled += len(some)
        self._ends = ends = _ends(count)
        self._positions, self._width = positions, len(count)
        by_latent = sparse.csr_matrix(
            (np.ones(total, np.int8), positions, ends.astype(index)), shape=(len(count), num_positions)
        )
        self._by_position = by_latent.T.tocsr()
        fired = np.diff(self._by_position.indptr).astype(np.int64)
        self.pairs = np.zeros(len(count), np.int64)
        first = 0
        while first < len(count):
            stop = max(first + 1, int(np.searchsorted(ends, ends[first] + _CHUNK, side="right")) - 1)
            partial = _ends(fired[positions[ends[first] : ends[stop]]])
            self.pairs[first:stop] = np.diff(partial[ends[first : stop + 1] - ends[first]])
            first = stop

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
        """Sort (latent, other) as one integer each; equal ones are then neighbours."""
        number = np.uint32 if (stop - first) * self._width < 1 << 32 else np.uint64
        others = self._others(int(self._ends[first]), int(self._ends[stop]))
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

    def _others(self, low: int, high: int) -> np.ndarray:
        """Return the latents that fire on the positions of activations low..high-1, position by position."""
        return np.asarray(self._by_position[self._positions[low:high]].indices)


class _OnDisk:
    """Activations by latent in the store, by position in a file."""

    def __init__(self, reader: CoderReader, count: np.ndarray, num_positions: int, folder: Path, *, limit: int) -> None:
        self._reader, self._width, self._limit = reader, len(count), limit
        self._number = _number(count)
        self._fired = np.zeros(num_positions, np.int64)
        for _, positions, _ in reader.blocks():
            np.add.at(self._fired, positions, 1)
        self._starts = _ends(self._fired)
        self._latents = np.memmap(folder / "latents", np.uint32, "w+", shape=(int(self._starts[-1]),))
        free = self._starts[:-1].copy()
        self.pairs = np.zeros(len(count), np.int64)
        for latents, positions, _ in reader.blocks():
            order = np.argsort(positions, kind="stable")
            ordered = positions[order]
            run = np.flatnonzero(np.diff(ordered, prepend=-1))
            sizes = np.diff(run, append=len(ordered))
            at = free[ordered] + _within(sizes)
            self._latents[at] = latents[order]
            free[ordered[run]] += sizes
            np.add.at(self.pairs, latents, self._fired[positions])

    def counts(self, first: int, stop: int) -> Iterator[_Both]:
        """Yield how often each of latents first..stop-1 fires together with each latent that it ever does with."""
        found = [(np.full(len(some), latent - first), some) for latent, some, _ in self._reader.sweep(range(first, stop))]
        rows, positions = (np.concatenate(column) for column in zip(*found, strict=True))
        total = sparse.csr_matrix((stop - first, self._width), dtype=self._number)
        places, back = np.unique(positions, return_inverse=True)
        ends = np.cumsum(self._fired[places])
        low = 0
        while low < len(places):
            # What is read at a time is bounded also where one latent fires everywhere.
            high = max(low + 1, int(np.searchsorted(ends, (ends[low - 1] if low else 0) + self._limit, side="right")))
            mine = (back >= low) & (back < high)
            ones = np.ones(int(np.count_nonzero(mine)), self._number)
            shape = (stop - first, high - low)
            total = total + sparse.csr_matrix((ones, (rows[mine], back[mine] - low)), shape=shape) @ self._rows(
                places[low:high]
            )
            low = high
        yield _Both(first, total.indptr, total.indices, total.data)

    def _rows(self, positions: np.ndarray) -> sparse.csr_matrix:
        sizes = self._fired[positions]
        at = np.repeat(self._starts[positions], sizes) + _within(sizes)
        latents = np.asarray(self._latents[at], np.int64)
        return sparse.csr_matrix((np.ones(len(at), self._number), latents, _ends(sizes)), shape=(len(positions), self._width))


def _ends(sizes: np.ndarray) -> np.ndarray:
    """Return int64 [n + 1]: where each of consecutive runs begins, and the end."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def _within(sizes: np.ndarray) -> np.ndarray:
    """Return 0, 1, ... counted anew in each run."""
    return np.asarray(np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes))
