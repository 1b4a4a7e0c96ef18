"""Runs: the activations of a fixed range of contexts, sorted and spilled to disk.

A run is the unit of resume: its marker is written last. Its activations lie in one file per coder, or in several when they did
not fit in the memory budget at once; each is sorted by (latent, position), with positions counted from the start of the run so
that they fit in 32 bits. A file keeps float16 when none of its values leaves the normal range of float16, else float32. Where
(latent, position, float16) fit in 64 bits it holds one integer per activation, whose differences are as small as those of three
columns are together, at half the work. Nothing is compressed, since a run is read once and deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from autointerp.config import Config
from autointerp.errors import InputError, StoreError
from autointerp.files import read_sealed
from autointerp.store.layout import FileEntry, run_folder, run_marker
from autointerp.store.parquet import parquet_sink

BYTES_PER_ACTIVATION = 64
"""Memory per buffered activation, at the worst moment: keys and values twice, their order, and as much again for what malloc,
the parquet writer and the caller hold."""
MAX_RUN_TOKENS = 1 << 20
"""No run has more tokens, so that a killed job loses little."""
MIN_BUFFER_ROWS = 1 << 10
RUN_GROUP_ROWS = 1 << 14
"""Activations in a row group of a run's file."""
VALUE_BITS = 16
POSITION_BITS = b"autointerp.store.position_bits"
"""Metadata of a run's file: how many bits of a key are the position, counted from the start of the run."""
ENCODING = ("DELTA_BINARY_PACKED", "PLAIN")
"""Of keys and of values, where they have a column."""
_FLOAT16_MIN, _FLOAT16_MAX = 2.0**-14, 65504.0


class RunFile(Config):
    """One sorted file of a run."""

    name: str
    """File name in the coder's folder of runs."""
    num_rows: int
    """Activations in it."""
    dtype: str
    """``float16`` or ``float32``, of the values."""


class Run(Config):
    """A committed run: the content of its marker."""

    run: int
    """Number of the run."""
    first_context: int
    """The first context in it."""
    num_contexts: int
    """Contexts in it."""
    num_tokens: int
    """Tokens in them."""
    num_documents: int
    """Documents that begin in it."""
    last_document: int | None = None
    """Largest document id up to here, -1 where there is none; None in a run taken over from a smaller store."""
    files: dict[str, list[RunFile]]
    """Sorted files by coder."""
    tokens: FileEntry | None = None
    """The tokens part; None when a coder is added to tokens that were there before."""
    documents: FileEntry | None = None
    """The documents part; likewise."""
    build: str | None = None
    """Digest of what decides how runs are cut; runs that workers recorded on several machines must agree on it."""


def read_runs(path: Path) -> dict[int, Run]:
    """Return the committed runs of the store being written at `path` by number, in order; workers leave gaps."""
    markers = sorted((path / run_marker(0)).parent.glob("run-*.json"))
    runs = [Run.parse(read_sealed(marker), where=str(marker)) for marker in markers]
    return {run.run: run for run in sorted(runs, key=lambda run: run.run)}


def buffer_rows(memory_budget_bytes: int) -> int:
    """Return how many activations may be held in memory at once."""
    return max(MIN_BUFFER_ROWS, memory_budget_bytes // BYTES_PER_ACTIVATION)


def contexts_in_run(memory_budget_bytes: int, *, ctx_len: int, l0: float) -> int:
    """Return the contexts of a run whose activations, `l0` per token over all coders, fit in the budget."""
    tokens = min(MAX_RUN_TOKENS, int(buffer_rows(memory_budget_bytes) / max(l0, 1.0)))
    return max(1, tokens // ctx_len)


def fits_float16(values: np.ndarray) -> bool:
    """Return whether no value becomes zero, subnormal or infinite in float16."""
    return _fits_float16(np.abs(values))


def _fits_float16(size: np.ndarray) -> bool:
    return not len(size) or bool(size.min() >= _FLOAT16_MIN and size.max() <= _FLOAT16_MAX)


def holds_values(dtype: np.dtype[Any], key_bits: int) -> bool:
    """Return whether values of `dtype` fit in one uint64 with keys of so many bits."""
    return dtype == np.float16 and key_bits + VALUE_BITS <= 64


class SortedRows:
    """Activations in ascending order of one integer key.

    A float16 rides along in the low bits of its key where there is room: sorting integers is several times faster than ordering
    them, and takes less memory.
    """

    def __init__(
        self,
        pieces: Iterable[tuple[np.ndarray, np.ndarray | None]],
        num_rows: int,
        *,
        dtype: np.dtype[Any],
        key_bits: int,
        is_sorted: bool = False,
    ) -> None:
        """Take uint64 keys below ``2 ** key_bits`` and their values, which become `dtype`; `is_sorted` promises their order.

        The values may be None where the keys hold them already, which :func:`holds_values` allows.
        """
        self._keys = np.empty(num_rows, np.uint64)
        self._values = None if holds_values(dtype, key_bits) else np.empty(num_rows, dtype)
        filled = 0
        for keys, values in pieces:
            rows = slice(filled, filled + len(keys))
            filled += len(keys)
            if values is None:
                self._keys[rows] = keys
            elif self._values is None:
                np.left_shift(keys, np.uint64(VALUE_BITS), out=self._keys[rows])
                self._keys[rows] |= values.astype(np.float16, copy=False).view(np.uint16)
            else:
                self._keys[rows] = keys
                self._values[rows] = values
        if is_sorted:
            return
        if self._values is None:
            self._keys.sort()
        else:
            order = np.argsort(self._keys, kind="stable")  # of sorted pieces it is a merge
            self._keys, self._values = self._keys[order], self._values[order]

    def __len__(self) -> int:
        return len(self._keys)

    def columns(self, start: int, stop: int) -> list[np.ndarray]:
        """Return rows start..stop-1 as they are held: uint64 keys with their values in the low bits, or keys and values."""
        return [column[start:stop] for column in (self._keys, self._values) if column is not None]

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return uint64 keys and the values of rows start..stop-1."""
        keys = self._keys[start:stop]
        if self._values is not None:
            return keys, self._values[start:stop]
        return keys >> np.uint64(VALUE_BITS), keys.astype(np.uint16).view(np.float16)

    def has_twins(self, start: int, stop: int) -> bool:
        """Return whether a key of rows start..stop-1 is that of the row before it."""
        keys = self._keys[max(0, start - 1) : stop]
        if self._values is None:
            return bool(((keys[1:] ^ keys[:-1]) >> np.uint64(VALUE_BITS) == 0).any())
        return bool((keys[1:] == keys[:-1]).any())


class RunBuffer:
    """Activations of the run in progress; spills a coder's sorted file whenever the budget is reached."""

    def __init__(self, path: Path, widths: Mapping[str, int], *, max_rows: int, run_positions: int) -> None:
        """`run_positions`: positions that a run has at most."""
        self._path = path
        self._position_bits = run_positions.bit_length()
        self._widths = dict(widths)
        self._max_rows = max_rows
        self._start()

    def _start(self) -> None:
        self._keys: dict[str, list[np.ndarray]] = {coder: [] for coder in self._widths}
        self._values: dict[str, list[np.ndarray]] = {coder: [] for coder in self._widths}
        self._rows = dict.fromkeys(self._widths, 0)
        self._fits_float16 = dict.fromkeys(self._widths, True)
        """Of what is held, by coder."""
        self._files: dict[str, list[RunFile]] = {coder: [] for coder in self._widths}

    def add(self, coder: str, latents: Any, positions: np.ndarray, values: Any, *, run: int) -> None:
        """Append activations; `positions` (int64) are counted from the start of the run and were checked.

        Raises: InputError for a latent beyond the width or a value that is not finite.
        """
        latents, values = np.asarray(latents), np.array(values, np.float32)
        if not len(latents):
            return
        width = self._widths[coder]
        if latents.dtype.kind not in "iu" or latents.min() < 0 or latents.max() >= width:
            raise InputError(
                f"latents {latents.min()} to {latents.max()} were given for coder {coder!r}, which has width {width}; "
                f"expected integers from 0 to {width - 1}"
            )
        size = np.abs(values)
        if not np.isfinite(size.max()):  # NaN is the largest of any
            at = int(np.argmin(np.isfinite(values)))
            raise InputError(
                f"coder {coder!r} gave the activation {values[at]} for latent {latents[at]}; only finite values can be stored: "
                "check the coder's dtype and the subject's activations"
            )
        keys = latents.astype(np.uint64)
        keys <<= np.uint64(self._position_bits)
        keys |= positions.view(np.uint64)
        if not size.min():
            keys, values, size = keys[size != 0], values[size != 0], size[size != 0]
        self._fits_float16[coder] &= _fits_float16(size)
        self._keys[coder].append(keys)
        self._values[coder].append(values)
        self._rows[coder] += len(keys)
        while sum(self._rows.values()) > self._max_rows:
            self._spill(max(self._rows, key=self._rows.__getitem__), run=run)

    def close(self, *, run: int) -> dict[str, list[RunFile]]:
        """Spill what is left; return the files of the run and start the next."""
        for coder in self._widths:
            self._spill(coder, run=run)
        files = self._files
        self._start()
        return files

    def _spill(self, coder: str, *, run: int) -> None:
        if not self._rows[coder]:
            return
        keys, values, num_rows = self._keys[coder], self._values[coder], self._rows[coder]
        dtype = np.dtype(np.float16 if self._fits_float16[coder] else np.float32)
        self._keys[coder], self._values[coder], self._rows[coder], self._fits_float16[coder] = [], [], 0, True
        key_bits = self._position_bits + self._widths[coder].bit_length()
        ordered = SortedRows(_taken(keys, values), num_rows, dtype=dtype, key_bits=key_bits)
        name = f"run-{run:05d}-{len(self._files[coder]):03d}.parquet"
        schema = run_schema(None if holds_values(dtype, key_bits) else dtype, position_bits=self._position_bits)
        file, encoding = self._path / run_folder(coder) / name, dict(zip(schema.names, ENCODING, strict=False))
        with parquet_sink(file, schema, encoding=encoding, compression="none", with_digest=False) as sink:
            for start in range(0, num_rows, RUN_GROUP_ROWS):
                stop = start + RUN_GROUP_ROWS
                if ordered.has_twins(start, stop):
                    raise InputError(f"coder {coder!r} gave two activations of one latent at one position; expected one")
                columns = [pa.array(column) for column in ordered.columns(start, stop)]
                sink.add(pa.Table.from_arrays(columns, schema=sink.schema))
        self._files[coder].append(RunFile(name=name, num_rows=num_rows, dtype=dtype.name))


def _taken(keys: list[np.ndarray], values: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the pieces in order and let go of each, so that they are not held beside the sorted whole."""
    keys.reverse()
    values.reverse()
    while keys:
        yield keys.pop(), values.pop()


def run_schema(dtype: np.dtype[Any] | None, *, position_bits: int) -> pa.Schema:
    """Return the schema of a run's file; `dtype` of a column of values, None where the keys hold them."""
    values = [] if dtype is None else [("activation", pa.from_numpy_dtype(dtype))]
    return pa.schema([("key", pa.uint64()), *values]).with_metadata({POSITION_BITS: str(position_bits).encode()})


def remove_uncommitted(
    path: Path, coders: Mapping[str, Any], runs: Mapping[int, Run], *, is_ours: Callable[[int], bool] = lambda run: True
) -> None:
    """Remove the files that a killed process spilled for a run of ours that it did not commit."""
    for coder in coders:
        kept = {file.name for run in runs.values() for file in run.files.get(coder, ())}
        folder = path / run_folder(coder)
        for file in folder.glob("*.parquet") if folder.is_dir() else ():
            if file.name not in kept and file.name.startswith("run-") and is_ours(int(file.name.split("-")[1])):
                file.unlink()


def check_rows(path: Path, wanted: int, num_rows: int) -> None:
    """Compare the rows read from a run's file with those its marker says.

    Raises: StoreError when they differ.
    """
    if num_rows != wanted:
        raise StoreError(f"{path} has {num_rows} activations and its marker says {wanted}; remove the store and build again")
