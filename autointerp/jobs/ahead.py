"""Runs an iterator a few items ahead, in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")

_END = object()


def ahead(items: Iterator[T], *, size: int) -> Generator[T, None, None]:
    """Yield `items` in order while a thread makes up to `size` more; where one raises, it is raised here in its turn.

    Closed early, it waits for the item that is being made; the iterator is closed in the thread that ran it.
    """
    made: queue.Queue[tuple[object, BaseException | None]] = queue.Queue(size)
    is_closed = threading.Event()

    def put(item: object, error: BaseException | None = None) -> None:
        while not is_closed.is_set():
            try:
                made.put((item, error), timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(item)
                if is_closed.is_set():
                    break
            put(_END)
        except BaseException as error:  # noqa: BLE001 - carried to the caller, not swallowed
            put(_END, error)
        finally:
            if hasattr(items, "close"):
                items.close()

    thread = threading.Thread(target=work, name="autointerp-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item  # type: ignore[misc]  # what `work` put there
    finally:
        is_closed.set()
        thread.join()
