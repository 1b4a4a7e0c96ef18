"""What explain and score share: the store they read, the engine they ask, and one run from opening to closing."""

from __future__ import annotations

import asyncio
import os
import platform
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import BeforeValidator, Field

from autointerp import __version__
from autointerp.config import RUNTIME, Config
from autointerp.digest import digest
from autointerp.errors import ConfigError, Interrupted, nearest
from autointerp.examples.negatives import NEGATIVES
from autointerp.examples.partners import shuffled_partners
from autointerp.examples.selection import SelectionConfig, Selector, selection_id
from autointerp.jobs.gate import Gate, Stop
from autointerp.jobs.latents import CoderStatistics
from autointerp.jobs.plan import Items
from autointerp.jobs.progress import OnProgress, Progress
from autointerp.jobs.redact import redacted
from autointerp.jobs.runner import Bounds, ReadExamples, Runner, RunReport, Work
from autointerp.jobs.shards import LEASE_EXPIRY_S, Leases
from autointerp.jobs.signals import StopFlag
from autointerp.llm.budget import Budget
from autointerp.llm.engines import open_engine, prepare
from autointerp.llm.settings import EngineConfig
from autointerp.protocols import Engine, Needs, Vocabulary
from autointerp.records import Examples, LatentExamples
from autointerp.results.folder import ResultsFolder
from autointerp.results.write import Key
from autointerp.store import open_store
from autointerp.store.logits import Promoted, read_logits
from autointerp.worker import Worker

Control = Literal["shuffled", "generic", "lexical"]
LatentSpec = str | tuple[int, ...]
SampleSize = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(lambda value: None if value == "all" else value)]
"""A number of latents; None or ``all`` = no limit."""

SCORE_ONLY = ("num_positives", "num_negatives", "negatives", "embedder")
"""Settings of a selection that change what is scored and nothing that an explainer sees."""


class StageConfig(Config):
    """Settings of explain and score alike."""

    latents: LatentSpec | None = None
    """``0-99``, ``3,7,9``, ``random:500``, ``density:1e-5..1e-2``, ``all`` or a list file; None = all that is planned."""
    coders: tuple[str, ...] = ()
    """Coders of the store; none = all."""
    control_coder_latents: SampleSize = Field(default=200, json_schema_extra=RUNTIME)
    """Most latents of each control coder that ``all``, ``random:`` and ``density:`` mean, the first in their seeded order;
    None or ``all`` = as many as of other coders. Latents named by number are all meant."""
    engine: str | None = None
    """``openai:MODEL@URL``, ``hf:MODEL``, ``vllm:MODEL`` or ``module:Class``; None where no LLM is needed."""
    engine_options: EngineConfig = Field(default_factory=EngineConfig)
    """How the engine is opened, its prices, and the limits of the run."""
    worker: str | None = Field(default=None, json_schema_extra=RUNTIME)
    """``I/N``; None = from the SLURM array variables, or alone."""
    concurrency: int | None = Field(default=None, ge=1, json_schema_extra=RUNTIME)
    """Requests in flight; None = what the engine's options allow."""
    threads: int | None = Field(default=None, ge=1, json_schema_extra=RUNTIME)
    """Threads that build examples; None = one per core, at most 4."""
    lease_expiry_s: float = Field(default=LEASE_EXPIRY_S, gt=0, json_schema_extra=RUNTIME)
    """A shard whose worker gave no sign of life for this long is taken over."""
    grace_s: float = Field(default=20.0, ge=0, json_schema_extra=RUNTIME)
    """How long requests under way may go on after a signal."""


class Source(Protocol):
    """What the stages read of a store."""

    @property
    def store_id(self) -> str: ...

    @property
    def path(self) -> str: ...

    @property
    def coder_ids(self) -> Mapping[str, str]:
        """Name and digest of each coder."""

    @property
    def control_of(self) -> Mapping[str, str]:
        """The coder that each control is of, by the control's name."""

    @property
    def outgrown(self) -> Mapping[str, int]:
        """Id and tokens of each smaller store that it was extended from."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def selection(self) -> SelectionConfig: ...

    def statistics(self, coder: str) -> CoderStatistics:
        """Return counts and densities of a coder's latents."""

    def partners(self, coder: str) -> np.ndarray:
        """Return each latent's partner in the shuffled control, -1 where there is none."""

    def expect(self, latents: Sequence[Key]) -> None:
        """Hear which latents will be selected next, in order."""

    def select(self, coder: str, latent: int, *, num_validate: int = 0) -> LatentExamples:
        """Return the examples of one latent; called from several threads.

        `num_validate`: most windows of the validate pool on either side; none unless asked for.
        """

    def promoted(self, coder: str, latent: int) -> tuple[int, ...]:
        """Return the tokens that a latent promotes, the most promoted first.

        Raises: StoreError when the store has no table of them, with the command that makes it.
        """


class StoreSource:
    """A store and a way to choose examples from it."""

    def __init__(self, path: Path | str, selection: SelectionConfig) -> None:
        self._store = open_store(path)
        self.selection = selection
        self._selector = Selector(self._store, selection)
        self._partners: dict[str, np.ndarray] = {}
        self._promoted: dict[str, Promoted] = {}
        self._lock = threading.Lock()
        self._ready: set[str] = set()

    @property
    def store_id(self) -> str:
        return str(self._store.store_id)

    @property
    def path(self) -> str:
        return str(Path(self._store.path).resolve())

    @property
    def coder_ids(self) -> dict[str, str]:
        return {name: str(self._store.coder(name).coder_id) for name in self._store.coder_names}

    @property
    def control_of(self) -> dict[str, str]:
        records = {name: self._store.coder(name).record for name in self._store.coder_names}
        return {name: record.control_of for name, record in records.items() if record.control_of is not None}

    @property
    def outgrown(self) -> dict[str, int]:
        return {step["store_id"]: step["num_tokens"] for step in self._store.manifest.provenance.get("extended", [])}

    @property
    def vocabulary(self) -> Vocabulary:
        vocabulary: Vocabulary = self._store.vocabulary
        return vocabulary

    def statistics(self, coder: str) -> CoderStatistics:
        columns = self._store.coder(coder).latents
        return CoderStatistics(coder=coder, counts=np.asarray(columns["count"]), density=np.asarray(columns["density"]))

    def partners(self, coder: str) -> np.ndarray:
        if coder not in self._partners:
            self._partners[coder] = np.asarray(shuffled_partners(self._store, coder, seed=self.selection.seed))
        return self._partners[coder]

    def promoted(self, coder: str, latent: int) -> tuple[int, ...]:
        with self._lock:
            if coder not in self._promoted:
                self._promoted[coder] = Promoted(read_logits(self._store, coder))
            return self._promoted[coder].of(latent)

    def expect(self, latents: Sequence[Key]) -> None:
        self._selector.expect(latents)

    def select(self, coder: str, latent: int, *, num_validate: int = 0) -> LatentExamples:
        with self._lock:
            if coder not in self._ready and any(
                NEGATIVES[name].kind or NEGATIVES[name].needs_embeddings for name in self.selection.negatives
            ):
                # Weights are wanted by cosines only; most runs never import what loads them.
                from autointerp.jobs.tables import ensure_negatives

                ensure_negatives(self._store, coder, self.selection)
            self._ready.add(coder)
        return self._selector.select(coder, latent, num_validate=num_validate)


def examples_for(needs: Needs, source: Source, coder: str, latent: int) -> LatentExamples:
    """Return the examples of one latent with what an explainer of these needs is shown beside them."""
    # Only who asks for them pays for them; sources of one's own need not know of the validate pool.
    examples = source.select(coder, latent, num_validate=needs.validate) if needs.validate else source.select(coder, latent)
    return replace(examples, promoted=source.promoted(coder, latent)) if needs.logits else examples


def choose_coders(wanted: Sequence[str], source: Source) -> list[str]:
    """Return the coders to work on, in the store's order.

    Raises: ConfigError when the store lacks one.
    """
    for name in wanted:
        if name not in source.coder_ids:
            raise ConfigError(f"the store {source.path} has no coder {name!r}; {nearest(name, source.coder_ids)}")
    return [name for name in source.coder_ids if not wanted or name in wanted]


def explain_part(selection: SelectionConfig) -> SelectionConfig:
    """Return `selection` with everything that no explainer sees at its default."""
    fields = SelectionConfig.model_fields
    return selection.model_copy(update={name: fields[name].get_default() for name in SCORE_ONLY})


def selection_digest(selection: SelectionConfig) -> str:
    """Return the digest of the rules of choice alone, whatever the store and the coder."""
    return selection_id("", "", selection)


def engine_identity(engine: Engine | None) -> dict[str, Any] | None:
    """Return what decides an engine's replies, as JSON values."""
    if engine is None:
        return None
    extra = getattr(engine, "extra_body", None)
    identity = engine.id
    values: dict[str, Any] = {
        "kind": identity.kind,
        "model": identity.model,
        "revision": identity.revision,
        "quantization": identity.quantization,
        "template_digest": identity.template_digest,
    }
    return values | ({"extra_body": digest(dict(extra))} if extra else {})


def empty_latent(source: Source, key: Key) -> LatentExamples:
    """Return what stands for a latent whose examples could not be read."""
    nothing = Examples.empty(source.selection.window)
    return LatentExamples(
        coder=key[0],
        latent=key[1],
        selection_id=selection_id(source.store_id, source.coder_ids[key[0]], source.selection),
        status="ok",
        disjoint="unknown",
        density=0.0,
        max_activation=0.0,
        explain=nothing,
        explain_statistics=nothing,
        explain_negatives=nothing,
        positives=nothing,
        negatives=nothing,
        negative_sources=source.selection.negative_sources,
    )


async def open_prepared(spec: str | None, options: EngineConfig) -> Engine | None:
    """Open an engine and ask it what it is; None without a spec."""
    if spec is None:
        return None
    engine = open_engine(spec, options)
    try:
        await prepare(engine)
    except BaseException:
        await engine.aclose()
        raise
    return engine


def worker_of(config: StageConfig) -> Worker:
    """Return which worker this process is."""
    return Worker.parse(config.worker) if config.worker else Worker.from_environment(dict(os.environ))


async def run_works(
    config: StageConfig,
    folder: ResultsFolder,
    works: Sequence[Work],
    items: Items,
    *,
    engine: Engine | None,
    read_examples: ReadExamples,
    expect: Callable[[Sequence[Key]], None],
    requests_per_latent: int,
    leases: Leases,
    progress: bool | OnProgress | None,
    stop: StopFlag | None,
) -> RunReport:
    """Run methods over shards with the bounds of `config`.

    Raises: Interrupted after a signal, EngineStopped when the server gave up; finished work is committed by then.
    """
    options = config.engine_options
    servers = config.engine.count(",") + 1 if config.engine else 1
    concurrency = config.concurrency or options.concurrency * servers
    threads = config.threads or min(4, os.cpu_count() or 1)
    # Latents in flight keep the engine busy and the examples ahead of it, and bound memory whatever the concurrency.
    latents = threads + (min(-(-concurrency // requests_per_latent) + 2, 256) if engine is not None else 1)
    bounds = Bounds(latents=latents, threads=threads, grace_s=config.grace_s)
    budget = Budget(prices=options.prices, max_requests=options.max_requests, max_cost=options.max_cost)
    gate = Gate(engine, concurrency=concurrency, budget=budget)
    if stop is not None:
        loop = asyncio.get_running_loop()
        stop.connect(lambda name: _close_soon(loop.call_soon_threadsafe, gate, name))
    runner = Runner(
        folder,
        works,
        gate=gate,
        leases=leases,
        bounds=bounds,
        read_examples=read_examples,
        expect=expect,
        progress=Progress(works[0].method.stage, progress),
        worker=worker_of(config),
    )
    report = await runner.run(items)
    if report.stop is not None and report.stop.kind == "signal":
        raise Interrupted(f"{report.sentence()}; finished work is committed, run the same command again to go on")
    return report


def _close_soon(call: Callable[..., object], gate: Gate, name: str) -> None:
    try:
        call(gate.close, Stop("signal", name))
    except RuntimeError:
        # The loop ended between the signal and here; there is nothing left to stop.
        return


def describe_run(command: str, config: Config) -> dict[str, Any]:
    """Return what ``runs/NNNN-<command>.json`` says: settings, versions and command line, without keys."""
    packages = ("numpy", "pyarrow", "torch", "transformers", "openai", "vllm")
    versions = {"autointerp": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    found: dict[str, Any] = redacted(
        {"command": command, "arguments": sys.argv[1:], "config": config.model_dump(mode="json"), "versions": versions}
    )
    return found
