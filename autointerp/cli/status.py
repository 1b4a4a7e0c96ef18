"""``autointerp status``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("status")
@click.argument("results", type=click.Path(path_type=Path))
def command(results: Path) -> None:
    r"""Say what a results folder holds and what is left to do, from the folder alone.

    \b
    Example:  watch -n 30 autointerp status results/gpt2
    """
    from autointerp.jobs.status import status

    click.echo(status(results).text())
