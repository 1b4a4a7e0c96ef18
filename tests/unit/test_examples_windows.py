"""The window grid and centred windows against naive versions."""

from __future__ import annotations

import numpy as np
import pytest
from examples_corpus import ByteVocabulary, MemoryStore, random_store

from autointerp.examples.windows import (
    build_grid,
    centred_windows,
    cut_activations,
    cut_tokens,
    grid_windows,
    ragged,
    stable_argsort,
    text_hashes,
    token_classes,
)

WORDS = [b"a", b"b", b" ", b"\n\n", b"7", b"42", b" 7", b" 42", b"x7", b"\xe2\x82", b"\xac", b"\t"]


def naive_windows(store: MemoryStore, window: int, min_window: int) -> list[tuple[int, int, int]]:
    found = []
    segments = store.segments
    for document, start, stop in zip(segments.document, segments.start, segments.stop, strict=True):
        for low in range(start, stop, window):
            length = min(window, stop - low)
            if length >= min_window or length == window:
                found.append((low, length, document))
    return found


def naive_text(words: list[bytes]) -> list[bytes]:
    kept: list[bytes] = []
    for word in words:
        kind = b" " if word.isspace() else b"0" if word.isdigit() else b" 0" if word.strip().isdigit() else word
        if kept and ((kind == b" " == kept[-1]) or (kind == b"0" and kept[-1] in (b"0", b" 0"))):
            continue
        kept.append(kind)
    return kept


@pytest.mark.parametrize(
    ("window", "min_window", "ctx_len"), [(32, 8, 128), (32, 32, 64), (8, 1, 24), (5, 3, 17), (32, 8, 20), (4, 4, 3)]
)
def test_grid_equals_naive_windows(window, min_window, ctx_len):
    store = random_store(seed=window, num_documents=25, tokens=60, ctx_len=ctx_len)
    grid = build_grid(store, window=window, min_window=min_window)
    expected = naive_windows(store, window, min_window)
    assert list(zip(grid.start, grid.length, grid.document, strict=True)) == expected
    assert grid.context.tolist() == [start // ctx_len for start, _, _ in expected]
    owner = np.full(len(store.tokens), -1)
    for row, (start, length, _) in enumerate(expected):
        owner[start : start + length] = row
    assert grid.find(np.arange(len(owner))).tolist() == owner.tolist()


def test_no_window_crosses_a_document_or_a_context():
    store = random_store(seed=3, ctx_len=50)
    grid = build_grid(store, window=32, min_window=8)
    document_at = np.full(len(store.tokens), -1)
    for document, start, stop in zip(store.segments.document, store.segments.start, store.segments.stop, strict=True):
        document_at[start:stop] = document
    for start, length, document in zip(grid.start, grid.length, grid.document, strict=True):
        assert set(document_at[start : start + length]) == {document}
        assert start // 50 == (start + length - 1) // 50


@pytest.mark.parametrize("documents", [[], [[1]], [[1] * 7], [[]], [[1] * 8], [[1] * 31, [2] * 33]])
def test_tiny_corpora(documents):
    store = MemoryStore(documents, ctx_len=64)
    grid = build_grid(store, window=32, min_window=8)
    assert list(zip(grid.start, grid.length, grid.document, strict=True)) == naive_windows(store, 32, 8)
    active = grid_windows(grid, np.zeros(0, np.int64), np.zeros(0, np.float32))
    assert len(active) == len(active.rows) == 0
    assert len(centred_windows(store, grid, np.zeros(0, np.int64), np.zeros(0, np.float32))) == 0


def test_equal_hash_where_and_only_where_the_normalised_text_is_equal():
    rng = np.random.default_rng(0)
    vocabulary = ByteVocabulary(WORDS)
    classes = token_classes(vocabulary, np.ones(len(WORDS) + 3, np.int64))
    lengths = rng.integers(1, 6, 3000)
    tokens = rng.integers(0, len(WORDS), (3000, 5)).astype(np.uint32)
    hashes = text_hashes(tokens, lengths, classes=classes)
    texts = [tuple(naive_text([WORDS[i] for i in row[:n]])) for row, n in zip(tokens, lengths, strict=True)]
    assert len({*zip(hashes.tolist(), texts, strict=True)}) == len(set(hashes.tolist())) == len(set(texts)) < 3000


def test_windows_of_one_text_are_found_together():
    store = random_store(seed=5, num_documents=40, tokens=40, copies=0.6)
    grid = build_grid(store, window=16, min_window=4)
    rows: dict[tuple[int, ...], list[int]] = {}
    for row, (start, length) in enumerate(zip(grid.start, grid.length, strict=True)):
        rows.setdefault(tuple(store.tokens[start : start + length]), []).append(row)
    assert max(len(same) for same in rows.values()) > 3
    for same in rows.values():
        for row in same:
            first = grid.first_same[row]
            assert sorted(grid.by_text[first : first + grid.num_same[row]]) == same


@pytest.mark.parametrize("high", [3, 40, 2**63])
def test_stable_argsort_keeps_the_order_of_equal_keys(high):
    keys = np.random.default_rng(0).integers(0, high, 1000).astype(np.uint64)
    assert stable_argsort(keys).tolist() == sorted(range(1000), key=lambda i: int(keys[i]))
    assert len(stable_argsort(keys[:0])) == 0


def test_blocks_are_cut_from_the_flat_arrays():
    tokens = np.arange(10, 60, dtype=np.uint32)
    start, length = np.array([3, 40, 0]), np.array([4, 2, 1])
    assert cut_tokens(tokens, start, length, width=4).tolist() == [[13, 14, 15, 16], [50, 51, 0, 0], [10, 0, 0, 0]]
    positions, values = np.array([0, 2, 5, 6, 7, 41]), np.array([1, 2, -3, 4, 5, 6], np.float32)
    block = cut_activations(positions, values, start, length, width=4)
    assert block.tolist() == [[0, 0, -3, 4], [0, 6, 0, 0], [1, 0, 0, 0]]
    assert [part.tolist() for part in ragged(np.array([5, 9, 2]), np.array([2, 0, 1]))] == [[0, 0, 2], [5, 6, 2]]


def naive_centred(
    store: MemoryStore, pairs: dict[int, float], window: int, min_window: int, lead: int
) -> list[tuple[int, int, float]]:
    candidates = []
    for low, length, _ in naive_windows(store, window, min_window):
        inside = [p for p in pairs if low <= p < low + length]
        if not inside:
            continue
        peak = min(inside, key=lambda p: (-abs(pairs[p]), p))
        k = next(k for k in range(len(store.segments.start)) if store.segments.start[k] <= peak < store.segments.stop[k])
        begin, end = store.segments.start[k], store.segments.stop[k]
        start = max(begin, min(peak - lead, end - window))
        size = min(window, end - begin)
        if abs(pairs[peak]) >= max(abs(v) for p, v in pairs.items() if start <= p < start + size):
            candidates.append((int(start), int(size), abs(pairs[peak])))
    kept: list[tuple[int, int, float]] = []
    for start, size, strength in sorted(candidates, key=lambda c: (-c[2], c[0])):
        if all(start + size <= other or other + n <= start for other, n, _ in kept):
            kept.append((start, size, strength))
    return sorted(kept)


@pytest.mark.parametrize(("middle", "lead"), [(False, 12), (True, 8)])
@pytest.mark.parametrize("seed", range(6))
def test_centred_windows_equal_a_greedy_pass(seed, middle, lead):
    rng = np.random.default_rng(seed)
    store = random_store(seed=seed, num_documents=20, tokens=60, ctx_len=100)
    fires = np.flatnonzero(rng.random(store.num_tokens) < [0.02, 0.1, 0.4][seed % 3])
    values = rng.integers(1, 6, len(fires)).astype(np.float32) * rng.choice([-1, 1], len(fires))
    grid = build_grid(store, window=16, min_window=4)
    found = centred_windows(store, grid, fires, values.astype(np.float32), middle=middle)
    expected = naive_centred(store, dict(zip(fires.tolist(), values.tolist(), strict=True)), 16, 4, lead)
    assert list(zip(found.start, found.length, found.strength, strict=True)) == expected
    block = cut_activations(fires, values, found.start, found.length, width=16)
    for row in range(len(found)):
        flat = {p: v for p, v in zip(fires, values, strict=True) if 0 <= p - found.start[row] < found.length[row]}
        assert {found.start[row] + c: block[row, c] for c in np.flatnonzero(block[row])} == flat


def test_peak_lies_at_three_quarters_or_in_the_middle_away_from_the_ends():
    store = MemoryStore([list(range(200))], ctx_len=200)
    for window, middle, lead in ((32, False, 24), (21, True, 10)):
        grid = build_grid(store, window=window, min_window=8)
        found = centred_windows(store, grid, np.array([2, 100, 198]), np.array([1, 2, 3], np.float32), middle=middle)
        assert found.start.tolist() == [0, 100 - lead, 200 - window]
