"""The steps of a build that are on disk: its state, what is merged, and cleaning up."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from autointerp import __version__
from autointerp.config import Config
from autointerp.digest import digest
from autointerp.errors import ConfigError, IdentityError, InputError, StoreError
from autointerp.files import TEMPORARY_PREFIX, read_sealed, sync_file, sync_folder, write_json, write_sealed
from autointerp.store.arrays import give_back_memory
from autointerp.store.corpus import documents_schema
from autointerp.store.grow import Base, plan_base
from autointerp.store.latents import LATENTS
from autointerp.store.layout import (
    BUILDING,
    GROWN,
    LOCK_NAME,
    MANIFEST,
    STATE,
    TOKENIZER,
    FileEntry,
    activations_part,
    check_coder_names,
    coder_file,
    documents_part,
    file_entry,
    latents_file,
    merged_marker,
    merged_part,
    run_folder,
    tokens_part,
)
from autointerp.store.manifest import (
    CoderExtent,
    CoderRecord,
    Identity,
    Manifest,
    check_coder_identity,
    check_identity,
    coder_id_of,
    read_coder,
    read_manifest,
)
from autointerp.store.merge import MergeOptions, SpilledCoder, StoredParts, merge_parts
from autointerp.store.parquet import iterate_tables, parquet_sink
from autointerp.store.premerge import premerge, range_rows
from autointerp.store.runs import Run, contexts_in_run

_UNKNOWN_L0 = 64.0
_MAX_RUN_POSITIONS = (1 << 31) - 1


class BuildState(Config):
    """What was settled when a build began; a resumed one reads it and changes nothing."""

    made_from: Identity
    """Identity of the store; its tokens digest is known when all are stored, or given."""
    coders: dict[str, CoderRecord]
    """The coders whose activations are wanted."""
    contexts_per_run: int
    """Contexts in a full run."""
    memory_budget_bytes: int
    """Memory for buffers and merges."""
    row_group_rows: int
    """Activations in a row group."""
    part_rows: int
    """Activations in a part."""
    document_columns: dict[str, str]
    """Types of the kept columns."""
    provenance: dict[str, Any]
    """As the caller gave it."""
    adds_coders: bool = False
    """Whether the store was finished before and holds the corpus."""
    base: Base | None = None
    """What is taken over from a smaller store, the one in whose folder this one is built."""
    num_workers: int | None = None
    """Among how many workers the runs are divided; None where one process writes."""

    @classmethod
    def plan(
        cls,
        *,
        identity: Identity,
        coders: Mapping[str, CoderRecord],
        l0: Mapping[str, float],
        contexts_per_run: int | None,
        memory_budget_bytes: int,
        **rest: Any,
    ) -> Self:
        """Return the state of a new build.

        Raises: InputError for names that cannot be folders; ConfigError for settings out of range.
        """
        if not coders:
            raise InputError("a store needs at least one coder and none was given")
        check_coder_names(list(coders))
        documents_schema(rest["document_columns"])
        if contexts_per_run is None:
            total = sum(l0.get(name) or record.k or _UNKNOWN_L0 for name, record in coders.items())
            contexts_per_run = contexts_in_run(memory_budget_bytes, ctx_len=identity.ctx_len, l0=total)
        if not 1 <= contexts_per_run or contexts_per_run * identity.ctx_len > _MAX_RUN_POSITIONS:
            raise ConfigError(
                f"a run of {contexts_per_run} contexts of {identity.ctx_len} tokens cannot be spilled; "
                f"expected 1 to {_MAX_RUN_POSITIONS // identity.ctx_len} contexts"
            )
        return cls(
            made_from=identity,
            coders=dict(sorted(coders.items())),
            contexts_per_run=contexts_per_run,
            memory_budget_bytes=memory_budget_bytes,
            **rest,
        )

    @property
    def run_digest(self) -> str:
        """Of what decides how runs are cut and what is in them."""
        names = {"made_from", "contexts_per_run", "document_columns", "adds_coders", "base"}
        coders = {name: record.identity() for name, record in self.coders.items()}
        return digest({**self.model_dump(mode="json", include=names), "coders": coders})

    def check_runs(self, runs: Mapping[int, Run], path: Path) -> None:
        """Refuse runs that were recorded elsewhere with other settings.

        Raises: IdentityError.
        """
        for number, run in runs.items():
            if run.build not in (None, self.run_digest):
                raise IdentityError(
                    f"run {number} of {path} was recorded with other settings than {STATE} says; only folders of workers that "
                    "were given the same command, with the same memory budget or contexts_per_run, can be put together"
                )

    def check(self, wanted: BuildState, path: Path) -> None:
        """Compare a build under way with what is wanted now.

        Raises: IdentityError when it was started with other inputs.
        """
        check_identity(self.made_from, wanted.made_from, where=path)
        if not self.adds_coders and self.document_columns != wanted.document_columns:
            raise IdentityError(
                f"{path} was started with kept columns {self.document_columns} and {wanted.document_columns} are wanted now; "
                "use the former, or another folder"
            )
        if list(self.coders) != list(wanted.coders):
            raise IdentityError(
                f"{path} is unfinished with the coders {', '.join(self.coders)}, and {', '.join(wanted.coders)} are wanted; "
                "finish it with the former (and the former --coders-per-pass), then add coders"
            )
        for name, record in self.coders.items():
            check_coder_identity(record, wanted.coders[name], coder=name, where=path)

    def check_corpus(self, path: Path, corpus: Corpus, manifest: Manifest | None) -> None:
        """Compare the digest of the tokens that were stored with the one that was named.

        Raises: IdentityError.
        """
        named = manifest.identity.tokens_digest if manifest is not None else self.made_from.tokens_digest
        if named not in (None, corpus.tokens_digest):
            raise IdentityError(
                f"{path} was started for tokens of digest {named} and those stored have {corpus.tokens_digest}; "
                "the corpus changed: build again in another folder"
            )

    def all_provenance(self, before: Manifest | None, *, smaller: Manifest | None, num_runs: int) -> dict[str, Any]:
        """Return how the store was made, this build appended to what was there `before`; `smaller`: what it grew from."""
        build = {
            **self.provenance,
            "autointerp": __version__,
            "pyarrow": pa.__version__,
            "num_runs": num_runs,
            "contexts_per_run": self.contexts_per_run,
            "memory_budget_bytes": self.memory_budget_bytes,
        }
        if before is None and smaller is not None:
            grown = {"store_id": smaller.store_id, "num_tokens": smaller.extent.num_tokens}
            history = {"added": smaller.provenance["added"]} if "added" in smaller.provenance else {}
            return {**build, **history, "extended": [*smaller.provenance.get("extended", []), grown]}
        if before is None:
            return build
        added = [*before.provenance.get("added", []), {"coders": list(self.coders), **build}]
        return {**before.provenance, "added": added}


class Corpus(Config):
    """The extent of the whole corpus; its file says that every run is committed."""

    num_contexts: int
    """Contexts stored."""
    num_tokens: int
    """Tokens in them."""
    num_documents: int
    """Documents they come from."""
    tokens_digest: str
    """Digest of the token ids in order."""


class MergedCoder(Config):
    """What a merged coder came to: the content of its marker."""

    extent: CoderExtent
    """How much is there."""
    files: dict[str, FileEntry]
    """Its files, by path within the store."""


def to_grow(path: Path, wanted: BuildState) -> BuildState:
    """Return the state for growing the finished store at `path`.

    Raises: IdentityError when it was made from other inputs; InputError for a coder that it lacks.
    """
    manifest = read_manifest(path)
    check_identity(manifest.identity, wanted.made_from, where=path)
    for name, record in wanted.coders.items():
        if name not in manifest.extent.coders:
            raise InputError(f"{path} has no coder {name!r} whose activations could be extended; extend the store, then add it")
        check_coder_identity(read_coder(path, name), record, coder=name, where=path)
    return wanted.model_copy(update={"base": plan_base(path, manifest, contexts_per_run=wanted.contexts_per_run)})


def open_build(path: Path, wanted: BuildState, *, may_begin: bool = True) -> tuple[BuildState | None, Manifest | None]:
    """Return the state to build with (None: nothing is left to do) and the manifest of a store that was finished before.

    `may_begin`: whether no other process writes, so that the state may be made or changed.

    Raises: IdentityError when what is there was made from other inputs; StoreError when it is no store.
    """
    manifest = read_manifest(path) if (path / MANIFEST).exists() else None
    state = BuildState.parse(read_sealed(path / STATE), where=str(path / STATE)) if (path / STATE).exists() else None
    if manifest is None and state is None:
        for folder in ("tokens", "documents", "coders"):
            if (path / folder).exists():
                raise StoreError(f"{path} holds a folder {folder!r} and no store, finished or begun; use another folder")
        return _begin(path, wanted, may_begin), None
    if manifest is None:
        assert state is not None
        state.check(wanted, path)
        return _with_workers(path, state, wanted, may_begin), None
    check_identity(manifest.identity, wanted.made_from, where=path)
    for name in set(manifest.extent.coders) & set(wanted.coders):
        check_coder_identity(read_coder(path, name), wanted.coders[name], coder=name, where=path)
    missing = {name: record for name, record in wanted.coders.items() if name not in manifest.extent.coders}
    if not missing:
        return None, manifest
    if state is not None and not set(state.coders) <= set(manifest.extent.coders):
        state.check(wanted.model_copy(update={"coders": missing}), path)
        return _with_workers(path, state, wanted, may_begin), manifest
    check_coder_names([*manifest.extent.coders, *missing])
    return _begin(path, wanted.model_copy(update={"coders": missing, "adds_coders": True}), may_begin), manifest


def _with_workers(path: Path, state: BuildState, wanted: BuildState, may_begin: bool) -> BuildState:
    """Return the state, its runs divided among as many workers as are wanted now.

    Raises: IdentityError while others are at work.
    """
    if wanted.num_workers is None or wanted.num_workers == state.num_workers:
        return state
    if not may_begin:
        raise IdentityError(
            f"{path} is being written by workers of {state.num_workers}, and this is one of {wanted.num_workers}; give every "
            "worker the same N, or wait until none is running"
        )
    state = state.model_copy(update={"num_workers": wanted.num_workers})
    write_sealed(path / STATE, state.model_dump(mode="json"))
    return state


def _begin(path: Path, state: BuildState, may_begin: bool) -> BuildState:
    if not may_begin:
        raise StoreError(
            f"{path} is being written by other workers, at something else; run this worker again when they are done"
        )
    # A build that was finished and not quite cleaned up must not lend this one its markers; its state goes first.
    (path / STATE).unlink(missing_ok=True)
    _empty_building(path)
    write_sealed(path / STATE, state.model_dump(mode="json"))
    return state


def is_done(path: Path, manifest: Manifest) -> bool:
    """Return whether what is in the folder of a build is of no more use: all its coders are in the store."""
    return not (path / STATE).exists() or set(read_sealed(path / STATE)["coders"]) <= set(manifest.extent.coders)


def clean(path: Path) -> None:
    """Remove what killed processes left half-written; only for the process that holds the lock."""
    for file in list(path.rglob(f"{TEMPORARY_PREFIX}*")):
        if file.is_dir():
            shutil.rmtree(file, ignore_errors=True)
        else:
            file.unlink(missing_ok=True)


def remove_building(path: Path) -> None:
    """Remove what is needed only while a store is being built; a larger store that is built from it stays."""
    _empty_building(path)
    folder = path / BUILDING
    if folder.is_dir() and not (path / GROWN).is_dir():
        for lock in folder.glob(f"*{LOCK_NAME}"):
            lock.unlink()
        folder.rmdir()


def _empty_building(path: Path) -> None:
    folder = path / BUILDING
    for child in sorted(folder.iterdir()) if folder.is_dir() else ():
        if child.is_dir() and child != path / GROWN:
            shutil.rmtree(child)
        elif child.is_file() and not child.name.endswith(LOCK_NAME):
            child.unlink()


def merge_coder(
    path: Path,
    coder: str,
    record: CoderRecord,
    *,
    runs: list[Run],
    state: BuildState,
    corpus: Corpus,
    store_id: str,
    stored: StoredParts | None = None,
    poll: Callable[[], None] = lambda: None,
) -> MergedCoder:
    """Merge a coder's runs, and what is `stored` of it, where that is not done; delete the runs; return what it came to.

    `poll` is called now and then; what it raises ends the merge, and a later call goes on with it.
    """
    marker = path / merged_marker(coder)
    if not marker.exists():
        ctx_len, folder = state.made_from.ctx_len, path / run_folder(coder)
        # So that recording, merging and what follows have one peak, not a sum of what each of them freed.
        give_back_memory()
        sources, position_bits = premerge(
            folder,
            coder,
            runs,
            width=record.width,
            ctx_len=ctx_len,
            contexts_per_run=state.contexts_per_run,
            memory_budget_bytes=state.memory_budget_bytes,
            poll=poll,
        )
        spilled = SpilledCoder(
            folder,
            sources,
            width=record.width,
            position_bits=position_bits,
            range_rows=range_rows(state.memory_budget_bytes, len(sources)),
            poll=poll,
            stored=stored,
        )
        options = MergeOptions(
            ctx_len=ctx_len,
            num_tokens=corpus.num_tokens,
            row_group_rows=state.row_group_rows,
            part_rows=state.part_rows,
            poll=poll,
        )
        parts = merge_parts(path, coder, spilled, options)
        files = {activations_part(coder, part): entry for part, entry in enumerate(parts)}
        files[latents_file(coder)] = _join_latents(path, coder, num_parts=len(parts))
        coder_id = coder_id_of(store_id, record)
        write_json(path / coder_file(coder), {"coder_id": coder_id, **record.model_dump(mode="json")})
        files[coder_file(coder)] = file_entry(path / coder_file(coder))
        extent = CoderExtent(
            coder_id=coder_id,
            width=record.width,
            num_activations=int(spilled.counts.sum()),
            num_parts=len(parts),
            dtype=spilled.dtype.name,
        )
        write_sealed(marker, MergedCoder(extent=extent, files=files).model_dump(mode="json"))
    shutil.rmtree(path / run_folder(coder), ignore_errors=True)
    return MergedCoder.parse(read_sealed(marker), where=str(marker))


def _join_latents(path: Path, coder: str, *, num_parts: int) -> FileEntry:
    with parquet_sink(path / latents_file(coder), LATENTS, statistics=True) as sink:
        for part in range(num_parts):
            for table in iterate_tables(path / merged_part(coder, part), schema=LATENTS):
                sink.add(table.replace_schema_metadata(sink.schema.metadata))
    assert sink.entry is not None
    return sink.entry


def corpus_files(path: Path, runs: list[Run]) -> dict[str, FileEntry]:
    """Return the files of tokenizer, tokens and documents of a new store."""
    files = {}
    for run in runs:
        assert run.tokens is not None and run.documents is not None
        files[tokens_part(run.run)] = run.tokens
        files[documents_part(run.run)] = run.documents
    folder = path / TOKENIZER
    for file in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if file.is_file():
            sync_file(file)  # libraries that wrote it may not have
            files[file.relative_to(path).as_posix()] = file_entry(file)
    sync_folder(folder)
    return files
