"""Keeps apart the requests that vLLM must not see in one batch.

vLLM's first model runner answers a whole batch in the form of ``logprob_token_ids`` as soon as one request in it has them: the
alternatives that others asked for are silently replaced by padding.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

from autointerp.records import Request

Kind = Literal["labels", "top"]


def kind_of(request: Request) -> Kind | None:
    """Return which of the two kinds a request is, or None when it goes with both."""
    if request.top_logprobs:
        return "top"
    return "labels" if request.labels else None


class Gate:
    """Lets requests of one kind run together and keeps the two kinds apart."""

    def __init__(self) -> None:
        self._inside = {"labels": 0, "top": 0}
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def enter(self, kind: Kind | None) -> AsyncIterator[None]:
        """Hold a place among the requests of `kind`."""
        if kind is None:
            yield
            return
        other = "top" if kind == "labels" else "labels"
        async with self._changed:
            await self._changed.wait_for(lambda: self._inside[other] == 0)
            self._inside[kind] += 1
        try:
            yield
        finally:
            self._inside[kind] -= 1
            async with self._changed:
                self._changed.notify_all()
