"""Making fewer files of a coder's runs, where there are more than a merge has memory for.

A merge holds up to one decoded row group of every file. Where that is too much, neighbouring files are merged into one of the
same form, with positions counted from the start of the corpus; as few rows as possible, and as often as it takes. The name of
such a file says which files of runs are in it. These go when it is committed, so that a process killed anywhere leaves each
activation in one file, or in several of which the largest counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from autointerp.store.merge import RowGroups, Source, SpilledCoder, cut
from autointerp.store.parquet import parquet_sink
from autointerp.store.runs import ENCODING, RUN_GROUP_ROWS, Run, run_schema

BYTES_PER_MERGED = 128
"""Memory per activation of a range while it is merged."""
MIN_RANGE_ROWS = 1 << 10
MIN_FILES = 8
_BYTES_PER_FILE = 12 * RUN_GROUP_ROWS
"""A decoded row group: keys, and values where those have a column."""
_PREFIX = "merged-"


def max_files(memory_budget_bytes: int) -> int:
    """Return from how many files a merge may read at once: their row groups take a sixteenth of the budget."""
    return max(MIN_FILES, memory_budget_bytes // (16 * _BYTES_PER_FILE))


def range_rows(memory_budget_bytes: int, num_files: int) -> int:
    """Return how many activations a merge of so many files may sort at once: the row groups of these take the rest."""
    return max(MIN_RANGE_ROWS, (memory_budget_bytes - num_files * _BYTES_PER_FILE) // BYTES_PER_MERGED)


def premerge(
    folder: Path,
    coder: str,
    runs: Sequence[Run],
    *,
    width: int,
    ctx_len: int,
    contexts_per_run: int,
    memory_budget_bytes: int,
    poll: Callable[[], None],
) -> tuple[list[Source], int]:
    """Return as few files with all activations of a coder as can be merged at once, and the bits of a position in the corpus.

    `folder` holds the files of its runs; `poll` is called now and then and may raise.
    Raises: StoreError when a file is missing or damaged.
    """
    bits = (contexts_per_run * ctx_len).bit_length()
    listed = [(number, run.first_context, file) for number, run in enumerate(runs) for file in run.files[coder]]
    of_runs = [
        Source(
            name=file.name,
            num_rows=file.num_rows,
            dtype=file.dtype,
            start=first_context * ctx_len,
            position_bits=bits,
            runs=(number, number),
            files=(at, at + 1),
        )
        for at, (number, first_context, file) in enumerate(listed)
    ]
    corpus_bits = max(bits, ((runs[-1].first_context + runs[-1].num_contexts) * ctx_len).bit_length())
    sources, limit = _found(folder, of_runs, corpus_bits), max_files(memory_budget_bytes)
    while len(sources) > limit:
        first, stop = _cheapest(sources, limit)
        merged = _together(sources[first:stop], corpus_bits)
        rows = range_rows(memory_budget_bytes, stop - first)
        _merge(folder, sources[first:stop], merged, width=width, range_rows=rows, poll=poll)
        sources[first:stop] = [merged]
    return sources, corpus_bits


def _found(folder: Path, of_runs: Sequence[Source], corpus_bits: int) -> list[Source]:
    """Return what there is to merge, in order; remove the files that are in others."""
    merged: dict[int, int] = {}
    for path in folder.glob(f"{_PREFIX}*"):
        first, stop = map(int, path.stem.removeprefix(_PREFIX).split("-"))
        merged[first] = max(stop, merged.get(first, 0))
    sources: list[Source] = []
    while (at := sources[-1].files[1] if sources else 0) < len(of_runs):
        sources.append(_together(of_runs[at : merged[at]], corpus_bits) if at in merged else of_runs[at])
    kept = {source.name for source in sources}
    gone = {source.name for source in of_runs} | {path.name for path in folder.glob(f"{_PREFIX}*")}
    for name in sorted(gone - kept):
        (folder / name).unlink(missing_ok=True)
    return sources


def _together(sources: Sequence[Source], corpus_bits: int) -> Source:
    """Return what neighbouring files become."""
    first, stop = sources[0].files[0], sources[-1].files[1]
    return Source(
        name=f"{_PREFIX}{first:06d}-{stop:06d}.parquet",
        num_rows=sum(source.num_rows for source in sources),
        dtype="float32" if any(source.dtype == "float32" for source in sources) else "float16",
        start=0,
        position_bits=corpus_bits,
        runs=(sources[0].runs[0], sources[-1].runs[1]),
        files=(first, stop),
    )


def _cheapest(sources: Sequence[Source], limit: int) -> tuple[int, int]:
    """Return which neighbouring files, first..stop-1, to merge: all that share a run or a part of those, the fewest rows for
    each file less.
    """
    run_starts = [at for at, source in enumerate(sources) if not at or source.runs[0] > sources[at - 1].runs[1]]
    edges = np.array([*run_starts, len(sources)])
    sizes = np.diff(edges)
    if sizes.max() > limit:
        first = int(edges[sizes.argmax()])
        return first, first + limit
    wanted = min(limit, len(sources) - limit + 1)
    last = np.minimum(np.searchsorted(edges, edges[:-1] + wanted), len(sizes))
    last -= edges[last] - edges[:-1] > limit
    num_files = edges[last] - edges[:-1]
    rows = np.cumsum([0, *(source.num_rows for source in sources)])
    fewer = np.minimum(num_files - 1, len(sources) - limit)  # more than is needed counts for nothing
    cost = np.where(fewer > 0, (rows[edges[last]] - rows[edges[:-1]]) / np.maximum(fewer, 1), np.inf)
    best = int(cost.argmin())
    return int(edges[best]), int(edges[last[best]])


def _merge(
    folder: Path, sources: Sequence[Source], merged: Source, *, width: int, range_rows: int, poll: Callable[[], None]
) -> None:
    """Write the merged file and remove those that are in it."""
    spilled = SpilledCoder(folder, sources, width=width, position_bits=merged.position_bits, range_rows=range_rows, poll=poll)
    schema = run_schema(None if spilled.holds_values else spilled.dtype, position_bits=merged.position_bits)
    encoding = dict(zip(schema.names, ENCODING, strict=False))
    with parquet_sink(folder / merged.name, schema, encoding=encoding, compression="none", with_digest=False) as sink:
        rows = RowGroups(sink, RUN_GROUP_ROWS)
        for low, high in cut(spilled.counts, spilled.best_range):
            poll()
            for columns in spilled.keys(low, high):
                rows.add(*columns)
        rows.close()
    for source in sources:
        (folder / source.name).unlink()
