"""What several commands share: option decorators, settings by file and ``--set``, and keys kept out of logs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from autointerp.config import apply_settings, read_toml

F = TypeVar("F", bound=Callable[..., Any])
_UNITS = {"k": 1_000, "m": 1_000_000, "b": 1_000_000_000}


class RedactKeys(logging.Filter):
    """Keeps API keys out of every log line."""

    def filter(self, record: logging.LogRecord) -> bool:
        from autointerp.jobs.redact import redact

        record.msg, record.args = redact(record.getMessage()), None
        return True


def settings_options(function: F) -> F:
    """Add ``--config FILE`` and ``--set KEY=VALUE``."""
    function = click.option(
        "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any setting by its name in the file; may be repeated."
    )(function)
    return click.option(
        "--config", "config_file", type=click.Path(path_type=Path), help="A TOML file with this command's section."
    )(function)


def stage_options(function: F) -> F:
    """Add what explain and score share."""
    for option in (
        click.option(
            "--worker", metavar="I/N", help="This is worker I of N (0-based); SLURM array variables are read otherwise."
        ),
        click.option("--coder", "coders", multiple=True, help="Only this coder of the store; may be repeated."),
        click.option("--latents", help="Which latents; see above.  [default: all that is planned]"),
    ):
        function = option(function)
    return function


def engine_options(function: F) -> F:
    """Add the LLM engine and its limits."""
    for option in (
        click.option(
            "--max-cost", type=float, help="Stop cleanly before spending more; needs prices (--set engine_options.prices...)."
        ),
        click.option("--max-requests", type=int, help="Stop cleanly before sending more requests."),
        click.option("--concurrency", type=int, help="Most requests in flight.  [default: adapts]"),
        click.option("--engine", metavar="SPEC", help="openai:MODEL@URL[,URL] | vllm:MODEL | hf:MODEL | module:Class."),
    ):
        function = option(function)
    return function


def engine_flags(engine: str | None, flags: dict[str, Any]) -> dict[str, Any]:
    """Return the engine's flags under the names of the configuration; takes them out of `flags`."""
    limits = {name: flags.pop(name) for name in ("max_cost", "max_requests")}
    return {"engine": engine, "engine_options": {name: value for name, value in limits.items() if value is not None}}


EXPLAINERS = (
    "With an LLM: default, contrastive, activations_logits, best_of[:DRAWS], refine[:ROUNDS]; without: lexical, single_token, "
    "lookup; or module:Class.  [default: default]"
)
"""Help of ``--explainer``."""

SCORERS = (
    "detection, fuzzing, simulation, surprisal, embedding, intruder, example_embedding, saebench, delphi_detection, "
    "delphi_fuzzing, module:Class, or all whose needs are met; may be repeated.  [default: detection and fuzzing]"
)
"""Help of ``--scorer``."""

_DEFAULT = ("detection", "fuzzing")
_JUDGED_BY_RULE = (*_DEFAULT, "simulation", "saebench", "delphi_detection", "delphi_fuzzing")


def judged_by(judge: str, scorers: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Return the options that make the named scorers use `judge`, where they can; scorers of one's own are told too."""
    named = [name for scorer in scorers or _DEFAULT for name in (_JUDGED_BY_RULE if scorer == "all" else (scorer,))]
    return {name: {"judge": judge} for name in named if name in _JUDGED_BY_RULE or ":" in name}


def bundled_source(source: Path | str) -> Path | str:
    """Return the folder of ``bundled:NAME``, or `source` as it is."""
    from autointerp.demo import bundled

    text = str(source)
    return bundled(text.removeprefix("bundled:")) if text.startswith("bundled:") else source


def resolve(section: str, config_file: Path | None, settings: tuple[str, ...], flags: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of one stage: the file's section, then flags that were given, then ``--set``.

    A key of ``--set`` may carry the section's name or not.
    """
    values: dict[str, Any] = read_toml(config_file).get(section, {}) if config_file else {}
    values = merged(values, flags)
    prefix = f"{section}."
    return apply_settings(values, [setting.removeprefix(prefix) for setting in settings])


def merged(base: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with every flag that was given put over it; nested tables are merged."""
    result = dict(base)
    for key, value in flags.items():
        if isinstance(value, dict):
            if value:
                result[key] = merged(result.get(key, {}), value)
        elif value is not None and value != ():
            result[key] = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    return result


def token_count(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    """Return the number that 10M, 500k or 262144 stands for."""
    if value is None:
        return None
    text = value.strip().lower().replace("_", "").replace(",", "")
    try:
        return int(float(text[:-1]) * _UNITS[text[-1]]) if text[-1:] in _UNITS else int(text)
    except ValueError:
        raise click.BadParameter(f"{value!r} is no number of tokens; expected one such as 10M, 500k or 262144") from None
