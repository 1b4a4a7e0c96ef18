"""Negatives from neighbours: the walk, whose activations they keep, and the pool rules that no source escapes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from examples_corpus import MemoryStore

from autointerp.errors import StoreError
from autointerp.examples.negatives import PER_NEIGHBOUR
from autointerp.examples.selection import SelectionConfig, Selector
from autointerp.examples.similar import SimilarWindows
from autointerp.records import Examples, LatentExamples
from autointerp.scorers.fuzzing import Fuzzing

NUM = 800
KINDS = ("neighbour_cooccurrence", "neighbour_decoder", "neighbour_encoder")


class Table:
    def __init__(self, lists: dict[int, list[int]]) -> None:
        self._lists = lists

    def of(self, latent):
        return np.array(self._lists[latent], np.int64), np.zeros(len(self._lists[latent]), np.float32)


def planted(lists, latents, *, texts=None) -> MemoryStore:
    """One window of 8 tokens per document; no two windows say the same unless `texts` does; a neighbour table for all kinds."""
    rng = np.random.default_rng(0)
    documents = [[i % 600, i // 600, *rng.integers(0, 500, 6).tolist()] for i in range(NUM)]
    for i, j in (texts or {}).items():
        documents[i] = list(documents[j])
    store = MemoryStore(documents, ctx_len=64)
    store.add("sae", latents)
    store.coder("sae").neighbours = lambda kind: Table(lists)
    return store


def at(window: int, value: float = 1.0, offset: int = 3) -> tuple[int, float]:
    return 8 * window + offset, value


def choose(store, latent=0, **settings) -> LatentExamples:
    config = SelectionConfig(window=8, **{"negatives": ("neighbour_cooccurrence",), "num_negatives": 50} | settings)
    return Selector(store, config).select("sae", latent)


def pool_of(store, latent=0):
    selector = Selector(store, SelectionConfig(window=8))
    return selector.pools("sae", latent)[1].of_grid(np.arange(NUM))


TARGET = dict(at(w, 2.0) for w in range(0, 200))


def test_the_walk_takes_up_to_ten_of_the_strongest_from_each_neighbour_in_order():
    # Neighbour 1 fires where the target does and in 200..399; 2 only where the target does; 3 in 300..699, strongest last.
    near = dict(at(w, 5.0) for w in range(100)) | dict(at(w, 1 + (w % 97) / 100) for w in range(200, 400))
    inside = dict(at(w, 9.0) for w in range(100))
    far = dict(at(w, w / 100) for w in range(300, 700))
    store = planted({0: [2, 1, 3]}, [TARGET, near, inside, far])
    chosen = choose(store, num_negatives=15)
    windows = (chosen.negatives.positions // 8).tolist()
    pool = pool_of(store)
    silent = [w for w in range(200, 400) if pool[w] == 1]
    strongest = sorted(silent, key=lambda w: -near[8 * w + 3])
    assert len(windows) == 15
    # Strengths tie now and then; the values of the ten are the ten largest.
    assert sorted(near[8 * w + 3] for w in windows[:10]) == sorted(near[8 * w + 3] for w in strongest[:10])
    rest = [w for w in range(699, 299, -1) if pool[w] == 1 and w not in windows[:10]][:5]
    assert windows[10:] == rest
    assert chosen.negatives.sources == ("neighbour_cooccurrence",) * 15


def test_a_neighbour_without_a_silent_window_is_skipped_and_few_are_few():
    store = planted({0: [1, 2]}, [TARGET, dict(at(w, 9.0) for w in range(100)), dict(at(w) for w in range(500, 505))])
    chosen = choose(store)
    pool = pool_of(store)
    assert sorted(chosen.negatives.positions // 8) == [w for w in range(500, 505) if pool[w] == 1]
    assert choose(planted({0: []}, [TARGET])).negatives.sources == ()


@pytest.mark.parametrize("kind", KINDS)
def test_a_negative_keeps_the_neighbours_activations_and_the_target_is_silent_in_it(kind):
    near = dict(at(w, 3.0, offset=2) for w in range(200, 260)) | dict(at(w, 1.5, offset=5) for w in range(200, 230))
    store = planted({0: [1]}, [TARGET, near])
    chosen = choose(store, negatives=(kind, "random"))
    sources = np.array(chosen.negatives.sources)
    assert (sources == kind).sum() == PER_NEIGHBOUR
    assert not chosen.negatives.activations[sources == "random"].any()
    lent = chosen.negatives.take(np.flatnonzero(sources == kind))
    for window, row in zip(lent.positions // 8, lent.activations, strict=True):
        assert 200 <= window < 260
        expected = np.zeros(8, np.float32)
        expected[2] = 3.0
        expected[5] = 1.5 if window < 230 else 0
        np.testing.assert_array_equal(row, expected)
        assert not any(8 * window + offset in TARGET for offset in range(8))


def test_a_window_that_two_neighbours_share_is_the_nearer_ones():
    both = range(200, 212)
    store = planted({0: [2, 1]}, [TARGET, dict(at(w, 7.0) for w in both), dict(at(w, 4.0) for w in both)])
    chosen = choose(store)
    counts = {value: int((chosen.negatives.activations.max(axis=1) == value).sum()) for value in (4.0, 7.0)}
    pool = pool_of(store)
    there = sum(pool[w] == 1 for w in both)
    assert counts[4.0] == min(10, there) and counts[7.0] == there - counts[4.0]


def test_pools_and_texts_hold_for_neighbours_as_for_any_source():
    rng = np.random.default_rng(4)
    texts = {700 + i: i for i in range(100)}  # the last windows say what the target's first do
    near = dict(at(w, 1 + rng.random()) for w in range(150, 800))
    store = planted({0: [1, 2]}, [TARGET, near, dict(at(w) for w in range(650, 800))], texts=texts)
    chosen = choose(store, negatives=("neighbour_cooccurrence", "random"), num_negatives=200)
    pool = pool_of(store)
    assert (pool[chosen.negatives.positions // 8] == 1).all()
    seen = [tuple(row) for row in chosen.negatives.tokens]
    assert len(set(seen)) == len(seen)
    explained = {tuple(row) for row in chosen.explain_statistics.tokens} | {tuple(row) for row in chosen.explain.tokens}
    assert not explained & set(seen)
    assert not set(chosen.negatives.positions // 8) & set(range(200))
    # More negatives of a source are the same ones and more.
    fewer = choose(store, num_negatives=5).negatives.positions.tolist()
    assert chosen.negatives.positions[:5].tolist() == fewer


def test_activations_do_not_make_a_negative_a_positive_in_fuzzing():
    near = dict(at(w, 3.0, offset=2) for w in range(200, 260)) | dict(at(w, 2.0, offset=6) for w in range(200, 260))
    everywhere = {8 * w + offset: 1.0 for w in range(300, 360) for offset in range(8)}
    store = planted({0: [1, 2]}, [TARGET, near, everywhere])
    chosen = choose(store, num_negatives=20)
    items = Fuzzing().items(chosen, seed=0)
    negatives = [item for item in items if not item.truth]
    assert len(negatives) == len(chosen.negatives) == 20
    assert all(item.source == "neighbour_cooccurrence" for item in negatives)
    # The neighbour's own tokens are marked; one that fires everywhere gets a positive's pattern (offset 3).
    for item in negatives:
        assert np.flatnonzero(item.mask).tolist() == ([2, 6] if item.position < 8 * 300 else [3])


def test_without_a_table_the_sentence_says_what_makes_one():
    store = planted({}, [TARGET])

    def refuse(kind):
        raise StoreError(f"no neighbours by {kind}; make them with `autointerp tables`")

    store.coder("sae").neighbours = refuse
    with pytest.raises(StoreError, match="no neighbours by encoder; make them with"):
        choose(store, negatives=("neighbour_encoder",))
    assert isinstance(choose(store, negatives=("random",)).negatives, Examples)


# Embedding-hard negatives ---------------------------------------------------------------------------------------------


class Line:
    """Windows on a line: the nearest to a window are those beside it, the lower one first."""

    def __init__(self, num: int = NUM) -> None:
        self._num, self.asked = num, []

    def __len__(self) -> int:
        return self._num

    def nearest(self, rows, count):
        self.asked.append((rows.tolist(), count))
        distance = np.abs(np.arange(self._num) - np.asarray(rows)[:, None])
        return np.argsort(distance, axis=1, kind="stable")[:, :count]


def embedded(latents, **kwargs):
    store = planted({0: []}, latents, **kwargs)
    line = Line()
    store.embeddings = lambda embedder, *, window, min_window: line
    return store, line


def test_embedding_negatives_are_the_nearest_silent_windows_of_each_of_ten_queries_in_turn():
    # Fires in every fourth window, nowhere twice as strongly.
    latent = {8 * w + 3: 1.0 + (w * 37 % 811) / 811 for w in range(0, NUM, 4)}
    store, line = embedded([latent])
    chosen = choose(store, negatives=("embedding",), num_negatives=40)
    pool = pool_of(store)
    fires = {p // 8 for p in latent}
    # By hand: the ten strongest of the score pool, then rounds of one window each.
    queries = sorted((w for w in fires if pool[w] == 1), key=lambda w: -latent[8 * w + 3])[:10]
    assert line.asked[0][0] == queries
    taken: list[int] = []
    while len(taken) < 40:
        for query in queries:
            near = sorted(range(NUM), key=lambda w: (abs(w - query), w))
            taken.append(next(w for w in near if w not in taken and w not in fires and pool[w] == 1))
    assert (chosen.negatives.positions // 8).tolist() == taken
    assert set(chosen.negatives.sources) == {"embedding"}
    assert not chosen.negatives.activations.any()
    # No query gives more than ceil(40 / 10); more negatives are the same ones and more.
    more = choose(store, negatives=("embedding",), num_negatives=77).negatives.positions.tolist()
    assert more[:40] == chosen.negatives.positions.tolist() and len(more) == 77


def test_the_queries_are_never_of_the_explain_pool():
    latent = {8 * w + 3: 1.0 + w for w in range(0, NUM, 2)}
    store, line = embedded([latent])
    choose(store, negatives=("embedding",))
    pool = pool_of(store)
    assert len(line.asked[0][0]) == 10
    assert all(pool[w] == 1 for w in line.asked[0][0])


def test_search_goes_on_until_there_is_nothing_left(monkeypatch):
    from autointerp.examples import negatives

    monkeypatch.setattr(negatives, "_FIRST_SEARCH", 4)
    latent = {8 * w + 3: 1.0 + w / 900 for w in range(0, 400)}
    store, line = embedded([latent])
    chosen = choose(store, negatives=("embedding",), num_negatives=10**6)
    pool = pool_of(store)
    assert sorted(chosen.negatives.positions // 8) == [w for w in range(400, NUM) if pool[w] == 1]
    assert [count for _, count in line.asked] == [4, 32, 256, 2048]


def test_texts_that_say_the_same_are_drawn_once():
    texts = {401 + 2 * i: 400 + 2 * i for i in range(100)}
    latent = {8 * w + 3: 1.0 + w / 900 for w in range(0, 400, 3)}
    store, _ = embedded([latent], texts=texts)
    chosen = choose(store, negatives=("embedding",), num_negatives=300)
    seen = [tuple(row) for row in chosen.negatives.tokens]
    assert len(set(seen)) == len(seen)


FEW = 4
"""The latent of :func:`several` that has too few examples."""


def several():
    latents = [{8 * w + 3: 1.0 + (w * 37 % 811) / 811 for w in range(i, NUM, 5 + i)} for i in range(20)]
    latents[FEW] = dict(at(w) for w in range(3))
    return embedded(latents)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("backwards", [False, True])
def test_latents_that_are_announced_are_looked_up_together_and_get_the_same(threads, backwards):
    config = SelectionConfig(window=8, negatives=("random", "embedding"), num_negatives=20)
    alone, _ = several()
    expected = [Selector(alone, config).select("sae", latent) for latent in range(20)]
    assert [one.status for one in expected] == ["too_few_examples" if i == FEW else "ok" for i in range(20)]
    store, line = several()
    selector = Selector(store, config)
    selector.expect([("sae", latent) for latent in range(20)])
    order = list(range(20))[:: -1 if backwards else 1]
    with ThreadPoolExecutor(threads) as pool:
        found = dict(zip(order, pool.map(lambda latent: selector.select("sae", latent), order), strict=True))
    for latent in range(20):
        assert found[latent].negatives.positions.tolist() == expected[latent].negatives.positions.tolist()
        assert found[latent].negatives.sources == expected[latent].negatives.sources
    # Sixteen and four, without the one that does not ask; ten windows of each.
    assert sorted(len(rows) for rows, _ in line.asked) == [40, 150]


def test_random_negatives_look_nothing_up():
    store, line = several()
    selector = Selector(store, SelectionConfig(window=8))
    selector.expect([("sae", 0), ("sae", 1)])
    selector.select("sae", 0)
    assert line.asked == []


def test_what_is_found_and_not_asked_for_is_bounded():
    line, asked = Line(), []

    def queries(coder, latent):
        asked.append(latent)
        return np.array([latent % NUM])

    lookups = SimilarWindows(queries)
    latents = [("sae", latent) for latent in range(1600)]
    lookups.expect(latents)
    for latent in latents[::16]:
        assert lookups.of(line, latent, np.array([latent[1] % NUM]), 3)[0, 0] == latent[1] % NUM
    assert len(asked) == 1500 and len(lookups._found) <= 8 * 16
    # Forgotten, kept, never announced: the same answer; and more than was looked up is looked up again.
    for latent in (1, 1599, 1700):
        np.testing.assert_array_equal(
            lookups.of(line, ("sae", latent), np.array([latent % NUM]), 2), line.nearest(np.array([latent % NUM]), 2)
        )
    assert lookups.of(line, ("sae", 1598), np.array([798]), 99).shape == (1, 99)


def test_a_latent_that_cannot_be_read_is_told_when_it_is_asked_for_itself():
    def queries(coder, latent):
        if latent == 1:
            raise StoreError("damaged")
        return np.array([latent])

    line = Line()
    lookups = SimilarWindows(queries)
    lookups.expect([("sae", latent) for latent in range(3)])
    assert lookups.of(line, ("sae", 0), np.array([0]), 2).tolist() == [[0, 1]]
    assert lookups.of(line, ("sae", 2), np.array([2]), 2).tolist() == [[2, 1]]
    assert line.asked == [([0, 2], 2)]


def test_an_index_of_another_grid_is_refused():
    store, _ = embedded([TARGET])
    store.embeddings = lambda embedder, *, window, min_window: Line(5)
    with pytest.raises(StoreError, match="are of 5 windows and the store has 800"):
        choose(store, negatives=("embedding",))
