"""autointerp: explain the latents of sparse coders in words, and measure how far the words can be trusted.

The functions below take the same settings as the command line. Heavy libraries are imported when a function is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "aexplain": "autointerp.jobs.explain",
    "ascore": "autointerp.jobs.score",
    "cache": "autointerp.jobs.cache",
    "explain": "autointerp.jobs.explain",
    "load_coder": "autointerp.coders.load",
    "load_explanations": "autointerp.results.load",
    "load_scores": "autointerp.results.load",
    "load_verdicts": "autointerp.results.load",
    "open_store": "autointerp.store",
    "report": "autointerp.reports",
    "score": "autointerp.jobs.score",
}

__all__ = [
    "__version__",
    "aexplain",
    "ascore",
    "cache",
    "explain",
    "load_coder",
    "load_explanations",
    "load_scores",
    "load_verdicts",
    "open_store",
    "report",
    "score",
]

if TYPE_CHECKING:
    from autointerp.coders.load import load_coder
    from autointerp.jobs.cache import cache
    from autointerp.jobs.explain import aexplain, explain
    from autointerp.jobs.score import ascore, score
    from autointerp.reports import report
    from autointerp.results.load import load_explanations, load_scores, load_verdicts
    from autointerp.store import open_store


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'autointerp' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return __all__
