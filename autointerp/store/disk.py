"""How much disk a store will take, before anything is written."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from autointerp.errors import ResourceError
from autointerp.store.layout import BUILDING, MANIFEST
from autointerp.worker import Worker

BYTES_PER_SPILLED = 3.7
"""Of float16 values, measured on random positions and values; float32 takes 2 more, real text less."""
BYTES_PER_STORED = 3.3
BYTES_PER_TOKEN = 10.0
"""4 in the parts, 6 in the arrays that a large store keeps of its windows."""
BYTES_FLOAT32 = 2.0


@dataclass(frozen=True, kw_only=True)
class DiskPlan:
    """Estimated bytes on disk."""

    spill_bytes: int
    """Runs of all coders, before the first is merged."""
    final_bytes: int
    """The finished store."""
    peak_bytes: int
    """The most at any time: runs not merged yet and parts merged already."""
    corpus_bytes: int = 0
    """Tokens that are still to be written, part of all three."""
    stored_bytes: int = 0
    """Of the peak, what is there before: a store that stays while a larger one is built from it."""


def plan_disk(
    num_tokens: int, l0_per_coder: Mapping[str, float], *, has_corpus: bool = False, float32: Collection[str] = ()
) -> DiskPlan:
    """Estimate the disk for caching `num_tokens`, from the expected activations per token of each coder.

    `has_corpus`: the tokens are there already, as when coders are added to a finished store.
    `float32` are the coders whose values leave the normal range of float16.
    """
    spills, finals = [], []
    for name, l0 in sorted(l0_per_coder.items()):
        extra = BYTES_FLOAT32 if name in float32 else 0.0
        spills.append(num_tokens * l0 * (BYTES_PER_SPILLED + extra))
        finals.append(num_tokens * l0 * (BYTES_PER_STORED + extra))
    tokens = 0.0 if has_corpus else num_tokens * BYTES_PER_TOKEN
    # A coder's runs are deleted when its parts are committed, so both are there for one coder at a time.
    moments = [sum(spills[idx:]) + sum(finals[: idx + 1]) for idx in range(len(spills))]
    return DiskPlan(
        spill_bytes=int(sum(spills)),
        final_bytes=int(sum(finals) + tokens),
        peak_bytes=int(max(moments, default=0) + tokens),
        corpus_bytes=int(tokens),
    )


def check_disk(path: Path, plan: DiskPlan, *, worker: Worker | None = None) -> None:
    """Compare a plan with the free space where a store is to be written; what an unfinished build wrote of it counts.

    A `worker` needs room for its share of the runs only, since it merges nothing.

    Raises: ResourceError when the space will not suffice.
    """
    built = path / BUILDING if (path / MANIFEST).exists() else path
    files = [file for file in built.rglob("*") if file.is_file()]
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if worker is None:
        needed, what = plan.peak_bytes - plan.stored_bytes, f"at its peak, {size_text(plan.final_bytes)} in the end"
    else:
        files = [file for file in files if (run := _NUMBERED.match(file.name)) and worker.owns(int(run[1]))]
        needed, what = (plan.spill_bytes + plan.corpus_bytes) // worker.count, f"for this worker of {worker.count}"
    there = sum(file.stat().st_size for file in files)
    if needed > free + there:
        raise ResourceError(
            f"caching to {path} takes about {size_text(needed)} {what}, and {size_text(free)} are free; "
            "free some space, use fewer tokens, or choose another disk with --out"
        )


_NUMBERED = re.compile(r"(?:run|part)-(\d+)")
"""Names of the files of a run."""


def size_text(num_bytes: float) -> str:
    """Return a number of bytes as people say it, such as ``1.2 GB``; powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
