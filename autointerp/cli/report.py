"""``autointerp report``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("report")
@click.argument("results", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Where to write.  [default: RESULTS/report]")
@click.option("--limit", type=int, help="Most latent pages.  [default: all]")
def command(results: Path, out: Path | None, limit: int | None) -> None:
    """Write static pages: an index, and a page per latent with its contexts, explanation and scores.

    They open from disk, without a network. The headline scores are printed, controls below the coder they are of.
    """
    from autointerp.reports import report
    from autointerp.reports.terminal import summary_table

    click.echo(summary_table(results))
    click.echo(f"report: {report(results, out, limit=limit)}")
