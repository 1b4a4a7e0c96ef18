"""Which of a latent's windows are taken: strata of equal rank, the strongest, uniformly, or by squared activation."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Literal

import numpy as np

from autointerp.digest import hash64, seed_of
from autointerp.examples.windows import ActivatingWindows, stable_argsort

Sampling = Literal["quantiles", "top", "random", "mix", "importance"]


def spread(total: int, parts: int) -> np.ndarray:
    """Return int64 [parts] that sum to `total`: equal, with the remainder spread over the parts.

    Which parts get one more follows one fixed order (0, 5, 2, 7, 1, ... of 10), so a smaller total never has more in any part.
    """
    result = np.full(parts, total // parts, np.int64)
    result[list(_favoured(parts)[: total % parts])] += 1
    return result


@lru_cache
def _favoured(parts: int) -> tuple[int, ...]:
    # Van der Corput order: every prefix is spread about evenly.
    order: dict[int, None] = {}
    fractions = [0.0]
    while len(order) < parts:
        order.update((int(f * parts), None) for f in fractions)
        fractions += [f + 0.5 / len(fractions) for f in fractions]
    return tuple(order)


def rank(windows: ActivatingWindows, *, seed: int) -> np.ndarray:
    """Return the rows from the strongest to the weakest, ties in an order given by the seed."""
    # One key and one sort: the bits of a positive float32 are ordered as the float is.
    weakness = ~windows.strength.astype(np.float32).view(np.uint32)
    ties = hash64(seed_of("ties", seed), windows.start) >> np.uint64(32)
    return stable_argsort((weakness.astype(np.uint64) << np.uint64(32)) | ties)


class Choice:
    """Chooses among distinct, ranked (:func:`rank`) windows; what several choices need is computed once.

    Quantiles are `parts` strata of equal rank over all of the windows.
    """

    def __init__(self, windows: ActivatingWindows, *, parts: int, seed: int) -> None:
        self._windows, self._parts = windows, parts
        self._sizes = spread(len(windows), parts)
        self._keys = hash64(seed_of("choice", seed), windows.start)
        self._quantile = np.repeat(np.arange(parts, dtype=np.int16), self._sizes)

    def take(self, count: int, how: Sampling = "quantiles", *, ratio_top: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Return `count` rows (all where there are fewer), strongest first, and the int16 quantile of each, 0 the strongest.

        A greater count gives the same rows and more (except under ``mix``).
        """
        num = len(self._windows)
        count = min(count, num)
        if how == "top":
            taken = np.arange(count)
        elif how == "random":
            taken = np.argsort(self._keys, kind="stable")[:count]
        elif how == "importance":
            taken = _weighted(self._windows.strength.astype(np.float64), self._keys, count)
        elif how == "mix":
            num_top = round(ratio_top * count)
            below = _stratified(self._keys[num_top:], spread(num - num_top, self._parts))
            taken = np.append(np.arange(num_top), num_top + _first_of(below, count - num_top, self._parts))
        else:
            taken = _first_of(self._strata, count, self._parts)
        taken = np.sort(taken)
        return taken, self._quantile[taken]

    @cached_property
    def _strata(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return _stratified(self._keys, self._sizes)


def choose(
    windows: ActivatingWindows, count: int, *, parts: int, seed: int, how: Sampling = "quantiles", ratio_top: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Return what :meth:`Choice.take` does, for a single choice."""
    return Choice(windows, parts=parts, seed=seed).take(count, how, ratio_top=ratio_top)


def _stratified(keys: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the places of a ranking, in runs of `sizes` and by smallest key within each; then the run and the number in it."""
    run = np.repeat(np.arange(len(sizes)), sizes)
    order = stable_argsort((run.astype(np.uint64) << np.uint64(48)) | (keys >> np.uint64(16)))
    return order, run, np.arange(len(keys)) - np.repeat(np.cumsum(sizes) - sizes, sizes)


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
