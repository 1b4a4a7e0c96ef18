"""Looks up the windows that are most like those of a latent, for several latents at once where it is known which come next.

A search reads the vectors of all windows once, however many it is for; what it finds does not depend on what else is looked up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import numpy as np

from autointerp.errors import AutointerpError
from autointerp.examples.windows import Similar

LATENTS_PER_SEARCH = 16
"""Latents looked up at once."""
_MAX_KEPT = 8 * LATENTS_PER_SEARCH
"""Latents whose windows wait to be asked for; those found first are forgotten beyond it, and looked up again."""

Latent = tuple[str, int]


class SimilarWindows:
    """Answers for one latent at a time; safe to share between threads."""

    def __init__(self, queries: Callable[[str, int], np.ndarray]) -> None:
        """`queries` returns the rows of the grid that a latent will ask about, none where it will not ask."""
        self._queries = queries
        self._lock, self._searching = threading.Lock(), threading.Lock()
        self._together: dict[Latent, list[Latent]] = {}
        self._found: dict[Latent, np.ndarray] = {}

    def expect(self, latents: Iterable[Latent]) -> None:
        """Say which latents will ask next, in order; the first of each sixteen to ask has all of them looked up."""
        latents = list(latents)
        with self._lock:
            for low in range(0, len(latents), LATENTS_PER_SEARCH):
                together = latents[low : low + LATENTS_PER_SEARCH]
                self._together |= dict.fromkeys(together, together)

    def of(self, index: Similar, latent: Latent, rows: np.ndarray, count: int) -> np.ndarray:
        """Return int64 [len(rows), min(count, G)]: the rows of the grid most like each of a latent's, nearest first."""
        with self._searching:
            # Who comes while others' are looked up waits: its own are likely among them.
            if latent in self._together:
                self._search(index, latent, rows, count)
            found = self._found.pop(latent, None)
        if found is None or found.shape[1] < min(count, len(index)):
            return index.nearest(rows, count)
        return found[:, :count]

    def _search(self, index: Similar, latent: Latent, rows: np.ndarray, count: int) -> None:
        queries = {latent: rows}
        with self._lock:  # not held while it searches, so that `expect` never waits
            others = [other for other in self._together.pop(latent) if self._together.pop(other, None) is not None]
        for other in others:
            try:
                queries[other] = self._queries(*other)
            except AutointerpError:
                continue  # told when it is asked for itself
        near = index.nearest(np.concatenate(list(queries.values())), count)
        high = 0
        for other, mine in queries.items():
            low, high = high, high + len(mine)
            if len(mine):
                self._found[other] = near[low:high]
        while len(self._found) > _MAX_KEPT:
            self._found.pop(next(iter(self._found)))
