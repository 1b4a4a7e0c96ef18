"""The ``autointerp`` command: one file per subcommand, imported only when it is used.

Owns the exit codes: 0 all scored, 1 a bug, 2 a user error (one line), 3 finished with unscored items or partial shards, 4
stopped by the server, 130 interrupted.
"""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from inspect import cleandoc
from keyword import iskeyword

import click

from autointerp import __version__
from autointerp.cli.options import RedactKeys
from autointerp.errors import AutointerpError, nearest

COMMANDS: dict[str, str] = {
    "demo": "Run the whole pipeline on the bundled model; no LLM, no network.",
    "cache": "Run a subject model over a corpus and record where each latent fires.",
    "import": "Turn what other tools recorded into a store.",
    "coder": "Look at a sparse coder; check that it is read right.",
    "explain": "Write explanations of latents.",
    "score": "Grade explanations.",
    "run": "Run the stages that a TOML file describes.",
    "plan": "Count requests, tokens, cost and disk before anything is spent.",
    "status": "Say what a results folder holds and what is left to do.",
    "tables": "Compute neighbours, statistics, logits or embeddings beside a store's activations.",
    "verify": "Check a store or a results folder against its digests.",
    "report": "Write static pages to look at, readable offline.",
    "calibrate": "Measure scorers and judges on explanations of known quality.",
    "compare": "Compare explainers, prompts, coders, controls or judges on the same latents.",
    "show": "Print one latent: explanation, scores, contexts.",
}
"""Name and short help of each command, so that ``--help`` imports none of them."""


def _with_line_breaks(command: click.Command) -> click.Command:
    """Turn the line "backslash b" of raw docstrings into what makes click leave a paragraph's lines as they are."""
    if command.help:
        command.help = cleandoc(command.help).replace("\n\\b\n", "\n\n\b\n").replace("\\\\", "\\")
    if isinstance(command, click.Group):
        for child in command.commands.values():
            _with_line_breaks(child)
    return command


class LazyGroup(click.Group):
    """A group that knows its commands' names and imports one only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = f"{cmd_name}_" if iskeyword(cmd_name) else cmd_name
        command: click.Command = import_module(f"autointerp.cli.{module}").command
        return _with_line_breaks(command)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(f"no such command {args[0]!r}; {nearest(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="autointerp")
@click.option("-v", "--verbose", count=True, help="Say more; twice for debugging.")
@click.option("-q", "--quiet", is_flag=True, help="Only warnings and errors.")
def cli(verbose: int, quiet: bool) -> None:
    r"""Explain the latents of sparse coders in words, and measure how far the words can be trusted.

    \b
    A first look, on the bundled model:     autointerp demo
    Your own model, in four commands:
      autointerp cache --subject MODEL --corpus DATASET --coder NAME=SOURCE --out cache/NAME
      autointerp explain cache/NAME --out results/NAME --engine openai:MODEL@URL --latents random:300
      autointerp score results/NAME --engine openai:MODEL@URL
      autointerp report results/NAME
    """
    level = logging.WARNING if quiet else (logging.DEBUG if verbose > 1 else logging.INFO)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(RedactKeys())
    logger = logging.getLogger("autointerp")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


_with_line_breaks(cli)


def main(args: list[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code."""
    try:
        code = cli.main(args=args, prog_name="autointerp", standalone_mode=False)
    except click.exceptions.Abort:
        code = 130
    except click.ClickException as error:
        error.show()
        code = 2
    except AutointerpError as error:
        click.echo(f"autointerp: {error}", err=True)
        code = error.exit_code
    except KeyboardInterrupt:
        click.echo("autointerp: interrupted; run the same command again to go on", err=True)
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
