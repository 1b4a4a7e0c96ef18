"""``autointerp explain``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from autointerp.cli.options import (
    EXPLAINERS,
    bundled_source,
    engine_flags,
    engine_options,
    resolve,
    settings_options,
    stage_options,
)


@click.command("explain")
@click.argument("store", type=click.Path(path_type=Path), required=False)
@click.option(
    "--out", "results", type=click.Path(path_type=Path), help="Results folder to write or add to.  [default: results/STORE]"
)
@click.option(
    "--explainer",
    help=EXPLAINERS,
)
@click.option(
    "--control/--no-control",
    "control",
    default=True,
    help="Also explain the partners that the shuffled control will swap in.  [default: on]",
)
@stage_options
@engine_options
@settings_options
def command(
    store: Path | None, config_file: Path | None, settings: tuple[str, ...], control: bool, engine: str | None, **flags: Any
) -> None:
    r"""Write explanations of latents.

    \b
    No LLM:          autointerp explain cache/demo --explainer lexical --latents random:300
    A local server:  autointerp explain cache/gpt2 --engine openai:MODEL@http://localhost:8000/v1 --latents all
    More, later:     autointerp explain cache/gpt2 --engine ... --latents random:1000 --out results/gpt2
    Best of eight:   autointerp explain cache/gpt2 --engine ... --explainer best_of:8 --set judge=openai:OTHER@URL

    best_of and refine let the judge (the engine, unless another is named) choose on windows that are never scored.

    Latents: 0-99 | 3,7,9 | random:500 | density:1e-5..1e-2 | all | a list file. Run again with more latents to add to a folder;
    what is there is kept. The same command resumes after a kill, and several of them share the work (--worker 0/4).
    """
    from autointerp.jobs.explain import ExplainConfig, explain

    if store is not None:
        flags["store"] = str(bundled_source(store))
        flags["results"] = flags["results"] or Path("results") / store.name
    flags |= engine_flags(engine, flags)
    flags["controls"] = ("shuffled",) if control else None
    values = resolve("explain", config_file, settings, flags)
    report = explain(ExplainConfig.parse(values, where="explain"))
    click.echo(report.sentence())
    sys.exit(report.exit_code)
