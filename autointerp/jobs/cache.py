"""``cache``: run the subject over a corpus and record where each latent of each coder fires, in a store.

Ties together corpus, subject, coders and the store's writer. What is committed is never made again: a second call goes on where
the first one stopped, adds the coders that a finished store lacks, or leaves it alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ByteSize, Field, field_validator

from autointerp import __version__
from autointerp.config import RUNTIME, Config
from autointerp.errors import ConfigError, InputError, Interrupted
from autointerp.jobs.ahead import ahead
from autointerp.jobs.coder_checks import absurd
from autointerp.jobs.controls import parse_controls
from autointerp.jobs.readings import CONTROL_CONTEXTS, CoderConfig, ControlMaker, reading_of, record_of
from autointerp.jobs.signals import StopFlag, listening
from autointerp.jobs.store_checks import check_corpus_of_unfinished, check_not_imported, coders_there, recorded_k, will_grow
from autointerp.jobs.tables import build_windows
from autointerp.jobs.token_progress import TokenProgress
from autointerp.store.corpus import tokens_digest
from autointerp.store.disk import DiskPlan, check_disk, plan_disk, size_text
from autointerp.store.layout import MANIFEST, TOKENIZER, check_coder_names
from autointerp.store.manifest import Identity, Manifest, check_coder_identity, check_identity, read_coder, read_manifest
from autointerp.store.reader import open_store
from autointerp.store.runs import contexts_in_run, fits_float16
from autointerp.store.vocab import write_vocabulary
from autointerp.store.writer import StoreWriter
from autointerp.subject.corpus import Context, Corpus, CorpusConfig
from autointerp.subject.fidelity import Site, measure
from autointerp.subject.model import load_subject
from autointerp.subject.recorder import Activations, Reading, Recorder, TokenFilter
from autointerp.subject.vocabulary import token_bytes
from autointerp.worker import Worker

logger = logging.getLogger("autointerp.jobs")

_PROBE_CONTEXTS = 4
_BATCHES_PER_GROUP = 16
"""Batches whose contexts are sorted by length together."""
_BATCHES_AHEAD = 2
"""Batches that may wait to be written."""


class CacheConfig(Config):
    """Everything that `cache` needs."""

    subject: str
    """Folder or hub id of a causal language model."""
    revision: str | None = None
    corpus: CorpusConfig = CorpusConfig()
    """The text; a plain string is its `source`."""
    coders: tuple[CoderConfig, ...] = Field(min_length=1)
    controls: tuple[str, ...] = ()
    """``random-coder``, ``reinit-subject`` and ``reinit-matched``, of every coder or with ``:NAME`` of one; `jobs.controls`."""
    control_seed: int = Field(default=0, ge=0)
    """Draws what the controls draw; but for 0, part of their names."""
    out: Path = Field(json_schema_extra=RUNTIME)
    """The store's folder."""
    token_filter: str = "bos"
    """Whose activations are dropped: ``bos``, ``special``, ``template``, ``first:N``, several with commas, or ``none``."""
    quantization: Literal["8bit", "4bit"] | None = None
    device: str = Field(default="auto", json_schema_extra=RUNTIME)
    dtype: str = Field(default="auto", json_schema_extra=RUNTIME)
    """``auto`` (float32 on a CPU, bfloat16 on an accelerator), ``float32``, ``bfloat16`` or ``float16``, of the subject."""
    device_map: str | None = Field(default=None, json_schema_extra=RUNTIME)
    trust_remote_code: bool = Field(default=False, json_schema_extra=RUNTIME)
    batch_tokens: int | None = Field(default=None, gt=0, json_schema_extra=RUNTIME)
    """Tokens in a forward pass; by default 2048 on a CPU (they stay in its cache) and 8192 on an accelerator."""
    memory_budget: ByteSize = Field(default=ByteSize(1 << 30), gt=0, json_schema_extra=RUNTIME)
    """Memory for activations on their way to disk, such as ``512MB``; decides how long a run, the unit of resume, is."""
    contexts_per_run: int | None = Field(default=None, gt=0, json_schema_extra=RUNTIME)
    """Length of a run where the memory budget should not decide it."""
    coders_per_pass: int | None = Field(default=None, gt=0, json_schema_extra=RUNTIME)
    """Most coders (each with its controls) in memory at once; the subject reads the corpus once for every so many."""
    extend_tokens: int | None = Field(default=None, gt=0, json_schema_extra=RUNTIME)
    """Let a finished store grow to this many tokens of the same corpus; stands for `corpus.num_tokens`."""
    worker: str | None = Field(default=None, json_schema_extra=RUNTIME)
    """``I/N``: record only every N-th run, beside N - 1 other processes; a call without this merges what they recorded."""
    force: bool = Field(default=False, json_schema_extra=RUNTIME)
    """Cache also what looks absurd: a coder that reconstructs worse than the mean, or far from its declared L0."""
    progress: bool | None = Field(default=None, json_schema_extra=RUNTIME)
    """True: a bar; False: log lines; None: what suits the terminal."""

    @field_validator("corpus", mode="before")
    @classmethod
    def _source_alone(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value


def cache(config: CacheConfig | Mapping[str, Any]) -> Path:
    """Build, finish or extend the store at `config.out`; return its path. After a `worker` it may be unfinished.

    Raises: IdentityError when the store there was made from other inputs; Interrupted after SIGINT, SIGTERM or SIGUSR1, with
    every finished run kept; InputError for what cannot be used, before anything is written.
    """
    if not isinstance(config, CacheConfig):
        config = CacheConfig.parse(config, where="cache")
    path = config.out.expanduser()
    StoreWriter.complete(path)
    check_not_imported(path)
    stop = StopFlag()
    with listening(stop):
        return _Job(config, stop).run()


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """What a call of :func:`cache` would take."""

    coders: tuple[str, ...]
    """The coders that are not in the store yet, controls among them; all of them where it grows."""
    num_tokens: int | None
    """Corpus tokens (of a store that grows, the new ones); None: all that the corpus has, not known before it is read."""
    l0: float
    """Expected activations per token, of `coders` together."""
    tokens_per_s: float
    """Measured on the first contexts: subject and encoding, without writing."""
    disk: DiskPlan | None
    """None where `num_tokens` is."""

    def text(self) -> str:
        """Return the plan in a few lines."""
        if not self.coders:
            return "all of this is in the store already; nothing to do"
        lines = [f"coders: {', '.join(self.coders)}; about {self.l0:.0f} activations per token"]
        if self.num_tokens is None or self.disk is None:
            return "\n".join([*lines, "disk and time: not known without a number of tokens; give one with --tokens"])
        disk = self.disk
        return "\n".join(
            [
                *lines,
                f"{self.num_tokens:,} tokens, {self.num_tokens * self.l0:,.0f} activations",
                f"disk: {size_text(disk.spill_bytes)} of runs, {size_text(disk.final_bytes)} in the end, "
                f"{size_text(disk.peak_bytes)} at the most",
                f"time: about {self.num_tokens / self.tokens_per_s / 60:,.1f} min at {self.tokens_per_s:,.0f} tokens/s",
            ]
        )


def plan_cache(config: CacheConfig | Mapping[str, Any]) -> CachePlan:
    """Say what `cache` would take, from the first contexts of the corpus; nothing is written.

    Raises: as :func:`cache`, for what is known before the first run.
    """
    if not isinstance(config, CacheConfig):
        config = CacheConfig.parse(config, where="cache")
    return _Job(config, StopFlag()).plan()


@dataclass(frozen=True)
class _Batch:
    """What the coders found in one batch."""

    num_tokens: int
    found: list[Activations]


class _Job:
    """One call of :func:`cache`."""

    def __init__(self, config: CacheConfig, stop: StopFlag) -> None:
        if config.extend_tokens is not None:
            config = config.model_copy(update={"corpus": config.corpus.model_copy(update={"num_tokens": config.extend_tokens})})
        self._config, self._stop = config, stop
        self._worker = Worker.parse(config.worker) if config.worker is not None else None
        if self._worker is not None and config.coders_per_pass is not None:
            raise ConfigError(
                "--worker and --coders-per-pass cannot be used together: give the workers one group of --coder after another"
            )
        self._started = time.monotonic()
        self._filter = TokenFilter.parse(config.token_filter)
        names = [coder.name for coder in config.coders]
        check_coder_names(names)
        if len(set(names)) < len(names):
            raise ConfigError(f"two coders have the name {max(names, key=names.count)!r}; give each its own")
        self._all_controls = parse_controls(config.controls, names, seed=config.control_seed)
        check_coder_names([*names, *(control.name for control in self._all_controls)])
        self._is_growing = will_grow(
            config.out.expanduser(),
            config.corpus,
            is_asked=config.extend_tokens is not None,
            given={*names, *(control.name for control in self._all_controls)},
        )
        self._subject = load_subject(
            config.subject,
            revision=config.revision,
            device=config.device,
            dtype=config.dtype,
            device_map=config.device_map,
            quantization=config.quantization,
            trust_remote_code=config.trust_remote_code,
        )
        self._corpus = Corpus(
            config.corpus,
            self._subject.tokenizer,
            num_embeddings=self._subject.num_embeddings,
            mark_template=self._filter.template,
        )
        self._batch_tokens = config.batch_tokens or (2048 if self._subject.device.type == "cpu" else 8192)
        self._is_corpus_checked = False
        self._first: list[Context] = []
        self._begun: Iterator[Context] | None = None
        """The corpus behind the first contexts, until somebody reads on."""
        self._float32: set[str] = set()
        """Coders whose values are known to leave the normal range of float16."""

    def plan(self) -> CachePlan:
        path, num_tokens = self._config.out.expanduser(), self._config.corpus.num_tokens
        l0, seconds, num_probed = dict[str, float](), 0.0, 0
        for coders in self._passes():
            recorder, some = self._load(path, coders)  # also the first, slow pass
            l0 |= some
            contexts = list(islice(self._corpus.contexts(), CONTROL_CONTEXTS))
            started, num_probed = time.perf_counter(), sum(len(context.tokens) for context in contexts)
            for _, found in recorder.batches(contexts):
                for acts in found:  # encodes
                    self._note_range(acts.coder, acts.values)
            seconds += time.perf_counter() - started
        there = {} if self._is_growing else coders_there(path)
        disk = self._disk(path, l0, is_growing=self._is_growing)
        if self._is_growing and num_tokens is not None:
            num_tokens = max(0, num_tokens - read_manifest(path).extent.num_tokens)
        return CachePlan(
            coders=tuple(name for name in l0 if name not in there),
            num_tokens=num_tokens,
            l0=sum(value for name, value in l0.items() if name not in there),
            tokens_per_s=num_probed / seconds,
            disk=disk,
        )

    def run(self) -> Path:
        path = self._config.out.expanduser()
        check_corpus_of_unfinished(path, self._config.corpus, is_growing=self._is_growing)
        passes = self._passes()
        l0: dict[str, float] = {}
        if len(passes) > 1 and (self._is_growing or any(self._lacks(path, coders) for coders in passes)):
            # What is wrong with the last coder is said before the first is recorded, and runs are as long as in one pass.
            for coders in passes:
                l0 |= self._load(path, coders)[1]
                self._check_coders(path, self._first[:_PROBE_CONTEXTS])
        if self._is_growing:
            self._run_passes(path, passes, l0, is_growing=True)
            self._is_corpus_checked = True
            if self._worker is not None:
                return path  # coders that the store lacks are added when it has grown
        if any(self._lacks(path, coders) for coders in passes):
            passes = [coders for coders in passes if self._lacks(path, coders)]
        elif self._is_growing:
            return path
        self._run_passes(path, passes, l0)
        return path

    def _run_passes(
        self, path: Path, passes: Sequence[Sequence[CoderConfig]], l0: Mapping[str, float], *, is_growing: bool = False
    ) -> None:
        for number, coders in enumerate(passes, start=1):
            if len(passes) > 1:
                logger.info("pass %d of %d: %s", number, len(passes), ", ".join(coder.name for coder in coders))
            if number > 1 and self._stop.reason is not None:
                raise Interrupted(
                    f"stopped by {self._stop.reason} after {number - 1} of {len(passes)} passes over the coders of {path}; "
                    "run the same command again to go on"
                )
            self._run_pass(path, coders, l0, is_growing=is_growing)

    def _passes(self) -> list[tuple[CoderConfig, ...]]:
        """Return the coders in groups that are in memory together, in the order they were given."""
        coders = self._config.coders
        size = self._config.coders_per_pass or len(coders)
        return [coders[start : start + size] for start in range(0, len(coders), size)]

    def _lacks(self, path: Path, coders: Sequence[CoderConfig]) -> bool:
        """Return whether one of these coders or their controls is not in a finished store."""
        names = {coder.name for coder in coders}
        names |= {control.name for control in self._all_controls if control.of in names}
        return not names <= set(coders_there(path))

    def _load(self, path: Path, coders: Sequence[CoderConfig]) -> tuple[Recorder, dict[str, float]]:
        """Bring these coders and their controls into memory, in place of others; return what runs them, and their L0."""
        self._readings: dict[str, Reading] = {}  # the former go before the next come
        self._readings |= {coder.name: reading_of(coder, self._subject) for coder in coders}
        self._records = {name: record_of(reading, self._subject) for name, reading in self._readings.items()}
        if not self._first:
            self._begun = self._corpus.contexts()
            self._first = list(islice(self._begun, CONTROL_CONTEXTS if self._all_controls else _PROBE_CONTEXTS))
        maker = ControlMaker(self._subject, seed=self._config.control_seed, contexts=self._first, recorder=self._recorder)
        sources = {coder.name: coder.source for coder in coders}
        for control in self._all_controls:
            if control.of not in sources:
                continue
            known = recorded_k(path, control.name)
            made = maker.make(control, self._readings[control.of], source=sources[control.of], k=known)
            self._readings[control.name] = made
            self._records[control.name] = record_of(made, self._subject, control_of=control.of)
        recorder = self._recorder(self._readings)
        return recorder, self._expected_l0(recorder, self._first[:_PROBE_CONTEXTS])

    def _contexts(self) -> Iterator[Context]:
        """Return the corpus from its beginning; where it was opened for a look, its first documents are not tokenised again."""
        begun, self._begun = self._begun, None
        return self._corpus.contexts() if begun is None else chain(self._first, begun)

    def _run_pass(
        self, path: Path, coders: Sequence[CoderConfig], l0_of_all: Mapping[str, float], *, is_growing: bool = False
    ) -> None:
        """Record these coders and their controls where the store lacks them; they are in memory only meanwhile.

        `is_growing`: what the store has already of these is recorded on the tokens that are new.
        """
        there = coders_there(path) if is_growing else {}
        coders = [coder for coder in coders if coder.name in there or not is_growing]
        if not coders:
            return
        recorder, l0 = self._load(path, coders)
        if not l0_of_all:
            self._check_coders(path, self._first[:_PROBE_CONTEXTS])
        l0 = {**l0, **l0_of_all}
        disk = self._disk(path, l0, is_growing=is_growing)
        if disk is not None:
            check_disk(path, disk, worker=self._worker)
        with StoreWriter.create_or_resume(
            path,
            identity=self._identity(),
            coders={name: record for name, record in self._records.items() if name in there or not is_growing},
            memory_budget_bytes=int(self._config.memory_budget),
            contexts_per_run=self._contexts_per_run(l0),
            document_columns=self._corpus.column_types(),
            provenance=self._provenance(),
            is_growing=is_growing,
            worker=self._worker,
        ) as writer:
            contexts = self._contexts()
            if writer.is_finished and is_growing:
                return
            if writer.is_finished:
                if not self._is_corpus_checked:
                    self._check_corpus_of_finished(read_manifest(path), contexts)
                self._is_corpus_checked = True
                logger.info("%s has all of this already (%s); nothing to do", path, ", ".join(self._readings))
                return
            wanted = writer.coder_names
            recorder = self._recorder({name: self._readings[name] for name in wanted})
            if not (path / MANIFEST).exists() and self._worker is None:
                self._subject.tokenizer.save_pretrained(path / TOKENIZER)
                write_vocabulary(path / TOKENIZER, *token_bytes(self._subject.tokenizer))
            if not writer.has_all_runs:
                self._record(writer, recorder, contexts)
            if self._worker is not None:
                self._say_what_is_missing(writer, self._worker)
                return
            writer.finish(lambda: self._check_stop(writer))
        if writer.path == path:
            build_windows(open_store(path), memory_budget_bytes=int(self._config.memory_budget))
            self._summarise(path, recorder, wanted)

    def _say_what_is_missing(self, writer: StoreWriter, worker: Worker) -> None:
        """Log which runs no worker has committed yet."""
        if writer.has_all_runs:
            return
        missing: dict[int, int] = {}
        for run in writer.missing_runs():
            owner = run % worker.count
            missing[owner] = missing.get(owner, 0) + 1
        whose = ", ".join(f"{count} of worker {owner}" for owner, count in sorted(missing.items()))
        logger.info(
            "worker %d of %d is done; %s",
            worker.index, worker.count,
            f"runs still missing: {whose}" if missing
            else f"all runs are there ({writer.num_runs}): run the same command without --worker to merge them",
        )  # fmt: skip

    @property
    def _group(self) -> int:
        """Contexts that are batched together."""
        return max(1, _BATCHES_PER_GROUP * self._batch_tokens // self._config.corpus.ctx_len)

    def _contexts_per_run(self, l0: Mapping[str, float]) -> int:
        """Return the length of runs: as asked, or what the memory budget allows.

        The latter ends between two groups, so that batches, and with them the last bits of values, do not depend on it.
        """
        if self._config.contexts_per_run is not None:
            return self._config.contexts_per_run
        budget, ctx_len = int(self._config.memory_budget), self._config.corpus.ctx_len
        contexts = contexts_in_run(budget, ctx_len=ctx_len, l0=sum(l0.values()))
        return contexts - (contexts % self._group if contexts > self._group else 0)

    def _check_coders(self, path: Path, contexts: list[Context]) -> None:
        """Refuse another coder than the store has of that name, and a new one that gives what no trained coder gives."""
        there = open_store(path).coder_names if (path / MANIFEST).exists() else []
        for name in set(there) & set(self._records):
            check_coder_identity(read_coder(path, name), self._records[name], coder=name, where=path)
        for name, reading in self._readings.items():
            target = self._records[name].target
            spec = reading.coder.spec
            if self._config.force or name in there or (spec.is_transcoder and target is None):
                continue
            if not spec.reconstructs or self._records[name].control_of is not None:
                continue
            coder = reading.coder.to(self._subject.device)
            site = Site(reading.hookpoint, target or reading.hookpoint)
            found = measure(self._subject, coder, site, contexts, batch_tokens=self._batch_tokens, is_brief=True)
            reason = absurd(coder.spec, found)
            if reason is not None:
                raise InputError(
                    f"coder {name!r} does not fit {reading.hookpoint} of {self._subject.name}: {reason}; see "
                    f"'autointerp coder check {coder.spec.source}', or cache it all the same with --force"
                )

    def _record(self, writer: StoreWriter, recorder: Recorder, contexts: Iterator[Context]) -> None:
        """Read the corpus from its beginning; run the subject on the runs that are not committed."""
        ctx_len = self._config.corpus.ctx_len
        if writer.committed_runs:
            logger.info("going on after %d finished runs", writer.committed_runs)
        # The device works on the next batches while those before are sorted and written here.
        steps = ahead(self._steps(writer.runs_ahead(), recorder, contexts), size=_BATCHES_AHEAD)
        first = 0
        with TokenProgress(self._config.corpus.num_tokens, self._config.progress) as progress, closing(steps):
            for step in steps:
                self._check_stop(writer)
                if isinstance(step, _Batch):
                    for acts in step.found:
                        writer.add_activations(acts.coder, acts.latents, acts.positions + first * ctx_len, acts.values)
                    progress.advance(step.num_tokens)
                    continue
                if writer.room == 0:
                    writer.close_run()
                first = writer.add_contexts(
                    [context.tokens for context in step],
                    [context.segments for context in step],
                    documents=[document for context in step for document in context.documents],
                )
                if writer.is_committed:
                    progress.skip(sum(len(context.tokens) for context in step))
            if writer.room == 0:
                writer.close_run()
            writer.close_run()
        counts = self._corpus.counts
        if counts.num_undecodable:
            logger.warning("%d documents of the corpus could not be decoded and were left out", counts.num_undecodable)

    def _steps(
        self, runs: Iterator[tuple[int, bool]], recorder: Recorder, contexts: Iterator[Context]
    ) -> Iterator[list[Context] | _Batch]:
        """Yield the corpus in groups of contexts that share a run, each before its batches, where its run wants any."""
        for room, is_wanted in runs:
            while room:
                taken = list(islice(contexts, min(room, self._group)))
                if not taken:
                    return
                room -= len(taken)
                yield taken
                if is_wanted:
                    for num_tokens, found in recorder.batches(taken):
                        yield _Batch(num_tokens, list(found))

    def _check_stop(self, writer: StoreWriter) -> None:
        if self._stop.reason is not None:
            raise Interrupted(
                f"stopped by {self._stop.reason} with {writer.committed_runs} finished runs in {writer.path}; "
                "run the same command again to go on"
            )

    def _recorder(self, readings: Mapping[str, Reading]) -> Recorder:
        return Recorder(
            self._subject,
            readings,
            ctx_len=self._config.corpus.ctx_len,
            token_filter=self._filter,
            batch_tokens=self._batch_tokens,
        )

    def _expected_l0(self, recorder: Recorder, contexts: list[Context]) -> dict[str, float]:
        """Return activations per token by coder: k where there is one, else measured on the first contexts."""
        l0 = {name: float(record.k) for name, record in self._records.items() if record.k}
        if len(l0) < len(self._records):
            totals = dict.fromkeys(self._records, 0)
            for _, found in recorder.batches(contexts):
                for acts in found:
                    totals[acts.coder] += len(acts.latents)
                    self._note_range(acts.coder, acts.values)
            num_tokens = sum(len(context.tokens) for context in contexts)
            l0 = {name: l0.get(name, max(1.0, totals[name] / num_tokens)) for name in self._records}
        return l0

    def _note_range(self, coder: str, values: np.ndarray) -> None:
        if not fits_float16(values[values != 0]):
            self._float32.add(coder)

    def _disk(self, path: Path, l0: Mapping[str, float], *, is_growing: bool) -> DiskPlan | None:
        """Return what is still to be written; None when the number of tokens is not known."""
        num_tokens, there = self._config.corpus.num_tokens, coders_there(path)
        if num_tokens is None:
            return None
        if not is_growing:
            missing = {name: value for name, value in l0.items() if name not in there}
            return plan_disk(num_tokens, missing, has_corpus=bool(there), float32=self._float32)
        # The store stays as it is while a larger one is built beside it.
        manifest = read_manifest(path)
        theirs = {name: l0.get(name, extent.num_activations / manifest.extent.num_tokens) for name, extent in there.items()}
        float32 = self._float32 | {name for name, extent in there.items() if extent.dtype == "float32"}
        whole = plan_disk(num_tokens, theirs, float32=float32)
        new = plan_disk(max(0, num_tokens - manifest.extent.num_tokens), theirs, float32=float32)
        stored = sum(entry.num_bytes for entry in manifest.files.values())
        return DiskPlan(
            spill_bytes=new.spill_bytes,
            final_bytes=whole.final_bytes,
            peak_bytes=stored + new.spill_bytes + whole.final_bytes,
            corpus_bytes=new.corpus_bytes,
            stored_bytes=stored,
        )

    def _identity(self) -> Identity:
        corpus = self._config.corpus
        return Identity(
            ctx_len=corpus.ctx_len,
            subject_digest=self._subject.weights_digest,
            quantization=self._config.quantization,
            packing=corpus.packing,
            chat_template_digest=self._subject.chat_template_digest if corpus.messages is not None else None,
            token_filter=self._filter.name,
            bos_token_id=self._subject.bos_id,
        )

    def _provenance(self) -> dict[str, Any]:
        return {
            "subject": self._subject.name,
            "subject_revision": self._subject.revision,
            "dtype": self._subject.dtype,
            "device": self._subject.device.type,
            "batch_tokens": self._batch_tokens,
            "corpus": self._config.corpus.identity(),
            "corpus_fingerprint": self._corpus.fingerprint(),
            "versions": {"autointerp": __version__} | {name: version(name) for name in ("torch", "transformers")},
        }

    def _check_corpus_of_finished(self, manifest: Manifest, contexts: Iterator[Context]) -> None:
        """Raise IdentityError when a finished store holds other tokens; reads them again only where that is needed."""
        made = manifest.provenance
        fingerprint = self._corpus.fingerprint()
        if (
            made.get("corpus") == self._config.corpus.identity()
            and fingerprint in (made.get("corpus_fingerprint"),)
            and fingerprint
        ):
            return
        logger.info("comparing the corpus with the one in %s", self._config.out)
        wanted = self._identity().model_copy(update={"tokens_digest": tokens_digest(c.tokens for c in contexts).value()})
        check_identity(manifest.identity, wanted, where=self._config.out)

    def _summarise(self, path: Path, recorder: Recorder, names: list[str]) -> None:
        """Log what was recorded, and warn where a coder hardly fits what it read."""
        store = open_store(path)
        seconds = time.monotonic() - self._started
        for name in names:
            reader = store.coder(name)
            count = reader.latents["count"]
            live, l0 = int((count > 0).sum()), float(count.sum()) / store.num_tokens
            # A GPU's work is only queued by whoever times it.
            encoding = f", {recorder.seconds[name]:.1f} s encoding" if self._subject.device.type == "cpu" else ""
            logger.info(
                "%s: %d tokens, L0 %.1f, %d of %d latents live%s", name, store.num_tokens, l0, live, reader.width, encoding
            )
            if self._records[name].control_of is not None:
                continue
            hookpoint = self._readings[name].hookpoint
            if live < reader.width / 2:
                logger.warning(
                    "%s: %.0f%% of the latents never fire on this corpus; more tokens, or another hookpoint (now %s), may help",
                    name, 100 * (1 - live / reader.width), hookpoint,
                )  # fmt: skip
            if l0 > max(500, reader.width / 10) or l0 < 1:
                logger.warning(
                    "%s: L0 is %.1f, which no trained coder means to have; check its hookpoint (now %s) and its format",
                    name, l0, hookpoint,
                )  # fmt: skip
        logger.info("%s: %d tokens in %.1f s, %.0f tokens/s", path, store.num_tokens, seconds, store.num_tokens / seconds)
