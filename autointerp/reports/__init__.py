"""Reads the tables of a results folder and shows them: static pages, or text for a terminal."""

from __future__ import annotations

from pathlib import Path

from autointerp.errors import ConfigError
from autointerp.reports.write import write_report

__all__ = ["report", "write_report"]


def report(
    results: Path | str,
    out: Path | str | None = None,
    *,
    limit: int | None = None,
    max_examples: int = 20,
) -> Path:
    """Write static pages about a results folder and return the path of their index.

    It reads the tables alone: neither the store nor the subject is needed.
    Raises: ConfigError when a number is out of range; StoreError when there is nothing to report on.
    """
    for name, value in (("limit", limit), ("max_examples", max_examples)):
        if value is not None and value < 1:
            raise ConfigError(f"report: {name} = {value} cannot be used; expected 1 or more")
    return write_report(results, out, limit=limit, max_examples=max_examples)
