"""Embedding: is the explanation nearer to activating windows than to silent ones? (arXiv 2410.13928).

A sentence embedder embeds the explanation as a query and each window as a document; the score is the AUROC of their cosines. No
LLM is asked. Blind to token-level and syntactic latents, fond of topics.
"""

from __future__ import annotations

from autointerp.config import Config
from autointerp.examples.render import neutralise, plain
from autointerp.protocols import Needs, Resources
from autointerp.records import Explanation, LatentExamples, ScoreResult
from autointerp.scorers.items import items_of
from autointerp.scorers.vectors import VectorScorer


class EmbeddingConfig(Config):
    """How explanation and windows are compared."""

    instruction: str = ""
    """Put before the explanation, for retrievers that were trained with an instruction for queries."""


class Embedding(VectorScorer):
    """Ranks windows by their cosine with the explanation."""

    Config = EmbeddingConfig
    name = "embedding"
    needs = Needs(embedder=True)

    def __init__(self, config: EmbeddingConfig | None = None) -> None:
        self.config = config or EmbeddingConfig()
        super().__init__(self.config)

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
        return self._result(items, cosines, latent, explanation, control=control, judge=resources.embedder.id)
