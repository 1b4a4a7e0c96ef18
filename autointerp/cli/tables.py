"""``autointerp tables``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from autointerp.cli.options import bundled_source

_KINDS = ("cooccurrence", "decoder", "encoder")


@click.command("tables")
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "--coder", "coders", multiple=True, metavar="NAME[=SOURCE]", help="Only this coder, and where its weights are now."
)
@click.option(
    "--neighbours",
    multiple=True,
    type=click.Choice([*_KINDS, "all"]),
    help="Nearest latents, by firing together or by cosine of weights; may be repeated.",
)
@click.option("--k", type=click.IntRange(1, 65536), help="Neighbours kept of each latent.  [default: 250]")
@click.option("--statistics", is_flag=True, help="Value histograms, top tokens, entropy, position, the single-token test.")
@click.option("--subject", metavar="MODEL", help="The store's subject: tokens that each latent promotes and suppresses.")
@click.option("--revision", help="Revision of the subject.")
@click.option("--embedder", metavar="ID", help="Embed the store's windows, for the negatives `embedding`: all-MiniLM-L6-v2.")
@click.option("--window", type=int, help="Tokens of a window to embed.  [default: 32]")
@click.option("--min-window", type=int, help="Fewest tokens of a document's last window.  [default: 8]")
@click.option("--device", help="Where subject and embedder run.  [default: auto]")
def command(store: Path, neighbours: tuple[str, ...], **flags: Any) -> None:
    r"""Compute what lies beside the activations of a store; what is there already is left alone.

    \b
    Neighbours by co-firing and statistics:   autointerp tables cache/gpt2
    All neighbours, for hard negatives:       autointerp tables cache/gpt2 --neighbours all
    Promoted and suppressed tokens:           autointerp tables cache/gpt2 --subject openai-community/gpt2
    Embeddings, for harder negatives:         autointerp tables cache/gpt2 --embedder all-MiniLM-L6-v2
    """
    from autointerp.jobs.tables import TablesConfig, build_tables

    values = {name: value for name, value in flags.items() if value is not None}
    values |= {"store": store, "neighbours": _KINDS if "all" in neighbours else neighbours}
    if "subject" in values:
        values["subject"] = str(bundled_source(values["subject"]))
    values["coders"] = [_resolved(text) for text in flags["coders"]]
    for line in build_tables(TablesConfig.parse(values, where="tables")):
        click.echo(line)


def _resolved(text: str) -> str:
    name, equals, source = text.partition("=")
    return f"{name}{equals}{bundled_source(source)}" if equals else name
