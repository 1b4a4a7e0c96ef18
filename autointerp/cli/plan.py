"""``autointerp plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from autointerp.cli.options import (
    EXPLAINERS,
    SCORERS,
    bundled_source,
    engine_flags,
    engine_options,
    judged_by,
    resolve,
    settings_options,
    stage_options,
)


@click.command("plan")
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "--out", "results", type=click.Path(path_type=Path), help="The results folder, if there is one.  [default: results/STORE]"
)
@click.option("--explainer", help=EXPLAINERS)
@click.option("--scorer", "scorers", multiple=True, help=SCORERS)
@click.option("--embedder", metavar="SPEC", help="For scorers that compare texts by embeddings: a name or module:Class.")
@click.option("--control/--no-control", "control", default=True, help="Count the controls, too.  [default: on]")
@click.option("--sample", type=int, default=32, show_default=True, help="Latents whose requests are built and counted.")
@stage_options
@engine_options
@settings_options
def command(
    store: Path,
    config_file: Path | None,
    settings: tuple[str, ...],
    scorers: tuple[str, ...],
    embedder: str | None,
    control: bool,
    sample: int,
    engine: str | None,
    **flags: Any,
) -> None:
    r"""Count requests, tokens, cost and disk of explaining and scoring, before anything is spent. Nothing is sent.

    \b
    Example:  autointerp plan cache/gpt2 --engine openai:MODEL@URL --latents random:10000 \\
                --set engine_options.prices.input=0.1 --set engine_options.prices.output=0.4

    The requests of a seeded sample of latents are built and counted; what is done in the results folder already is left out.
    Settings of the score stage may be given, too: --set control_latents=500, --set score.options.detection.mode=labels.
    """
    from autointerp.jobs.cost import plan_pipeline
    from autointerp.jobs.explain import ExplainConfig
    from autointerp.jobs.score import ScoreConfig
    from autointerp.jobs.score_controls import CONTROLS

    def is_scoring(setting: str) -> bool:
        key = setting.partition("=")[0].strip()
        root = key.partition(".")[0]
        return root == "score" or (root in ScoreConfig.model_fields and root not in ExplainConfig.model_fields)

    of_score = tuple(setting for setting in settings if is_scoring(setting))
    settings = tuple(setting for setting in settings if setting not in of_score)
    flags["store"] = str(bundled_source(store))
    flags["results"] = flags["results"] or Path("results") / store.name
    flags |= engine_flags(engine, flags)
    flags["controls"] = CONTROLS if control else None
    config = ExplainConfig.parse(resolve("explain", config_file, settings, flags), where="plan")
    options = config.engine_options.model_dump()
    scoring: dict[str, Any] = {"engine": config.engine, "engine_options": options, "controls": config.controls}
    scoring["embedder"] = embedder
    if scorers:
        scoring["scorers"] = scorers
    if config.engine is None:
        scoring["options"] = judged_by("rule", scorers)
    estimates = plan_pipeline(config, resolve("score", None, of_score, scoring), sample=sample)
    for estimate in estimates:
        click.echo(estimate.text())
    total = sum(estimate.requests.value for estimate in estimates)
    tokens = sum(estimate.prompt_tokens.value for estimate in estimates)
    cost = sum(estimate.cost.value for estimate in estimates)
    disk = sum(estimate.disk_bytes for estimate in estimates)
    texts = sum(estimate.embedded_texts.value for estimate in estimates if estimate.embedded_texts is not None)
    priced = (f", {texts:,.0f} texts to embed" if texts else "") + (f", cost {cost:.2f}" if cost else "")
    click.echo(f"in all: {total:,.0f} requests, {tokens:,.0f} prompt tokens{priced}, {disk / 1e6:.1f} MB of results")
