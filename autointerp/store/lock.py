"""Who may write a store: one process alone, or several workers side by side; advisory locks that die with their process.

The operating system holds the locks, so the file that a killed process leaves behind binds nobody. On disks without such locks
the process id and host inside the file decide.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from pathlib import Path
from typing import Any

import orjson

from autointerp.errors import StoreError
from autointerp.files import disk_errors
from autointerp.worker import Worker

_PATIENCE_S, _MOMENT_S = 30.0, 1.0
"""How long a worker waits for another one that starts and so holds the store alone, and for who does not say it is a worker."""


class WriterLock:
    """Holds a store's lock from construction until `release`: alone, or with a `worker` beside other workers after `share`."""

    def __init__(self, path: Path, *, store: Path, worker: Worker | None = None) -> None:
        """Take the lock at `path`. A worker takes one of its own beside it, too.

        Raises: StoreError naming the process that holds it.
        """
        self._store, self._worker = store, worker
        self._handles: list[int] = []
        self.is_alone = True
        """Whether no other process can write now."""
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                if worker is None:
                    self._take(path)
                    self._check_workers(path)
                else:
                    self._take(path.with_name(f"worker-{worker.index}.lock"))
                    self._take_beside(path)
            except BaseException:
                self.release()
                raise

    def _take(self, path: Path, *, is_shared: bool = False) -> None:
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if not _lock(handle, is_shared=is_shared):
                    raise StoreError(_sentence(self._store, path, _holder(handle)))
                # The file may have been removed by its holder between opening and locking it.
                with contextlib.suppress(FileNotFoundError):
                    if os.stat(path).st_ino == os.fstat(handle).st_ino:
                        values = {"pid": os.getpid(), "host": socket.gethostname(), "is_worker": self._worker is not None}
                        os.ftruncate(handle, 0)
                        os.pwrite(handle, orjson.dumps(values), 0)
                        self._handles.append(handle)
                        return
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)

    def _take_beside(self, path: Path) -> None:
        """Take the store's lock alone where nobody has it, else shared with other workers."""
        start = time.monotonic()
        with contextlib.suppress(StoreError):
            self._take(path)
            return
        self.is_alone = False
        while True:
            try:
                self._take(path, is_shared=True)
                return
            except StoreError:
                # What the file says may be of the holder before, who is gone.
                patience = _PATIENCE_S if _read_holder(path).get("is_worker", True) else _MOMENT_S
                if time.monotonic() > start + patience:
                    raise
            time.sleep(0.02)

    def _check_workers(self, path: Path) -> None:
        """Refuse workers that run on a disk without locks, where the store's own lock names only one of them."""
        for file in path.parent.glob("worker-*.lock"):
            self._take(file)
            os.close(self._handles.pop())

    def share(self) -> None:
        """Let other workers in."""
        if self.is_alone and self._worker is not None:
            self.is_alone = False
            # A whole-file lock is converted by dropping and taking it; whoever gets between must be waited for.
            until = time.monotonic() + _PATIENCE_S
            while not _lock(self._handles[-1], is_shared=True):
                if time.monotonic() > until:
                    raise StoreError(f"{self._store} is being written by another process; run this worker again later")
                time.sleep(0.02)

    def release(self) -> None:
        """Let go; safe to call twice."""
        while self._handles:
            os.close(self._handles.pop())


def _lock(handle: int, *, is_shared: bool) -> bool:
    import fcntl  # absent on Windows, where stores are only read

    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL):
            raise
        holder = _holder(handle)
        return (is_shared and bool(holder.get("is_worker"))) or not _is_alive(holder)
    return True


def _read_holder(path: Path) -> dict[str, Any]:
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return {"is_worker": True}
    try:
        return _holder(handle)
    finally:
        os.close(handle)


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


def _sentence(store: Path, lock: Path, holder: dict[str, Any]) -> str:
    who = f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown host')}"
    if lock.name != "lock":
        who = f"{lock.stem.replace('-', ' ')}, {who}"
    return (
        f"{store} is being written by {who}; wait for it, or stop it and run the same command again "
        f"(if that process is gone, remove {lock})"
    )
