"""``autointerp import``."""

from __future__ import annotations

from pathlib import Path

import click


@click.group("import")
def command() -> None:
    """Turn what other tools recorded into a store."""


@command.command("delphi")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The store to write.")
@click.option("--tokenizer", metavar="NAME", help="Folder or hub id.  [default: the model that the cache names]")
def delphi(folder: Path, out: Path, tokenizer: str | None) -> None:
    r"""Make a store of a latent cache of EleutherAI's delphi.

    \b
    Example:  autointerp import delphi results/pythia/latents --out cache/pythia
              autointerp explain cache/pythia --explainer lexical --latents random:100

    FOLDER is a run folder, its `latents` folder, or one module's. Each module becomes a coder. What delphi does not record (the
    subject's weights, documents) is said to be unknown in the manifest; nothing can be added to such a store.
    """
    from autointerp.cli.options import bundled_source
    from autointerp.jobs.import_delphi import import_delphi

    source = None if tokenizer is None else str(bundled_source(tokenizer))
    click.echo(f"store: {import_delphi(folder, out, tokenizer=source)}")
