"""The activations-and-logits explainer: an LLM reads what the latent fires on, what follows, what it promotes, and contexts.

Neuronpedia's ``np_max-act-logits``, with a prompt of our own: the strongest token of each of the strongest windows, the token
after each, the tokens whose logits the latent's direction raises most, and the windows. The answer is a label of a few words.
All but the promoted tokens, which come from weights alone, is of the explain pool. (Where the model finds nothing, Neuronpedia
takes the top token for a label; that would be an explanation which nobody gave, so here the row is ``not_applicable``.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import Field, model_validator

from autointerp.errors import ConfigError
from autointerp.explainers.default import Default, DefaultConfig, Shown, quoted
from autointerp.protocols import Needs, Resources, Vocabulary
from autointerp.records import Examples, Explanation, LatentExamples

_NOTHING = frozenset({"unclear", "none", "unknown", "nothing", "n/a", "no pattern", "no clear pattern"})
"""Labels that say that there is none, in lower case without a full stop."""


class ActivationsLogitsConfig(DefaultConfig):
    """How the activations-and-logits explainer asks."""

    activations: bool = False
    """List the strength of highlighted tokens below each window."""
    num_windows: int = Field(default=10, ge=1)
    """Windows shown, the strongest of the explain pool."""
    num_promoted: int = Field(default=10, ge=1)
    """Promoted tokens shown."""
    max_chars: int = Field(default=200, ge=40)
    """Longest label; a longer one counts as unparseable."""

    @model_validator(mode="after")
    def _has_no_reasoning(self) -> ActivationsLogitsConfig:
        if self.reasoning and self.prompt is None:
            raise ConfigError("the explainer activations_logits has no prompt with reasoning; give one of your own as `prompt`")
        return self


@dataclass(frozen=True, kw_only=True)
class Lists(Shown):
    """What the prompt shows: windows and three lists, as text."""

    tokens: str
    following: str
    promoted: str


class ActivationsLogits(Default):
    """Asks an LLM for a label of a few words."""

    Config: ClassVar[type[DefaultConfig]] = ActivationsLogitsConfig
    name = "activations_logits"
    needs = Needs(engine=True, logits=True)
    variables: ClassVar[frozenset[str]] = Default.variables | {"tokens", "following", "promoted"}
    own_prompt: ClassVar[str] = "explain/activations_logits"

    async def _explained(self, latent: LatentExamples, shown: Shown, resources: Resources) -> Explanation:
        row = await super()._explained(latent, shown, resources)
        if row.text is not None and row.text.casefold().strip(" .\"'") in _NOTHING:
            return row.with_(status="not_applicable", text=None, reason="the model found nothing that the lists share")
        return row

    def _shown(self, latent: LatentExamples, vocabulary: Vocabulary) -> Shown:
        assert isinstance(self.config, ActivationsLogitsConfig)
        if latent.promoted is None:
            raise ConfigError(
                "the explainer activations_logits needs the tokens that the latent promotes; make the store's table of them "
                "with `autointerp tables STORE --subject MODEL`"
            )
        examples = strongest(latent, self.config.num_windows)
        tokens, following = peaks(examples, vocabulary)
        return Lists(
            windows=self._windows_of(examples, latent.max_activation, vocabulary),
            tokens=_listed(tokens),
            following=_listed(following),
            promoted=_listed(promoted_pieces(latent.promoted, vocabulary)[: self.config.num_promoted]),
        )

    def _values(self, shown: Shown) -> dict[str, str]:
        assert isinstance(shown, Lists)
        lists = {"tokens": shown.tokens, "following": shown.following, "promoted": shown.promoted}
        return super()._values(shown) | lists


def strongest(latent: LatentExamples, num: int) -> Examples:
    """Return the `num` strongest activating windows known of the explain pool; of equals the first position."""
    statistics = latent.explain_statistics
    is_active = [source == "positive" for source in statistics.sources]
    known = latent.explain.joined(statistics.take(np.flatnonzero(is_active)))
    _, first = np.unique(known.positions, return_index=True)
    known = known.take(first)
    strength = np.abs(known.activations).max(axis=1, initial=0)
    return known.take(np.argsort(-strength, kind="stable")[:num])


def peaks(examples: Examples, vocabulary: Vocabulary) -> tuple[list[str], list[str]]:
    """Return the text of each window's strongest token, and of the token after it, where the window goes on.

    A character split over tokens is one text, so that no half of it is shown.
    """
    tokens, following = [], []
    for i, length in enumerate(examples.lengths):
        pieces = vocabulary.pieces(examples.tokens[i, :length])
        at = int(np.argmax(np.abs(examples.activations[i, :length])))
        whole = [piece for piece in pieces[at:] if piece]
        tokens += whole[:1]
        following += whole[1:2]
    return tokens, following


def promoted_pieces(ids: Sequence[int], vocabulary: Vocabulary) -> list[str]:
    """Return the text of promoted tokens, each once, in order; special tokens and parts of characters are left out."""
    usable = np.array(ids, np.int64)
    usable = usable[~vocabulary.is_special(usable)]
    texts = (vocabulary.text(usable[i : i + 1]) for i in range(len(usable)))
    return list(dict.fromkeys(text for text in texts if text and "\ufffd" not in text))


def _listed(texts: Sequence[str]) -> str:
    """Return the distinct texts in order, with how often each occurs where that is more than once."""
    counts = Counter(texts)
    return ", ".join(quoted(text) + (f" ({num} times)" if num > 1 else "") for text, num in counts.items()) or "(none)"
