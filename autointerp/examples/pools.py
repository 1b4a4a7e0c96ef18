"""Which pool of a latent a window belongs to: explain, score or validate.

Every document (or context, see :func:`choose_unit`) has a uniform number in [0, 1) from a hash of (seed, coder, latent,
document), and two cuts part the pools: explain below the first, score below the second, validate above. A normalised text
belongs to the pool of the smallest number among all the windows that say it, so a window whose text also occurs in an earlier
pool belongs to none. Nothing here knows how many examples are wanted: no count, scorer or order can move a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from autointerp.digest import hash64, seed_of
from autointerp.examples.windows import WindowGrid, Windows, ragged

EXPLAIN, SCORE, VALIDATE, NO_POOL = 0, 1, 2, -1
Unit = Literal["document", "context"]

MIN_SCORE = 10
"""Fewest distinct windows the score pool must have."""
MIN_EXPLAIN = 5
"""Fewest distinct windows the explain pool must have."""


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """Where [0, 1) is cut into the three pools."""

    explain: float = 0.45
    """Units below belong to explain."""
    score: float = 0.9
    """Units from `explain` to below this belong to score, the others to validate."""


def choose_unit(documents: np.ndarray, *, min_documents: int) -> Unit:
    """Return what is assigned to pools as a whole: documents where the latent fires in enough of them, else contexts."""
    # Most latents show it by their first windows.
    size = 2 * min_documents
    while len(set(documents[:size].tolist())) < min_documents:
        if size >= len(documents):
            return "context"
        size *= 8
    return "document"


def uniform(seed: int, values: np.ndarray) -> np.ndarray:
    """Return a float64 in [0, 1) for each integer."""
    numbers = hash64(seed, values)
    numbers >>= np.uint64(11)
    return np.asarray(numbers * 2.0**-53)


class LatentPools:
    """The pools of one latent."""

    def __init__(
        self,
        grid: WindowGrid,
        active: Windows,
        *,
        rows: np.ndarray | None,
        coder: str,
        latent: int,
        seed: int,
        unit: Unit,
    ) -> None:
        """Assign windows; `active` are the candidates for positives: `rows` of the grid, or any where `rows` is None."""
        self.unit: Unit = unit
        self._grid = grid
        self._seed = seed_of("pools", seed, coder, latent)
        self._grid_units = grid.document if unit == "document" else grid.context
        self._active = active
        self._own = uniform(self._seed, active.document if unit == "document" else active.context)
        self._other_texts: tuple[np.ndarray, np.ndarray] | None = None
        if rows is None:
            self._smallest, self.is_repeated = self._read_texts(active.text)
            self.has_repeats = bool(self.is_repeated.any())
        else:
            self.is_repeated = grid.num_same.take(rows) > 1
            self.has_repeats = bool(np.count_nonzero(self.is_repeated))
            self._smallest = self._smallest_of(rows, self._own) if self.has_repeats else self._own
        self.num_distinct = self._distinct(np.ones(len(active), bool)) if self.has_repeats else len(active)
        """Distinct texts of candidates, whatever their pool."""
        self.cuts, self.active_pool = self._choose_cuts()
        """Where the pools are parted, and the int8 [E] pool of each candidate, `NO_POOL` where its text belongs to an earlier
        pool."""

    has_repeats: bool
    """Whether any text is repeated."""
    is_repeated: np.ndarray
    """bool [E]; where False, no other candidate has the same text."""

    def members(self, pool: int) -> np.ndarray:
        """Return the rows of the pool's candidates."""
        return np.asarray((self.active_pool == pool).nonzero()[0])

    def of_grid(self, rows: np.ndarray) -> np.ndarray:
        """Return the int8 pool of windows of the grid, `NO_POOL` where the text belongs to an earlier pool."""
        own = uniform(self._seed, self._grid_units.take(rows))
        smallest = self._smallest_of(rows, own)
        if self._other_texts is not None and len(self._other_texts[0]):
            texts, numbers = self._other_texts
            near = np.minimum(np.searchsorted(texts, self._grid.text[rows]), len(texts) - 1)
            same = texts[near] == self._grid.text[rows]
            smallest = smallest.copy()
            smallest[same] = np.minimum(smallest[same], numbers[near[same]])
        return self._pool(own, smallest)

    def _pool(self, own: np.ndarray, smallest: np.ndarray, cuts: Cuts | None = None) -> np.ndarray:
        explain, score = (cuts or self.cuts).explain, (cuts or self.cuts).score
        pool = (own >= explain).view(np.int8) + (own >= score).view(np.int8)
        if smallest is not own:
            pool[(smallest >= explain).view(np.int8) + (smallest >= score).view(np.int8) != pool] = NO_POOL
        return pool

    def _distinct(self, among: np.ndarray) -> int:
        if not self.has_repeats:
            return int(np.count_nonzero(among))
        repeated = self._active.text[among & self.is_repeated]
        return int(np.count_nonzero(among & ~self.is_repeated)) + len(np.unique(repeated))

    def _smallest_of(self, rows: np.ndarray, own: np.ndarray) -> np.ndarray:
        """Return the smallest number among the windows of the grid that say the same as each of `rows`."""
        smallest = own
        repeated = (self._grid.num_same.take(rows) > 1).nonzero()[0]
        if len(repeated):
            smallest = own.copy()
            first, where, back = np.unique(self._grid.first_same[rows[repeated]], return_index=True, return_inverse=True)
            smallest[repeated] = self._smallest_in(first, self._grid.num_same[rows[repeated]][where])[back]
        return smallest

    def _smallest_in(self, first: np.ndarray, num: np.ndarray) -> np.ndarray:
        """Return the smallest number in each run of `by_text`; 1.0 for an empty run."""
        result = np.full(len(first), 1.0)
        row, at = ragged(first, num)
        if len(row):
            numbers = uniform(self._seed, self._grid_units[self._grid.by_text[at]])
            result[num > 0] = np.minimum.reduceat(numbers, np.flatnonzero(np.diff(row, prepend=-1)))
        return result

    def _read_texts(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Candidates off the grid: their texts count for the grid's windows too, and the grid's for theirs.
        unique, back, counts = np.unique(texts, return_inverse=True, return_counts=True)
        smallest = np.full(len(unique), 1.0)
        np.minimum.at(smallest, back, self._own)
        first = np.searchsorted(self._grid.sorted_text, unique, side="left")
        num = np.searchsorted(self._grid.sorted_text, unique, side="right") - first
        smallest = np.minimum(smallest, self._smallest_in(first, num))
        self._other_texts = unique, smallest
        return smallest[back], counts[back] > 1

    def _choose_cuts(self) -> tuple[Cuts, np.ndarray]:
        """Return the usual cuts, or where they leave too little on a side, the ones that part the windows most evenly.

        And the pools that they give.
        Depends on the store, the latent and the seed only. Latents with few windows, or whose windows repeat a few texts, need
        this: 20 windows in 20 documents would leave fewer than 10 to score more often than not.
        """
        usual = Cuts()
        pool = self._pool(self._own, self._smallest, usual)
        enough = all(self._distinct(pool == p) >= MIN_SCORE for p in (EXPLAIN, SCORE))
        if enough or self.num_distinct < MIN_EXPLAIN + MIN_SCORE:
            return usual, pool
        _, first, back = np.unique(self._active.text, return_index=True, return_inverse=True)
        in_grid = self._smallest[first]
        in_active = np.full(len(first), 1.0)
        np.minimum.at(in_active, back, self._own)
        # With validate given up: explain has the texts that a candidate says below the cut, score those nobody says below it.
        candidates = np.unique(np.concatenate([in_grid, in_active, [usual.explain]]))
        num_explain = np.searchsorted(np.sort(in_active), candidates, side="left")
        num_score = len(first) - np.searchsorted(np.sort(in_grid), candidates, side="left")
        even = np.where(num_score >= MIN_SCORE, np.minimum(num_explain, num_score), 0)
        best = np.flatnonzero(even == even.max())
        nearest = best[np.argmin(np.abs(candidates[best] - usual.explain))]
        if even[nearest] == 0:
            return usual, pool
        cuts = Cuts(explain=float(candidates[nearest]), score=1.0)
        return cuts, self._pool(self._own, self._smallest, cuts)
