"""Surprisal: does the explanation make activating windows likelier than silent ones? (arXiv 2410.13928).

The information value of explanation z on window x is log p(x | z) - log p(x | z0), summed over the window's tokens, with z0 a
description that says nothing; the score is its AUROC. The prompt shows descriptions with texts that fit them, then z, then the
window. Meant for a base model: nothing is written, and an instruction-tuned one is a poor model of text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field

from autointerp.errors import EngineStopped, LLMError, ReplyError
from autointerp.examples.render import neutralise, plain
from autointerp.prompts import load_prompt
from autointerp.protocols import Engine, Needs, Resources
from autointerp.records import Explanation, LatentExamples, Reply, Request, Score, Text, Verdict
from autointerp.scorers.ask import Outcome, gather, try_to_ask
from autointerp.scorers.items import Answer, Item, items_of
from autointerp.scorers.metrics import ranked_scores
from autointerp.scorers.prompted import Prompted, PromptedConfig
from autointerp.scorers.tokens import Pieces, scored_prompt, shown_tokens


class SurprisalConfig(PromptedConfig):
    """How surprisal asks."""

    generic: str = Field(default="Texts that have nothing to do with each other.", min_length=1)
    """z0, the description that says nothing."""


class Surprisal(Prompted):
    """Compares the log-probability of each window under the explanation and under one that says nothing."""

    Config = SurprisalConfig
    name = "surprisal"
    needs = Needs(engine=True, prompt_logprobs=True)
    headline = "auroc"
    config: SurprisalConfig

    def __init__(self, config: SurprisalConfig | None = None) -> None:
        """Load the prompt.

        Raises: ConfigError when it cannot be used.
        """
        self.config = config or SurprisalConfig()
        self._prompt = load_prompt(self.config.prompt or "score/surprisal").require("none", frozenset({"explanation"}))
        self._pieces = Pieces()

    def items(self, latent: LatentExamples, seed: int) -> list[Item]:
        return items_of(latent.positives, latent.negatives)

    def planned(self, batch: Sequence[Item], explanation: Explanation, resources: Resources) -> list[Request]:
        window = _window(batch[0], resources)
        return [Request(prompt=Text(text=self._before(t) + window), max_tokens=0) for t in self._texts(explanation)]

    async def ask_batch(self, batch: Sequence[Item], explanation: Explanation, resources: Resources) -> list[Answer]:
        [item] = batch
        engine = resources.engine
        assert engine is not None
        try:
            asked = await gather([self._log_probability(engine, t, item, resources) for t in self._texts(explanation)])
        except EngineStopped:
            raise
        except (LLMError, ReplyError):
            return [Answer(status="no_reply")]
        request_ids = tuple(request_id for outcome in asked for request_id in outcome.request_ids)
        with_z, without = (outcome.value for outcome in asked)
        if with_z is None or without is None:
            status = next(outcome.status for outcome in asked if outcome.value is None)
            return [Answer(status=status, request_ids=request_ids)]
        return [Answer(status="ok", value=with_z - without, request_ids=request_ids)]

    async def _log_probability(self, engine: Engine, text: str, item: Item, resources: Resources) -> Outcome[float]:
        """Return log p(window | description), in nats."""
        before, window = self._before(text), _window(item, resources)
        ids = (await self._pieces.ids(engine, [before]))[before]
        # A window is seldom asked about again: it would only fill the memory of pieces.
        prefix = (*await self._pieces.opening(engine), *ids)
        request = scored_prompt([*prefix, *await engine.tokenize(window)], start=len(prefix))

        def read(reply: Reply) -> float:
            logprobs = [token.logprob for token in shown_tokens(request, reply)]
            known = [logprob for logprob in logprobs if logprob is not None and logprob <= 1e-3]
            if not logprobs or len(known) < len(logprobs):
                raise ReplyError(
                    f"{len(logprobs) - len(known)} of {len(logprobs)} tokens of the window have no log-probability"
                )
            return math.fsum(known)

        return await try_to_ask(engine, request, read)

    def _texts(self, explanation: Explanation) -> tuple[str, str]:
        return neutralise(explanation.text or ""), self.config.generic

    def _before(self, description: str) -> str:
        assert self._prompt is not None
        file = self._prompt.file
        blocks = [file.system, *(f"{turn.user}\n{turn.assistant}" for turn in file.turns)]
        question = self._prompt.chat(explanation=description).messages[-1][1]
        return "\n\n".join([*blocks, question + "\n"])

    def scores(
        self, verdicts: Sequence[Verdict], latent: LatentExamples, explanation: Explanation, judge: str
    ) -> tuple[Score, ...]:
        return ranked_scores(verdicts, latent=latent, explanation=explanation, judge=judge)


def _window(item: Item, resources: Resources) -> str:
    return plain(resources.vocabulary, item.tokens, markers=(), one_line=False)
