"""Says where controls that are run on a sample cover few of the latents to score.

The sample is fixed by store and settings, so that a folder has the same rows however its plan grew. No such sample holds some
of every short list of latents, so that a list may be left with few controls or none, and that has to be said.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from autointerp.jobs.latents import CoderStatistics, hash_order
from autointerp.jobs.plan import read_plan
from autointerp.results.folder import ResultsFolder


def gaps(
    controls: Iterable[str],
    wanted: Mapping[str, np.ndarray],
    statistics: Iterable[CoderStatistics],
    num: int | None,
    *,
    seed: int,
) -> tuple[str, ...]:
    """Return a sentence on each coder of whose `wanted` live latents fewer are sampled than could be: `num`, or all of them.

    `controls`: those that are run on the first `num` latents in the order of ``random:``, None = on all.
    """
    names = sorted(set(controls))
    if num is None or not names:
        return ()
    found = []
    for coder in statistics:
        order = hash_order(coder, seed=seed)
        ranks = np.flatnonzero(np.isin(order, wanted.get(coder.coder, ())))
        hits = int((ranks < num).sum())
        could = min(num, len(ranks))
        if hits < could:
            enough = int(ranks[could - 1]) + 1
            help_ = f"--set control_latents={enough} runs {'it' if len(names) == 1 else 'them'} on {could}, =all on all"
            found.append(_sentence(names, coder.coder, hits, len(ranks), min(num, len(order)), help_))
    return tuple(found)


def recorded_gaps(path: Path | str) -> tuple[str, ...]:
    """Return the same of a results folder by what its methods recorded; nothing of tables that lie alone."""
    folder = ResultsFolder(Path(path))
    samples: dict[tuple[str, str], list[int]] = {}
    for method in folder.methods("score"):
        for coder, sample in method.settings.get("sample", {}).items():
            key = coder, str(method.control)
            samples[key] = max(samples.get(key, []), sample, key=len)
    if not samples:
        return ()
    found = []
    for coder, planned in sorted(
        read_plan(folder).latents(sorted({coder for coder, _ in samples}), only_requested=True).items()
    ):
        names: dict[int, list[str]] = {}
        for (of, control), sample in sorted(samples.items()):
            if of == coder:
                names.setdefault(len(sample), []).append(control)
        for num, controls in names.items():
            hits = len(np.intersect1d(planned, samples[coder, controls[0]]))
            if hits < min(num, len(planned)):
                help_ = "score again with a larger --set control_latents=N, or =all"
                found.append(_sentence(controls, coder, hits, len(planned), num, help_))
    return tuple(found)


def _sentence(names: list[str], coder: str, hits: int, planned: int, num: int, help_: str) -> str:
    controls = f"control{'s' * (len(names) > 1)} {' and '.join(names)}"
    has = f"few latents with the {controls}" if hits else f"no {controls}"
    return f"{coder} has {has}: {hits:,} of its {planned:,} latents to score are among the {num:,} sampled; {help_}"
