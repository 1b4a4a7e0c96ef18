"""``autointerp calibrate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from autointerp.cli.options import engine_flags, engine_options, resolve, settings_options


@click.command("calibrate")
@click.option(
    "--store", type=click.Path(path_type=Path), default=Path("cache/planted"), show_default=True, help="Planted store to write."
)
@click.option(
    "--out", "results", type=click.Path(path_type=Path), default=Path("results/planted"), show_default=True,
    help="Results folder; a second measurement goes to one beside it.",
)  # fmt: skip
@click.option("--tokens", "num_tokens", type=int, help="Tokens of the standard library to plant in.  [default: 524288]")
@click.option("--latents", help="Which planted latents, such as random:20.  [default: all]")
@click.option(
    "--scorer", "scorers", multiple=True, help="A registered scorer or module:Class; may be repeated.  [default: all]"
)
@click.option(
    "--negatives", multiple=True,
    help="A source of negatives; may be repeated.  [default: random, same_token, neighbour_cooccurrence]",
)  # fmt: skip
@click.option("--embedder", metavar="SPEC", help="For scorers that compare texts by embeddings: a name or module:Class.")
@click.option("--noise/--no-noise", "with_noise", default=True, help="Score every level of noise.  [default: on]")
@click.option("--retest/--no-retest", "with_retest", default=True, help="Measure again on other windows.  [default: on]")
@click.option(
    "--probabilities/--no-probabilities", "with_probabilities", default=True,
    help="Also ask an engine for label probabilities of true explanations, one request per example.  [default: on]",
)  # fmt: skip
@click.option(
    "--plan", "only_plan", is_flag=True,
    help="Only say what the engine would be asked: requests, tokens, cost. Writes store and explanations; nothing is sent.",
)  # fmt: skip
@engine_options
@settings_options
def command(config_file: Path | None, settings: tuple[str, ...], engine: str | None, only_plan: bool, **flags: Any) -> None:
    r"""Measure how well scorers and judges tell good explanations from bad ones.

    \b
    No LLM:          autointerp calibrate
    An LLM judge:    autointerp calibrate --engine openai:MODEL@URL --latents random:20 --no-retest
    What it takes:   the same with --plan

    Latents are planted by known rules over the standard library, with explanations written by hand that are true, paraphrased,
    too broad, too narrow, a neighbour's or wrong. Every registered scorer takes part that rules or the engine can judge. Run it
    again with another engine, and both stand in one table.
    """
    from autointerp.studies.calibrate import CalibrateConfig, calibrate, plan_calibration
    from autointerp.studies.calibrate_cost import price_text
    from autointerp.studies.calibration import FILE, sections, text_of, write_calibration

    flags |= engine_flags(engine, flags)
    config = CalibrateConfig.parse(resolve("calibrate", config_file, settings, flags), where="calibrate")
    if only_plan:
        found = plan_calibration(config)
        click.echo(price_text(found) if found else "no engine is asked; give --engine")
        return
    reports = calibrate(config)
    frame, page = write_calibration(config.results)
    click.echo(text_of(sections(frame)))
    click.echo(f"table: {page.with_name(FILE)}")
    click.echo(f"page:  {page}")
    sys.exit(max(report.exit_code for report in reports))
