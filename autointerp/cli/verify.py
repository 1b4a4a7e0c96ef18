"""``autointerp verify``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from autointerp.cli.options import bundled_source
from autointerp.errors import ConfigError, InputError


@click.command("verify")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--contents", is_flag=True, help="Of a store: also compute statistics anew and read every table beside the activations."
)
@click.option(
    "--rerun", "num_contexts", type=click.IntRange(min=1), metavar="N", help="Of a store: run N contexts again and compare."
)
@click.option("--subject", metavar="MODEL", help="The store's subject, for --rerun.")
@click.option("--revision", help="Revision of the subject.")
@click.option("--coder", "coders", multiple=True, metavar="NAME=SOURCE", help="Where a coder's weights are now, for --rerun.")
@click.option("--device", default="auto", show_default=True, help="Where --rerun runs.")
def command(
    folder: Path,
    contents: bool,
    num_contexts: int | None,
    subject: str | None,
    revision: str | None,
    coders: tuple[str, ...],
    device: str,
) -> None:
    r"""Check a store or a results folder: markers, row counts, digests, order.

    Prints one line per problem and ends with exit code 2 when there is any.

    \b
    Everything that can be checked:  autointerp verify cache/gpt2 --contents --rerun 8 --subject openai-community/gpt2
    """
    if (num_contexts is None) != (subject is None):
        raise ConfigError("--rerun N and --subject MODEL go together: contexts are run through the subject again")
    if (folder / "manifest.json").exists():
        if contents:
            from autointerp.store.contents import verify_contents as check
        else:
            from autointerp.store import verify_store as check
        problems = check(folder)
        if num_contexts is not None and not problems:
            from autointerp.jobs.rerun import rerun

            weights = {name: str(bundled_source(source)) for name, _, source in (text.partition("=") for text in coders)}
            model = str(bundled_source(subject or ""))
            problems = rerun(folder, model, num_contexts=num_contexts, revision=revision, device=device, weights=weights)
    elif contents or num_contexts is not None:
        raise InputError(f"{folder} is no store (it has no manifest.json); --contents and --rerun are for stores")
    elif (folder / "results.json").exists():
        from autointerp.jobs.verify import verify

        problems = verify(folder)
    else:
        raise InputError(f"{folder} is neither a store (manifest.json) nor a results folder (results.json); name one of these")
    for problem in problems:
        click.echo(problem)
    click.echo(f"{folder}: {'no problem found' if not problems else f'{len(problems)} problems found'}")
    sys.exit(2 if problems else 0)
