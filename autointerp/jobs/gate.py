"""The one way from methods to an engine: it bounds requests under way, meters them, keeps to the budget and can be closed.

A closed gate lets nothing out any more: a new request waits for ever, and the runner cancels whoever waits. So neither
explainers nor scorers see a stop, and none can mistake it for an answer. Above the gate lies a reply log, which answers
what was asked before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from autointerp.errors import EngineStopped, LLMError, ReplyError
from autointerp.llm.budget import Budget, BudgetReached
from autointerp.protocols import Engine
from autointerp.records import Capabilities, EngineId, Reply, Request
from autointerp.results.write import add_usage


@dataclass(frozen=True)
class Stop:
    """Why a run ends before its work does."""

    kind: Literal["signal", "budget", "engine", "error", "cancelled"]
    sentence: str
    error: BaseException | None = None


@dataclass
class Meter:
    """Counts of one shard of one method."""

    sent: int = 0
    answered: int = 0
    failed: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    """Failed requests by the kind of error."""
    usage: dict[str, int] = field(default_factory=dict)
    """Tokens of the replies that came."""

    def fail(self, error: Exception) -> None:
        """Count a request that ended in `error`."""
        self.failed += 1
        self.errors[type(error).__name__] = self.errors.get(type(error).__name__, 0) + 1


class Gate:
    """Everything a run sends goes through here; belongs to one event loop."""

    def __init__(self, engine: Engine | None, *, concurrency: int, budget: Budget | None = None) -> None:
        self.engine = engine
        self.budget = budget or Budget()
        self.stop: Stop | None = None
        self.stopped = asyncio.Event()
        self.in_flight = 0
        self._slots = asyncio.Semaphore(concurrency)
        self._settled = asyncio.Event()

    def close(self, stop: Stop) -> None:
        """Let nothing out any more; the first reason counts."""
        if self.stop is None:
            self.stop = stop
            self.stopped.set()

    async def send(self, request: Request, meter: Meter, engine: Engine | None = None) -> Reply:
        """Send one request when a slot is free and the budget allows; wait for ever when the gate is closed.

        `engine`: None = the gate's own.
        Raises: LLMError or ReplyError of the engine, never EngineStopped: that closes the gate.
        """
        engine = engine or self.engine
        assert engine is not None
        async with self._slots:
            reserved = await self._admitted(request)
            self.in_flight += 1
            meter.sent += 1
            reply: Reply | None = None
            try:
                reply = await engine.complete(request)
            except EngineStopped as error:
                meter.fail(error)
                self.close(Stop("engine", str(error), error))
            except (LLMError, ReplyError) as error:
                meter.fail(error)
                raise
            finally:
                self.in_flight -= 1
                self.budget.settle(reserved, reply.usage if reply is not None else None)
                self._settled.set()
                self._settled = asyncio.Event()
            if reply is None:
                return await _never()
            meter.answered += 1
            meter.usage = add_usage(meter.usage, reply.usage)
            return reply

    async def _admitted(self, request: Request) -> float:
        """Return what is reserved for `request`, once it may leave."""
        while True:
            if self.stop is not None:
                await _never()
            try:
                return self.budget.reserve(request)
            except BudgetReached as error:
                # What is reserved for requests under way is more than they will cost, so the last word is theirs.
                if not self.in_flight:
                    self.close(Stop("budget", str(error)))
                else:
                    await self._settled.wait()


async def _never() -> Reply:
    await asyncio.Event().wait()
    raise AssertionError("nothing sets this event")


class GatedEngine:
    """The engine below the reply log: sends through the gate and charges a shard's meter."""

    def __init__(self, gate: Gate, meter: Meter, engine: Engine | None = None) -> None:
        """`engine`: None = the gate's own."""
        chosen = engine or gate.engine
        assert chosen is not None
        self._engine, self._gate, self._meter = chosen, gate, meter
        self.extra_body: Mapping[str, Any] | None = getattr(chosen, "extra_body", None)
        """Part of the reply log's key."""

    def beside(self, engine: Engine) -> GatedEngine:
        """Return `engine` behind the same gate, charged to the same meter."""
        return GatedEngine(self._gate, self._meter, engine)

    @property
    def id(self) -> EngineId:
        return self._engine.id

    @property
    def capabilities(self) -> Capabilities:
        return self._engine.capabilities

    @property
    def context_tokens(self) -> int | None:
        return self._engine.context_tokens

    async def complete(self, request: Request, /) -> Reply:
        return await self._gate.send(request, self._meter, self._engine)

    async def tokenize(self, text: str, /) -> tuple[int, ...]:
        return await self._engine.tokenize(text)

    async def aclose(self) -> None:
        """Do nothing: the run that opened the engine closes it."""


def merged(counts: Mapping[str, int], more: Mapping[str, int]) -> dict[str, int]:
    """Return the sum of two tables of counts."""
    return {key: counts.get(key, 0) + more.get(key, 0) for key in sorted({*counts, *more})}
