"""Statistics of every latent beyond those of ``latents.parquet``: values, tokens and places it fires on; no LLM, no subject.

One row per latent in ``statistics.parquet``, from one sweep over the activations. Strength is the absolute value throughout.
The single-token test is the rule that delphi's cache statistics intend (its code looks at the weakest activations and at runs).
"""

# Shapes: N activations of one latent, T tokens of the vocabulary, C offsets in a context.

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from autointerp.digest import hash64, seed_of
from autointerp.errors import IdentityError, StoreError
from autointerp.store.parquet import damage_told, parquet_file, parquet_sink, read_table
from autointerp.store.reader import Store

NUM_BINS = 32
NUM_TOKENS = 20
NUM_STRONGEST = 50
"""Strongest activations of the single-token test, and the fewest it needs."""
NUM_DRAWN = 100
"""Activations drawn from the stronger half for it."""
SHARE_STRONGEST, SHARE_DRAWN = 0.9, 0.75
"""More than so much of each must fall on one token."""
_DRAW_SEED = seed_of("single-token test")
_ROWS = 1024

STATISTICS = pa.schema(
    [
        ("latent", pa.uint32()),
        ("histogram_low", pa.float32()),
        ("histogram_high", pa.float32()),
        ("histogram", pa.list_(pa.int64())),
        ("top_tokens", pa.list_(pa.uint32())),
        ("top_token_shares", pa.list_(pa.float32())),
        ("top_token_means", pa.list_(pa.float32())),
        ("top_token_rates", pa.list_(pa.float32())),
        ("num_tokens", pa.int64()),
        ("token_entropy", pa.float32()),
        ("position_information", pa.float32()),
        ("single_token", pa.string()),
        ("single_token_id", pa.uint32()),
    ]
)
"""``histogram``: counts of values in equal bins from low to high, the last bin closed. ``top_tokens``: the tokens it fires on
most often; ``shares`` of its activations, ``means`` of the values there, ``rates`` of firing on all the token's occurrences.
``num_tokens``: distinct tokens it fires on; ``token_entropy`` in bits, of the token given that it fires.
``position_information``: mutual information in bits between firing and offset in the context. ``single_token``: ``strong``,
``weak`` or ``no``, null under 50 activations. All null for a latent that never fires, but ``latent``."""

_CODER_ID = b"autointerp.coder_id"


def statistics_file(coder: str) -> str:
    """Return where the statistics of a coder lie in a store."""
    return f"coders/coder={coder}/statistics.parquet"


def write_statistics(store: Store, coder: str, *, advance: Callable[[int], None] | None = None) -> None:
    """Compute and commit the statistics of every latent; `advance` is called with the number of latents done."""
    reader = store.coder(coder)
    schema = STATISTICS.with_metadata({_CODER_ID: reader.coder_id.encode()})
    with parquet_sink(store.path / statistics_file(coder), schema, with_digest=False) as sink:
        rows: list[dict[str, Any]] = []
        for row in _rows(store, coder):
            rows.append(row)
            if len(rows) == _ROWS:
                sink.add(pa.Table.from_pylist(rows, schema=sink.schema))
                rows = []
            if advance is not None:
                advance(1)
        sink.add(pa.Table.from_pylist(rows, schema=sink.schema))


def has_statistics(store: Store, coder: str) -> bool:
    """Return whether the statistics are there and belong to the coder."""
    path = store.path / statistics_file(coder)
    if not path.exists():
        return False
    with damage_told(path), parquet_file(path, STATISTICS) as file:
        return (file.schema_arrow.metadata or {}).get(_CODER_ID) == store.coder(coder).coder_id.encode()


def read_statistics(store: Store, coder: str) -> pa.Table:
    """Return the statistics of a coder.

    Raises: StoreError when there are none, with the command that makes them; IdentityError when they are of another coder.
    """
    path = store.path / statistics_file(coder)
    if not path.exists():
        raise StoreError(f"{path} does not exist; make it with `autointerp tables {store.path} --coder {coder} --statistics`")
    if not has_statistics(store, coder):
        raise IdentityError(f"{path} was computed for another coder or corpus; remove it and compute it again")
    return read_table(path, schema=STATISTICS)


def _rows(store: Store, coder: str) -> Iterator[dict[str, Any]]:
    reader = store.coder(coder)
    tokens, ctx_len = store.tokens, store.ctx_len
    lengths = np.asarray(store.context_lengths)
    is_token = np.arange(ctx_len) < lengths[:, None]
    corpus = CorpusCounts(
        tokens=np.bincount(tokens.reshape(-1, ctx_len)[is_token], minlength=len(store.vocabulary)), offsets=is_token.sum(axis=0)
    )
    for latent, positions, values in reader.sweep(range(reader.width)):
        row: dict[str, Any] = {name: None for name in STATISTICS.names} | {"latent": latent}
        if len(positions):
            row |= describe(tokens[positions], positions, values, corpus=corpus, ctx_len=ctx_len)
        yield row


@dataclass(frozen=True, kw_only=True)
class CorpusCounts:
    """What a latent's counts are compared with."""

    tokens: np.ndarray
    """int64 [T], occurrences of each token."""
    offsets: np.ndarray
    """int64 [C], contexts that have a token at each offset."""


def describe(
    tokens: np.ndarray, positions: np.ndarray, values: np.ndarray, *, corpus: CorpusCounts, ctx_len: int
) -> dict[str, Any]:
    """Return the columns of one latent that fires, without its number; all arrays [N], in order of position."""
    low, high = float(values.min()), float(values.max())
    ids, back, counts = np.unique(tokens, return_inverse=True, return_counts=True)
    top = np.lexsort((ids, -counts))[:NUM_TOKENS]
    shares = counts / len(tokens)
    sums = np.bincount(back, weights=values, minlength=len(ids))
    verdict, token = single_token(tokens, positions, values)
    return {
        "histogram_low": low,
        "histogram_high": high,
        "histogram": histogram(values, low, high),
        "top_tokens": ids[top],
        "top_token_shares": shares[top],
        "top_token_means": sums[top] / counts[top],
        "top_token_rates": counts[top] / corpus.tokens[ids[top]],
        "num_tokens": len(ids),
        "token_entropy": float(-(shares * np.log2(shares)).sum()) + 0.0,
        "position_information": position_information(np.bincount(positions % ctx_len, minlength=ctx_len), corpus.offsets),
        "single_token": verdict,
        "single_token_id": token,
    }


def histogram(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return int64 [NUM_BINS]: how many values lie in each of equal bins from `low` to `high`, which hold them all."""
    if high == low:
        at = np.zeros(len(values), np.int64)
    else:
        at = np.minimum(((values.astype(np.float64) - low) / (high - low) * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    return np.bincount(at, minlength=NUM_BINS)


def position_information(fired: np.ndarray, there: np.ndarray) -> float:
    """Return I(offset; fires) in bits, from counts by offset (int64 [C] each).

    The plug-in estimate: where nothing depends on the offset it is about ``0.72 * (offsets - 1) / tokens`` bits.
    """
    total = there.sum()
    rate = fired.sum() / total
    information = 0.0
    for part, expected in ((fired, rate), (there - fired, 1 - rate)):
        some = part > 0
        information += float((part[some] / total * np.log2(part[some] / there[some] / expected)).sum())
    return max(0.0, information)


def single_token(
    tokens: np.ndarray, positions: np.ndarray, values: np.ndarray
) -> tuple[Literal["strong", "weak", "no"] | None, int | None]:
    """Return (verdict, token) of the single-token test; (None, None) under 50 activations.

    Weak when more than 90% of the 50 strongest activations fall on one token, or more than 75% of 100 drawn from the
    stronger half do; strong when both do on the same one. Totals, not runs.
    """
    if len(tokens) < NUM_STRONGEST:
        return None, None
    keys = hash64(_DRAW_SEED, positions)
    order = np.lexsort((keys, -np.abs(values)))
    half = order[: -(-len(order) // 2)]
    drawn = half[np.argsort(keys[half], kind="stable")[:NUM_DRAWN]]
    found = [
        token
        for some, share in ((order[:NUM_STRONGEST], SHARE_STRONGEST), (drawn, SHARE_DRAWN))
        if (token := _shared(tokens[some], share)) is not None
    ]
    if not found:
        return "no", None
    return ("strong" if len(found) == 2 and found[0] == found[1] else "weak"), found[0]


def _shared(tokens: np.ndarray, share: float) -> int | None:
    ids, counts = np.unique(tokens, return_counts=True)
    best = int(np.argmax(counts))
    return int(ids[best]) if counts[best] > share * len(tokens) else None
