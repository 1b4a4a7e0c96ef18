"""``autointerp status``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("status")
@click.argument("folder", type=click.Path(path_type=Path))
def command(folder: Path) -> None:
    r"""Say what a results folder or a store holds and what is left to do, from the folder alone.

    \b
    Example:  watch -n 30 autointerp status results/gpt2
    """
    from autointerp.jobs.status import status
    from autointerp.store.progress import is_store, store_status

    click.echo(store_status(folder) if is_store(folder) else status(folder).text())
