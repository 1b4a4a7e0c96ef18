"""What every benchmark report carries: date, hardware, versions and configuration."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

REPORTS = Path(__file__).parent / "reports"


def machine() -> str:
    """Return one line about the processor, cores and memory."""
    model = next(
        (line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")),
        platform.processor(),
    ) if Path("/proc/cpuinfo").exists() else platform.processor()  # fmt: skip
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}"


def versions(*packages: str) -> str:
    """Return ``name version`` for each package."""
    return ", ".join(f"{name} {version(name)}" for name in packages)


def write_report(
    name: str, body: str, *, suffix: str = "", packages: tuple[str, ...] = ("torch", "transformers", "pyarrow", "numpy")
) -> Path:
    """Write ``reports/DATE-name[suffix].md`` with the machine, the command line and `body`; return its path."""
    now = datetime.now(UTC)
    REPORTS.mkdir(exist_ok=True)
    path = REPORTS / f"{now:%Y-%m-%d}-{name}{suffix}.md"
    command = " ".join(["python -m", f"benchmarks.{name}", *sys.argv[1:]])
    path.write_text(
        f"# {name}, {now:%Y-%m-%d}\n\n- machine: {machine()}\n- versions: {versions(*packages)}\n- command: `{command}`\n\n{body}\n"
    )
    return path
