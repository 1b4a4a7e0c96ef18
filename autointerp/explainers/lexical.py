"""The lexical explainer: no LLM, a rule of at most ten clauses on a token and its neighbours, learned from the explain pool.

The floor that LLM explanations have to beat (in the spirit of the token lookup table of Bills et al. 2023, with context):
greedy search for the clauses that add most to coverage of the latent's strong tokens and windows, less what they match in
silent windows. The text says the rule in words; the rule itself goes with it as data. How good it is, is measured on the score
pool like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from autointerp.config import Config
from autointerp.protocols import Needs, Resources, Vocabulary
from autointerp.records import Examples, Explanation, LatentExamples, Request
from autointerp.rules import CLASSES, MAX_CLAUSES, Clause, Condition, Kind, Rule, Windows, describe, shifted

# Shapes: E examples, W tokens of a window, C candidates, B 64-bit words that hold the W tokens of a window.

_VERSION = 1
"""Part of the identity: raise it when the same settings come to write other rules."""

_NO_TOKEN = "no token of the explain pool's windows is active"


class LexicalConfig(Config):
    """How rules are learned."""

    max_clauses: int = Field(default=MAX_CLAUSES, ge=1, le=MAX_CLAUSES)
    """Most clauses of a rule."""
    max_conditions: int = Field(default=3, ge=1, le=4)
    """Most conditions of a clause."""
    threshold: float = Field(default=0.3, ge=0, lt=1)
    """A token is strong above this share of its window's greatest activation; weaker active tokens count neither way."""
    min_windows: int = Field(default=3, ge=1)
    """A clause must be new in at least so many activating windows."""
    caution: float = Field(default=1.5, ge=0)
    """Weight of a silent window that a clause hits, against an activating window that it finds."""
    min_gain: float = Field(default=0.01, ge=0)
    """Least gain for which a clause is added, on a scale from 0 to 1."""
    recent: int = Field(default=8, ge=1)
    """How far back ``recent`` conditions look, in tokens."""
    num_values: int = Field(default=24, ge=1)
    """How many of the most frequent tokens are tried at each offset."""


class Lexical:
    """Writes rules, and the rules in words."""

    Config = LexicalConfig
    name = "lexical"
    needs = Needs()

    def __init__(self, config: LexicalConfig | None = None) -> None:
        self.config = config or LexicalConfig()

    def identity(self) -> Mapping[str, Any]:
        return {"version": _VERSION, "config": self.config.identity()}

    def requests(self, latent: LatentExamples, resources: Resources, /) -> list[Request]:
        """Return nothing: no LLM is asked."""
        return []

    async def explain(self, latent: LatentExamples, resources: Resources, /) -> Sequence[Explanation]:
        """Return one explanation with its rule; ``not_applicable`` when no token of the explain pool is active."""
        examples = latent.explain_statistics
        rule = learn(examples, resources.vocabulary, self.config)
        num_positives = sum(source == "positive" for source in examples.sources)
        row = Explanation(
            coder=latent.coder,
            latent=latent.latent,
            explainer=self.name,
            explainer_id="",
            selection_id=latent.selection_id,
            status="ok",
            text=describe(rule, resources.vocabulary),
            rule=rule.to_json(),
            num_examples=num_positives,
            num_negatives=len(examples) - num_positives,
        )
        return [row if rule.clauses else row.with_(status="not_applicable", text=None, rule=None, reason=_NO_TOKEN)]


def learn(examples: Examples, vocabulary: Vocabulary, config: LexicalConfig) -> Rule:
    """Return the rule that best predicts the activity in `examples`: activating windows and silent ones."""
    evidence = _Evidence.of(examples, threshold=config.threshold, caution=config.caution)
    if not evidence.num_positive:
        return Rule(clauses=())
    singles = _singles(Windows(examples.tokens, examples.lengths, vocabulary), evidence, config)
    search = _Search(evidence, singles, config)
    chosen: list[_Candidate] = []
    covered = np.zeros_like(singles[0].bits)
    while len(chosen) < config.max_clauses:
        best = search.best(covered, is_first=not chosen)
        if best is None:
            break
        chosen.append(best)
        covered |= best.bits
    chosen = _pruned(chosen, evidence, config.min_gain / 4)
    return Rule(clauses=tuple(Clause(conditions=_ordered(c.conditions), score=evidence.precision(c.bits)) for c in chosen))


def _ordered(conditions: Iterable[Condition]) -> tuple[Condition, ...]:
    return tuple(sorted(conditions, key=lambda c: (c.kind == "recent", abs(c.offset), c.offset, c.kind, str(c.value))))


@dataclass(frozen=True)
class _Candidate:
    conditions: tuple[Condition, ...]
    bits: np.ndarray
    """uint64 [E, B], the tokens that match."""


@dataclass(frozen=True, kw_only=True)
class _Evidence:
    """Where the latent is active, one bit per token; activating windows (P) first, then silent ones (S)."""

    num_positive: int
    active: np.ndarray
    """uint64 [P, B], tokens with an activation."""
    strong: np.ndarray
    """uint64 [P, B], those above the threshold."""
    strong_mask: np.ndarray
    """bool [E, W]"""
    token_weight: np.ndarray
    """float64 [P], weight of one strong token: 1 / (P * strong tokens of the window)."""
    num_silent: int
    num_silent_tokens: int
    caution: float

    @staticmethod
    def of(examples: Examples, *, threshold: float, caution: float) -> _Evidence:
        size = np.abs(examples.activations)
        greatest = size.max(axis=1, initial=0)
        num_positive = int((greatest > 0).sum())
        strong = (size > threshold * greatest[:, None]) & (greatest > 0)[:, None]
        return _Evidence(
            num_positive=num_positive,
            active=_packed(size[:num_positive] > 0),
            strong=_packed(strong[:num_positive]),
            strong_mask=strong,
            token_weight=1 / (max(num_positive, 1) * np.maximum(strong[:num_positive].sum(axis=1), 1)),
            num_silent=max(len(examples) - num_positive, 1),
            num_silent_tokens=max(int(examples.lengths[num_positive:].sum()), 1),
            caution=caution,
        )

    def gains(self, bits: np.ndarray, covered: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return for each candidate what it adds to the objective, its promise, and in how many activating windows it is new.

        The objective is the mean of two Youden indices, of windows (as detection asks; silent ones weighted by `caution`) and
        of tokens (as fuzzing asks). The promise favours coverage over purity, since what a candidate matches beside it can
        still be cut away by a further condition. `bits` is uint64 [C, E, B].
        """
        p = self.num_positive
        new = bits[:, :p] & (self.active & ~covered[:p])
        false = bits[:, p:] & ~covered[p:]
        # Activity is matched at active tokens only: a window that a rule hits elsewhere is hit for a wrong reason.
        is_open = ((covered[:p] & self.active) == 0).all(axis=1)
        is_clean = (covered[p:] == 0).all(axis=1)
        hits = (new != 0).any(axis=2)
        wrong = (false != 0).any(axis=2) @ is_clean.astype(np.float32) / self.num_silent
        windows = (hits @ is_open.astype(np.float32)) / p - self.caution * wrong
        strong = np.bitwise_count(new & self.strong).sum(axis=2, dtype=np.float32) @ self.token_weight.astype(np.float32)
        tokens = np.bitwise_count(false).sum(axis=(1, 2)) / self.num_silent_tokens
        return (windows + strong - tokens) / 2, strong / np.sqrt(tokens + 0.01), hits.sum(axis=1)

    def precision(self, bits: np.ndarray) -> float:
        """Return the share of matched tokens that are active, with one success and one failure added."""
        hits = int(np.bitwise_count(bits[: self.num_positive] & self.active).sum())
        return round((hits + 1) / (int(np.bitwise_count(bits).sum()) + 2), 4)


def _packed(mask: np.ndarray) -> np.ndarray:
    """Return a bool array [..., W] as uint64 [..., B]."""
    num_words = -(-mask.shape[-1] // 64)
    padded = np.zeros((*mask.shape[:-1], 64 * num_words), bool)
    padded[..., : mask.shape[-1]] = mask
    return np.packbits(padded, axis=-1).view(np.uint64)


def _singles(view: Windows, evidence: _Evidence, config: LexicalConfig) -> list[_Candidate]:
    """Return every condition worth trying on its own."""
    found: list[_Candidate] = []

    def add(kind: Kind, offset: int, value: int | str, mask: np.ndarray) -> None:
        found.append(_Candidate((Condition(kind=kind, offset=offset, value=value),), _packed(mask)))

    inside = view.inside
    tokens, words = view.tokens.astype(np.int64), view.words
    for offset in (0, -1, -2, -3, 1):
        shares = 2 if offset == 0 else 1
        at, has = _neighbour(tokens, inside, offset)
        for value in _frequent(at[evidence.strong_mask & has], shares * config.num_values, config.min_windows):
            add("token", offset, value, shifted((tokens == value) & inside, offset) & inside)
        at, has = _neighbour(words, inside, offset)
        for number in _frequent(at[evidence.strong_mask & has & (at > 0)], shares * config.num_values // 2, config.min_windows):
            same = (words == number) & inside
            # A word that one token spells is that token.
            if len(np.unique(tokens[same])) > 1:
                add("word", offset, view.word(number), shifted(same, offset) & inside)
        if offset >= -2:
            for name in CLASSES:
                add("class", offset, name, view.match(Condition(kind="class", offset=offset, value=name)))
    for value in _recent(tokens, inside, evidence.strong_mask, config):
        condition = Condition(kind="recent", offset=config.recent, value=value)
        found.append(_Candidate((condition,), _packed(view.match(condition))))
    return found


def _neighbour(values: np.ndarray, inside: np.ndarray, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the value at `offset` from each token, and where there is one."""
    return np.roll(values, -offset, axis=1), shifted(inside, offset) & inside


def _frequent(values: np.ndarray, most: int, least: int) -> list[int]:
    """Return up to `most` values that occur at least `least` times, most frequent first, of equals the smallest."""
    found, count = np.unique(values, return_counts=True)
    order = np.argsort(-count, kind="stable")[:most]
    return [int(value) for value in found[order[count[order] >= least]]]


def _recent(tokens: np.ndarray, inside: np.ndarray, strong: np.ndarray, config: LexicalConfig) -> list[int]:
    """Return the tokens that most often lie shortly before a strong token, relative to how often they occur at all."""
    before = np.zeros_like(inside)
    for back in range(1, min(config.recent, tokens.shape[1] - 1) + 1):
        before[:, :-back] |= strong[:, back:]
    found, count = np.unique(tokens[before & inside], return_counts=True)
    everywhere, total = np.unique(tokens[inside], return_counts=True)
    lift = count / np.sqrt(total[np.searchsorted(everywhere, found)])
    order = np.argsort(-lift, kind="stable")
    order = order[count[order] >= 2 * config.min_windows][: config.num_values]
    return [int(value) for value in found[order]]


class _Search:
    """Greedy search over single conditions and the conjunctions that a beam finds."""

    def __init__(self, evidence: _Evidence, singles: list[_Candidate], config: LexicalConfig) -> None:
        self._evidence, self._config = evidence, config
        self._conditions = [candidate.conditions for candidate in singles]
        self._bits = np.stack([c.bits for c in singles])
        nothing = np.zeros(self._bits.shape[1:], np.uint64)
        conditions, bits = self._conditions, self._bits
        pool_conditions, pool_bits = list(conditions), [bits]
        for depth in range(1, config.max_conditions):
            conditions, bits = self._extended(conditions, bits, nothing, depth)
            pool_conditions += conditions
            pool_bits.append(bits)
        self._pool_conditions, self._pool = pool_conditions, np.concatenate(pool_bits)
        self._cost = np.array([_cost(c) for c in pool_conditions])

    def best(self, covered: np.ndarray, *, is_first: bool) -> _Candidate | None:
        """Return the clause that adds most to what is covered; None when none adds enough (the first always does)."""
        gains, _, support = self._evidence.gains(self._pool, covered)
        least = 1 if is_first else self._config.min_windows
        gains = np.where(support >= least, gains - self._cost, -np.inf)
        top = int(np.argmax(gains))
        if not is_first and gains[top] < self._config.min_gain:
            return None
        return _Candidate(self._pool_conditions[top], self._pool[top]) if np.isfinite(gains[top]) else None

    def _extended(
        self, conditions: list[tuple[Condition, ...]], bits: np.ndarray, covered: np.ndarray, depth: int
    ) -> tuple[list[tuple[Condition, ...]], np.ndarray]:
        """Return the best clauses that have one condition more than the most promising of the given ones."""
        if not conditions:
            return [], bits
        num_kept, num_added, num_best = (40, 60, 300) if depth == 1 else (12, 24, 60)
        kept = self._promising(bits, covered, num_kept)
        added = self._promising(self._bits, covered, num_added)
        pairs = [(i, j) for i in kept for j in added if _extends(conditions[i], self._conditions[j][0])]
        unique = {frozenset((*conditions[i], *self._conditions[j])): (i, j) for i, j in pairs}
        if not unique:
            return [], bits[:0]
        rows = np.array(list(unique.values()))
        joined = bits[rows[:, 0]] & self._bits[rows[:, 1]]
        gains, _, support = self._evidence.gains(joined, covered)
        score = np.where(support >= self._config.min_windows, gains, -np.inf)
        best = np.argsort(-score, kind="stable")[:num_best]
        best = best[np.isfinite(score[best])]
        return [(*conditions[i], *self._conditions[j]) for i, j in rows[best]], joined[best]

    def _promising(self, bits: np.ndarray, covered: np.ndarray, count: int) -> list[int]:
        _, promise, support = self._evidence.gains(bits, covered)
        promise = np.where(support >= self._config.min_windows, promise, 0)
        order = np.argsort(-promise, kind="stable")[:count]
        return [int(i) for i in order[promise[order] > 0]]


def _cost(conditions: tuple[Condition, ...]) -> float:
    """Return by how much a clause must be better than the plainest: longer ones win by chance, and read badly."""
    says_what = any(c.offset == 0 for c in conditions)
    return 0.004 * (len(conditions) - 1) + 0.004 * any(c.kind == "recent" for c in conditions) + 0.004 * (not says_what)


def _extends(conditions: tuple[Condition, ...], more: Condition) -> bool:
    """Return whether a clause may have one more condition: one per place."""
    return all((c.kind == "recent") != (more.kind == "recent") or c.offset != more.offset for c in conditions)


def _pruned(chosen: list[_Candidate], evidence: _Evidence, tolerance: float) -> list[_Candidate]:
    """Return the clauses without those that the others make superfluous."""
    kept = list(chosen)
    for candidate in list(chosen):
        others = [c for c in kept if c is not candidate]
        if others:
            covered = np.bitwise_or.reduce([c.bits for c in others])
            if evidence.gains(candidate.bits[None], covered)[0][0] < tolerance:
                kept = others
    return kept
