"""Tables of nearest neighbours beside ``latents.parquet``, one row per latent: by co-firing, decoder or encoder cosine.

Owns the form: ranking within a block of rows, the file, and reading the list of one latent. What is similar is computed in
`cooccurrence` and `cosine`. A file names the coder's digest, so that one of another coder or corpus is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa

from autointerp.errors import IdentityError, StoreError
from autointerp.records import NeighbourKind
from autointerp.store.parquet import damage_told, parquet_file, parquet_sink

KINDS: tuple[NeighbourKind, ...] = get_args(NeighbourKind)

DEFAULT_K = 250
"""Neighbours kept of each latent."""
ROW_GROUP_LATENTS = 512
"""Latents in a row group: what one look-up decodes."""

NEIGHBOURS = pa.schema(
    [
        ("latent", pa.uint32()),
        ("neighbours", pa.list_(pa.uint32())),
        ("similarities", pa.list_(pa.float32())),
        ("counts", pa.list_(pa.int64())),
    ]
)
"""One row per latent, nearest first; ``counts`` are positions on which both fire, null for cosines."""

_CODER_ID = b"autointerp.coder_id"
_K = b"autointerp.k"
_ENCODING = {
    "neighbours.list.element": "DELTA_BINARY_PACKED",
    "similarities.list.element": "BYTE_STREAM_SPLIT",
    "counts.list.element": "DELTA_BINARY_PACKED",
}
_SIGN = np.uint32(0x80000000)


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """Neighbours of consecutive latents, nearest first."""

    first: int
    """The first latent."""
    sizes: np.ndarray
    """int64 [latents], neighbours of each; the arrays below hold them one after the other."""
    neighbours: np.ndarray
    """uint32."""
    similarities: np.ndarray
    """float32."""
    counts: np.ndarray | None
    """int64, or None."""


def ranked(
    first: int,
    starts: np.ndarray,
    columns: np.ndarray,
    similarities: np.ndarray,
    *,
    k: int,
    counts: np.ndarray | None = None,
) -> Ranked:
    """Return the `k` most similar of each row but itself.

    Row r, which is latent ``first + r``, holds ``starts[r]`` to ``starts[r + 1]`` of the flat arrays. `similarities` are
    float32, -inf for what is no candidate. Equal ones are ordered by latent, so the result depends on nothing else; and a
    latent is left out of its own list by its index, since others may be as similar to it.
    """
    sizes = np.diff(starts)
    wanted = k + 1  # the latent itself may be among them
    least = np.full(len(sizes), -np.inf, np.float32)
    for row in np.flatnonzero(sizes > wanted).tolist():
        some = similarities[starts[row] : starts[row + 1]]
        least[row] = np.partition(some, len(some) - wanted)[len(some) - wanted]
    # All that tie with the last one wanted stay until they are put in order.
    kept = np.flatnonzero(similarities >= np.repeat(least, sizes))
    ends = np.searchsorted(kept, starts)
    # Nearest first, then lowest index, as one integer: the bits of a float are ordered as it is once negatives are flipped.
    bits = similarities[kept].view(np.uint32)
    descending = np.where(bits & _SIGN, bits, ~(bits | _SIGN))
    keys = (descending.astype(np.uint64) << np.uint64(32)) | columns[kept].astype(np.uint64)
    pairs = list(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True))
    flat = kept[np.concatenate([low + np.argsort(keys[low:high])[:wanted] for low, high in pairs])]
    row_of = np.repeat(np.arange(len(sizes)), np.minimum(np.diff(ends), wanted))
    is_other = (columns[flat] != first + row_of) & (similarities[flat] > -np.inf)
    flat, row_of = flat[is_other], row_of[is_other]
    within = np.arange(len(row_of)) - np.searchsorted(row_of, row_of)
    flat, row_of = flat[within < k], row_of[within < k]
    return Ranked(
        first=first,
        sizes=np.bincount(row_of, minlength=len(sizes)),
        neighbours=columns[flat].astype(np.uint32),
        similarities=similarities[flat],
        counts=None if counts is None else counts[flat].astype(np.int64),
    )


def joined(blocks: Sequence[Ranked]) -> Ranked:
    """Return consecutive blocks as one; all of them have counts, or none."""

    def all_of(columns: Iterable[np.ndarray]) -> np.ndarray:
        return np.concatenate(list(columns))

    return Ranked(
        first=blocks[0].first,
        sizes=all_of(block.sizes for block in blocks),
        neighbours=all_of(block.neighbours for block in blocks),
        similarities=all_of(block.similarities for block in blocks),
        counts=None if blocks[0].counts is None else all_of(block.counts for block in blocks if block.counts is not None),
    )


def neighbours_file(coder: str, kind: NeighbourKind) -> str:
    """Return where a table of neighbours lies in a store."""
    return f"coders/coder={coder}/neighbours-{kind}.parquet"


def write_neighbours(
    path: Path, blocks: Iterable[Ranked], *, coder_id: str, k: int, advance: Callable[[int], None] | None = None
) -> None:
    """Commit a table from blocks in order of latent; `advance` is called with the number of latents of each block."""
    schema = NEIGHBOURS.with_metadata({_CODER_ID: coder_id.encode(), _K: str(k).encode()})
    with parquet_sink(path, schema, encoding=_ENCODING, with_digest=False) as sink:
        for block in blocks:
            table = _table(block).replace_schema_metadata(sink.schema.metadata)
            for start in range(0, table.num_rows, ROW_GROUP_LATENTS):
                sink.add(table.slice(start, ROW_GROUP_LATENTS))
            if advance is not None:
                advance(len(block.sizes))


def _table(block: Ranked) -> pa.Table:
    offsets = pa.array(np.concatenate([[0], np.cumsum(block.sizes)]).astype(np.int32))
    num = len(block.sizes)
    lists = [pa.ListArray.from_arrays(offsets, pa.array(values)) for values in (block.neighbours, block.similarities)]
    counts = (
        pa.nulls(num, pa.list_(pa.int64()))
        if block.counts is None
        else pa.ListArray.from_arrays(offsets, pa.array(block.counts))
    )
    latents = pa.array(np.arange(block.first, block.first + num, dtype=np.uint32))
    return pa.Table.from_arrays([latents, *lists, counts], schema=NEIGHBOURS)


class NeighbourTable:
    """Looks up the neighbours of one latent at a time; safe to share between threads."""

    def __init__(self, path: Path, *, coder_id: str, width: int) -> None:
        """Open a table.

        Raises: StoreError when it is missing or damaged; IdentityError when it was computed for another coder or corpus.
        """
        self.path = path
        self._lock = threading.Lock()
        self._held: tuple[int, Any] = (-1, None)
        with damage_told(path):
            self._file = parquet_file(path, NEIGHBOURS)
            metadata = self._file.schema_arrow.metadata or {}
            groups = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        if metadata.get(_CODER_ID) != coder_id.encode():
            raise IdentityError(f"{path} was computed for another coder or corpus; remove it and it is computed again")
        if not metadata.get(_K, b"").isdigit():
            raise StoreError(f"{path} does not say how many neighbours it holds; remove it and it is computed again")
        self.k = int(metadata[_K])
        """Most neighbours of a latent."""
        self._ends = np.cumsum(groups)
        if sum(groups) != width:
            raise StoreError(f"{path} has {sum(groups)} latents and the coder {width}; remove it and it is computed again")

    def of(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (latents int64, similarities float32) of the neighbours, nearest first."""
        group = int(np.searchsorted(self._ends, latent, side="right"))
        first = int(self._ends[group - 1]) if group else 0
        with self._lock:
            if self._held[0] != group:
                with damage_told(self.path):
                    table = self._file.read_row_group(group, columns=["neighbours", "similarities"], use_threads=False)
                self._held = group, table
            table = self._held[1]
        row = table.slice(latent - first, 1)
        neighbours, similarities = (row[name].combine_chunks().flatten().to_numpy() for name in table.column_names)
        return neighbours.astype(np.int64), similarities
