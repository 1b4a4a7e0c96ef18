"""``autointerp demo``."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command("demo")
@click.option("--store", type=click.Path(path_type=Path), default=Path("cache/demo"), show_default=True, help="Store to write.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("results/demo"), show_default=True, help="Results folder.")
@click.option("--tokens", type=int, default=262_144, show_default=True, help="Tokens of held-out standard library to cache.")
@click.option("--latents", default="random:150", show_default=True, help="Latents of each coder.")
@click.option(
    "--controls",
    is_flag=True,
    help="Six coders in one table, by every scorer that needs no LLM: SAE, second seed, skip transcoder, neurons, random "
    "directions, untrained model.",
)
@click.option(
    "--scorer", "scorers", multiple=True,
    help="A scorer, or all whose needs are met; may be repeated.  [default: detection and fuzzing; with --controls all]",
)  # fmt: skip
@click.option(
    "--llm", "engine", metavar="SPEC", help="Let an LLM explain and judge, such as openai:MODEL@http://localhost:8000/v1."
)
def command(
    store: Path, out: Path, tokens: int, latents: str, controls: bool, scorers: tuple[str, ...], engine: str | None
) -> None:
    """Run the whole pipeline on the bundled model; no LLM, no network.

    Caches two sparse coders of a small language model over modules of Python's standard library that it never saw, explains
    random latents by rules found in the text, and scores them by detection and fuzzing beside a shuffled control. What is there
    is reused. With --controls: six coders side by side, each with its lift over shuffled explanations, the SAE also with that
    over its two control coders; scorers with an embedder take part where the extra `embed` is installed.
    """
    from autointerp.demo.run import run_demo

    code = run_demo(
        store=store, results=out, num_tokens=tokens, latents=latents, engine=engine, say=click.echo, controls=controls,
        scorers=scorers,
    )  # fmt: skip
    sys.exit(code)
