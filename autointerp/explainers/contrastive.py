"""The contrastive explainer: as the default one, but also shows windows in which the latent is silent.

They are of the explain pool, which a hash of document, latent and seed decides: none of them can be scored, however many
examples any scorer asks about. (delphi shows the head of the very list that its scorers use.) Of them those are shown that look
most like activating ones: that hold the tokens on which the latent fires elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field, model_validator

from autointerp.errors import ConfigError
from autointerp.examples.render import highlight
from autointerp.explainers.default import Default, DefaultConfig, Shown, numbered
from autointerp.explainers.tokens import count
from autointerp.protocols import Resources, Vocabulary
from autointerp.records import Examples, Explanation, LatentExamples

_NO_SILENT = "the explain pool has no silent windows"


class ContrastiveConfig(DefaultConfig):
    """How the contrastive explainer asks."""

    num_negatives: int = Field(default=10, ge=1)
    """Most silent windows that are shown."""

    @model_validator(mode="after")
    def _has_no_reasoning(self) -> ContrastiveConfig:
        if self.reasoning and self.prompt is None:
            raise ConfigError("the contrastive explainer has no prompt with reasoning; give one of your own as `prompt`")
        return self


class Contrastive(Default):
    """Asks an LLM for one sentence that tells activating windows from silent ones."""

    Config: ClassVar[type[DefaultConfig]] = ContrastiveConfig
    name = "contrastive"
    variables: ClassVar[frozenset[str]] = Default.variables | {"silent", "num_silent"}
    own_prompt: ClassVar[str] = "explain/contrastive"

    async def explain(self, latent: LatentExamples, resources: Resources, /) -> Sequence[Explanation]:
        """Return one row, ``not_applicable`` when the explain pool has no silent windows; else as the default explainer."""
        if not len(reserved(latent)):
            assert resources.engine is not None
            return [
                self._row(latent, resources.engine, None, Shown(windows=())).with_(status="not_applicable", reason=_NO_SILENT)
            ]
        return await super().explain(latent, resources)

    def _shown(self, latent: LatentExamples, vocabulary: Vocabulary) -> Shown:
        assert isinstance(self.config, ContrastiveConfig)
        silent = hardest(latent, self.config.num_negatives)
        unmarked = np.zeros(silent.tokens.shape[1], bool)
        texts = [highlight(vocabulary, silent.tokens[i, :length], unmarked[:length]) for i, length in enumerate(silent.lengths)]
        return Shown(windows=self._windows(latent, vocabulary), silent=texts)

    def _values(self, shown: Shown) -> dict[str, str]:
        return super()._values(shown) | {"silent": numbered(shown.silent), "num_silent": str(len(shown.silent))}


def reserved(latent: LatentExamples) -> Examples:
    """Return the silent windows that explainers may see: those of the explain pool, each once, by position."""
    statistics = latent.explain_statistics
    is_silent = [source != "positive" for source in statistics.sources]
    known = latent.explain_negatives.joined(statistics.take(np.flatnonzero(is_silent)))
    _, first = np.unique(known.positions, return_index=True)
    return known.take(first)


def hardest(latent: LatentExamples, num: int) -> Examples:
    """Return the `num` silent windows with most of what the latent fires on, hardest first.

    A window's hardness is the sum, over its distinct tokens, of the activation that the latent has on the token in the windows
    shown. Of equals the first position.
    """
    known = reserved(latent)
    counts = count(latent.explain)
    fires = {int(token): float(total) for token, total in zip(counts.ids, counts.total, strict=True) if total > 0}
    hardness = [
        sum(fires.get(token, 0.0) for token in np.unique(known.tokens[i, :length]).tolist())
        for i, length in enumerate(known.lengths)
    ]
    return known.take(np.argsort(-np.array(hardness), kind="stable")[:num])
