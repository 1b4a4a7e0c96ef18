"""The leases that keep two workers off one shard.

A lease is a small file ``<name>.g<generation>``; the highest generation is the one that counts. It is made by a hard link,
which fails when the name is taken, so two stealers of one stale lease cannot both win. Its mtime is the heartbeat; a
released lease has mtime 0. Generations only rise while there is work left, hence a slow stealer can never mistake a new
lease for the stale one it saw. Times are those of the file system, so clocks of machines need not agree.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autointerp.digest import canonical_json
from autointerp.errors import ResourceError, StoreError
from autointerp.files import TEMPORARY_PREFIX, disk_errors, read_json
from autointerp.results.folder import link_exclusive

logger = logging.getLogger("autointerp.jobs")

LEASE_EXPIRY_S = 120.0
"""A lease whose heartbeat is older than this belongs to nobody."""


@dataclass
class Lease:
    """A held lease; `is_lost` turns True when another worker took it over."""

    path: Path
    token: str
    is_lost: bool = False


class Leases:
    """The leases of one process on one results folder, kept alive by a thread."""

    def __init__(self, folder: Path, *, expiry_s: float = LEASE_EXPIRY_S) -> None:
        self._folder = folder
        self._expiry_s = expiry_s
        self._held: dict[str, Lease] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, name: str) -> Lease | None:
        """Take the lease `name` (a relative path) when nobody alive holds it; None otherwise."""
        base = self._folder / name
        found = _generations(base)
        now = None
        if found:
            highest = found[-1]
            now = self._now(base)
            if self._is_alive(_path(base, highest), now):
                return None
        generation = found[-1] + 1 if found else 0
        path = _path(base, generation)
        token = secrets.token_hex(8)
        if not self._create(path, token):
            return None
        if _generations(base)[-1] != generation:
            path.unlink(missing_ok=True)
            return None
        for older in found:
            _path(base, older).unlink(missing_ok=True)
        lease = Lease(path, token)
        with self._lock:
            self._held[name] = lease
            if self._thread is None:
                self._thread = threading.Thread(target=self._beat, name="autointerp-leases", daemon=True)
                self._thread.start()
        return lease

    def release(self, name: str, *, is_done: bool) -> None:
        """Give a lease back; with `is_done` its file goes too, for whoever takes it next finds nothing to do."""
        with self._lock:
            lease = self._held.pop(name, None)
        if lease is None or self._check(lease):
            return
        with contextlib.suppress(OSError):
            if is_done:
                lease.path.unlink(missing_ok=True)
            else:
                os.utime(lease.path, (0, 0))

    def is_lost(self, name: str) -> bool:
        """Whether another worker took the lease over (this process was suspended for longer than a lease lives)."""
        with self._lock:
            lease = self._held.get(name)
        return lease is None or self._check(lease)

    @contextlib.contextmanager
    def waiting(self, name: str, *, timeout_s: float = 600.0) -> Iterator[Lease]:
        """Hold the lease `name`, waiting for whoever has it.

        Raises: ResourceError when it does not come free in time.
        """
        deadline = time.monotonic() + timeout_s
        while (lease := self.acquire(name)) is None:
            if time.monotonic() > deadline:
                raise ResourceError(
                    f"another process has held {self._folder / name} for {timeout_s:.0f} s; stop it and try again"
                )
            time.sleep(0.05)
        try:
            yield lease
        finally:
            self.release(name, is_done=False)

    def held_by_others(self, name: str) -> bool:
        """Whether somebody alive, and not this process, holds the lease."""
        base = self._folder / name
        found = _generations(base)
        with self._lock:
            if name in self._held:
                return False
        return bool(found) and self._is_alive(_path(base, found[-1]), self._now(base))

    def close(self) -> None:
        """Release everything and stop the heartbeat."""
        for name in list(self._held):
            self.release(name, is_done=False)
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _create(self, path: Path, token: str) -> bool:
        temporary = path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{token}")
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(canonical_json({"token": token, **_owner()}))
                return link_exclusive(temporary, path, is_durable=False)
            finally:
                temporary.unlink(missing_ok=True)

    def _now(self, base: Path) -> float:
        """Time by the clock of the file system that holds the leases."""
        with disk_errors(base):
            base.parent.mkdir(parents=True, exist_ok=True)
            probe = base.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{threading.get_ident()}-clock")
            probe.touch()
            try:
                return probe.stat().st_mtime
            finally:
                probe.unlink(missing_ok=True)

    def _is_alive(self, path: Path, now: float) -> bool:
        try:
            beat = path.stat().st_mtime
            owner = read_json(path)
        except (FileNotFoundError, StoreError):
            return False
        if now - beat > self._expiry_s:
            return False
        return not _is_gone(owner)

    def _check(self, lease: Lease) -> bool:
        """Whether the lease is lost; remembers it."""
        if not lease.is_lost:
            base = lease.path.with_suffix("")
            found = _generations(base)
            try:
                token = read_json(lease.path)["token"]
            except (StoreError, KeyError):
                token = None
            lease.is_lost = token != lease.token or (bool(found) and _path(base, found[-1]) != lease.path)
        return lease.is_lost

    def _beat(self) -> None:
        while not self._stop.wait(min(self._expiry_s / 8, 15.0)):
            with self._lock:
                held = list(self._held.items())
            for name, lease in held:
                if self._check(lease):
                    logger.warning("the lease %s was taken over by another worker; its shard is left to that one", name)
                    continue
                with contextlib.suppress(OSError):
                    os.utime(lease.path)


def _path(base: Path, generation: int) -> Path:
    return base.with_name(f"{base.name}.g{generation}")


def _generations(base: Path) -> list[int]:
    found = (path.name.rpartition(".g")[2] for path in base.parent.glob(f"{base.name}.g*"))
    return sorted(int(text) for text in found if text.isdigit())


def _owner() -> dict[str, Any]:
    return {"host": host(), "pid": os.getpid(), "born": _born(os.getpid())}


def host() -> str:
    """Return a name for the set of processes that this one can see: machine and, in a container, its pid namespace."""
    try:
        return f"{socket.gethostname()}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _born(pid: int) -> str | None:
    """Start time of a process, so that a reused pid is not taken for it; None for a dead one, or where nobody says."""
    try:
        values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if values[0] in "ZX" else values[19]
    except (OSError, IndexError):
        return None


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether the owner certainly ended: it ran where this process can look, and is not there."""
    if owner.get("host") != host():
        return False
    pid = int(owner["pid"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return owner.get("born") != _born(pid)
