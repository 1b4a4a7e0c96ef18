"""Partners for the shuffled control."""

from __future__ import annotations

import numpy as np
import pytest
from examples_corpus import MemoryStore

from autointerp.errors import InputError
from autointerp.examples.partners import rate_bins, shuffled_partners, similarity


def store_of(count: np.ndarray, minhash: np.ndarray | None = None, *, seed: int = 0) -> MemoryStore:
    store = MemoryStore([[1, 2, 3]])
    coder = store.add("sae", [{}] * len(count)).coder("sae")
    if minhash is None:
        minhash = np.random.default_rng(seed).integers(0, 2**32, (len(count), 16), dtype=np.uint32)
    coder.latents = {"count": np.asarray(count), "minhash": minhash}
    return store


def bin_of(count: np.ndarray) -> np.ndarray:
    return np.floor(np.log2(np.maximum(count, 1))).astype(int)


@pytest.mark.parametrize("seed", range(5))
def test_derangement_within_bins(seed):
    rng = np.random.default_rng(seed)
    count = rng.geometric(0.002, 700) * (rng.random(700) < 0.9)
    partner = shuffled_partners(store_of(count), "sae", seed)
    live = count >= 20
    # Bins of one join a neighbour, so look at the bins of at least two.
    sizes = np.bincount(bin_of(count)[live])
    assert (partner[~live] == -1).all()
    assert (partner[live] >= 0).all()
    assert (partner != np.arange(700)).all()
    assert len(set(partner[live])) == live.sum()
    assert live[partner[live]].all()
    distance = np.abs(bin_of(count)[partner[live]] - bin_of(count)[live])
    joined = (sizes[bin_of(count)[live]] == 1) | (sizes[bin_of(count)[partner[live]]] == 1)
    assert (distance[~joined] == 0).mean() > 0.98
    assert sizes[sizes > 0].min() == 1 or (distance == 0).all()


def test_depends_on_seed_and_nothing_planned():
    store = store_of(np.full(300, 100))
    first = shuffled_partners(store, "sae", 1)
    assert first.tolist() == shuffled_partners(store, "sae", 1).tolist()
    assert first.tolist() != shuffled_partners(store, "sae", 2).tolist()
    assert first.dtype == np.int64


@pytest.mark.parametrize("cluster", [2, 5, 60, 140])
@pytest.mark.parametrize("seed", range(4))
def test_planted_near_duplicates_are_never_partners(cluster, seed):
    rng = np.random.default_rng(seed)
    minhash = rng.integers(0, 2**32, (300, 16), dtype=np.uint32)
    same = rng.choice(300, cluster, replace=False)
    minhash[same, :6] = minhash[same[0], :6]  # 6 of 16 = 0.375 alike
    partner = shuffled_partners(store_of(np.full(300, 64), minhash), "sae", seed)
    assert sorted(partner) == list(range(300))
    assert (partner != np.arange(300)).all()
    assert similarity(minhash, minhash[partner]).max() <= 0.3


def test_empty_entries_make_nobody_alike():
    empty = 0xFFFFFFFF
    rows = np.array([[1, 2, empty, empty], [1, 3, empty, 4], [empty] * 4], np.uint32)
    # One equal of the three used by either; none of two; nothing used at all.
    assert similarity(rows[[0, 0, 2]], rows[[1, 2, 2]]).tolist() == [1 / 3, 0, 0]
    minhash = np.full((40, 16), empty, np.uint32)
    minhash[:, :3] = np.arange(120).reshape(40, 3)
    assert (shuffled_partners(store_of(np.full(40, 64), minhash), "sae", 0) >= 0).all()


def test_the_untouched_ring_would_pair_near_duplicates():
    # What the test above would miss if the repair did nothing.
    minhash = np.random.default_rng(0).integers(0, 2**32, (300, 16), dtype=np.uint32)
    minhash[:140, :6] = minhash[0, :6]
    store = store_of(np.full(300, 64), minhash)
    assert similarity(minhash, minhash[shuffled_partners(store, "sae", 0, max_similarity=1.0)]).max() > 0.3


def test_a_bin_of_nothing_but_duplicates_has_no_partners():
    minhash = np.ones((12, 16), np.uint32)
    assert shuffled_partners(store_of(np.full(12, 64), minhash), "sae", 0).tolist() == [-1] * 12


@pytest.mark.parametrize(("count", "expected"), [([], []), ([100], [-1]), ([100, 5000], [1, 0]), ([3, 0, 19], [-1, -1, -1])])
def test_tiny_coders(count, expected):
    store = store_of(np.array(count, np.int64))
    assert shuffled_partners(store, "sae", 0).tolist() == expected


def test_bins_of_one_join_the_nearest():
    count = np.array([20, 31, 32, 63, 64, 300, 301])
    assert [sorted(rows.tolist()) for rows in rate_bins(count)] == [[0, 1], [2, 3, 4], [5, 6]]
    assert [sorted(rows.tolist()) for rows in rate_bins(np.array([20, 40, 41, 100]))] == [[0, 1, 2, 3]]
    # The two frequent ones are nearer to each other than to the rest.
    assert [sorted(rows.tolist()) for rows in rate_bins(np.array([40, 150, 160, 3000, 9000]))] == [[0, 1, 2], [3, 4]]
    assert rate_bins(np.zeros(0)) == []


def test_unknown_coder():
    with pytest.raises(InputError, match="no coder 'sea'; did you mean 'sae'"):
        shuffled_partners(store_of(np.full(3, 50)), "sea", 0)
