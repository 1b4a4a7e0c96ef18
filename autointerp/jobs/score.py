"""The score stage: lets scorers grade the explanations of a folder, and the same scorers grade controls.

Under a control a latent's examples are judged by an explanation that should do worse (`jobs.score_controls`): what a score is
worth is its distance from that.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from autointerp import tables
from autointerp.config import RUNTIME
from autointerp.embed import open_embedder
from autointerp.errors import ConfigError, IdentityError
from autointerp.examples.selection import SelectionConfig
from autointerp.jobs.control_gaps import gaps
from autointerp.jobs.explain import wanted_latents
from autointerp.jobs.methods import build_scorer, check_needs, missing
from autointerp.jobs.plan import Plan, read_plan
from autointerp.jobs.progress import OnProgress
from autointerp.jobs.runner import RunReport
from autointerp.jobs.score_controls import (
    SAMPLED,
    by_rule,
    control_identity,
    control_scorer,
    controls_for,
    keys_of,
    own_explanations,
    sampled,
)
from autointerp.jobs.session import (
    Control,
    SampleSize,
    Source,
    StageConfig,
    StoreSource,
    choose_coders,
    describe_run,
    empty_latent,
    engine_identity,
    explain_part,
    open_prepared,
    run_works,
    selection_digest,
)
from autointerp.jobs.shards import Leases
from autointerp.jobs.signals import StopFlag, run_sync
from autointerp.protocols import Embedder, Engine, Resources, Scorer
from autointerp.records import RETRYABLE, Capabilities, Explanation, LatentExamples, Score, Status
from autointerp.results.folder import Method, ResultsFolder
from autointerp.results.write import Key, ShardRows
from autointerp.scorers import REGISTRY

logger = logging.getLogger("autointerp.jobs")

_CACHED_SHARDS = 16
ALL = "all"
"""Stands for every scorer whose needs are met."""
LATENT = "latent"
"""Stands for the explainer in folders and rows of scorers that need no explanation."""


class ScoreConfig(StageConfig):
    """Settings of the score stage."""

    results: Path
    """The results folder with the explanations."""
    store: Path | None = None
    """The store they were made from; None = where the folder says it is."""
    explainer: str | None = None
    """Explainer to grade, by name or folder name; None = the only one."""
    scorers: tuple[str, ...] = ("detection", "fuzzing")
    """Scorers by name or ``module:Class``; ``all`` = every one whose needs are met, the others are listed."""
    embedder: str | None = None
    """Embedder by name or ``module:Class``; None where no scorer needs one."""
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings of scorers, by the names in `scorers`."""
    controls: tuple[Control, ...] = ()
    """Controls to run beside the scorers: ``shuffled``, ``generic``, ``lexical``; see `jobs.score_controls`."""
    control_latents: SampleSize = Field(default=200, json_schema_extra=RUNTIME)
    """``generic`` and ``lexical`` are run on those planned latents that ``random:N`` names, for N of this; None or ``all`` = on
    all."""
    selection: SelectionConfig | None = None
    """Which examples are scored; None = as explained. Only counts and sources of scored examples may differ from that."""


def score(config: ScoreConfig, *, progress: bool | OnProgress | None = None) -> RunReport:
    """Grade explanations; works in a script and in a notebook.

    `progress`: True a bar, False log lines, None what suits the terminal, or a function of (finished, total).
    Raises: Interrupted after SIGINT, SIGTERM or SIGUSR1; InputError and LLMError as the exit codes say.
    """
    return run_sync(lambda stop: ascore(config, progress=progress, stop=stop))


async def ascore(config: ScoreConfig, *, progress: bool | OnProgress | None = None, stop: StopFlag | None = None) -> RunReport:
    """Grade explanations, in the caller's event loop. When it is cancelled, finished work is committed first."""
    folder = ResultsFolder.open(config.results)
    explainer = folder.explainer(config.explainer)
    scorers = build_scorers(config)
    source = StoreSource(config.store or Path(folder.provenance()["store"]), scored_selection(config, explainer))
    needs_engine = any(scorer.needs.engine for scorer in scorers)
    engine = await open_prepared(config.engine, config.engine_options) if needs_engine else None
    try:
        scorers, left_out = usable(config, scorers, engine.capabilities if engine is not None else None)
        needs_embedder = any(scorer.needs.embedder for scorer in scorers)
        embedder = open_embedder(config.embedder) if needs_embedder and config.embedder is not None else None
        report = await score_from(config, source, scorers, engine, embedder=embedder, progress=progress, stop=stop)
        return replace(report, left_out=left_out)
    finally:
        if engine is not None:
            await engine.aclose()


def build_scorers(config: ScoreConfig) -> list[Scorer]:
    """Return the scorers that `config` names, for ``all`` every one there is.

    Raises: ConfigError when one is unknown, or options are given for one that is not named.
    """
    names = _expanded(config.scorers)
    stray = sorted(set(config.options) - set(names))
    if stray:
        raise ConfigError(f"options are given for {stray[0]!r}, which is not among the scorers {', '.join(names)}")
    return [build_scorer(name, config.options.get(name, {})) for name in names]


def usable(
    config: ScoreConfig, scorers: Sequence[Scorer], capabilities: Capabilities | None
) -> tuple[list[Scorer], tuple[str, ...]]:
    """Return the scorers to run, and for ``all`` a sentence on each that is left out; without it, all are returned.

    `capabilities`: the engine's, None without one. Raises: ConfigError when none is left.
    """
    if ALL not in config.scorers:
        return list(scorers), ()
    found: list[Scorer] = []
    left_out: list[str] = []
    for scorer in scorers:
        what = missing(scorer.needs, capabilities, has_embedder=config.embedder is not None)
        if what is None:
            found.append(scorer)
        else:
            left_out.append(f"{scorer.name} needs {what}")
            logger.warning("left out: %s", left_out[-1])
    if not found:
        raise ConfigError(f"no scorer can be run: {'; '.join(left_out)}")
    return found, tuple(left_out)


def without_llm(names: Sequence[str], *, has_embedder: bool) -> tuple[dict[str, dict[str, str]], list[Scorer]]:
    """Return which scorers work without an LLM, with the options that make them, and the others.

    `names` may hold ``all``. A scorer that rules can judge is judged by rule.
    """
    found: dict[str, dict[str, str]] = {}
    others = []
    for name in _expanded(names):
        scorer = build_scorer(name, {})
        options = {} if by_rule(scorer) is None else {"judge": "rule"}
        if options or missing(scorer.needs, None, has_embedder=has_embedder) is None:
            found[name] = options
        else:
            others.append(scorer)
    return found, others


def _expanded(names: Sequence[str]) -> list[str]:
    """Return the names, ``all`` as those of every scorer there is, each once."""
    return list(dict.fromkeys(known for name in names for known in (REGISTRY if name == ALL else (name,))))


def scored_selection(config: ScoreConfig, explainer: Method) -> SelectionConfig:
    """Return the selection to score with.

    Raises: IdentityError when it would part the pools otherwise than the explainer's did.
    """
    explained = SelectionConfig.parse(explainer.settings["selection"], where=f"the selection of {explainer.label}")
    if config.selection is None:
        return explained
    before, now = explain_part(explained).identity(), explain_part(config.selection).identity()
    for name, value in before.items():
        if now[name] != value:
            raise IdentityError(
                f"the explanations of {explainer.label} were made with selection.{name} = {value!r} and are to be scored with "
                f"{now[name]!r}: examples that were explained could be scored; leave it as it was, or explain again"
            )
    return config.selection


async def score_from(
    config: ScoreConfig,
    source: Source,
    scorers: Sequence[Scorer],
    engine: Engine | None,
    *,
    embedder: Embedder | None = None,
    progress: bool | OnProgress | None = None,
    stop: StopFlag | None = None,
) -> RunReport:
    """Grade explanations with an opened source, scorers, judge and embedder."""
    folder = ResultsFolder.create(
        config.results, store_id=source.store_id, provenance={"store": source.path}, outgrown=source.outgrown
    )
    explainer = folder.explainer(config.explainer)
    for scorer in scorers:
        await check_needs("scorer", scorer.name, scorer.needs, engine, embedder)
    coders = choose_coders(config.coders, source)
    for coder in coders:
        folder.register_coder(coder, source.coder_ids[coder])
    plan = read_plan(folder)
    scope = wanted_latents(config, source)
    if scope is None and config.coders:
        scope = plan.latents(coders)
    items = plan.items("score", scope)
    if not items.num_wanted:
        raise ConfigError(f"{folder.path} has none of these latents in its plan; run `autointerp explain` on them first")
    explanations = Explanations(folder, explainer, plan)
    chosen = sampled(map(source.statistics, plan.coders), config.control_latents, seed=source.selection.seed)
    sample = keys_of(chosen)
    works = []
    for scorer in scorers:
        for control in (None, *controls_for(config.controls, explainer, scorer)):
            judged = control_scorer(scorer, control)
            method = score_method(source, explainer, scorer, engine, control, embedder=embedder, sample=chosen)
            works.append(ScoreWork(source, judged, method, explanations, embedder, sample if control in SAMPLED else None))
    for work in works:
        folder.register(work.method)
        folder.record_sample(work.method)
    folder.record_run("score", describe_run("score", config))
    run_on_sample = {work.method.control for work in works if work.method.control in SAMPLED}
    notes = sample_gaps(config, source, plan, scope, run_on_sample)
    for note in notes:
        logger.warning("%s", note)
    leases = Leases(folder.leases, expiry_s=config.lease_expiry_s)
    try:
        report = await run_works(
            config,
            folder,
            works,
            items,
            engine=engine,
            read_examples=source.select,
            expect=source.expect,
            requests_per_latent=8,
            leases=leases,
            progress=progress,
            stop=stop,
        )
        return replace(report, notes=notes)
    finally:
        leases.close()


def sample_gaps(
    config: ScoreConfig, source: Source, plan: Plan, scope: Mapping[str, np.ndarray] | None, controls: Iterable[str | None]
) -> tuple[str, ...]:
    """Return a sentence on each coder of which the sampled ones among `controls` are run on fewer latents than could be."""
    planned = plan.latents(plan.coders, only_requested=True)
    wanted = planned if scope is None else {c: np.intersect1d(scope[c], planned[c]) for c in planned if c in scope}
    names = [control for control in controls if control in SAMPLED]
    return gaps(names, wanted, map(source.statistics, wanted), config.control_latents, seed=source.selection.seed)


def score_method(
    source: Source,
    explainer: Method,
    scorer: Scorer,
    engine: Engine | None,
    control: str | None,
    *,
    embedder: Embedder | None = None,
    sample: Mapping[str, np.ndarray] | None = None,
) -> Method:
    """Return the identity of a scorer: itself, its judge or embedder, what it grades, its examples, and the control.

    One that needs no explanation has no part in the explainer: its rows lie under ``latent``, the same for every explainer.
    Under a control it holds the scorer's own identity, so that each scorer's controls are apart from those of its other
    settings and judges, even where rules judge both. `sample`: latents of each coder that a sampled control is run on;
    recorded, and no part of the identity.
    """
    base = score_method(source, explainer, scorer, engine, None, embedder=embedder).id if control is not None else None
    scorer = control_scorer(scorer, control)
    judge = engine if scorer.needs.engine else None
    embeds = embedder.id if scorer.needs.embedder and embedder is not None else None
    recorded = {}
    if sample is not None and control in SAMPLED:
        recorded["sample"] = {coder: latents.tolist() for coder, latents in sample.items()}
    return Method(
        stage="score",
        name=scorer.name,
        model=judge.id.model if judge is not None else embeds or "rule",
        control=control,
        control_of=base,
        explainer=explainer.label if scorer.needs.explanation else LATENT,
        identity={
            **({"explainer_id": explainer.id} if scorer.needs.explanation else {}),
            **({"embedder": embeds} if scorer.needs.embedder else {}),
            "scorer": scorer.name,
            "settings": dict(scorer.identity()),
            "judge": engine_identity(judge),
            "control": control,
            **({"control_of": base} if base is not None else {}),
            "selection": selection_digest(source.selection),
            **control_identity(control),
        },
        settings={"selection": source.selection.identity()} | recorded,
    )


class Explanations:
    """The explanations of one explainer by latent, read shard by shard; a few shards are kept in memory."""

    def __init__(self, folder: ResultsFolder, explainer: Method, plan: Plan) -> None:
        self._folder, self.explainer = folder, explainer
        self._shard_of: Callable[[Key], int | None] = plan.explained_in()
        self._lock = threading.Lock()
        self._shards: OrderedDict[int, dict[Key, list[Explanation]]] = OrderedDict()

    def of(self, key: Key) -> list[Explanation]:
        """Return the rows of a latent to grade: its usable ones; without any, one that says why; empty before it is explained.

        What an explainer wrote on the way to another explanation, and did not choose, is not graded.
        """
        shard = self._shard_of(key)
        if shard is None:
            return []
        with self._lock:
            rows = self._rows(shard).get(key, [])
        return [row for row in rows if row.status == "ok"] or rows[:1]

    def _rows(self, shard: int) -> dict[Key, list[Explanation]]:
        if shard not in self._shards:
            rows: dict[Key, list[Explanation]] = {}
            path = self._folder.table("explanations", self.explainer, shard)
            if path.exists():
                for row in tables.explanations_from(tables.read_parquet(path)):
                    rows.setdefault((row.coder, row.latent), []).append(row)
            self._shards[shard] = rows
            while len(self._shards) > _CACHED_SHARDS:
                self._shards.popitem(last=False)
        self._shards.move_to_end(shard)
        return self._shards[shard]


class ScoreWork:
    """What the runner does with one latent for one scorer and control."""

    def __init__(
        self,
        source: Source,
        scorer: Scorer,
        method: Method,
        explanations: Explanations,
        embedder: Embedder | None = None,
        sample: frozenset[Key] | None = None,
    ) -> None:
        """`sample`: the latents to work on; None = all."""
        self.method = method
        self._sample = sample
        self._explainer = explanations.explainer.name if scorer.needs.explanation else LATENT
        self._embedder = embedder if scorer.needs.embedder else None
        self._source, self._scorer, self._explanations = source, scorer, explanations

    def wants(self, key: Key) -> bool:
        return self._sample is None or key in self._sample

    def is_ready(self, key: Key) -> bool:
        partner = self._partner(key)
        return bool(self._own(key)) and (partner is None or bool(self._explanations.of(partner)))

    def without_examples(self, key: Key) -> LatentExamples:
        return empty_latent(self._source, key)

    def before_commit(self, shard: int, keys: Iterable[Key]) -> None:
        """Do nothing: this stage writes nothing but rows."""

    def without_result(self, latent: LatentExamples, status: Status) -> ShardRows:
        own = self._own((latent.coder, latent.latent))
        return ShardRows(scores=[score for row in own for score in self._empty(latent, row, status)])

    async def process(self, latent: LatentExamples, engine: Engine | None) -> ShardRows:
        key = (latent.coder, latent.latent)
        own = self._own(key)
        unusable = [row for row in own if row.status != "ok"]
        rows = ShardRows(scores=[score for row in unusable for score in self._empty(latent, row, row.status)])
        if len(unusable) == len(own):
            return rows
        judge = engine if self._scorer.needs.engine else None
        resources = Resources(
            vocabulary=self._source.vocabulary, seed=self._source.selection.seed, engine=judge, embedder=self._embedder
        )
        graded = [row for row in own if row.status == "ok"]
        if self.method.control is not None and self._scorer.needs.explanation:
            theirs = await self._theirs(self.method.control, latent, resources)
            graded = [row for row in theirs if row.status == "ok"]
            if not graded:
                # A partner that a later run may explain leaves this latent for that run.
                may_come = any(row.status in RETRYABLE for row in theirs)
                status: Status = "no_reply" if may_come else "not_applicable"
                why = f"the control {self.method.control} has no explanation to put in place of the latent's"
                rows.scores += self._empty(latent, None, status, reason=why)
        for row in graded:
            rows.extend(await self._score(latent, row, resources))
        return rows

    async def _theirs(self, control: str, latent: LatentExamples, resources: Resources) -> list[Explanation]:
        """Return the explanations that a control puts in place of the latent's own."""
        if control in SAMPLED:
            return await own_explanations(control, latent, resources)
        partner = self._partner((latent.coder, latent.latent))
        return self._explanations.of(partner) if partner is not None else []

    async def _score(self, latent: LatentExamples, row: Explanation, resources: Resources) -> ShardRows:
        result = await self._scorer.score(latent, row, resources, control=self.method.control)
        filled: dict[str, Any] = {
            "coder": latent.coder,
            "latent": latent.latent,
            "explanation_id": row.explanation_id,
            "scorer": self.method.name,
            "scorer_id": self.method.id,
            "control": self.method.control,
        }
        return ShardRows(
            verdicts=[replace(verdict, **filled) for verdict in result.verdicts],
            scores=[
                replace(
                    score,
                    **filled,
                    base_id=self.method.base_id,
                    selection_id=latent.selection_id,
                    explainer=self._explainer,
                )
                for score in result.scores
            ],
        )

    def _own(self, key: Key) -> list[Explanation]:
        """Return the rows to grade: the latent's explanations, or a blank one for a scorer that needs none."""
        return self._explanations.of(key) if self._scorer.needs.explanation else [_blank(key)]

    def _partner(self, key: Key) -> Key | None:
        if self.method.control != "shuffled" or not self._scorer.needs.explanation:
            return None
        partner = int(np.asarray(self._source.partners(key[0]))[key[1]])
        return (key[0], partner) if partner >= 0 else None

    def _empty(
        self, latent: LatentExamples, row: Explanation | None, status: Status, *, reason: str | None = None
    ) -> list[Score]:
        """The rows of a latent without a score: of the headline metric and each source, so that coverage can be read."""
        wanted = self._source.selection.negative_sources
        known = getattr(self._scorer, "sources", None)
        empty = Score(
            coder=latent.coder,
            latent=latent.latent,
            explanation_id=row.explanation_id if row is not None else "",
            scorer=self.method.name,
            scorer_id=self.method.id,
            base_id=self.method.base_id,
            selection_id=latent.selection_id,
            control=self.method.control,
            judge=self.method.model,
            explainer=self._explainer,
            metric=str(getattr(self._scorer, "headline", "balanced_accuracy")),
            is_headline=True,
            negatives="none",
            quantile=None,
            status=status,
            value=None,
            ci_low=None,
            ci_high=None,
            ci_method="none",
            chance=None,
            disjoint=latent.disjoint,
            num_scored=0,
            reason=reason or (row.reason if row is not None else None),
        )
        return [replace(empty, negatives=source) for source in (known(wanted) if known is not None else wanted)]


def _blank(key: Key) -> Explanation:
    """What stands for an explanation where none is needed."""
    return Explanation(coder=key[0], latent=key[1], explainer=LATENT, explainer_id="", selection_id="", status="ok", text=None)
