"""Detection and fuzzing as delphi's main branch asks them, so that numbers can be compared (EleutherAI/delphi, 3c2e139).

Its test windows are drawn without regard to what the explainer was shown: here from the explained windows, the rest of the
explain pool and the scored pool together, sorted by strength, an equal number from each block of equal rank, the remainder
dropped. With 40 windows explained and all pools full, about 8 of 50 scored windows were explained (10 to 20 in delphi itself),
so scores are higher than unseen text would give; rows say ``disjoint = none``. Fuzzing marks the same ``ceil(mean number of
active tokens)`` places in every silent window, among them number 24: counts and places that give negatives away. A window that
a neighbouring latent lent is marked where that latent fires. Prompts have
delphi's shape (three worked batches of five, five windows in a question) and this package's words; the metric is computed for
each latent and not pooled over latents, and failed replies have a status.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import numpy as np

from autointerp.digest import generator
from autointerp.examples.render import above
from autointerp.records import Examples, LatentExamples
from autointerp.scorers.detection import Detection
from autointerp.scorers.fuzzing import Fuzzing, FuzzingConfig
from autointerp.scorers.items import Item, item_of

QUANTILES = 10
CENTRE = 24
"""The place that delphi always marks, for it takes windows for centred."""


class DelphiDetection(Detection):
    """Detection on windows of which some were explained."""

    @property
    def name(self) -> str:
        return "delphi_detection"

    def judged(self, latent: LatentExamples, control: str | None, seed: int) -> LatentExamples:
        return overlapping(latent, seed)


class DelphiFuzzingConfig(FuzzingConfig):
    """How fuzzing asks; its marks are delphi's."""

    variant: Literal["default"] = "default"


class DelphiFuzzing(Fuzzing):
    """Fuzzing on windows of which some were explained, with delphi's marks."""

    Config = DelphiFuzzingConfig

    def __init__(self, config: DelphiFuzzingConfig | None = None) -> None:
        super().__init__(config or DelphiFuzzingConfig())

    @property
    def name(self) -> str:
        return "delphi_fuzzing"

    def judged(self, latent: LatentExamples, control: str | None, seed: int) -> LatentExamples:
        return overlapping(latent, seed)

    def items(self, latent: LatentExamples, seed: int) -> list[Item]:
        positives, negatives = latent.positives, latent.negatives
        masks = above(positives.activations, positives.lengths, ratio=self._threshold)
        num = len(positives)
        active = np.count_nonzero(positives.activations, axis=1)
        count = min(math.ceil(float(active.mean())) if num else 0, negatives.tokens.shape[1])
        # One draw for the latent: delphi seeds its generator anew for each window, so all get the same places.
        width = negatives.tokens.shape[1]
        random = generator("delphi", seed, latent.coder, latent.latent)
        order = [min(CENTRE, width - 1), *(place for place in random.permutation(width) if place != min(CENTRE, width - 1))]
        mask = np.zeros(width, bool)
        mask[order[:count]] = True
        own = above(negatives.activations, negatives.lengths, ratio=self._threshold)
        asked = [own[i] if own[i].any() else mask & (np.arange(width) < length) for i, length in enumerate(negatives.lengths)]
        return [
            *(item_of(positives, i, example_idx=i, truth=True, mask=masks[i]) for i in range(num)),
            *(
                item_of(negatives, i, example_idx=num + i, truth=False, mask=m, is_asked=bool(m.any()))
                for i, m in enumerate(asked)
            ),
        ]


def overlapping(latent: LatentExamples, seed: int) -> LatentExamples:
    """Return the latent with as many scored positives, drawn from all its known windows as delphi draws its test set."""
    statistics = latent.explain_statistics
    known = latent.explain.joined(statistics.take(np.flatnonzero(statistics.quantiles >= 0))).joined(latent.positives)
    _, first = np.unique(known.positions, return_index=True)
    known = known.take(np.sort(first))
    known = known.take(np.argsort(-np.abs(known.activations).max(axis=1, initial=0), kind="stable"))
    return replace(latent, positives=stratified(known, len(latent.positives), seed, latent), disjoint="none")


def stratified(ranked: Examples, count: int, seed: int, latent: LatentExamples) -> Examples:
    """Return `count` windows (less what does not divide), an equal number from each of 10 blocks of equal rank."""
    random = generator("delphi test", seed, latent.coder, latent.latent)
    blocks = max(min(QUANTILES, count), 1)
    size, each = len(ranked) // blocks, count // blocks
    rows: list[int] = []
    quantiles: list[int] = []
    for quantile in range(blocks):
        chosen = np.sort(random.choice(size, min(each, size), replace=False)) + quantile * size
        rows += chosen.tolist()
        quantiles += [quantile] * len(chosen)
    return replace(ranked.take(rows), quantiles=np.array(quantiles, np.int16))
