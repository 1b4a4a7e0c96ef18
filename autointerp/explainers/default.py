"""The default explainer: an LLM reads highlighted contexts and answers with one sentence (arXiv 2410.13928, section 3.2).

Each window has its tokens above 0.3 of its own maximum between ``<<`` and ``>>``, and below it the strength of the first ten of
them as integers from 0 to 10 (scale: the latent's maximum over the explain pool). The threshold is relative, so that even a
weak window shows something; the integers tell which are weak. A prompt that does not fit the engine loses its weakest windows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from autointerp.config import RUNTIME, Config
from autointerp.errors import ContextExceeded, EngineStopped, LLMError
from autointerp.examples.render import above, highlight, integers, neutralise
from autointerp.explainers.parse import read_explanation
from autointerp.prompts import load_prompt
from autointerp.protocols import Engine, Needs, Resources, Vocabulary
from autointerp.records import Chat, Examples, Explanation, LatentExamples, Reply, Request, Status
from autointerp.scorers.ask import Outcome, ask

_VERSION = 1
"""Part of the identity: raise it when the same settings come to ask otherwise."""

_MESSAGE_TOKENS = 8
"""Tokens that a chat template adds around a message, at most."""


class DefaultConfig(Config):
    """How the default explainer asks."""

    threshold: float = Field(default=0.3, ge=0, lt=1)
    """Tokens above this share of their window's greatest activation are highlighted."""
    activations: bool = True
    """List the strength of highlighted tokens below each window."""
    max_listed: int = Field(default=10, ge=1)
    """Most tokens whose strength is listed for a window."""
    reasoning: bool = False
    """Ask for reasoning before the answer."""
    prompt: str | None = Field(default=None, json_schema_extra=RUNTIME)
    """Name or path of the prompt, None for the explainer's own; not identity, since the digest of its content is."""
    temperature: float = Field(default=0.0, ge=0)
    """0 for the likeliest answer."""
    max_tokens: int | None = Field(default=None, ge=16)
    """Longest reply, None for 200, or 1000 with reasoning; give more to a model that thinks first."""
    max_chars: int = Field(default=1000, ge=40)
    """Longest explanation; a longer one counts as unparseable."""
    min_windows: int = Field(default=5, ge=1)
    """A latent of whose windows fewer fit the engine's context is `too_long`."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a prompt shows of a latent, as text."""

    windows: Sequence[str]
    """Activating windows, strongest first."""
    silent: Sequence[str] = ()
    """Windows in which the latent is silent; none but in the contrastive explainer."""

    def first(self, num: int) -> Shown:
        """Return the same with the `num` strongest windows only."""
        return replace(self, windows=self.windows[:num])


class Default:
    """Asks an LLM for one sentence."""

    Config: ClassVar[type[DefaultConfig]] = DefaultConfig
    name = "default"
    needs = Needs(engine=True)
    variables: ClassVar[frozenset[str]] = frozenset({"windows", "count"})
    """What its prompts may use."""
    own_prompt: ClassVar[str] = "explain/default"

    def __init__(self, config: DefaultConfig | None = None) -> None:
        """Load the prompt.

        Raises: ConfigError when it cannot be used.
        """
        self.config = config or self.Config()
        name = self.config.prompt or ("explain/reasoning" if self.config.reasoning else self.own_prompt)
        self._prompt = load_prompt(name).require("marked_line", self.variables)
        self._max_tokens = self.config.max_tokens or (1000 if self.config.reasoning else 200)
        file = self._prompt.file
        self._own_texts = (
            file.system,
            file.reminder,
            *(turn.assistant.rpartition(file.marker or "")[2] for turn in file.turns),
        )

    @property
    def prompt_id(self) -> str:
        """Digest of the prompt."""
        return self._prompt.prompt_id

    def identity(self) -> Mapping[str, Any]:
        """Return everything that changes what it writes, but engine and selection."""
        return {"version": _VERSION, "config": self.config.identity(), "prompt": self.prompt_id}

    def requests(self, latent: LatentExamples, resources: Resources, /) -> list[Request]:
        """Return the request that :meth:`explain` would send first if all windows fit, without sending it."""
        return [self._request(self._shown(latent, resources.vocabulary))]

    async def explain(self, latent: LatentExamples, resources: Resources, /) -> Sequence[Explanation]:
        """Return one row; see :class:`autointerp.protocols.Explainer`."""
        return [await self._explained(latent, self._shown(latent, resources.vocabulary), resources)]

    async def _explained(self, latent: LatentExamples, shown: Shown, resources: Resources) -> Explanation:
        """Return the row of what is said of `shown`, or of as many of its windows as fit."""
        engine = resources.engine
        assert engine is not None
        num = await self._num_that_fit(shown, engine)
        outcome: Outcome[str] | None = None
        while num >= min(self.config.min_windows, len(shown.windows)) and outcome is None:
            try:
                outcome = await self._ask(shown.first(num), engine)
            except ContextExceeded:
                num = min(num - 1, num * 3 // 4)
        return self._row(latent, engine, outcome, shown.first(num))

    async def _ask(self, shown: Shown, engine: Engine) -> Outcome[str]:
        marker = self._prompt.file.marker
        assert marker is not None

        def read(reply: Reply) -> str:
            return read_explanation(reply, marker=marker, max_chars=self.config.max_chars, not_these=self._own_texts)

        def remind(chat: Chat, reply: str) -> Chat:
            return self._prompt.again(chat, reply, **self._values(shown))

        return await ask(engine, self._request(shown), read, remind)

    def _row(self, latent: LatentExamples, engine: Engine, outcome: Outcome[str] | None, shown: Shown) -> Explanation:
        status: Status = outcome.status if outcome is not None else "too_long"
        return Explanation(
            coder=latent.coder,
            latent=latent.latent,
            explainer=self.name,
            explainer_id="",
            selection_id=latent.selection_id,
            status=status,
            text=outcome.value if outcome is not None else None,
            model=engine.id.model,
            prompt_id=self.prompt_id,
            num_examples=len(shown.windows) if outcome is not None else 0,
            num_negatives=len(shown.silent) if outcome is not None else 0,
            num_attempts=outcome.num_attempts if outcome is not None else 0,
            prompt_tokens=outcome.usage.prompt_tokens if outcome is not None else 0,
            output_tokens=outcome.usage.output_tokens if outcome is not None else 0,
        )

    def _values(self, shown: Shown) -> dict[str, str]:
        """Return a value for each of `variables`."""
        return {"windows": numbered(shown.windows), "count": str(len(shown.windows))}

    def _request(self, shown: Shown) -> Request:
        chat = self._prompt.chat(**self._values(shown))
        return Request(prompt=chat, max_tokens=self._max_tokens, temperature=self.config.temperature)

    def _shown(self, latent: LatentExamples, vocabulary: Vocabulary) -> Shown:
        return Shown(windows=self._windows(latent, vocabulary))

    def _windows(self, latent: LatentExamples, vocabulary: Vocabulary) -> list[str]:
        """Return each window as text, strongest first."""
        return self._windows_of(latent.explain, latent.max_activation, vocabulary)

    def _windows_of(self, examples: Examples, maximum: float, vocabulary: Vocabulary) -> list[str]:
        masks = above(examples.activations, examples.lengths, ratio=self.config.threshold)
        strength = integers(examples.activations, maximum)
        texts = []
        for i, length in enumerate(examples.lengths):
            tokens, mask = examples.tokens[i, :length], masks[i, :length]
            text = highlight(vocabulary, tokens, mask)
            if self.config.activations:
                text += "\nstrength: " + self._listed(vocabulary, tokens, mask, strength[i, :length])
            texts.append(text)
        return texts

    def _listed(self, vocabulary: Vocabulary, tokens: np.ndarray, mask: np.ndarray, strength: np.ndarray) -> str:
        pieces = vocabulary.pieces(tokens)
        named = [f"{quoted(pieces[t])}: {strength[t]}" for t in np.flatnonzero(mask) if pieces[t]]
        return ", ".join(named[: self.config.max_listed])

    async def _num_that_fit(self, shown: Shown, engine: Engine) -> int:
        """Return how many windows, strongest first, fit the engine's context; all where it does not say."""
        limit = engine.context_tokens
        if limit is None:
            return len(shown.windows)
        num = len(shown.windows)
        while num:
            used = await self._num_tokens(shown.first(num), engine, limit)
            if used <= limit:
                break
            # Windows are of about one length; one more goes each time, so that this ends.
            fixed = await self._num_tokens(shown.first(0), engine, limit)
            share = max(limit - fixed, 0) / max(used - fixed, 1)
            num = min(num - 1, int(num * share))
        return num

    async def _num_tokens(self, shown: Shown, engine: Engine, limit: int) -> int:
        """Return the tokens of prompt and reply, or an upper bound where that is enough to know that they fit."""
        prompt = self._request(shown).prompt
        assert isinstance(prompt, Chat)
        extra = self._max_tokens + _MESSAGE_TOKENS * (len(prompt.messages) + 1)
        text = "\n".join(content for _, content in prompt.messages)
        num_bytes = len(text.encode())
        if num_bytes + extra <= limit or not engine.capabilities.tokenize:
            return extra + (num_bytes if num_bytes + extra <= limit else num_bytes // 3)
        try:
            return extra + len(await engine.tokenize(text))
        except EngineStopped:
            raise
        except LLMError:
            # Only a count: the request itself will say whether the prompt is too long.
            return extra + num_bytes // 3


def numbered(windows: Sequence[str]) -> str:
    """Return windows as the numbered excerpts of a prompt."""
    return "\n".join(f"Excerpt {i}: {window}" for i, window in enumerate(windows, start=1))


def quoted(piece: str) -> str:
    """Return a token's text between quotation marks, neutralised."""
    text = neutralise(piece)
    return f"'{text}'" if '"' in text else f'"{text}"'
