"""The best-of-n explainer: several draws of one explainer, judged on the validate pool; the best stands.

As in Transluce's and Bills et al.'s descriptions (many samples, the best by simulator score on held-out examples), with a cheap
scorer. Draws are one prompt at a temperature above 0. Ties go to the lowest draw. What scores are reported on is never read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from autointerp.explainers import REGISTRY
from autointerp.explainers.judging import Judged, JudgedConfig, judge_name, rejected, three_digits
from autointerp.protocols import Resources
from autointerp.records import Explanation, LatentExamples, Request
from autointerp.scorers.ask import gather

_VERSION = 1
"""Part of the identity: raise it when the same settings come to ask or to choose otherwise."""


class BestOfConfig(JudgedConfig):
    """How many candidates, and how they are judged."""

    num_samples: int = Field(default=5, ge=2, le=1000)
    """Draws of each latent."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the draws; at 0 all would be the same."""


class BestOf:
    """Chooses between draws of one explainer."""

    Config = BestOfConfig
    name = "best_of"
    argument = "num_samples"

    def __init__(self, config: BestOfConfig | None = None) -> None:
        """Build explainer and scorer.

        Raises: ConfigError when one cannot be used here.
        """
        self.config = config or BestOfConfig()
        self._judged = Judged(self.config, REGISTRY, temperature=self.config.temperature)
        self.needs = self._judged.needs

    def identity(self) -> Mapping[str, Any]:
        """Return everything that changes what it writes, but engines and selection."""
        return {"version": _VERSION, **self._judged.identity()}

    def requests(self, latent: LatentExamples, resources: Resources, /) -> list[Request]:
        """Return the most that :meth:`explain` would send at first asking: fewer where draws say the same."""
        num = 1 if self._judged.too_few(latent) else self.config.num_samples
        written = [r for sample in range(num) for r in self._judged.written_requests(latent, resources, sample=sample)]
        return written + (num > 1) * num * self._judged.validated_requests(latent, resources)

    async def explain(self, latent: LatentExamples, resources: Resources, /) -> Sequence[Explanation]:
        """Return one row per draw; at most one is ``ok``, the best. See :class:`autointerp.protocols.Explainer`."""
        too_few = self._judged.too_few(latent)
        if too_few is not None:
            row = await self._judged.write(latent, resources)
            return [row.with_(reason=too_few) if row.status == "ok" else row]
        rows = await gather([self._judged.write(latent, resources, sample=k) for k in range(self.config.num_samples)])
        if not any(row.num_attempts for row in rows):
            return rows[:1]  # nothing was asked, so that every draw says the same
        texts = list(dict.fromkeys(row.text for row in rows if row.text is not None))
        if not texts:
            return rows
        found = await gather([self._judged.validate(latent, text, resources) for text in texts])
        scores = dict(zip(texts, found, strict=True))
        usable = [row for row in rows if row.text is not None]
        # Of equals the first: max() keeps it. Without any score the first draw stands, since nothing speaks for another.
        best = max(usable, key=lambda row: -1e9 if (value := scores[row.text or ""]) is None else value)
        judge = judge_name(self._judged, resources)
        top = scores[best.text or ""]
        chosen = best.with_(
            validate_score=top,
            judge=judge if top is not None else None,
            reason=None if top is not None else "not chosen: no candidate got enough answers of the judge that can be read",
        )
        return [chosen if row is best else self._loser(row, best, scores, judge) for row in rows]

    def _loser(self, row: Explanation, best: Explanation, scores: Mapping[str, float | None], judge: str) -> Explanation:
        if row.text is None:
            return rejected(row, f"no candidate: its reply is {row.status}; sample {best.sample} stands")
        value, top = scores[row.text], scores[best.text or ""]
        why = f"not chosen: {three_digits(value)} on the validate pool, sample {best.sample} has {three_digits(top)}"
        return rejected(row, why, validate_score=value, judge=judge)
