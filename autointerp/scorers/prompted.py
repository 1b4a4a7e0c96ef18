"""What scorers that ask an LLM share: prompts made from items, answers read strictly, verdicts, scores.

A scorer says which items there are, which of them share a prompt, what is asked and how a reply is read. An answer that cannot
be read has a status, never a value; the second request and the statuses are :mod:`autointerp.scorers.ask`'s.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field

from autointerp.config import RUNTIME, Config
from autointerp.digest import canonical_json, generator
from autointerp.errors import EngineStopped, LLMError, ReplyError
from autointerp.prompts import Prompt
from autointerp.protocols import Needs, Resources
from autointerp.records import Chat, Explanation, JsonSchema, LatentExamples, Reply, Request, Score, ScoreResult, Verdict
from autointerp.scorers.ask import gather, try_to_ask
from autointerp.scorers.items import Answer, Item, verdict_of
from autointerp.scorers.parse import bare

Constraint = Literal["auto", "required", "off"]


class PromptedConfig(Config):
    """How a scorer asks."""

    prompt: str | None = Field(default=None, json_schema_extra=RUNTIME)
    """Name or path of the prompt, None for the scorer's own; not identity, since the digest of its content is."""
    constraint: Constraint = "auto"
    """Whether the form of the answer is enforced: where the engine can, always (an engine that cannot is refused), or never."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest reply, None for what the answer needs; give more to a judge that thinks first."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A request and how its reply is read."""

    request: Request
    read: Callable[[Reply], list[Answer]]
    """Returns one answer for each item of the prompt; raises ReplyError."""
    remind: Callable[[Chat, str], Chat] | None = None


class Prompted(ABC):
    """A scorer that asks an engine about items."""

    version: int = 1
    """Part of the identity: raise it when the same settings come to ask or to count otherwise."""
    needs: Needs
    headline: str
    config: PromptedConfig
    _prompt: Prompt | None = None

    @property
    @abstractmethod
    def name(self) -> str:
        """What rows and folders call it."""

    @abstractmethod
    def items(self, latent: LatentExamples, seed: int) -> Sequence[Item]:
        """Return every question, positives first, numbered in order."""

    @abstractmethod
    def planned(self, batch: Sequence[Item], explanation: Explanation, resources: Resources) -> list[Request]:
        """Return the requests about the items of one batch; token ids as the text that they are."""

    @abstractmethod
    async def ask_batch(self, batch: Sequence[Item], explanation: Explanation, resources: Resources) -> list[Answer]:
        """Return one answer for each item of a batch, whatever became of it."""

    @abstractmethod
    def scores(
        self, verdicts: Sequence[Verdict], latent: LatentExamples, explanation: Explanation, judge: str
    ) -> tuple[Score, ...]:
        """Return the metrics over all verdicts."""

    def batches(self, items: Sequence[Item], latent: LatentExamples, seed: int) -> list[list[Item]]:
        """Return the items that are asked about together."""
        return [[item] for item in items if item.is_asked]

    def sources(self, wanted: tuple[str, ...]) -> tuple[str, ...]:
        """Return the sources of negatives that have a headline row each, of those that a selection names: all."""
        return wanted

    def judged(self, latent: LatentExamples, control: str | None, seed: int) -> LatentExamples:
        """Return the examples that are judged: all scored ones, where nothing is drawn and the control is the explanation."""
        return latent

    @property
    def prompt_id(self) -> str | None:
        """Digest of the prompt; None when no engine is asked."""
        return self._prompt.prompt_id if self._prompt is not None else None

    def identity(self) -> Mapping[str, Any]:
        """Return everything that changes its verdicts, but judge and selection."""
        return {"version": self.version, "config": self.config.identity(), "prompt": self.prompt_id}

    def requests(self, latent: LatentExamples, explanation: Explanation, resources: Resources, /) -> list[Request]:
        """Return the requests that :meth:`score` would send first, without sending any; token ids as the text they are."""
        latent = self.judged(latent, None, resources.seed)
        batches = self.batches(self.items(latent, resources.seed), latent, resources.seed)
        return [request for batch in batches for request in self.planned(batch, explanation, resources)]

    async def score(
        self, latent: LatentExamples, explanation: Explanation, resources: Resources, /, *, control: str | None = None
    ) -> ScoreResult:
        """Return one verdict per item and the metrics over them; see :class:`autointerp.protocols.Scorer`."""
        latent = replace(self.judged(latent, control, resources.seed), negative_sources=self.sources(latent.negative_sources))
        items = self.items(latent, resources.seed)
        answers, judge = await self.answers(items, latent, explanation, resources)
        verdicts = tuple(
            verdict_of(
                item,
                answers.get(item.example_idx),
                scorer=self.name,
                latent=latent,
                explanation=explanation,
                control=control,
            )
            for item in items
        )
        return ScoreResult(verdicts=verdicts, scores=self.scores(verdicts, latent, explanation, judge))

    async def answers(
        self, items: Sequence[Item], latent: LatentExamples, explanation: Explanation, resources: Resources
    ) -> tuple[dict[int, Answer], str]:
        """Return the answers by number of the item, and who gave them."""
        assert resources.engine is not None
        batches = self.batches(items, latent, resources.seed)
        replies = await gather([self.ask_batch(batch, explanation, resources) for batch in batches])
        found = {
            item.example_idx: replace(answer, prompt_idx=prompt_idx)
            for prompt_idx, (batch, answers) in enumerate(zip(batches, replies, strict=True))
            for item, answer in zip(batch, answers, strict=True)
        }
        return found, resources.engine.id.model


class OneQuestion(Prompted):
    """A scorer that sends one request for each batch of items."""

    @abstractmethod
    def question(self, batch: Sequence[Item], explanation: Explanation, resources: Resources) -> Question:
        """Return what is asked about the items of one prompt."""

    async def prepared(self, batch: Sequence[Item], explanation: Explanation, resources: Resources) -> Question:
        """Return the question as it is sent; scorers that send token ids need the engine to make them."""
        return self.question(batch, explanation, resources)

    def planned(self, batch: Sequence[Item], explanation: Explanation, resources: Resources) -> list[Request]:
        return [self.question(batch, explanation, resources).request]

    async def ask_batch(self, batch: Sequence[Item], explanation: Explanation, resources: Resources) -> list[Answer]:
        """Return one answer for each item of a batch, whatever became of it."""
        assert resources.engine is not None
        try:
            question = await self.prepared(batch, explanation, resources)
        except EngineStopped:
            raise
        except (LLMError, ReplyError):
            return [Answer(status="no_reply")] * len(batch)
        outcome = await try_to_ask(resources.engine, question.request, question.read, question.remind)
        answers = outcome.value if outcome.value is not None else [Answer(status=outcome.status)] * len(batch)
        return [replace(answer, request_ids=outcome.request_ids) for answer in answers]

    def chat_question(
        self,
        values: Mapping[str, str],
        read: Callable[[str], list[Answer]],
        resources: Resources,
        *,
        max_tokens: int,
        schema: Mapping[str, Any] | None = None,
    ) -> Question:
        """Return the prompt filled in with `values`, to be answered with text in the form of `schema`.

        `read` gets the reply without the code fence that may be around it.
        """
        prompt = self._prompt
        assert prompt is not None
        can = resources.engine is None or resources.engine.capabilities.constraints
        is_held = schema is not None and self.config.constraint != "off" and can
        return Question(
            request=Request(
                prompt=prompt.chat(**values),
                max_tokens=self.config.max_tokens or max_tokens,
                constraint=JsonSchema(schema=canonical_json(schema).decode()) if is_held else None,
            ),
            read=lambda reply: read(bare(reply.text)),
            remind=lambda chat, reply: prompt.again(chat, reply, **values),
        )


def seeded_order(name: str, latent: LatentExamples, seed: int, count: int) -> list[int]:
    """Return a random order of `count` things, by a hash of (seed, coder, latent, scorer) alone."""
    order: list[int] = generator("order", seed, latent.coder, latent.latent, name).permutation(count).tolist()
    return order
