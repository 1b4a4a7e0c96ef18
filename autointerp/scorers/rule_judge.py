"""Judges examples by the rule that an explanation carries, with no LLM: the floor that LLM explanations have to beat.

Windows: yes when the rule predicts any token of the window; the probability is the greatest score of its tokens. Windows with
highlights: yes when the rule predicts at least half of the highlighted tokens; the probability is the mean of their scores.
Tokens: the rule's score of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from autointerp.protocols import Resources, Vocabulary
from autointerp.records import Explanation, LatentExamples, Request, ScoreResult
from autointerp.rules import Rule
from autointerp.scorers.items import Answer, Item
from autointerp.scorers.metrics import not_applicable
from autointerp.scorers.prompted import OneQuestion, PromptedConfig


class RuleJudgedConfig(PromptedConfig):
    """How a scorer asks that a rule can answer."""

    judge: Literal["engine", "rule"] = "engine"
    """Who answers: an engine, or the rule that the explanation carries (no LLM)."""


class RuleJudged(OneQuestion):
    """A scorer whose questions a rule can answer."""

    config: RuleJudgedConfig

    def by_rule(self, rule: Rule, items: Sequence[Item], vocabulary: Vocabulary) -> list[Answer]:
        """Return one answer per item; each counts as asked on its own."""
        return judge_by_rule(rule, items, vocabulary)

    def requests(self, latent: LatentExamples, explanation: Explanation, resources: Resources, /) -> list[Request]:
        """Return the requests that :meth:`score` would send first, without sending any."""
        return [] if self.config.judge == "rule" else super().requests(latent, explanation, resources)

    async def score(
        self, latent: LatentExamples, explanation: Explanation, resources: Resources, /, *, control: str | None = None
    ) -> ScoreResult:
        """Return one verdict per example and the metrics over them; see :class:`autointerp.protocols.Scorer`."""
        if self.config.judge == "rule" and explanation.rule is None:
            latent = replace(latent, negative_sources=self.sources(latent.negative_sources))
            return ScoreResult(verdicts=(), scores=not_applicable(latent, explanation, judge="rule", headline=self.headline))
        return await super().score(latent, explanation, resources, control=control)

    async def answers(
        self, items: Sequence[Item], latent: LatentExamples, explanation: Explanation, resources: Resources
    ) -> tuple[dict[int, Answer], str]:
        if self.config.judge == "engine":
            return await super().answers(items, latent, explanation, resources)
        assert explanation.rule is not None
        asked = [item for item in items if item.is_asked]
        answered = self.by_rule(Rule.from_json(explanation.rule), asked, resources.vocabulary)
        return {item.example_idx: answer for item, answer in zip(asked, answered, strict=True)}, "rule"


def judge_by_rule(rule: Rule, items: Sequence[Item], vocabulary: Vocabulary) -> list[Answer]:
    """Return one answer per item; each counts as asked on its own."""
    return [_answer(scores, item, prompt_idx=i) for i, (scores, item) in enumerate(_scored(rule, items, vocabulary))]


def tokens_by_rule(rule: Rule, items: Sequence[Item], vocabulary: Vocabulary) -> list[np.ndarray]:
    """Return the rule's score of each token of each item, float32 [length], 0..1."""
    return [scores[: item.length] for scores, item in _scored(rule, items, vocabulary)]


def _scored(rule: Rule, items: Sequence[Item], vocabulary: Vocabulary) -> list[tuple[np.ndarray, Item]]:
    if not items:
        return []
    scores = rule.scores(np.stack([item.padded for item in items]), np.array([item.length for item in items]), vocabulary)
    return list(zip(scores, items, strict=True))


def _answer(scores: np.ndarray, item: Item, *, prompt_idx: int) -> Answer:
    if item.mask is None:
        probability = float(scores.max(initial=0))
        return Answer(status="ok", answer=probability > 0, probability=probability, prompt_idx=prompt_idx)
    marked = scores[: len(item.mask)][item.mask]
    answer = bool(np.count_nonzero(marked) * 2 >= len(marked))
    return Answer(status="ok", answer=answer, probability=float(marked.mean()), prompt_idx=prompt_idx)
