"""The source of Python's own standard library as a corpus that every machine has.

Owns which files count, their order and which of them the bundled demo's subject never saw. Nothing of the
library is shipped; the files are read from the running interpreter's own installation.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT: frozenset[str] = frozenset(
    {
        "argparse", "calendar", "configparser", "csv", "difflib", "email", "fractions", "heapq", "imaplib", "json",
        "logging", "random", "smtplib", "statistics", "tarfile", "textwrap", "urllib", "zipfile",
    }
)  # fmt: skip
"""Top-level modules and packages that ``demo/train.py`` kept out of training, with their tests."""

_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "lib-dynload"})
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})


def module_of(relative: Path) -> str:
    """Return the top-level module a library file belongs to: ``email`` for ``email/message.py``.

    A file of the test tree belongs to the module it tests: ``csv`` for ``test/test_csv.py``.
    """
    parts = [part for part in relative.with_suffix("").parts if part not in _TEST_FOLDERS]
    return parts[0].removeprefix("test_") if parts else relative.stem


def stdlib_root() -> Path:
    """Return the folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_files(root: Path | None = None, *, include_tests: bool = False) -> Iterator[Path]:
    """Yield the library's ``.py`` files, held-out modules first, then the rest, each part sorted by path.

    Files of the test tree are left out unless `include_tests`: many installations lack them.
    """
    root = root or stdlib_root()
    skipped = _SKIPPED_FOLDERS if include_tests else _SKIPPED_FOLDERS | _TEST_FOLDERS
    found: list[tuple[bool, str]] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped]  # site-packages may hold 100,000 files
        for name in files:
            if name.endswith(".py"):
                relative = Path(folder, name).relative_to(root)
                found.append((module_of(relative) not in HELD_OUT, relative.as_posix()))
    for _, relative_path in sorted(found):
        yield root / relative_path
