"""The protocol of SAEBench's AutoInterp, so that numbers can be compared (arXiv 2503.09532; methods of its released code).

One prompt with 14 windows of at most 21 tokens about their strongest token, unmarked: 2 of the strongest, 2 drawn in proportion
to the squared activation among weaker ones, 10 silent ones. The judge lists those that fit the explanation, or none. The score
is plain accuracy over the 14: answering none gives 10/14 = 0.714, so the useful range is 0.71 to 1.

Where it differs on purpose: windows are cut from the scored pool, so that none was explained; they never reach beyond a window
of the selection; silent ones are known to be silent; and the worked examples do not say how many fit. An empty reply is no
answer, where SAEBench takes it for none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from pydantic import Field

from autointerp.digest import generator
from autointerp.examples.render import neutralise, plain
from autointerp.prompts import load_prompt
from autointerp.protocols import Needs, Resources
from autointerp.records import Examples, Explanation, LatentExamples, Score, Verdict
from autointerp.scorers.items import Answer, Item, items_of
from autointerp.scorers.metrics import not_applicable, scores_of
from autointerp.scorers.parse import read_numbers
from autointerp.scorers.prompted import Question, seeded_order
from autointerp.scorers.rule_judge import RuleJudged, RuleJudgedConfig

NUM_TOP, NUM_WEIGHTED, NUM_SILENT = 2, 2, 10


class SAEBenchConfig(RuleJudgedConfig):
    """How windows are cut."""

    buffer: int = Field(default=10, ge=1)
    """Tokens on either side of the strongest one."""


class SAEBench(RuleJudged):
    """Asks which of 14 windows fit the explanation."""

    Config = SAEBenchConfig
    name = "saebench"
    headline = "accuracy"
    config: SAEBenchConfig

    def __init__(self, config: SAEBenchConfig | None = None) -> None:
        """Load the prompt.

        Raises: ConfigError when it cannot be used.
        """
        self.config = config or SAEBenchConfig()
        self.needs = Needs(engine=self.config.judge == "engine")
        if self.needs.engine:
            prompt = load_prompt(self.config.prompt or "score/saebench")
            self._prompt = prompt.require("numbers", frozenset({"explanation", "examples", "count"}))

    def sources(self, wanted: tuple[str, ...]) -> tuple[str, ...]:
        """Return the first source of negatives: the protocol has one."""
        return wanted[:1]

    def judged(self, latent: LatentExamples, control: str | None, seed: int) -> LatentExamples:
        """Return the latent with the windows that are asked about in place of all; with none where there are too few."""
        random = generator("saebench", seed, latent.coder, latent.latent)
        positives, negatives = latent.positives, latent.negatives
        wanted = self.sources(latent.negative_sources or negatives.sources)
        silent = np.array([i for i, source in enumerate(negatives.sources) if source in wanted], np.int64)
        peaks = np.abs(positives.activations).max(axis=1, initial=0)
        strongest = np.flatnonzero(positives.quantiles == positives.quantiles.min(initial=0))
        if len(strongest) < NUM_TOP or len(positives) < NUM_TOP + NUM_WEIGHTED or len(silent) < NUM_SILENT:
            nothing = Examples.empty(positives.tokens.shape[1])
            return replace(latent, positives=nothing, negatives=nothing)
        top = random.choice(strongest, NUM_TOP, replace=False)
        weaker = np.flatnonzero(peaks < peaks[strongest].min())
        if len(weaker) < NUM_WEIGHTED:
            weaker = np.setdiff1d(np.arange(len(positives)), top)
        weights = np.square(peaks[weaker].astype(np.float64))
        weighted = random.choice(weaker, NUM_WEIGHTED, replace=False, p=weights / weights.sum())
        chosen = random.choice(silent, NUM_SILENT, replace=False)
        return replace(
            latent,
            positives=_about_peak(positives.take([*top, *weighted]), self.config.buffer),
            negatives=_about_peak(negatives.take(chosen), self.config.buffer, random),
        )

    def items(self, latent: LatentExamples, seed: int) -> list[Item]:
        return items_of(latent.positives, latent.negatives)

    def batches(self, items: Sequence[Item], latent: LatentExamples, seed: int) -> list[list[Item]]:
        return [[items[i] for i in seeded_order(self.name, latent, seed, len(items))]] if items else []

    def question(self, batch: Sequence[Item], explanation: Explanation, resources: Resources) -> Question:
        num = len(batch)
        lines = (f"Text {i}: {plain(resources.vocabulary, item.tokens)}" for i, item in enumerate(batch, start=1))

        def read(text: str) -> list[Answer]:
            fitting = read_numbers(text, num)
            return [Answer(status="ok", answer=i in fitting) for i in range(1, num + 1)]

        values = {"explanation": neutralise(explanation.text or ""), "examples": "\n".join(lines), "count": str(num)}
        return self.chat_question(values, read, resources, max_tokens=4 * num)

    def scores(
        self, verdicts: Sequence[Verdict], latent: LatentExamples, explanation: Explanation, judge: str
    ) -> tuple[Score, ...]:
        if not verdicts:
            reason = "too few windows to make a prompt of"
            return not_applicable(latent, explanation, judge=judge, headline=self.headline, reason=reason)
        return scores_of(verdicts, latent=latent, explanation=explanation, judge=judge, headline=self.headline)


def _about_peak(examples: Examples, buffer: int, random: np.random.Generator | None = None) -> Examples:
    """Return each window cut to `buffer` tokens on either side of its strongest token, or of a random one.

    A cut that would reach beyond its window is moved inside it.
    """
    width = min(2 * buffer + 1, examples.tokens.shape[1])
    tokens = np.zeros((len(examples), width), np.uint32)
    activations = np.zeros((len(examples), width), np.float32)
    starts, lengths = np.zeros(len(examples), np.int64), np.zeros(len(examples), np.int32)
    for i, length in enumerate(examples.lengths.tolist()):
        peak = int(random.integers(length)) if random is not None else int(np.abs(examples.activations[i, :length]).argmax())
        starts[i] = min(max(peak - buffer, 0), max(length - width, 0))
        lengths[i] = min(width, length)
        cut = slice(starts[i], starts[i] + lengths[i])
        tokens[i, : lengths[i]], activations[i, : lengths[i]] = examples.tokens[i, cut], examples.activations[i, cut]
    return replace(examples, tokens=tokens, activations=activations, lengths=lengths, positions=examples.positions + starts)
