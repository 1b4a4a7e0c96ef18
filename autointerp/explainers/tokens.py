"""What explainers that look at the token alone share: counts by token, the rule that names tokens, and its sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autointerp.protocols import Vocabulary
from autointerp.records import Examples, Explanation, LatentExamples
from autointerp.rules import Clause, Condition, Rule, describe

# Shapes: N tokens in all examples, U distinct token ids.


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """How often each token occurs in some examples, and how active the latent is there."""

    ids: np.ndarray
    """int64 [U], ascending."""
    num: np.ndarray
    """int64 [U], occurrences, the silent ones too."""
    num_active: np.ndarray
    """int64 [U], occurrences on which the latent fires."""
    total: np.ndarray
    """float64 [U], sum of |activation|."""


def flat(examples: Examples) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (id int64 [N], |activation| float64 [N], corpus position int64 [N]) of every token; overlaps count once."""
    column = np.arange(examples.tokens.shape[1])[None, :]
    inside = column < examples.lengths[:, None]
    positions = (examples.positions[:, None] + column)[inside]
    # Windows placed around their strongest token may overlap.
    positions, first = np.unique(positions, return_index=True)
    ids = examples.tokens[inside][first].astype(np.int64)
    return ids, np.abs(examples.activations[inside][first]).astype(np.float64), positions


def count(examples: Examples) -> TokenCounts:
    """Return the counts over all tokens of `examples`."""
    ids, strength, _ = flat(examples)
    unique, back = np.unique(ids, return_inverse=True)
    size = len(unique)
    return TokenCounts(
        ids=unique,
        num=np.bincount(back, minlength=size),
        num_active=np.bincount(back[strength > 0], minlength=size),
        total=np.bincount(back, weights=strength, minlength=size),
    )


def rule_of(tokens: Sequence[int], counts: TokenCounts) -> Rule:
    """Return the rule that a token is active when it is one of `tokens`, all of which `counts` knows.

    The score of each is the share of its occurrences on which the latent fires.
    """
    at = np.searchsorted(counts.ids, np.asarray(tokens, np.int64))
    shares = (counts.num_active[at] / counts.num[at]).tolist()
    clauses = [
        Clause(conditions=(Condition(kind="token", offset=0, value=token),), score=share)
        for token, share in zip(tokens, shares, strict=True)
    ]
    return Rule(clauses=tuple(clauses))


def explanation(latent: LatentExamples, rule: Rule, vocabulary: Vocabulary, *, explainer: str, none: str) -> Explanation:
    """Return the row of a rule that names tokens; ``not_applicable`` where it names none, for the reason `none`."""
    num_positives = sum(source == "positive" for source in latent.explain_statistics.sources)
    return Explanation(
        coder=latent.coder,
        latent=latent.latent,
        explainer=explainer,
        explainer_id="",
        selection_id=latent.selection_id,
        status="ok" if rule.clauses else "not_applicable",
        text=f"the token {describe(rule, vocabulary)}" if rule.clauses else None,
        rule=rule.to_json() if rule.clauses else None,
        num_examples=num_positives,
        num_negatives=len(latent.explain_statistics) - num_positives,
        reason=None if rule.clauses else none,
    )
