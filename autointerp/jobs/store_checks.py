"""Whether what `cache` is asked for fits the store that is there: its subject, its coders, its corpus and its size."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from autointerp.errors import IdentityError, InputError
from autointerp.files import read_sealed
from autointerp.store.layout import GROWN, MANIFEST, STATE, coder_file
from autointerp.store.manifest import CoderExtent, read_coder, read_manifest
from autointerp.subject.corpus import CorpusConfig


def coders_there(path: Path) -> Mapping[str, CoderExtent]:
    """Return the coders of the finished store, if there is one."""
    return read_manifest(path).extent.coders if (path / MANIFEST).exists() else {}


def recorded_k(path: Path, name: str) -> int | None:
    """Return the k with which a control is in the store or was begun there, so that it is never measured twice."""
    if (path / coder_file(name)).exists():
        return read_coder(path, name).k
    begun = read_sealed(path / STATE)["coders"].get(name) if (path / STATE).exists() else None
    return None if begun is None else begun["k"]


def check_not_imported(path: Path) -> None:
    """Raise InputError for a store of unknown subject, to which nothing can be added."""
    if not (path / MANIFEST).exists():
        return
    origin = read_manifest(path).provenance.get("imported")
    if origin is not None:
        raise InputError(
            f"{path} was imported from {origin}, which does not record the subject's weights, so no coder and no control can "
            "be added to it; cache the corpus into another folder"
        )


def will_grow(path: Path, corpus: CorpusConfig, *, is_asked: bool, given: Collection[str]) -> bool:
    """Return whether a finished store is to grow to the tokens of `corpus`, if `is_asked` to; `given` are coders and controls.

    Raises: InputError when it has fewer tokens than wanted and nothing says that it may grow, or more, or a coder is not given.
    """
    wanted = corpus.num_tokens
    if not (path / MANIFEST).exists() or wanted is None:
        return False
    manifest = read_manifest(path)
    num_tokens, made = manifest.extent.num_tokens, manifest.provenance.get("corpus", {})
    limit = made.get("num_tokens")
    is_else_equal = all(value == made.get(name) for name, value in corpus.identity().items() if name != "num_tokens")
    if not is_asked:
        # A corpus that ended before the limit has no more tokens under a larger one.
        if limit is not None and limit < wanted and num_tokens >= limit and is_else_equal:
            raise InputError(
                f"{path} holds {num_tokens:,} tokens and {wanted:,} are wanted; give --extend-tokens {wanted} to let the store "
                "grow, the former number to leave it as it is, or another folder"
            )
        return False
    if wanted < (num_tokens if limit is None else limit):
        raise InputError(
            f"{path} holds {num_tokens:,} tokens and --extend-tokens {wanted} would make that fewer; a store only grows, "
            "so give a larger number or another folder"
        )
    if wanted == limit:
        return False
    missing = [name for name in manifest.extent.coders if name not in given]
    if missing:
        raise InputError(
            f"{path} cannot grow without all of its coders, and these are not given: {', '.join(missing)}; "
            "name every coder (--coder) and control (--control) of the store again"
        )
    return True


def check_corpus_of_unfinished(path: Path, corpus: CorpusConfig, *, is_growing: bool) -> None:
    """Raise IdentityError when a store under way was started for another corpus."""
    if is_growing:
        begun = next((path / GROWN / name for name in (STATE, MANIFEST) if (path / GROWN / name).exists()), None)
    else:
        begun = path / STATE if (path / STATE).exists() and not (path / MANIFEST).exists() else None
    if begun is None:
        return
    there = read_sealed(begun).get("provenance", {}).get("corpus")
    here = corpus.identity()
    differs = [name for name in here if there is not None and there.get(name) != here[name]]
    if differs:
        name = differs[0]
        how, instead = "was started", "another folder"
        if is_growing:
            how, instead = "began to grow", f"remove {path / GROWN} to give that up"
        raise IdentityError(
            f"{path} {how} with corpus.{name} = {there.get(name)!r} and {here[name]!r} is wanted now; "
            f"use the former, or {instead}"
        )
