"""What detection and fuzzing share: prompts of several examples or of one, reading the answers, verdicts.

Two modes. ``list``: a few examples per prompt, answered by a JSON array of 0 and 1; the order is shuffled per latent by a hash
of (seed, coder, latent, scorer), so prompts depend neither on concurrency nor on the explanation. ``labels``: one example per
prompt, and p = P(1) / (P(0) + P(1)) from the probabilities of the first token. An answer that cannot be read has a status,
never a value; so has one of a judge that would rather have written something else than a label.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from autointerp.digest import canonical_json
from autointerp.errors import ReplyError
from autointerp.examples.render import neutralise
from autointerp.prompts import load_prompt
from autointerp.protocols import Needs, Resources, Vocabulary
from autointerp.records import Explanation, JsonSchema, LatentExamples, Reply, Request, Score, Verdict
from autointerp.scorers.items import Answer, Item
from autointerp.scorers.metrics import scores_of
from autointerp.scorers.parse import read_list
from autointerp.scorers.prompted import Question, seeded_order
from autointerp.scorers.rule_judge import RuleJudged, RuleJudgedConfig

LABELS = ("1", "0")
_VARIABLES = {"list": frozenset({"explanation", "examples", "count"}), "labels": frozenset({"explanation", "example"})}


class ClassifierConfig(RuleJudgedConfig):
    """How a classifier asks."""

    mode: Literal["list", "labels"] = "list"
    """Several examples per prompt, or one with label probabilities (needs an engine that gives them)."""
    examples_per_prompt: int = Field(default=5, ge=1, le=50)
    """Examples per prompt in mode ``list``; the last prompt of a latent may hold fewer."""
    min_label_mass: float = Field(default=0.5, ge=0, lt=1)
    """In mode ``labels``: the two labels must have more probability than this together, or the reply counts as unparseable.

    The probability of a label is that of all its spellings as a token (``1``, `` 1``). Above one half the judge would rather
    answer than write anything else. An engine that reads the whole distribution gives labels some probability whatever the
    judge was about to write, so that at 0 every reply is an answer: for judges that answer at random, in tests.
    """


class Classifier(RuleJudged):
    """A scorer that asks yes-or-no questions about examples."""

    # 2: labels need more than half of the probability.
    version = 2
    prompts: ClassVar[tuple[str, str]]
    """Names of the prompts of mode ``list`` and mode ``labels``."""
    config: ClassifierConfig

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
        if uses_engine:
            prompt = load_prompt(config.prompt or self.prompts[config.mode == "labels"])
            self._prompt = prompt.require("list" if config.mode == "list" else "label", _VARIABLES[config.mode])

    @abstractmethod
    def render(self, item: Item, vocabulary: Vocabulary) -> str:
        """Return an item as one line of text."""

    def scores(
        self, verdicts: Sequence[Verdict], latent: LatentExamples, explanation: Explanation, judge: str
    ) -> tuple[Score, ...]:
        return scores_of(verdicts, latent=latent, explanation=explanation, judge=judge, headline=self.headline)

    def batches(self, items: Sequence[Item], latent: LatentExamples, seed: int) -> list[list[Item]]:
        """Return the items of each prompt; two versions of one text never share one."""
        asked = [item for item in items if item.is_asked]
        size = 1 if self.config.mode == "labels" else self.config.examples_per_prompt
        batches: list[list[Item]] = []
        open_batches: list[int] = []
        for i in seeded_order(self.name, latent, seed, len(asked)):
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

    def question(self, batch: Sequence[Item], explanation: Explanation, resources: Resources) -> Question:
        prompt = self._prompt
        assert prompt is not None
        values = self.values(batch, explanation, resources.vocabulary)
        if self.config.mode == "labels":
            return Question(
                request=Request(prompt=prompt.chat(**values), max_tokens=1, labels=LABELS),
                read=lambda reply: [read_labels(reply, self.config.min_label_mass)],
                remind=lambda chat, reply: prompt.again(chat, reply, **values),
            )
        return self.chat_question(
            values,
            lambda text: [Answer(status="ok", answer=answer) for answer in read_list(text, len(batch))],
            resources,
            # A digit, a comma and a space each, and what may stand around them.
            max_tokens=24 + 4 * len(batch),
            schema=_schema(len(batch)),
        )

    def values(self, batch: Sequence[Item], explanation: Explanation, vocabulary: Vocabulary) -> dict[str, str]:
        """Return the variables of the prompt."""
        values = {"explanation": neutralise(explanation.text or "")}
        if self.config.mode == "labels":
            return values | {"example": self.render(batch[0], vocabulary)}
        lines = (f"Text {i}: {self.render(item, vocabulary)}" for i, item in enumerate(batch, start=1))
        return values | {"examples": "\n".join(lines), "count": str(len(batch))}


def _schema(count: int) -> Mapping[str, Any]:
    return {"type": "array", "items": {"type": "integer", "enum": [0, 1]}, "minItems": count, "maxItems": count}


def answer_schema(count: int) -> JsonSchema:
    """Return the constraint: an array of exactly `count` zeros and ones."""
    return JsonSchema(schema=canonical_json(_schema(count)).decode())


def read_labels(reply: Reply, min_mass: float) -> Answer:
    """Return the answer of label probabilities.

    Raises: ReplyError when the reply has none, or the two labels have too little probability to mean anything.
    """
    if reply.finish == "filter" or reply.label_probs is None or len(reply.label_probs) != 2:
        raise ReplyError("the reply has no probabilities of the labels", raw=reply.text)
    yes, no = reply.label_probs
    if not yes + no > min_mass:
        raise ReplyError(f"the labels 1 and 0 have probability {yes + no:.3g} together, {min_mass:g} or less", raw=reply.text)
    probability = yes / (yes + no)
    return Answer(status="ok", answer=probability >= 0.5, probability=probability)
