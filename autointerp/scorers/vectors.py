"""What scorers that compare embedded texts share: no LLM is asked, and examples are ranked by a number made of cosines."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from autointerp.config import Config
from autointerp.errors import ReplyError
from autointerp.protocols import Embedder, Needs, Resources
from autointerp.records import Explanation, LatentExamples, Request, ScoreResult
from autointerp.scorers.items import Answer, Item, verdict_of
from autointerp.scorers.metrics import ranked_scores

_LOCK = threading.Lock()
"""Embedders are not asked from two threads at once: few of them allow it, and none is faster for it."""

_MAX_KNOWN = 4096
"""Vectors that a scorer remembers."""


class VectorScorer:
    """A scorer that ranks examples by their vectors."""

    version: int = 2
    """Part of the identity: raise it when the same settings come to compare or to count otherwise."""
    name: str
    needs: Needs
    headline = "auroc"

    def __init__(self, config: Config) -> None:
        self._config = config
        self._vectors = Vectors()

    def identity(self) -> Mapping[str, Any]:
        """Return everything that changes its verdicts, but embedder and selection."""
        return {"version": self.version, "config": self._config.identity()}

    def requests(self, latent: LatentExamples, explanation: Explanation, resources: Resources, /) -> list[Request]:
        """Return no requests: nothing is asked of an LLM."""
        return []

    def _result(
        self,
        items: Sequence[Item],
        values: Iterable[float],
        latent: LatentExamples,
        explanation: Explanation,
        *,
        control: str | None,
        judge: str,
    ) -> ScoreResult:
        """Return the verdicts on `items`, ranked by `values`, and the scores."""
        verdicts = tuple(
            verdict_of(
                item,
                Answer(status="ok", value=float(value), prompt_idx=item.example_idx),
                scorer=self.name,
                latent=latent,
                explanation=explanation,
                control=control,
            )
            for item, value in zip(items, values, strict=True)
        )
        return ScoreResult(
            verdicts=verdicts, scores=ranked_scores(verdicts, latent=latent, explanation=explanation, judge=judge)
        )


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
