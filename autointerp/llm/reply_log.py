"""The reply log: every reply is on disk before anything uses it, so that no request is paid twice.

One append-only file per shard, written by the worker that holds the shard. A line is JSON with a checksum of its own bytes::

    {"crc":"1f2e3d4c","key":"sha256:...","reply":{...}}

A torn or damaged last line is dropped when the file is opened. The key is the digest of the engine's identity and of the
complete request, the sample number included. Errors are never stored.
"""

from __future__ import annotations

import asyncio
import logging
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from autointerp.digest import digest
from autointerp.errors import StoreError
from autointerp.files import disk_errors
from autointerp.llm.budget import Budget
from autointerp.protocols import Engine
from autointerp.records import Capabilities, EngineId, Reply, Request, TokenLogprob, Usage

_LOG = logging.getLogger(__name__)
_HEAD = len(b'{"crc":"00000000",')
_KEY_VERSION = 1


def request_key(engine: EngineId, request: Request, extra: Mapping[str, Any] | None = None) -> str:
    """Return the digest that names a reply: engine, request with its sample, and the fields an engine adds to each body."""
    # Fields as they are, since `asdict` copies every token id of a prompt one by one.
    prompt = {"kind": type(request.prompt).__name__} | vars(request.prompt)
    constraint = request.constraint and {"kind": type(request.constraint).__name__} | vars(request.constraint)
    logprobs = request.prompt_logprobs and vars(request.prompt_logprobs)
    body = vars(request) | {"prompt": prompt, "constraint": constraint, "prompt_logprobs": logprobs}
    return digest({"v": _KEY_VERSION, "engine": vars(engine), "request": body, "extra": dict(extra or {})})


def reply_to_json(reply: Reply) -> dict[str, Any]:
    """Return a reply as JSON values, without fields at their defaults."""
    values: dict[str, Any] = {"text": reply.text, "finish": reply.finish, "usage": asdict(reply.usage)}
    if reply.served_model:
        values["served_model"] = reply.served_model
    if reply.label_probs is not None:
        values |= {"label_probs": reply.label_probs, "label_mass": reply.label_mass}
    for name in ("tokens", "prompt_tokens"):
        tokens: tuple[TokenLogprob, ...] = getattr(reply, name)
        if tokens:
            values[name] = [[token.token, token.token_id, token.logprob, token.top] for token in tokens]
    return values


def reply_from_json(values: Mapping[str, Any]) -> Reply:
    """Return the reply of :func:`reply_to_json`."""

    def tokens(rows: Iterable[Any]) -> tuple[TokenLogprob, ...]:
        return tuple(
            TokenLogprob(token=token, token_id=token_id, logprob=logprob, top=tuple((text, value) for text, value in top))
            for token, token_id, logprob, top in rows
        )

    probs = values.get("label_probs")
    return Reply(
        text=values["text"],
        finish=values["finish"],
        tokens=tokens(values.get("tokens", ())),
        prompt_tokens=tokens(values.get("prompt_tokens", ())),
        label_probs=None if probs is None else tuple(probs),
        label_mass=values.get("label_mass"),
        usage=Usage(**values["usage"]),
        served_model=values.get("served_model", ""),
    )


def _line(key: str, reply: Reply) -> bytes:
    rest = orjson.dumps({"key": key, "reply": reply_to_json(reply)})[1:]
    return b'{"crc":"%08x",' % zlib.crc32(rest) + rest + b"\n"


def _record(line: bytes) -> dict[str, Any] | None:
    """Return a line's record, or None when its bytes are not the ones that were written."""
    if len(line) <= _HEAD or not line.startswith(b'{"crc":"') or not line.endswith(b"}\n"):
        return None
    rest = line[_HEAD:-1]
    if line[8:16] != b"%08x" % zlib.crc32(rest):
        return None
    record: dict[str, Any] = orjson.loads(b"{" + rest)
    return record


class ReplyLog:
    """One shard's replies on disk. Opened for appending; use from one process and one event loop at a time."""

    def __init__(self, path: str | Path) -> None:
        """Open or create the log.

        Raises: ResourceError when the disk is full or read-only.
        """
        self.path = Path(path)
        self.dropped_bytes = 0
        """Length of the torn or damaged end that was dropped on opening."""
        self.num_damaged = 0
        """Lines that were not as written; those before the last good one stay in the file and are ignored."""
        self._at: dict[bytes, tuple[int, int]] = {}
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd: int | None = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                self._end = self._index(self._fd)
            except BaseException:
                self.close()
                raise

    def _index(self, fd: int) -> int:
        size = os.fstat(fd).st_size
        at = end = 0
        with self.path.open("rb") as file:
            for line in file:
                record = _record(line)
                if record is not None:
                    self._at[_short_key(record["key"])] = (at, len(line))
                    end = at + len(line)
                at += len(line)
                self.num_damaged += record is None
        if end < size:
            self.dropped_bytes = size - end
            os.ftruncate(fd, end)
            _LOG.warning("%s: dropped %d bytes of a reply that was being written when the run stopped", self.path, size - end)
        if self.num_damaged > (end < size):
            _LOG.warning("%s: %d damaged lines; their replies are asked for again", self.path, self.num_damaged)
        return end

    def __len__(self) -> int:
        return len(self._at)

    def __contains__(self, key: str) -> bool:
        return _short_key(key) in self._at

    def get(self, key: str) -> Reply | None:
        """Return the stored reply with `request_id` set, or None."""
        place = self._at.get(_short_key(key))
        if place is None:
            return None
        record = _record(os.pread(self._handle(), place[1], place[0]))
        if record is None:
            raise StoreError(f"the reply log {self.path} was changed by someone else at byte {place[0]} while it was in use")
        return replace(reply_from_json(record["reply"]), request_id=key)

    def append(self, key: str, reply: Reply) -> None:
        """Store a reply; when this returns it survives the end of the process, whatever ends it.

        Raises: ResourceError when the disk is full; what was written of the line is taken back.
        """
        line = _line(key, reply)
        fd = self._handle()
        with disk_errors(self.path):
            try:
                written = 0
                while written < len(line):
                    written += os.write(fd, line[written:])
            except OSError:
                os.ftruncate(fd, self._end)
                raise
        self._at[_short_key(key)] = (self._end, len(line))
        self._end += len(line)

    def sync(self) -> None:
        """Flush to the disk itself, so that the replies survive a power cut; called before a shard is marked done."""
        with disk_errors(self.path):
            os.fsync(self._handle())

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _handle(self) -> int:
        if self._fd is None:
            raise ValueError(f"the reply log {self.path} is closed")
        return self._fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _short_key(key: str) -> bytes:
    return bytes.fromhex(key.removeprefix("sha256:"))


@dataclass(kw_only=True)
class LogCounters:
    """What one logged engine did; `sent` and `usage` are what it cost, hits are free."""

    sent: int = 0
    """Requests handed to the engine."""
    hits: int = 0
    """Requests answered from the log."""
    shared: int = 0
    """Requests that joined an identical one in flight."""
    failures: int = 0
    """Requests the engine could not answer."""
    usage: Usage = field(default_factory=Usage)
    """Tokens of the replies received (never of hits)."""


@dataclass
class _Flight:
    task: asyncio.Task[Reply]
    waiting: int = 0


class LoggedEngine:
    """An engine behind a log: a logged reply is returned, any other is fetched, logged, then returned.

    `Reply.request_id` is the key. Identical requests under way at the same time are sent once. `budget` may be shared by many.
    """

    def __init__(self, engine: Engine, log: ReplyLog, budget: Budget | None = None) -> None:
        self.engine = engine
        self.log = log
        self.budget = budget if budget is not None else Budget()
        self.counters = LogCounters()
        self._flights: dict[str, _Flight] = {}

    @property
    def id(self) -> EngineId:
        return self.engine.id

    @property
    def capabilities(self) -> Capabilities:
        return self.engine.capabilities

    @property
    def context_tokens(self) -> int | None:
        return self.engine.context_tokens

    def beside(self, engine: Engine) -> LoggedEngine:
        """Return another engine behind the same log, counters and budget, and whatever else this one's requests go through."""
        below = getattr(self.engine, "beside", None)
        other = LoggedEngine(engine if below is None else below(engine), self.log, self.budget)
        other.counters, other._flights = self.counters, self._flights
        return other

    def key(self, request: Request) -> str:
        """Return the log's key of a request."""
        return request_key(self.engine.id, request, getattr(self.engine, "extra_body", None))

    async def complete(self, request: Request, /) -> Reply:
        """Answer from the log, or from the engine.

        Raises: BudgetReached before sending what a limit does not allow; else whatever the engine raises.
        """
        key = self.key(request)
        if (stored := self.log.get(key)) is not None:
            self.counters.hits += 1
            return stored
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight(asyncio.ensure_future(self._send(key, request)))
            flight.task.add_done_callback(lambda _: self._land(key, flight))
        else:
            self.counters.shared += 1
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        except asyncio.CancelledError:
            if flight.waiting == 1 and not flight.task.done():
                self._land(key, flight)
                flight.task.cancel()
            raise
        finally:
            flight.waiting -= 1

    def _land(self, key: str, flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    async def _send(self, key: str, request: Request) -> Reply:
        reserved = self.budget.reserve(request)
        self.counters.sent += 1
        usage: Usage | None = None
        try:
            reply = await self.engine.complete(request)
            usage = reply.usage
            self.counters.usage += usage
            self.log.append(key, reply)
            return replace(reply, request_id=key)
        finally:
            self.budget.settle(reserved, usage)
            if usage is None:
                self.counters.failures += 1

    async def tokenize(self, text: str, /) -> tuple[int, ...]:
        return await self.engine.tokenize(text)

    async def aclose(self) -> None:
        """Flush and close the log. The engine behind it stays open: other shards use it."""
        if self.log._fd is not None:
            self.log.sync()
            self.log.close()
