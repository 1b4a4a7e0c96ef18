"""Every exception this package raises on purpose.

::

    AutointerpError                  exit code
    |-- InputError                   2   what the user gave (paths, corpora, coders, latents) cannot be used
    |   |-- ConfigError              2   a setting is unknown, missing or out of range
    |   |-- StoreError               2   files on disk are missing, damaged or from another version
    |   |   `-- IdentityError        2   what is on disk was made from other inputs
    |   `-- ResourceError            2   the disk, the memory or an optional package does not suffice
    |-- LLMError                     4   an engine could not answer
    |   |-- Transient                    worth another try: timeouts, dropped connections, 5xx
    |   |   `-- RateLimited              likewise, after a wait: 429, and 503 of a full queue
    |   `-- Permanent                    the same request will fail again
    |       |-- ContextExceeded          the prompt is longer than the engine's context
    |       `-- EngineStopped        4   no request can succeed: bad key, quota spent, server gone
    |-- ReplyError                       a reply came and cannot be used
    `-- Interrupted                130   SIGINT, SIGTERM or SIGUSR1; finished shards are committed

SDK errors are translated where the SDK is called. A message is one sentence that says what was tried, what was found, what was
expected and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class AutointerpError(Exception):
    """Base of all errors raised on purpose; the command line prints its text without a traceback."""

    exit_code = 1


class InputError(AutointerpError):
    """What the user gave cannot be used."""

    exit_code = 2


class ConfigError(InputError):
    """A setting is unknown, missing or out of range."""


class StoreError(InputError):
    """Files on disk are missing, damaged or of another version."""


class IdentityError(StoreError):
    """What is on disk was made from other inputs than the ones named now."""


class ResourceError(InputError):
    """The disk, the memory or an optional package does not suffice."""


class LLMError(AutointerpError):
    """An engine could not answer."""

    exit_code = 4


class Transient(LLMError):
    """A failure worth another try: a timeout, a dropped connection, a 5xx answer."""


class RateLimited(Transient):
    """The server asks for fewer requests."""

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """Seconds the server asked to wait, or None when it did not say."""


class Permanent(LLMError):
    """The same request will fail again."""


class ContextExceeded(Permanent):
    """The prompt is longer than the engine's context."""


class EngineStopped(Permanent):
    """No request can succeed any more: bad key, spent quota, server gone."""


class ReplyError(AutointerpError):
    """A reply came and cannot be used; `raw` is its text."""

    def __init__(self, message: str, *, raw: str = "") -> None:
        super().__init__(message)
        self.raw = raw


class Interrupted(AutointerpError):
    """The process was asked to stop; finished shards are committed."""

    exit_code = 130


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of an error sentence: ``did you mean 'x'?`` where a near match exists, else the known names."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"known: {shown or 'none'}"
