"""How fast requests go out and what happens when one fails: adaptive concurrency, shared pauses, retries, circuit breakers.

The rules of concurrency are inspect_ai's: slow start that doubles per clean round, five per cent growth per clean round after
the first rate limit, a cut to 0.8 at most once per 15 s, growth only where at least 80 % of the limit was really in use. Only
rate limits cut; other failures merely void the round. All but the retry budget is per endpoint; all runs in one event loop.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Generic, TypeVar

from autointerp.errors import EngineStopped, LLMError, Permanent, RateLimited, ReplyError, Transient
from autointerp.llm.clock import Clock
from autointerp.llm.settings import EngineConfig

_CUT = 0.8
_GROWTH = 1.05
_USED_FRAC = 0.8
_COOLDOWN_S = 15.0
_JITTER_FRAC = 0.1
_JITTER_CAP_S = 5.0
_FREE_RETRIES = 10

T = TypeVar("T")
R = TypeVar("R")


class Unreachable(Transient):
    """No connection could be opened: the request has not been seen by any server."""


def retry_after_s(headers: Mapping[str, str], wall: float) -> float | None:
    """Return the wait in seconds that a server asks for in ``retry-after-ms`` or ``retry-after`` (seconds or a date), or None.

    `wall` is the time now, in seconds since 1970. Header names are looked up in lower case.
    """
    try:
        return max(0.0, float(headers["retry-after-ms"]) / 1000)
    except (KeyError, ValueError):
        pass
    text = headers.get("retry-after", "").strip()
    try:
        seconds = float(text)
        return max(0.0, seconds) if seconds < float("inf") else None
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - wall)
    except (ValueError, OverflowError):
        return None


class AdaptiveLimit:
    """A limit of requests in flight that finds its own size; first come, first served."""

    def __init__(self, *, start: int, high: int, clock: Clock) -> None:
        self.value = float(min(start, high))
        """The limit; its whole part is in force."""
        self.high = high
        self.in_flight = 0
        self._clock = clock
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._is_slow_start = True
        self._clean = 0
        self._peak = 0
        self._cool_until = float("-inf")

    @property
    def load(self) -> int:
        """Requests in flight or waiting."""
        return self.in_flight + len(self._waiters)

    async def acquire(self) -> None:
        """Take a slot, waiting for one if need be."""
        if self.in_flight < int(self.value) and not self._waiters:
            self._take()
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.release()
            else:
                self._waiters.remove(waiter)
            raise

    def release(self) -> None:
        """Give a slot back."""
        self.in_flight -= 1
        self._wake()

    def succeeded(self, *, is_first_attempt: bool) -> None:
        """Count a success; a clean round of them, as many as the limit, lets it grow."""
        if not is_first_attempt or self._clock.now() < self._cool_until:
            return
        self._clean += 1
        if self._clean < int(self.value):
            return
        if self._peak >= _USED_FRAC * int(self.value):
            self.value = min(float(self.high), self.value * (2.0 if self._is_slow_start else _GROWTH))
        self._new_round()
        self._wake()

    def limited(self) -> None:
        """Count an answer that asks for fewer requests."""
        self._is_slow_start = False
        self._new_round()
        if self._clock.now() >= self._cool_until:
            self.value = max(1.0, self.value * _CUT)
            self._cool_until = self._clock.now() + _COOLDOWN_S

    def failed(self) -> None:
        """Count a failure that says nothing about load: the round is void."""
        self._new_round()

    def _new_round(self) -> None:
        self._clean = 0
        self._peak = self.in_flight

    def _take(self) -> None:
        self.in_flight += 1
        self._peak = max(self._peak, self.in_flight)

    def _wake(self) -> None:
        while self._waiters and self.in_flight < int(self.value):
            waiter = self._waiters.popleft()
            if not waiter.done():
                self._take()
                waiter.set_result(None)


class Endpoint(Generic[T]):
    """One server: its limit, the pause it asked for, and its failures in a row."""

    def __init__(self, target: T, name: str, config: EngineConfig, clock: Clock) -> None:
        self.target = target
        self.name = name
        self.limit = AdaptiveLimit(start=config.start_concurrency, high=config.concurrency, clock=clock)
        self.paused_until = float("-inf")
        self._config = config
        self._clock = clock
        self._failures = 0
        self._failing_since = 0.0
        self._limited_since: float | None = None
        self._broken_at: float | None = None

    def is_open(self) -> bool:
        """Return whether requests may go here: it works, or it has been left alone long enough for one more try."""
        return self._broken_at is None or (
            self._clock.now() >= self._broken_at + self._config.stop_after_s and self.limit.load == 0
        )

    @property
    def is_broken(self) -> bool:
        return self._broken_at is not None

    def answered(self) -> None:
        """Note that the server works."""
        self._failures = 0
        self._limited_since = self._broken_at = None

    def failed(self, error: Transient) -> None:
        """Note a failure; enough of them in a row, over enough time, break the endpoint."""
        now = self._clock.now()
        if isinstance(error, RateLimited):
            self.limit.limited()
            self._limited_since = now if self._limited_since is None else self._limited_since
            if error.retry_after_s is not None:
                self.paused_until = max(self.paused_until, now + error.retry_after_s)
            if now - self._limited_since > 2 * self._config.max_wait_s:
                self._broken_at = now
            return
        self.limit.failed()
        if self._failures == 0:
            self._failing_since = now
        self._failures += 1
        is_enough = isinstance(error, Unreachable) or self._failures >= self._config.stop_after_failures
        if self._broken_at is not None or (is_enough and now - self._failing_since >= self._config.stop_after_s):
            self._broken_at = now


@dataclass
class PacingCounters:
    """What went on the wire."""

    attempts: int = 0
    retries: int = 0
    rate_limits: int = 0
    failures: int = 0


class Pacer(Generic[T]):
    """Sends requests to a set of equal servers, as fast as they take them, and tries again what may succeed."""

    def __init__(
        self, endpoints: Mapping[str, T], config: EngineConfig, *, clock: Clock, rng: random.Random | None = None
    ) -> None:
        """`endpoints`: name for messages -> whatever `send` needs to reach that server."""
        self.endpoints: Sequence[Endpoint[T]] = [Endpoint(target, name, config, clock) for name, target in endpoints.items()]
        self.counters = PacingCounters()
        self._config = config
        self._clock = clock
        # Jitter must differ between workers that start together.
        self._rng = rng if rng is not None else random.Random()
        self._credit = float(_FREE_RETRIES)
        self._stopped: EngineStopped | None = None

    async def call(self, send: Callable[[T], Awaitable[R]], *, is_patient: bool = True) -> R:
        """Return what `send` returns, tried again as long as that makes sense.

        `is_patient` False: a server that cannot be reached is given `max_attempts` tries, not `stop_after_s`.
        Raises: the last Transient when the attempts are used up; Permanent and ReplyError at once; EngineStopped when no
        request can succeed any more, then and at every later call.
        """
        attempt = charged = 0
        last: Endpoint[T] | None = None
        self._credit += self._config.retry_frac
        while True:
            endpoint = await self._admit(last)
            attempt += 1
            self.counters.attempts += 1
            try:
                result = await send(endpoint.target)
            except EngineStopped as error:
                self._stopped = error
                raise
            except Transient as error:
                endpoint.failed(error)
                failure: Transient = error
            except (Permanent, ReplyError):
                endpoint.answered()
                raise
            else:
                endpoint.answered()
                endpoint.limit.succeeded(is_first_attempt=attempt == 1)
                return result
            finally:
                endpoint.limit.release()
            self._stop_if_broken(failure)
            is_limited = isinstance(failure, RateLimited)
            self.counters.rate_limits += is_limited
            self.counters.failures += not is_limited
            charged += not is_limited and not (is_patient and isinstance(failure, Unreachable))
            if charged >= self._config.max_attempts:
                raise failure
            last = endpoint
            self.counters.retries += 1
            await self._clock.sleep(self._backoff_s(attempt, failure))

    def _backoff_s(self, attempt: int, failure: Transient) -> float:
        if isinstance(failure, RateLimited):
            if failure.retry_after_s:
                # The endpoint is paused for everyone; `_admit` waits.
                return 0.0
        elif self._credit < 1:
            return self._config.backoff_cap_s
        else:
            self._credit -= 1
        ceiling = min(self._config.backoff_cap_s, self._config.backoff_s * 2.0 ** min(attempt - 1, 30))
        return self._rng.uniform(0.0, ceiling)

    async def _admit(self, last: Endpoint[T] | None) -> Endpoint[T]:
        """Return an endpoint with a slot taken: one that works, is not paused, has little to do and did not just fail."""
        while True:
            if self._stopped is not None:
                raise EngineStopped(str(self._stopped))
            now = self._clock.now()
            candidates = [endpoint for endpoint in self.endpoints if endpoint.is_open()] or list(self.endpoints)
            endpoint = min(candidates, key=lambda e: (max(0.0, e.paused_until - now), e is last, e.limit.load / e.limit.value))
            await endpoint.limit.acquire()
            try:
                while (wait := endpoint.paused_until - self._clock.now()) > 0:
                    await self._clock.sleep(wait + self._rng.uniform(0.0, min(_JITTER_CAP_S, _JITTER_FRAC * wait)))
            except BaseException:
                endpoint.limit.release()
                raise
            if self._stopped is None:
                return endpoint
            endpoint.limit.release()

    def _stop_if_broken(self, error: LLMError) -> None:
        if self._stopped is not None:
            raise EngineStopped(str(self._stopped)) from error
        if isinstance(error, RateLimited) and (error.retry_after_s or 0.0) > self._config.max_wait_s:
            self._stopped = EngineStopped(
                f"{error}; that is longer than max_wait_s = {self._config.max_wait_s:g}; finished work is kept, "
                "run the same command again then"
            )
        elif all(endpoint.is_broken for endpoint in self.endpoints):
            names = ", ".join(endpoint.name for endpoint in self.endpoints)
            self._stopped = EngineStopped(
                f"{names} stopped answering; the last failure was: {error}; finished work is kept, see to the server and run "
                "the same command again"
            )
        if self._stopped is not None:
            raise self._stopped from error
