"""Says how far caching is: a bar of tokens with rate and time left on a terminal, a log line every 30 seconds elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from autointerp.jobs.progress import span

logger = logging.getLogger("autointerp.jobs")

_LOG_EVERY_S = 30.0


class TokenProgress:
    """Counts tokens; `show`: True a bar, False log lines, None what suits the terminal."""

    def __init__(self, total: int | None, show: bool | None = None) -> None:
        self._total = total
        self._done = self._new = 0
        self._started = self._logged = time.monotonic()
        is_bar = sys.stderr.isatty() if show is None else show
        self._bar: Any = tqdm(total=total, desc="cache", unit="tok", unit_scale=True, dynamic_ncols=True) if is_bar else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def skip(self, num_tokens: int) -> None:
        """Count tokens of finished runs."""
        self._done += num_tokens
        self._started = time.monotonic()
        if self._bar is not None:
            self._bar.initial += num_tokens
            self._bar.n += num_tokens
            self._bar.start_t = self._bar._time()
            self._bar.refresh()

    def advance(self, num_tokens: int) -> None:
        """Count tokens the subject was run on."""
        self._done += num_tokens
        self._new += num_tokens
        if self._bar is not None:
            self._bar.update(num_tokens)
        elif time.monotonic() - self._logged >= _LOG_EVERY_S:
            self._logged = time.monotonic()
            logger.info("%s", self.line())

    def line(self) -> str:
        """Return progress in one line."""
        elapsed = time.monotonic() - self._started
        rate = self._new / elapsed if elapsed > 0 else 0.0
        of = f" of {self._total:,}" if self._total else ""
        left = f", {span(max(0, self._total - self._done) / rate)} left" if self._total and rate > 0 else ""
        return f"cache: {self._done:,}{of} tokens, {rate:,.0f} tokens/s{left}"
