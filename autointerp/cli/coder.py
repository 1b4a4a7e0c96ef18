"""``autointerp coder inspect`` and ``autointerp coder check``."""

from __future__ import annotations

import sys
from typing import Any

import click

from autointerp.cli.options import bundled_source, token_count


@click.group("coder")
def command() -> None:
    """Look at a sparse coder, and check that it is read right."""


@command.command("inspect")
@click.argument("source")
@click.option("--hookpoint", help="Which coder, where SOURCE holds several.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def inspect(source: str, hookpoint: str | None, as_json: bool) -> None:
    r"""Say what SOURCE is: format, sizes, activation, hook, input rules, bias rule, and what no file states.

    \b
    autointerp coder inspect bundled:skip-transcoder
    autointerp coder inspect google/gemma-scope-2b-pt-res:layer_12/width_16k/average_l0_82
    """
    import orjson

    from autointerp.coders.load import load_coder

    described = load_coder(bundled_source(source), hookpoint=hookpoint).describe()
    if as_json:
        click.echo(orjson.dumps(described, option=orjson.OPT_INDENT_2).decode())
        return
    inferred = described.pop("inferred")
    notes = described.pop("notes")
    reading = described.pop("reading")
    width = max(len(name) for name in (*described, *reading)) + 2
    for name, value in described.items():
        origin = f"   (inferred from {inferred[name]})" if name in inferred else ""
        click.echo(f"{name:<{width}}{_shown(value)}{origin}")
    click.echo("reading:")
    for name, value in reading.items():
        origin = f"   (inferred from {inferred[name]})" if name in inferred else ""
        click.echo(f"  {name:<{width}}{_shown(value)}{origin}")
    for note in notes:
        click.echo(f"note: {note}")


@command.command("check")
@click.argument("source")
@click.option("--subject", required=True, metavar="MODEL", help="Folder or hub id of the model it was trained on.")
@click.option(
    "--corpus", default="stdlib", metavar="SOURCE", show_default=True, help="As for cache; text like its training text."
)
@click.option("--tokens", callback=token_count, default="16k", metavar="N", show_default=True, help="Tokens to check on.")
@click.option("--ctx-len", type=int, default=256, show_default=True, help="Tokens per context.")
@click.option("--hookpoint", help="Where it reads.  [default: what its files say]")
@click.option("--device", default="auto", show_default=True)
@click.option("--dtype", default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def check(source: str, corpus: str, tokens: int, ctx_len: int, as_json: bool, **values: Any) -> None:
    r"""Check that SOURCE is read right on a subject; exit with 3 and name the checks that fail.

    \b
    l0      active latents per token against what was declared    fvu    fraction of variance unexplained
    dead    latents that never fire                               loss   cross-entropy with the coder spliced in
    bias, scale, gain, side: no other reading of the same weights (bias once more or less, another input scale, the norm's
    gain in or out, the module's other side) fits much better.    splice the same loss with the error term added

    autointerp coder check bundled:sae --subject bundled:model
    """
    import orjson

    from autointerp.jobs.check import check_coder

    report = check_coder(
        {
            "source": str(bundled_source(source)),
            "corpus": {"source": corpus, "num_tokens": tokens, "ctx_len": ctx_len},
            **{name: value for name, value in values.items() if name != "subject" and value is not None},
            "subject": str(bundled_source(values["subject"])),
        }
    )
    found = report.fidelity
    if as_json:
        click.echo(orjson.dumps({"site": report.site, "fidelity": found, "checks": report.checks}).decode())
    else:
        click.echo(
            f"{report.spec.format}, {report.spec.width:,} latents, reads {report.site.hookpoint}, predicts {report.site.target}"
        )
        if found.kl is not None:
            click.echo(
                f"KL(clean || spliced) {found.kl:.4f} nats per token, loss with the error term {found.loss_with_error:.4f}"
            )
        for item in report.checks:
            mark = {True: "ok", False: "FAILED", None: "-"}[item.is_passed]
            click.echo(f"{item.name:<8}{mark:<8}{item.finding}")
    if report.failed:
        names = ", ".join(item.name for item in report.failed)
        click.echo(f"failed: {names}; the coder is not read as it was trained, or not put where it was", err=True)
        sys.exit(3)


def _shown(value: Any) -> str:
    if value is None:
        return "not stated"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)
