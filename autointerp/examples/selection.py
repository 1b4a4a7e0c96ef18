"""Which windows an explainer is shown and a scorer asks about, for one latent at a time.

:class:`Selector` computes the window grid once per store; after that a latent costs its own activations and little else. Every
choice derives from a hash of (seed, coder, latent) and a position, so it depends neither on order nor on what else is chosen.
Sampling follows arXiv 2410.13928 section 3.1 with delphi's rank quantiles, but from pools that were parted beforehand.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from pydantic import Field, field_validator, model_validator

from autointerp.config import Config
from autointerp.digest import digest, hash64, seed_of
from autointerp.errors import ConfigError, InputError, StoreError, nearest
from autointerp.examples.negatives import NEGATIVES, SilentWindows, check_negatives, probe
from autointerp.examples.pools import EXPLAIN, MIN_EXPLAIN, MIN_SCORE, SCORE, VALIDATE, LatentPools, choose_unit
from autointerp.examples.sampling import Choice, Sampling, rank
from autointerp.examples.windows import (
    ActivatingWindows,
    CoderActivations,
    Corpus,
    Neighbours,
    Similar,
    WindowGrid,
    build_grid,
    centred_windows,
    cut_activations,
    cut_tokens,
    grid_windows,
    ragged,
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
    centred: bool = False
    """Place positives with their strongest token at three quarters, in place of fixed windows."""
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
    """How these are chosen: strata of equal rank, the strongest, uniformly, strongest and strata, or by squared activation."""
    ratio_top: float = Field(default=0.2, ge=0, le=1)
    """Share of the strongest under `explain_sampling` = mix."""
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
    active: ActivatingWindows
    """Candidates for positives, centred or not."""
    fires: np.ndarray
    """bool [G]."""
    pools: LatentPools


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

    @property
    def grid(self) -> WindowGrid:
        """The window grid, computed at first use: about 0.1 s per million tokens."""
        with self._lock:
            if self._grid is None:
                self._grid = build_grid(self.store, window=self.config.window, min_window=self.config.min_window)
            return self._grid

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
        seed = seed_of("examples", config.seed, coder, latent)
        explain = _ranked(fired, EXPLAIN, seed=seed)
        score = _ranked(fired, SCORE, seed=seed)
        to_score = SilentWindows(
            corpus=self.store,
            grid=self.grid,
            pools=fired.pools,
            pool=SCORE,
            fires=fired.fires,
            seed=seed,
            top_token=partial(self._top_token, fired, explain),
            neighbours=partial(self._nearest, reader, coder, latent),
            windows_of=partial(self._windows_of, reader, coder),
            strongest=partial(self._strongest, fired, seed),
            similar=self._similar,
        )
        status, random = self._status(fired, explain, score, to_score)
        if status == "ok":
            blocks: dict[str, Any] = self._choose(
                fired, explain, score, to_score, replace(to_score, pool=EXPLAIN), random, reader, seed
            )
            if num_validate:
                blocks |= self._validation(fired, replace(to_score, pool=VALIDATE), num_validate, seed)
        else:
            blocks = dict.fromkeys(_BLOCKS, Examples.empty(config.window))
        return LatentExamples(
            coder=coder,
            latent=latent,
            selection_id=identity,
            status=status,
            disjoint=fired.pools.unit,
            density=float(reader.latents["density"][latent]),
            max_activation=float(fired.active.strength[fired.pools.active_pool == EXPLAIN].max()) if status == "ok" else 0.0,
            **blocks,
        )

    def pools(self, coder: str, latent: int) -> tuple[ActivatingWindows, LatentPools]:
        """Return the latent's activating windows, and the pools that these and the windows of the grid belong to."""
        reader, _ = self._reader(coder)
        fired = self._read(reader, coder, latent)
        return fired.active, fired.pools

    def _choose(
        self,
        fired: _Fired,
        explain: ActivatingWindows,
        score: ActivatingWindows,
        to_score: SilentWindows,
        to_explain: SilentWindows,
        random: np.ndarray,
        reader: CoderActivations,
        seed: int,
    ) -> dict[str, Examples]:
        config, nothing = self.config, np.zeros(0, np.int64)
        choice = Choice(explain, parts=config.quantiles, seed=seed)
        shown = choice.take(config.num_explain, config.explain_sampling, ratio_top=config.ratio_top)
        counted = choice.take(config.num_statistics)
        judged = Choice(score, parts=config.quantiles, seed=seed).take(config.num_positives)
        quiet = to_explain.first(probe(to_explain, "statistics"), config.num_statistics, taken=nothing)
        contrast = to_explain.first(probe(to_explain, "explain"), config.num_explain_negatives, taken=nothing)
        taken, labels, lenders = nothing, [], []
        for name in config.negatives:
            source, windows = NEGATIVES[name], replace(to_score, lenders={})
            if name == "random" and not len(taken):
                rows = random[: config.num_negatives]
            else:
                rows = windows.first(source.draw(windows), config.num_negatives, taken=taken)
            taken = np.concatenate([taken, rows])
            labels += [source.label] * len(rows)
            lenders += [windows.lenders.get(row) for row in rows.tolist()]
        cut = _Cut(self.store.tokens, self.grid, fired)
        cut.positives("explain", explain, *shown)
        cut.positives("explain_statistics", explain, *counted)
        cut.negatives("explain_statistics", quiet, ["random"] * len(quiet))
        cut.negatives("explain_negatives", contrast, ["random"] * len(contrast))
        cut.positives("positives", score, *judged)
        cut.negatives("negatives", taken, labels)
        blocks = cut.examples()
        _lend(blocks["negatives"], lenders, reader)
        return blocks

    def _validation(self, fired: _Fired, silent: SilentWindows, num: int, seed: int) -> dict[str, Examples]:
        active = _ranked(fired, VALIDATE, seed=seed)
        chosen = Choice(active, parts=self.config.quantiles, seed=seed).take(num)
        quiet = silent.first(probe(silent, "random"), num, taken=np.zeros(0, np.int64))
        cut = _Cut(self.store.tokens, self.grid, fired)
        cut.positives("validate_positives", active, *chosen)
        cut.negatives("validate_negatives", quiet, ["random"] * len(quiet))
        return cut.examples()

    def _reader(self, name: str) -> tuple[CoderActivations, str]:
        with self._lock:
            if name not in self._coders:
                if name not in self.store.coder_names:
                    raise InputError(f"the store has no coder {name!r}; {nearest(name, self.store.coder_names)}")
                reader = self.store.coder(name)
                self._coders[name] = reader, selection_id(self.store.store_id, reader.coder_id, self.config)
            return self._coders[name]

    def _read(self, reader: CoderActivations, coder: str, latent: int) -> _Fired:
        config, grid = self.config, self.grid
        positions, values = reader.activations(latent)
        # By all activations, so that `active_above` does not move windows between pools.
        everything, rows = grid_windows(grid, positions, values)
        unit = choose_unit(everything.document, min_documents=config.min_documents)
        if config.active_above is not None and len(values):
            strong = np.abs(values) >= np.quantile(np.abs(values), config.active_above)
            positions, values = positions[strong], values[strong]
            everything, rows = grid_windows(grid, positions, values)
        active = centred_windows(self.store, grid, positions, values) if config.centred else everything
        fires = np.zeros(len(grid), bool)
        fires[rows] = True
        on_grid = None if config.centred else rows
        pools = LatentPools(grid, active, rows=on_grid, coder=coder, latent=latent, seed=config.seed, unit=unit)
        return _Fired(positions=positions, values=values, active=active, fires=fires, pools=pools)

    def _nearest(self, reader: CoderActivations, coder: str, latent: int, kind: NeighbourKind) -> np.ndarray:
        with self._lock:
            if (coder, kind) not in self._neighbours:
                self._neighbours[coder, kind] = reader.neighbours(kind)
        return self._neighbours[coder, kind].of(latent)[0]

    def _windows_of(self, reader: CoderActivations, coder: str, latent: int) -> np.ndarray:
        windows, rows = grid_windows(self.grid, *reader.activations(latent))
        return np.asarray(rows[rank(windows, seed=seed_of("neighbour", self.config.seed, coder, latent))])

    def _strongest(self, fired: _Fired, seed: int, count: int) -> np.ndarray:
        windows, rows = grid_windows(self.grid, fired.positions, fired.values)
        order = rank(windows, seed=seed)
        chosen = order[fired.pools.of_grid(rows[order]) == SCORE]
        _, first = np.unique(windows.text[chosen], return_index=True)
        return np.asarray(rows[chosen[np.sort(first)[:count]]])

    def _similar(self, rows: np.ndarray, count: int) -> np.ndarray:
        config, grid = self.config, self.grid
        with self._lock:
            if self._embeddings is None:
                found = self.store.embeddings(config.embedder, window=config.window, min_window=config.min_window)
                if len(found) != len(grid):
                    raise StoreError(
                        f"the embeddings by {config.embedder} are of {len(found)} windows and the store has {len(grid)}"
                    )
                self._embeddings = found
        return self._embeddings.nearest(rows, count)

    def _top_token(self, fired: _Fired, explain: ActivatingWindows) -> int | None:
        """Return the token with the greatest sum of |activation| over the explain pool; of equals the smallest id."""
        if len(explain) == 0:
            return None
        low = np.searchsorted(fired.positions, explain.start)
        _, at = ragged(low, np.searchsorted(fired.positions, explain.start + explain.length) - low)
        ids, back = np.unique(self.store.tokens[fired.positions[at]], return_inverse=True)
        return int(ids[np.argmax(np.bincount(back, weights=np.abs(fired.values[at])))])

    def _status(
        self, fired: _Fired, explain: ActivatingWindows, score: ActivatingWindows, silent: SilentWindows
    ) -> tuple[Status, np.ndarray]:
        """Return the status and, where that is ok, the first random negatives to score: as many as are wanted, if there are."""
        nothing = np.zeros(0, np.int64)
        if fired.pools.num_distinct < self.config.min_examples or len(score) < MIN_SCORE or len(explain) < MIN_EXPLAIN:
            return "too_few_examples", nothing
        if len(fired.fires) - np.count_nonzero(fired.fires) < self.config.min_silent:
            return "too_dense", nothing
        # As with positives: a handful of negatives would give a score that says nothing.
        found = silent.first(probe(silent, "random"), max(MIN_SCORE, self.config.num_negatives), taken=nothing)
        return ("ok" if len(found) >= MIN_SCORE else "too_dense"), found


class _Cut:
    """Cuts the blocks of examples of one latent, all at once."""

    def __init__(self, tokens: np.ndarray, grid: WindowGrid, fired: _Fired) -> None:
        self._tokens, self._grid, self._fired = tokens, grid, fired
        self._pieces: list[tuple[str, np.ndarray, np.ndarray, np.ndarray, np.ndarray, Sequence[str]]] = []

    def positives(self, block: str, windows: ActivatingWindows, rows: np.ndarray, quantiles: np.ndarray) -> None:
        """Append activating windows to a block."""
        start, length, document = windows.start[rows], windows.length[rows], windows.document[rows]
        self._pieces.append((block, start, length, document, quantiles, ["positive"] * len(rows)))

    def negatives(self, block: str, rows: np.ndarray, labels: Sequence[str]) -> None:
        """Append windows of the grid to a block."""
        grid = self._grid
        quantiles = np.full(len(rows), -1, np.int16)
        self._pieces.append((block, grid.start[rows], grid.length[rows], grid.document[rows], quantiles, labels))

    def examples(self) -> dict[str, Examples]:
        """Return the blocks; the pieces of one follow each other."""
        names = [piece[0] for piece in self._pieces]
        start, length, document, quantiles = (np.concatenate(column) for column in list(zip(*self._pieces, strict=True))[1:5])
        width, fired = self._grid.window, self._fired
        tokens = cut_tokens(self._tokens, start, length, width=width)
        activations = cut_activations(fired.positions, fired.values, start, length, width=width)
        length = length.astype(np.int32)
        blocks, low = {}, 0
        for name in dict.fromkeys(names):
            sources = tuple(chain.from_iterable(piece[5] for piece in self._pieces if piece[0] == name))
            # Copies: who keeps one block must not keep all of them in memory.
            rows = slice(low, low + len(sources))
            blocks[name] = Examples(
                tokens=tokens[rows].copy(),
                activations=activations[rows].copy(),
                lengths=length[rows].copy(),
                positions=start[rows].copy(),
                documents=document[rows].copy(),
                quantiles=quantiles[rows].copy(),
                sources=sources,
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


def _ranked(fired: _Fired, pool: int, *, seed: int) -> ActivatingWindows:
    """Return the pool's candidates from the strongest, one for each normalised text: the one that a seeded hash puts first."""
    active, repeated = fired.active, fired.pools.is_repeated
    mine = fired.pools.active_pool == pool
    rows = np.flatnonzero(mine & repeated)
    if not len(rows):
        chosen = active.take(np.flatnonzero(mine))
        return chosen.take(rank(chosen, seed=seed))
    order = np.lexsort((hash64(seed_of("duplicates", seed), active.start[rows]), active.text[rows]))
    _, first = np.unique(active.text[rows][order], return_index=True)
    chosen = active.take(np.sort(np.concatenate([np.flatnonzero(mine & ~repeated), rows[order[first]]])))
    return chosen.take(rank(chosen, seed=seed))
