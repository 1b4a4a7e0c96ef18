"""``autointerp run``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from autointerp.cli.options import bundled_source
from autointerp.config import apply_settings, read_toml
from autointerp.errors import ConfigError, nearest

STAGES = ("cache", "explain", "score", "report")


@click.command("run")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--set", "settings", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a setting of the file; may be repeated."
)
def command(file: Path, settings: tuple[str, ...]) -> None:
    r"""Run the stages that a TOML file describes, in order: [cache], [explain], [score], [report].

    \b
    [cache]                                  [explain]
    subject = "bundled:model"                explainer = "lexical"
    corpus = { source = "stdlib" }           latents = "random:300"
    coders = [{ name = "sae", source = "bundled:sae" }]
    out = "cache/mine"                       [score]
    \b
    `results` and `store` of later stages default to those of earlier ones. The same command resumes what was interrupted.
    """
    sections = apply_settings(read_toml(file), settings)
    for name in sections:
        if name not in STAGES:
            raise ConfigError(f"{file} has an unknown section {name!r}; {nearest(name, STAGES)}")
    if not sections:
        raise ConfigError(f"{file} has no section; expected some of {', '.join(STAGES)}")
    sys.exit(run_stages(sections))


def run_stages(sections: dict[str, dict[str, Any]]) -> int:
    """Run the stages that have a section; return the largest exit code."""
    code = 0
    store: Path | str | None = None
    results: Path | str | None = None
    if "cache" in sections:
        from autointerp.jobs.cache import CacheConfig, cache

        store = cache(CacheConfig.parse(with_bundled(sections["cache"]), where="cache"))
    if "explain" in sections:
        from autointerp.jobs.explain import ExplainConfig, explain

        inherited = {"store": store, "results": Path("results") / Path(store).name} if store else {}
        explain_config = ExplainConfig.parse({**inherited, **sections["explain"]}, where="explain")
        results = explain_config.results
        report = explain(explain_config)
        click.echo(report.sentence())
        code = max(code, report.exit_code)
    if "score" in sections:
        from autointerp.jobs.score import ScoreConfig, score

        report = score(ScoreConfig.parse({**({"results": results} if results else {}), **sections["score"]}, where="score"))
        click.echo(report.sentence())
        code = max(code, report.exit_code)
    if "report" in sections:
        from autointerp.reports import report as write

        values: dict[str, Any] = {**({"results": results} if results else {}), **sections["report"]}
        if "results" not in values:
            raise ConfigError("report lacks the key 'results'")
        click.echo(f"report: {write(values.pop('results'), **values)}")
    return code


def with_bundled(values: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of `cache` with ``bundled:NAME`` replaced by the folder it means."""
    result = dict(values)
    if isinstance(result.get("subject"), str):
        result["subject"] = str(bundled_source(result["subject"]))
    result["coders"] = [
        {**coder, "source": str(bundled_source(coder["source"]))} if isinstance(coder, dict) and "source" in coder else coder
        for coder in result.get("coders", [])
    ]
    return result
