"""Statistics of latents, against dictionaries and loops; the single-token test as it is meant."""

import math
from collections import Counter

import numpy as np
import pytest
from small_store import random_fires, small_store

from autointerp.errors import IdentityError, StoreError
from autointerp.store.statistics import (
    has_statistics,
    histogram,
    position_information,
    read_statistics,
    single_token,
    statistics_file,
    write_statistics,
)

CTX_LEN = 16


@pytest.fixture(scope="module")
def fires():
    fires = random_fires(5)
    fires[3] *= -1
    return fires


@pytest.fixture(scope="module")
def store(fires, tmp_path_factory):
    store = small_store(tmp_path_factory.mktemp("statistics") / "store", fires)
    advanced = []
    write_statistics(store, "sae", advance=advanced.append)
    assert sum(advanced) == 30
    return store


def test_every_row_is_what_loops_give(store, fires):
    tokens = store.tokens.tolist()
    num = store.num_tokens
    occurs = Counter(tokens[:num])
    rows = read_statistics(store, "sae").to_pylist()
    assert [row["latent"] for row in rows] == list(range(30))
    for latent, row in enumerate(rows):
        active = {p: float(v) for p, v in enumerate(fires[latent]) if v and p < num}
        if not active:
            assert [value for name, value in row.items() if name != "latent" and value is not None] == []
            continue
        low, high = min(active.values()), max(active.values())
        assert (row["histogram_low"], row["histogram_high"]) == (low, high)
        bins = [0] * 32
        for value in active.values():
            bins[min(31, int((value - low) / (high - low) * 32)) if high > low else 0] += 1
        assert row["histogram"] == bins
        counts = Counter(tokens[p] for p in active)
        top = sorted(counts, key=lambda t: (-counts[t], t))[:20]
        assert row["top_tokens"] == top
        np.testing.assert_allclose(row["top_token_shares"], [counts[t] / len(active) for t in top], rtol=1e-6)
        means = [sum(v for p, v in active.items() if tokens[p] == t) / counts[t] for t in top]
        np.testing.assert_allclose(row["top_token_means"], means, rtol=1e-6)
        np.testing.assert_allclose(row["top_token_rates"], [counts[t] / occurs[t] for t in top], rtol=1e-6)
        assert row["num_tokens"] == len(counts)
        entropy = -sum(c / len(active) * math.log2(c / len(active)) for c in counts.values())
        assert row["token_entropy"] == pytest.approx(entropy, abs=1e-6)
        information = 0.0
        for offset in range(CTX_LEN):
            there = sum(p % CTX_LEN == offset for p in range(num))
            for is_active in (True, False):
                joint = sum(p % CTX_LEN == offset and (p in active) == is_active for p in range(num)) / num
                marginal = (len(active) if is_active else num - len(active)) / num
                information += joint * math.log2(joint / (there / num * marginal)) if joint else 0
        assert row["position_information"] == pytest.approx(information, abs=1e-6)
        assert (row["single_token"] is None) == (len(active) < 50)
    assert rows[2]["single_token"] == "no"


def test_histogram_edges():
    # Bin width 1/32 of the range; the largest value lies in the last bin.
    values = np.array([0.0, 1 / 32, 0.5, 1.0, 1.0], np.float32)
    found = histogram(values, 0.0, 1.0)
    assert {i: n for i, n in enumerate(found.tolist()) if n} == {0: 1, 1: 1, 16: 1, 31: 2}
    assert histogram(np.ones(3, np.float32), 1.0, 1.0).tolist() == [3] + [0] * 31


def test_information_by_hand():
    # Fires on every token at offset 0 of two and never at offset 1: one bit. At a rate that is the same everywhere: none.
    assert position_information(np.array([8, 0]), np.array([8, 8])) == pytest.approx(1.0)
    assert position_information(np.array([2, 2]), np.array([8, 8])) == 0
    assert position_information(np.array([8, 8]), np.array([8, 8])) == 0


def latent(strong, weak, *, num=300):
    """Tokens, positions and values: `strong` are the tokens of the stronger half, in order of strength; `weak` of the rest."""
    tokens = np.array([*strong, *weak])
    assert len(tokens) == num
    return tokens, np.arange(num) * 7, np.linspace(10, 1, num).astype(np.float32)


def test_strong_looks_at_the_strongest_and_not_at_the_weakest():
    rng = np.random.default_rng(0)
    others = rng.integers(0, 1000, 150).tolist()
    # delphi's code sorts the other way round: it says no to the first and weak to the second.
    assert single_token(*latent([7] * 150, others)) == ("strong", 7)
    assert single_token(*latent(others, [7] * 150)) == ("no", None)


def test_totals_count_and_not_runs():
    # The token is interrupted every tenth time: runs of nine, and yet 90 of 100; more than 75% but not more than 90%.
    strong = [7 if i % 10 else 1000 + i for i in range(150)]
    assert single_token(*latent(strong, [3] * 150)) == ("weak", 7)


@pytest.mark.parametrize(
    ("same", "verdict"), [(50, "weak"), (46, "weak"), (45, "no")], ids=["all", "92%", "90% is not more than 90%"]
)
def test_fifty_strongest(same, verdict):
    # The rest of the stronger half is another token each, so the second part of the rule fails.
    strong = [7] * same + [1000 + i for i in range(150 - same)]
    assert single_token(*latent(strong, [3] * 150))[0] == verdict


def test_two_tokens_are_not_strong():
    strong = [7] * 50 + [8] * 950
    tokens, positions, values = latent(strong, [3] * 1000, num=2000)
    assert single_token(tokens, positions, values) == ("weak", 7)


def test_strength_is_the_absolute_value_and_few_are_not_judged():
    tokens, positions, values = latent([7] * 150, [3] * 150)
    assert single_token(tokens, positions, -values) == ("strong", 7)
    assert single_token(tokens[:49], positions[:49], values[:49]) == (None, None)
    assert single_token(tokens[:50], positions[:50], values[:50]) == ("strong", 7)


def test_missing_and_stale_statistics_are_told(tmp_path, fires, store):
    other = small_store(tmp_path / "store", fires, digest="sha256:other")
    assert not has_statistics(other, "sae")
    with pytest.raises(StoreError, match=r"does not exist; make it with `autointerp tables .* --coder sae --statistics`"):
        read_statistics(other, "sae")
    (other.path / statistics_file("sae")).write_bytes((store.path / statistics_file("sae")).read_bytes())
    assert has_statistics(store, "sae") and not has_statistics(other, "sae")
    with pytest.raises(IdentityError, match="computed for another coder or corpus"):
        read_statistics(other, "sae")
