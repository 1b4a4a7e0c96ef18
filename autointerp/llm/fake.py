"""A scripted engine and a clock without waiting, for tests of whatever talks to an engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict

from autointerp.digest import generator
from autointerp.llm.reply_log import request_key
from autointerp.records import Capabilities, Chat, EngineId, Reply, Request, Text, Usage

Script = Callable[[Request], str | Reply | Exception]

_TRACE = 1e-9
"""Probability of the first label where the judge was about to write something else; of each further one as much more."""


def prompt_text(request: Request) -> str:
    """Return the text of a request's prompt: messages joined by newlines, token ids as numbers."""
    if isinstance(request.prompt, Chat):
        return "\n".join(content for _, content in request.prompt.messages)
    if isinstance(request.prompt, Text):
        return request.prompt.text
    return " ".join(map(str, request.prompt.ids))


class FakeEngine:
    """Answers from a script: text, a whole reply, or an exception to raise."""

    def __init__(
        self,
        script: Script,
        *,
        model: str = "fake",
        capabilities: Capabilities | None = None,
        context_tokens: int | None = None,
        max_delay_s: float = 0.0,
    ) -> None:
        """`max_delay_s`: wait up to this long before each answer, by a hash of the request; 0 only yields to the loop."""
        self.script = script
        self.id = EngineId(kind="fake", model=model)
        self.capabilities = capabilities if capabilities is not None else Capabilities()
        self.context_tokens = context_tokens
        self.max_delay_s = max_delay_s
        self.requests: list[Request] = []
        """Every request seen, in order of arrival."""
        self.in_flight = 0
        self.max_in_flight = 0
        self.is_closed = False

    async def complete(self, request: Request, /) -> Reply:
        """Answer by the script.

        A text answers a request with labels as well: probability 1 for the label it equals, 0 for the others. A text that
        equals none leaves each a trace, as in an engine that reads the whole distribution.
        """
        self.requests.append(request)
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            delay = self.max_delay_s and self.max_delay_s * generator(request_key(self.id, request)).random()
            await asyncio.sleep(delay)
            answer = self.script(request)
        finally:
            self.in_flight -= 1
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, Reply):
            return answer
        probs = tuple(float(label == answer) for label in request.labels)
        if not any(probs):
            probs = tuple(_TRACE * (i + 1) for i in range(len(probs)))
        return Reply(
            text=answer,
            finish="stop",
            label_probs=probs if request.labels else None,
            label_mass=sum(probs) if request.labels else None,
            usage=Usage(prompt_tokens=len(prompt_text(request)) // 4 + 1, output_tokens=len(answer) // 4 + 1),
            served_model=self.id.model,
        )

    async def tokenize(self, text: str, /) -> tuple[int, ...]:
        """Return the bytes of `text`."""
        return tuple(text.encode())

    async def aclose(self) -> None:
        self.is_closed = True

    def __repr__(self) -> str:
        return f"FakeEngine({asdict(self.id)}, {len(self.requests)} requests)"


class FakeClock:
    """A clock whose time passes only in `sleep`, which returns at once."""

    def __init__(self, start: float = 1_000_000.0) -> None:
        self.time = start
        self.sleeps: list[float] = []
        """Every wait asked for, in order."""

    def now(self) -> float:
        return self.time

    def wall(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.time += seconds
        await asyncio.sleep(0)
