"""Where silent windows come from: a registry of sources, each drawing without replacement from one pool of one latent.

A source returns rows of the window grid in an order of its own; what does not belong (the latent fires there, another pool, a
text drawn before) is removed by :class:`SilentWindows`, so that no source can break the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import accumulate, pairwise

import numpy as np

from autointerp.digest import hash64, seed_of
from autointerp.errors import ConfigError, nearest
from autointerp.examples.pools import LatentPools
from autointerp.examples.windows import Corpus, WindowGrid, cut_tokens
from autointerp.records import NeighbourKind, Source

_CHUNK = 512
_SPARE = 16
_MAX_PROBES = 32 * _CHUNK
_FREQUENT = 0.05

PER_NEIGHBOUR = 10
"""Most windows that one neighbour gives."""
_WALK = 64
NUM_QUERIES = 10
"""Strongest windows that embedding negatives are like."""
_FIRST_SEARCH = 256
"""Windows looked up for each at first, of which few are needed."""


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
    neighbours: Callable[[NeighbourKind], np.ndarray]
    """Returns the latent's neighbours, nearest first.

    Raises: StoreError when nobody computed them."""
    windows_of: Callable[[int], np.ndarray]
    """Returns the rows of the grid in which another latent of the coder fires, from its strongest."""
    strongest: Callable[[int], np.ndarray]
    """Returns the rows of the grid in which the latent fires most strongly, of this pool, each text once."""
    similar: Callable[[np.ndarray, int], np.ndarray]
    """Returns for each row of the grid those most like it, nearest first, up to a number.

    Raises: StoreError when the store's windows are not embedded."""
    lenders: dict[int, int] = field(default_factory=dict)
    """Latent whose activations an example keeps, by row of the grid; filled in by the sources that walk other latents."""

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

    def distinct(self, rows: np.ndarray, count: int) -> np.ndarray:
        """Return the first `count` of the rows, no normalised text twice; all there are where there are fewer."""
        # Few texts come twice, so a few rows more than wanted hold enough of them nearly always.
        for many in (count + _SPARE, len(rows)):
            head = rows[:many]
            texts = self.grid.text.take(head)
            order = texts.argsort(kind="stable")
            ordered = texts.take(order)
            again = order[1:][ordered[1:] == ordered[:-1]]
            if len(again):
                is_first = np.ones(len(head), bool)
                is_first[again] = False
                head = head[is_first]
            if len(head) >= count or many >= len(rows):
                break
        return head[:count]

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
    kind: NeighbourKind | None = None
    """The table of neighbours that it walks, or None."""
    needs_embeddings: bool = False
    """Whether it looks windows up in the store's index of embeddings."""


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


def draw_random(windows: SilentWindows, wanted: Sequence[tuple[int, str, int]]) -> list[np.ndarray]:
    """Return for each (pool, name, count) the first `count` admitted rows of :func:`probe`, no normalised text twice.

    As the probes of several pools and names are looked up in one go, this takes the time of one.
    """
    grid, fires = windows.grid, windows.fires
    seeds = [seed_of(name, windows.seed, pool) for pool, name, _ in wanted]
    if len(grid) > _MAX_PROBES:
        sizes, steps, pool_of = _steps(tuple((pool, count) for pool, _, count in wanted))
        probed = (hash64(np.array(seeds, np.uint64).repeat(sizes), steps) % np.uint64(len(grid))).astype(np.int64)
        belongs = windows.pools.of_grid(probed) == pool_of
        belongs &= ~fires.take(probed)
        where = belongs.nonzero()[0]
        rows, ends = probed.take(where), where.searchsorted(list(accumulate(sizes)))
        admitted = [rows[low:high] for low, high in pairwise([0, *ends.tolist()])]
    else:
        silent = (~fires).nonzero()[0]
        pools, start = windows.pools.of_grid(silent), grid.start.take(silent)
        admitted = []
        for (pool, _, _), seed in zip(wanted, seeds, strict=True):
            mine = (pools == pool).nonzero()[0]
            admitted.append(silent.take(mine.take(hash64(seed, start.take(mine)).argsort())))
    found = [windows.distinct(rows, count) for rows, (_, _, count) in zip(admitted, wanted, strict=True)]
    if len(grid) > _MAX_PROBES:
        for i, (pool, name, count) in enumerate(wanted):
            if len(found[i]) < count:
                of_pool = replace(windows, pool=pool)
                found[i] = of_pool.first(probe(of_pool, name), count, taken=np.zeros(0, np.int64))
    return found


@lru_cache
def _steps(wanted: tuple[tuple[int, int], ...]) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Return how many probes to make for each (pool, count), nearly always enough; and of every probe its number and pool."""
    sizes = [min(_MAX_PROBES, 3 * count + 4 * _SPARE) for _, count in wanted]
    return (
        sizes,
        np.concatenate([np.arange(size) for size in sizes]),
        np.array([pool for pool, _ in wanted], np.int8).repeat(sizes),
    )


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


def _walk(kind: NeighbourKind, windows: SilentWindows) -> Iterator[np.ndarray]:
    """Yield up to ten of each neighbour's strongest windows, from the nearest neighbour on."""
    for neighbour in windows.neighbours(kind).tolist():
        rows = windows.windows_of(neighbour)
        chunks = (rows[low : low + _WALK] for low in range(0, len(rows), _WALK))
        # Only those that belong count: the strongest windows of a near neighbour are often the latent's own.
        chosen = windows.first(chunks, PER_NEIGHBOUR, taken=np.zeros(0, np.int64))
        for row in chosen.tolist():
            windows.lenders.setdefault(row, neighbour)
        yield chosen


def _embedding(windows: SilentWindows) -> Iterator[np.ndarray]:
    """Yield windows like the latent's ten strongest: the nearest of each in turn, then the next of each.

    So n windows are at most ceil(n / 10) of any one query, and more are the same ones and more. The queries are of the pool
    that the negatives are of, and of no other.
    """
    queries = windows.strongest(NUM_QUERIES)
    searched: dict[int, np.ndarray] = {}

    def near(query: int) -> Iterator[int]:
        done, count = 0, _FIRST_SEARCH
        while done < len(windows.grid):
            if count not in searched:
                searched[count] = windows.similar(queries, count)
            row = searched[count][query]
            yield from windows.admits(row[done:]).tolist()
            done, count = len(row), 8 * count

    streams = [near(query) for query in range(len(queries))]
    said: set[int] = set()
    while streams:
        chosen = []
        for stream in list(streams):
            row = next((row for row in stream if int(windows.grid.text[row]) not in said), None)
            if row is None:
                streams.remove(stream)
            else:
                said.add(int(windows.grid.text[row]))
                chosen.append(row)
        yield np.array(chosen, np.int64)


def _neighbours(kind: NeighbourKind) -> NegativeSource:
    label: dict[NeighbourKind, Source] = {
        "cooccurrence": "neighbour_cooccurrence",
        "decoder": "neighbour_decoder",
        "encoder": "neighbour_encoder",
    }
    return NegativeSource(label=label[kind], draw=partial(_walk, kind), kind=kind)


NEGATIVES: dict[str, NegativeSource] = {
    "random": NegativeSource(label="random", draw=_random),
    "same_token": NegativeSource(label="same_token", draw=_same_token),
    "neighbour_cooccurrence": _neighbours("cooccurrence"),
    "neighbour_decoder": _neighbours("decoder"),
    "neighbour_encoder": _neighbours("encoder"),
    "embedding": NegativeSource(label="embedding", draw=_embedding, needs_embeddings=True),
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
