"""``calibrate``: how well scorers and judges tell explanations of known quality apart.

Plants a store, lets the explanations written for it enter two results folders (the second with other windows, for the spread of
a repeated measurement), and scores them by the same path as any explanation. What comes out is in
:mod:`autointerp.studies.calibration`. Every registered scorer takes part that can be judged by rule, or by the engine given.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from autointerp.config import RUNTIME, Config
from autointerp.errors import ConfigError, nearest
from autointerp.examples.selection import SelectionConfig
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
from autointerp.scorers import REGISTRY
from autointerp.studies.plant import EXACT, plant_store
from autointerp.studies.planted import ROLES, planted_in

logger = logging.getLogger("autointerp.studies")

RETEST = "retest"
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


@dataclass(frozen=True)
class Variant:
    """A scorer with its settings, and whether rules judge it."""

    name: str
    options: Mapping[str, Any]
    uses_engine: bool


def calibrate(config: CalibrateConfig) -> list[RunReport]:
    """Run the study, or what of it is not done; works in a script and in a notebook.

    Raises: what `cache`, `explain` and `score` raise.
    """
    return run_sync(lambda stop: acalibrate(config, stop=stop))


async def acalibrate(config: CalibrateConfig, *, stop: StopFlag | None = None) -> list[RunReport]:
    """Run the study in the caller's event loop; finished work is kept whatever happens."""
    plant_store(config.store, num_tokens=config.num_tokens)
    config = config.model_copy(update={"latents": chosen_latents(config)})
    noisy = [name for name in planted_in(config.store)["coders"] if name != EXACT]
    engine = await open_prepared(config.engine, config.engine_options)
    try:
        variants = list(_variants(config, engine))
    finally:
        if engine is not None:
            await engine.aclose()
    if not variants:
        raise ConfigError("none of the scorers can judge an explanation without an engine; give --engine")
    reports: list[RunReport] = []
    folders = [(config.results, 0)]
    if config.with_retest:
        folders.append((retest_folder(config.results), 1))
    for folder, seed in folders:
        selection = SelectionConfig(negatives=config.negatives, seed=seed)
        for role in ROLES:
            levels = [EXACT]
            if role == "true" and config.with_noise and seed == 0:
                levels += noisy
            reports.append(await aexplain(_explaining(config, folder, selection, role, levels), progress=False, stop=stop))
            for uses_engine in (False, True):
                chosen = [variant for variant in variants if variant.uses_engine == uses_engine]
                for coders in ([EXACT], levels[1:]):
                    if chosen and coders:
                        scoring = _scoring(config, folder, selection, role, coders, chosen)
                        reports.append(await ascore(scoring, progress=False, stop=stop))
            logger.info("%s: %s explanations are scored", folder, role)
    return reports


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


def _variants(config: CalibrateConfig, engine: Engine | None) -> Iterator[Variant]:
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
        what = missing(scorer.needs, engine.capabilities if engine else None, has_embedder=config.embedder is not None)
        if what is None:
            yield Variant(name, options, uses_engine=scorer.needs.engine)
        elif with_rule is None:
            logger.warning("left out: %s needs %s", name, what)
