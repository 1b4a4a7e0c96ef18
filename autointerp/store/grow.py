"""Growing a finished store to more tokens.

The larger store is built in ``building/grown``, a store of its own: the full runs of contexts that are there already are taken
over as committed runs (their tokens and documents linked, their activations a sorted source of the merge), and the corpus goes
on behind them. A last run that is short is recorded again, so that runs, and with them batches and files, are those of a store
built at once. When the larger store holds every coder it takes the place of the smaller one, file by file; its own manifest,
moved last, is the journal of that: whoever finds it there, and none in the store, goes on moving.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from autointerp.config import Config
from autointerp.errors import StoreError
from autointerp.files import TEMPORARY_PREFIX, sync_folder, write_sealed
from autointerp.store.corpus import iterate_contexts
from autointerp.store.layout import BUILDING, GROWN, MANIFEST, STATE, FileEntry, documents_part, run_marker, tokens_part
from autointerp.store.manifest import Manifest, read_manifest
from autointerp.store.runs import Run

_DERIVED = ("embeddings", "derived")
"""Folders of what was computed from the tokens, besides the tables in the coders' folders."""


class Base(Config):
    """What a larger store takes over from the one it is built from."""

    store_id: str
    """The smaller store."""
    num_contexts: int
    """Contexts taken over, of whole runs."""
    run_contexts: tuple[int, ...]
    """Contexts in each of these runs."""


def plan_base(path: Path, manifest: Manifest, *, contexts_per_run: int) -> Base:
    """Return what is taken over from the finished store at `path`: its runs, but for a last one that is short.

    `contexts_per_run`: length of a run where neither the manifest nor an earlier run tells.
    """
    sizes = [_entry(manifest, name).num_rows or 0 for name in _parts(manifest, "tokens/")]
    full = manifest.provenance.get("contexts_per_run") or (sizes[0] if len(sizes) > 1 else contexts_per_run)
    last = [len(tokens) for tokens in iterate_contexts([path / tokens_part(len(sizes) - 1)])]
    if sizes[-1] < full or last[-1] < manifest.identity.ctx_len:
        sizes.pop()
    return Base(store_id=manifest.store_id, num_contexts=sum(sizes), run_contexts=tuple(sizes))


def tail_parts(path: Path, base: Base) -> list[Path]:
    """Return the token parts of the smaller store that are not taken over."""
    return [path / name for name in _parts(read_manifest(path), "tokens/")[len(base.run_contexts) :]]


def take_over(path: Path, base: Base, *, coders: list[str], build: str) -> None:
    """Make the runs of the store at `path` committed runs of the larger one; may be killed and called again."""
    manifest, grown = read_manifest(path), path / GROWN
    for name in manifest.files:
        if name.startswith("tokenizer/"):
            _link(path / name, grown / name)
    first = 0
    for run, num_contexts in enumerate(base.run_contexts):
        tokens, documents = tokens_part(run), documents_part(run)
        if not (grown / run_marker(run)).exists():
            for name in (tokens, documents):
                _link(path / name, grown / name)
            marker = Run(
                run=run,
                first_context=first,
                num_contexts=num_contexts,
                num_tokens=sum(len(context) for context in iterate_contexts([path / tokens])),
                num_documents=_entry(manifest, documents).num_rows or 0,
                files={coder: [] for coder in coders},
                tokens=_entry(manifest, tokens),
                documents=_entry(manifest, documents),
                build=build,
            )
            write_sealed(grown / run_marker(run), marker.model_dump(mode="json"))
        first += num_contexts


def _parts(manifest: Manifest, prefix: str) -> list[str]:
    return [name for name in sorted(manifest.files) if name.startswith(prefix)]


def _entry(manifest: Manifest, name: str) -> FileEntry:
    if name not in manifest.files:
        raise StoreError(f"{name} is not in the manifest of the store that is to grow; build it again in another folder")
    return manifest.files[name]


def _link(source: Path, target: Path) -> None:
    """Give a committed file a second name, or copy it where the disk has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{target.name}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    # Where both are names of one file already, `replace` leaves both.
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)


def is_swap_due(path: Path) -> bool:
    """Return whether a larger store holds all coders of the one at `path`, or is moving into its place already."""
    if not (path / GROWN / MANIFEST).exists():
        return False
    there = read_manifest(path).extent.coders if (path / MANIFEST).exists() else {}
    return set(there) <= set(read_manifest(path / GROWN).extent.coders)


def swap_if_due(path: Path) -> bool:
    """Put a finished larger store in the place of the one at `path`, or go on doing so; only for who holds the lock alone.

    Returns whether there was one. What was derived from the smaller store is removed.
    """
    if not is_swap_due(path):
        if not (path / GROWN / MANIFEST).exists() and not (path / GROWN / STATE).exists():
            shutil.rmtree(path / GROWN, ignore_errors=True)  # of a swap that was killed while it cleaned up
        return False
    grown = read_manifest(path / GROWN)
    (path / MANIFEST).unlink(missing_ok=True)
    sync_folder(path)
    shutil.rmtree(path / GROWN / BUILDING, ignore_errors=True)
    is_larger = grown.provenance["extended"][-1]["store_id"] != grown.store_id
    if is_larger:
        for name in _DERIVED:
            shutil.rmtree(path / name, ignore_errors=True)
    for folder in ("tokens", "documents", "coders"):
        for file in sorted((path / folder).rglob("*")):
            is_derived = folder == "coders" and file.parent.parent.name == "coders"
            if file.is_file() and file.relative_to(path).as_posix() not in grown.files and (is_larger or not is_derived):
                file.unlink()
    for name in grown.files:
        if (path / GROWN / name).exists():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(path / GROWN / name, path / name)
    for parent in sorted({(path / name).parent for name in grown.files}):
        sync_folder(parent)
    os.replace(path / GROWN / MANIFEST, path / MANIFEST)
    sync_folder(path)
    shutil.rmtree(path / GROWN)
    return True
