"""One row per latent: where its activations lie, and statistics of them.

Quantiles are order statistics (the value at index ``floor(q * (count - 1))`` of the sorted values), so they do not depend on
how the values were cut into blocks. ``minhash`` is a one-permutation hash (Li, Owen, Zhang 2012): each active position falls
into one of 16 bins by its hash and a bin keeps its smallest hash, the largest uint32 where it is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from autointerp.digest import hash64

QUANTILES = {"q10": 0.1, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q90": 0.9, "q99": 0.99}
NUM_HASHES = 16
EMPTY_HASH = 0xFFFFFFFF
_HASH_SEED = 0x6175746F
_FLOATS = ("max", "min", "mean", *QUANTILES)

LATENTS = pa.schema(
    [
        ("latent", pa.uint32()),
        ("part", pa.int32()),
        ("row_group", pa.int32()),
        ("num_row_groups", pa.int32()),
        ("row_offset", pa.int64()),
        ("count", pa.int64()),
        ("num_contexts", pa.int64()),
        ("density", pa.float64()),
        *((name, pa.float32()) for name in _FLOATS),
        ("minhash", pa.list_(pa.uint32(), NUM_HASHES)),
    ]
)
"""``part``, ``row_group`` (the first) and ``row_offset`` (in the part) say where a latent's activations begin; -1, -1 and 0 for
a latent that never fires, whose statistics are null. ``density`` is the share of corpus tokens it fires on."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Statistics of a block of latents; arrays of one entry per latent."""

    count: np.ndarray
    num_contexts: np.ndarray
    floats: dict[str, np.ndarray]
    """float32, by column; NaN where a latent never fires."""
    minhash: np.ndarray
    """uint32 [latents, NUM_HASHES]."""


def minhash_similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return estimates in 0..1 of the Jaccard similarity of active positions; ``[..., NUM_HASHES]`` each, broadcast.

    Exactly 1 for equal sets; 0 where both never fire.
    """
    used = (a != EMPTY_HASH) | (b != EMPTY_HASH)
    equal = (a == b) & used
    return np.asarray(equal.sum(axis=-1) / np.maximum(used.sum(axis=-1), 1))


def summarise(latents: np.ndarray, positions: np.ndarray, values: np.ndarray, *, num_latents: int, ctx_len: int) -> Summary:
    """Return the statistics of activations sorted by (latent, position); `latents` count from 0 within the block."""
    ends = np.searchsorted(latents, np.arange(num_latents + 1))
    count, starts = np.diff(ends), ends[:-1]
    fires = count > 0
    contexts = positions // ctx_len
    is_new = np.ones(len(latents), bool)
    np.not_equal(contexts[1:], contexts[:-1], out=is_new[1:])
    is_new[starts[fires]] = True
    num_contexts = np.zeros(num_latents, np.int64)
    ordered = _ordered_within(latents, values)
    floats = {name: np.full(num_latents, np.nan, np.float32) for name in _FLOATS}
    if fires.any():
        num_contexts[fires] = np.add.reduceat(is_new, starts[fires], dtype=np.int64)
    with np.errstate(invalid="ignore"):
        floats["mean"] = (np.bincount(latents, weights=values, minlength=num_latents) / count).astype(np.float32)
    for name, q in {"min": 0.0, **QUANTILES, "max": 1.0}.items():
        at = starts[fires] + _rank(q, count[fires])
        floats[name][fires] = ordered[at]
    return Summary(
        count=count,
        num_contexts=num_contexts,
        floats=floats,
        minhash=_minhash(latents, positions, num_latents),
    )


def summarise_stream(
    blocks: Iterable[tuple[np.ndarray, np.ndarray]],
    again: Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]],
    *,
    ctx_len: int,
) -> Summary:
    """Return the statistics of one latent whose (positions, values) do not fit in memory.

    `again` gives the blocks once more, for ranks; asked for only where the values are no float16. Equal to :func:`summarise`
    but for the last bit of the mean.
    """
    high, is_half = np.zeros(1 << 16, np.int64), True
    total, num_contexts, last_context = 0.0, 0, -1
    minhash = np.full((1, NUM_HASHES), EMPTY_HASH, np.uint32)
    for positions, values in blocks:
        is_half = values.dtype == np.float16
        tops = _half_to_ordered(values) if is_half else _to_ordered(values) >> np.uint64(16)
        high += np.bincount(tops.astype(np.int64), minlength=1 << 16)
        total += float(values.sum(dtype=np.float64))
        contexts = positions // ctx_len
        num_contexts += int((np.diff(contexts, prepend=last_context) != 0).sum())
        last_context = int(contexts[-1])
        minhash = np.minimum(minhash, _minhash(np.zeros(len(positions), np.uint32), positions, 1))
    count = int(high.sum())
    cumulated = np.cumsum(high)
    ranks = {name: int(_rank(q, np.array(count))) for name, q in {"min": 0.0, **QUANTILES, "max": 1.0}.items()}
    buckets = {name: int(np.searchsorted(cumulated, rank, side="right")) for name, rank in ranks.items()}
    floats = {"mean": np.array([total / count], np.float32)}
    if is_half:
        floats |= {name: _half_from_ordered(np.array([buckets[name]], np.uint16)).astype(np.float32) for name in ranks}
    else:
        floats |= _within_buckets(again(), ranks, buckets, before=cumulated - high)
    return Summary(count=np.array([count]), num_contexts=np.array([num_contexts]), floats=floats, minhash=minhash)


def _within_buckets(
    blocks: Iterable[tuple[np.ndarray, np.ndarray]], ranks: dict[str, int], buckets: dict[str, int], *, before: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the value of each rank, whose upper half of bits is known; `before`: how many values lie below each such half."""
    low = {bucket: np.zeros(1 << 16, np.int64) for bucket in buckets.values()}
    for _, values in blocks:
        ordered = _to_ordered(values).astype(np.int64)
        top = ordered >> 16
        for bucket, histogram in low.items():
            histogram += np.bincount(ordered[top == bucket] & 0xFFFF, minlength=1 << 16)
    found = {}
    for name, rank in ranks.items():
        bucket = buckets[name]
        rest = int(np.searchsorted(np.cumsum(low[bucket]), rank - int(before[bucket]), side="right"))
        found[name] = _from_ordered(np.array([bucket << 16 | rest], np.uint64))
    return found


def latents_table(summaries: list[Summary], *, first_latent: int, part: int, num_tokens: int, row_group_rows: int) -> pa.Table:
    """Return the rows of a part's latents, whose activations follow each other from the part's first row."""
    count = np.concatenate([block.count for block in summaries])
    offset = np.cumsum(count) - count
    fires = count > 0
    group = offset // row_group_rows
    last_group = np.maximum(offset + count - 1, 0) // row_group_rows
    columns: dict[str, Any] = {
        "latent": np.arange(first_latent, first_latent + len(count)),
        "part": np.where(fires, part, -1),
        "row_group": np.where(fires, group, -1),
        "num_row_groups": np.where(fires, last_group - group + 1, 0),
        "row_offset": np.where(fires, offset, 0),
        "count": count,
        "num_contexts": np.concatenate([block.num_contexts for block in summaries]),
        "density": count / num_tokens,
    }
    arrays = [pa.array(values.astype(LATENTS.field(name).type.to_pandas_dtype())) for name, values in columns.items()]
    arrays += [pa.array(np.concatenate([block.floats[name] for block in summaries]), mask=~fires) for name in _FLOATS]
    minhash = np.concatenate([block.minhash for block in summaries])
    arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(minhash.reshape(-1)), NUM_HASHES))
    return pa.Table.from_arrays(arrays, schema=LATENTS)


def _rank(q: float, count: np.ndarray) -> np.ndarray:
    return np.floor(q * (count - 1)).astype(np.int64)


def _minhash(latents: np.ndarray, positions: np.ndarray, num_latents: int) -> np.ndarray:
    hashes = hash64(_HASH_SEED, positions)
    bins = latents.astype(np.int64) * NUM_HASHES
    bins += (hashes >> np.uint64(60)).view(np.int64)
    smallest = np.full(num_latents * NUM_HASHES, EMPTY_HASH, np.uint32)
    np.minimum.at(smallest, bins, hashes.astype(np.uint32))
    return smallest.reshape(num_latents, NUM_HASHES)


def _ordered_within(latents: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the values in ascending order within each latent; `latents` ascend."""
    if values.dtype == np.float16 and len(latents) and latents[-1] < 1 << 16:
        # Half the bytes to sort.
        keys = np.left_shift(latents.astype(np.uint32), 16)
        keys |= _half_to_ordered(values)
        keys.sort()
        return _half_from_ordered(keys.astype(np.uint16))
    return _from_ordered(np.sort(latents.astype(np.uint64) << np.uint64(32) | _to_ordered(values)))


def _half_to_ordered(values: np.ndarray) -> np.ndarray:
    """Map float16 to uint16 of the same order: the bits of a float are ordered as it is once those of negatives are flipped."""
    bits = values.view(np.uint16)
    flips = (bits.view(np.int16) >> 15).view(np.uint16) | np.uint16(1 << 15)
    return np.asarray(bits ^ flips)


def _half_from_ordered(ordered: np.ndarray) -> np.ndarray:
    flips = (~ordered.view(np.int16) >> 15).view(np.uint16) | np.uint16(1 << 15)
    return np.asarray((ordered ^ flips).view(np.float16))


def _to_ordered(values: np.ndarray) -> np.ndarray:
    """Map float32 to integers (in uint64) of the same order."""
    bits = values.astype(np.float32).view(np.uint32)
    flipped = np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(0x80000000))
    return np.asarray(flipped.astype(np.uint64))


def _from_ordered(ordered: np.ndarray) -> np.ndarray:
    low = (ordered & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    bits = np.where(low >> np.uint32(31), low & np.uint32(0x7FFFFFFF), ~low)
    return np.asarray(bits.astype(np.uint32).view(np.float32))
