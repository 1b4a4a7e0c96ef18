"""Where things lie inside a store's folder, and the record of a file that belongs to it.

``building/`` exists only while something is being written: the state, the spilled runs, the progress of merges and the lock.
Everything outside it is in its final place and form.
"""

from __future__ import annotations

import re
from pathlib import Path

from autointerp.config import Config
from autointerp.digest import digest_file
from autointerp.errors import InputError

SCHEMA_VERSION = 1
"""Number of the store's layout; readers refuse larger ones."""

ROW_GROUP_ROWS = 1 << 14
"""Activations in one row group: what one random access decodes at least. By measurement: 0.2 ms, and 1.0 ms for four times as
many, which would take 0.2% less disk."""
PART_ROWS = 1 << 26
"""Activations in one part, unless a single latent has more."""

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
VOCABULARY = "tokenizer/vocab.parquet"

BUILDING = "building"
LOCK_NAME = "lock"
GROWN = "building/grown"
"""A store of more tokens being built from this one; it takes its place once it holds all its coders."""
STATE = "building/state.json"
CORPUS = "building/corpus.json"
"""Written when every run is committed: the extent of the corpus and its digest."""

_CODER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,199}")


class FileEntry(Config):
    """A committed file, as its content was when it was committed."""

    digest: str
    """Digest of the bytes."""
    num_bytes: int
    """Size."""
    num_rows: int | None = None
    """Rows of a parquet file, None for other files."""


def file_entry(path: Path, *, num_rows: int | None = None) -> FileEntry:
    """Return the record of a file as it is now."""
    return FileEntry(digest=digest_file(path), num_bytes=path.stat().st_size, num_rows=num_rows)


def damage(path: Path, entry: FileEntry) -> str | None:
    """Return in a sentence how a file differs from what was committed, None when it does not."""
    if not path.is_file():
        return f"{path} is missing; restore it, or build the store again"
    size = path.stat().st_size
    if size != entry.num_bytes:
        return f"{path} has {size} bytes and had {entry.num_bytes} when it was written; restore it, or build again"
    if (found := digest_file(path)) != entry.digest:
        return f"{path} has the digest {found} and had {entry.digest} when it was written; restore it, or build again"
    return None


def tokens_part(run: int) -> str:
    """Return where the contexts of a run lie."""
    return f"tokens/part-{run:05d}.parquet"


def documents_part(run: int) -> str:
    """Return where the documents that begin in a run lie."""
    return f"documents/part-{run:05d}.parquet"


def coder_folder(coder: str) -> str:
    """Return the folder of a coder."""
    return f"coders/coder={coder}"


def activations_part(coder: str, part: int) -> str:
    """Return where a part of a coder's activations lies."""
    return f"coders/coder={coder}/activations/part-{part:05d}.parquet"


def latents_file(coder: str) -> str:
    """Return where the one row per latent of a coder lies."""
    return f"coders/coder={coder}/latents.parquet"


def coder_file(coder: str) -> str:
    """Return where a coder's record lies."""
    return f"coders/coder={coder}/coder.json"


def run_folder(coder: str) -> str:
    """Return where the spilled runs of a coder lie, and what some of them were merged into."""
    return f"building/runs/coder={coder}"


def run_marker(run: int) -> str:
    """Return the file whose existence says that a run is committed."""
    return f"building/runs/run-{run:05d}.json"


def merged_part(coder: str, part: int) -> str:
    """Return the file whose existence says that a part is merged; it holds the part's rows of ``latents.parquet``."""
    return f"building/merge/coder={coder}/part-{part:05d}.parquet"


def merged_marker(coder: str) -> str:
    """Return the file whose existence says that a coder is merged."""
    return f"building/merge/coder={coder}/done.json"


def check_coder_names(names: list[str]) -> None:
    """Refuse names that are no folder names everywhere, or that differ in case only.

    Raises: InputError.
    """
    seen: dict[str, str] = {}
    for name in names:
        if not _CODER_NAME.fullmatch(name):
            raise InputError(
                f"the coder name {name!r} cannot be a folder name; use letters, digits, '.', '_', '-', '+' and '@', at most 200"
            )
        other = seen.setdefault(name.lower(), name)
        if other != name:
            raise InputError(f"the coder names {other!r} and {name!r} differ in case only, and some disks take them for one")
