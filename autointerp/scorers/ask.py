"""Asks an engine once, and once more when the reply cannot be read; used by scorers and explainers.

The second request appends the reply and a reminder of the form, so it is another request with another digest. What still cannot
be read has a status; it is never an answer.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from autointerp.errors import ContextExceeded, EngineStopped, LLMError, ReplyError
from autointerp.protocols import Engine
from autointerp.records import Chat, Reply, Request, Status, Usage

T = TypeVar("T")

_REFUSAL = re.compile(
    r"(?:i['\u2019]?m |i am )?(?:sorry|unable to)\b|i (?:can['\u2019]?t|cannot|won['\u2019]?t|am not able to) ", re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True)
class Outcome(Generic[T]):
    """What became of a question."""

    status: Status
    value: T | None
    request_ids: tuple[str, ...]
    num_attempts: int
    usage: Usage
    served_model: str


async def ask(
    engine: Engine, request: Request, read: Callable[[Reply], T], remind: Callable[[Chat, str], Chat] | None = None
) -> Outcome[T]:
    """Return what `read` makes of the reply; `read` raises ReplyError when it can make nothing of it.

    Without `remind` there is no second request. Raises: LLMError when the engine gave up, ReplyError when what came was none.
    """
    replies: list[Reply] = []
    value: T | None = None
    while len(replies) < 2:
        reply = await engine.complete(request)
        replies.append(reply)
        status: Status = "ok"
        try:
            value = read(reply)
            break
        except ReplyError:
            status = _reason(reply, request)
        # Thinking that never ended would not end the second time; a filter would filter again.
        if (status == "refused" and reply.finish == "filter") or (status == "truncated" and not reply.text.strip()):
            break
        if remind is None or not isinstance(request.prompt, Chat):
            break
        request = replace(request, prompt=remind(request.prompt, reply.text))
    return Outcome(
        status=status,
        value=value,
        request_ids=tuple(reply.request_id for reply in replies),
        num_attempts=len(replies),
        usage=sum((reply.usage for reply in replies), Usage()),
        served_model=replies[-1].served_model,
    )


async def try_to_ask(
    engine: Engine, request: Request, read: Callable[[Reply], T], remind: Callable[[Chat, str], Chat] | None = None
) -> Outcome[T]:
    """Return what :func:`ask` does, or a status when the engine could not answer this request.

    Raises: EngineStopped, after which no request can succeed.
    """
    try:
        return await ask(engine, request, read, remind)
    except EngineStopped:
        raise
    except (LLMError, ReplyError) as error:
        status: Status = "too_long" if isinstance(error, ContextExceeded) else "no_reply"
        return Outcome(status=status, value=None, request_ids=(), num_attempts=0, usage=Usage(), served_model="")


def _reason(reply: Reply, request: Request) -> Status:
    """Return why a reply could not be read."""
    if reply.finish == "filter" or _REFUSAL.match(reply.text.lstrip()):
        return "refused"
    # A reply to a question for labels is one token long by design.
    return "truncated" if reply.finish == "length" and not request.labels else "unparseable"


async def gather(work: Sequence[Awaitable[T]]) -> list[T]:
    """Return all results in order; when one raises, stop the others and raise that."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
