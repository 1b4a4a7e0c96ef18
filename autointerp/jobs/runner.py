"""Runs one stage over the shards of a plan: takes leases, builds examples, lets methods work, commits, resumes, stops cleanly.

What a stage does with a latent is behind :class:`Work`; this module owns order, bounds, failures and commits. A bounded
number of latents is in flight, so memory does not grow with the plan. The one place that catches ``Exception``: a latent
that raises gets a row with a status and a row in the failures table, and the run goes on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from autointerp.errors import AutointerpError, ContextExceeded, InputError, LLMError, ReplyError
from autointerp.jobs.gate import Gate, GatedEngine, Meter, Stop, merged
from autointerp.jobs.plan import Items
from autointerp.jobs.progress import Progress
from autointerp.jobs.redact import redact
from autointerp.jobs.shards import Leases
from autointerp.llm.reply_log import LoggedEngine, ReplyLog
from autointerp.protocols import Engine
from autointerp.records import RETRYABLE, LatentExamples, Status
from autointerp.results.folder import Method, ResultsFolder, shard_name
from autointerp.results.write import (
    MAIN_TABLE,
    Failure,
    Key,
    Marker,
    ShardRows,
    is_whole,
    read_marker,
    read_rows,
    write_marker,
    write_tables,
)
from autointerp.worker import Worker

logger = logging.getLogger("autointerp.jobs")

UNSCORED_STATUSES = frozenset({"unparseable", "refused", "truncated", "no_reply", "too_long"})
"""Rows with these make a run end with exit code 3."""


class Work(Protocol):
    """One method of a stage, as the runner sees it."""

    @property
    def method(self) -> Method: ...

    def wants(self, key: Key) -> bool:
        """Whether it works on this latent at all; a control may be run on a sample."""

    def is_ready(self, key: Key) -> bool:
        """Whether what it reads of this latent is there."""

    async def process(self, latent: LatentExamples, engine: Engine | None) -> ShardRows:
        """Return the rows of one latent whose status is ``ok``."""

    def without_result(self, latent: LatentExamples, status: Status) -> ShardRows:
        """Return the rows that say why there is no result."""

    def without_examples(self, key: Key) -> LatentExamples:
        """Return what stands for a latent whose examples could not be read."""

    def before_commit(self, shard: int, keys: Iterable[Key]) -> None:
        """Write what belongs to these latents of the shard beside the rows."""


ReadExamples = Callable[[str, int], LatentExamples]


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """What one run did."""

    stage: str
    methods: tuple[str, ...]
    num_done: int
    """Shards (of any method) that this run finished."""
    num_partial: int
    num_held: int
    """Shards that other workers hold."""
    num_waiting: int
    """Latents whose explanations are not there yet."""
    num_latents: int
    """Latents that this run gave rows."""
    rows_by_status: Mapping[str, int]
    unscored: Mapping[str, int]
    """Single verdicts without an answer, by reason."""
    failures: Mapping[str, int]
    num_sent: int
    num_logged: int
    num_failed: int
    usage: Mapping[str, int]
    cost: float
    seconds: float
    stop: Stop | None = None
    left_out: tuple[str, ...] = ()
    """Methods that were not run since something they need is missing, a sentence each."""
    notes: tuple[str, ...] = ()
    """What was done for fewer latents than one might think, a sentence each."""

    @property
    def exit_code(self) -> int:
        """0 when all that was asked for has its result, 3 when something has none or is left."""
        missing = self.num_partial or self.num_waiting or self.failures or self.unscored or self.stop is not None
        return 3 if missing or any(self.rows_by_status.get(status) for status in UNSCORED_STATUSES) else 0

    def sentence(self) -> str:
        """Return one line for people."""
        rows = ", ".join(f"{count} {status}" for status, count in sorted(self.rows_by_status.items())) or "no new rows"
        parts = [f"{self.stage}: {self.num_latents} latents in {self.seconds:.1f} s ({rows})"]
        if self.num_sent or self.num_logged:
            parts.append(f"{self.num_sent} requests sent, {self.num_failed} failed, {self.num_logged} answered from the log")
        if self.cost:
            parts.append(f"${self.cost:.4f}")
        if self.unscored:
            parts.append("without a verdict: " + ", ".join(f"{n} {why}" for why, n in sorted(self.unscored.items())))
        if self.num_partial:
            parts.append(f"{self.num_partial} shards partial: run the same command again to try what failed")
        if self.num_held:
            parts.append(f"{self.num_held} shards are with other workers")
        if self.num_waiting:
            parts.append(f"{self.num_waiting} latents wait for explanations: run `autointerp explain` on them")
        if self.left_out:
            parts.append(f"left out: {', '.join(self.left_out)}")
        parts.extend(self.notes)
        if self.stop is not None:
            parts.append(f"stopped: {self.stop.sentence}")
        return "; ".join(parts)


@dataclass
class _Totals:
    done: int = 0
    partial: int = 0
    held: int = 0
    latents: int = 0
    waiting: set[Key] = field(default_factory=set)
    rows: Counter[str] = field(default_factory=Counter)
    unscored: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    meter: Meter = field(default_factory=Meter)
    logged: int = 0


@dataclass
class _Open:
    """One method's part of a shard while this worker has it."""

    work: Work
    lease: str
    items: list[Key]
    wanted: set[Key]
    """Latents asked for that have no final rows yet."""
    todo: set[Key]
    """Those of them that can be worked on now."""
    kept: ShardRows
    """All rows committed before; those of latents that get new rows are replaced."""
    before: Marker | None
    engine: LoggedEngine | None
    meter: Meter
    rows: dict[Key, ShardRows] = field(default_factory=dict)
    finished: set[Key] = field(default_factory=set)
    is_done: bool = False

    @property
    def num_logged(self) -> int:
        """Requests answered from the reply log."""
        return self.engine.counters.hits if self.engine is not None else 0


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How much is under way at once."""

    latents: int
    """Latents in flight."""
    shards: int = 1
    """Shards in flight: the next is begun while the last latents of one wait for replies."""
    threads: int = 2
    grace_s: float = 20.0
    """How long requests under way may go on after a stop."""


class Runner:
    """Runs methods over shards; one object per run."""

    def __init__(
        self,
        folder: ResultsFolder,
        works: Sequence[Work],
        *,
        gate: Gate,
        leases: Leases,
        bounds: Bounds,
        read_examples: ReadExamples,
        expect: Callable[[Sequence[Key]], None],
        progress: Progress,
        worker: Worker,
    ) -> None:
        self._folder, self._works, self._gate, self._leases = folder, works, gate, leases
        self._bounds, self._read_examples, self._expect = bounds, read_examples, expect
        self._progress, self._worker = progress, worker
        self._totals = _Totals()
        self._slots = asyncio.Semaphore(bounds.latents)

    async def run(self, items: Items) -> RunReport:
        """Work on what is wanted and left of `items`.

        Raises: EngineStopped, or an InputError met on the way, after committing what is finished.
        """
        started = time.monotonic()
        stage = self._works[0].method.stage
        self._pool = ThreadPoolExecutor(self._bounds.threads, thread_name_prefix="autointerp-examples")
        try:
            await self._shards(items)
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._progress.close()
        stop = self._gate.stop
        if stop is not None and stop.error is not None:
            raise stop.error
        totals = self._totals
        return RunReport(
            stage=stage,
            methods=tuple(work.method.label for work in self._works),
            num_done=totals.done,
            num_partial=totals.partial,
            num_held=totals.held,
            num_waiting=len(totals.waiting),
            num_latents=totals.latents,
            rows_by_status=dict(totals.rows),
            unscored=dict(totals.unscored),
            failures=dict(totals.failures),
            num_sent=totals.meter.sent,
            num_logged=totals.logged,
            num_failed=totals.meter.failed,
            usage=totals.meter.usage,
            cost=self._gate.budget.cost,
            seconds=time.monotonic() - started,
            stop=stop,
        )

    async def _shards(self, items: Items) -> None:
        self._progress.start(items.num_wanted)
        under_way: set[asyncio.Task[None]] = set()
        try:
            for shard in self._worker.order(items.wanted_shards):
                if self._gate.stop is not None:
                    break
                started = asyncio.Event()
                task = asyncio.create_task(self._shard(shard, items.of(shard), set(items.wanted(shard)), started))
                under_way.add(task)
                await _first(task, started.wait())
                while len([t for t in under_way if not t.done()]) >= self._bounds.shards:
                    await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                    under_way = _collect(under_way)
            while under_way:
                await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                under_way = _collect(under_way)
        except BaseException as error:
            self._gate.close(Stop("cancelled" if isinstance(error, asyncio.CancelledError) else "error", str(error), error))
            await asyncio.gather(*under_way, return_exceptions=True)
            raise

    async def _shard(self, shard: int, items: list[Key], scope: set[Key], started: asyncio.Event) -> None:
        """Work on one shard; sets `started` when its last latent has begun."""
        begun = time.monotonic()
        opened = [part for work in self._works if (part := self._open(work, shard, items, scope)) is not None]
        try:
            keys = [key for key in items if any(key in part.todo for part in opened)]
            self._expect(keys)
            tasks = []
            for key in keys:
                await _first(self._slots.acquire(), self._gate.stopped.wait())
                if self._gate.stop is not None:
                    break
                task = asyncio.create_task(self._latent(key, [part for part in opened if key in part.todo]))
                task.add_done_callback(lambda _: self._slots.release())
                tasks.append(task)
            started.set()
            if tasks:
                await self._finish(tasks)
            self._progress.advance(len(scope.difference(keys)), is_new=False)
            self._totals.latents += len({key for part in opened for key in part.rows})
            for part in opened:
                await self._commit(part, shard, seconds=time.monotonic() - begun)
        finally:
            started.set()
            for part in opened:
                if part.engine is not None:
                    await part.engine.aclose()
                self._leases.release(part.lease, is_done=part.is_done)

    def _open(self, work: Work, shard: int, items: list[Key], scope: set[Key]) -> _Open | None:
        """Take the shard for one method; None when it is done, held, or has nothing to do now."""
        method = work.method
        before = read_marker(self._folder, method.stage, method.label, shard)
        if before is not None and before.is_done:
            return None
        scope = {key for key in scope if work.wants(key)}
        if not scope:
            return None
        lease = f"{method.stage}/{method.label}/{shard_name(shard)}"
        if self._leases.acquire(lease) is None:
            self._totals.held += 1
            return None
        try:
            before = read_marker(self._folder, method.stage, method.label, shard)
            kept = read_rows(self._folder, method, shard) if before is not None else ShardRows()
            wanted = scope - finished_keys(kept, method.stage)
            if before is not None and not is_whole(self._folder, before):
                # Killed between two tables of a later commit: they do not fit each other, so what has rows is done again.
                wanted = scope | kept.keys()
                kept = ShardRows()
            todo = {key for key in wanted if work.is_ready(key)}
            self._totals.waiting.update(wanted - todo)
            if (before is not None and before.is_done) or not todo:
                self._leases.release(lease, is_done=before is not None and before.is_done)
                return None
            meter = Meter()
            return _Open(work, lease, items, wanted, todo, kept, before, self._engine(method, shard, meter), meter)
        except BaseException:
            self._leases.release(lease, is_done=False)
            raise

    def _engine(self, method: Method, shard: int, meter: Meter) -> LoggedEngine | None:
        if self._gate.engine is None:
            return None
        return LoggedEngine(GatedEngine(self._gate, meter), ReplyLog(self._folder.replies(method, shard)))

    async def _finish(self, tasks: list[asyncio.Task[None]]) -> None:
        """Wait for latents; after a stop, for as long as requests under way may take, then give the rest up."""
        everything = asyncio.gather(*tasks, return_exceptions=True)
        await _first(everything, self._gate.stopped.wait())
        if not everything.done():
            deadline = time.monotonic() + self._bounds.grace_s
            while not everything.done() and time.monotonic() < deadline:
                if self._gate.engine is not None and not self._gate.in_flight:
                    # What needs no further request is finished within a moment; the rest waits at the closed gate.
                    await asyncio.wait(tasks, timeout=0.2)
                    if not self._gate.in_flight:
                        break
                await asyncio.wait(tasks, timeout=0.05)
            for task in tasks:
                task.cancel()
        await everything

    async def _latent(self, key: Key, parts: list[_Open]) -> None:
        """Build one latent's examples and let every method work on it."""
        try:
            await self._worked_on(key, parts)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._gate.close(Stop("error", str(error), error))
            raise

    async def _worked_on(self, key: Key, parts: list[_Open]) -> None:
        loop = asyncio.get_running_loop()
        latent: LatentExamples | None = None
        error: Exception | None = None
        try:
            latent = await loop.run_in_executor(self._pool, self._read_examples, *key)
        except InputError:
            raise
        except Exception as caught:
            logger.exception("reading the examples of %s/%d failed", *key)
            error = caught
        for part in parts:
            if latent is None:
                part.rows[key] = self._failed(part.work, part.work.without_examples(key), error or RuntimeError("no examples"))
            else:
                part.rows[key] = await self._process(part, latent)
        self._progress.advance(1, is_new=True)

    async def _process(self, part: _Open, latent: LatentExamples) -> ShardRows:
        if latent.status != "ok":
            return part.work.without_result(latent, latent.status)
        try:
            if part.engine is not None:
                return await part.work.process(latent, part.engine)
            # Nothing to wait for: a thread of its own keeps the loop free for heartbeats and signals.
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, lambda: asyncio.run(part.work.process(latent, None)))
        except InputError:
            raise
        except (LLMError, ReplyError) as error:
            return self._failed(part.work, latent, error)
        except Exception as error:
            logger.exception("%s failed on %s/%d", part.work.method.name, latent.coder, latent.latent)
            return self._failed(part.work, latent, error)

    def _failed(self, work: Work, latent: LatentExamples, error: Exception) -> ShardRows:
        status: Status = "too_long" if isinstance(error, ContextExceeded) else "no_reply"
        rows = work.without_result(latent, status)
        text = str(error) if isinstance(error, AutointerpError) else f"{type(error).__name__}: {error}"
        rows.failures.append(
            Failure(
                coder=latent.coder,
                latent=latent.latent,
                stage=work.method.stage,
                method=work.method.label,
                status=status,
                error=redact(f"{type(error).__name__}: {text}" if isinstance(error, AutointerpError) else text)[:500],
            )
        )
        return rows

    async def _commit(self, part: _Open, shard: int, *, seconds: float) -> None:
        """Write tables, then the marker; nothing when there is nothing new or the lease was lost."""
        totals = self._totals
        totals.logged += part.num_logged
        _add(totals.meter, part.meter)
        if part.engine is not None:
            await part.engine.aclose()
        if not part.rows:
            return
        if self._leases.is_lost(part.lease):
            label = part.work.method.label
            logger.warning("%s of %s was taken over by another worker while this one slept", shard_name(shard), label)
            return
        new = ShardRows()
        for rows in part.rows.values():
            new.extend(rows)
        # In a thread: other shards' requests go on while big tables are written.
        marker = await asyncio.to_thread(self._write, part, shard, new, seconds)
        part.is_done = marker.is_done
        totals.done += marker.is_done
        totals.partial += not part.wanted <= part.finished
        main = MAIN_TABLE[part.work.method.stage]
        totals.rows.update(row.status for row in getattr(new, main))
        totals.unscored.update(row.status for row in new.verdicts if row.status in UNSCORED_STATUSES)
        totals.failures.update(_reason(row.error) for row in new.failures)

    def _write(self, part: _Open, shard: int, new: ShardRows, seconds: float) -> Marker:
        method, before = part.work.method, part.before
        rows = part.kept.without(part.rows)
        rows.extend(new)
        part.work.before_commit(shard, part.rows)
        written = write_tables(self._folder, method, shard, rows)
        part.finished = finished_keys(rows, method.stage)
        marker = Marker(
            stage=method.stage,
            method=method.label,
            shard=shard,
            status="done" if len(part.finished) == len(part.items) else "partial",
            num_items=len(part.items),
            num_finished=len(part.finished),
            tables=written,
            rows_by_status=_counts(row.status for row in getattr(rows, MAIN_TABLE[method.stage])),
            failures=_counts(_reason(row.error) for row in rows.failures),
            unscored=_counts(row.status for row in rows.verdicts if row.status in UNSCORED_STATUSES),
            errors=merged(before.errors if before else {}, part.meter.errors),
            usage=merged(before.usage if before else {}, part.meter.usage),
            num_sent=(before.num_sent if before else 0) + part.meter.sent,
            num_logged=(before.num_logged if before else 0) + part.num_logged,
            num_failed=(before.num_failed if before else 0) + part.meter.failed,
            seconds=round((before.seconds if before else 0.0) + seconds, 3),
            finished_at=time.time(),
            worker=f"{socket.gethostname()}:{os.getpid()}",
        )
        write_marker(self._folder, marker)
        return marker


async def _first(*awaitables: Awaitable[object]) -> None:
    """Wait for the first; coroutines given here are then cancelled, tasks and futures go on."""
    waited = [(a, isinstance(a, asyncio.Future)) for a in awaitables]
    futures = [(asyncio.ensure_future(a), is_shared) for a, is_shared in waited]
    try:
        await asyncio.wait([future for future, _ in futures], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for future, is_shared in futures:
            if not is_shared:
                future.cancel()


def _collect(tasks: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
    """Return the tasks that go on; an error of a finished one is raised."""
    for task in tasks:
        if task.done():
            task.result()
    return {task for task in tasks if not task.done()}


def finished_keys(rows: ShardRows, stage: str) -> set[Key]:
    """Return the latents whose rows a later run need not try again."""
    main = {(row.coder, row.latent) for row in getattr(rows, MAIN_TABLE[stage])}
    again = {(row.coder, row.latent) for row in getattr(rows, MAIN_TABLE[stage]) if row.status in RETRYABLE}
    again |= {(row.coder, row.latent) for row in rows.verdicts if row.status in RETRYABLE}
    return main - again


def _reason(error: str) -> str:
    """The part of an error text that many failures share."""
    return error.split(":", 1)[0]


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _add(total: Meter, meter: Meter) -> None:
    total.sent += meter.sent
    total.answered += meter.answered
    total.failed += meter.failed
    total.usage = merged(total.usage, meter.usage)
