"""What explainers that judge their own candidates share: the explainer below, the scorer, and the windows that are judged.

Candidates are chosen by what they score on the validate pool, which no explainer is shown and no score is reported on: choosing
and reporting on the same windows would raise the score by luck alone. All candidates are judged on the same windows, so that
their scores differ by what they say. The score pool is not even handed on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import Field

from autointerp.config import RUNTIME, Config, build_method
from autointerp.errors import ConfigError, Transient
from autointerp.protocols import Engine, Explainer, Resources, Scorer
from autointerp.records import Examples, Explanation, LatentExamples, Reply, Request, ScoreResult
from autointerp.scorers import REGISTRY as SCORERS

STAND_IN = "The word after an opening bracket in argument lists of functions, mostly in code that wraps text."
"""Text of an explanation that does not exist yet, for counting requests; of usual length."""


class JudgedConfig(Config):
    """What makes candidates and how they are judged."""

    base: str = "default"
    """The explainer that writes them: one that asks an LLM, by name or ``module:Class``."""
    base_options: dict[str, Any] = Field(default_factory=dict, json_schema_extra=RUNTIME)
    """Its settings; what it says of itself is identity in their place."""
    scorer: str = "detection"
    """The scorer that judges candidates: one that grades explanations and compares no embeddings."""
    scorer_options: dict[str, Any] = Field(default_factory=dict, json_schema_extra=RUNTIME)
    """Its settings; as above."""
    num_validate: int = Field(default=20, ge=1)
    """Most activating, and most silent, windows of the validate pool that a candidate is judged on."""
    min_validate: int = Field(default=10, ge=1)
    """With fewer on either side nothing is judged, and the first explanation stands: a score of so few would be luck."""


class Judged:
    """The explainer that writes candidates, and the scorer that judges them."""

    def __init__(self, config: JudgedConfig, registry: Mapping[str, str], *, temperature: float | None = None) -> None:
        """Build both; `temperature` is set where given.

        Raises: ConfigError when one cannot be used here.
        """
        self.config = config
        options = dict(config.base_options)
        if temperature is not None:
            if options.get("temperature", temperature) != temperature:
                raise ConfigError(
                    f"base_options.temperature = {options['temperature']} and temperature = {temperature} contradict each "
                    "other; give the second only"
                )
            options["temperature"] = temperature
        self.base: Explainer = build_method("explainer", config.base, registry, options)
        if not self.base.needs.engine or self.base.needs.validate:
            raise ConfigError(
                f"base = {config.base!r} cannot write candidates: it asks no LLM, or judges candidates itself; take one such "
                "as 'default'"
            )
        self.scorer: Scorer = build_method("scorer", config.scorer, SCORERS, config.scorer_options)
        if not self.scorer.needs.explanation or self.scorer.needs.embedder or self.scorer.needs.subject:
            raise ConfigError(
                f"scorer = {config.scorer!r} cannot judge candidates: it grades no explanations, or needs an embedder or the "
                "subject; take one such as 'detection'"
            )
        self.needs = replace(self.base.needs, validate=config.num_validate, judge=self.scorer.needs)

    def identity(self) -> dict[str, Any]:
        """Return everything that decides candidates and their scores, but engines and selection."""
        return {
            "config": self.config.identity(),
            "base": [self.base.name, dict(self.base.identity())],
            "scorer": [self.scorer.name, dict(self.scorer.identity())],
        }

    def too_few(self, latent: LatentExamples) -> str | None:
        """Return a sentence when the validate pool is too small to judge by; None otherwise."""
        active, silent = len(latent.validate_positives), len(latent.validate_negatives)
        if min(active, silent) >= self.config.min_validate:
            return None
        return (
            f"not judged: the validate pool has {active} activating and {silent} silent windows, "
            f"{self.config.min_validate} of each are needed; the first explanation stands"
        )

    async def write(self, latent: LatentExamples, resources: Resources, *, sample: int = 0) -> Explanation:
        """Return what the base explainer says at draw number `sample`."""
        engine = Drawn(resources.engine, sample) if resources.engine is not None and sample else resources.engine
        [row, *_] = await self.base.explain(unscored(latent), replace(resources, engine=engine))
        return row.with_(sample=sample)

    def written_requests(self, latent: LatentExamples, resources: Resources, *, sample: int = 0) -> list[Request]:
        """Return the requests of :meth:`write`, without sending any."""
        return [replace(request, sample=sample) for request in self._requests(self.base, unscored(latent), resources)]

    async def judge(
        self, latent: LatentExamples, text: str, resources: Resources, *, positives: Examples, negatives: Examples
    ) -> ScoreResult:
        """Return the verdicts and scores of an explanation on the given windows.

        Raises: Transient when an answer is missing that a later run may get: nothing is decided without it.
        """
        asked = _only(latent, positives, negatives)
        judge = replace(resources, engine=judge_of(resources), judge=None)
        result = await self.scorer.score(asked, _row(latent, text), judge)
        missing = sum(verdict.status == "no_reply" for verdict in result.verdicts)
        if missing:
            raise Transient(
                f"{missing} of {len(result.verdicts)} answers of the judge are missing; nothing is chosen without them"
            )
        return result

    def judged_requests(
        self, latent: LatentExamples, resources: Resources, *, positives: Examples, negatives: Examples
    ) -> list[Request]:
        """Return the requests of :meth:`judge` for an explanation of usual length, without sending any."""
        asked = _only(latent, positives, negatives)
        judge = replace(resources, engine=judge_of(resources), judge=None)
        return self._requests(self.scorer, asked, _row(latent, STAND_IN), judge)

    async def validate(self, latent: LatentExamples, text: str, resources: Resources) -> float | None:
        """Return what an explanation scores on the validate pool; None when half the answers or more cannot be used."""
        windows = {"positives": latent.validate_positives, "negatives": latent.validate_negatives}
        result = await self.judge(latent, text, resources, **windows)
        values = [
            score.value
            for score in result.scores
            if score.is_headline
            and score.value is not None
            and 2 * score.num_scored > score.num_scored + sum(score.unscored.values())
        ]
        return sum(values) / len(values) if values else None

    def validated_requests(self, latent: LatentExamples, resources: Resources) -> list[Request]:
        """Return the requests of :meth:`validate` for an explanation of usual length, without sending any."""
        windows = {"positives": latent.validate_positives, "negatives": latent.validate_negatives}
        return self.judged_requests(latent, resources, **windows)

    def _requests(self, method: Explainer | Scorer, *arguments: object) -> list[Request]:
        build = getattr(method, "requests", None)
        if build is None:
            raise ConfigError(
                f"{method.name!r} cannot say what it would ask: it has no method requests(); run it on a few latents instead"
            )
        return list(build(*arguments))


class Drawn:
    """An engine whose requests are draw number `sample` of what they ask: others to the reply log, the same to a server."""

    def __init__(self, engine: Engine, sample: int) -> None:
        self._engine, self._sample = engine, sample
        self.id, self.capabilities, self.context_tokens = engine.id, engine.capabilities, engine.context_tokens

    async def complete(self, request: Request, /) -> Reply:
        return await self._engine.complete(replace(request, sample=self._sample))

    async def tokenize(self, text: str, /) -> tuple[int, ...]:
        return await self._engine.tokenize(text)

    async def aclose(self) -> None:
        """Do nothing: who opened the engine closes it."""


def judge_of(resources: Resources) -> Engine | None:
    """Return the engine that judges."""
    return resources.judge or resources.engine


def judge_name(judged: Judged, resources: Resources) -> str:
    """Return the judging model's name, as scores have it."""
    engine = judge_of(resources)
    return engine.id.model if engine is not None and judged.scorer.needs.engine else "rule"


def unscored(latent: LatentExamples) -> LatentExamples:
    """Return what may be seen of a latent where explanations are made: neither the score pool nor the validate pool."""
    nothing = Examples.empty(latent.explain.tokens.shape[1])
    return replace(latent, positives=nothing, negatives=nothing, validate_positives=nothing, validate_negatives=nothing)


def _only(latent: LatentExamples, positives: Examples, negatives: Examples) -> LatentExamples:
    """Return the latent with these windows alone: some scorers would also ask about windows that were shown."""
    nothing = Examples.empty(latent.explain.tokens.shape[1])
    blank = replace(unscored(latent), explain=nothing, explain_statistics=nothing, explain_negatives=nothing)
    return replace(blank, positives=positives, negatives=negatives, negative_sources=tuple(dict.fromkeys(negatives.sources)))


def rejected(row: Explanation, reason: str, *, validate_score: float | None = None, judge: str | None = None) -> Explanation:
    """Return the row of a candidate that does not stand: nothing scores it, and what it said is kept beside."""
    return row.with_(
        status="not_applicable",
        text=None,
        rule=None,
        candidate=row.text,
        reason=reason,
        validate_score=validate_score,
        judge=judge if validate_score is not None else None,
    )


def _row(latent: LatentExamples, text: str) -> Explanation:
    return Explanation(
        coder=latent.coder,
        latent=latent.latent,
        explainer="candidate",
        explainer_id="",
        selection_id=latent.selection_id,
        status="ok",
        text=text,
    )


def three_digits(value: float | None) -> str:
    """Return a validate score for a sentence."""
    return "no score" if value is None else f"{value:.3f}"
