"""The embeddings of a store's windows: one index per embedder and window grid, built once, searched exactly.

``embeddings/<name>/vectors.npy`` holds one float16 unit vector per window of the grid in its order; ``index.json``, written
last, says of what. Search is a product of matrices in blocks: nothing is approximate, and nothing has to be loaded as a whole.
"""

# Shapes: G windows of the grid, D width of the vectors, Q queries, K nearest.

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from autointerp.config import Config
from autointerp.digest import digest, digest_file, short
from autointerp.errors import IdentityError, StoreError
from autointerp.files import committed, read_sealed, write_sealed

HELD_BYTES = 512 << 20
"""Vectors are kept as float32 between searches up to this size; larger ones are converted block by block."""
_BLOCK = 1 << 15
_DECIMALS = 5


class IndexRecord(Config):
    """Of what an index is: the content of ``index.json``."""

    store_id: str
    """Digest of the store."""
    embedder: str
    """The embedder as it was asked for."""
    embedder_id: str
    """What it was."""
    window: int
    """Tokens of a full window."""
    min_window: int
    """Fewest tokens of the last window of a document."""
    num_windows: int
    """Windows of the grid."""
    dim: int
    """Width of a vector."""
    vectors_digest: str | None = None
    """Digest of ``vectors.npy``, which has no checksums of its own; None in indexes of earlier releases: not checked."""


def index_folder(embedder: str, *, window: int, min_window: int) -> str:
    """Return where an index lies in a store."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", embedder)[-60:].strip("-.")
    key = digest({"embedder": embedder, "window": window, "min_window": min_window})
    return f"embeddings/{name}-w{window}-{short(key)}"


def write_index(path: Path, record: IndexRecord, blocks: Iterable[np.ndarray]) -> None:
    """Commit an index from float [n, D] blocks in order of window.

    Raises: StoreError when there are more or fewer vectors than windows.
    """
    shape = (record.num_windows, record.dim)
    with committed(path / "vectors.npy") as temporary:
        # Written, not mapped: a full disk is an error of a write, and a deadly signal where memory is mapped.
        with temporary.open("wb") as file:
            header = {"descr": "<f2", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            filled = 0
            for block in blocks:
                filled += len(block)
                if filled > shape[0]:
                    raise StoreError(f"more vectors than the {shape[0]} windows were given for {path}")
                file.write(np.ascontiguousarray(block, "<f2").tobytes())
        if filled != shape[0]:
            raise StoreError(f"{filled} vectors were given for the {shape[0]} windows of {path}")
    record = record.model_copy(update={"vectors_digest": digest_file(path / "vectors.npy")})
    write_sealed(path / "index.json", record.model_dump(mode="json"))


class EmbeddingIndex:
    """Finds the windows that are most like others; safe to share between threads."""

    def __init__(self, path: Path, *, store_id: str) -> None:
        """Open an index.

        Raises: StoreError when it is missing or damaged; IdentityError when it is of another store.
        """
        self.path = path
        self.record = IndexRecord.parse(read_sealed(path / "index.json"), where=str(path / "index.json"))
        if self.record.store_id != store_id:
            raise IdentityError(f"{path} is the index of another store; remove it and make it again")
        self._check_digest()
        try:
            self._vectors = np.load(path / "vectors.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise StoreError(f"{path / 'vectors.npy'} cannot be read ({error}); remove the folder and make it again") from error
        if self._vectors.shape != (self.record.num_windows, self.record.dim):
            raise StoreError(
                f"{path / 'vectors.npy'} has the shape {self._vectors.shape} and index.json says "
                f"{(self.record.num_windows, self.record.dim)}; remove the folder and make it again"
            )
        self._lock = threading.Lock()
        self._held: np.ndarray | None = None

    def _check_digest(self) -> None:
        file, wanted = self.path / "vectors.npy", self.record.vectors_digest
        if wanted is not None and file.is_file() and digest_file(file) != wanted:
            raise StoreError(f"{file} is not as it was written: its digest differs; remove the folder and make it again")

    def __len__(self) -> int:
        return len(self._vectors)

    def nearest(self, rows: np.ndarray, count: int) -> np.ndarray:
        """Return int64 [Q, min(count, G)]: for each row of the grid the rows most like it (itself among them), nearest first.

        Cosines are rounded to five decimals and equal ones ordered by row, so that the last bits of a product decide nothing.
        """
        queries_QD = np.asarray(self._vectors[rows], np.float32)
        count = min(count, len(self))
        best = [(np.zeros(0, np.float32), np.zeros(0, np.int64)) for _ in rows]
        for low in range(0, len(self), _BLOCK):
            cosine = queries_QD @ self._block(low).T
            for query, values in enumerate(cosine):
                if len(values) > count:
                    at = np.argpartition(-values, count - 1)[:count]
                    values = values[at]
                else:
                    at = np.arange(len(values))
                kept, where = best[query]
                kept, where = np.concatenate([kept, values]), np.concatenate([where, low + at])
                if len(kept) > count:
                    at = np.argpartition(-kept, count - 1)[:count]
                    kept, where = kept[at], where[at]
                best[query] = kept, where
        ordered = [where[np.lexsort((where, -np.round(kept, _DECIMALS)))] for kept, where in best]
        return np.stack(ordered) if ordered else np.zeros((0, count), np.int64)

    def vectors(self, low: int, high: int) -> np.ndarray:
        """Return float32 [high - low, D], the vectors of windows low..high-1 of the grid."""
        return np.asarray(self._vectors[low:high], np.float32)

    def _block(self, low: int) -> np.ndarray:
        if 4 * self._vectors.size > HELD_BYTES:
            return self.vectors(low, low + _BLOCK)
        with self._lock:
            if self._held is None:
                self._held = np.asarray(self._vectors, np.float32)
        return self._held[low : low + _BLOCK]
