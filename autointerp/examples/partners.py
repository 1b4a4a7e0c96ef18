"""Partners for the shuffled control: each latent is scored on the explanation of another that fires about as often.

A derangement inside bins of firing rate over all live latents of a coder, so that it depends on the store, the coder and the
seed and on nothing that is planned or chosen. Near-duplicates (similar active positions, by minhash) are never partners:
their explanations fit each other.
"""

from __future__ import annotations

import numpy as np

from autointerp.digest import hash64, seed_of
from autointerp.errors import InputError, nearest
from autointerp.examples.windows import Corpus

MIN_COUNT = 20
"""Latents with fewer activations take no part: they have no explanation."""

_EMPTY = np.uint32(0xFFFFFFFF)
"""What the store writes where a latent has no position."""

_CHUNK = 256
_MAX_TRIES = 16 * _CHUNK


def shuffled_partners(
    store: Corpus, coder: str, seed: int = 0, *, min_count: int = MIN_COUNT, max_similarity: float = 0.3
) -> np.ndarray:
    """Return int64 [width]: the partner of each latent, -1 where it has none.

    No latent is its own partner nor the partner of two. Bins are powers of two of the activation count; a bin of one joins
    the nearest other (of two as near, the lower). A latent has none when it is rare, or when what is left in its bin are
    near-duplicates.

    Raises: InputError when the store has no such coder.
    """
    if coder not in store.coder_names:
        raise InputError(f"the store has no coder {coder!r}; {nearest(coder, store.coder_names)}")
    latents = store.coder(coder).latents
    count = np.asarray(latents["count"], np.int64)
    minhash = np.asarray(latents["minhash"], np.uint32)
    partner = np.full(len(count), -1, np.int64)
    live = np.flatnonzero(count >= max(1, min_count))
    keys = hash64(seed_of("partners", seed, coder), live)
    for members in rate_bins(count[live]):
        order = live[members[np.argsort(keys[members], kind="stable")]]
        partner[order] = _paired(order, minhash, max_similarity)
    return partner


def rate_bins(count: np.ndarray) -> list[np.ndarray]:
    """Return rows grouped by floor(log2(count)), from rare to frequent, no group of one unless it is the only row."""
    if len(count) == 0:
        return []
    power = np.frexp(count.astype(np.float64))[1]
    order = np.argsort(power, kind="stable")
    bins = np.split(order, np.flatnonzero(np.diff(power[order])) + 1)
    while len(bins) > 1 and (alone := [i for i, rows in enumerate(bins) if len(rows) == 1]):
        i = alone[0]
        below = power[bins[i][0]] - power[bins[i - 1]].max() if i else np.inf
        above = power[bins[i + 1]].min() - power[bins[i][0]] if i + 1 < len(bins) else np.inf
        low = i - 1 if below <= above else i
        bins[low : low + 2] = [np.concatenate(bins[low : low + 2])]
    return bins


def similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the estimated Jaccard similarity of pairs of minhash rows ([..., K] each): the share of equal entries.

    An entry that is empty in both says nothing: rare latents leave many empty, which would make strangers look alike.
    """
    used = (first != _EMPTY) | (second != _EMPTY)
    return np.asarray(((first == second) & used).sum(axis=-1) / np.maximum(used.sum(axis=-1), 1))


def _paired(order: np.ndarray, minhash: np.ndarray, max_similarity: float) -> np.ndarray:
    """Return the partner of each of `order`: the next one in the ring, repaired where that is a near-duplicate."""
    num = len(order)
    if num < 2:
        return np.full(num, -1, np.int64)
    partner = np.roll(order, -1)

    def is_bad(latents: np.ndarray, partners: np.ndarray) -> np.ndarray:
        return np.asarray((latents == partners) | (similarity(minhash[latents], minhash[partners]) > max_similarity))

    for i in np.flatnonzero(is_bad(order, partner)):
        if not is_bad(order[i : i + 1], partner[i : i + 1])[0]:
            continue  # an earlier repair gave this one a new partner
        for low in range(1, min(num, _MAX_TRIES), _CHUNK):
            others = (i + np.arange(low, min(low + _CHUNK, num))) % num
            # A swap must leave both rows good.
            fits = ~is_bad(order[i : i + 1], partner[others]) & ~is_bad(order[others], partner[i : i + 1])
            if fits.any():
                j = others[np.argmax(fits)]
                partner[i], partner[j] = partner[j], partner[i]
                break
    return np.where(is_bad(order, partner), -1, partner)
