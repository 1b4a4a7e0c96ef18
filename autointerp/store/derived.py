"""Arrays computed from a store and kept beside it, so that the next process maps them instead of computing them again.

``derived/<name>-<key>/`` holds one ``.npy`` file per array, and ``index.json`` says of what they are, with checksums. A folder
appears whole, and nothing depends on it: the arrays are made again where it is missing, of other inputs or damaged, and a store
that cannot be written to is read without. Processes that map the same arrays share their memory.
"""

from __future__ import annotations

import logging
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import numpy as np

from autointerp.config import Config
from autointerp.digest import short
from autointerp.errors import AutointerpError
from autointerp.files import TEMPORARY_PREFIX, disk_errors, read_json, write_json
from autointerp.store.arrays import Blocks, mapped, write_blocks

_log = logging.getLogger(__name__)

FOLDER = "derived"
_BLOCK = 1 << 24
_CHUNK = 1 << 20
_MAX_THREADS = 8


class ArrayEntry(Config):
    """An array and its file, as it was written."""

    dtype: str
    """Type of its numbers."""
    shape: tuple[int, ...]
    """How many there are along each axis."""
    num_bytes: int
    """Size of the file."""
    checksums: tuple[int, ...]
    """CRC-32 of each 16 MiB: every process computes them anew before it uses the array, so they have to be fast."""


class DerivedRecord(Config):
    """What a folder of derived arrays holds: the content of ``index.json``."""

    key: str
    """Digest of all that the arrays were computed from."""
    arrays: dict[str, ArrayEntry]
    """The file of each array, by name."""


def derived_folder(name: str, key: str) -> str:
    """Return where the arrays of a name and key lie in a store."""
    return f"{FOLDER}/{name}-{short(key)}"


def read_derived(store: Path, name: str, key: str) -> dict[str, np.ndarray] | None:
    """Return the arrays, mapped and read-only; None where there are none of that key, or any is not as it was written."""
    folder = store / derived_folder(name, key)
    try:
        record = _read_record(folder)
        if record.key != key:
            return None
        if damaged := _damaged(folder, record):
            _log.warning("%s is not as it was written and is not used: it is made again from the corpus", damaged[0])
            return None
        return _mapped(folder, record)
    except (AutointerpError, OSError, ValueError):
        return None


def write_derived(store: Path, name: str, key: str, arrays: Mapping[str, np.ndarray | Blocks]) -> dict[str, np.ndarray] | None:
    """Keep arrays in place of those of the same name and another key, and return them mapped, as :func:`read_derived` does.

    None where the store cannot be written to.
    """
    folder = store / derived_folder(name, key)
    # A name of its own for each writer: workers and threads may well compute the same at once.
    temporary = folder.parent / f"{TEMPORARY_PREFIX}{os.getpid()}-{uuid4().hex}"
    try:
        with disk_errors(folder):
            temporary.mkdir(parents=True)
            for array, values in arrays.items():
                with (temporary / f"{array}.npy").open("wb") as file:
                    if isinstance(values, Blocks):
                        write_blocks(file, values.checked(), dtype=values.dtype, shape=values.shape)
                    else:
                        # In the order in which it is mapped again.
                        np.save(file, np.ascontiguousarray(values), allow_pickle=False)
                    os.fsync(file.fileno())
            record = DerivedRecord(key=key, arrays=_entries(temporary, arrays))
            write_json(temporary / "index.json", record.model_dump(mode="json"))
            if (there := read_derived(store, name, key)) is not None:
                return there
            for other in folder.parent.glob(f"{name}-*"):
                shutil.rmtree(other, ignore_errors=True)
            temporary.rename(folder)
        return _mapped(folder, record)
    except (AutointerpError, OSError) as error:
        _log.info("%s is not kept, so that each process computes it: %s", folder, error)
        return None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def derived_problems(store: Path) -> list[str]:
    """Return one sentence per kept array that is not as it was written."""
    problems = []
    for index in sorted((store / FOLDER).glob("*/index.json")):
        folder = index.parent
        try:
            damaged = _damaged(folder, _read_record(folder))
        except (AutointerpError, OSError) as error:
            problems.append(f"{error}; remove {folder}, it is made again when it is needed")
            continue
        problems += [
            f"{path} is not as it was written; remove {folder}, it is made again when it is needed" for path in damaged
        ]
    return problems


def _read_record(folder: Path) -> DerivedRecord:
    return DerivedRecord.parse(read_json(folder / "index.json"), where=str(folder))


def _mapped(folder: Path, record: DerivedRecord) -> dict[str, np.ndarray]:
    return {name: mapped(folder / f"{name}.npy", dtype=entry.dtype, shape=entry.shape) for name, entry in record.arrays.items()}


def _damaged(folder: Path, record: DerivedRecord) -> list[Path]:
    """Return the files that are not as they were written.

    Raises: OSError when one is missing.
    """
    found = _files(folder, record.arrays)
    return [
        folder / f"{name}.npy" for name, entry in record.arrays.items() if found[name] != (entry.num_bytes, entry.checksums)
    ]


def _entries(folder: Path, arrays: Mapping[str, np.ndarray | Blocks]) -> dict[str, ArrayEntry]:
    """Return the entries of arrays that were just written."""
    return {
        name: ArrayEntry(
            dtype=np.dtype(arrays[name].dtype).str, shape=arrays[name].shape, num_bytes=num_bytes, checksums=checksums
        )
        for name, (num_bytes, checksums) in _files(folder, arrays).items()
    }


def _files(folder: Path, names: Iterable[str]) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Return size and checksums of the files of the arrays, as they are now."""
    sizes = {name: (folder / f"{name}.npy").stat().st_size for name in names}
    blocks = [(folder / f"{name}.npy", low) for name, size in sizes.items() for low in range(0, size, _BLOCK)]
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        checksums = pool.map(_checksum, blocks)
        return {name: (size, tuple(next(checksums) for _ in range(0, size, _BLOCK))) for name, size in sizes.items()}


def _checksum(block: tuple[Path, int]) -> int:
    # Read, not mapped: what is mapped and touched would count as the process's own memory.
    path, low = block
    checksum, buffer = 0, memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        file.seek(low)
        for _ in range(0, _BLOCK, _CHUNK):
            checksum = zlib.crc32(buffer[: file.readinto(buffer)], checksum)
    return checksum
