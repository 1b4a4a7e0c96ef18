r"""Simulation: how strongly a reader of the explanation expects each token to fire.

After Bills et al. (2023) and arXiv 2410.13928.

The judge plays the latent: it predicts a level from 0 to 10 for every token of a window, and the score is Pearson's correlation
of the predictions with the true activations over the tokens of all windows. Two variants:

- ``logprobs`` (all at once): lines of a token, a tab and the word ``unknown``; worked examples show that the word gives way to
  levels at some line that cannot be foreseen, so at every line the judge's distribution over the next token holds what it would
  have written. One pass, nothing is sampled. The prompt is made of token ids, and the place of each ``unknown`` is known from
  making it. A prediction is the expected level, sum i p_i, over the levels among the `alternatives` likeliest tokens,
  renormalised. A token with no level among them has no prediction and takes no part; a window with too few predictions is
  ``unparseable``. A judge that writes 10 as two tokens is asked for levels from 0 to 9, or P(10) would be counted as P(1).
- ``list``: the judge writes a JSON array with one integer per token, for engines without log-probabilities of the prompt. Not
  comparable with the other: it has no distribution, and many ties at 0.

With ``judge = "rule"`` no LLM is asked: the prediction of a token is ten times its score by the rule.

The correlation is of predictions as they are: a fit on the scored data would turn every correlation into its absolute value. A
negative correlation stays negative, and one with a constant side is ``undefined``. Beside it stand, for each source of silent
windows, two scores of the activations that the levels name (level 10 is the greatest activation of the explain pool):
``explained_squares``, 1 - sum (a - s)^2 / sum a^2, and ``explained_absolute``, 1 - sum |a - s| / sum |a|, both 0 for who
predicts silence; and ``calibrated_r2``, whose line is fitted for each document to the others (`stats.cross_fitted_r2`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import orjson
from pydantic import Field

from autointerp import stats
from autointerp.errors import ConfigError, ReplyError
from autointerp.examples.render import neutralise
from autointerp.prompts import load_prompt
from autointerp.protocols import Engine, Needs, Resources, Vocabulary
from autointerp.records import Explanation, LatentExamples, Reply, Request, Score, Text, TokenLogprob, Verdict
from autointerp.rules import Rule
from autointerp.scorers.items import Answer, Item, items_of
from autointerp.scorers.metrics import Rows
from autointerp.scorers.parse import read_integers
from autointerp.scorers.prompted import Question
from autointerp.scorers.rule_judge import RuleJudged, RuleJudgedConfig, tokens_by_rule
from autointerp.scorers.tokens import Pieces, scored_prompt, shown_tokens

HIDDEN = "unknown"
"""Stands where a level is hidden."""
MAX_LEVEL = 10
_NO_TEXT = "\ufffd"
"""Shown for a token that is part of a character and has no text of its own."""


class SimulationConfig(RuleJudgedConfig):
    """How simulation asks."""

    mode: Literal["logprobs", "list"] = "logprobs"
    """Read the distribution at every token from one pass over the prompt, or have integers written."""
    alternatives: int = Field(default=15, ge=2, le=1000)
    """In mode ``logprobs``: the levels are looked for among so many likeliest tokens (as many as the engine gives)."""
    min_predicted: float = Field(default=0.5, ge=0, le=1)
    """In mode ``logprobs``: a window of whose tokens fewer have a prediction is `unparseable`."""


@dataclass(frozen=True)
class Line:
    """One token of a window in the prompt, and what follows the tab: a level, or `HIDDEN`."""

    token: str
    value: str

    def capped(self, top: int) -> str:
        """Return the value, a level above `top` as `top`."""
        return self.value if self.value == HIDDEN else str(min(int(self.value), top))

    def __str__(self) -> str:
        return f"{self.token}\t{self.value}\n"


class Simulation(RuleJudged):
    """Compares predicted levels with activations, token by token."""

    Config = SimulationConfig
    headline = "correlation"
    config: SimulationConfig

    def __init__(self, config: SimulationConfig | None = None) -> None:
        """Load the prompt.

        Raises: ConfigError when it cannot be used.
        """
        self.config = config = config or SimulationConfig()
        if config.judge == "rule":
            self.needs = Needs()
            return
        is_list = config.mode == "list"
        self.needs = Needs(engine=True, prompt_logprobs=not is_list, constraints=is_list and config.constraint == "required")
        prompt = load_prompt(config.prompt or ("score/simulation-list" if is_list else "score/simulation"))
        variables = {"explanation", "tokens", "count"} if is_list else {"explanation"}
        self._prompt = prompt.require("levels" if is_list else "slots", frozenset(variables))
        self._pieces = Pieces()
        if not is_list:
            self._worked = [(turn.user, read_lines(turn.assistant, prompt.where)) for turn in prompt.file.turns]

    @property
    def name(self) -> str:
        return "simulation" if self.config.mode == "logprobs" else "simulation_list"

    def items(self, latent: LatentExamples, seed: int) -> list[Item]:
        return items_of(latent.positives, latent.negatives)

    def by_rule(self, rule: Rule, items: Sequence[Item], vocabulary: Vocabulary) -> list[Answer]:
        found = tokens_by_rule(rule, items, vocabulary)
        levels = [(MAX_LEVEL * scores).tolist() for scores in found]
        return [replace(_answer(item, row, 1.0), prompt_idx=i) for i, (item, row) in enumerate(zip(items, levels, strict=True))]

    def question(self, batch: Sequence[Item], explanation: Explanation, resources: Resources) -> Question:
        [item] = batch
        shown = shown_pieces(resources.vocabulary, item)
        if self.config.mode == "logprobs":
            lines = [*self._before(explanation), *(Line(token, HIDDEN) for token in shown)]
            return Question(request=Request(prompt=Text(text="".join(map(str, lines))), max_tokens=0), read=lambda reply: [])
        count = len(shown)
        values = {
            "explanation": neutralise(explanation.text or ""),
            "tokens": orjson.dumps(shown).decode(),
            "count": str(count),
        }
        levels = {"type": "integer", "minimum": 0, "maximum": MAX_LEVEL}
        return self.chat_question(
            values,
            lambda text: [_answer(item, [float(n) for n in read_integers(text, count, low=0, high=MAX_LEVEL)], 1.0)],
            resources,
            max_tokens=24 + 4 * count,
            schema={"type": "array", "items": levels, "minItems": count, "maxItems": count},
        )

    async def prepared(self, batch: Sequence[Item], explanation: Explanation, resources: Resources) -> Question:
        if self.config.mode == "list":
            return self.question(batch, explanation, resources)
        [item] = batch
        engine = resources.engine
        assert engine is not None
        top, values = await self._values(engine)
        window = shown_pieces(resources.vocabulary, item)
        before = self._before(explanation)
        texts = {part if isinstance(part, str) else part.token for part in before}
        ids = await self._pieces.ids(engine, texts | set(window) | {"\t", "\n"})

        def line(token: str, value: str) -> tuple[int, ...]:
            return (*ids[token], *ids["\t"], *values[value], *ids["\n"])

        prompt = list(await self._pieces.opening(engine))
        for part in before:
            prompt += ids[part] if isinstance(part, str) else line(part.token, part.capped(top))
        slots = []
        for token in window:
            slots.append(len(prompt) + len(ids[token]) + len(ids["\t"]))
            prompt += line(token, HIDDEN)
        num_alternatives = min(self.config.alternatives, engine.capabilities.top_logprobs)
        request = scored_prompt(prompt, start=slots[0], top=num_alternatives, at=slots)

        def read(reply: Reply) -> list[Answer]:
            shown = shown_tokens(request, reply)
            return [_answer(item, [expected_level(shown[slot - slots[0]], top) for slot in slots], self.config.min_predicted)]

        return Question(request=request, read=read)

    async def _values(self, engine: Engine) -> tuple[int, Mapping[str, tuple[int, ...]]]:
        """Return the highest level that is one token, and the ids of what follows a tab.

        Raises: ConfigError when the engine writes digits as several tokens.
        """
        levels = [str(level) for level in range(MAX_LEVEL + 1)]
        found = dict(await self._pieces.ids(engine, [*levels, HIDDEN]))
        # Some tokenizers begin every text with a token of its own, which would come between the tab and the level.
        lead = found["0"][:-1]
        found |= {level: found[level][len(lead) :] for level in levels if found[level][: len(lead)] == lead}
        single = [level for level in levels if len(found[level]) == 1]
        if single not in (levels, levels[:-1]):
            raise ConfigError(
                f"{engine.id.model} writes digits as several tokens, so that no level can be read; "
                "set options.simulation.mode to 'list'"
            )
        return int(single[-1]), found

    def _before(self, explanation: Explanation) -> list[str | Line]:
        """Return the prompt up to the first line of the window: texts and lines."""
        assert self._prompt is not None
        parts: list[str | Line] = [self._prompt.file.system + "\n\n"]
        for user, excerpts in self._worked:
            parts.append(user + "\n")
            for lines in excerpts:
                parts += [*lines, "\n"]
        # The question as `chat` fills it in.
        question = self._prompt.chat(explanation=neutralise(explanation.text or "")).messages[-1][1]
        return [*parts, question + "\n"]

    def scores(
        self, verdicts: Sequence[Verdict], latent: LatentExamples, explanation: Explanation, judge: str
    ) -> tuple[Score, ...]:
        made = Rows(latent, explanation, judge, self.headline, verdicts)
        rows = made.absent()
        for source, negatives in made.by_source().items():
            both = [*made.positives, *negatives]
            rows.append(made.row("correlation", both, correlation(both), source))
            rows += [
                made.row(metric, both, None if value is None else stats.Interval.point(value), source)
                for metric, value in _explained(both, latent.max_activation / MAX_LEVEL).items()
            ]
        if all(row.negatives != "none" for row in rows):
            alone = made.row("correlation", made.positives, correlation(made.positives))
            rows.append(replace(alone, is_headline=False))
        rows += [made.row("correlation", some, correlation(some), quantile=q) for q, some in made.by_quantile().items()]
        rows.append(made.row("predicted_tokens", made.asked, _predicted(made.asked)))
        return tuple(rows)


def shown_pieces(vocabulary: Vocabulary, item: Item) -> list[str]:
    r"""Return each token of a window as one line of text: a line break is ``\n``, a tab ``\t``, and no token is empty."""
    return [neutralise(piece) or _NO_TEXT for piece in vocabulary.pieces(item.tokens)]


def read_lines(text: str, where: str) -> list[list[Line]]:
    """Return the excerpts of a worked example, parted by empty lines.

    Raises: ConfigError when a line is not a token, a tab, and a level from 0 to 10 or `HIDDEN`.
    """
    excerpts = []
    for block in text.split("\n\n"):
        lines = []
        for line in block.split("\n"):
            token, tab, value = line.rpartition("\t")
            if not tab or value not in (HIDDEN, *map(str, range(MAX_LEVEL + 1))):
                raise ConfigError(f"{where}: the line {line!r} is not a token, a tab, and a level from 0 to 10 or {HIDDEN!r}")
            lines.append(Line(token, value))
        excerpts.append(lines)
    return excerpts


def expected_level(token: TokenLogprob, top: int) -> float | None:
    """Return sum i p_i over the levels 0 to `top` among a token's alternatives, renormalised; None when there are none.

    Levels are compared as whole strings, space apart, so that 1 is never the beginning of 10.
    Raises: ReplyError when a log-probability is none.
    """
    mass = [0.0] * (top + 1)
    levels = {str(level): level for level in range(top + 1)}
    for text, logprob in token.top:
        if not logprob <= 1e-3:
            raise ReplyError(f"the reply has the log-probability {logprob}")
        level = levels.get(text.strip())
        if level is not None:
            mass[level] += math.exp(logprob)
    total = math.fsum(mass)
    return math.fsum(level * p for level, p in enumerate(mass)) / total if total > 0 else None


def _answer(item: Item, predicted: Sequence[float | None], min_predicted: float) -> Answer:
    """Return the predictions of a window beside its activations.

    Raises: ReplyError when too few tokens have one.
    """
    assert item.activations is not None
    num = sum(level is not None for level in predicted)
    if num == 0 or num < min_predicted * len(predicted):
        raise ReplyError(f"{len(predicted) - num} of {len(predicted)} tokens have no level among the likeliest tokens")
    # A window lent by a neighbour holds the neighbour's activations: the latent itself is silent there.
    truths = tuple(map(float, item.activations)) if item.truth else (0.0,) * len(predicted)
    return Answer(status="ok", truths=truths, answers=tuple(predicted))


def correlation(verdicts: Sequence[Verdict]) -> stats.Interval | None:
    """Return Pearson's correlation over the tokens of all windows that have predictions; None when a side is constant."""
    truths, answers, documents = _tokens(verdicts)
    return stats.correlation(answers, truths, documents)


def _tokens(verdicts: Sequence[Verdict]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return activation, predicted level and document of every token that has a prediction."""
    rows = [
        (truth, answer, verdict.document)
        for verdict in verdicts
        for truth, answer in zip(verdict.truths or (), verdict.answers or (), strict=True)
        if answer is not None
    ]
    truths, answers, documents = zip(*rows, strict=True) if rows else ((), (), ())
    return np.array(truths, np.float64), np.array(answers, np.float64), np.array(documents, np.int64)


def _explained(verdicts: Sequence[Verdict], scale: float) -> dict[str, float | None]:
    """Return how much of the activations the predictions explain, by metric; `scale`: activation of level 1.

    None where the latent is silent on all tokens.
    """
    truths, answers, documents = _tokens(verdicts)
    if not truths.any():
        return dict.fromkeys(("explained_squares", "explained_absolute", "calibrated_r2"))
    missed = truths - scale * answers
    return {
        "explained_squares": 1 - float(np.square(missed).sum() / np.square(truths).sum()),
        "explained_absolute": 1 - float(np.abs(missed).sum() / np.abs(truths).sum()),
        "calibrated_r2": stats.cross_fitted_r2(answers, truths, documents),
    }


def _predicted(verdicts: Sequence[Verdict]) -> stats.Interval | None:
    """Return the share of tokens of answered windows that have a prediction."""
    answers = [answer for verdict in verdicts for answer in verdict.answers or ()]
    if not answers:
        return None
    share = sum(answer is not None for answer in answers) / len(answers)
    return stats.Interval.point(share)
