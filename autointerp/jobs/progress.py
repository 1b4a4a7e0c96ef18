"""Says how far a run is: a bar with rate and time left on a terminal, a log line every 30 seconds elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

logger = logging.getLogger("autointerp.jobs")

_LOG_EVERY_S = 30.0

OnProgress = Callable[[int, int], None]
"""(latents finished, latents in all)."""


class Progress:
    """Counts latents or another `unit`; `show`: True a bar, False log lines, None what suits the terminal, or a function."""

    def __init__(self, stage: str, show: bool | OnProgress | None = None, *, unit: str = "latent") -> None:
        self._stage, self._unit = stage, unit
        self._call = show if callable(show) else None
        self._is_bar = sys.stderr.isatty() if show is None else show is True
        self._bar: Any = None
        self._total = self._done = self._new = 0
        self._started = self._logged = time.monotonic()

    def start(self, total: int) -> None:
        """Begin counting towards `total`."""
        self._total = total
        self._started = self._logged = time.monotonic()
        if self._is_bar and self._call is None:
            self._bar = tqdm(total=total, desc=self._stage, unit=self._unit, smoothing=0.05, dynamic_ncols=True)

    def advance(self, count: int, *, is_new: bool) -> None:
        """Count latents; with `is_new` false they were finished before and say nothing about the rate."""
        if not count:
            return
        self._done += count
        self._new += count if is_new else 0
        if self._call is not None:
            self._call(self._done, self._total)
        elif self._bar is not None:
            if is_new:
                self._bar.update(count)
            else:
                self._bar.initial += count
                self._bar.n += count
                self._bar.refresh()
        elif time.monotonic() - self._logged >= _LOG_EVERY_S:
            self._logged = time.monotonic()
            logger.info("%s", self.line())

    def line(self) -> str:
        """Return progress in one line."""
        elapsed = time.monotonic() - self._started
        rate = self._new / elapsed if elapsed > 0 else 0.0
        left = f", {span((self._total - self._done) / rate)} left" if rate > 0 else ""
        return f"{self._stage}: {self._done} of {self._total} {self._unit}s, {rate:.2f} {self._unit}s/s{left}"

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._bar.close()


def span(seconds: float) -> str:
    """Return a length of time for people, such as ``3 h 05 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
