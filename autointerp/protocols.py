"""The interfaces of the parts that users may replace: coders, engines, embedders, probes, explainers and scorers.

No torch, no transformers: arrays are numpy here, and what torch needs stays behind these seams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from autointerp.records import (
    Capabilities,
    EngineId,
    Explanation,
    LatentExamples,
    Reply,
    Request,
    ScoreResult,
)


@runtime_checkable
class Engine(Protocol):
    """Whatever answers LLM requests. Batching is behind `complete`; any number of calls may be under way."""

    @property
    def id(self) -> EngineId: ...

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def context_tokens(self) -> int | None:
        """Longest prompt plus output in tokens, or None when the engine does not say."""

    async def complete(self, request: Request, /) -> Reply:
        """Answer one request.

        Raises: one of the LLMError tree; never returns a default in place of an answer. ReplyError when the server
        answered something that is not a reply.
        """

    async def tokenize(self, text: str, /) -> tuple[int, ...]:
        """Return the token ids of `text`, without special tokens."""

    async def aclose(self) -> None:
        """Let go of connections and memory. Safe to call twice."""


@runtime_checkable
class Embedder(Protocol):
    """Maps texts to unit vectors."""

    @property
    def id(self) -> str: ...

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 [len(texts), dim], each row of length 1."""


class Vocabulary(Protocol):
    """Renders token ids as text; never a tokenizer, so that readers need no hub."""

    def text(self, ids: np.ndarray) -> str:
        """Return the text of a run of tokens, bytes joined before decoding, so split characters survive."""

    def pieces(self, ids: np.ndarray) -> list[str]:
        """Return one string per token whose concatenation is ``text(ids)``.

        A character split over several tokens belongs to the last of them; the earlier ones are empty strings.
        """

    def pieces_of(self, tokens: np.ndarray, lengths: np.ndarray) -> list[list[str]]:
        """Return :meth:`pieces` of the first ``lengths[i]`` tokens of each row of `tokens` [E, W]."""

    def is_special(self, ids: np.ndarray) -> np.ndarray:
        """Return a bool array of the same shape: True for special tokens."""

    def __len__(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a method needs beyond examples; checked and named before any work starts."""

    explanation: bool = True
    """False for a scorer that grades the latent itself; it is given a blank explanation, and its rows are the latent's."""
    engine: bool = False
    labels: bool = False
    constraints: bool = False
    prompt_logprobs: bool = False
    embedder: bool = False
    subject: bool = False
    logits: bool = False
    """Explainers: the tokens that each latent promotes, from a table of the store."""
    validate: int = 0
    """Explainers: most activating, and most silent, windows of the validate pool."""
    judge: Needs | None = None
    """Explainers that have candidates judged: what they need of the judge."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What methods may use; a method that needs one that is None said so in its `needs`."""

    vocabulary: Vocabulary
    seed: int
    engine: Engine | None = None
    """The explainer's engine for explainers, the judge for scorers."""
    judge: Engine | None = None
    """For explainers that have candidates judged: who judges; None = `engine`."""
    embedder: Embedder | None = None


class Explainer(Protocol):
    """Writes explanations of one latent."""

    name: str
    needs: Needs

    def identity(self) -> Mapping[str, Any]:
        """Return everything that changes what it writes, but the engine and the selection, as JSON values."""

    async def explain(self, latent: LatentExamples, resources: Resources, /) -> Sequence[Explanation]:
        """Return at least one row, with a status for whatever went wrong.

        `explainer_id` and `explanation_id` of the rows are left empty; the runner fills them in, and in `parent_ids` the id of
        the row of sample K for ``sample:K``. With several rows, each has its own `sample`; those that are not to be scored have
        a status other than ``ok``. `latent.status` is ``ok``.
        Raises LLMError when the engine gave up; the runner makes that a ``no_reply`` row.
        """


class Scorer(Protocol):
    """Grades one explanation of one latent."""

    name: str
    needs: Needs

    def identity(self) -> Mapping[str, Any]:
        """Return everything that changes its verdicts, but judge and selection, as JSON values."""

    async def score(
        self, latent: LatentExamples, explanation: Explanation, resources: Resources, /, *, control: str | None = None
    ) -> ScoreResult:
        """Return one verdict per example asked about and the metrics over them.

        `control`: the name of the control, None for the score itself. Under ``shuffled`` the explanation is another
        latent's; a scorer that needs no explanation shuffles which windows are the latent's. `scorer_id` is left empty; the
        runner fills it in. Failures of single requests become verdicts with a status.
        `latent.status` and `explanation.status` are ``ok``.
        """
