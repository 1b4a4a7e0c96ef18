"""The explain stage: plans latents, lets an explainer write about each, commits explanations and the windows they rest on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from autointerp.config import RUNTIME
from autointerp.digest import short
from autointerp.errors import ConfigError
from autointerp.examples.selection import SelectionConfig, selection_id
from autointerp.jobs.latents import FORMS, choose_latents
from autointerp.jobs.methods import build_explainer, check_needs
from autointerp.jobs.plan import SHARD_LATENTS, Items, Plan, extend_plan, read_plan
from autointerp.jobs.progress import OnProgress
from autointerp.jobs.runner import RunReport
from autointerp.jobs.session import (
    Control,
    Source,
    StageConfig,
    StoreSource,
    choose_coders,
    describe_run,
    empty_latent,
    engine_identity,
    examples_for,
    explain_part,
    open_prepared,
    run_works,
    selection_digest,
)
from autointerp.jobs.shards import Leases
from autointerp.jobs.signals import StopFlag, run_sync
from autointerp.llm.reply_log import LoggedEngine
from autointerp.protocols import Engine, Explainer, Resources
from autointerp.records import Explanation, LatentExamples, Status
from autointerp.results.folder import Method, ResultsFolder, shard_name
from autointerp.results.write import Key, ShardRows, examples_batches, explanation_id, write_examples

EXAMPLES_UP_TO = 100_000
"""Latents of a plan up to which the windows are written by default."""


class ExplainConfig(StageConfig):
    """Settings of the explain stage."""

    store: Path
    """The store to read."""
    results: Path
    """The results folder to write or to add to."""
    explainer: str = "default"
    """A name of `explainers.REGISTRY`, such as ``default`` or ``lexical``, or ``module:Class``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Settings of the explainer."""
    judge: str | None = None
    """Who judges candidates, for explainers that have them judged; None = `engine`. `engine_options` hold for both, prices and
    limits too."""
    selection: SelectionConfig = Field(default_factory=SelectionConfig)
    """Which examples are shown, and later scored."""
    controls: tuple[Control, ...] = ()
    """``shuffled``: also explain the latents whose explanations this control will swap in; about twice the work. The other
    controls of the score stage need nothing here."""
    shard_latents: int = Field(default=SHARD_LATENTS, ge=1, json_schema_extra=RUNTIME)
    """Latents per new shard."""
    examples: bool | None = Field(default=None, json_schema_extra=RUNTIME)
    """Whether windows are written with their text; None = for plans of up to 100k latents."""


def explain(config: ExplainConfig, *, progress: bool | OnProgress | None = None) -> RunReport:
    """Explain latents; works in a script and in a notebook.

    `progress`: True a bar, False log lines, None what suits the terminal, or a function of (finished, total).
    Raises: Interrupted after SIGINT, SIGTERM or SIGUSR1; InputError and LLMError as the exit codes say.
    """
    return run_sync(lambda stop: aexplain(config, progress=progress, stop=stop))


async def aexplain(
    config: ExplainConfig, *, progress: bool | OnProgress | None = None, stop: StopFlag | None = None
) -> RunReport:
    """Explain latents, in the caller's event loop. When it is cancelled, finished work is committed first."""
    explainer = build_explainer(config.explainer, config.options)
    source = StoreSource(config.store, config.selection)
    async with opened(config, explainer) as (engine, judge):
        return await explain_from(config, source, explainer, engine, judge=judge, progress=progress, stop=stop)


@asynccontextmanager
async def opened(config: ExplainConfig, explainer: Explainer) -> AsyncIterator[tuple[Engine | None, Engine | None]]:
    """Open the engine and the judge that an explainer needs, None for what it does not or what is not named; close them."""
    judged = explainer.needs.judge is not None and explainer.needs.judge.engine
    if config.judge is not None and not judged:
        raise ConfigError(f"the explainer {explainer.name!r} has nothing judged; leave out judge = {config.judge!r}")
    async with AsyncExitStack() as stack:
        engines = []
        for spec in (config.engine if explainer.needs.engine else None, config.judge):
            engines.append(await open_prepared(spec, config.engine_options))
            if engines[-1] is not None:
                stack.push_async_callback(engines[-1].aclose)
        yield engines[0], engines[1]


async def explain_from(
    config: ExplainConfig,
    source: Source,
    explainer: Explainer,
    engine: Engine | None,
    *,
    judge: Engine | None = None,
    progress: bool | OnProgress | None = None,
    stop: StopFlag | None = None,
) -> RunReport:
    """Explain latents of an opened source with opened engines; without a `judge` the engine judges."""
    await check_needs("explainer", explainer.name, explainer.needs, engine)
    if explainer.needs.judge is not None:
        await check_needs("explainer", explainer.name, explainer.needs.judge, judge or engine)
    method = explain_method(config, source, explainer, engine, judge)
    scope = wanted_latents(config, source)
    check_tables(config, source, explainer, scope)
    folder = ResultsFolder.create(
        config.results, store_id=source.store_id, provenance={"store": source.path}, outgrown=source.outgrown
    )
    for coder in scope if scope is not None else choose_coders(config.coders, source):
        folder.register_coder(coder, source.coder_ids[coder])
    folder.register(method)
    folder.record_run("explain", describe_run("explain", config))
    plan, items = plan_items(config, folder, source, scope)
    leases = Leases(folder.leases, expiry_s=config.lease_expiry_s)
    try:
        with_examples = len(plan) <= EXAMPLES_UP_TO if config.examples is None else config.examples
        work = ExplainWork(folder, source, explainer, method, leases, judge=judge, with_examples=with_examples)
        report = await run_works(
            config,
            folder,
            [work],
            items,
            engine=engine,
            read_examples=work.read_examples,
            expect=source.expect,
            requests_per_latent=1,
            leases=leases,
            progress=progress,
            stop=stop,
        )
        return replace(report, notes=limited_coders(config, source, scope))
    finally:
        leases.close()


def check_tables(config: ExplainConfig, source: Source, explainer: Explainer, scope: Mapping[str, np.ndarray] | None) -> None:
    """Check that the store has the tables that an explainer reads.

    Raises: StoreError naming the first that is missing, with the command that makes it.
    """
    if explainer.needs.logits:
        for coder in scope if scope is not None else choose_coders(config.coders, source):
            source.promoted(coder, 0)


def explain_method(
    config: ExplainConfig, source: Source, explainer: Explainer, engine: Engine | None, judge: Engine | None = None
) -> Method:
    """Return the identity of an explainer: itself, its engines, and the rules by which its examples are chosen."""
    return Method(
        stage="explain",
        name=explainer.name,
        model=engine.id.model if engine is not None else "none",
        identity={
            "explainer": explainer.name,
            "settings": dict(explainer.identity()),
            "engine": engine_identity(engine),
            **({"judge": engine_identity(judge)} if judge is not None else {}),
            "selection": selection_digest(explain_part(source.selection)),
        },
        settings={
            "explainer": config.explainer,
            "options": config.options,
            "selection": source.selection.identity(),
        },
    )


def wanted_latents(config: StageConfig, source: Source) -> dict[str, np.ndarray] | None:
    """Return the latents that `config` names, by coder; None = all that is planned."""
    if config.latents is None:
        return None
    return {coder: _wanted(config, source, coder) for coder in choose_coders(config.coders, source)}


def _wanted(config: StageConfig, source: Source, coder: str, *, is_limited: bool = True) -> np.ndarray:
    limit = config.control_coder_latents if is_limited and coder in source.control_of else None
    return choose_latents(config.latents or (), source.statistics(coder), seed=source.selection.seed, at_most=limit)


def limited_coders(config: StageConfig, source: Source, scope: Mapping[str, np.ndarray] | None) -> tuple[str, ...]:
    """Return a sentence on each control coder of which fewer latents are wanted than `config` names of others."""
    found = []
    for coder, latents in (scope or {}).items():
        named = len(_wanted(config, source, coder, is_limited=False))
        if len(latents) < named:
            found.append(
                f"{len(latents):,} of the {named:,} latents of control coder {coder} that --latents names; "
                "--set control_coder_latents=N takes more, =all takes all"
            )
    return tuple(found)


def plan_items(
    config: ExplainConfig, folder: ResultsFolder, source: Source, scope: Mapping[str, np.ndarray] | None
) -> tuple[Plan, Items]:
    """Add what is wanted to the plan; return it and the work of this run.

    Raises: ConfigError when nothing is wanted and nothing planned.
    """
    partners = source.partners if "shuffled" in config.controls else None
    if scope is None:
        plan = read_plan(folder)
        if not len(plan):
            raise ConfigError(f"{folder.path} has no plan yet and no latents are named; give --latents, {FORMS}")
        if partners is not None:
            requested = plan.latents(choose_coders(config.coders, source), only_requested=True)
            plan = extend_plan(
                folder, requested, partners=partners, shard_latents=config.shard_latents, control_of=source.control_of
            )
        return plan, plan.items("explain", plan.latents(config.coders) if config.coders else None)
    plan = extend_plan(folder, scope, partners=partners, shard_latents=config.shard_latents, control_of=source.control_of)
    wanted = dict(scope)
    if partners is not None:
        for coder, latents in scope.items():
            needed = partners(coder)[latents]
            wanted[coder] = np.union1d(latents, needed[needed >= 0])
    return plan, plan.items("explain", wanted)


class ExplainWork:
    """What the runner does with one latent in this stage."""

    def __init__(
        self,
        folder: ResultsFolder,
        source: Source,
        explainer: Explainer,
        method: Method,
        leases: Leases,
        *,
        judge: Engine | None = None,
        with_examples: bool,
    ) -> None:
        self.method = method
        self._judge = judge
        self._folder, self._source, self._explainer, self._leases = folder, source, explainer, leases
        self._with_examples = with_examples
        self._selection_label = f"selection-{short(selection_digest(source.selection))}"
        shown = explain_part(source.selection)
        self._selection_ids = {name: selection_id(source.store_id, coder, shown) for name, coder in source.coder_ids.items()}
        self._windows: dict[Key, list[Any]] = {}

    def read_examples(self, coder: str, latent: int) -> LatentExamples:
        """Return a latent's examples; keeps their text for the shard's commit."""
        examples = examples_for(self._explainer.needs, self._source, coder, latent)
        if self._with_examples:
            self._windows[coder, latent] = examples_batches(examples, self._source.vocabulary)
        return examples

    def wants(self, key: Key) -> bool:
        return True

    def is_ready(self, key: Key) -> bool:
        return True

    async def process(self, latent: LatentExamples, engine: Engine | None) -> ShardRows:
        judge = self._judge
        if judge is not None and isinstance(engine, LoggedEngine):
            judge = engine.beside(judge)
        resources = Resources(vocabulary=self._source.vocabulary, seed=self._source.selection.seed, engine=engine, judge=judge)
        rows = [self._filled(row, latent) for row in await self._explainer.explain(latent, resources)]
        ids = {f"sample:{row.sample}": row.explanation_id for row in rows}
        return ShardRows(
            explanations=[row.with_(parent_ids=tuple(ids.get(parent, parent) for parent in row.parent_ids)) for row in rows]
        )

    def without_result(self, latent: LatentExamples, status: Status) -> ShardRows:
        row = Explanation(
            coder=latent.coder,
            latent=latent.latent,
            explainer=self.method.name,
            explainer_id=self.method.id,
            selection_id=latent.selection_id,
            status=status,
            text=None,
            model=self.method.model,
        )
        return ShardRows(explanations=[self._filled(row, latent)])

    def without_examples(self, key: Key) -> LatentExamples:
        return empty_latent(self._source, key)

    def before_commit(self, shard: int, keys: Iterable[Key]) -> None:
        batches = {key: self._windows.pop(key) for key in keys if key in self._windows}
        if not batches:
            return
        label = self._selection_label
        # Another explainer with the same selection may be writing the same windows.
        with self._leases.waiting(f"examples/{label}/{shard_name(shard)}"):
            write_examples(self._folder.examples(label, shard), batches)

    def _filled(self, row: Explanation, latent: LatentExamples) -> Explanation:
        row = row.with_(
            coder=latent.coder,
            latent=latent.latent,
            explainer=self.method.name,
            explainer_id=self.method.id,
            selection_id=self._selection_ids[latent.coder],
            density=latent.density,
        )
        return row.with_(explanation_id=explanation_id(row))
