"""Turns SIGINT, SIGTERM and SIGUSR1 into a clean stop, and runs coroutines for callers that have no loop, or one already."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StopFlag:
    """Whether somebody asked the run to stop, and who; safe between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[str], None]] = []
        self.reason: str | None = None

    def request(self, reason: str) -> None:
        """Ask for a stop; the first reason counts."""
        with self._lock:
            if self.reason is not None:
                return
            self.reason = reason
            callbacks = list(self._callbacks)
        for callback in callbacks:
            callback(reason)

    def connect(self, callback: Callable[[str], None]) -> None:
        """Call `callback` with the reason when a stop is asked for, at once when it was already."""
        with self._lock:
            self._callbacks.append(callback)
            reason = self.reason
        if reason is not None:
            callback(reason)


@contextmanager
def listening(flag: StopFlag) -> Iterator[None]:
    """Let signals set `flag`; the second one does what it would without this. Does nothing outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[Any, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        before.clear()

    def handle(number: int, frame: FrameType | None) -> None:
        restore()
        # Not here: a lock that the main thread holds at this moment would never be released.
        threading.Thread(target=flag.request, args=(signal.Signals(number).name,), daemon=True).start()

    for number in _SIGNALS:
        before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        restore()


def run_sync(make: Callable[[StopFlag], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine to its end in a thread with a loop of its own, which works inside a notebook too."""
    flag = StopFlag()
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(asyncio.run(make(flag)))
        except BaseException as error:  # noqa: BLE001 - carried to the caller, not swallowed
            future.set_exception(error)

    with listening(flag):
        threading.Thread(target=work, name="autointerp-run", daemon=True).start()
        return future.result()
