"""``autointerp verify``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from autointerp.errors import InputError


@click.command("verify")
@click.argument("folder", type=click.Path(path_type=Path))
def command(folder: Path) -> None:
    """Check a store or a results folder: markers, row counts, digests, order.

    Prints one line per problem and ends with exit code 2 when there is any.
    """
    if (folder / "manifest.json").exists():
        from autointerp.store import verify_store

        problems = verify_store(folder)
    elif (folder / "results.json").exists():
        from autointerp.jobs.verify import verify

        problems = verify(folder)
    else:
        raise InputError(f"{folder} is neither a store (manifest.json) nor a results folder (results.json); name one of these")
    for problem in problems:
        click.echo(problem)
    click.echo(f"{folder}: {'no problem found' if not problems else f'{len(problems)} problems found'}")
    sys.exit(2 if problems else 0)
