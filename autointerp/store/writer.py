"""Building a store: contexts and activations in, run by run; then a merge per coder; the manifest last.

Every step leaves committed files, so a process killed anywhere and started again goes on after the last of them and ends with
the same content as one that was never stopped. What the caller must bring along is the same corpus, from its beginning:
contexts that are already stored are compared and need no activations.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from autointerp.errors import InputError, StoreError
from autointerp.files import disk_errors, read_sealed, write_sealed
from autointerp.store.build import (
    BuildState,
    Corpus,
    clean,
    corpus_files,
    is_done,
    merge_coder,
    open_build,
    remove_building,
    to_grow,
)
from autointerp.store.corpus import (
    Document,
    Replay,
    as_segments,
    as_token_ids,
    documents_schema,
    iterate_contexts,
    tokens_digest,
    write_documents,
    write_tokens,
)
from autointerp.store.grow import is_swap_due, swap_if_due, tail_parts, take_over
from autointerp.store.layout import (
    BUILDING,
    CORPUS,
    GROWN,
    LOCK_NAME,
    MANIFEST,
    PART_ROWS,
    ROW_GROUP_ROWS,
    STATE,
    VOCABULARY,
    activations_part,
    documents_part,
    run_marker,
    tokens_part,
)
from autointerp.store.lock import WriterLock
from autointerp.store.manifest import CoderRecord, Extent, Identity, Manifest, read_manifest, store_id_of
from autointerp.store.merge import StoredParts
from autointerp.store.runs import Run, RunBuffer, buffer_rows, read_runs, remove_uncommitted
from autointerp.worker import Worker

_logger = logging.getLogger(__name__)

DEFAULT_BUDGET_BYTES = 1 << 30


class StoreWriter:
    """Builds one store; see :mod:`autointerp.store` for the loop around it. Not for several threads at once."""

    def __init__(
        self,
        path: Path,
        lock: WriterLock,
        state: BuildState | None,
        manifest: Manifest | None,
        *,
        worker: Worker | None = None,
        smaller: Path | None = None,
    ) -> None:
        """For :meth:`create_or_resume`. `smaller`: the store that `path`, a folder in it, is to take the place of."""
        self.path = path
        self._lock = lock
        self._state = state
        self._manifest = manifest
        self._worker = worker
        self._smaller = smaller
        self._next = 0
        self._last_document = -1
        if state is None:
            return
        if lock.is_alone:
            clean(path)
        if smaller is not None and state.base is not None:
            take_over(smaller, state.base, coders=list(state.coders), build=state.run_digest)
        self._runs = read_runs(path)
        state.check_runs(self._runs, path)
        remove_uncommitted(path, state.coders, self._runs, is_ours=worker.owns if worker else lambda run: True)
        self._run = 0
        self._document_schema = documents_schema(state.document_columns)
        widths = {name: record.width for name, record in state.coders.items()}
        self._buffer = RunBuffer(
            path,
            widths,
            max_rows=buffer_rows(state.memory_budget_bytes),
            run_positions=state.contexts_per_run * state.made_from.ctx_len,
        )
        self._tail: Replay | None = None
        if manifest is not None:
            self._replay = Replay(self._stored_parts())
        elif smaller is not None and state.base is not None:
            self._tail = Replay(tail_parts(smaller, state.base), first=state.base.num_contexts, is_growing=True)
        self._start_run()

    @classmethod
    def create_or_resume(
        cls,
        path: Path | str,
        *,
        identity: Identity,
        coders: Mapping[str, CoderRecord],
        memory_budget_bytes: int = DEFAULT_BUDGET_BYTES,
        l0: Mapping[str, float] | None = None,
        contexts_per_run: int | None = None,
        document_columns: Mapping[str, str] | None = None,
        provenance: Mapping[str, Any] | None = None,
        row_group_rows: int = ROW_GROUP_ROWS,
        part_rows: int = PART_ROWS,
        is_growing: bool = False,
        worker: Worker | None = None,
    ) -> Self:
        """Start a store at `path`, go on with an unfinished one, or add the coders that a finished one lacks.

        `is_growing`: the corpus has more contexts than the finished store. They are recorded for `coders`; when that was done
        for every coder of the store, by one call or several, the store grows, and until then stays as it is.
        `worker`: record only the runs that fall to it, beside other workers, and never call `finish`; a call without merges.

        `l0` are expected activations per token (by default the coder's k, else 64) and decide with the budget how long a run
        is; that, and all that follows, is settled when the store is started and is read from it afterwards. `document_columns`
        are the kept columns and their types (``string``, ``int64``, ``float64``, ``bool``).

        Raises: IdentityError when the store there was made from other inputs; StoreError when another process writes it.
        """
        store = path = Path(path)
        lock = WriterLock(store / BUILDING / LOCK_NAME, store=store, worker=worker)
        try:
            if lock.is_alone and swap_if_due(store):
                remove_building(store)
                if is_growing:
                    return cls(store, lock, None, read_manifest(store))
            wanted = BuildState.plan(
                identity=identity,
                coders=coders,
                memory_budget_bytes=memory_budget_bytes,
                l0=l0 or {},
                contexts_per_run=contexts_per_run,
                document_columns=dict(document_columns or {}),
                provenance=dict(provenance or {}),
                row_group_rows=row_group_rows,
                part_rows=part_rows,
                num_workers=worker.count if worker else None,
            )
            if is_growing:
                path, wanted = store / GROWN, to_grow(store, wanted)
            state, manifest = open_build(path, wanted, may_begin=lock.is_alone)
            if state is None and manifest is not None and lock.is_alone and is_done(path, manifest):
                remove_building(path)
            writer = cls(path, lock, state, manifest, worker=worker, smaller=store if is_growing else None)
            lock.share()
            return writer
        except BaseException:
            for folder in (path, store) if lock.is_alone else ():
                if not (folder / STATE).exists():
                    remove_building(folder)
            lock.release()
            raise

    @staticmethod
    def complete(path: Path) -> None:
        """Finish what a killed process left of putting a larger store in the place of the one at `path`.

        Raises: StoreError when another process writes the store.
        """
        if is_swap_due(path):
            lock = WriterLock(path / BUILDING / LOCK_NAME, store=path)
            try:
                swap_if_due(path)
                remove_building(path)
            finally:
                lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the store, finished or not. What was not committed is made again by the next process."""
        self._lock.release()

    @property
    def is_finished(self) -> bool:
        """Whether the manifest is written and every coder is in it: nothing is left to do."""
        return self._state is None

    @property
    def has_all_runs(self) -> bool:
        """Whether the whole corpus was stored already: go to :meth:`finish` without reading it."""
        return self.is_finished or (self.path / CORPUS).exists()

    @property
    def has_tokenizer(self) -> bool:
        """Whether the vocabulary is in the store, and with it all the caller put beside it before."""
        return (self.path / VOCABULARY).exists()

    @property
    def coder_names(self) -> list[str]:
        """The coders whose activations are wanted; without those a finished store has already."""
        return [] if self._state is None else list(self._state.coders)

    @property
    def contexts_per_run(self) -> int:
        """Contexts in a full run."""
        return self._building.contexts_per_run

    @property
    def committed_runs(self) -> int:
        """How many runs are committed."""
        return 0 if self._state is None else len(self._runs)

    @property
    def committed_contexts(self) -> int:
        """How many contexts are in committed runs."""
        return sum(run.num_contexts for run in self._runs.values()) if self._state is not None else 0

    @property
    def next_context(self) -> int:
        """Index of the next context to add; 0 in every new process."""
        return self._next

    @property
    def is_committed(self) -> bool:
        """Whether the current run is committed, or falls to another worker: its activations are not wanted."""
        return self._run in self._runs or not self._is_ours

    @property
    def _is_ours(self) -> bool:
        return self._worker is None or self._worker.owns(self._run)

    @property
    def room(self) -> int:
        """How many contexts the current run still takes; at 0 call :meth:`close_run`."""
        run = self._runs.get(self._run)
        return (self.contexts_per_run if run is None else run.num_contexts) - (self._next - self._first)

    def runs_ahead(self) -> Iterator[tuple[int, bool]]:
        """Yield how many contexts each run takes, from the current one on, and whether its activations are wanted; no end."""
        committed = {run: there.num_contexts for run, there in self._runs.items()}
        for run in count(self._run):
            is_ours = self._worker is None or self._worker.owns(run)
            yield committed.get(run, self.contexts_per_run), is_ours and run not in committed

    @property
    def num_runs(self) -> int:
        """How many runs were added or passed over by this process."""
        return self._run

    def missing_runs(self) -> list[int]:
        """Return which of the first `num_runs` runs are not committed by any worker yet."""
        there = read_runs(self.path)
        return [run for run in range(self._run) if run not in there]

    @property
    def _building(self) -> BuildState:
        if self._state is None:
            raise StoreError(f"{self.path} is finished; nothing can be added to it by this writer")
        return self._state

    def add_contexts(
        self,
        tokens: Sequence[Any],
        segments: Sequence[Sequence[tuple[int, int]]],
        *,
        documents: Sequence[Document] = (),
    ) -> int:
        """Append contexts (1 to ctx_len token ids each) to the current run; return the index of the first.

        `segments` has for each context the (document id, start offset) of each document in it, and `documents` the documents
        that begin there; those given before or without any segment do no harm.

        Raises: IdentityError when a context that is stored already differs; InputError when there is no room.
        """
        state = self._building
        if len(tokens) > self.room or len(tokens) != len(segments):
            raise InputError(
                f"{len(tokens)} contexts with {len(segments)} lists of segments were given to a run that takes {self.room} more"
            )
        first = self._next
        for ids, spans in zip(tokens, segments, strict=True):
            array = as_token_ids(ids, ctx_len=state.made_from.ctx_len)
            ids_of, starts = as_segments(spans, num_tokens=len(array))
            if self._run in self._runs or state.adds_coders:
                self._replay.check(array)
            if self._tail is not None and state.base is not None and self._next >= state.base.num_contexts:
                self._tail.check(array)
            self._check_documents(ids_of)
            if not self.is_committed:
                if not state.adds_coders:
                    self._tokens.append(array)
                    self._segments.append((ids_of, starts))
                if len(array) == state.made_from.ctx_len and self._num_full == len(self._lengths):
                    self._num_full += 1
                self._lengths.append(len(array))
            self._next += 1
        self._documents.update((row.document, row) for row in documents)
        return first

    def _check_documents(self, ids: list[int]) -> None:
        if ids[0] < self._last_document:
            raise InputError(f"document {ids[0]} follows document {self._last_document}; expected ascending ids")
        self._last_document = ids[-1]

    def add_activations(self, coder: str, latents: Any, positions: Any, values: Any) -> None:
        """Append activations of contexts of the current run, in any order; zeros are dropped.

        Raises: InputError for what cannot be stored: a position outside the run's tokens, a latent beyond the width, NaN.
        """
        state = self._building
        if self.is_committed:
            return
        if coder not in state.coders:
            raise InputError(f"activations were given for coder {coder!r}; this store is made for {', '.join(state.coders)}")
        positions = np.asarray(positions)
        if not positions.ndim == 1 == np.ndim(latents) == np.ndim(values) or not len(positions) == len(latents) == len(values):
            raise InputError(
                f"coder {coder!r} gave latents, positions and values of shapes {np.shape(latents)}, {positions.shape} and "
                f"{np.shape(values)}; expected three arrays of one length"
            )
        if len(positions):
            self._buffer.add(coder, latents, self._local(positions), values, run=self._run)

    def _local(self, positions: np.ndarray) -> np.ndarray:
        """Return positions counted from the start of the run.

        Raises: InputError for positions without a token.
        """
        ctx_len = self._building.made_from.ctx_len
        if positions.dtype.kind not in "iu":
            raise InputError(f"positions have type {positions.dtype}; expected integers")
        local = positions.astype(np.int64) - self._first * ctx_len
        if local.min() >= 0 and local.max() < self._num_full * ctx_len:
            return local  # every context up to there is full: nothing else needs a look
        lengths = np.array(self._lengths, np.int64)
        inside = (local >= 0) & (local < len(lengths) * ctx_len)
        if inside.all():
            inside = local % ctx_len < lengths[local // ctx_len]
        if not inside.all():
            raise InputError(
                f"position {positions[int(np.argmin(inside))]} is no token of the current run, contexts {self._first} to "
                f"{self._next - 1} of up to {ctx_len} tokens; expected context * ctx_len + offset"
            )
        return local

    def close_run(self) -> None:
        """Commit the current run. Does nothing to a run that is committed already but to check that it was added in full."""
        state = self._building
        if self._run in self._runs:
            if self.room:
                raise StoreError(
                    f"the corpus ended at context {self._next} and {self.path} has at least {self._next + self.room} contexts; "
                    "use the corpus it was started with, or another folder"
                )
        elif self._next == self._first:
            return
        elif self._is_ours:
            run = self._commit(state)
            self._runs[run.run] = run
            _logger.debug("run %d: %d contexts, %d tokens", run.run, run.num_contexts, run.num_tokens)
        self._run += 1
        self._start_run()

    def _start_run(self) -> None:
        self._first = self._next
        self._tokens: list[np.ndarray] = []
        self._segments: list[tuple[list[int], list[int]]] = []
        self._lengths: list[int] = []
        self._num_full = 0
        """Contexts of ctx_len tokens before the first shorter one."""
        self._document_before = self._last_document
        if self._run == 0:
            self._documents: dict[int, Document] = {}
        else:
            self._documents = {key: row for key, row in self._documents.items() if key > self._last_document}
        if self._state is not None and not self._state.adds_coders and self._run in self._runs:
            self._replay = Replay([self.path / tokens_part(self._run)], first=self._first)

    def _commit(self, state: BuildState) -> Run:
        run, tokens, documents, num_documents = self._run, None, None, 0
        with disk_errors(self.path):
            files = self._buffer.close(run=run)
            if not state.adds_coders:
                rows = self._new_documents()
                num_documents = len(rows)
                documents = write_documents(self.path / documents_part(run), rows, self._document_schema)
                tokens = write_tokens(
                    self.path / tokens_part(run),
                    first_context=self._first,
                    tokens=self._tokens,
                    documents=[ids for ids, _ in self._segments],
                    starts=[starts for _, starts in self._segments],
                )
            marker = Run(
                run=run,
                first_context=self._first,
                num_contexts=len(self._lengths),
                num_tokens=sum(self._lengths),
                num_documents=num_documents,
                last_document=self._last_document,
                files=files,
                tokens=tokens,
                documents=documents,
                build=state.run_digest,
            )
            write_sealed(self.path / run_marker(run), marker.model_dump(mode="json"))
        return marker

    def _new_documents(self) -> list[Document]:
        before = self._document_before
        wanted = sorted({document for ids, _ in self._segments for document in ids if document > before})
        missing = [document for document in wanted if document not in self._documents]
        if missing:
            raise InputError(f"document {missing[0]} is in a context and was not given to add_contexts; give it there")
        return [self._documents[document] for document in wanted]

    def _stored_parts(self) -> list[Path]:
        if self._manifest is not None:
            return [self.path / name for name in sorted(self._manifest.files) if name.startswith("tokens/")]
        return [self.path / tokens_part(run) for run in sorted(self._runs)]

    def finish(self) -> Manifest:
        """Merge the runs, write the manifest, remove what was needed only for building; return the manifest.

        Raises: InputError when there is no context; StoreError when the corpus ended before the stored contexts did.
        """
        if self._state is None:
            return read_manifest(self.path)
        with disk_errors(self.path):
            corpus = self._close_corpus(self._state)
            state = self._state
            identity = state.made_from.model_copy(update={"tokens_digest": corpus.tokens_digest})
            store_id = store_id_of(identity)
            runs = [self._runs[run] for run in sorted(self._runs)]
            if self._manifest is None:
                extents, files = {}, corpus_files(self.path, runs)
            else:
                extents, files = dict(self._manifest.extent.coders), dict(self._manifest.files)
            for name, record in state.coders.items():
                _logger.info("merging %d runs of coder %s", len(runs), name)
                merged = merge_coder(
                    self.path,
                    name,
                    record,
                    runs=runs,
                    state=state,
                    corpus=corpus,
                    store_id=store_id,
                    stored=self._stored_activations(name),
                )
                extents[name] = merged.extent
                files |= merged.files
            manifest = Manifest(
                store_id=store_id,
                identity=identity,
                extent=Extent(
                    num_contexts=corpus.num_contexts,
                    num_tokens=corpus.num_tokens,
                    num_documents=corpus.num_documents,
                    coders=dict(sorted(extents.items())),
                ),
                provenance=state.all_provenance(
                    self._manifest, smaller=read_manifest(self._smaller) if self._smaller else None, num_runs=len(runs)
                ),
                files=dict(sorted(files.items())),
            )
            write_sealed(self.path / MANIFEST, manifest.values())
            remove_building(self.path)
            if self._smaller is not None and swap_if_due(self._smaller):
                self.path = self._smaller
                remove_building(self.path)
        self._state = None
        return manifest

    def _stored_activations(self, coder: str) -> StoredParts | None:
        """Return where the activations lie that a larger store takes over."""
        if self._smaller is None or self._state is None or self._state.base is None or not self._state.base.num_contexts:
            return None
        extent = read_manifest(self._smaller).extent.coders[coder]
        return StoredParts(
            paths=[self._smaller / activations_part(coder, part) for part in range(extent.num_parts)],
            num_positions=self._state.base.num_contexts * self._state.made_from.ctx_len,
            dtype=extent.dtype,
        )

    def _close_corpus(self, state: BuildState) -> Corpus:
        marker = self.path / CORPUS
        if not marker.exists():
            self.close_run()
            num_contexts = self.committed_contexts
            there = self._manifest or (read_manifest(self._smaller) if self._smaller else None)
            expected = num_contexts if there is None else there.extent.num_contexts
            if self._next < expected or any(run >= self._run for run in self._runs):
                raise StoreError(
                    f"the corpus ended at context {self._next} and {self.path} has {expected} contexts; "
                    "use the corpus it was started with, or another folder"
                )
            if not num_contexts:
                raise InputError(f"the corpus has no tokens, so there is nothing to store in {self.path}")
            digest = tokens_digest(iterate_contexts(self._stored_parts()))
            if self._manifest is None:
                num_documents = sum(run.num_documents for run in self._runs.values())
            else:
                num_documents = self._manifest.extent.num_documents
            corpus = Corpus(
                num_contexts=digest.num_contexts,
                num_tokens=digest.num_tokens,
                num_documents=num_documents,
                tokens_digest=digest.value(),
            )
            state.check_corpus(self.path, corpus, self._manifest)
            write_sealed(marker, corpus.model_dump(mode="json"))
        return Corpus.parse(read_sealed(marker), where=str(marker))
