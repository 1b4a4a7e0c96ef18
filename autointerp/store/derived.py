"""Arrays computed from a store and kept beside it, so that the next process maps them instead of computing them again.

``derived/<name>-<key>/`` holds one ``.npy`` file per array, and ``index.json`` says of what they are. A folder appears whole,
and nothing depends on it: the arrays are made again where it is missing, of other inputs or cut short, and a store that cannot
be written to is read without. Processes that map the same arrays share their memory.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

import numpy as np

from autointerp.config import Config
from autointerp.digest import short
from autointerp.errors import AutointerpError
from autointerp.files import TEMPORARY_PREFIX, disk_errors, read_json, write_json
from autointerp.store.layout import FileEntry, file_entry

_log = logging.getLogger(__name__)

FOLDER = "derived"


class DerivedRecord(Config):
    """What a folder of derived arrays holds: the content of ``index.json``."""

    key: str
    """Digest of all that the arrays were computed from."""
    arrays: dict[str, FileEntry]
    """The file of each array, by name."""


def derived_folder(name: str, key: str) -> str:
    """Return where the arrays of a name and key lie in a store."""
    return f"{FOLDER}/{name}-{short(key)}"


def read_derived(store: Path, name: str, key: str) -> dict[str, np.ndarray] | None:
    """Return the arrays, mapped and read-only; None where there are none of that key, or not all of them.

    Their size is checked, their bytes are not: that would mean to read them (:func:`derived_problems` does).
    """
    folder = store / derived_folder(name, key)
    try:
        record = DerivedRecord.parse(read_json(folder / "index.json"), where=str(folder))
        if record.key != key:
            return None
        arrays = {}
        for array, entry in record.arrays.items():
            path = folder / f"{array}.npy"
            if path.stat().st_size != entry.num_bytes:
                return None
            # A plain array: a memmap takes longer over every slice.
            arrays[array] = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        return arrays
    except (AutointerpError, OSError, ValueError):
        return None


def write_derived(store: Path, name: str, key: str, arrays: Mapping[str, np.ndarray]) -> bool:
    """Keep arrays in place of those of the same name and another key; return False where the store cannot be written to."""
    folder = store / derived_folder(name, key)
    # A name of its own for each writer: workers and threads may well compute the same at once.
    temporary = folder.parent / f"{TEMPORARY_PREFIX}{os.getpid()}-{uuid4().hex}"
    if read_derived(store, name, key) is not None:
        return True
    try:
        with disk_errors(folder):
            temporary.mkdir(parents=True)
            entries = {}
            for array, values in arrays.items():
                with (temporary / f"{array}.npy").open("wb") as file:
                    np.save(file, values, allow_pickle=False)
                    os.fsync(file.fileno())
                entries[array] = file_entry(temporary / f"{array}.npy")
            write_json(temporary / "index.json", DerivedRecord(key=key, arrays=entries).model_dump(mode="json"))
            if read_derived(store, name, key) is not None:
                return True
            for other in folder.parent.glob(f"{name}-*"):
                shutil.rmtree(other, ignore_errors=True)
            temporary.rename(folder)
    except (AutointerpError, OSError) as error:
        _log.info("%s is not kept, so that each process computes it: %s", folder, error)
        return False
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def derived_problems(store: Path) -> list[str]:
    """Return one sentence per kept array that is not as it was written."""
    problems = []
    for index in sorted((store / FOLDER).glob("*/index.json")):
        try:
            record = DerivedRecord.parse(read_json(index), where=str(index))
        except AutointerpError as error:
            problems.append(str(error))
            continue
        for array, entry in record.arrays.items():
            path = index.parent / f"{array}.npy"
            if not path.is_file() or file_entry(path) != entry:
                problems.append(f"{path} is not as it was written; remove {index.parent}, it is made again when it is needed")
    return problems
