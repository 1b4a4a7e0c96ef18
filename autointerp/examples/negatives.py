"""Where silent windows come from: a registry of sources, each drawing without replacement from one pool of one latent.

A source returns rows of the window grid in an order of its own; what does not belong (the latent fires there, another pool, a
text drawn before) is removed by :class:`SilentWindows`, so that no source can break the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from autointerp.digest import hash64, seed_of
from autointerp.errors import ConfigError, nearest
from autointerp.examples.pools import LatentPools
from autointerp.examples.windows import Corpus, WindowGrid, cut_tokens
from autointerp.records import Source

_CHUNK = 512
_MAX_PROBES = 32 * _CHUNK
_FREQUENT = 0.05


@dataclass(frozen=True, kw_only=True)
class SilentWindows:
    """The silent windows of one pool of one latent, never listed as a whole unless few are left."""

    corpus: Corpus
    grid: WindowGrid
    pools: LatentPools
    pool: int
    fires: np.ndarray
    """bool [G]: the latent fires in this window of the grid."""
    seed: int
    """Seed of (run, coder, latent)."""
    top_token: Callable[[], int | None]
    """Returns the token that carries most of the latent's activation, by its explain pool only; None where that is empty."""

    def admits(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows that are silent and in this pool, in their order."""
        rows = rows[~self.fires[rows]]
        return np.asarray(rows[self.pools.of_grid(rows) == self.pool])

    def first(self, chunks: Iterator[np.ndarray], count: int, *, taken: np.ndarray) -> np.ndarray:
        """Return the first `count` admitted rows of the chunks, no normalised text twice nor in `taken`."""
        found = taken
        for rows in chunks:
            found = np.concatenate([found, self.admits(rows)])
            _, where = np.unique(self.grid.text[found], return_index=True)
            found = found[np.sort(where)]
            if len(found) >= len(taken) + count:
                break
        return found[len(taken) : len(taken) + count]

    def shuffled(self, rows: np.ndarray, name: str) -> Iterator[np.ndarray]:
        """Yield `rows` in chunks, in an order that depends on the seed and `name` only."""
        keys = hash64(seed_of(name, self.seed, self.pool), self.grid.start[rows])
        order = np.argsort(keys, kind="stable")
        for low in range(0, len(order), _CHUNK):
            yield rows[order[low : low + _CHUNK]]


Draw = Callable[[SilentWindows], Iterator[np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class NegativeSource:
    """One way to choose silent windows."""

    label: Source
    """What the examples' `sources` say."""
    draw: Draw
    """Yields chunks of rows of the grid, in the order in which they are wanted."""


def _random(windows: SilentWindows) -> Iterator[np.ndarray]:
    """Yield every window once, in random order: by probing first, since most windows of most latents are silent."""
    return probe(windows, "random")


def probe(windows: SilentWindows, name: str) -> Iterator[np.ndarray]:
    """Yield rows of the whole grid in a random order given by the seed and `name`; some come again."""
    if len(windows.grid) > _MAX_PROBES:
        yield from _probes(windows, name)
    yield from windows.shuffled(np.flatnonzero(~windows.fires), name)


def _probes(windows: SilentWindows, name: str) -> Iterator[np.ndarray]:
    seed, total = seed_of(name, windows.seed, windows.pool), np.uint64(len(windows.grid))
    for low in range(0, _MAX_PROBES, _CHUNK):
        yield (hash64(seed, np.arange(low, low + _CHUNK)) % total).astype(np.int64)


def _same_token(windows: SilentWindows) -> Iterator[np.ndarray]:
    """Yield the windows that contain the token the latent responds to most."""
    token, grid, tokens = windows.top_token(), windows.grid, windows.corpus.tokens
    if token is None:
        return
    # A frequent token is in many windows, of which a few are found sooner by probing; a rare one is looked up.
    if len(grid) > _MAX_PROBES and grid.token_counts[token] > _FREQUENT * len(grid):
        for rows in _probes(windows, "same_token"):
            block = cut_tokens(tokens, grid.start[rows], grid.length[rows], width=grid.window)
            inside = np.arange(grid.window) < grid.length[rows][:, None]
            yield rows[((block == token) & inside).any(axis=1)]
    rows = grid.find(np.flatnonzero(tokens == token))
    yield from windows.shuffled(np.unique(rows[rows >= 0]), "same_token")


NEGATIVES: dict[str, NegativeSource] = {
    "random": NegativeSource(label="random", draw=_random),
    "same_token": NegativeSource(label="same_token", draw=_same_token),
}


def check_negatives(names: tuple[str, ...]) -> None:
    """Check the names of sources.

    Raises: ConfigError naming the first unknown or repeated one.
    """
    if not names:
        raise ConfigError("negatives is empty: name at least one source of negatives, such as 'random'")
    for i, name in enumerate(names):
        if name not in NEGATIVES:
            raise ConfigError(f"negatives: there is no source of negatives {name!r}; {nearest(name, NEGATIVES)}")
        if name in names[:i]:
            raise ConfigError(f"negatives: {name!r} is named twice; name each source once")
