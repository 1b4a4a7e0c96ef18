"""Reading a finished store: the corpus as flat arrays, and the activations of one latent at a time.

A latent is found by ``latents.parquet``: the row groups that hold it are read, and nothing else. Safe to share between threads.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from autointerp.digest import digest
from autointerp.errors import InputError, StoreError, nearest
from autointerp.records import NeighbourKind
from autointerp.store.arrays import Blocks
from autointerp.store.corpus import TOKENS
from autointerp.store.derived import read_derived, write_derived
from autointerp.store.embeddings import EmbeddingIndex, index_folder
from autointerp.store.latents import LATENTS, NUM_HASHES
from autointerp.store.layout import MANIFEST, VOCABULARY, activations_part, coder_file, coder_folder, damage, latents_file
from autointerp.store.manifest import CoderRecord, Manifest, read_coder, read_manifest
from autointerp.store.merge import activations_schema
from autointerp.store.neighbours import NeighbourTable, neighbours_file
from autointerp.store.parquet import damage_told, iterate_tables, numbers, parquet_file, read_table
from autointerp.store.vocab import StoreVocabulary

MAX_IDLE_FILES = 16
"""Open files kept for the next reader; as many more may be in use as there are threads."""
MIN_DERIVED_POSITIONS = 1 << 19
"""Smaller stores keep no derived arrays: to compute them takes less than 50 ms."""
MAX_RECENT_GROUPS = 4
"""Row groups of a coder kept decoded for the next latent."""
_COLUMNS = ["position", "activation"]
_PLACE = ("part", "row_group", "num_row_groups", "row_offset", "count")


def open_store(path: Path | str) -> Store:
    """Open a finished store.

    Raises: StoreError when there is none, or it is unfinished, damaged or of a newer release.
    """
    path = Path(path)
    # Before it is read: of two that follow each other at once, the stamp of the former is never taken for the latter's.
    stamp = _stamp(path)
    return Store(path, read_manifest(path), stamp)


_Stamp = tuple[int, int, int]


def _stamp(path: Path) -> _Stamp | None:
    """Return what tells the manifest of a store from one that took its place; None where there is none."""
    try:
        status = (path / MANIFEST).stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True, kw_only=True)
class SegmentTable:
    """Runs of one document inside one context, sorted by start; S segments."""

    document: np.ndarray
    """int64 [S], document id."""
    start: np.ndarray
    """int64 [S], position of the first token."""
    stop: np.ndarray
    """int64 [S], position after the last token."""

    def __len__(self) -> int:
        return len(self.start)


class Store:
    """A finished store; made by :func:`open_store`."""

    def __init__(self, path: Path, manifest: Manifest, stamp: _Stamp | None) -> None:
        self.path = path
        self.manifest = manifest
        self._stamp = stamp
        self._files = _FilePool(self.check_current)
        self._lock = threading.Lock()
        # Of its own: what computes derived arrays reads others, and the vocabulary.
        self._derived_lock = threading.RLock()
        self._coders: dict[str, CoderReader] = {}
        self._loaded: _Corpus | None = None
        self._vocabulary: StoreVocabulary | None = None

    @property
    def store_id(self) -> str:
        """Digest of what the store was made from."""
        return self.manifest.store_id

    @property
    def ctx_len(self) -> int:
        """Tokens in a full context; position = context * ctx_len + offset."""
        return self.manifest.identity.ctx_len

    @property
    def num_tokens(self) -> int:
        """Corpus tokens."""
        return self.manifest.extent.num_tokens

    @property
    def num_contexts(self) -> int:
        """Contexts, of which some may be shorter than `ctx_len`."""
        return self.manifest.extent.num_contexts

    @property
    def num_positions(self) -> int:
        """Positions, of which those after the end of a short context have no token."""
        return self.num_contexts * self.ctx_len

    @property
    def keeps_derived(self) -> bool:
        """Whether :meth:`derived` keeps arrays for the next process; a small store does not."""
        return self.num_positions >= MIN_DERIVED_POSITIONS

    @property
    def coder_names(self) -> list[str]:
        """Names of the coders, sorted."""
        return sorted(self.manifest.extent.coders)

    @property
    def tokens(self) -> np.ndarray:
        """uint32 [num_contexts * ctx_len], token id at each position; 0 after the end of a short context. Read-only."""
        return self._corpus.tokens

    @property
    def context_lengths(self) -> np.ndarray:
        """int32 [num_contexts], tokens in each context. Read-only."""
        return self._corpus.lengths

    @property
    def segments(self) -> SegmentTable:
        """Where each document lies. Read-only."""
        return self._corpus.segments

    @property
    def _corpus(self) -> _Corpus:
        with self._derived_lock:
            if self._loaded is None:
                arrays = self.derived("corpus-v1", self._read_corpus)
                segments = SegmentTable(**{name: arrays[name] for name in ("document", "start", "stop")})
                self._loaded = _Corpus(tokens=arrays["tokens"], lengths=arrays["lengths"], segments=segments)
            return self._loaded

    def _read_corpus(self) -> dict[str, np.ndarray | Blocks]:
        """Return where contexts and documents lie, and the token ids in blocks: they are never held twice."""
        paths, num_contexts, ctx_len = self._parts("tokens/"), self.num_contexts, self.ctx_len
        try:
            arrays: dict[str, np.ndarray | Blocks] = dict(
                _read_segments(paths, num_contexts=num_contexts, ctx_len=ctx_len, where=self.path)
            )
        finally:
            self.check_current()

        def tokens() -> Iterator[np.ndarray]:
            for path in paths:
                yield from _token_blocks(path, ctx_len=ctx_len)
            self.check_current()

        return {"tokens": Blocks(dtype="<u4", shape=(num_contexts * ctx_len,), make=tokens), **arrays}

    def derived(self, name: str, compute: Callable[[], Mapping[str, np.ndarray | Blocks]]) -> Mapping[str, np.ndarray]:
        """Return arrays that follow from the corpus and the vocabulary alone: those kept, else those that `compute` returns.

        These are kept for the next process, unless the store is small or cannot be written to. `name` says what they are: it is
        another one when the same corpus would give others.
        """
        if not self.keeps_derived:
            return _whole(compute())
        files = {
            file: entry.digest
            for file, entry in self.manifest.files.items()
            if file.startswith("tokens/") or file == VOCABULARY
        }
        key = digest({"name": name, "ctx_len": self.ctx_len, "num_contexts": self.num_contexts, "files": files})
        with self._derived_lock:
            kept = read_derived(self.path, name, key)
            if kept is None:
                arrays = compute()
                kept = write_derived(self.path, name, key, arrays)
                if kept is None:
                    return _whole(arrays)
            # Their memory is shared with other processes.
            return kept

    def _parts(self, prefix: str) -> list[Path]:
        return [self.path / name for name in sorted(self.manifest.files) if name.startswith(prefix)]

    def check_current(self) -> None:
        """Make sure that a file that was opened before this call is one of this store, not of a larger one in its place.

        Coders and tables that were added since do no harm.

        Raises: StoreError when the store was extended, or built again, since it was opened.
        """
        stamp = _stamp(self.path)
        if stamp == self._stamp:
            return
        # The manifest goes before any file is replaced and comes back after the last.
        if stamp is None or not self.manifest.files.items() <= read_manifest(self.path).files.items():
            raise StoreError(
                f"{self.path} is not what it was when it was opened: it was extended, built again or removed meanwhile; run "
                "the same command again to read what is there now"
            )
        self._stamp = stamp

    def check(self, path: Path) -> None:
        """Compare a small file of the store with its digest in the manifest.

        Raises: StoreError when it differs or the file is missing.
        """
        entry = self.manifest.files.get(path.relative_to(self.path).as_posix())
        problem = None if entry is None else damage(path, entry)
        if problem is not None:
            self.check_current()
            raise StoreError(problem)

    def documents(self) -> pa.Table:
        """Return the documents: ``document``, ``source_row`` and the kept columns, in order of id."""
        paths = self._parts("documents/")
        for path in paths:
            self.check(path)  # the kept columns are known to nothing but the file
        return pa.concat_tables([read_table(path).replace_schema_metadata() for path in paths])

    @property
    def vocabulary(self) -> StoreVocabulary:
        """Renders token ids as text."""
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = StoreVocabulary.read(self.path / VOCABULARY)
            return self._vocabulary

    def coder(self, name: str) -> CoderReader:
        """Return the reader of one coder.

        Raises: InputError when the store has none of that name.
        """
        if name not in self.manifest.extent.coders:
            raise InputError(f"{self.path} has no coder {name!r}; {nearest(name, self.coder_names)}")
        with self._lock:
            if name not in self._coders:
                self._coders[name] = CoderReader(self, name)
            return self._coders[name]

    def embeddings(self, embedder: str, *, window: int, min_window: int) -> EmbeddingIndex:
        """Return the index of the store's windows.

        Raises: StoreError when there is none yet, with the command that makes it.
        """
        path = self.path / index_folder(embedder, window=window, min_window=min_window)
        if not (path / "index.json").exists():
            raise StoreError(
                f"{self.path} has no embeddings of its windows of {window} tokens (at least {min_window}) by {embedder}; make "
                f"them with `autointerp tables {self.path} --embedder {embedder} --window {window} --min-window {min_window}`"
            )
        return EmbeddingIndex(path, store_id=self.store_id)

    def close(self) -> None:
        """Close the files kept open; the store can still be read."""
        self._files.close()


class CoderReader:
    """The activations of one coder; made by :meth:`Store.coder`. Safe to share between threads."""

    def __init__(self, store: Store, name: str) -> None:
        self.name = name
        store.check(store.path / coder_file(name))
        self.record: CoderRecord = read_coder(store.path, name)
        """What is known of the coder."""
        self._path = store.path
        self._extent = store.manifest.extent.coders[name]
        self._schema = activations_schema(np.dtype(self._extent.dtype))
        self._files = store._files
        self._check_current = store.check_current
        self._lock = threading.Lock()
        self._latents: dict[str, np.ndarray] | None = None
        self._parts = [store.path / activations_part(name, part) for part in range(self._extent.num_parts)]
        self._recent: tuple[_Group, ...] = ()
        self._lone: tuple[int, int] | None = None
        """Part and number of the row group read last, of which only the beginning may have been decoded."""
        self._places: np.ndarray | None = None

    @property
    def folder(self) -> Path:
        """Where the coder's files lie."""
        return self._path / coder_folder(self.name)

    @property
    def width(self) -> int:
        """Number of latents."""
        return self._extent.width

    @property
    def coder_id(self) -> str:
        """Digest of the store and the coder."""
        return self._extent.coder_id

    @property
    def num_activations(self) -> int:
        """Activations of all latents."""
        return self._extent.num_activations

    @property
    def latents(self) -> Mapping[str, np.ndarray]:
        """Columns of ``latents.parquet`` by name, one entry per latent; ``minhash`` is uint32 [width, 16].

        ``max``, ``min``, ``mean`` and quantiles are NaN for latents that never fire. Read-only.
        """
        with self._lock:
            if self._latents is None:
                self._latents = _read_latents(self._path / latents_file(self.name), width=self.width)
                self._check_current()
            return self._latents

    def activations(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (positions int64, values float32) of one latent, sorted by position; both empty when it never fires.

        Raises: InputError when the latent is beyond the width; StoreError when a file is missing or damaged.
        """
        part, first, num_groups, offset, count = self._find(latent)
        if not count:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        # Latents of one row group are asked for one after the other more often than not.
        held = next((group for group in self._recent if group.group == first and group.part == part), None)
        missing = list(range(first + (held is not None), first + num_groups))
        if missing:
            # Of a group asked for once the rest is neither decoded nor kept: that takes a tenth of the time of a choice.
            is_lone = held is None and num_groups == 1 and self._lone != (part, first)
            self._lone = (part, first)
            stop = offset + count if is_lone else None
            table, starts = self._files.read(self._parts[part], missing, self._schema, stop=stop)
            begin, last = starts[missing[0]], starts[missing[-1]]
            positions, values = numbers(table.column(0)), numbers(table.column(1))
            if not is_lone:
                own = positions, values
                if last != begin:
                    # Copies: a view would keep all the groups before in memory.
                    own = positions[last - begin :].copy(), values[last - begin :].copy()
                self._recent = (_Group(part, missing[-1], last, *own), *self._recent[: MAX_RECENT_GROUPS - 1])
            if held is not None:
                begin = held.start
                positions, values = np.concatenate([held.positions, positions]), np.concatenate([held.values, values])
        else:
            assert held is not None
            begin, positions, values = held.start, held.positions, held.values
        start = offset - begin
        if start < 0 or start + count > len(positions):
            where = self._path / latents_file(self.name)
            raise StoreError(f"{self._parts[part]} does not belong to {where}; restore both together")
        # Copies: a view of one latent would keep whole row groups in memory.
        return positions[start : start + count].astype(np.int64), values[start : start + count].astype(np.float32)

    def sweep(self, latents: Iterable[int] | None = None) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield (latent, positions, values) in ascending order of latent (None: all that fire), decoding nothing twice."""
        if latents is None:
            wanted = np.flatnonzero(self.latents["count"]).tolist()
        else:
            wanted = sorted({int(latent) for latent in latents})
        held: _Held | None = None
        for latent in wanted:
            part, first, num_groups, offset, count = self._find(latent)
            if not count:
                yield latent, np.zeros(0, np.int64), np.zeros(0, np.float32)
                continue
            with self._files.open(self._parts[part], self._schema) as file:
                if held is None or held.part != part:
                    held = _Held(part=part, low=first, high=first, table=None)
                held.advance(file.handle, first, first + num_groups)
                start = offset - file.group_starts[first]
            assert held.table is not None
            yield latent, *_slice(held.table, start, count)

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield (latents int64, positions int64, values float32) of all activations in order, a row group at a time."""
        for path in self._parts:
            for table in iterate_tables(path, schema=self._schema):
                self._check_current()
                latents, positions, values = (numbers(table[name]) for name in ("latent", "position", "activation"))
                yield latents.astype(np.int64), positions, values.astype(np.float32)

    def neighbours(self, kind: NeighbourKind) -> NeighbourTable:
        """Return the table of nearest neighbours.

        Raises: StoreError when there is none yet, with the command that makes it; IdentityError when it is of another coder.
        """
        path = self._path / neighbours_file(self.name, kind)
        if not path.exists():
            raise StoreError(
                f"{self._path} has no neighbours by {kind} of coder {self.name!r}; "
                f"make them with `autointerp tables {self._path} --coder {self.name} --neighbours {kind}`"
            )
        return NeighbourTable(path, coder_id=self.coder_id, width=self.width)

    def _find(self, latent: int) -> tuple[int, int, int, int, int]:
        if not 0 <= latent < self.width:
            raise InputError(
                f"coder {self.name!r} has no latent {latent}: its width is {self.width}, so they go from 0 to {self.width - 1}"
            )
        if self._places is None:
            columns = self.latents
            self._places = np.stack([columns[name] for name in _PLACE], axis=1, dtype=np.int64)
        part, first, num_groups, offset, count = self._places[latent].tolist()
        return part, first, num_groups, offset, count


@dataclass(frozen=True)
class _Group:
    """A row group, decoded."""

    part: int
    group: int
    start: int
    """Its first row in the part."""
    positions: np.ndarray
    values: np.ndarray


@dataclass(kw_only=True)
class _Held:
    """Row groups low..high-1 of a part, decoded."""

    part: int
    low: int
    high: int
    table: pa.Table | None

    def advance(self, handle: Any, low: int, high: int) -> None:
        """Drop row groups before `low` and read those up to `high`."""
        if self.table is None or low >= self.high:
            self.table = handle.read_row_groups(list(range(low, high)), columns=_COLUMNS, use_threads=False)
        else:
            dropped = sum(handle.metadata.row_group(group).num_rows for group in range(self.low, low))
            pieces = [self.table.slice(dropped)]
            if high > self.high:
                pieces.append(handle.read_row_groups(list(range(self.high, high)), columns=_COLUMNS, use_threads=False))
            self.table = pa.concat_tables(pieces)
        self.low, self.high = low, max(high, self.high) if low < self.high else high


def _slice(table: pa.Table, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    table = table.slice(start, count)
    # Copies: a view of one latent would keep whole row groups in memory.
    positions = np.array(numbers(table["position"]), dtype=np.int64)
    values = np.array(numbers(table["activation"]), dtype=np.float32)
    return positions, values


def _read_latents(path: Path, *, width: int) -> dict[str, np.ndarray]:
    table = read_table(path, schema=LATENTS)
    if table.num_rows != width:
        raise StoreError(f"{path} has {table.num_rows} latents and the manifest says {width}; restore both together")
    columns = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if pa.types.is_fixed_size_list(column.type):
            columns[name] = np.array(numbers(column.values)).reshape(width, NUM_HASHES)
        else:
            columns[name] = np.array(numbers(column))
        columns[name].flags.writeable = False
    return columns


@dataclass(frozen=True, kw_only=True)
class _Corpus:
    tokens: np.ndarray
    lengths: np.ndarray
    segments: SegmentTable


def _read_segments(paths: list[Path], *, num_contexts: int, ctx_len: int, where: Path) -> dict[str, np.ndarray]:
    """Return the length of each context, and of each segment its document, start and stop.

    Raises: StoreError when the parts have other contexts than the manifest says.
    """
    lengths = np.zeros(num_contexts, np.int32)
    blocks: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    context = 0
    for path in paths:
        for table in iterate_tables(path, ["tokens", "documents", "starts"], schema=TOKENS):
            sizes, _ = _ragged(table["tokens"])
            if context + len(sizes) > num_contexts or sizes.max(initial=0) > ctx_len:
                raise StoreError(f"{path} does not belong to the manifest of {where}; restore both together")
            first = (context + np.arange(len(sizes), dtype=np.int64)) * ctx_len
            lengths[context : context + len(sizes)] = sizes
            per_context, documents = _ragged(table["documents"])
            _, offsets = _ragged(table["starts"])
            starts = np.repeat(first, per_context) + offsets
            # A segment ends where the next begins; the last of a context where the context does.
            stops = np.append(starts[1:], 0)
            stops[np.cumsum(per_context) - 1] = first + sizes
            blocks.append((documents, starts, stops))
            context += len(sizes)
    if context != num_contexts:
        raise StoreError(f"{where} has {context} contexts and its manifest says {num_contexts}; restore both together")
    document, start, stop = (np.concatenate(column).astype(np.int64) for column in zip(*blocks, strict=True))
    return {"lengths": lengths, "document": document, "start": start, "stop": stop}


def _token_blocks(path: Path, *, ctx_len: int) -> Iterator[np.ndarray]:
    """Yield uint32 [contexts * ctx_len] for each row group of a part: token ids, 0 after the end of a short context."""
    for table in iterate_tables(path, ["tokens"], schema=TOKENS):
        sizes, ids = _ragged(table["tokens"])
        if len(ids) == len(sizes) * ctx_len:
            yield ids
            continue
        block = np.zeros((len(sizes), ctx_len), np.uint32)
        block[np.arange(ctx_len) < sizes[:, None]] = ids
        yield block.ravel()


def _whole(arrays: Mapping[str, np.ndarray | Blocks]) -> dict[str, np.ndarray]:
    found = {name: values.whole() if isinstance(values, Blocks) else values for name, values in arrays.items()}
    for values in found.values():
        values.flags.writeable = False
    return found


def _ragged(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    array = column.combine_chunks()
    # Not `flatten`, which imports all of pyarrow.compute.
    offsets = numbers(array.offsets).astype(np.int64)
    return np.diff(offsets), numbers(array.values)[offsets[0] : offsets[-1]]


@dataclass(frozen=True, kw_only=True)
class _OpenFile:
    handle: Any
    group_starts: list[int]
    """First row of each row group, and the row after the last."""


class _FilePool:
    """Open parquet files. One reader uses a file at a time; idle ones are kept for the next, up to a bound.

    A path is told from others by identity: :class:`CoderReader` holds one for each part.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        """`check` is called after a file was opened, and raises where it is another than was meant."""
        self._check = check
        self._lock = threading.Lock()
        self._idle: OrderedDict[int, tuple[Path, _OpenFile]] = OrderedDict()
        self._number = 0

    @contextmanager
    def open(self, path: Path, schema: pa.Schema) -> Iterator[_OpenFile]:
        with damage_told(path):
            file = self._take(path) or self._open(path, schema)
            try:
                yield file
            except BaseException:
                file.handle.close(force=True)
                raise
            self._give(path, file)

    def read(
        self, path: Path, groups: list[int], schema: pa.Schema, *, stop: int | None
    ) -> tuple[pa.Table | pa.RecordBatch, list[int]]:
        """Return the positions and activations of row groups, and the first row of each row group of the file.

        With `stop` only those before this row of the file, which is in the one group asked for; at least one in any case.
        """
        # By hand, not by `open`: half as long, which counts beside a row group.
        file = self._take(path)
        try:
            file = file or self._open(path, schema)
            if stop is None:
                table = file.handle.read_row_groups(groups, columns=_COLUMNS, use_threads=False)
            else:
                # Where the file has no such group, pyarrow says so.
                begin = file.group_starts[groups[0]] if groups[0] < len(file.group_starts) else 0
                num_rows = max(1, stop - begin)
                table = next(file.handle.iter_batches(num_rows, groups, _COLUMNS, use_threads=False))
        except BaseException:
            if file is not None:
                file.handle.close(force=True)
            with damage_told(path):
                raise
        self._give(path, file)
        return table, file.group_starts

    def _open(self, path: Path, schema: pa.Schema) -> _OpenFile:
        try:
            handle = parquet_file(path, schema)
        finally:
            # Also where it is missing or damaged: that may be the reason.
            self._check()
        rows = [handle.metadata.row_group(group).num_rows for group in range(handle.num_row_groups)]
        return _OpenFile(handle=handle, group_starts=list(accumulate(rows, initial=0)))

    def _take(self, path: Path) -> _OpenFile | None:
        with self._lock:
            for key in reversed(self._idle):
                if self._idle[key][0] is path:
                    return self._idle.pop(key)[1]
        return None

    def _give(self, path: Path, file: _OpenFile) -> None:
        with self._lock:
            self._number += 1
            self._idle[self._number] = path, file
            surplus = [self._idle.popitem(last=False)[1] for _ in range(len(self._idle) - MAX_IDLE_FILES)]
        for _, old in surplus:
            old.handle.close(force=True)

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, OrderedDict()
        for _, file in idle.values():
            file.handle.close(force=True)
