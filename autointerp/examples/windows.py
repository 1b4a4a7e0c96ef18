"""The window grid of a store: where windows lie, which document and context they belong to, and which say the same.

Windows are cut inside segments (runs of one document inside one context), so none crosses a document or a context. Also cuts
any list of windows, on the grid or not, from the flat arrays. Which pool a window belongs to is decided in `pools.py`.

Shape letters: G windows of the grid, E windows, W tokens of a window, N activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from autointerp.digest import hash64, seed_of
from autointerp.protocols import Vocabulary
from autointerp.records import NeighbourKind
from autointerp.store.arrays import forget_pages

_SPACE, _DIGITS, _SPACED_DIGITS = (np.uint64((1 << 32) + i) for i in range(3))
_TEXT_SEED = seed_of("normalised text")
_PLACE_SEED = seed_of("place in a normalised text")
_BLOCK_TOKENS = 1 << 17
BYTES_PER_POSITION = 5
"""Memory that :func:`open_grid` takes at its peak when it computes, by position of the store: 4 measured."""
_GRID_VERSION = 1
"""Raise it when the columns of a grid, or what they say, change: kept ones are of that name."""


class Segments(Protocol):
    """Runs of one document inside one context, sorted by start."""

    @property
    def document(self) -> np.ndarray: ...
    @property
    def start(self) -> np.ndarray: ...
    @property
    def stop(self) -> np.ndarray: ...


class CoderActivations(Protocol):
    """What selection reads of one coder."""

    @property
    def coder_id(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def latents(self) -> Mapping[str, Any]: ...
    def activations(self, latent: int, /) -> tuple[np.ndarray, np.ndarray]: ...
    def neighbours(self, kind: NeighbourKind, /) -> Neighbours: ...


class Neighbours(Protocol):
    """A table of nearest neighbours."""

    def of(self, latent: int, /) -> tuple[np.ndarray, np.ndarray]:
        """Return (latents int64, similarities float32), nearest first."""


class Similar(Protocol):
    """Finds windows of the grid that are like others."""

    def __len__(self) -> int: ...
    def nearest(self, rows: np.ndarray, count: int, /) -> np.ndarray:
        """Return int64 [len(rows), min(count, G)]: rows of the grid, nearest first."""


class Corpus(Protocol):
    """What selection reads of a store."""

    @property
    def store_id(self) -> str: ...
    @property
    def ctx_len(self) -> int: ...
    @property
    def coder_names(self) -> list[str]: ...
    @property
    def tokens(self) -> np.ndarray: ...
    @property
    def segments(self) -> Segments: ...
    @property
    def vocabulary(self) -> Vocabulary: ...
    def coder(self, name: str, /) -> CoderActivations: ...
    def derived(self, name: str, compute: Callable[[], Mapping[str, np.ndarray]], /) -> Mapping[str, np.ndarray]:
        """Return the named arrays as they were kept, else as `compute` returns them."""

    def embeddings(self, embedder: str, /, *, window: int, min_window: int) -> Similar: ...


@dataclass(frozen=True, kw_only=True)
class WindowGrid:
    """Every window of a store, in order of position."""

    window: int
    """Tokens in a full window, W."""
    ctx_len: int
    """Tokens in a full context."""
    start: np.ndarray
    """int64 [G], position of the first token."""
    length: np.ndarray
    """int32 [G], tokens in it; less than W at the end of a segment only."""
    document: np.ndarray
    """int64 [G], document id."""
    segment: np.ndarray
    """int64 [G], row of the segment."""
    text: np.ndarray
    """uint64 [G], hash of the normalised text."""
    by_text: np.ndarray
    """int64 [G], windows sorted by `text`."""
    first_same: np.ndarray
    """int64 [G], where in `by_text` the windows with the same normalised text begin."""
    num_same: np.ndarray
    """int32 [G], windows with the same normalised text, itself included."""
    token_counts: np.ndarray
    """int64 [vocabulary], how often each token occurs in the store."""
    classes: np.ndarray
    """uint64 [vocabulary], see :func:`token_classes`."""
    windows_before: np.ndarray
    """int32, how many windows start at or before each multiple of 2^``block_bits``."""

    def __len__(self) -> int:
        return len(self.start)

    def find(self, positions: np.ndarray) -> np.ndarray:
        """Return the window that holds each position, -1 where none does (the tail of a segment may be too short for one)."""
        if len(self) == 0 or len(positions) == 0:
            return np.full(len(positions), -1, np.int64)
        # From the windows that start at or before the position's block, at most one on: no binary search.
        index: np.ndarray = self.windows_before.take(positions >> self.block_bits, mode="clip").astype(np.int64)
        # Of the last block: no window starts after it.
        np.minimum(index, len(self) - 1, out=index)
        index -= self.start.take(index) > positions
        if self._is_gapless and positions.min() >= self.start[0] and positions.max() < self._stop[-1]:
            return index
        index[self._stop.take(index, mode="clip") <= positions] = -1
        return index

    @cached_property
    def block_bits(self) -> int:
        """No two windows start within fewer than 2 to this power tokens."""
        return _block_bits(self.start)

    @cached_property
    def context(self) -> np.ndarray:
        """int64 [G], context id."""
        return np.asarray(self.start // self.ctx_len)

    @cached_property
    def sorted_text(self) -> np.ndarray:
        """uint64 [G], ``text[by_text]``."""
        return np.asarray(self.text[self.by_text])

    @cached_property
    def _stop(self) -> np.ndarray:
        return np.asarray(self.start + self.length)

    @cached_property
    def _is_gapless(self) -> bool:
        return bool((self._stop[:-1] == self.start[1:]).all())


def open_grid(corpus: Corpus, *, window: int, min_window: int) -> WindowGrid:
    """Return what :func:`build_grid` does, from arrays that are kept with the store where it can be."""

    def compute() -> dict[str, np.ndarray]:
        built = build_grid(corpus, window=window, min_window=min_window)
        return {field.name: getattr(built, field.name) for field in fields(built) if field.name not in ("window", "ctx_len")}

    arrays = corpus.derived(f"windows-v{_GRID_VERSION}-w{window}-m{min_window}", compute)
    return WindowGrid(window=window, ctx_len=corpus.ctx_len, **arrays)


def _block_bits(start: np.ndarray) -> int:
    nearest = int(np.diff(start).min()) if len(start) > 1 else 1
    return nearest.bit_length() - 1


def build_grid(corpus: Corpus, *, window: int, min_window: int) -> WindowGrid:
    """Cut every segment into windows from its start; the last, shorter one is kept when it has `min_window` tokens."""
    segments = corpus.segments
    begin = np.asarray(segments.start, np.int64)
    size = np.asarray(segments.stop, np.int64) - begin
    num = size // window + (size % window >= min_window)
    segment, nth = ragged(np.zeros_like(num), num)
    nth *= window
    start = begin[segment] + nth
    length = np.minimum(size[segment] - nth, window).astype(np.int32)
    del nth
    counts = _count_tokens(corpus.tokens, len(corpus.vocabulary))
    classes = token_classes(corpus.vocabulary, counts)
    text = _hash_all(corpus.tokens, start, length, width=window, classes=classes, is_sweep=True)
    by_text = stable_argsort(text)
    sorted_text = text[by_text]
    is_first = np.ones(len(text), bool)
    is_first[1:] = sorted_text[1:] != sorted_text[:-1]
    first = np.flatnonzero(is_first)
    same = np.diff(first, append=len(text))
    first_same = np.empty(len(text), np.int64)
    first_same[by_text] = np.repeat(first, same)
    num_same = np.empty(len(text), np.int32)
    num_same[by_text] = np.repeat(same, same)
    del sorted_text, is_first, first, same
    return WindowGrid(
        window=window,
        ctx_len=corpus.ctx_len,
        start=start,
        length=length,
        document=np.asarray(segments.document, np.int64)[segment],
        segment=segment,
        text=text,
        by_text=by_text,
        first_same=first_same,
        num_same=num_same,
        token_counts=counts,
        classes=classes,
        windows_before=_windows_before(start),
    )


def _windows_before(start: np.ndarray) -> np.ndarray:
    """Return the int32 column of that name."""
    bits = _block_bits(start)
    counts = np.empty((int(start[-1]) >> bits) + 1 if len(start) else 0, np.int32)
    # There are several times as many blocks as windows: never all of them as 64-bit numbers.
    for low in range(0, len(counts), _BLOCK_TOKENS):
        blocks = np.arange(low, min(low + _BLOCK_TOKENS, len(counts))) << bits
        counts[low : low + len(blocks)] = np.searchsorted(start, blocks, side="right")
    return counts


def _count_tokens(tokens: np.ndarray, size: int) -> np.ndarray:
    """Return int64 [size or more], how often each token id occurs."""
    # In blocks that fit the cache: bincount converts what it is given to int64 first.
    counts = np.zeros(size, np.int64)
    for low in range(0, len(tokens), _BLOCK_TOKENS):
        more = np.bincount(tokens[low : low + _BLOCK_TOKENS], minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
        forget_pages(tokens)
    return counts


def ragged(starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (row, value) of the concatenated ranges ``starts[row] .. starts[row] + counts[row] - 1``."""
    counts = np.asarray(counts, np.int64)
    rows = np.arange(len(counts)).repeat(counts)
    shift = np.asarray(starts, np.int64) - (counts.cumsum() - counts)
    return rows, np.arange(len(rows)) + shift.take(rows)


def stable_argsort(keys: np.ndarray) -> np.ndarray:
    """Return what a stable argsort does, in a quarter of its time where no key comes twice."""
    # Distinct keys have one order, whatever the algorithm; numpy sorts them with vector instructions unless asked to be stable.
    order = keys.argsort()
    return np.argsort(keys, kind="stable") if has_equal(keys.take(order)) else order


def has_equal(ordered: np.ndarray) -> bool:
    """Return whether any number of a sorted array comes twice."""
    # Not `any`, which takes a microsecond more: this is asked several times for each latent.
    return bool(np.count_nonzero(ordered[1:] == ordered[:-1]))


def cut_tokens(tokens: np.ndarray, start: np.ndarray, length: np.ndarray, *, width: int) -> np.ndarray:
    """Return uint32 [E, width] cut from the flat tokens; 0 at and beyond each length."""
    start, length = np.asarray(start), np.asarray(length)
    if len(tokens) < width:
        tokens = np.append(tokens, np.zeros(width - len(tokens), tokens.dtype))
    last = len(tokens) - width
    # One item per window that might begin at each position: copied whole, not token by token.
    tokens = np.ascontiguousarray(tokens, np.uint32)
    runs = np.ndarray(last + 1, np.dtype((np.void, 4 * width)), buffer=tokens, strides=(4,))
    block = runs[np.minimum(start, last)].view(np.uint32).reshape(len(start), width)
    is_short = length < width
    if np.count_nonzero(is_short):
        for row in np.flatnonzero(start > last).tolist():
            block[row, : length[row]] = tokens[start[row] : start[row] + length[row]]
        short = np.flatnonzero(is_short)
        block[short] *= np.arange(width) < length[short, None]
    return np.asarray(block)


def cut_activations(
    positions: np.ndarray, values: np.ndarray, start: np.ndarray, length: np.ndarray, *, width: int
) -> np.ndarray:
    """Return float32 [E, width] rebuilt from activations sorted by position; 0 where there is none."""
    low, high = positions.searchsorted(np.stack([start, start + length]))
    return spread_activations(positions, values, start, low, high - low, width=width)


def spread_activations(
    positions: np.ndarray, values: np.ndarray, start: np.ndarray, low: np.ndarray, num: np.ndarray, *, width: int
) -> np.ndarray:
    """Return float32 [E, width]: in each row the `num` activations from number `low` on, whose window is at `start`."""
    block = np.zeros((len(start), width), np.float32)
    rows, index = ragged(low, num)
    block[rows, positions.take(index) - start.take(rows)] = values.take(index)
    return block


# Normalised text ----------------------------------------------------------------------------------------------------


def token_classes(vocabulary: Vocabulary, counts: np.ndarray) -> np.ndarray:
    """Return a uint64 code per token id: one for all whitespace tokens, one for all digit tokens, else the id itself.

    Digits after whitespace (the usual number token of a BPE vocabulary) have a third code. `counts` says how often each id
    occurs; those that do not are not looked up, nor those the vocabulary lacks.
    """
    classes = np.arange(len(counts), dtype=np.uint64)
    ids = np.flatnonzero(counts[: len(vocabulary)])
    for token, text in zip(ids.tolist(), _single_texts(vocabulary, ids), strict=True):
        if text.isspace():
            classes[token] = _SPACE
        elif text.isdecimal():
            classes[token] = _DIGITS
        elif text.lstrip().isdecimal():
            classes[token] = _SPACED_DIGITS
    return classes


def _single_texts(vocabulary: Vocabulary, ids: np.ndarray) -> list[str]:
    """Return the text of each token alone."""
    # One call for all, with a plain token after each: one whose bytes end inside a character shows there, and is asked alone.
    between = next((token for token in ids if (text := vocabulary.text(np.array([token]))) and text.isascii()), None)
    if between is None:
        return [vocabulary.text(ids[i : i + 1]) for i in range(len(ids))]
    woven = np.full(2 * len(ids), between)
    woven[::2] = ids
    pieces, plain = vocabulary.pieces(woven), vocabulary.text(np.array([between]))
    return [pieces[2 * i] if pieces[2 * i + 1] == plain else vocabulary.text(ids[i : i + 1]) for i in range(len(ids))]


def text_hashes(tokens: np.ndarray, lengths: np.ndarray, *, classes: np.ndarray) -> np.ndarray:
    """Return the uint64 [E] hash of each row's normalised text: codes in order, runs of whitespace and of digits as one."""
    codes = hash64(_TEXT_SEED, classes)
    return _text_hashes(tokens, lengths, codes=codes, kinds=_kinds(classes))


def _kinds(classes: np.ndarray) -> np.ndarray:
    """Return the uint8 [vocabulary] kind of each token: a bit for whitespace, digits, digits after whitespace, else 0."""
    return np.asarray(sum((classes == code).astype(np.uint8) << i for i, code in enumerate((_SPACE, _DIGITS, _SPACED_DIGITS))))


def _text_hashes(tokens: np.ndarray, lengths: np.ndarray, *, codes: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    # The sum over kept tokens of a random number of the code times a random odd number of its place among them, modulo 2^64.
    num_rows, width = tokens.shape
    places = hash64(_PLACE_SEED, np.arange(width)) | np.uint64(1)
    tokens = tokens.astype(np.intp)  # once: every lookup by another integer type would
    kind = kinds.take(tokens)
    here, before = kind[:, 1:], kind[:, :-1]
    # Whitespace after whitespace, digits after digits or after digits that follow whitespace.
    repeats = (here & before & 3) | ((here & 2) & ((before & 4) >> 1))
    is_plain = (np.asarray(lengths) == width) & ~repeats.any(axis=1)
    hashes = np.empty(num_rows, np.uint64)
    hashes[is_plain] = codes.take(tokens[is_plain]) @ places
    rest = np.flatnonzero(~is_plain)
    keep = np.arange(width) < np.asarray(lengths)[rest, None]
    keep[:, 1:] &= repeats[rest] == 0
    place = np.maximum(np.cumsum(keep, axis=1) - 1, 0)
    terms = codes.take(tokens[rest]) * places[place]
    terms[~keep] = 0
    hashes[rest] = terms.sum(axis=1, dtype=np.uint64)
    return hashes


def _hash_all(
    tokens: np.ndarray, start: np.ndarray, length: np.ndarray, *, width: int, classes: np.ndarray, is_sweep: bool = False
) -> np.ndarray:
    """Return the uint64 [E] hash of each window's normalised text; `is_sweep`: the tokens are not needed again soon."""
    # In blocks: the intermediate arrays hold several 64-bit words per token.
    result = np.empty(len(start), np.uint64)
    codes, kinds = hash64(_TEXT_SEED, classes), _kinds(classes)
    step = max(1, _BLOCK_TOKENS // width)
    for low in range(0, len(start), step):
        rows = slice(low, low + step)
        block = cut_tokens(tokens, start[rows], length[rows], width=width)
        result[rows] = _text_hashes(block, length[rows], codes=codes, kinds=kinds)
        if is_sweep:
            forget_pages(tokens)
    return result


# Activating windows -------------------------------------------------------------------------------------------------


class Windows(Protocol):
    """The windows a latent fires in, in order of position; candidates for positives."""

    def __len__(self) -> int: ...
    @property
    def start(self) -> np.ndarray:
        """int64 [E]."""

    @property
    def length(self) -> np.ndarray:
        """int32 [E]."""

    @property
    def document(self) -> np.ndarray:
        """int64 [E]."""

    @property
    def context(self) -> np.ndarray:
        """int64 [E]."""

    @property
    def text(self) -> np.ndarray:
        """uint64 [E]."""

    @property
    def strength(self) -> np.ndarray:
        """float32 [E], largest |activation|."""

    def take(self, rows: np.ndarray, /) -> Windows:
        """Return the given rows, in the given order."""


@dataclass(frozen=True, kw_only=True)
class ActivatingWindows:
    """Windows given by their columns, on the grid or not."""

    start: np.ndarray
    length: np.ndarray
    document: np.ndarray
    context: np.ndarray
    text: np.ndarray
    strength: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    def take(self, rows: np.ndarray) -> ActivatingWindows:
        """Return the given rows, in the given order."""
        return ActivatingWindows(
            start=self.start[rows],
            length=self.length[rows],
            document=self.document[rows],
            context=self.context[rows],
            text=self.text[rows],
            strength=self.strength[rows],
        )


class GridWindows:
    """Windows of the grid. Their columns are looked up when asked for: most are needed of the few that are chosen only."""

    def __init__(self, grid: WindowGrid, rows: np.ndarray, strength: np.ndarray, low: np.ndarray, num: np.ndarray) -> None:
        self._grid = grid
        self.rows = rows
        """int64 [E], rows of the grid."""
        self.strength = strength
        """float32 [E], largest |activation|."""
        self.low = low
        """int64 [E], number of the first of the latent's activations in each."""
        self.num = num
        """int64 [E], activations in each."""

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def start(self) -> np.ndarray:
        return self._grid.start.take(self.rows)

    @cached_property
    def length(self) -> np.ndarray:
        return self._grid.length.take(self.rows)

    @cached_property
    def document(self) -> np.ndarray:
        return self._grid.document.take(self.rows)

    @cached_property
    def context(self) -> np.ndarray:
        return self._grid.context.take(self.rows)

    @cached_property
    def text(self) -> np.ndarray:
        return self._grid.text.take(self.rows)

    def take(self, rows: np.ndarray) -> GridWindows:
        """Return the given rows, in the given order."""
        columns = (column.take(rows) for column in (self.rows, self.strength, self.low, self.num))
        return GridWindows(self._grid, *columns)


def grid_windows(grid: WindowGrid, positions: np.ndarray, values: np.ndarray) -> GridWindows:
    """Return the windows of the grid that hold an activation; positions are sorted."""
    if len(positions) == 0:
        nothing = np.zeros(0, np.int64)
        return GridWindows(grid, nothing, np.zeros(0, np.float32), nothing, nothing)
    at = grid.find(positions)
    is_first = np.empty(len(at), bool)
    is_first[0] = True
    np.not_equal(at[1:], at[:-1], out=is_first[1:])
    low = is_first.nonzero()[0]
    num = np.empty(len(low), np.int64)
    np.subtract(low[1:], low[:-1], out=num[:-1])
    num[-1] = len(at) - low[-1]
    strength = np.maximum.reduceat(np.abs(values), low).astype(np.float32, copy=False)
    found = GridWindows(grid, at.take(low), strength, low, num)
    # Activations in no window.
    return found if found.rows.min() >= 0 else found.take(np.flatnonzero(found.rows >= 0))


def centred_windows(
    corpus: Corpus, grid: WindowGrid, positions: np.ndarray, values: np.ndarray, *, middle: bool = False
) -> ActivatingWindows:
    """Return windows with their strongest token at three quarters, or in the `middle`, or as near as the segment allows.

    One for the strongest token of each activating window of the grid, where that token stays the strongest of its new window;
    of windows that overlap the strongest is kept (then the first), so that no token is in two of them.
    """
    size = np.abs(values)
    at = grid.find(positions)
    inside = np.flatnonzero(at >= 0)
    # The first of the strongest activations of each window.
    order = inside[np.lexsort((positions[inside], -size[inside], at[inside]))]
    peak = order[np.flatnonzero(np.diff(at[order], prepend=-1))]
    rows = at[peak]
    segment = grid.segment[rows]
    low = np.asarray(corpus.segments.start, np.int64)[segment]
    high = np.asarray(corpus.segments.stop, np.int64)[segment]
    width = grid.window
    lead = width // 2 if middle else width - width // 4
    start = np.maximum(np.minimum(positions[peak] - lead, high - width), low)
    length = np.minimum(width, high - low)
    begin = np.searchsorted(positions, start)
    end = np.searchsorted(positions, start + length)
    strongest = _range_maximum(size, begin, end)
    kept = np.flatnonzero(size[peak] >= strongest)
    kept = kept[_without_overlap(start[kept], length[kept], size[peak[kept]])]
    start, length = start[kept], length[kept].astype(np.int32)
    return ActivatingWindows(
        start=start,
        length=length,
        document=grid.document[rows[kept]],
        context=grid.context[rows[kept]],
        text=_hash_all(corpus.tokens, start, length, width=width, classes=grid.classes),
        strength=size[peak[kept]].astype(np.float32),
    )


def _range_maximum(values: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Return the maximum of ``values[begin:end]`` for each pair; every range holds at least one value."""
    if len(begin) == 0:
        return np.zeros(0, values.dtype)
    bounds = np.stack([begin, end], axis=1).ravel()
    return np.asarray(np.maximum.reduceat(np.append(values, values[-1:]), bounds)[::2])


def _without_overlap(start: np.ndarray, length: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Return the rows that a greedy pass, strongest first, keeps when it skips what overlaps a kept window; `start` is sorted.

    Done in rounds: what beats all its overlapping neighbours is kept and removes them, which gives the greedy result.
    """
    alive = np.argsort(start, kind="stable")
    kept: list[np.ndarray] = []
    while len(alive):
        begin, end = start[alive], start[alive] + length[alive]
        rank = np.empty(len(alive), np.int64)
        rank[np.lexsort((np.arange(len(alive)), -strength[alive]))] = np.arange(len(alive))
        low = np.searchsorted(np.maximum.accumulate(end), begin, side="right")
        high = np.searchsorted(begin, end, side="left")
        best = -_range_maximum(-rank, low, high)
        wins = rank == best
        kept.append(alive[wins])
        # A loser goes only when one of its neighbours won; chains are resolved in later rounds.
        won = np.cumsum(np.append(0, wins))
        alive = alive[(won[high] - won[low]) == 0]
    return np.sort(np.concatenate(kept)) if kept else np.zeros(0, np.int64)
