"""What is chosen for a latent: strata, ties, statuses, negatives; and that nothing but the named inputs decides it."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import get_args

import numpy as np
import pytest
from examples_corpus import MemoryStore, random_store

from autointerp.errors import ConfigError, InputError
from autointerp.examples.negatives import NEGATIVES, NegativeSource
from autointerp.examples.pools import VALIDATE
from autointerp.examples.sampling import Choice, Sampling, choose, keys_of, rank, spread
from autointerp.examples.selection import SelectionConfig, Selector, select, selection_id
from autointerp.examples.windows import ActivatingWindows
from autointerp.records import Examples, LatentExamples

BLOCKS = ("explain", "explain_statistics", "explain_negatives", "positives", "negatives")


def windows_of(strength: list[float]) -> ActivatingWindows:
    num = len(strength)
    where = np.arange(num, dtype=np.int64)
    return ActivatingWindows(
        start=where * 32,
        length=np.full(num, 32, np.int32),
        document=where,
        context=where,
        text=where.astype(np.uint64),
        strength=np.array(strength, np.float32),
    )


def assert_equal(one: LatentExamples, other: LatentExamples) -> None:
    for field in fields(LatentExamples):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if not isinstance(left, Examples):
            assert left == right, field.name
            continue
        assert left.sources == right.sources
        for array in ("tokens", "activations", "lengths", "positions", "documents", "quantiles"):
            np.testing.assert_array_equal(getattr(left, array), getattr(right, array), err_msg=f"{field.name}.{array}")


# Strata ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 3, 7, 10, 16])
def test_spread_sums_up_evenly_and_grows_in_every_part(parts):
    for total in range(60):
        share = spread(total, parts)
        assert share.sum() == total
        assert share.max() - share.min() <= 1
        assert (spread(total + 1, parts) >= share).all()


def test_remainder_of_53_over_10():
    # 53 = 10 * 5 + 3: three of the strata have six, and they lie apart.
    assert spread(53, 10).tolist() == [6, 5, 6, 5, 5, 6, 5, 5, 5, 5]
    rows, quantiles = choose(windows_of(list(range(1000, 0, -1))), 53, parts=10, seed=1)
    assert np.bincount(quantiles, minlength=10).tolist() == [6, 5, 6, 5, 5, 6, 5, 5, 5, 5]
    assert (rows // 100 == quantiles).all()


@pytest.mark.parametrize(
    ("num", "count", "parts"), [(54, 53, 10), (53, 53, 10), (7, 50, 10), (40, 3, 10), (100, 50, 1), (0, 50, 10)]
)
def test_every_stratum_gives_its_share(num, count, parts):
    ranked = windows_of(list(range(num, 0, -1)))
    rows, quantiles = choose(ranked, count, parts=parts, seed=4)
    sizes, taken = spread(num, parts), spread(min(num, count), parts)
    ends = np.cumsum(sizes)
    assert len(set(rows.tolist())) == len(rows) == min(num, count)
    assert np.bincount(quantiles, minlength=parts).tolist() == taken.tolist()
    for row, quantile in zip(rows, quantiles, strict=True):
        assert ends[quantile] - sizes[quantile] <= row < ends[quantile]


def test_greater_counts_add_and_never_replace():
    ranked = windows_of(list(range(200, 0, -1)))
    for how in ("quantiles", "top", "random", "importance"):
        earlier: set[int] = set()
        for count in (1, 5, 10, 33, 50, 199, 200):
            rows = {*choose(ranked, count, parts=10, seed=2, how=how)[0].tolist()}
            assert earlier <= rows
            earlier = rows


def test_ties_are_broken_by_the_seed_and_not_by_position():
    tied = windows_of([2.0] + [1.0] * 200 + [3.0])
    first, second = rank(tied, seed=1), rank(tied, seed=2)
    assert first[:2].tolist() == second[:2].tolist() == [201, 0]
    assert first.tolist() != second.tolist()
    assert sorted(first.tolist()) == list(range(202))
    assert abs(np.corrcoef(first[2:], np.arange(200))[0, 1]) < 0.3


@pytest.mark.parametrize(("num", "parts", "most"), [(1500, 10, 50), (5000, 10, 200), (5003, 7, 41), (3000, 1, 90)])
def test_strata_sorted_as_far_as_drawn_give_what_sorted_ones_do(num, parts, most, monkeypatch):
    # With ties in rank, and not in order of strength.
    windows = windows_of(np.random.default_rng(num).integers(1, 300, num).astype(float).tolist())
    keys = keys_of(windows, seed=5)
    short = Choice(windows.strength, keys, parts=parts, most=most)
    assert len(short._strata[0]) < num / 2
    monkeypatch.setattr("autointerp.examples.sampling._MANY", num + 1)
    whole = Choice(windows.strength, keys, parts=parts, most=most)
    assert len(whole._strata[0]) == num
    for count in (0, 1, most // 3, most):
        for left, right in zip(short.take(count), whole.take(count), strict=True):
            assert left.dtype == right.dtype
            assert left.tolist() == right.tolist()
    # By hand: of each stratum of the ranking, those with the smallest keys.
    ranking = sorted(range(num), key=lambda row: int(keys.order[row]))
    low, expected = 0, []
    for size, share in zip(spread(num, parts).tolist(), spread(most, parts).tolist(), strict=True):
        stratum = ranking[low : low + size]
        drawn = set(sorted(stratum, key=lambda row: int(keys.draw[row]))[:share])
        expected += [row for row in stratum if row in drawn]
        low += size
    assert short.take(most)[0].tolist() == expected


def test_top_mix_and_importance():
    ranked = windows_of([float(x) for x in range(100, 0, -1)])
    assert choose(ranked, 5, parts=10, seed=0, how="top")[0].tolist() == [0, 1, 2, 3, 4]
    rows, quantiles = choose(ranked, 50, parts=10, seed=0, how="mix", ratio_top=0.2)
    assert rows[:10].tolist() == list(range(10))
    assert np.bincount((rows[10:] - 10) // 9).tolist() == [4] * 10
    assert (quantiles == rows // 10).all()
    # Weights are squares: the stronger half holds 295,425 of 338,350 = 87% of the weight.
    drawn = [choose(ranked, 1, parts=10, seed=seed, how="importance")[0][0] for seed in range(400)]
    assert 0.80 < np.mean(np.array(drawn) < 50) < 0.94
    drawn = [choose(ranked, 1, parts=10, seed=seed, how="random")[0][0] for seed in range(400)]
    assert 0.40 < np.mean(np.array(drawn) < 50) < 0.60


@pytest.mark.parametrize(
    ("num", "count", "ratio", "num_top"), [(60, 15, 0.667, 10), (14, 15, 0.667, 9), (30, 9, 0, 0), (8, 8, 1, 8)]
)
def test_the_strongest_and_below_them_by_squared_activation(num, count, ratio, num_top):
    # With ties in rank, and not in order of strength.
    windows = windows_of(np.random.default_rng(num).integers(1, 9, num).astype(float).tolist())
    keys = keys_of(windows, seed=6)
    rows, quantiles = choose(windows, count, parts=10, seed=6, how="top_importance", ratio_top=ratio)
    ranking = sorted(range(num), key=lambda row: int(keys.order[row]))
    # Efraimidis and Spirakis: of uniform numbers u, those with the largest u^(1 / weight).
    wins = {row: (int(keys.draw[row]) / 2**64) ** (1 / float(windows.strength[row]) ** 2) for row in ranking[num_top:]}
    drawn = sorted(wins, key=lambda row: -wins[row])[: min(num, count) - num_top]
    assert rows.tolist() == [row for row in ranking if row in ranking[:num_top] or row in drawn]
    ends = np.cumsum(spread(num, 10))
    assert quantiles.tolist() == [int(np.sum(ends <= ranking.index(row))) for row in rows]


def test_below_the_strongest_one_is_drawn_in_proportion_to_its_squared_activation():
    windows = windows_of([9.0, 1.0, 3.0, 8.0, 2.0])
    drawn = [choose(windows, 3, parts=1, seed=s, how="top_importance", ratio_top=2 / 3)[0].tolist() for s in range(1400)]
    assert {tuple(rows[:2]) for rows in drawn} == {(0, 3)}
    # Weights 9, 4 and 1 of 14; the standard deviation of a count is at most 19.
    for row, expected in ((2, 900), (4, 400), (1, 100)):
        assert abs(sum(rows[2] == row for rows in drawn) - expected) < 70


# One latent -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    return random_store(seed=0, num_documents=250, copies=0.1)


@pytest.mark.parametrize("centred", [False, True])
def test_defaults(store, centred):
    selector = Selector(store, SelectionConfig(centred=centred))
    chosen = selector.select("sae", 0)
    assert (chosen.status, chosen.disjoint, chosen.coder, chosen.latent) == ("ok", "document", "sae", 0)
    assert [len(getattr(chosen, name)) for name in BLOCKS[:1] + BLOCKS[2:]] == [40, 40, 50, 50]
    assert 200 < len(chosen.explain_statistics) <= 400
    assert chosen.density == pytest.approx(0.02, rel=0.1)
    active, pools = selector.pools("sae", 0)
    assert chosen.max_activation == active.strength[pools.active_pool == 0].max() >= chosen.explain.activations.max()
    assert chosen.positives.quantiles.tolist() == [q for q in range(10) for _ in range(5)]
    assert chosen.explain.quantiles.tolist() == [q for q in range(10) for _ in range(4)]
    assert set(chosen.negatives.sources) == {"random"}
    assert set(chosen.positives.sources) == {"positive"}
    assert set(chosen.explain.positions) <= set(chosen.explain_statistics.positions)


@pytest.mark.parametrize("centred", [False, True])
def test_blocks_hold_what_the_store_holds(store, centred):
    chosen = select(store, "sae", 0, SelectionConfig(centred=centred, negatives=("random", "same_token")))
    dense = np.zeros(len(store.tokens), np.float32)
    positions, values = store.coder("sae").activations(0)
    dense[positions] = values
    document_at = np.zeros(len(store.tokens), np.int64)
    for document, start, stop in zip(store.segments.document, store.segments.start, store.segments.stop, strict=True):
        document_at[start:stop] = document
    for name in BLOCKS:
        block = getattr(chosen, name)
        assert block.tokens.dtype == np.uint32
        assert block.activations.dtype == np.float32
        assert len(block.sources) == len(block)
        for row in range(len(block)):
            at, n = block.positions[row], block.lengths[row]
            np.testing.assert_array_equal(block.tokens[row, :n], store.tokens[at : at + n])
            np.testing.assert_array_equal(block.activations[row, :n], dense[at : at + n])
            assert not block.tokens[row, n:].any()
            assert not block.activations[row, n:].any()
            assert set(document_at[at : at + n]) == {block.documents[row]}
            is_positive = block.sources[row] == "positive"
            assert block.activations[row].any() == is_positive == (block.quantiles[row] >= 0)
    texts = [row.tobytes() for row in np.concatenate([chosen.positives.tokens, chosen.negatives.tokens])]
    assert len(set(texts)) == len(texts)


def test_centred_means_centred():
    """delphi has it the other way round: what it calls centred lies on the grid, and the peak anywhere."""
    rng = np.random.default_rng(3)
    store = MemoryStore([rng.integers(0, 500, 400).tolist() for _ in range(150)], ctx_len=400)
    peaks = {400 * k + int(rng.integers(40, 360)): 5.0 for k in range(150)}
    store.add("sae", [peaks | {p + 1: 1.0 for p in peaks}])
    for centred in (False, True):
        shown = select(store, "sae", 0, SelectionConfig(centred=centred)).positives
        places = shown.activations.argmax(axis=1)
        assert (places == 24).all() == centred
        assert (shown.positions % 400 % 32 == 0).all() != centred
    assert len(set(select(store, "sae", 0, SelectionConfig()).positives.activations.argmax(axis=1).tolist())) > 10
    middle = select(store, "sae", 0, SelectionConfig(centred="middle", window=21)).positives
    assert (middle.activations.argmax(axis=1) == 10).all()


def test_same_call_same_rows_in_any_order_and_thread(store):
    many = random_store(seed=8, num_documents=120)
    positions, values = many.coder("sae").activations(0)
    pairs = dict(zip(positions.tolist(), values.tolist(), strict=True))
    many.add("sae", [pairs, {p + 1: v for p, v in pairs.items() if p + 1 < many.num_tokens}, pairs])
    config = SelectionConfig(negatives=("same_token", "random"))
    alone = [select(many, "sae", latent, config) for latent in range(3)]
    shared = Selector(many, config)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda k: shared.select("sae", k % 3), range(23, -1, -1)))
    for k, chosen in zip(range(23, -1, -1), together, strict=True):
        assert_equal(chosen, alone[k % 3])
    # Equal activations, but another latent: other pools and other draws, of negatives too.
    assert alone[0].positives.positions.tolist() != alone[2].positives.positions.tolist()
    for block in ("negatives", "explain_negatives"):
        one, other = (set(getattr(alone[latent], block).positions.tolist()) for latent in (0, 2))
        assert len(one & other) < 0.5 * len(one)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "b638a0627a009ca3"),
        ({"centred": True, "negatives": ("same_token", "random"), "seed": 3}, "8afb36330b6317a1"),
        ({"explain_sampling": "importance", "window": 20, "active_above": 0.3}, "4fd7a7d5725876a3"),
    ],
)
def test_choices_are_those_of_the_first_release(store, settings, expected):
    # A change of any byte needs another `_VERSION`: folders made before would be added to with other examples.
    found = select(store, "sae", 0, SelectionConfig(**settings))
    state = hashlib.sha256(found.selection_id.encode())
    for block in (getattr(found, name) for name in BLOCKS):
        for values in (getattr(block, field.name) for field in fields(Examples)):
            state.update("|".join(values).encode() if isinstance(values, tuple) else values.tobytes())
    assert state.hexdigest()[:16] == expected


def test_seed_and_coder_change_the_choice_and_the_identity(store):
    base = select(store, "sae", 0, SelectionConfig())
    other = select(store, "sae", 0, SelectionConfig(seed=1))
    assert base.selection_id != other.selection_id
    assert base.positives.positions.tolist() != other.positives.positions.tolist()
    config = SelectionConfig()
    ids = {selection_id(s, c, g) for s in "ab" for c in "cd" for g in (config, SelectionConfig(num_positives=51))}
    assert len(ids) == 8
    ways = [SelectionConfig(explain_sampling=how) for how in get_args(Sampling)]
    ways += [SelectionConfig(centred=how) for how in (True, "middle")]
    assert len({selection_id("s", "c", way) for way in ways}) == len(ways) == 8


def test_counts_do_not_change_what_else_is_chosen(store):
    base = select(store, "sae", 0, SelectionConfig())
    more = select(store, "sae", 0, SelectionConfig(num_positives=80, num_negatives=90, num_explain=20, num_statistics=10))
    assert set(base.positives.positions) < set(more.positives.positions)
    assert base.negatives.positions.tolist() == more.negatives.positions[:50].tolist()
    assert set(more.explain.positions) < set(base.explain.positions)
    assert base.explain_negatives.positions.tolist() == more.explain_negatives.positions.tolist()


# Few and many ---------------------------------------------------------------------------------------------------------


def spread_latent(num: int, *, of: int = 400) -> MemoryStore:
    """One window per document, no two alike; the latent fires in the first `num`."""
    store = MemoryStore([[i, (i * 7) % 600, *range(6)] for i in range(of)], ctx_len=64)
    return store.add("sae", [{8 * i: 1.0 + i for i in range(num)}])


@pytest.mark.parametrize("num", [0, 1, 19, 20, 21, 50, 89, 90, 250])
def test_few_windows(num):
    chosen = select(spread_latent(num), "sae", 0, SelectionConfig(window=8))
    if num < 20:
        assert chosen.status == "too_few_examples"
        assert chosen.max_activation == 0
        assert [len(getattr(chosen, name)) for name in BLOCKS] == [0] * 5
        assert chosen.explain.tokens.shape == (0, 8)
    else:
        assert chosen.status == "ok"
        assert min(len(chosen.positives), len(chosen.explain)) >= 10 or num < 22
        assert len(chosen.positives) >= 10
        assert len(chosen.negatives) == 50
    assert chosen.disjoint == ("document" if num >= 20 else "context")


def test_repeats_of_one_text_are_one_window():
    store = MemoryStore([[i % 19, *range(100, 107)] for i in range(400)] + [[50 + i, i, i] * 3 for i in range(300)], ctx_len=90)
    chosen = select(store.add("sae", [{8 * i: 1.0 for i in range(400)}]), "sae", 0, SelectionConfig(window=8))
    assert chosen.status == "too_few_examples"


@pytest.mark.parametrize(("num_silent", "status"), [(0, "too_dense"), (19, "too_dense"), (100, "ok")])
def test_dense_latents(num_silent, status):
    chosen = select(spread_latent(300 - num_silent, of=300), "sae", 0, SelectionConfig(window=8))
    assert chosen.status == status


def test_one_document_is_parted_by_context():
    rng = np.random.default_rng(0)
    store = MemoryStore([rng.integers(0, 500, 20000).tolist()], ctx_len=128)
    store.add("sae", [{int(p): 1.0 for p in np.flatnonzero(rng.random(20000) < 0.01)}])
    chosen = select(store, "sae", 0, SelectionConfig())
    assert (chosen.status, chosen.disjoint) == ("ok", "context")
    contexts = [set(block.positions // 128) for block in (chosen.explain_statistics, chosen.explain)]
    assert not (contexts[0] | contexts[1]) & (set(chosen.positives.positions // 128) | set(chosen.negatives.positions // 128))


def test_dense_latent_with_a_threshold_of_its_own():
    rng = np.random.default_rng(1)
    store = MemoryStore([rng.integers(0, 500, 100).tolist() for _ in range(100)], ctx_len=100)
    values = rng.exponential(size=store.num_tokens)
    store.add("sae", [{p: float(v) for p, v in enumerate(values)}])
    assert select(store, "sae", 0, SelectionConfig()).status == "too_dense"
    chosen = select(store, "sae", 0, SelectionConfig(active_above=0.99))
    assert chosen.status == "ok"
    assert not chosen.negatives.activations.any()
    shown = chosen.positives.activations[chosen.positives.activations != 0]
    assert shown.min() >= np.quantile(values, 0.99) - 1e-6


# Negatives ------------------------------------------------------------------------------------------------------------


def test_same_token_negatives_hold_the_token_that_fires_most_in_the_explain_pool():
    rng = np.random.default_rng(2)
    documents = [rng.integers(0, 400, 32).tolist() for _ in range(600)]
    for k in range(0, 600, 2):
        documents[k][5] = 500
    store = MemoryStore(documents, ctx_len=32)
    store.add("sae", [{32 * k + 5: 3.0 for k in range(0, 300, 2)} | {32 * k + 9: 1.0 for k in range(0, 300, 2)}])
    chosen = select(store, "sae", 0, SelectionConfig(negatives=("random", "same_token"), num_negatives=60))
    same = [k for k, source in enumerate(chosen.negatives.sources) if source == "same_token"]
    assert len(same) > 30
    assert chosen.negatives.sources == ("random",) * 60 + ("same_token",) * len(same)
    assert (chosen.negatives.tokens[same] == 500).any(axis=1).all()
    assert (chosen.negatives.documents[same] >= 300).all()
    assert len(set(chosen.negatives.positions)) == len(chosen.negatives)
    # As many as there are: windows of the score pool that hold the token, less those drawn as random.
    selector = Selector(store, SelectionConfig())
    pool = selector.pools("sae", 0)[1].of_grid(np.arange(len(selector.grid)))
    there = {k for k in range(300, 600, 2) if pool[k] == 1} - set(chosen.negatives.documents[:60])
    assert {*chosen.negatives.documents[same]} <= there
    assert len(same) == min(60, len(there))


def test_random_negatives_are_all_there_is_where_few_are_asked_for():
    store = spread_latent(200, of=300)
    selector = Selector(store, SelectionConfig(window=8, num_negatives=1000))
    chosen = selector.select("sae", 0)
    pool = selector.pools("sae", 0)[1].of_grid(np.arange(len(selector.grid)))
    assert sorted(chosen.negatives.documents) == [k for k in range(200, 300) if pool[k] == 1]


def test_random_negatives_of_a_large_store_are_spread_over_it():
    rng = np.random.default_rng(0)
    store = MemoryStore([rng.integers(0, 600, 160).tolist() for _ in range(1200)], ctx_len=160)
    store.add("sae", [{160 * k: 1.0 for k in range(600)}])
    config = SelectionConfig(window=8, num_negatives=300, negatives=("random", "same_token"))
    chosen = select(store, "sae", 0, config)
    at = chosen.negatives.positions[:300] / len(store.tokens)
    assert len(set(at)) == 300
    assert abs(at.mean() - 0.5) < 0.06
    active, pools = Selector(store, config).pools("sae", 0)
    top = np.bincount(store.tokens[active.start[pools.active_pool == 0]]).argmax()
    assert (chosen.negatives.tokens[300:] == top).any(axis=1).all()
    assert len(chosen.negatives) > 300


def test_frequent_tokens_are_found_by_probing_with_the_same_rules():
    # Token 0 is also what pads the shorter window at the end of each document.
    rng = np.random.default_rng(0)
    store = MemoryStore([[0, *rng.integers(10, 600, 40), 0, *rng.integers(10, 600, 115)] for _ in range(1500)], ctx_len=157)
    store.add("sae", [{157 * k: 1.0 for k in range(300)}])
    config = SelectionConfig(window=8, min_window=4, negatives=("same_token",), num_negatives=100)
    chosen = select(store, "sae", 0, config)
    assert len(chosen.negatives) == 100
    held = [set(row[:n]) for row, n in zip(chosen.negatives.tokens, chosen.negatives.lengths, strict=True)]
    assert all(0 in tokens for tokens in held)
    assert np.unique(chosen.negatives.positions % 157).tolist() == [0, 40]


def test_unit_does_not_depend_on_the_threshold_of_firing():
    store = spread_latent(60)
    chosen = [select(store, "sae", 0, SelectionConfig(window=8, active_above=q)) for q in (None, 0.9)]
    assert [c.disjoint for c in chosen] == ["document", "document"]
    assert [c.status for c in chosen] == ["ok", "too_few_examples"]


def test_a_source_cannot_break_the_rules(store, monkeypatch):
    every = NegativeSource(label="neighbour_decoder", draw=lambda windows: iter([np.arange(len(windows.grid))]))
    monkeypatch.setitem(NEGATIVES, "every", every)
    selector = Selector(store, SelectionConfig(negatives=("every",), num_negatives=10**6))
    chosen = selector.select("sae", 0)
    assert set(chosen.negatives.sources) == {"neighbour_decoder"}
    assert not chosen.negatives.activations.any()
    pool = selector.pools("sae", 0)[1].of_grid(selector.grid.find(chosen.negatives.positions))
    assert set(pool) == {1}


# Settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"negatives": ["randon"]}, "no source of negatives 'randon'; did you mean 'random'"),
        ({"negatives": []}, "name at least one source"),
        ({"negatives": ["random", "random"]}, "named twice"),
        ({"num_positive": 3}, "unknown key 'num_positive'; did you mean 'num_positives'"),
        ({"window": 8, "min_window": 9}, "min_window = 9 is more than window = 8"),
        ({"active_above": 1.0}, "active_above = 1.0 cannot be used"),
        ({"explain_sampling": "best"}, "explain_sampling = 'best' cannot be used"),
        ({"centred": "left"}, "centred = 'left' cannot be used: Input should be False, True or 'middle'"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        SelectionConfig.parse(settings, where="[examples]")


def test_wrong_names_are_named(store):
    selector = Selector(store, SelectionConfig())
    with pytest.raises(InputError, match="no coder 'sea'; did you mean 'sae'"):
        selector.select("sea", 0)
    with pytest.raises(InputError, match="has no latent 1: it has latents 0 to 0"):
        selector.select("sae", 1)


def test_every_setting_is_part_of_the_identity():
    assert set(SelectionConfig(negatives=("random", "embedding")).identity()) == set(SelectionConfig.model_fields)
    assert set(SelectionConfig.model_fields) - set(SelectionConfig().identity()) == {"embedder"}


# The validate pool ----------------------------------------------------------------------------------------------------


def test_windows_of_the_validate_pool_change_nothing_else_and_are_in_no_other(store):
    config = SelectionConfig(window=8, min_window=3, num_positives=10_000, num_negatives=10_000, num_statistics=10_000)
    selector = Selector(store, config)
    plain, wide = selector.select("sae", 0), selector.select("sae", 0, num_validate=10_000)
    nothing = {"validate_positives": Examples.empty(0), "validate_negatives": Examples.empty(0)}
    assert_equal(plain, replace(wide, **nothing))
    assert set(wide.validate_positives.sources) == {"positive"} and set(wide.validate_negatives.sources) == {"random"}
    assert wide.validate_positives.activations.any(axis=1).all() and not wide.validate_negatives.activations.any()
    others = np.concatenate([getattr(wide, name).documents for name in BLOCKS])
    for block in (wide.validate_positives, wide.validate_negatives):
        assert len(block) >= 10 and not np.isin(block.documents, others).any()
    # All that the latent fires in is in one of the pools, or repeats a text of an earlier one.
    active, pools = selector.pools("sae", 0)
    assert len(wide.validate_positives) == len(np.unique(active.text[pools.active_pool == VALIDATE]))


def test_more_windows_of_the_validate_pool_are_the_same_and_more(store):
    few, many = (select_validate(store, num) for num in (5, 9))
    for name in ("validate_positives", "validate_negatives"):
        less, more = getattr(few, name), getattr(many, name)
        assert (len(less), len(more)) == (5, 9)
        assert set(less.positions.tolist()) < set(more.positions.tolist())


def select_validate(store, num):
    return Selector(store, SelectionConfig(window=8, min_window=3)).select("sae", 0, num_validate=num)


def test_a_latent_without_a_validate_pool_gets_an_empty_one():
    """Twenty windows: the cuts give validate up so that there is enough to explain and to score."""
    store = MemoryStore([[i % 500, (i * 7) % 500, 3, 4, 5, 6, 7, i % 450] for i in range(120)], ctx_len=8)
    store.add("sae", [{8 * i: 1.0 for i in range(20)}])
    latent = Selector(store, SelectionConfig(window=8, min_window=3, min_documents=1)).select("sae", 0, num_validate=20)
    assert latent.status == "ok" and len(latent.validate_positives) == 0
