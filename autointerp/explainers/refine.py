"""The refining explainer: an explanation, the windows it is wrong about, a better one; kept only if it validates better.

Three sets of windows that share none, as methods that revise need them: what is shown and where mistakes are looked for are of
the explain pool (mistakes first in windows that no prompt showed), whether a revision is kept is decided on the validate pool,
and scores are reported on the score pool, which is never read here. (delphi's branch ``iterative_explainer`` has its test for
improvement commented out, calls accuracy F1, and takes every silent example with an activation for a positive. Here the
acceptance is strict, the score is the scorer's own, and what is a mistake goes by the verdict's truth.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from autointerp.config import RUNTIME
from autointerp.digest import generator
from autointerp.errors import ConfigError
from autointerp.examples.render import above, highlight, neutralise
from autointerp.explainers import REGISTRY
from autointerp.explainers.contrastive import reserved
from autointerp.explainers.default import Default, DefaultConfig, Shown, numbered
from autointerp.explainers.judging import STAND_IN, Drawn, Judged, JudgedConfig, judge_name, rejected, three_digits, unscored
from autointerp.protocols import Resources, Vocabulary
from autointerp.records import Examples, Explanation, LatentExamples, Request, ScoreResult
from autointerp.scorers.classify import Classifier

_VERSION = 1
"""Part of the identity: raise it when the same settings come to ask or to choose otherwise."""


class RefineConfig(JudgedConfig):
    """How explanations are revised and judged."""

    rounds: int = Field(default=3, ge=1, le=100)
    """Most revisions of each latent."""
    num_revise: int = Field(default=20, ge=1)
    """Most activating, and most silent, windows of the explain pool in which mistakes are looked for."""
    max_mistakes: int = Field(default=10, ge=1)
    """Most mistakes of either kind that a revision is shown."""
    temperature: float = Field(default=0.0, ge=0)
    """Of the revisions; the first explanation has the base's own."""
    max_tokens: int = Field(default=200, ge=16)
    """Longest reply of a revision; give more to a model that thinks first."""
    prompt: str | None = Field(default=None, json_schema_extra=RUNTIME)
    """Name or path of the revision's prompt, None for its own; not identity, since the digest of its content is."""


@dataclass(frozen=True, kw_only=True)
class Mistakes:
    """Windows of the explain pool that a judge got wrong by an explanation."""

    missed: Examples
    """Activating windows that it took for silent."""
    wrong: Examples
    """Silent windows that it took for activating."""

    def __len__(self) -> int:
        return len(self.missed) + len(self.wrong)


@dataclass(frozen=True, kw_only=True)
class Revision(Shown):
    """What a revision's prompt shows, as text."""

    explanation: str
    missed: Sequence[str]
    wrong: Sequence[str]
    tried: Sequence[str]


class Reviser(Default):
    """Asks for a better explanation; the explainer's own way of asking, with another prompt."""

    name = "refine"
    variables: ClassVar[frozenset[str]] = Default.variables | {"explanation", "missed", "wrong", "tried"}
    own_prompt: ClassVar[str] = "explain/refine"

    def revision(
        self, latent: LatentExamples, text: str, mistakes: Mistakes, tried: Sequence[str], vocabulary: Vocabulary
    ) -> Revision:
        """Return what is shown to revise `text`."""
        missed, wrong = mistakes.missed, mistakes.wrong
        masks = above(missed.activations, missed.lengths, ratio=self.config.threshold)
        silent = np.zeros(wrong.tokens.shape[1], bool)
        return Revision(
            windows=self._windows(latent, vocabulary),
            explanation=neutralise(text),
            missed=[highlight(vocabulary, missed.tokens[i, :n], masks[i, :n]) for i, n in enumerate(missed.lengths)],
            wrong=[highlight(vocabulary, wrong.tokens[i, :n], silent[:n]) for i, n in enumerate(wrong.lengths)],
            tried=[neutralise(other) for other in tried],
        )

    async def revise(self, latent: LatentExamples, shown: Revision, resources: Resources) -> Explanation:
        """Return the row of one revision."""
        return await self._explained(latent, shown, resources)

    def revision_request(self, shown: Revision) -> Request:
        """Return the request of :meth:`revise`, without sending it."""
        return self._request(shown)

    def _values(self, shown: Shown) -> dict[str, str]:
        assert isinstance(shown, Revision)
        return super()._values(shown) | {
            "explanation": shown.explanation,
            "missed": numbered(shown.missed) or "(none)",
            "wrong": numbered(shown.wrong) or "(none)",
            "tried": "\n".join(f"- {text}" for text in shown.tried) or "(none)",
        }


class Refine:
    """Revises an explanation for as long as it gets better on the validate pool."""

    Config = RefineConfig
    name = "refine"
    argument = "rounds"
    stops_early = True
    """What :meth:`requests` returns is the most it would send."""

    def __init__(self, config: RefineConfig | None = None) -> None:
        """Build explainer, reviser and scorer.

        Raises: ConfigError when one cannot be used here.
        """
        self.config = config or RefineConfig()
        self._judged = Judged(self.config, REGISTRY)
        if not isinstance(self._judged.scorer, Classifier):
            raise ConfigError(
                f"scorer = {self.config.scorer!r} cannot tell mistakes: it does not answer yes or no about each window; take "
                "'detection' or 'fuzzing'"
            )
        base = self._judged.base
        own = base.config.model_dump(include={"threshold", "activations", "max_listed"}) if isinstance(base, Default) else {}
        self._reviser = Reviser(
            DefaultConfig.parse(
                {
                    **own,
                    "prompt": self.config.prompt,
                    "temperature": self.config.temperature,
                    "max_tokens": self.config.max_tokens,
                }
            )
        )
        self.needs = self._judged.needs

    def identity(self) -> Mapping[str, Any]:
        """Return everything that changes what it writes, but engines and selection."""
        return {"version": _VERSION, **self._judged.identity(), "revision": dict(self._reviser.identity())}

    def requests(self, latent: LatentExamples, resources: Resources, /) -> list[Request]:
        """Return the most that :meth:`explain` would send at first asking: every round used, and every revision kept."""
        written = self._judged.written_requests(latent, resources)
        if self._judged.too_few(latent):
            return written
        positives, negatives = self._looked_at(latent, resources.seed)
        judged = self._judged.validated_requests(latent, resources)
        looked = self._judged.judged_requests(latent, resources, positives=positives, negatives=negatives)
        num, rounds = self.config.max_mistakes, self.config.rounds
        mistakes = Mistakes(
            missed=positives.take(range(min(num, len(positives)))), wrong=negatives.take(range(min(num, len(negatives))))
        )
        shown = self._reviser.revision(latent, STAND_IN, mistakes, (), resources.vocabulary)
        # No mistakes are looked for in the last revision: there is no round left to mend them.
        return written + judged + rounds * [*looked, self._reviser.revision_request(shown), *judged]

    async def explain(self, latent: LatentExamples, resources: Resources, /) -> Sequence[Explanation]:
        """Return one row per explanation; at most one is ``ok``. See :class:`autointerp.protocols.Explainer`.

        The first is the base explainer's, and ``sample`` is the round. The parent of a revision is what it was to better.
        """
        row = await self._judged.write(latent, resources)
        if row.status != "ok":
            return [row]
        too_few = self._judged.too_few(latent)
        if too_few is not None:
            return [row.with_(reason=too_few)]
        best, score = row, await self._judged.validate(latent, row.text or "", resources)
        if score is None:
            return [row.with_(reason="not refined: too few answers of the judge can be read")]
        judge = judge_name(self._judged, resources)
        others: list[Explanation] = []
        tried: list[str] = []
        mistakes: Mistakes | None = None
        for number in range(1, self.config.rounds + 1):
            text = best.text or ""
            if score >= 1.0:
                break
            if mistakes is None:
                mistakes = await self._mistakes(latent, text, resources)
            if not len(mistakes):
                break
            new = await self._revised(latent, best, mistakes, tried, resources, number)
            if new.text is None:
                others.append(rejected(new, f"no candidate: its reply is {new.status}; sample {best.sample} stands"))
                break
            if new.text.casefold() in {known.casefold() for known in (text, *tried)}:
                others.append(rejected(new, "not kept: it says again what was said before"))
                break
            found = await self._judged.validate(latent, new.text, resources)
            if found is not None and found > score:
                why = f"bettered by sample {number}: {score:.3f} on the validate pool, that one has {found:.3f}"
                others.append(rejected(best, why, validate_score=score, judge=judge))
                best, score, mistakes, tried = new, found, None, []
            else:
                why = f"not kept: {three_digits(found)} on the validate pool, sample {best.sample} has {three_digits(score)}"
                others.append(rejected(new, why, validate_score=found, judge=judge))
                tried.append(new.text)
        return sorted([*others, best.with_(validate_score=score, judge=judge)], key=lambda one: one.sample)

    async def _revised(
        self,
        latent: LatentExamples,
        best: Explanation,
        mistakes: Mistakes,
        tried: Sequence[str],
        resources: Resources,
        number: int,
    ) -> Explanation:
        assert resources.engine is not None
        visible = unscored(latent)
        shown = self._reviser.revision(visible, best.text or "", mistakes, tried, resources.vocabulary)
        drawn = Resources(vocabulary=resources.vocabulary, seed=resources.seed, engine=Drawn(resources.engine, number))
        row = await self._reviser.revise(visible, shown, drawn)
        return row.with_(
            sample=number, parent_ids=(f"sample:{best.sample}",), num_negatives=len(shown.wrong) if row.num_attempts else 0
        )

    async def _mistakes(self, latent: LatentExamples, text: str, resources: Resources) -> Mistakes:
        positives, negatives = self._looked_at(latent, resources.seed)
        result = await self._judged.judge(latent, text, resources, positives=positives, negatives=negatives)
        num = self.config.max_mistakes
        return Mistakes(
            missed=_wrongly_judged(positives, result, truth=True, num=num),
            wrong=_wrongly_judged(negatives, result, truth=False, num=num),
        )

    def _looked_at(self, latent: LatentExamples, seed: int) -> tuple[Examples, Examples]:
        """Return the windows of the explain pool in which mistakes are looked for: those that no prompt showed come first."""
        statistics = latent.explain_statistics
        is_active = np.array([source == "positive" for source in statistics.sources], bool)
        active = latent.explain.joined(statistics.take(np.flatnonzero(is_active)))
        sides = []
        for name, known, shown in (
            ("active", active, latent.explain),
            ("silent", reserved(latent), Examples.empty(active.tokens.shape[1])),
        ):
            _, first = np.unique(known.positions, return_index=True)
            known = known.take(first)
            order = generator("revise", seed, latent.coder, latent.latent, name).permutation(len(known))
            is_new = ~np.isin(known.positions[order], shown.positions)
            sides.append(known.take(np.concatenate([order[is_new], order[~is_new]])[: self.config.num_revise]))
        return sides[0], sides[1]


def _wrongly_judged(examples: Examples, result: ScoreResult, *, truth: bool, num: int) -> Examples:
    """Return the windows of one side that were judged wrongly, by the verdict's own truth; an unusable answer is no mistake.

    Fuzzing also asks about activating windows with other tokens marked; these verdicts are on neither side.
    """
    wrong = {
        verdict.position
        for verdict in result.verdicts
        if verdict.truth is truth and verdict.status == "ok" and verdict.answer is (not truth)
    }
    return examples.take([i for i, position in enumerate(examples.positions.tolist()) if position in wrong][:num])
