"""One writer per store: an advisory lock that dies with its process.

The operating system holds the lock, so the file that a killed process leaves behind binds nobody. On disks without such locks
the process id and host inside the file decide.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from pathlib import Path
from typing import Any

import orjson

from autointerp.errors import StoreError
from autointerp.files import disk_errors


class WriterLock:
    """Holds ``building/lock`` of a store from construction until `release`."""

    def __init__(self, path: Path, *, store: Path) -> None:
        """Take the lock.

        Raises: StoreError naming the process that holds it.
        """
        self._path = path
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = self._take(store)
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, orjson.dumps({"pid": os.getpid(), "host": socket.gethostname()}), 0)

    def _take(self, store: Path) -> int:
        while True:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if not _lock(handle):
                    raise StoreError(_sentence(store, _holder(handle)))
                # The file may have been removed by its holder between opening and locking it.
                with contextlib.suppress(FileNotFoundError):
                    if os.stat(self._path).st_ino == os.fstat(handle).st_ino:
                        return handle
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)

    def release(self) -> None:
        """Let go; safe to call twice."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def _lock(handle: int) -> bool:
    import fcntl  # absent on Windows, where stores are only read

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL):
            raise
        return not _is_alive(_holder(handle))
    return True


def _holder(handle: int) -> dict[str, Any]:
    try:
        value = orjson.loads(os.pread(handle, 4096, 0))
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _is_alive(holder: dict[str, Any]) -> bool:
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid == os.getpid():
        return False
    if holder.get("host") != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sentence(store: Path, holder: dict[str, Any]) -> str:
    who = f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown host')}"
    return (
        f"{store} is being written by {who}; wait for it, or stop it and run the same command again "
        f"(if that process is gone, remove {store / 'building' / 'lock'})"
    )
