"""Which windows an explainer is shown and a scorer asks about, for one latent at a time.

:class:`Selector` computes the window grid once per store; after that a latent costs its own activations and little else. Every
choice derives from a hash of (seed, coder, latent) and a position, so it depends neither on order nor on what else is chosen.
Sampling follows arXiv 2410.13928 section 3.1 with delphi's rank quantiles, but from pools that were parted beforehand.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from autointerp.config import Config
from autointerp.digest import digest, hash64, seed_of
from autointerp.errors import ConfigError, InputError, StoreError, nearest
from autointerp.examples.negatives import NEGATIVES, NUM_QUERIES, SilentWindows, check_negatives, draw_random
from autointerp.examples.pools import EXPLAIN, MIN_EXPLAIN, MIN_SCORE, SCORE, VALIDATE, LatentPools, choose_unit
from autointerp.examples.sampling import Choice, Keys, Sampling, keys_of, rank
from autointerp.examples.similar import SimilarWindows
from autointerp.examples.windows import (
    CoderActivations,
    Corpus,
    GridWindows,
    Neighbours,
    Similar,
    WindowGrid,
    Windows,
    centred_windows,
    cut_activations,
    cut_tokens,
    grid_windows,
    open_grid,
    ragged,
    spread_activations,
)
from autointerp.records import Examples, LatentExamples, NeighbourKind, Status

_VERSION = 1
"""Part of the selection's identity: raise it when the same settings come to choose other windows."""


_BLOCKS = ("explain", "explain_statistics", "explain_negatives", "positives", "negatives")


class SelectionConfig(Config):
    """How windows are cut, parted into pools and chosen."""

    window: int = Field(default=32, ge=4, le=4096)
    """Tokens per window."""
    min_window: int = Field(default=8, ge=1)
    """Fewest tokens of the last window of a document; a shorter rest is not used."""
    centred: Literal[False, True, "middle"] = False
    """Place positives with their strongest token at three quarters, or in the middle, in place of fixed windows."""
    min_documents: int = Field(default=20, ge=1)
    """A latent that fires in fewer documents is parted by context, not by document."""
    min_examples: int = Field(default=20, ge=MIN_EXPLAIN + MIN_SCORE)
    """A latent with fewer distinct activating windows is `too_few_examples`."""
    min_silent: int = Field(default=20, ge=1)
    """A latent with fewer silent windows is `too_dense`."""
    active_above: float | None = Field(default=None, gt=0, lt=1)
    """For dense latents: a token fires when its |value| reaches this quantile of the latent's own; weaker ones are silent."""
    num_explain: int = Field(default=40, ge=1)
    """Positives to show to an explainer."""
    explain_sampling: Sampling = "quantiles"
    """How these are chosen: ``quantiles`` strata of equal rank, ``top`` the strongest, ``random`` uniformly, ``importance`` by
    squared activation, ``mix`` the strongest and strata, ``top_importance`` the strongest and, below, by squared activation."""
    ratio_top: float = Field(default=0.2, ge=0, le=1)
    """Share of the strongest under `explain_sampling` = mix and top_importance."""
    num_statistics: int = Field(default=200, ge=0)
    """Most positives, and most silent windows, of the explain pool for rules and counts."""
    num_explain_negatives: int = Field(default=40, ge=0)
    """Most silent windows of the explain pool to show to an explainer."""
    num_positives: int = Field(default=50, ge=1)
    """Positives to score, in strata of equal rank."""
    num_negatives: int = Field(default=50, ge=1)
    """Negatives to score, of each source."""
    negatives: tuple[str, ...] = ("random",)
    """Sources of negatives, in the order in which they choose."""
    embedder: str = "all-MiniLM-L6-v2"
    """Whose embeddings of the store's windows the source ``embedding`` looks up."""
    quantiles: int = Field(default=10, ge=1, le=1000)
    """Strata of equal rank; 0 holds the strongest windows."""
    seed: int = Field(default=0, ge=0)
    """Decides pools and choices."""

    def identity(self) -> dict[str, Any]:
        """Return the settings; without the embedder where nothing is looked up by it, so that it need not be known then."""
        values = super().identity()
        return values if "embedding" in self.negatives else {name: values[name] for name in values if name != "embedder"}

    @property
    def negative_sources(self) -> tuple[str, ...]:
        """What examples of each source of negatives are called."""
        return tuple(NEGATIVES[name].label for name in self.negatives)

    @field_validator("negatives")
    @classmethod
    def _known_sources(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        check_negatives(names)
        return names

    @model_validator(mode="after")
    def _window_holds_minimum(self) -> SelectionConfig:
        if self.min_window > self.window:
            raise ConfigError(f"min_window = {self.min_window} is more than window = {self.window}; make it smaller")
        return self


def selection_id(store_id: str, coder_id: str, config: SelectionConfig) -> str:
    """Return the digest of everything that decides which examples a latent gets."""
    return digest({"version": _VERSION, "store": store_id, "coder": coder_id, "config": config.identity()})


def select(store: Corpus, coder: str, latent: int, config: SelectionConfig) -> LatentExamples:
    """Return the examples of one latent; for more than one, make a :class:`Selector`."""
    return Selector(store, config).select(coder, latent)


@dataclass(frozen=True, kw_only=True)
class _Fired:
    """A latent's activations, and the windows they fall in."""

    positions: np.ndarray
    values: np.ndarray
    grid: WindowGrid
    on_grid: GridWindows
    """Windows of the grid it fires in."""
    active: Windows
    """Candidates for positives, centred or not."""
    pools: LatentPools

    @cached_property
    def fires(self) -> np.ndarray:
        """Whether it fires in each window of the grid: bool [G]."""
        fires = np.zeros(len(self.grid), bool)
        fires[self.on_grid.rows] = True
        return fires

    def activations(self, windows: Windows) -> np.ndarray:
        """Return float32 [E, W] of candidates."""
        width = self.grid.window
        if isinstance(windows, GridWindows):
            return spread_activations(self.positions, self.values, windows.start, windows.low, windows.num, width=width)
        return cut_activations(self.positions, self.values, windows.start, windows.length, width=width)


class Selector:
    """Chooses examples from one store; may be shared between threads."""

    def __init__(self, store: Corpus, config: SelectionConfig) -> None:
        self.store = store
        self.config = config
        self._lock = threading.Lock()
        self._grid: WindowGrid | None = None
        self._coders: dict[str, tuple[CoderActivations, str]] = {}
        self._neighbours: dict[tuple[str, NeighbourKind], Neighbours] = {}
        self._embeddings: Similar | None = None
        self._lookups = SimilarWindows(self._queries)

    @property
    def grid(self) -> WindowGrid:
        """The window grid, computed at the first use of the store and kept with it."""
        with self._lock:
            if self._grid is None:
                self._grid = open_grid(self.store, window=self.config.window, min_window=self.config.min_window)
            return self._grid

    def expect(self, latents: Iterable[tuple[str, int]]) -> None:
        """Say which (coder, latent) will be selected next, in order: embedding negatives are then looked up for many at once.

        It changes how long that takes, never what is chosen.
        """
        if any(NEGATIVES[name].needs_embeddings for name in self.config.negatives):
            self._lookups.expect(latents)

    def select(self, coder: str, latent: int, *, num_validate: int = 0) -> LatentExamples:
        """Return the examples of one latent, or a status that says why it has none.

        `num_validate`: most activating, and most random silent, windows of the validate pool; they change nothing else.

        Raises: InputError when the store has no such coder or the coder no such latent.
        """
        reader, identity = self._reader(coder)
        if not 0 <= latent < reader.width:
            raise InputError(f"coder {coder!r} has no latent {latent}: it has latents 0 to {reader.width - 1}")
        config = self.config
        fired = self._read(reader, coder, latent)
        seed = self._seed(coder, latent)
        keys = keys_of(fired.active, seed=seed)
        explain = self._choice(fired, EXPLAIN, keys, seed, most=max(config.num_explain, config.num_statistics))
        score = self._choice(fired, SCORE, keys, seed, most=config.num_positives)
        status: Status = "ok"
        if fired.pools.num_distinct < config.min_examples or len(score) < MIN_SCORE or len(explain) < MIN_EXPLAIN:
            status = "too_few_examples"
        elif len(fired.grid) - len(fired.on_grid) < config.min_silent:
            status = "too_dense"
        else:
            silent = SilentWindows(
                corpus=self.store,
                grid=fired.grid,
                pools=fired.pools,
                pool=SCORE,
                fires=fired.fires,
                seed=seed,
                top_token=partial(self._top_token, fired, explain),
                neighbours=partial(self._nearest, reader, coder, latent),
                windows_of=partial(self._windows_of, reader, coder),
                strongest=partial(self._strongest, fired, seed),
                similar=partial(self._similar, coder, latent),
            )
            drawn = draw_random(
                silent,
                [
                    (SCORE, "random", max(MIN_SCORE, config.num_negatives)),
                    (EXPLAIN, "statistics", config.num_statistics),
                    (EXPLAIN, "explain", config.num_explain_negatives),
                ],
            )
            # As with positives: a handful of negatives would give a score that says nothing.
            status = "ok" if len(drawn[0]) >= MIN_SCORE else "too_dense"
        if status == "ok":
            blocks: dict[str, Any] = self._choose(fired, explain, score, silent, drawn, reader)
            if num_validate:
                validate = self._choice(fired, VALIDATE, keys, seed, most=num_validate)
                [quiet] = draw_random(silent, [(VALIDATE, "random", num_validate)])
                positives = {"validate_positives": validate.take(num_validate)}
                blocks |= _cut(self.store.tokens, fired, positives, {"validate_negatives": (quiet, ["random"] * len(quiet))})
        else:
            blocks = dict.fromkeys(_BLOCKS, Examples.empty(config.window))
        return LatentExamples(
            coder=coder,
            latent=latent,
            selection_id=identity,
            status=status,
            disjoint=fired.pools.unit,
            density=float(reader.latents["density"][latent]),
            max_activation=float(fired.active.strength.take(fired.pools.members(EXPLAIN)).max()) if status == "ok" else 0.0,
            negative_sources=config.negative_sources,
            **blocks,
        )

    def pools(self, coder: str, latent: int) -> tuple[Windows, LatentPools]:
        """Return the latent's activating windows, and the pools that these and the windows of the grid belong to."""
        reader, _ = self._reader(coder)
        fired = self._read(reader, coder, latent)
        return fired.active, fired.pools

    def _choose(
        self,
        fired: _Fired,
        explain: _PoolChoice,
        score: _PoolChoice,
        silent: SilentWindows,
        drawn: list[np.ndarray],
        reader: CoderActivations,
    ) -> dict[str, Examples]:
        config = self.config
        random, quiet, contrast = drawn
        shown = explain.take(config.num_explain, config.explain_sampling, ratio_top=config.ratio_top)
        counted = explain.take(config.num_statistics)
        judged = score.take(config.num_positives)
        taken = np.zeros(0, np.int64)
        labels: list[str] = []
        lenders: list[int | None] = []
        for name in config.negatives:
            source, lent = NEGATIVES[name], dict[int, int]()
            if name == "random" and not len(taken):
                rows = random[: config.num_negatives]
            else:
                windows = replace(silent, lenders=lent)
                rows = windows.first(source.draw(windows), config.num_negatives, taken=taken)
            taken = np.concatenate([taken, rows])
            labels += [source.label] * len(rows)
            lenders += [lent.get(row) for row in rows.tolist()] if lent else [None] * len(rows)
        blocks = _cut(
            self.store.tokens,
            fired,
            {"explain": shown, "positives": judged, "explain_statistics": counted},
            {
                "explain_statistics": (quiet, ["random"] * len(quiet)),
                "explain_negatives": (contrast, ["random"] * len(contrast)),
                "negatives": (taken, labels),
            },
        )
        if lenders.count(None) < len(lenders):
            _lend(blocks["negatives"], lenders, reader)
        return blocks

    def _reader(self, name: str) -> tuple[CoderActivations, str]:
        with self._lock:
            if name not in self._coders:
                if name not in self.store.coder_names:
                    raise InputError(f"the store has no coder {name!r}; {nearest(name, self.store.coder_names)}")
                reader = self.store.coder(name)
                self._coders[name] = reader, selection_id(self.store.store_id, reader.coder_id, self.config)
            return self._coders[name]

    def _seed(self, coder: str, latent: int) -> int:
        return seed_of("examples", self.config.seed, coder, latent)

    def _read(self, reader: CoderActivations, coder: str, latent: int) -> _Fired:
        config, grid = self.config, self.grid
        positions, values = reader.activations(latent)
        # By all activations, so that `active_above` does not move windows between pools.
        on_grid = grid_windows(grid, positions, values)
        unit = choose_unit(on_grid.document, min_documents=config.min_documents)
        if config.active_above is not None and len(values):
            strong = np.abs(values) >= np.quantile(np.abs(values), config.active_above)
            positions, values = positions[strong], values[strong]
            on_grid = grid_windows(grid, positions, values)
        active: Windows = on_grid
        if config.centred:
            active = centred_windows(self.store, grid, positions, values, middle=config.centred == "middle")
        rows = None if config.centred else on_grid.rows
        pools = LatentPools(grid, active, rows=rows, coder=coder, latent=latent, seed=config.seed, unit=unit)
        return _Fired(positions=positions, values=values, grid=grid, on_grid=on_grid, active=active, pools=pools)

    def _choice(self, fired: _Fired, pool: int, keys: Keys, seed: int, *, most: int) -> _PoolChoice:
        rows = _candidates(fired, pool, seed=seed)
        choice = Choice(fired.active.strength.take(rows), keys.take(rows), parts=self.config.quantiles, most=most)
        return _PoolChoice(rows, choice)

    def _nearest(self, reader: CoderActivations, coder: str, latent: int, kind: NeighbourKind) -> np.ndarray:
        with self._lock:
            if (coder, kind) not in self._neighbours:
                self._neighbours[coder, kind] = reader.neighbours(kind)
        return self._neighbours[coder, kind].of(latent)[0]

    def _windows_of(self, reader: CoderActivations, coder: str, latent: int) -> np.ndarray:
        windows = grid_windows(self.grid, *reader.activations(latent))
        return np.asarray(windows.rows[rank(windows, seed=seed_of("neighbour", self.config.seed, coder, latent))])

    def _strongest(self, fired: _Fired, seed: int, count: int) -> np.ndarray:
        windows = fired.on_grid
        order = rank(windows, seed=seed)
        chosen = order[fired.pools.of_grid(windows.rows[order]) == SCORE]
        _, first = np.unique(windows.text[chosen], return_index=True)
        return np.asarray(windows.rows[chosen[np.sort(first)[:count]]])

    def _queries(self, coder: str, latent: int) -> np.ndarray:
        """Return the rows of the grid that embedding negatives of a latent are like; none where it has too few examples."""
        fired = self._read(self._reader(coder)[0], coder, latent)
        if fired.pools.num_distinct < self.config.min_examples:
            return np.zeros(0, np.int64)
        return self._strongest(fired, self._seed(coder, latent), NUM_QUERIES)

    def _similar(self, coder: str, latent: int, rows: np.ndarray, count: int) -> np.ndarray:
        config, grid = self.config, self.grid
        with self._lock:
            if self._embeddings is None:
                found = self.store.embeddings(config.embedder, window=config.window, min_window=config.min_window)
                if len(found) != len(grid):
                    raise StoreError(
                        f"the embeddings by {config.embedder} are of {len(found)} windows and the store has {len(grid)}"
                    )
                self._embeddings = found
        return self._lookups.of(self._embeddings, (coder, latent), rows, count)

    def _top_token(self, fired: _Fired, explain: _PoolChoice) -> int | None:
        """Return the token with the greatest sum of |activation| over the explain pool; of equals the smallest id."""
        if len(explain) == 0:
            return None
        # From the strongest on: a sum of floats depends on the order.
        windows = fired.active.take(explain.rows[explain.choice.order])
        low = np.searchsorted(fired.positions, windows.start)
        _, at = ragged(low, np.searchsorted(fired.positions, windows.start + windows.length) - low)
        ids, back = np.unique(self.store.tokens[fired.positions[at]], return_inverse=True)
        return int(ids[np.argmax(np.bincount(back, weights=np.abs(fired.values[at])))])


@dataclass(frozen=True)
class _PoolChoice:
    """The candidates of one pool, and how some of them are chosen."""

    rows: np.ndarray
    """int64, the pool's candidates among all of them."""
    choice: Choice

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, count: int, how: Sampling = "quantiles", *, ratio_top: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Return the chosen rows among all candidates, strongest first, and their quantiles."""
        rows, quantiles = self.choice.take(count, how, ratio_top=ratio_top)
        return self.rows.take(rows), quantiles


def _cut(
    tokens: np.ndarray,
    fired: _Fired,
    chosen: Mapping[str, tuple[np.ndarray, np.ndarray]],
    silent: Mapping[str, tuple[np.ndarray, list[str]]],
) -> dict[str, Examples]:
    """Return the blocks of examples, cut from the flat arrays all at once.

    `chosen` has for each block rows and quantiles of candidates, `silent` rows of the grid and their labels; a block of both is
    the last of the former and the first of the latter.
    """
    grid = fired.grid
    positives = fired.active.take(np.concatenate([rows for rows, _ in chosen.values()]))
    negatives = np.concatenate([rows for rows, _ in silent.values()])
    start = np.concatenate([positives.start, grid.start.take(negatives)])
    length = np.concatenate([positives.length, grid.length.take(negatives)]).astype(np.int32, copy=False)
    document = np.concatenate([positives.document, grid.document.take(negatives)])
    quantiles = np.full(len(start), -1, np.int16)
    np.concatenate([column for _, column in chosen.values()], out=quantiles[: len(positives)])
    tokens = cut_tokens(tokens, start, length, width=grid.window)
    # Silent windows hold none.
    activations = np.zeros(tokens.shape, np.float32)
    activations[: len(positives)] = fired.activations(positives)

    sources = {name: ["positive"] * len(rows) for name, (rows, _) in chosen.items()}
    for name, (_, labels) in silent.items():
        sources[name] = sources.get(name, []) + labels
    blocks, low = {}, 0
    for name, labels in sources.items():
        # Copies of what is large: who keeps one block must not keep all of them in memory.
        rows = slice(low, low + len(labels))
        blocks[name] = Examples(
            tokens=tokens[rows].copy(),
            activations=activations[rows].copy(),
            lengths=length[rows],
            positions=start[rows],
            documents=document[rows],
            quantiles=quantiles[rows],
            sources=tuple(labels),
        )
        low = rows.stop
    return blocks


def _lend(negatives: Examples, lenders: Sequence[int | None], reader: CoderActivations) -> None:
    """Give silent windows that another latent lent its activations there."""
    lender_of = np.array([-1 if lender is None else lender for lender in lenders], np.int64)
    for lender in np.unique(lender_of[lender_of >= 0]).tolist():
        at = np.flatnonzero(lender_of == lender)
        start, length, width = negatives.positions[at], negatives.lengths[at], negatives.tokens.shape[1]
        negatives.activations[at] = cut_activations(*reader.activations(lender), start, length, width=width)


def _candidates(fired: _Fired, pool: int, *, seed: int) -> np.ndarray:
    """Return the rows of the pool's candidates, one for each normalised text: the one that a seeded hash puts first."""
    if not fired.pools.has_repeats:
        return fired.pools.members(pool)
    active, mine = fired.active, fired.pools.active_pool == pool
    repeated = fired.pools.is_repeated
    rows = np.flatnonzero(mine & repeated)
    texts = active.text[rows]
    order = np.lexsort((hash64(seed_of("duplicates", seed), active.start[rows]), texts))
    _, first = np.unique(texts[order], return_index=True)
    return np.sort(np.concatenate([np.flatnonzero(mine & ~repeated), rows[order[first]]]))
