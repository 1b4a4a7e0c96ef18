"""The single-token explainer: no LLM; names the token a latent fires on where it is one token, and says nothing elsewhere.

The test that delphi's cache statistics intend: one token has more than 90% of the 50 strongest activations, and more than 75%
of 100 activations drawn from the stronger half. (delphi's code sorts the other way round and counts runs in place of totals.)
It is made on the explain pool's statistics, a sample of windows over all strengths, so that nothing that is scored is seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from autointerp.config import Config
from autointerp.digest import hash64, seed_of
from autointerp.explainers.tokens import count, explanation, flat, rule_of
from autointerp.protocols import Needs, Resources
from autointerp.records import Examples, Explanation, LatentExamples, Request
from autointerp.rules import Rule

_VERSION = 1
"""Part of the identity: raise it when the same settings come to say otherwise."""


class SingleTokenConfig(Config):
    """When a latent counts as one of a single token."""

    strength: Literal["strong", "weak"] = "strong"
    """``strong``: both shares must be above theirs, and of the same token; ``weak``: one of them is enough."""
    num_top: int = Field(default=50, ge=1)
    """How many of the strongest activations are looked at."""
    top_share: float = Field(default=0.9, ge=0.5, lt=1)
    """More than this share of them must be on one token."""
    num_drawn: int = Field(default=100, ge=1)
    """How many activations are drawn from the stronger half."""
    drawn_share: float = Field(default=0.75, ge=0.5, lt=1)
    """More than this share of them must be on one token."""


@dataclass(frozen=True, kw_only=True)
class Commonest:
    """The commonest token of some activations."""

    token: int
    share: float
    """Of the activations that are on it, 0..1."""


class SingleToken:
    """Names the token, without an LLM."""

    Config = SingleTokenConfig
    name = "single_token"
    needs = Needs()

    def __init__(self, config: SingleTokenConfig | None = None) -> None:
        self.config = config or SingleTokenConfig()

    def identity(self) -> Mapping[str, Any]:
        return {"version": _VERSION, "config": self.config.identity()}

    def requests(self, latent: LatentExamples, resources: Resources, /) -> list[Request]:
        """Return nothing: no LLM is asked."""
        return []

    async def explain(self, latent: LatentExamples, resources: Resources, /) -> Sequence[Explanation]:
        """Return one explanation with its rule; ``not_applicable`` when the latent fires on more than one token."""
        seed = seed_of("single token", resources.seed, latent.coder, latent.latent)
        token = single_token(latent.explain_statistics, self.config, seed=seed)
        rule = Rule(clauses=()) if token is None else rule_of([token], count(latent.explain_statistics))
        none = "the latent fires on more than one token"
        return [explanation(latent, rule, resources.vocabulary, explainer=self.name, none=none)]


def single_token(examples: Examples, config: SingleTokenConfig, *, seed: int) -> int | None:
    """Return the token that the activity in `examples` is on, None where it is not on one."""
    found = commonest(examples, config, seed=seed)
    if found is None:
        return None
    top, drawn = found
    passed = [one.token for one, share in ((top, config.top_share), (drawn, config.drawn_share)) if one.share > share]
    if config.strength == "strong" and (len(passed) < 2 or len(set(passed)) > 1):
        return None
    return passed[0] if passed else None


def commonest(examples: Examples, config: SingleTokenConfig, *, seed: int) -> tuple[Commonest, Commonest] | None:
    """Return the commonest token of the strongest activations, and of those drawn; None where nothing is active.

    Where there are fewer activations than are asked for, all there are count.
    """
    ids, strength, positions = flat(examples)
    active = np.flatnonzero(strength > 0)
    if not len(active):
        return None
    # Of equals the one that a seeded hash puts first, never the first of the corpus.
    by_hash = hash64(seed, positions[active])
    ranked = active[np.lexsort((by_hash, -strength[active]))]
    half = ranked[: (len(ranked) + 1) // 2]
    drawn = half[np.argsort(hash64(seed, positions[half]), kind="stable")]
    return _commonest(ids[ranked[: config.num_top]]), _commonest(ids[drawn[: config.num_drawn]])


def _commonest(ids: np.ndarray) -> Commonest:
    unique, num = np.unique(ids, return_counts=True)
    most = int(np.argmax(num))
    return Commonest(token=int(unique[most]), share=float(num[most] / len(ids)))
