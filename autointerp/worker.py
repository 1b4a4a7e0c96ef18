"""Which of several processes that share one job this one is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from autointerp.errors import ConfigError


@dataclass(frozen=True)
class Worker:
    """Worker `index`, from 0, of `count`. Item number i, a run of a store or a shard, falls to worker ``i % count``."""

    index: int = 0
    count: int = 1

    @staticmethod
    def parse(text: str) -> Worker:
        """Return the worker of ``I/N``, counting from 0.

        Raises: ConfigError when it is anything else.
        """
        match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
        if not match or int(match[1]) >= int(match[2]):
            raise ConfigError(f"--worker {text}: expected I/N with I from 0 to N-1, such as 0/4 for the first of four")
        return Worker(int(match[1]), int(match[2]))

    @staticmethod
    def from_environment(environment: dict[str, str]) -> Worker:
        """Return the worker that a SLURM array task is, or the only worker outside of one."""
        try:
            index = int(environment["SLURM_ARRAY_TASK_ID"])
        except (KeyError, ValueError):
            return Worker()
        first = int(environment.get("SLURM_ARRAY_TASK_MIN", "0"))
        step = max(int(environment.get("SLURM_ARRAY_TASK_STEP", "1")), 1)
        count = int(environment.get("SLURM_ARRAY_TASK_COUNT", "1"))
        return Worker((index - first) // step % max(count, 1), max(count, 1))

    def owns(self, number: int) -> bool:
        """Return whether item `number` falls to this worker."""
        return number % self.count == self.index

    def order(self, items: Sequence[int]) -> list[int]:
        """Return all items, this worker's own (every `count`-th) first, the others after, rotated so that workers spread."""
        own = [item for i, item in enumerate(items) if self.owns(i)]
        rest = [item for i, item in enumerate(items) if not self.owns(i)]
        turn = len(rest) * self.index // self.count
        return own + rest[turn:] + rest[:turn]
