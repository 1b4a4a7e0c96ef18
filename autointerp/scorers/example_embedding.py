"""Example embedding: are a latent's windows nearer to its other windows than silent ones are? (arXiv 2507.08473).

Measures the latent and the embedder, not an explanation. Every scored window is a query. Beside it stand windows that were set
apart for explaining: up to `num_exemplars` activating ones of one quantile (its own, or for a silent query each in turn) and
as many silent ones, all with highlights. delta = mean cosine with the activating ones - mean cosine with the silent ones; the
score is the AUROC of delta, activating queries against silent ones.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from autointerp.config import Config
from autointerp.digest import generator
from autointerp.examples.render import highlight
from autointerp.protocols import Needs, Resources
from autointerp.records import Examples, Explanation, LatentExamples, ScoreResult
from autointerp.scorers.highlights import dealt_anew, lent_masks, own_masks, shown_masks
from autointerp.scorers.items import items_of
from autointerp.scorers.metrics import not_applicable
from autointerp.scorers.vectors import VectorScorer


class ExampleEmbeddingConfig(Config):
    """How windows are compared."""

    num_exemplars: int = Field(default=10, ge=1)
    """Most activating windows, and most silent ones, that a query is compared with."""
    threshold: float = Field(default=0.3, ge=0, lt=1)
    """Tokens above this share of their window's greatest activation are highlighted."""


class ExampleEmbedding(VectorScorer):
    """Ranks windows by how much nearer they are to activating windows than to silent ones."""

    Config = ExampleEmbeddingConfig
    name = "example_embedding"
    needs = Needs(embedder=True, explanation=False)

    def __init__(self, config: ExampleEmbeddingConfig | None = None) -> None:
        self.config = config or ExampleEmbeddingConfig()
        super().__init__(self.config)

    async def score(
        self, latent: LatentExamples, explanation: Explanation, resources: Resources, /, *, control: str | None = None
    ) -> ScoreResult:
        """Return one verdict per query; see :class:`autointerp.protocols.Scorer`."""
        assert resources.embedder is not None
        judge = resources.embedder.id
        random = generator("example embedding", resources.seed, latent.coder, latent.latent)
        threshold = self.config.threshold
        active = latent.explain_statistics.take(np.flatnonzero(latent.explain_statistics.quantiles >= 0))
        active_masks = own_masks(active, threshold)
        silent = latent.explain_negatives
        if not len(active) or not len(silent):
            reason = f"the explain pool has {len(active)} activating and {len(silent)} silent windows to compare with"
            rows = not_applicable(latent, explanation, judge=judge, headline=self.headline, reason=reason)
            return ScoreResult(verdicts=(), scores=rows)
        silent_masks = np.stack(lent_masks(silent, active_masks, random, threshold=threshold))
        queries = latent if control is None else dealt_anew(latent, random)
        masks = np.concatenate(shown_masks(queries, threshold, random))
        exemplars = {
            int(quantile): (
                self._drawn(np.flatnonzero(active.quantiles == quantile), random),
                self._drawn(np.arange(len(silent)), random),
            )
            for quantile in np.unique(active.quantiles)
        }

        def texts(block: Examples, block_masks: np.ndarray) -> list[str]:
            lengths = block.lengths
            return [
                highlight(resources.vocabulary, block.tokens[i, : lengths[i]], block_masks[i, : lengths[i]])
                for i in range(len(block))
            ]

        items = items_of(queries.positives, queries.negatives)
        scored = queries.positives.joined(queries.negatives)
        # Only windows that some query is compared with are embedded: nothing else costs anything here.
        drawn = [np.unique(np.concatenate(rows)) for rows in zip(*exemplars.values(), strict=True)]
        sides = zip((active, silent), (active_masks, silent_masks), drawn, strict=True)
        blocks = [(scored, masks), *((block.take(rows), block_masks[rows]) for block, block_masks, rows in sides)]
        vectors = await self._vectors.of(resources.embedder, [text for block in blocks for text in texts(*block)])
        of_query, of_active, of_silent = np.split(vectors, [len(scored), len(scored) + len(drawn[0])])
        turns = sorted(exemplars)
        deltas = []
        for i, item in enumerate(items):
            # A silent query has no quantile, and must not be compared with other exemplars than the positives are.
            wanted = item.quantile if item.truth else int(queries.positives.quantiles[i % max(len(queries.positives), 1)])
            quantile = min(turns, key=lambda q: abs(q - wanted))
            near, far = (np.searchsorted(rows, own) for rows, own in zip(drawn, exemplars[quantile], strict=True))
            deltas.append((of_active[near] @ of_query[i]).mean() - (of_silent[far] @ of_query[i]).mean())
        return self._result(items, deltas, latent, explanation, control=control, judge=judge)

    def _drawn(self, rows: np.ndarray, random: np.random.Generator) -> np.ndarray:
        return np.sort(random.choice(rows, min(len(rows), self.config.num_exemplars), replace=False))
