"""Embedding: is the explanation nearer to activating windows than to silent ones? (arXiv 2410.13928).

A sentence embedder embeds the explanation as a query and each window as a document; the score is the AUROC of their cosines. No
LLM is asked. Blind to token-level and syntactic latents, fond of topics.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from autointerp.config import Config
from autointerp.errors import ReplyError
from autointerp.examples.render import neutralise, plain
from autointerp.protocols import Embedder, Needs, Resources
from autointerp.records import Explanation, LatentExamples, Request, ScoreResult
from autointerp.scorers.items import Answer, items_of, verdict_of
from autointerp.scorers.metrics import ranked_scores

_VERSION = 1
"""Part of the identity: raise it when the same settings come to compare or to count otherwise."""

_LOCK = threading.Lock()
"""Embedders are not asked from two threads at once: few of them allow it, and none is faster for it."""

_MAX_KNOWN = 4096
"""Vectors that a scorer remembers."""


class EmbeddingConfig(Config):
    """How explanation and windows are compared."""

    instruction: str = ""
    """Put before the explanation, for retrievers that were trained with an instruction for queries."""


class Embedding:
    """Ranks windows by their cosine with the explanation."""

    Config = EmbeddingConfig
    name = "embedding"
    needs = Needs(embedder=True)
    headline = "auroc"

    def __init__(self, config: EmbeddingConfig | None = None) -> None:
        self.config = config or EmbeddingConfig()
        self._vectors = Vectors()

    def identity(self) -> Mapping[str, Any]:
        """Return everything that changes its verdicts, but embedder and selection."""
        return {"version": _VERSION, "config": self.config.identity()}

    def requests(self, latent: LatentExamples, explanation: Explanation, resources: Resources, /) -> list[Request]:
        """Return no requests: nothing is asked of an LLM."""
        return []

    async def score(
        self, latent: LatentExamples, explanation: Explanation, resources: Resources, /, *, control: str | None = None
    ) -> ScoreResult:
        """Return one verdict per window; see :class:`autointerp.protocols.Scorer`."""
        assert resources.embedder is not None
        items = items_of(latent.positives, latent.negatives)
        texts = [plain(resources.vocabulary, item.tokens, markers=(), one_line=False) for item in items]
        query = self.config.instruction + neutralise(explanation.text or "", markers=(), one_line=False)
        vectors = await self._vectors.of(resources.embedder, [query, *texts])
        cosines = vectors[1:] @ vectors[0]
        verdicts = tuple(
            verdict_of(
                item,
                Answer(status="ok", value=float(cosine), prompt_idx=item.example_idx),
                scorer=self.name,
                latent=latent,
                explanation=explanation,
                control=control,
            )
            for item, cosine in zip(items, cosines, strict=True)
        )
        scores = ranked_scores(verdicts, latent=latent, explanation=explanation, judge=resources.embedder.id)
        return ScoreResult(verdicts=verdicts, scores=scores)


class Vectors:
    """Vectors of texts; recent ones are remembered, since a control compares the same windows right after."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], np.ndarray] = {}

    async def of(self, embedder: Embedder, texts: Sequence[str]) -> np.ndarray:
        """Return one unit vector per text, float64 [len(texts), dim].

        Raises: ReplyError when what comes from the embedder is not that.
        """
        return await asyncio.to_thread(self._of, embedder, texts)

    def _of(self, embedder: Embedder, texts: Sequence[str]) -> np.ndarray:
        known, name = self._known, embedder.id
        with _LOCK:
            new = [text for text in dict.fromkeys(texts) if (name, text) not in known]
            if new:
                vectors = _checked(name, embedder.embed(new), len(new))
                known |= {(name, text): vector for text, vector in zip(new, vectors, strict=True)}
            found = np.stack([known[name, text] for text in texts])
            for key in list(known)[: max(len(known) - _MAX_KNOWN, 0)]:
                del known[key]
            return found


def _checked(name: str, found: np.ndarray, count: int) -> np.ndarray:
    vectors = np.asarray(found, np.float64)
    if vectors.ndim != 2 or len(vectors) != count:
        raise ReplyError(f"{name} gave an array of shape {vectors.shape} for {count} texts")
    lengths = np.linalg.norm(vectors, axis=1)
    if not np.all(np.abs(lengths - 1) < 1e-2):
        raise ReplyError(f"{name} gave vectors of lengths {lengths.min():.3g} to {lengths.max():.3g}; expected 1")
    return vectors
