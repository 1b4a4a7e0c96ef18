"""``autointerp score``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from autointerp.cli.options import SCORERS, engine_flags, engine_options, judged_by, resolve, settings_options, stage_options


@click.command("score")
@click.argument("results", type=click.Path(path_type=Path), required=False)
@click.option("--scorer", "scorers", multiple=True, help=SCORERS)
@click.option("--judge", type=click.Choice(["engine", "rule"]), help="Ask the engine, or apply explanations that carry a rule.")
@click.option("--embedder", metavar="SPEC", help="For scorers that compare texts by embeddings: a name or module:Class.")
@click.option("--explainer", help="Whose explanations; a name or a folder's name.  [default: the only one]")
@click.option("--store", type=click.Path(path_type=Path), help="The store, where it has moved.")
@click.option(
    "--control/--no-control", "control", default=True, help="Also judge controls: shuffled, generic, lexical.  [default: on]"
)
@stage_options
@engine_options
@settings_options
def command(
    config_file: Path | None, settings: tuple[str, ...], control: bool, judge: str | None, engine: str | None, **flags: Any
) -> None:
    r"""Grade the explanations of a results folder.

    \b
    No LLM:         autointerp score results/demo --judge rule
    LLM judge:      autointerp score results/gpt2 --engine openai:MODEL@http://localhost:8000/v1
    Probabilities:  autointerp score results/gpt2 --engine ... --set options.detection.mode=labels
    Everything:     autointerp score results/gpt2 --engine ... --embedder ... --scorer all

    Every score is beside its interval, its chance level and, with the controls, the same score under another latent's
    explanation, a generic sentence and a rule learned without an LLM; the last two on a sample of 200 latents.
    """
    from autointerp.jobs.score import ScoreConfig, score
    from autointerp.jobs.score_controls import CONTROLS

    flags |= engine_flags(engine, flags)
    flags["controls"] = CONTROLS if control else None
    if judge is not None:
        flags["options"] = judged_by(judge, flags["scorers"])
    values = resolve("score", config_file, settings, flags)
    report = score(ScoreConfig.parse(values, where="score"))
    click.echo(report.sentence())
    sys.exit(report.exit_code)
