"""Which of a latent's windows are taken: strata of equal rank, the strongest, uniformly, by squared activation, or mixed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np

from autointerp.digest import hash64, seed_of
from autointerp.examples.windows import Windows, has_equal, stable_argsort

Sampling = Literal["quantiles", "top", "random", "mix", "importance", "top_importance"]


@lru_cache(maxsize=1 << 12)
def spread(total: int, parts: int) -> np.ndarray:
    """Return int64 [parts] that sum to `total`: equal, with the remainder spread over the parts. Read-only.

    Which parts get one more follows one fixed order (0, 5, 2, 7, 1, ... of 10), so a smaller total never has more in any part.
    """
    result = np.asarray((_turns(parts) < total % parts) + total // parts)
    result.flags.writeable = False
    return result


@lru_cache
def _turns(parts: int) -> np.ndarray:
    """Return int64 [parts]: which turn each part has to get one more."""
    # Van der Corput order: every prefix is spread about evenly.
    order: dict[int, None] = {}
    fractions = [0.0]
    while len(order) < parts:
        order.update((int(f * parts), None) for f in fractions)
        fractions += [f + 0.5 / len(fractions) for f in fractions]
    turns = np.empty(parts, np.int64)
    turns[list(order)] = np.arange(parts)
    return turns


@dataclass(frozen=True, kw_only=True)
class Keys:
    """What decides a choice among windows, one number of each kind per window."""

    order: np.ndarray
    """uint64 [E], ascending from the strongest window to the weakest, ties in an order given by the seed."""
    draw: np.ndarray
    """uint64 [E], uniform; the smallest are drawn first."""

    def take(self, rows: np.ndarray) -> Keys:
        """Return the given rows, in the given order."""
        return Keys(order=self.order.take(rows), draw=self.draw.take(rows))


def keys_of(windows: Windows, *, seed: int) -> Keys:
    """Return the keys of each window."""
    seeds = np.array([[seed_of("ties", seed)], [seed_of("choice", seed)]], np.uint64)
    ties, draw = hash64(seeds, windows.start)
    return Keys(order=_order_keys(windows.strength, ties), draw=draw)


def _order_keys(strength: np.ndarray, ties: np.ndarray) -> np.ndarray:
    # One key and one sort: the bits of a positive float32 are ordered as the float is.
    weakness = (~strength.astype(np.float32, copy=False).view(np.uint32)).astype(np.uint64)
    weakness <<= np.uint64(32)
    return np.asarray(weakness | (ties >> np.uint64(32)))


def rank(windows: Windows, *, seed: int) -> np.ndarray:
    """Return the rows from the strongest to the weakest, ties in an order given by the seed."""
    return stable_argsort(_order_keys(windows.strength, hash64(seed_of("ties", seed), windows.start)))


class Choice:
    """Chooses among distinct windows, given by their strength and keys; what several choices need is computed once.

    Quantiles are `parts` strata of equal rank over all of the windows.
    """

    def __init__(self, strength: np.ndarray, keys: Keys, *, parts: int, most: int) -> None:
        """`most` is the greatest count that will be asked for."""
        self._strength, self._keys, self._parts, self._most = strength, keys, parts, most
        self._sizes = spread(len(strength), parts)

    def take(self, count: int, how: Sampling = "quantiles", *, ratio_top: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Return `count` rows (all where there are fewer), strongest first, and the int16 quantile of each, 0 the strongest.

        ``mix`` and ``top_importance`` take the share `ratio_top` from the top and the rest from below: by strata, or by squared
        activation. A greater count gives the same rows and more, except under these two.
        """
        num = len(self._strength)
        count = min(count, num)
        if how == "quantiles":
            rows, run, within = self._drawn
            if count < len(rows):
                chosen = (within < spread(count, self._parts).take(run)).nonzero()[0]
                rows, run = rows.take(chosen), run.take(chosen)
            return rows, run.astype(np.int16)
        keys = self._keys.draw[self.order]
        if how == "top":
            taken = np.arange(count)
        elif how == "random":
            taken = np.argsort(keys, kind="stable")[:count]
        elif how == "importance":
            taken = _weighted(self._strength[self.order].astype(np.float64), keys, count)
        else:
            num_top = round(ratio_top * count)
            rest = count - num_top
            if how == "top_importance":
                below = _weighted(self._strength[self.order[num_top:]].astype(np.float64), keys[num_top:], rest)
            else:
                below = _first_of(_stratified(keys[num_top:], spread(num - num_top, self._parts)), rest, self._parts)
            taken = np.append(np.arange(num_top), num_top + below)
        taken = np.sort(taken)
        return self.order[taken], np.searchsorted(self._ends, taken, side="right").astype(np.int16)

    @cached_property
    def order(self) -> np.ndarray:
        """int64, the rows from the strongest to the weakest."""
        return stable_argsort(self._keys.order)

    @cached_property
    def _ends(self) -> np.ndarray:
        return self._sizes.cumsum()

    @cached_property
    def _drawn(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The most rows that will be asked for, strongest first; then the stratum of each, and its number in it by key."""
        rows, place, run, within = self._strata
        share = spread(min(self._most, len(self._strength)), self._parts)
        chosen = (within < share.take(run)).nonzero()[0]
        chosen = chosen.take(place.take(chosen).argsort())
        return rows.take(chosen), run.take(chosen), within.take(chosen)

    @cached_property
    def _strata(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Rows in runs of the strata, by smallest key in each; then place in the ranking, stratum, and number in it."""
        few = self._few_strata()
        if few is not None:
            return few
        place, run, within = _stratified(self._keys.draw.take(self.order), self._sizes)
        return self.order.take(place), place, run, within

    def _few_strata(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
        """Return the beginning of each stratum, long enough for `most` in all; None where all is sorted as quickly.

        Of many windows only those with small keys can be drawn, so that these alone need an order.
        """
        num = len(self._strength)
        if num < _MANY:
            return None
        share = spread(min(self._most, num), self._parts)
        wanted = float(share.max())
        # Far more than enough in nearly every case; the others are noticed below.
        ratio = (wanted + 6 * math.sqrt(wanted) + 6) / max(1, int(self._sizes.min()))
        if ratio > 0.5:
            return None
        ordered = np.sort(self._keys.order)
        rows = (self._keys.draw < np.uint64(int(ratio * 2**64))).nonzero()[0]
        place = np.searchsorted(ordered, self._keys.order.take(rows))
        run = np.searchsorted(self._ends, place, side="right")
        keys = _stratum_keys(run, self._keys.draw.take(rows))
        order = np.argsort(keys)
        keys = keys.take(order)
        counts = np.bincount(run, minlength=self._parts)
        if (counts < share).any() or has_equal(keys) or has_equal(ordered):
            return None
        run = run.take(order)
        return rows.take(order), place.take(order), run, np.arange(len(run)) - (np.cumsum(counts) - counts).take(run)


_MANY = 1 << 10


def choose(
    windows: Windows, count: int, *, parts: int, seed: int, how: Sampling = "quantiles", ratio_top: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Return what :meth:`Choice.take` does, for a single choice."""
    choice = Choice(windows.strength, keys_of(windows, seed=seed), parts=parts, most=count)
    return choice.take(count, how, ratio_top=ratio_top)


def _stratum_keys(run: np.ndarray, keys: np.ndarray) -> np.ndarray:
    return np.asarray((run.astype(np.uint64) << np.uint64(48)) | (keys >> np.uint64(16)))


def _stratified(keys: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the places of a ranking, in runs of `sizes` and by smallest key within each; then the run and the number in it."""
    run = np.arange(len(sizes)).repeat(sizes)
    order = stable_argsort(_stratum_keys(run, keys))
    return order, run, np.arange(len(keys)) - (sizes.cumsum() - sizes).take(run)


def _first_of(strata: tuple[np.ndarray, np.ndarray, np.ndarray], count: int, parts: int) -> np.ndarray:
    """Return `count` of the places, an equal share from each of `parts` runs."""
    order, run, within = strata
    return np.asarray(order[within < spread(count, parts)[run]])


def _weighted(strength: np.ndarray, keys: np.ndarray, count: int) -> np.ndarray:
    """Return `count` places, drawn without replacement with weights strength^2 (Efraimidis and Spirakis 2006)."""
    if count == 0:
        return np.zeros(0, np.int64)
    uniform = ((keys >> np.uint64(11)) + 0.5) * 2.0**-53
    times = -np.log(uniform) / np.square(strength / strength[0])
    return np.argsort(times, kind="stable")[:count]
