"""The demo: cache, explain, score and report on the bundled model, with figures at the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autointerp.demo import bundled
from autointerp.errors import StoreError
from autointerp.jobs.cache import CacheConfig, cache
from autointerp.jobs.explain import ExplainConfig, explain
from autointerp.jobs.score import ScoreConfig, score
from autointerp.jobs.score_controls import CONTROLS as SCORE_CONTROLS
from autointerp.reports import report
from autointerp.reports.terminal import summary_table
from autointerp.results.load import load_verdicts
from autointerp.store import open_store

CODERS = ("sae", "skip-transcoder")
WITH_CONTROLS = ("sae", "sae-seed2", "skip-transcoder", "neurons")
CONTROLS = ("random-coder:sae", "reinit-matched:sae")
"""Matched: of the untrained model's own residual stream, whose spread is an 80th, 31 of the SAE's 2560 latents see anything."""
HOOKPOINTS = {"sae": "model.layers.2@out", "sae-seed2": "model.layers.2@out", "skip-transcoder": "model.layers.2.mlp@in"}
NEURONS = "neurons:model.layers.2.mlp"


def run_demo(
    *,
    store: Path,
    results: Path,
    num_tokens: int,
    latents: str,
    engine: str | None,
    say: Callable[[str], None],
    controls: bool = False,
) -> int:
    """Run every stage that is not done yet; return the largest exit code.

    `latents` are chosen in each coder. Without `engine` the lexical explainer writes and rules judge. `controls` adds a second
    seed, the neurons of the MLP, and two controls: random directions, and the SAE on the model with new weights.
    """
    started = time.monotonic()
    if controls:
        cache(CacheConfig.parse(cache_settings(store, num_tokens, WITH_CONTROLS, CONTROLS), where="demo"))
    else:
        cache(CacheConfig.parse(cache_settings(store, num_tokens), where="demo"))
    if not engine:
        explainer: dict[str, Any] = {"explainer": "lexical"}
        judge: dict[str, Any] = {"options": {name: {"judge": "rule"} for name in ("detection", "fuzzing")}}
    else:
        explainer, judge = {"explainer": "default", "engine": engine}, {"engine": engine}
    shared = {"results": str(results), "latents": latents, "controls": list(SCORE_CONTROLS)}
    reports = [
        explain(ExplainConfig.parse({"store": str(store), **shared, **explainer}, where="demo")),
        score(ScoreConfig.parse({**shared, **judge, "explainer": explainer["explainer"]}, where="demo")),
    ]
    for stage in reports:
        say(stage.sentence())
    page = results / "report" / "index.html"
    if not page.exists() or any(stage.num_latents for stage in reports):
        page = report(results)
    opened = open_store(store)
    say("")
    say(summary_table(results))
    say("")
    judged = load_verdicts(results, columns=["scorer", "control", "truth", "status"])
    judged = judged[judged.status == "ok"].fillna({"control": "no control"})
    for (scorer, control), rows in judged.groupby(["scorer", "control"]):
        say(f"judged:  {scorer}, {control}: {int(rows.truth.sum()):,} positives and {int((~rows.truth).sum()):,} negatives")
    say(f"store:   {store}  ({opened.num_tokens:,} tokens, coders {', '.join(opened.coder_names)})")
    say(f"results: {results}  (parquet; pandas.read_parquet('{results}/scores'))")
    say(f"report:  {page}")
    say(f"the work took {time.monotonic() - started:.1f} s")
    return max(stage.exit_code for stage in reports)


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
