"""An iterator run ahead in a thread: the same items, the same errors, and nothing left running."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from autointerp.jobs.ahead import ahead


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "autointerp-ahead"]


def test_yields_all_in_order_from_another_thread() -> None:
    makers = []

    def items() -> Iterator[int]:
        for item in range(50):
            makers.append(threading.current_thread())
            yield item

    assert list(ahead(items(), size=3)) == list(range(50))
    assert set(makers).isdisjoint({threading.current_thread()})
    assert not threads()


def test_is_no_further_ahead_than_it_may() -> None:
    made, may_go_on = [], threading.Semaphore(0)

    def items() -> Iterator[int]:
        for item in range(10):
            made.append(item)
            if item == 3:
                may_go_on.release()
            yield item

    steps = ahead(items(), size=2)
    assert next(steps) == 0
    may_go_on.acquire()  # one taken, two waiting, the fourth made and not put
    assert made == [0, 1, 2, 3]
    steps.close()


def test_raises_what_the_iterator_raises_after_the_items_before() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("no second item")

    found = []
    with pytest.raises(ValueError, match="no second item"):
        for item in ahead(items(), size=4):
            found.append(item)
    assert found == [1] and not threads()


def test_closing_early_closes_the_iterator_and_ends_its_thread() -> None:
    closed_by = []

    def items() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            closed_by.append(threading.current_thread().name)

    steps = ahead(items(), size=1)
    next(steps)
    steps.close()
    assert closed_by == ["autointerp-ahead"] and not threads()
