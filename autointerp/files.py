"""Files that appear whole or not at all: write under a temporary name, flush to disk, rename.

A temporary file's name starts with ``.tmp-``, so readers that list a folder skip it and a later run may remove it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from autointerp.digest import digest
from autointerp.errors import ResourceError, StoreError

TEMPORARY_PREFIX = ".tmp-"
_SEAL = "seal"


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into one sentence.

    Raises: ResourceError naming `path`.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"cannot write {path}: the disk is full; free some space and run the same command again, finished work is kept"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES):
            raise ResourceError(
                f"cannot write {path}: permission denied; choose a folder you may write to with --out"
            ) from error
        raise


@contextmanager
def committed(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it to `path`, else remove it.

    Raises: ResourceError when the disk is full.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{path.name}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            sync_file(temporary)
            temporary.replace(path)
            sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def sync_file(path: Path) -> None:
    """Flush a file's content to disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut. Does nothing where folders cannot be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Commit `value` as indented JSON with sorted keys and a final newline."""
    options = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY
    with committed(path) as temporary:
        temporary.write_bytes(orjson.dumps(value, option=options))


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Commit `values` as :func:`write_json` does, with a digest of them under ``seal``."""
    plain = orjson.loads(orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY))
    write_json(path, plain | {_SEAL: digest(plain)})


def read_sealed(path: Path) -> Any:
    """Return what :func:`write_sealed` committed, without its seal; what has none is returned as it is.

    Raises: StoreError when the file is missing, not JSON, or not what was committed.
    """
    values = read_json(path)
    if isinstance(values, dict) and (seal := values.pop(_SEAL, None)) is not None and seal != digest(values):
        raise StoreError(f"{path} is not as it was written: its seal is of other values; restore it, or build again")
    return values


def read_json(path: Path) -> Any:
    """Return the JSON value in a file.

    Raises: StoreError when the file is missing or not JSON.
    """
    try:
        return orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise StoreError(f"{path} does not exist") from None
    except orjson.JSONDecodeError as error:
        raise StoreError(f"{path} is not valid JSON ({error}); it is damaged, restore it or make it again") from error


def clear_temporary(folder: Path) -> int:
    """Remove what earlier, killed processes left half-written in `folder`; return how many files that was.

    Files of processes that still run are left alone.
    """
    removed = 0
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        pid = path.name.removeprefix(TEMPORARY_PREFIX).split("-", 1)[0]
        if pid.isdigit() and int(pid) != os.getpid() and _is_running(int(pid)):
            continue
        path.unlink(missing_ok=True)
        removed += 1
    return removed


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
