"""What detection and fuzzing share: prompts of several examples or of one, reading the answers, verdicts.

Two modes. ``list``: a few examples per prompt, answered by a JSON array of 0 and 1; the order is shuffled per latent by a hash
of (seed, coder, latent, scorer), so prompts depend neither on concurrency nor on the explanation. ``labels``: one example per
prompt, and p = P(1) / (P(0) + P(1)) from the probabilities of the first token. An answer that cannot be read has a status,
never a value.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import orjson
from pydantic import Field

from autointerp.config import RUNTIME, Config
from autointerp.digest import canonical_json, generator
from autointerp.errors import ContextExceeded, EngineStopped, LLMError, ReplyError
from autointerp.examples.render import neutralise
from autointerp.prompts import Prompt, load_prompt
from autointerp.protocols import Engine, Needs, Resources, Vocabulary
from autointerp.records import Chat, Explanation, JsonSchema, LatentExamples, Reply, Request, ScoreResult, Verdict
from autointerp.rules import Rule
from autointerp.scorers.ask import ask, gather
from autointerp.scorers.items import Answer, Item
from autointerp.scorers.metrics import not_applicable, scores_of
from autointerp.scorers.rule_judge import judge_by_rule

_VERSION = 1
"""Part of every classifier's identity: raise it when the same settings come to ask or to count otherwise."""

LABELS = ("1", "0")
_VARIABLES = {"list": frozenset({"explanation", "examples", "count"}), "labels": frozenset({"explanation", "example"})}
_FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)


class ClassifierConfig(Config):
    """How a classifier asks."""

    judge: Literal["engine", "rule"] = "engine"
    """Who answers: an engine, or the rule that the explanation carries (no LLM)."""
    mode: Literal["list", "labels"] = "list"
    """Several examples per prompt, or one with label probabilities (needs an engine that gives them)."""
    examples_per_prompt: int = Field(default=5, ge=1, le=50)
    """Examples per prompt in mode ``list``; the last prompt of a latent may hold fewer."""
    prompt: str | None = Field(default=None, json_schema_extra=RUNTIME)
    """Name or path of the prompt, None for the scorer's own; not identity, since the digest of its content is."""
    constraint: Literal["auto", "required", "off"] = "auto"
    """Whether the form of the answer is enforced: where the engine can, always (an engine that cannot is refused), or never."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest reply in mode ``list``, None for what the answer needs; give more to a judge that thinks first."""
    min_label_mass: float = Field(default=0.0, ge=0, lt=1)
    """In mode ``labels``: the two labels must have more probability than this together, or the reply counts as unparseable."""


class Classifier(ABC):
    """A scorer that asks yes-or-no questions about examples."""

    prompts: ClassVar[tuple[str, str]]
    """Names of the prompts of mode ``list`` and mode ``labels``."""

    def __init__(self, config: ClassifierConfig) -> None:
        """Load the prompt.

        Raises: ConfigError when it cannot be used.
        """
        self.config = config
        uses_engine = config.judge == "engine"
        self.needs = Needs(
            engine=uses_engine,
            labels=uses_engine and config.mode == "labels",
            constraints=uses_engine and config.mode == "list" and config.constraint == "required",
        )
        self.headline = "auroc" if self.needs.labels else "balanced_accuracy"
        self._prompt: Prompt | None = None
        if uses_engine:
            prompt = load_prompt(config.prompt or self.prompts[config.mode == "labels"])
            self._prompt = prompt.require("list" if config.mode == "list" else "label", _VARIABLES[config.mode])

    @property
    @abstractmethod
    def name(self) -> str:
        """What rows and folders call it."""

    @abstractmethod
    def items(self, latent: LatentExamples, seed: int) -> list[Item]:
        """Return every question, positives first, numbered in order."""

    @abstractmethod
    def render(self, item: Item, vocabulary: Vocabulary) -> str:
        """Return an item as one line of text."""

    @property
    def prompt_id(self) -> str | None:
        """Digest of the prompt; None when no engine is asked."""
        return self._prompt.prompt_id if self._prompt is not None else None

    def identity(self) -> Mapping[str, Any]:
        """Return everything that changes its verdicts, but judge and selection."""
        return {"version": _VERSION, "config": self.config.identity(), "prompt": self.prompt_id}

    def requests(self, latent: LatentExamples, explanation: Explanation, resources: Resources, /) -> list[Request]:
        """Return the requests that :meth:`score` would send first, without sending any."""
        if self.config.judge == "rule":
            return []
        batches = self._batches(self.items(latent, resources.seed), latent, resources.seed)
        return [self._request(batch, explanation, resources) for batch in batches]

    async def score(
        self, latent: LatentExamples, explanation: Explanation, resources: Resources, /, *, control: str | None = None
    ) -> ScoreResult:
        """Return one verdict per example and the metrics over them; see :class:`autointerp.protocols.Scorer`."""
        items = self.items(latent, resources.seed)
        if self.config.judge == "rule":
            judge = "rule"
            if explanation.rule is None:
                return ScoreResult(verdicts=(), scores=not_applicable(latent, explanation, judge=judge, headline=self.headline))
            asked = [item for item in items if item.is_asked]
            answered = judge_by_rule(Rule.from_json(explanation.rule), asked, resources.vocabulary)
            answers = {item.example_idx: answer for item, answer in zip(asked, answered, strict=True)}
        else:
            assert resources.engine is not None
            judge = resources.engine.id.model
            answers = await self._ask(self._batches(items, latent, resources.seed), explanation, resources, resources.engine)
        verdicts = tuple(self._verdict(item, answers.get(item.example_idx), latent, explanation, control) for item in items)
        scores = scores_of(verdicts, latent=latent, explanation=explanation, judge=judge, headline=self.headline)
        return ScoreResult(verdicts=verdicts, scores=scores)

    # Asking an engine ---------------------------------------------------------------------------------------------

    def _batches(self, items: Sequence[Item], latent: LatentExamples, seed: int) -> list[list[Item]]:
        """Return the items of each prompt; two versions of one text never share one."""
        asked = [item for item in items if item.is_asked]
        size = 1 if self.config.mode == "labels" else self.config.examples_per_prompt
        order = generator("order", seed, latent.coder, latent.latent, self.name).permutation(len(asked))
        batches: list[list[Item]] = []
        open_batches: list[int] = []
        for i in order:
            item = asked[i]
            free = (b for b in open_batches if all(other.position != item.position for other in batches[b]))
            place = next(free, None)
            if place is None:
                place = len(batches)
                batches.append([])
                open_batches.append(place)
            batches[place].append(item)
            if len(batches[place]) == size:
                open_batches.remove(place)
        return batches

    def _request(self, batch: Sequence[Item], explanation: Explanation, resources: Resources) -> Request:
        assert self._prompt is not None
        chat = self._prompt.chat(**self._values(batch, explanation, resources.vocabulary))
        if self.config.mode == "labels":
            return Request(prompt=chat, max_tokens=1, labels=LABELS)
        can = resources.engine is None or resources.engine.capabilities.constraints
        return Request(
            prompt=chat,
            # A digit, a comma and a space each, and what may stand around them.
            max_tokens=self.config.max_tokens or 24 + 4 * len(batch),
            constraint=answer_schema(len(batch)) if self.config.constraint != "off" and can else None,
        )

    def _values(self, batch: Sequence[Item], explanation: Explanation, vocabulary: Vocabulary) -> dict[str, str]:
        values = {"explanation": neutralise(explanation.text or "")}
        if self.config.mode == "labels":
            return values | {"example": self.render(batch[0], vocabulary)}
        lines = (f"Text {i}: {self.render(item, vocabulary)}" for i, item in enumerate(batch, start=1))
        return values | {"examples": "\n".join(lines), "count": str(len(batch))}

    async def _ask(
        self, batches: Sequence[Sequence[Item]], explanation: Explanation, resources: Resources, engine: Engine
    ) -> dict[int, Answer]:
        replies = await gather([self._ask_batch(batch, explanation, resources, engine) for batch in batches])
        return {
            item.example_idx: replace(answer, prompt_idx=prompt_idx)
            for prompt_idx, (batch, answers) in enumerate(zip(batches, replies, strict=True))
            for item, answer in zip(batch, answers, strict=True)
        }

    async def _ask_batch(
        self, batch: Sequence[Item], explanation: Explanation, resources: Resources, engine: Engine
    ) -> list[Answer]:
        def read(reply: Reply) -> list[Answer]:
            if self.config.mode == "labels":
                return [read_labels(reply, self.config.min_label_mass)]
            return [Answer(status="ok", answer=answer) for answer in read_list(reply.text, len(batch))]

        def remind(chat: Chat, reply: str) -> Chat:
            assert self._prompt is not None
            return self._prompt.again(chat, reply, **self._values(batch, explanation, resources.vocabulary))

        try:
            outcome = await ask(engine, self._request(batch, explanation, resources), read, remind)
        except ContextExceeded:
            return [Answer(status="too_long")] * len(batch)
        except EngineStopped:
            raise
        except (LLMError, ReplyError):
            return [Answer(status="no_reply")] * len(batch)
        answers = outcome.value if outcome.value is not None else [Answer(status=outcome.status)] * len(batch)
        return [replace(answer, request_ids=outcome.request_ids) for answer in answers]

    def _verdict(
        self, item: Item, answer: Answer | None, latent: LatentExamples, explanation: Explanation, control: str | None
    ) -> Verdict:
        answer = answer or Answer(status="not_applicable")
        return Verdict(
            coder=latent.coder,
            latent=latent.latent,
            explanation_id=explanation.explanation_id,
            scorer=self.name,
            scorer_id="",
            control=control,
            example_idx=item.example_idx,
            position=item.position,
            document=item.document,
            source=item.source,
            quantile=item.quantile,
            truth=item.truth,
            answer=answer.answer,
            probability=answer.probability,
            status=answer.status,
            request_ids=answer.request_ids,
            prompt_idx=answer.prompt_idx,
        )


def answer_schema(count: int) -> JsonSchema:
    """Return the constraint: an array of exactly `count` zeros and ones."""
    schema = {"type": "array", "items": {"type": "integer", "enum": [0, 1]}, "minItems": count, "maxItems": count}
    return JsonSchema(schema=canonical_json(schema).decode())


def read_list(text: str, count: int) -> list[bool]:
    """Return the answers of a reply that is a JSON array of exactly `count` zeros and ones, and nothing else.

    A code fence around it is allowed. Raises: ReplyError for anything else.
    """
    stripped = text.strip()
    fenced = _FENCE.fullmatch(stripped)
    try:
        value = orjson.loads(fenced[1] if fenced else stripped)
    except orjson.JSONDecodeError:
        raise ReplyError(f"the reply is not a JSON array: {stripped[:80]!r}", raw=text) from None
    if not isinstance(value, list) or len(value) != count:
        found = f"{len(value)} answers" if isinstance(value, list) else type(value).__name__
        raise ReplyError(f"the reply has {found}; an array of {count} was asked for", raw=text)
    if any(isinstance(item, bool) or item not in (0, 1) for item in value):
        raise ReplyError(f"the reply has answers other than 0 and 1: {stripped[:80]!r}", raw=text)
    return [item == 1 for item in value]


def read_labels(reply: Reply, min_mass: float) -> Answer:
    """Return the answer of label probabilities.

    Raises: ReplyError when the reply has none, or the two labels have too little probability to mean anything.
    """
    if reply.finish == "filter" or reply.label_probs is None or len(reply.label_probs) != 2:
        raise ReplyError("the reply has no probabilities of the labels", raw=reply.text)
    yes, no = reply.label_probs
    if not yes + no > min_mass:
        raise ReplyError(f"the labels 1 and 0 have probability {yes + no:.3g} together", raw=reply.text)
    probability = yes / (yes + no)
    return Answer(status="ok", answer=probability >= 0.5, probability=probability)
