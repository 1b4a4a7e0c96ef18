"""The records that stages hand to each other: examples, explanations, verdicts and scores.

Pure data: no file, network or heavy library is touched here. Arrays carry shape letters: E examples, W tokens of a window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np

Status = Literal[
    "ok",
    "unparseable",
    "refused",
    "truncated",
    "no_reply",
    "too_few_examples",
    "too_dense",
    "too_long",
    "undefined",
    "not_applicable",
]
"""What became of a latent, an explanation, a verdict or a score; values are null unless ``ok``."""

STATUSES: tuple[str, ...] = get_args(Status)
RETRYABLE: frozenset[str] = frozenset({"no_reply"})
"""Statuses that a later run tries again; a shard that holds one is ``partial``."""

UNSCORED: tuple[Status, ...] = ("unparseable", "refused", "truncated", "no_reply", "too_long")
"""Reasons why a single example has no verdict; each has a ``num_<reason>`` column in the scores table."""

Disjoint = Literal["document", "context", "unknown", "none"]
"""Unit by which the pools of a latent were separated; ``none`` = examples that were explained are scored on purpose."""

Pool = Literal["explain", "score", "validate"]
Source = Literal[
    "positive",
    "random",
    "same_token",
    "neighbour_cooccurrence",
    "neighbour_decoder",
    "neighbour_encoder",
    "embedding",
    "shuffled_highlight",
    "none",
]
"""Where an example comes from. ``shuffled_highlight``: an activating window with inactive tokens marked (fuzzing)."""


NeighbourKind = Literal["cooccurrence", "decoder", "encoder"]
"""What makes two latents neighbours: firing on the same positions, or the cosine of their decoder or encoder rows."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Windows of the corpus as a struct of arrays; rows in order of choice (quantile 0, the strongest, first)."""

    tokens: np.ndarray
    """uint32 [E, W], token ids; columns at or beyond a row's length are 0."""
    activations: np.ndarray
    """float32 [E, W], the latent's activation at each token; 0 where silent or beyond the length. A negative from a
    neighbour keeps the neighbour's, so an activation does not say that the latent fires: the source does."""
    lengths: np.ndarray
    """int32 [E], tokens in each window, 1..W."""
    positions: np.ndarray
    """int64 [E], position of the first token in the corpus."""
    documents: np.ndarray
    """int64 [E], document id."""
    quantiles: np.ndarray
    """int16 [E], rank quantile, 0 the strongest; -1 for negatives."""
    sources: tuple[str, ...]
    """One of `Source` for each row."""

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, rows: Sequence[int] | np.ndarray) -> Examples:
        """Return the given rows, in the given order."""
        index = np.asarray(rows, dtype=np.int64)
        return Examples(
            tokens=self.tokens[index],
            activations=self.activations[index],
            lengths=self.lengths[index],
            positions=self.positions[index],
            documents=self.documents[index],
            quantiles=self.quantiles[index],
            sources=tuple(self.sources[i] for i in index),
        )

    def joined(self, other: Examples) -> Examples:
        """Return these rows and then those of `other`, of windows of equal width."""
        names = ("tokens", "activations", "lengths", "positions", "documents", "quantiles")
        arrays = {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in names}
        return Examples(**arrays, sources=self.sources + other.sources)

    @staticmethod
    def empty(width: int) -> Examples:
        """Return no examples, of windows of `width` tokens."""
        return Examples(
            tokens=np.zeros((0, width), np.uint32),
            activations=np.zeros((0, width), np.float32),
            lengths=np.zeros(0, np.int32),
            positions=np.zeros(0, np.int64),
            documents=np.zeros(0, np.int64),
            quantiles=np.zeros(0, np.int16),
            sources=(),
        )


_NO_EXAMPLES = Examples.empty(0)
"""Shared: an array without items cannot be written to."""


@dataclass(frozen=True, kw_only=True)
class LatentExamples:
    """All that explainers and scorers may see of one latent; pools are disjoint as `disjoint` says."""

    coder: str
    latent: int
    selection_id: str
    """Digest of everything that decided the choice."""
    status: Status
    """``ok``, ``too_few_examples`` or ``too_dense``; example blocks are empty unless ``ok``."""
    disjoint: Disjoint
    density: float
    """Share of corpus tokens the latent fires on, 0..1."""
    max_activation: float
    """Largest |activation| within the explain pool; scale of the integers an LLM sees. 0 unless ``ok``."""
    explain: Examples
    """Positives to show to an explainer (40 by default)."""
    explain_statistics: Examples
    """A larger sample of the explain pool, positives first, then silent windows (source ``random``), for rules and counts."""
    explain_negatives: Examples
    """Silent windows of the explain pool, never scored."""
    positives: Examples
    """Score pool, activating (50 by default), stratified by quantile."""
    negatives: Examples
    """Score pool, silent (50 by default), every row with its source."""
    validate_positives: Examples = _NO_EXAMPLES
    """Validate pool, activating, stratified by quantile; empty but for explainers that choose between candidates."""
    validate_negatives: Examples = _NO_EXAMPLES
    """Validate pool, silent; as above."""
    negative_sources: tuple[str, ...] = ()
    """Sources of `negatives` that were asked for, whether or not the latent has windows of them; empty where nobody says."""
    promoted: tuple[int, ...] | None = None
    """Tokens that the latent promotes, the most promoted first; None but for explainers that show them."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """One row of the explanations table."""

    coder: str
    latent: int
    explainer: str
    explainer_id: str
    selection_id: str
    status: Status
    text: str | None
    rule: str | None = None
    """Canonical JSON of a predicate of `rules.py`, or None."""
    sample: int = 0
    model: str | None = None
    prompt_id: str | None = None
    parent_ids: tuple[str, ...] = ()
    origin: str = "generated"
    num_examples: int = 0
    num_negatives: int = 0
    num_attempts: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    density: float | None = None
    """Share of corpus tokens the latent fires on, so that coverage by density needs no store."""
    candidate: str | None = None
    """What it said, of an explanation that was not chosen; `text` is null and the status ``not_applicable`` then."""
    validate_score: float | None = None
    """What it scored on the validate pool, where candidates are chosen by that."""
    judge: str | None = None
    """Model that scored it there."""
    reason: str | None = None
    """Why the row is as it is, in words, where the status does not say it."""
    explanation_id: str = ""
    """Digest of (coder, latent, explainer_id, sample, text, rule); filled in by :func:`results.write`."""

    def with_(self, **changes: Any) -> Explanation:
        """Return a copy with some fields changed."""
        return replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One judged example: a row of the verdicts table."""

    coder: str
    latent: int
    explanation_id: str
    scorer: str
    scorer_id: str
    control: str | None
    """None, or the name of the control (``shuffled``) whose explanation was judged."""
    example_idx: int
    """Row among the latent's scored examples, positives first."""
    position: int
    document: int
    source: str
    quantile: int
    truth: bool
    answer: bool | None
    probability: float | None
    status: Status
    request_ids: tuple[str, ...] = ()
    prompt_idx: int = 0
    """Which prompt of this (latent, scorer, control) held the example; examples that share one are not independent."""
    truths: tuple[float, ...] | None = None
    """What `answers` are compared with: activations by token, or 1 for the right choice and 0 for others."""
    answers: tuple[float | None, ...] | None = None
    """Predictions by token (None where there is none), or 1 for the choice made and 0 for others."""
    value: float | None = None
    """What the example is ranked by where that is no probability: a cosine, a difference of cosines, nats."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one (latent, explanation, scorer): a row of the scores table."""

    coder: str
    latent: int
    explanation_id: str
    scorer: str
    scorer_id: str
    base_id: str = ""
    """`scorer_id` of the scorer itself: of this row's own, or under a control of the scorer that the control is of."""
    selection_id: str
    control: str | None
    judge: str
    """The judging model's name, ``rule``, or ``none``."""
    explainer: str
    metric: str
    is_headline: bool
    negatives: str
    """The source of the negatives it is computed over; sources are never pooled."""
    quantile: int | None
    status: Status
    value: float | None
    ci_low: float | None
    ci_high: float | None
    ci_method: str
    chance: float | None
    disjoint: Disjoint
    num_scored: int
    unscored: Mapping[str, int] = field(default_factory=dict)
    """Examples without a verdict by reason (a subset of `UNSCORED`); with `num_scored` they sum to what was asked."""
    reason: str | None = None
    """Why there is no value, in words, where the status does not say it."""


@dataclass(frozen=True, kw_only=True)
class ScoreResult:
    """What one scorer returns for one latent and explanation."""

    verdicts: tuple[Verdict, ...]
    scores: tuple[Score, ...]


# Requests and replies of an engine ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation; the only kind of prompt that gets a chat template."""

    messages: tuple[tuple[str, str], ...]
    """(role, content) pairs; roles are ``system``, ``user`` and ``assistant``."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """A prompt sent as it is; the engine's tokenizer adds its own special tokens."""

    text: str


@dataclass(frozen=True, kw_only=True)
class TokenIds:
    """A prompt as token ids of the engine's own vocabulary; nothing is added."""

    ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The reply is exactly one of these strings."""

    options: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Regex:
    """The reply matches this pattern as a whole."""

    pattern: str


@dataclass(frozen=True, kw_only=True)
class JsonSchema:
    """The reply is JSON of this schema, given as canonical JSON text so that the record stays hashable."""

    schema: str


@dataclass(frozen=True, kw_only=True)
class PromptLogprobs:
    """Ask for the log-probabilities of the prompt's own tokens."""

    start: int = 0
    """First prompt token that is wanted."""
    top: int = 0
    """How many alternatives at each."""
    at: tuple[int, ...] = ()
    """The prompt tokens whose alternatives are wanted, none = all; the others' would only fill logs."""

    def top_at(self, position: int) -> int:
        """Return how many alternatives of the prompt token number `position` are wanted."""
        return self.top if not self.at or position in self.at else 0


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question to an engine, complete: everything that can change the answer is here."""

    prompt: Chat | Text | TokenIds
    max_tokens: int = 64
    """0 = score the prompt and generate nothing."""
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    constraint: Choice | Regex | JsonSchema | None = None
    labels: tuple[str, ...] = ()
    """Ask for the unconstrained probabilities of these strings as the first token; excludes `constraint`."""
    top_logprobs: int = 0
    prompt_logprobs: PromptLogprobs | None = None
    sample: int = 0
    """Which draw this is: part of the digest, never sent."""

    def __post_init__(self) -> None:
        if self.labels and self.constraint is not None:
            raise ValueError("a request has labels or a constraint, never both: a grammar renormalises probabilities")


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """A token with its natural-log probability and, where asked for, the alternatives."""

    token: str
    token_id: int | None
    logprob: float | None
    """None where none is defined (the first prompt token)."""
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens an answer cost."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            reasoning_tokens=self.reasoning_tokens + other.reasoning_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What an engine answered."""

    text: str
    """Thinking is stripped; its tokens are counted in `usage.reasoning_tokens`."""
    finish: Literal["stop", "length", "filter"]
    tokens: tuple[TokenLogprob, ...] = ()
    prompt_tokens: tuple[TokenLogprob, ...] = ()
    label_probs: tuple[float, ...] | None = None
    """Probability of each of the request's labels as first token, unnormalised (they sum to `label_mass`)."""
    label_mass: float | None = None
    usage: Usage = Usage()
    served_model: str = ""
    request_id: str = ""
    """Digest of (engine id, request); filled in by the reply log."""


@dataclass(frozen=True, kw_only=True)
class EngineId:
    """Which model answers: everything that may change its replies, and never a host, a port or a tier."""

    kind: Literal["openai", "vllm", "hf", "fake"]
    model: str
    revision: str | None = None
    quantization: str | None = None
    template_digest: str | None = None


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What an engine can do; methods check before work starts."""

    constraints: bool = True
    labels: bool = True
    top_logprobs: int = 20
    prompt_logprobs: bool = True
    token_ids: bool = True
    tokenize: bool = True
