"""Invariant 3: no position and no normalised text is in two pools of a latent, whatever is chosen."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from examples_corpus import ByteVocabulary, MemoryStore, random_store
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_examples_windows import naive_text

from autointerp.digest import hash64, seed_of
from autointerp.examples.pools import EXPLAIN, MIN_SCORE, NO_POOL, SCORE, VALIDATE, LatentPools, choose_unit
from autointerp.examples.selection import SelectionConfig, Selector
from autointerp.examples.windows import build_grid, grid_windows

WORDS = [b"the", b" cat", b" ", b"\n", b"7", b"19", b" 7", b"sat", b"on", b"mat"]
POOLS = (EXPLAIN, SCORE, VALIDATE)


@st.composite
def stores(draw):
    """Small corpora in which many windows repeat: few distinct words, and whole documents copied with other numbers."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_words = draw(st.sampled_from([2, 5, len(WORDS)]))
    documents = []
    for _ in range(draw(st.integers(1, 60))):
        if documents and rng.random() < 0.4:
            copy = list(documents[rng.integers(len(documents))])
            documents.append([{4: 5, 5: 4, 2: 3}.get(t, t) if rng.random() < 0.5 else t for t in copy])
        else:
            documents.append(rng.integers(0, num_words, rng.integers(1, 50)).tolist())
    store = MemoryStore(documents, ctx_len=draw(st.sampled_from([16, 33, 64])), vocabulary=ByteVocabulary(WORDS))
    rate = draw(st.sampled_from([0.01, 0.1, 0.3]))
    fires = np.flatnonzero(rng.random(store.num_tokens) < rate)
    return store.add("sae", [{int(p): float(rng.choice([1, 2, 2.5])) for p in fires}])


def texts_of(store, starts, lengths):
    return {tuple(naive_text([WORDS[t] for t in store.tokens[s : s + n]])) for s, n in zip(starts, lengths, strict=True)}


def spans_of(starts, lengths):
    return {p for s, n in zip(starts, lengths, strict=True) for p in range(s, s + n)}


COUNTS = [
    {},
    {"num_explain": 3, "num_positives": 2, "num_negatives": 4, "num_statistics": 5},
    {"num_explain": 500, "num_positives": 7, "num_negatives": 500, "negatives": ("same_token", "random")},
    {"num_positives": 500, "num_statistics": 1000, "explain_sampling": "top", "num_explain_negatives": 300},
]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(store=stores(), centred=st.booleans(), min_documents=st.sampled_from([1, 20, 1000]), above=st.sampled_from([None, 0.5]))
def test_no_position_and_no_text_in_two_pools(store, centred, min_documents, above):
    common = {"window": 8, "min_window": 3, "centred": centred, "min_documents": min_documents, "active_above": above}
    positions: dict[int, set] = {pool: set() for pool in POOLS}
    texts: dict[int, set] = {pool: set() for pool in POOLS}
    for counts in COUNTS:
        selector = Selector(store, SelectionConfig.parse({**common, **counts, "min_examples": 15, "min_silent": 1}))
        chosen = selector.select("sae", 0)
        active, pools = selector.pools("sae", 0)
        blocks = [
            (EXPLAIN, chosen.explain),
            (EXPLAIN, chosen.explain_statistics),
            (EXPLAIN, chosen.explain_negatives),
            (SCORE, chosen.positives),
            (SCORE, chosen.negatives),
        ]
        for pool, block in blocks:
            positions[pool] |= spans_of(block.positions, block.lengths)
            texts[pool] |= texts_of(store, block.positions, block.lengths)
        # And everything that could ever be chosen.
        grid = selector.grid
        of_grid = pools.of_grid(np.arange(len(grid)))
        for pool in POOLS:
            for rows, windows in ((pools.active_pool == pool, active), (of_grid == pool, grid)):
                positions[pool] |= spans_of(windows.start[rows], windows.length[rows])
                texts[pool] |= texts_of(store, windows.start[rows], windows.length[rows])
    for one, other in combinations(POOLS, 2):
        assert not positions[one] & positions[other]
        assert not texts[one] & texts[other]


def test_pools_equal_a_naive_assignment():
    store = random_store(seed=1, num_documents=150, tokens=60, rate=0.05, copies=0.5)
    grid = build_grid(store, window=32, min_window=8)
    active = grid_windows(grid, *store.coder("sae").activations(0))
    pools = LatentPools(grid, active, rows=active.rows, coder="sae", latent=0, seed=9, unit="document")
    seed = seed_of("pools", 9, "sae", 0)
    number = {d: int(hash64(seed, np.array([d]))[0]) / 2**64 for d in set(grid.document.tolist())}

    def pool_of(document):
        return EXPLAIN if number[document] < 0.45 else SCORE if number[document] < 0.9 else VALIDATE

    earliest: dict[tuple, int] = {}
    keys = [tuple(store.tokens[s : s + n]) for s, n in zip(grid.start, grid.length, strict=True)]
    for key, document in zip(keys, grid.document, strict=True):
        earliest[key] = min(earliest.get(key, VALIDATE), pool_of(document))
    expected = [pool_of(d) if pool_of(d) == earliest[key] else NO_POOL for key, d in zip(keys, grid.document, strict=True)]
    assert pools.of_grid(np.arange(len(grid))).tolist() == expected
    assert pools.active_pool.tolist() == [expected[row] for row in active.rows]
    assert NO_POOL in expected


def test_shares_of_documents_are_near_45_45_10():
    store = MemoryStore([[i % 600, (i * 7) % 600, i // 600] * 3 for i in range(4000)], ctx_len=90)
    grid = build_grid(store, window=8, min_window=8)
    active = grid_windows(grid, grid.start, np.ones(len(grid), np.float32))
    pools = LatentPools(grid, active, rows=active.rows, coder="sae", latent=0, seed=0, unit="document")
    share = np.bincount(pools.active_pool[pools.active_pool >= 0], minlength=3) / len(active)
    # Standard deviation of the first two is sqrt(0.45 * 0.55 / 4000) = 0.008.
    assert np.abs(share - [0.45, 0.45, 0.1]).max() < 0.035


def test_unit_is_the_context_where_documents_are_few():
    assert choose_unit(np.arange(20), min_documents=20) == "document"
    assert choose_unit(np.arange(19).repeat(5), min_documents=20) == "context"
    assert choose_unit(np.append(np.zeros(1000, int), np.arange(19)), min_documents=20) == "context"
    assert choose_unit(np.append(np.zeros(1000, int), np.arange(20)), min_documents=20) == "document"
    assert choose_unit(np.zeros(0, int), min_documents=20) == "context"


@pytest.mark.parametrize("seed", range(30))
def test_few_windows_still_leave_ten_to_score(seed):
    # 22 documents of one distinct window each: the usual cuts would often leave fewer than 10 to score.
    store = MemoryStore([[i] * 8 for i in range(22)] + [[100 + i] * 8 for i in range(300)], ctx_len=64)
    store.add("sae", [{8 * i: 1.0 for i in range(22)}])
    selector = Selector(store, SelectionConfig(window=8, seed=seed))
    _, pools = selector.pools("sae", 0)
    assert np.count_nonzero(pools.active_pool == SCORE) >= MIN_SCORE
    assert np.count_nonzero(pools.active_pool == EXPLAIN) >= 8
    assert selector.select("sae", 0).status == "ok"


def test_a_latent_of_a_few_much_repeated_texts_can_be_parted():
    # 40 texts, each in 100 documents: the smallest number of each is near 0, so the usual cuts would put all into explain.
    store = MemoryStore([[i % 40] * 8 for i in range(4000)] + [[100 + i // 9, i % 9] * 4 for i in range(900)], ctx_len=64)
    store.add("sae", [{8 * i: 1.0 for i in range(4000)}])
    chosen = Selector(store, SelectionConfig(window=8)).select("sae", 0)
    assert chosen.status == "ok"
    assert len(chosen.positives) >= 10
    assert len(chosen.explain) >= 10
