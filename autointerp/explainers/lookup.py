"""The lookup explainer: no LLM; a table of the mean activation at each token, and the tokens that stand out in it.

The token lookup table of Bills et al. 2023, E[a | token], counted over the explain pool's statistics: activating windows and
silent ones. The rule predicts activity on tokens whose entry is above a threshold. It is what knowing nothing but the token is
worth: an explanation that does not beat it has said nothing about context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from autointerp.config import Config
from autointerp.explainers.tokens import TokenCounts, count, explanation, rule_of
from autointerp.protocols import Needs, Resources
from autointerp.records import Explanation, LatentExamples, Request
from autointerp.rules import MAX_CLAUSES

_VERSION = 1
"""Part of the identity: raise it when the same settings come to say otherwise."""


class LookupConfig(Config):
    """Which tokens are named."""

    threshold: float = Field(default=0.5, gt=0)
    """A token is named when the mean activation at it is above this share of the mean over all active tokens."""
    min_count: int = Field(default=2, ge=1)
    """A token must occur so often: the entry of one that occurs once is chance."""
    max_tokens: int = Field(default=MAX_CLAUSES, ge=1, le=MAX_CLAUSES)
    """Most tokens that are named; those that carry most of the activation come first."""


class Lookup:
    """Names the tokens that stand out in the table, without an LLM."""

    Config = LookupConfig
    name = "lookup"
    needs = Needs()

    def __init__(self, config: LookupConfig | None = None) -> None:
        self.config = config or LookupConfig()

    def identity(self) -> Mapping[str, Any]:
        return {"version": _VERSION, "config": self.config.identity()}

    def requests(self, latent: LatentExamples, resources: Resources, /) -> list[Request]:
        """Return nothing: no LLM is asked."""
        return []

    async def explain(self, latent: LatentExamples, resources: Resources, /) -> Sequence[Explanation]:
        """Return one explanation with its rule; ``not_applicable`` when no token stands out."""
        counts = count(latent.explain_statistics)
        rule = rule_of(outstanding(counts, self.config), counts)
        none = "no token stands out: none occurs often enough with a mean activation above the threshold"
        return [explanation(latent, rule, resources.vocabulary, explainer=self.name, none=none)]


def table(counts: TokenCounts) -> np.ndarray:
    """Return E[a | token], float64 [U]: the mean |activation| over a token's occurrences, the silent ones too."""
    return np.asarray(counts.total / counts.num)


def outstanding(counts: TokenCounts, config: LookupConfig) -> list[int]:
    """Return the tokens whose entry is above the threshold, by their share of all activation, of equals the smallest id."""
    num_active = counts.num_active.sum()
    if not num_active:
        return []
    usual = counts.total.sum() / num_active
    chosen = np.flatnonzero((table(counts) > config.threshold * usual) & (counts.num >= config.min_count))
    by_total = chosen[np.argsort(-counts.total[chosen], kind="stable")]
    return [int(token) for token in counts.ids[by_total[: config.max_tokens]]]
