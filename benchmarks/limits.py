"""A command under a memory limit that is set from outside, and what it used: memory, page cache included, and disk."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

_CONTROLLER = Path("/sys/fs/cgroup/memory")
_MB = 1e6
_SECONDS_BETWEEN_LOOKS = 0.1
_LOOKS_PER_DISK = 50


@dataclass(kw_only=True)
class Used:
    """What a command took."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    exit_code: int = 0
    limit_mb: float | None = None
    """None: no limit could be set."""
    peak_mb: float | None = None
    """``memory.max_usage_in_bytes``: the page cache of what the command read and wrote counts, and fills the limit in time."""
    anonymous_mb: float = 0.0
    """The most anonymous resident memory seen, ten times a second: what the kernel cannot take back."""
    times_at_limit: int = 0
    """``memory.failcnt``: how often the kernel took page cache back so that the limit held."""
    peak_disk: dict[str, int] | None = None
    """Most bytes below each watched folder, looked at every five seconds."""

    def values(self) -> dict[str, object]:
        """Return the figures as JSON values."""
        return asdict(self)


def why_no_limit() -> str | None:
    """Return why no memory limit can be set here, None where it can."""
    if not (_CONTROLLER / "memory.limit_in_bytes").exists():
        return f"there is no memory controller of control groups, version 1, at {_CONTROLLER}"
    return None if os.access(_CONTROLLER, os.W_OK) else f"{_CONTROLLER} may not be written to; it takes root"


def run_limited(
    command: Sequence[str], *, limit_bytes: int | None, environment: Mapping[str, str], log: Path, watched: Mapping[str, Path],
    kill_after_cpu_s: float | None = None,
) -> Used:  # fmt: skip
    """Run `command` in a control group of its own, its output appended to `log`; SIGKILL it after so many CPU-s of its own.

    With `limit_bytes` None, or where :func:`why_no_limit` says so, without a limit.
    """
    group = None
    if limit_bytes is not None and why_no_limit() is None:
        group = _CONTROLLER / f"autointerp-benchmark-{os.getpid()}"
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
    used = Used(limit_mb=limit_bytes / _MB if group and limit_bytes else None, peak_disk=dict.fromkeys(watched, 0))
    started, before = time.monotonic(), os.times()
    try:
        with log.open("ab") as output:
            # The shell enters the group and becomes the command, so that all of it is counted there.
            enter = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs")] if group else []
            process = subprocess.Popen([*enter, *command], stdout=output, stderr=output, env=dict(environment))
            looks = 0
            while process.poll() is None:
                if kill_after_cpu_s is not None and _cpu_seconds(process.pid) >= kill_after_cpu_s:
                    process.kill()
                used.anonymous_mb = max(used.anonymous_mb, _anonymous_mb(process.pid))
                if looks % _LOOKS_PER_DISK == 0:
                    for name, folder in watched.items():
                        used.peak_disk[name] = max(used.peak_disk[name], disk_bytes(folder))
                looks += 1
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        used.exit_code = process.returncode
        used.seconds = time.monotonic() - started
        after = os.times()
        used.cpu_seconds = after.children_user + after.children_system - before.children_user - before.children_system
        if group:
            used.peak_mb = int((group / "memory.max_usage_in_bytes").read_text()) / _MB
            used.times_at_limit = int((group / "memory.failcnt").read_text())
    finally:
        if group:
            group.rmdir()
    return used


def _cpu_seconds(pid: int) -> float:
    with suppress(OSError):
        # After the name, which may hold spaces, come the fields from the third on.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _anonymous_mb(pid: int) -> float:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024 / _MB
    return 0.0


def disk_bytes(folder: Path) -> int:
    """Return the bytes of all files below `folder`, of which some may go while they are counted."""
    total = 0
    for path, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):
                total += os.lstat(os.path.join(path, name)).st_size
    return total
