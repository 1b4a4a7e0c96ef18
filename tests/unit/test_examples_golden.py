"""Which windows every way of choosing gives, held to digests taken before the code was made faster."""

from __future__ import annotations

import hashlib
from dataclasses import fields

import numpy as np
import pytest
from examples_corpus import MemoryStore

from autointerp.examples.negatives import NEGATIVES
from autointerp.examples.selection import SelectionConfig, Selector
from autointerp.records import Examples, LatentExamples

KINDS = tuple(NEGATIVES)
RATES = (0.0002, 0.001, 0.004, 0.02, 0.1, 0.6)


class Ring:
    """Neighbours and embeddings that follow from numbers alone."""

    def __init__(self, num: int) -> None:
        self._num = num

    def __len__(self) -> int:
        return self._num

    def of(self, latent):
        others = np.array([(latent + step) % self._num for step in range(1, self._num)], np.int64)
        return others, np.zeros(len(others), np.float32)

    def nearest(self, rows, count):
        return (np.asarray(rows)[:, None] + np.arange(min(count, self._num))) % self._num


def made(*, num_documents: int, size: int, copies: float, vocabulary: int = 500) -> MemoryStore:
    """Documents of which some repeat an earlier one; latents from the rare to the dense, with ties among their values."""
    rng = np.random.default_rng(3)
    documents: list[list[int]] = []
    for _ in range(num_documents):
        if documents and rng.random() < copies:
            documents.append(documents[rng.integers(len(documents))])
        else:
            documents.append((vocabulary * rng.random(rng.integers(1, 2 * size)) ** 3).astype(int).tolist())
    store = MemoryStore(documents, ctx_len=128)
    latents = []
    for rate in RATES:
        at = np.flatnonzero(rng.random(store.num_tokens) < rate)
        values = np.round(rng.gamma(2.0, 1.0, len(at)) + 0.05, 1) * rng.choice([1, -1], len(at), p=[0.9, 0.1])
        latents.append({int(p): float(v) for p, v in zip(at, values, strict=True)})
    # One that repeats few texts, and one of a single document.
    latents += [{p: 1.0 for p in range(0, 40 * 128, 128)}, {p: float(p) for p in range(1, len(documents[0]))}]
    store.add("sae", latents)
    store.coder("sae").neighbours = lambda kind: Ring(len(latents))
    return store


@pytest.fixture(scope="module")
def small() -> MemoryStore:
    return made(num_documents=250, size=150, copies=0.15)


@pytest.fixture(scope="module")
def large() -> MemoryStore:
    """More windows than are probed before they are listed: more than 16,384, none of which shorter than 8 tokens."""
    return made(num_documents=1500, size=100, copies=0.02, vocabulary=5000)


BLOCKS = ("explain", "explain_statistics", "explain_negatives", "positives", "negatives")


def told(found: LatentExamples, names: tuple[str, ...] = BLOCKS) -> bytes:
    state = hashlib.sha256(f"{found.status} {found.disjoint} {found.density!r} {found.max_activation!r}".encode())
    for name in names:
        block = getattr(found, name)
        for values in (getattr(block, field.name) for field in fields(Examples)):
            if isinstance(values, tuple):
                state.update("|".join(values).encode())
            else:
                state.update(f"{values.dtype.str}{values.shape}".encode() + values.tobytes())
    return state.digest()


def golden(store: MemoryStore, settings: dict[str, object]) -> str:
    selector = Selector(store, SelectionConfig(**settings))
    ring = Ring(len(selector.grid))
    store.embeddings = lambda embedder, *, window, min_window: ring
    found = [selector.select("sae", latent) for latent in range(len(RATES) + 2)]
    assert "ok" in {one.status for one in found}
    return hashlib.sha256(b"".join(map(told, found))).hexdigest()[:16]


CASES = [
    ({}, "c6b734413883880f", "fa9769ba3190f104"),
    ({"window": 8}, "1416f4ebe3c08d5c", "eb21a2e8356d7009"),
    ({"window": 8, "negatives": KINDS}, "b889faa1927beb2b", "01f082de087e1153"),
    ({"window": 16, "centred": True, "negatives": tuple(reversed(KINDS))}, "d64fe0730c5d2855", "f8630e1fae175e9d"),
    (
        {"window": 8, "min_window": 1, "explain_sampling": "top", "negatives": ("same_token", "random"), "seed": 5},
        "d5bcd954647701f7",
        "a13f83ac789dd079",
    ),
    (
        {"window": 12, "explain_sampling": "random", "active_above": 0.5, "negatives": ("embedding", "random")},
        "4bc7ce8eb00906bb",
        "5eb78df2332bfba5",
    ),
    (
        {"window": 8, "explain_sampling": "mix", "quantiles": 3, "num_positives": 7, "num_negatives": 4},
        "1fe1c00b790edd5b",
        "159093c61a8dac0f",
    ),
    (
        {"window": 8, "centred": True, "explain_sampling": "importance", "active_above": 0.3, "num_statistics": 0},
        "35b84333ef6cf058",
        "2ab2530b2dbb6881",
    ),
    (
        {"window": 21, "centred": "middle", "num_explain": 15, "explain_sampling": "top_importance", "ratio_top": 0.667},
        "78a68bc94b3b5af0",
        "d0bc0181f6b43a02",
    ),
    (
        {"window": 8, "num_explain_negatives": 700, "num_negatives": 3000, "num_statistics": 3000, "min_documents": 400},
        "3b004f852b88cdf8",
        "3b74dfacb6fcf738",
    ),
]


@pytest.mark.parametrize(("settings", "of_small", "of_large"), CASES)
def test_choices_are_what_they_were(small, large, settings, of_small, of_large):
    assert (golden(small, settings), golden(large, settings)) == (of_small, of_large)


@pytest.mark.parametrize(
    ("num", "centred", "of_small", "of_large"),
    [
        (9, False, "d270f9180d8e6c24", "b5ac0e2ba4317c40"),
        (30, True, "186370fb604d555d", "0eeab38901a04935"),
        (400, False, "8fd81c2521658692", "377c781f196a1b6e"),
    ],
)
def test_windows_of_the_validate_pool_are_what_they_were(small, large, num, centred, of_small, of_large):
    assert (validated(small, num, centred), validated(large, num, centred)) == (of_small, of_large)


def validated(store: MemoryStore, num: int, centred: bool) -> str:
    selector = Selector(store, SelectionConfig(window=8, centred=centred))
    found = [selector.select("sae", latent, num_validate=num) for latent in range(len(RATES) + 2)]
    names = ("validate_positives", "validate_negatives")
    return hashlib.sha256(b"".join(told(one, names) for one in found)).hexdigest()[:16]
