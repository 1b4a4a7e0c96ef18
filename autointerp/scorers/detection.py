"""Detection: is the latent active anywhere in this window, given the explanation? (arXiv 2410.13928, section 3.3.1)."""

from __future__ import annotations

from autointerp.examples.render import plain
from autointerp.protocols import Vocabulary
from autointerp.records import LatentExamples
from autointerp.scorers.classify import Classifier, ClassifierConfig
from autointerp.scorers.items import Item, items_of


class DetectionConfig(ClassifierConfig):
    """How detection asks."""


class Detection(Classifier):
    """Asks about plain windows."""

    Config = DetectionConfig
    prompts = ("score/detection", "score/detection-label")

    def __init__(self, config: DetectionConfig | None = None) -> None:
        super().__init__(config or DetectionConfig())

    @property
    def name(self) -> str:
        return "detection"

    def items(self, latent: LatentExamples, seed: int) -> list[Item]:
        return items_of(latent.positives, latent.negatives)

    def render(self, item: Item, vocabulary: Vocabulary) -> str:
        return plain(vocabulary, item.tokens)
