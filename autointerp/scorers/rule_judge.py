"""Judges examples by the rule that an explanation carries, with no LLM: the floor that LLM explanations have to beat.

Detection: yes when the rule predicts any token of the window; the probability is the greatest score of its tokens. Fuzzing: yes
when the rule predicts at least half of the highlighted tokens; the probability is the mean of their scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autointerp.protocols import Vocabulary
from autointerp.rules import Rule
from autointerp.scorers.items import Answer, Item


def judge_by_rule(rule: Rule, items: Sequence[Item], vocabulary: Vocabulary) -> list[Answer]:
    """Return one answer per item; each counts as asked on its own."""
    if not items:
        return []
    scores = rule.scores(np.stack([item.padded for item in items]), np.array([len(item.tokens) for item in items]), vocabulary)
    return [_answer(row, item, prompt_idx=i) for i, (row, item) in enumerate(zip(scores, items, strict=True))]


def _answer(scores: np.ndarray, item: Item, *, prompt_idx: int) -> Answer:
    if item.mask is None:
        probability = float(scores.max(initial=0))
        return Answer(status="ok", answer=probability > 0, probability=probability, prompt_idx=prompt_idx)
    marked = scores[: len(item.mask)][item.mask]
    answer = bool(np.count_nonzero(marked) * 2 >= len(marked))
    return Answer(status="ok", answer=answer, probability=float(marked.mean()), prompt_idx=prompt_idx)
