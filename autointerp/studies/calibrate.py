"""``calibrate``: how well scorers and judges tell explanations of known quality apart.

Plants a store, lets the explanations written for it enter two results folders (the second with other windows, for the spread of
a repeated measurement), and scores them by the same path as any explanation. What comes out is in
:mod:`autointerp.studies.calibration`, what it takes in :mod:`autointerp.studies.calibrate_cost`. Every registered scorer takes
part that can be judged by rule, or by the engine given.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from autointerp.config import RUNTIME, Config
from autointerp.errors import ConfigError, nearest
from autointerp.examples.selection import SelectionConfig
from autointerp.jobs.cost import SAMPLE
from autointerp.jobs.explain import ExplainConfig, aexplain
from autointerp.jobs.latents import choose_latents
from autointerp.jobs.methods import build_scorer, missing
from autointerp.jobs.runner import RunReport
from autointerp.jobs.score import ScoreConfig, ascore
from autointerp.jobs.score_controls import by_rule
from autointerp.jobs.session import LatentSpec, StoreSource, open_prepared
from autointerp.jobs.signals import StopFlag, run_sync
from autointerp.llm.settings import EngineConfig
from autointerp.protocols import Engine
from autointerp.records import Capabilities
from autointerp.scorers import REGISTRY
from autointerp.studies.calibrate_cost import Price, prices, total
from autointerp.studies.plant import EXACT, plant_store
from autointerp.studies.planted import ROLES, planted_in

logger = logging.getLogger("autointerp.studies")

RETEST = "retest"
_ANNOUNCED_SAMPLE = 8
"""Latents from which the log line before a run is made."""
_EXPLAINER = "autointerp.studies.planted:PlantedExplanations"


class CalibrateConfig(Config):
    """Settings of the study."""

    store: Path
    """The planted store; made when it is not there."""
    results: Path
    """Results folder; the one of the repeated measurement lies beside it, with ``-retest`` after its name."""
    num_tokens: int = Field(default=524_288, gt=0)
    """Tokens of the standard library to plant in."""
    latents: LatentSpec = "all"
    """Which of the planted latents; ``random:20`` makes a judge that costs money affordable."""
    scorers: tuple[str, ...] = ()
    """Scorers by name or ``module:Class``; none = all that are registered and can be judged."""
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings of scorers, by name."""
    engine: str | None = None
    """A judge to calibrate beside the rules."""
    engine_options: EngineConfig = Field(default_factory=EngineConfig)
    embedder: str | None = None
    """For scorers that compare texts by embeddings."""
    concurrency: int | None = Field(default=None, ge=1, json_schema_extra=RUNTIME)
    negatives: tuple[str, ...] = ("random", "same_token", "neighbour_cooccurrence")
    """Sources of negatives to compare."""
    with_noise: bool = True
    """Whether the true explanations are also scored against every level of noise."""
    with_retest: bool = True
    """Whether the measurement is repeated on other windows."""
    with_probabilities: bool = True
    """Whether an engine that gives label probabilities also judges the true explanations in mode ``labels``, one request per
    example: the answers of mode ``list`` have no probabilities, so no calibration error comes from them."""


@dataclass(frozen=True)
class Variant:
    """A scorer with its settings, who judges it, and whether it is run for its probabilities alone."""

    name: str
    options: Mapping[str, Any]
    uses_engine: bool
    only_true: bool = False
    """Judges nothing but the true explanations of latents without noise, once."""


@dataclass(frozen=True)
class _Stages:
    """The runs that the study is made of."""

    explaining: list[ExplainConfig]
    """All that needs no judge; first, so that what the judge will be asked is known before it is asked."""
    scoring: list[ScoreConfig]


def calibrate(config: CalibrateConfig) -> list[RunReport]:
    """Run the study, or what of it is not done; works in a script and in a notebook.

    Raises: what `cache`, `explain` and `score` raise.
    """
    return run_sync(lambda stop: acalibrate(config, stop=stop))


async def acalibrate(config: CalibrateConfig, *, stop: StopFlag | None = None) -> list[RunReport]:
    """Run the study in the caller's event loop; finished work is kept whatever happens.

    The limits of `engine_options` are those of the whole study. Before a judge is asked, a log line says what it will be asked.
    """
    engine = await open_prepared(config.engine, config.engine_options)
    try:
        stages = _stages(config, engine.capabilities if engine is not None else None)
        reports = [await aexplain(explaining, progress=False, stop=stop) for explaining in stages.explaining]
        if engine is not None:
            await _announce(stages.scoring, engine)
    finally:
        if engine is not None:
            await engine.aclose()
    for scoring in stages.scoring:
        options = _what_is_left(config.engine_options, reports)
        reports.append(await ascore(scoring.model_copy(update={"engine_options": options}), progress=False, stop=stop))
        logger.info("%s: %s explanations are scored by %s", scoring.results, scoring.explainer, scoring.engine or "rule")
        if reports[-1].stop is not None:
            break
    return reports


def plan_calibration(config: CalibrateConfig, *, sample: int = SAMPLE) -> list[Price]:
    """Return what the judge would be asked, a row for each scorer; plants the store and writes the explanations, sends nothing.

    What is done in the results folder is left out. `sample`: latents whose requests are built and counted.
    Raises: what `cache` and `explain` raise; ConfigError for a scorer that cannot say what it would ask.
    """

    async def plan(stop: StopFlag) -> list[Price]:
        # A model in this process is not loaded for this; it can do everything.
        is_here = config.engine is not None and config.engine.startswith(("hf:", "vllm:"))
        engine = None if is_here else await open_prepared(config.engine, config.engine_options)
        try:
            capabilities = Capabilities() if is_here else engine.capabilities if engine is not None else None
            stages = _stages(config, capabilities)
            for explaining in stages.explaining:
                await aexplain(explaining, progress=False, stop=stop)
            return await prices(stages.scoring, engine, sample=sample)
        finally:
            if engine is not None:
                await engine.aclose()

    return run_sync(plan)


async def _announce(scoring: Sequence[ScoreConfig], engine: Engine) -> None:
    try:
        logger.info("%s", total(await prices(scoring, engine, sample=_ANNOUNCED_SAMPLE)).sentence())
    except ConfigError as error:
        logger.warning("what the judge will be asked is not known: %s", error)


def _what_is_left(options: EngineConfig, reports: Sequence[RunReport]) -> EngineConfig:
    """Return the engine's options with what earlier stages sent and spent taken off the limits."""
    update: dict[str, Any] = {}
    if options.max_requests is not None:
        update["max_requests"] = max(0, options.max_requests - sum(report.num_sent for report in reports))
    if options.max_cost is not None:
        update["max_cost"] = max(0.0, options.max_cost - sum(report.cost for report in reports))
    return options.model_copy(update=update)


def _stages(config: CalibrateConfig, capabilities: Capabilities | None) -> _Stages:
    """Plant the store and return what there is to run; `capabilities`: the engine's, None without one."""
    variants = list(_variants(config, capabilities))
    if not variants:
        raise ConfigError("none of the scorers can judge an explanation without an engine; give --engine")
    plant_store(config.store, num_tokens=config.num_tokens)
    config = config.model_copy(update={"latents": chosen_latents(config)})
    noisy = [name for name in planted_in(config.store)["coders"] if name != EXACT]
    stages = _Stages([], [])
    folders = [(config.results, 0)]
    if config.with_retest:
        folders.append((retest_folder(config.results), 1))
    for folder, seed in folders:
        selection = SelectionConfig(negatives=config.negatives, seed=seed)
        for role in ROLES:
            levels = [EXACT]
            if role == "true" and config.with_noise and seed == 0:
                levels += noisy
            stages.explaining.append(_explaining(config, folder, selection, role, levels))
            for uses_engine in (False, True):
                chosen = [variant for variant in variants if variant.uses_engine == uses_engine and not variant.only_true]
                for coders in ([EXACT], levels[1:]):
                    if chosen and coders:
                        stages.scoring.append(_scoring(config, folder, selection, role, coders, chosen))
            alone = [variant for variant in variants if variant.only_true]
            if alone and role == "true" and seed == 0:
                scoring = _scoring(config, folder, selection, role, [EXACT], alone)
                stages.scoring.append(scoring.model_copy(update={"controls": ()}))
    return stages


def chosen_latents(config: CalibrateConfig) -> tuple[int, ...]:
    """Return the latents to study: the same at every level of noise and in both measurements, so that they can be paired."""
    statistics = StoreSource(config.store, SelectionConfig()).statistics(EXACT)
    return tuple(choose_latents(config.latents, statistics, seed=0).tolist())


def retest_folder(results: Path) -> Path:
    """Return where the repeated measurement lies."""
    return results.with_name(f"{results.name}-{RETEST}")


def _explaining(
    config: CalibrateConfig, folder: Path, selection: SelectionConfig, role: str, coders: list[str]
) -> ExplainConfig:
    return ExplainConfig(
        store=config.store,
        results=folder,
        explainer=_EXPLAINER,
        options={"role": role, "store": str(config.store)},
        selection=selection,
        latents=config.latents,
        coders=tuple(coders),
        controls=("shuffled",) if role == "true" else (),
    )


def _scoring(
    config: CalibrateConfig,
    folder: Path,
    selection: SelectionConfig,
    role: str,
    coders: list[str],
    variants: list[Variant],
) -> ScoreConfig:
    return ScoreConfig(
        results=folder,
        store=config.store,
        explainer=role,
        scorers=tuple(variant.name for variant in variants),
        options={variant.name: dict(variant.options) for variant in variants},
        controls=("shuffled",) if role == "true" and coders == [EXACT] else (),
        selection=selection,
        coders=tuple(coders),
        latents=config.latents,
        engine=config.engine if variants[0].uses_engine else None,
        engine_options=config.engine_options,
        embedder=config.embedder,
        concurrency=config.concurrency,
    )


def _variants(config: CalibrateConfig, capabilities: Capabilities | None) -> Iterator[Variant]:
    """Yield each scorer as rules judge it, where they can, and as the engine or the embedder does."""
    names = config.scorers or tuple(REGISTRY)
    for name in config.options:
        if name not in names:
            raise ConfigError(f"options are given for {name!r}; {nearest(name, names)}")
    for name in names:
        scorer = build_scorer(name, config.options.get(name, {}))
        if not scorer.needs.explanation:
            logger.info("left out: %s grades latents, not explanations", name)
            continue
        options = config.options.get(name, {})
        with_rule = by_rule(scorer)
        if with_rule is not None:
            yield Variant(name, {**options, "judge": "rule"}, uses_engine=False)
        if not scorer.needs.engine and with_rule is not None:
            continue
        what = missing(scorer.needs, capabilities, has_embedder=config.embedder is not None)
        if what is None:
            yield Variant(name, options, uses_engine=scorer.needs.engine)
            if config.with_probabilities and scorer.needs.engine and not scorer.needs.labels:
                yield from _with_labels(name, options, capabilities)
        elif with_rule is None:
            logger.warning("left out: %s needs %s", name, what)


def _with_labels(name: str, options: Mapping[str, Any], capabilities: Capabilities | None) -> Iterator[Variant]:
    """Yield the scorer with label probabilities, where it has them and the engine gives them."""
    options = {**options, "mode": "labels"}
    try:
        scorer = build_scorer(name, options)
    except ConfigError as error:
        logger.info("no probabilities of %s, which has no mode labels with these settings: %s", name, error)
        return
    what = missing(scorer.needs, capabilities, has_embedder=False)
    if what is None:
        yield Variant(name, options, uses_engine=True, only_true=True)
    else:
        logger.warning("no probabilities of %s: it needs %s", name, what)
