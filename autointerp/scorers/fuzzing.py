"""Fuzzing: are the highlighted tokens those that the explanation means? (arXiv 2410.13928, section 3.3.2).

Positives highlight the tokens above `threshold` of their window's maximum. Negatives, by variant:

- ``default``: silent windows, each highlighted exactly where some positive is: number of tokens, lengths of runs and positions
  have the distribution of the positives' by construction, and nothing but the text tells them apart. Every positive lends its
  pattern once before any lends it again. A window that a neighbouring latent gave is highlighted where that latent fires,
  unless that is everywhere: telling two latents apart is what such a negative is for.
- ``active``: the positives' own windows with inactive tokens highlighted, as many as are highlighted in the positive and in the
  pattern of another positive where one fits; knowing that the latent is active does not help. The two versions of a text never
  share a prompt. A window without enough inactive tokens has no negative: its verdict is ``not_applicable``.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from autointerp.digest import generator
from autointerp.examples.render import highlight
from autointerp.protocols import Vocabulary
from autointerp.records import Examples, LatentExamples
from autointerp.scorers.classify import Classifier, ClassifierConfig
from autointerp.scorers.highlights import lent_masks, own_masks
from autointerp.scorers.items import Item, item_of


class FuzzingConfig(ClassifierConfig):
    """How fuzzing asks."""

    variant: Literal["default", "active"] = "default"
    """What the negatives are: silent windows, or activating windows with inactive tokens highlighted."""
    threshold: float = Field(default=0.3, ge=0, lt=1)
    """Tokens above this share of their window's greatest activation are highlighted."""


class Fuzzing(Classifier):
    """Asks about highlighted windows."""

    Config: type[FuzzingConfig] = FuzzingConfig
    prompts = ("score/fuzzing", "score/fuzzing-label")

    def __init__(self, config: FuzzingConfig | None = None) -> None:
        super().__init__(config or FuzzingConfig())
        self._variant, self._threshold = (config or FuzzingConfig()).variant, (config or FuzzingConfig()).threshold

    @property
    def name(self) -> str:
        return "fuzzing" if self._variant == "default" else "fuzzing_active"

    def sources(self, wanted: tuple[str, ...]) -> tuple[str, ...]:
        """Return the selection's sources of negatives, or the one of those that it makes itself."""
        return ("shuffled_highlight",) if self._variant == "active" else wanted

    def items(self, latent: LatentExamples, seed: int) -> list[Item]:
        masks = own_masks(latent.positives, self._threshold)
        num = len(latent.positives)
        positives = [item_of(latent.positives, i, example_idx=i, truth=True, mask=masks[i]) for i in range(num)]
        random = generator("highlights", self._variant, seed, latent.coder, latent.latent)
        if self._variant == "active":
            return [*positives, *_moved(latent.positives, masks, random)]
        lent = lent_masks(latent.negatives, masks, random, threshold=self._threshold)
        return [
            *positives,
            *(
                item_of(latent.negatives, i, example_idx=num + i, truth=False, mask=mask, is_asked=bool(mask.any()))
                for i, mask in enumerate(lent)
            ),
        ]

    def render(self, item: Item, vocabulary: Vocabulary) -> str:
        assert item.mask is not None
        return highlight(vocabulary, item.tokens, item.mask)


def _moved(positives: Examples, masks: np.ndarray, random: np.random.Generator) -> list[Item]:
    """Return each positive again with as many of its inactive tokens highlighted."""
    items = []
    counts = masks.sum(axis=1)
    for i in range(len(positives)):
        inactive = (positives.activations[i] == 0) & (np.arange(masks.shape[1]) < positives.lengths[i])
        fits = np.flatnonzero((counts == counts[i]) & ~(masks & ~inactive).any(axis=1))
        if len(fits):
            mask = masks[random.choice(fits)]
        else:
            mask = np.zeros_like(inactive)
            places = np.flatnonzero(inactive)
            if len(places) >= counts[i]:
                mask[random.choice(places, counts[i], replace=False)] = True
        items.append(
            item_of(
                positives,
                i,
                example_idx=len(positives) + i,
                truth=False,
                source="shuffled_highlight",
                mask=mask,
                is_asked=bool(mask.any()),
            )
        )
    return items
