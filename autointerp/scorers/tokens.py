"""Prompts as token ids made from pieces, so that where each piece lies is known and never searched for.

Each piece is tokenised alone by the engine's own tokenizer: the prompt that results is not always the one that tokenising the
whole text would give, and it is the same at every place where the same pieces stand. What the tokenizer puts before texts (BOS)
is found by asking for the log-probabilities of a short text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from autointerp.errors import ReplyError
from autointerp.protocols import Engine
from autointerp.records import EngineId, PromptLogprobs, Reply, Request, Text, TokenIds, TokenLogprob
from autointerp.scorers.ask import gather

_SHORT = "A short text."
_MAX_PIECES = 200_000


@dataclass
class _Asked:
    """What one engine object was asked; a shard has an object of its own, so that its reply log holds all it needs."""

    tokenizing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Windows that begin together ask for the same pieces: the first asks, the others find them known."""
    opening_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    opening: tuple[int, ...] | None = None


class Pieces:
    """Token ids of pieces of text; what was asked once is remembered."""

    def __init__(self) -> None:
        self._known: dict[EngineId, dict[str, tuple[int, ...]]] = {}
        self._engines: WeakKeyDictionary[Engine, _Asked] = WeakKeyDictionary()

    async def ids(self, engine: Engine, texts: Iterable[str]) -> Mapping[str, tuple[int, ...]]:
        """Return the ids of each piece, without special tokens.

        Raises: LLMError when the engine cannot tell.
        """
        wanted = {text for text in texts if text}
        known = self._known.setdefault(engine.id, {})
        async with self._engines.setdefault(engine, _Asked()).tokenizing:
            found = {text: known[text] for text in wanted & known.keys()}
            missing = sorted(wanted - known.keys())
            new = dict(zip(missing, await gather([engine.tokenize(text) for text in missing]), strict=True))
            if len(known) + len(new) > _MAX_PIECES:
                known.clear()
            known |= new
        return {"": (), **found, **new}

    async def opening(self, engine: Engine) -> tuple[int, ...]:
        """Return the ids that the engine's tokenizer puts before every text, such as BOS; often none.

        Raises: LLMError when the engine gave up; ReplyError when it does not show the text that it was sent.
        """
        asked = self._engines.setdefault(engine, _Asked())
        async with asked.opening_lock:
            if asked.opening is None:
                asked.opening = await self._ask_opening(engine)
            return asked.opening

    async def _ask_opening(self, engine: Engine) -> tuple[int, ...]:
        plain = (await self.ids(engine, [_SHORT]))[_SHORT]
        reply = await engine.complete(Request(prompt=Text(text=_SHORT), max_tokens=0, prompt_logprobs=PromptLogprobs()))
        shown = [token.token_id for token in reply.prompt_tokens]
        for start in range(len(shown) - len(plain) + 1):
            if tuple(shown[start : start + len(plain)]) == plain:
                return tuple(token_id for token_id in shown[:start] if token_id is not None)
        raise ReplyError(f"{engine.id.model} shows {shown} for a text whose token ids are {list(plain)}")


def scored_prompt(ids: Iterable[int], *, start: int, top: int = 0, at: Iterable[int] = ()) -> Request:
    """Return the request for the log-probabilities of a prompt's tokens from number `start` on; nothing is generated.

    `top`: how many alternatives, of the tokens numbered `at`.
    """
    return Request(
        prompt=TokenIds(ids=tuple(ids)),
        max_tokens=0,
        prompt_logprobs=PromptLogprobs(start=start, top=top, at=tuple(at)),
    )


def shown_tokens(request: Request, reply: Reply) -> tuple[TokenLogprob, ...]:
    """Return the tokens of a reply to :func:`scored_prompt`, from its `start` on.

    Raises: ReplyError when they are not exactly those that were sent.
    """
    assert isinstance(request.prompt, TokenIds) and request.prompt_logprobs is not None
    sent = request.prompt.ids[request.prompt_logprobs.start :]
    found = tuple(token.token_id for token in reply.prompt_tokens)
    if found != sent:
        raise ReplyError(f"the reply shows {len(found)} prompt tokens that are not the {len(sent)} that were sent")
    return reply.prompt_tokens
