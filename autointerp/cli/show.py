"""``autointerp show``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from autointerp.errors import InputError


@click.command("show")
@click.argument("results", type=click.Path(path_type=Path))
@click.argument("latent", required=False, metavar="[CODER/LATENT]")
def command(results: Path, latent: str | None) -> None:
    r"""Print one latent: explanation, scores, contexts; without a latent, the table of scores.

    \b
    Example:  autointerp show results/demo sae/17
    """
    from autointerp.reports.terminal import show_latent, summary_table

    if latent is None:
        click.echo(summary_table(results))
        return
    coder, slash, index = latent.rpartition("/")
    if not slash or not index.isdigit():
        raise InputError(f"{latent!r} does not name a latent; expected CODER/LATENT, such as sae/17")
    click.echo(show_latent(results, coder, int(index), colour=sys.stdout.isatty()))
