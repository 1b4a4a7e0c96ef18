"""The embeddings of a store's windows: one index per embedder and window grid, built once, searched exactly.

``embeddings/<name>/vectors.npy`` holds one float16 unit vector per window of the grid in its order; ``index.json``, written
last, says of what. Until then each block of vectors is a file of its own, so that a killed process loses one block at most.
Search is a product of matrices in blocks: nothing is approximate, and nothing has to be loaded as a whole.
"""

# Shapes: G windows of the grid, D width of the vectors, Q queries.

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from autointerp.config import Config
from autointerp.digest import digest, digest_bytes, digest_file, short
from autointerp.errors import IdentityError, StoreError
from autointerp.files import clear_temporary, committed, read_sealed, write_sealed
from autointerp.store.arrays import mapped, write_blocks
from autointerp.store.lock import WriterLock

HELD_BYTES = 512 << 20
"""Vectors are kept as float32 between searches up to this size; larger ones are converted block by block."""
WINDOWS_PER_BLOCK = 1024
"""Windows embedded and committed at once: with all-MiniLM-L6-v2 some ten seconds of a processor core."""
_DTYPE = "<f2"
_BUILDING = "building"
_LOCK = "lock"
_BLOCK = 1 << 13
_DECIMALS = 5
_MAX_ENTRIES = 1 << 22
"""Numbers converted at a time when candidates are put in order."""


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
    with committed(path / "vectors.npy") as temporary:
        with temporary.open("wb") as file:
            filled = write_blocks(file, blocks, dtype=_DTYPE, shape=(record.num_windows, record.dim))
        if filled != record.num_windows:
            raise StoreError(f"{filled} vectors were given for the {record.num_windows} windows of {path}")
    record = record.model_copy(update={"vectors_digest": digest_file(path / "vectors.npy")})
    write_sealed(path / "index.json", record.model_dump(mode="json"))


def build_index(
    path: Path, record: IndexRecord, embed: Callable[[int, int], np.ndarray], *, advance: Callable[[int, bool], None]
) -> bool:
    """Commit an index block by block, from where a killed process left off; return False where it is there already.

    `embed` returns float [high - low, D], the vectors of windows low..high-1; `advance` is called with the windows of each
    block and whether they were embedded now.

    Raises: StoreError when another process builds it, or when vectors are not finite or of another shape.
    """
    # Alone: two processes would embed everything twice.
    lock = WriterLock(path / _LOCK, store=path)
    try:
        if (path / "index.json").exists():
            return False
        key = digest({"record": record.model_dump(mode="json"), "windows": WINDOWS_PER_BLOCK})
        folder = path / f"{_BUILDING}-{short(key)}"
        for other in path.glob(f"{_BUILDING}-*"):
            if other != folder:
                shutil.rmtree(other)
        for half_written in (path, folder):
            clear_temporary(half_written)
        blocks = {int(file.name.partition("-")[0]): file for file in folder.glob("[0-9]*.f16")}
        starts = range(0, record.num_windows, WINDOWS_PER_BLOCK)
        for low in starts:
            high = min(low + WINDOWS_PER_BLOCK, record.num_windows)
            if is_new := low not in blocks or not _is_whole(blocks[low]):
                blocks[low] = _write_block(folder, low, embed(low, high), shape=(high - low, record.dim))
            advance(high - low, is_new)
        write_index(path, record, (np.fromfile(blocks[low], _DTYPE).reshape(-1, record.dim) for low in starts))
        return True
    finally:
        if (path / "index.json").exists():
            for leftover in path.glob(f"{_BUILDING}-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            (path / _LOCK).unlink(missing_ok=True)
        lock.release()


def is_unfinished(path: Path) -> bool:
    """Return whether an index was begun here and is not done."""
    return not (path / "index.json").exists() and any(path.glob(f"{_BUILDING}-*"))


def _write_block(folder: Path, low: int, vectors: np.ndarray, *, shape: tuple[int, int]) -> Path:
    if vectors.shape != shape or not np.isfinite(vectors).all():
        raise StoreError(
            f"the embedder gave vectors of the shape {vectors.shape} for the windows from {low} on, or some that are not "
            f"finite; expected finite ones of the shape {shape}"
        )
    data = np.ascontiguousarray(vectors, _DTYPE).tobytes()
    # Its digest is in its name, so that what is damaged before the index is done is embedded again.
    path = folder / f"{low:012d}-{digest_bytes(data).removeprefix('sha256:')}.f16"
    with committed(path) as temporary:
        temporary.write_bytes(data)
    return path


def _is_whole(block: Path) -> bool:
    return digest_file(block).removeprefix("sha256:") == block.stem.partition("-")[2]


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
            self._vectors = mapped(path / "vectors.npy", dtype=_DTYPE, shape=(self.record.num_windows, self.record.dim))
        except (OSError, ValueError) as error:
            raise StoreError(f"{path / 'vectors.npy'} cannot be read ({error}); remove the folder and make it again") from error
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

        Cosines are rounded to five decimals and equal ones ordered by row. The result is exact: whatever is asked for at once,
        each row's answer is the same. Many rows at once take a fraction of the time of one after the other.
        """
        rows, count = np.asarray(rows, np.int64), min(count, len(self))
        if not len(rows) or not count:
            return np.zeros((len(rows), count), np.int64)
        # What a product of float32 may be off by, on both sides of the cut, and what rounding may add.
        slack = np.float32(2 * self.record.dim * np.finfo(np.float32).eps + 10**-_DECIMALS)
        near = [_Near(count, slack) for _ in rows]
        queries_QD = np.asarray(self._vectors[rows], np.float32)
        for low in range(0, len(self), _BLOCK):
            cosines_QB = queries_QD @ self._block(low).T
            for mine, cosines in zip(near, cosines_QB, strict=True):
                mine.add(low, cosines)
        return np.stack([self._ordered(row, mine.rows())[:count] for row, mine in zip(rows.tolist(), near, strict=True)])

    def _ordered(self, row: int, candidates: np.ndarray) -> np.ndarray:
        """Return the candidates by their cosine with a row, rounded, and by number."""
        # Products of two float16 are multiples of 2^-48, and sums of them up to 32 are exact in float64: in whatever order they
        # are added, no bit of a cosine differs.
        query = np.asarray(self._vectors[row], np.float64)
        step = max(1, _MAX_ENTRIES // self.record.dim)
        cosines = np.concatenate(
            [self._rows(candidates[low : low + step]).astype(np.float64) @ query for low in range(0, len(candidates), step)]
        )
        return np.asarray(candidates[np.lexsort((candidates, -np.round(cosines, _DECIMALS)))])

    def vectors(self, low: int, high: int) -> np.ndarray:
        """Return float32 [high - low, D], the vectors of windows low..high-1 of the grid."""
        return np.asarray(self._vectors[low:high], np.float32)

    def _block(self, low: int) -> np.ndarray:
        held = self._hold()
        return self.vectors(low, low + _BLOCK) if held is None else held[low : low + _BLOCK]

    def _rows(self, rows: np.ndarray) -> np.ndarray:
        held = self._hold()
        return np.asarray(self._vectors[rows] if held is None else held[rows])

    def _hold(self) -> np.ndarray | None:
        """Return all vectors as float32; None where they are too many to be held."""
        if 4 * self._vectors.size > HELD_BYTES:
            return None
        with self._lock:
            if self._held is None:
                self._held = np.asarray(self._vectors, np.float32)
            return self._held


class _Near:
    """The rows of the largest cosines so far, and those that may turn out to be among them."""

    def __init__(self, count: int, slack: np.float32) -> None:
        self._count, self._slack = count, slack
        self._floor = np.float32(-np.inf)
        self._rows: list[np.ndarray] = []
        self._cosines: list[np.ndarray] = []
        self._size = 0

    def add(self, low: int, cosines: np.ndarray) -> None:
        """Take in the cosines of consecutive rows from `low` on."""
        at = np.flatnonzero(cosines >= self._floor)
        if len(at):
            self._rows.append(low + at)
            self._cosines.append(cosines.take(at))
            self._size += len(at)
            if self._size >= 2 * self._count:
                self._shrink()

    def rows(self) -> np.ndarray:
        """Return the rows that may belong to the `count` largest."""
        self._shrink()
        return self._rows[0]

    def _shrink(self) -> None:
        rows, cosines = np.concatenate(self._rows), np.concatenate(self._cosines)
        if len(cosines) > self._count:
            self._floor = np.partition(cosines, len(cosines) - self._count)[len(cosines) - self._count] - self._slack
            kept = np.flatnonzero(cosines >= self._floor)
            rows, cosines = rows[kept], cosines[kept]
        self._rows, self._cosines, self._size = [rows], [cosines], len(rows)
