"""Time to choose the examples of one latent, and to the first latent of a process, on stores of synthetic activations.

The stores are built by the store's own writer (see `synthetic`): i.i.d. Zipf tokens, 32 activations per token, firing rates
log-normal over latents. Live latents are drawn uniformly without replacement; their examples are the default selection (40 to
explain, 50 + 50 to score, 200 + 200 for statistics, 40 contrasts). The first latent is timed in a fresh process, imports apart:
open, corpus, window grid, and one selection; with ``derived/`` in the store, as ``cache`` leaves it, and once without it, in a
process that makes it. Cold: every file of the store was dropped from the page cache with posix_fadvise before.

With ``--python ENV`` delphi 0.1.3 reads the same activations in the same run, from its own format (split 0 of 5: a fifth of the
latents, all tokens; see `incumbent`): records of 40 to explain, 50 to score and 50 random negatives by its default samplers, of
latents with 200 activating windows of 32 tokens or more, as it meets them; those it rejects on the way cost it time too. Ours at
the same work: 40 + 50 + 50 windows and no others, with the string of every token, as delphi's records have them; for live latents
drawn uniformly, and for those that delphi yielded, in random order (they lie close together, so that some share a row group). The
first record counts from opening on, vocabulary or tokenizer included. The floor does that with plain numpy on two sorted arrays of
positions and values: windows found by division, strata of equal rank, silent windows without repeats, strings from a table. All
run in that environment on one thread, each in a fresh process, with a warm page cache; rounds are interleaved and ratios, of CPU
time per record after the first (those of latents with too few examples included), are medians of those within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from autointerp.examples.selection import SelectionConfig, Selector
from autointerp.store.derived import FOLDER
from autointerp.store.reader import open_store
from benchmarks.incumbent import ChildFailed, Environment, peak_mb, words_of
from benchmarks.reporting import write_report
from benchmarks.synthetic import build, word_vocabulary, zipf_tokens

VOCABULARY, WINDOW = 50304, 32
SPLIT = 0
"""The only one of delphi's splits that is written."""
LARGE = 10_000_000
"""From so many tokens on delphi runs once, for fewer records."""
SAME_WORK = {"num_statistics": 0, "num_explain_negatives": 0}
"""Settings of a selection of what delphi's records hold."""
MIN_EXAMPLES = SelectionConfig().min_examples
"""Latents with fewer windows get none from the floor, nor from ours."""
Wanted = int | list[int]
"""Latents to read: as many drawn uniformly, or these."""


def drop_from_page_cache(path: Path) -> None:
    """Ask the kernel to forget the store's files; nothing in them is dirty once synced."""
    for file in path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


# What the children run: each yields (latent, number of windows it got) -----------------------------------------------


def choose(counts: np.ndarray, wanted: Wanted) -> list[int]:
    """Return the latents to read: those given, or the first that fires and then a uniform sample."""
    if isinstance(wanted, list):
        return wanted
    live = np.flatnonzero(counts)
    return [int(live[0]), *np.random.default_rng(0).choice(live, min(wanted, len(live)), replace=False).tolist()]


def ours(path: Path, exported: Path, wanted: Wanted) -> Iterator[tuple[int, int]]:
    """The default selection."""
    store = open_store(path)
    selector = Selector(store, SelectionConfig())
    for latent in choose(store.coder("sae").latents["count"], wanted):
        found = selector.select("sae", latent)
        blocks = (found.explain, found.explain_statistics, found.explain_negatives, found.positives, found.negatives)
        yield latent, sum(map(len, blocks))


def ours_same_work(path: Path, exported: Path, wanted: Wanted) -> Iterator[tuple[int, int]]:
    """What delphi's records hold: 40 + 50 + 50 windows and the strings of their tokens."""
    store = open_store(path)
    selector = Selector(store, SelectionConfig(**SAME_WORK))
    vocabulary = store.vocabulary
    for latent in choose(store.coder("sae").latents["count"], wanted):
        found = selector.select("sae", latent)
        blocks = (found.explain, found.positives, found.negatives)
        strings = [vocabulary.pieces_of(block.tokens, block.lengths) for block in blocks]
        yield latent, sum(map(len, strings))


def delphi(path: Path, exported: Path, wanted: Wanted) -> Iterator[tuple[int, int]]:
    """delphi's records, one after the first more than wanted."""
    from delphi.config import ConstructorConfig, SamplerConfig
    from delphi.latents import LatentDataset
    from transformers import AutoTokenizer

    assert isinstance(wanted, int)
    sampler = SamplerConfig(n_examples_train=40, n_examples_test=50)
    constructor = ConstructorConfig(
        example_ctx_len=WINDOW, min_examples=200, n_non_activating=50, non_activating_source="random"
    )
    tokenizer = AutoTokenizer.from_pretrained(exported / "tokenizer")
    dataset = LatentDataset(exported / "latents", sampler, constructor, tokenizer=tokenizer)
    for record in islice(dataset, wanted + 1):
        examples = [*record.train, *record.test, *record.not_active]
        yield record.latent.latent_index, len(examples)
    # Not timed any more: with other versions of transformers a window comes out as one string.
    words = json.loads((exported / "words.json").read_text())
    assert all(example.str_tokens == [words[token] for token in example.tokens.tolist()] for example in examples)


def floor(path: Path, exported: Path, wanted: Wanted) -> Iterator[tuple[int, int]]:
    """As many windows, activations and strings from sorted arrays (see `flatten`)."""
    columns = ("positions", "values", "tokens", "starts")
    positions, values, tokens, starts = (np.asarray(np.load(exported / f"{name}.npy", mmap_mode="r")) for name in columns)
    tokens = tokens.reshape(-1, WINDOW)
    words = np.array(json.loads((exported / "words.json").read_text()), object)
    random = np.random.default_rng(0)
    for latent in choose(np.diff(starts), wanted):
        at = positions[starts[latent] : starts[latent + 1]]
        value = values[starts[latent] : starts[latent + 1]].astype(np.float32)
        window = at // WINDOW
        low = np.append(0, 1 + np.flatnonzero(window[1:] != window[:-1]))
        windows = window[low]
        if len(windows) < MIN_EXAMPLES:
            yield latent, 0
            continue
        strata = np.array_split(np.argsort(-np.maximum.reduceat(value, low), kind="stable"), 10)
        drawn = [random.permutation(stratum)[:9] for stratum in strata]
        chosen = np.concatenate([stratum[:4] for stratum in drawn] + [stratum[4:] for stratum in drawn])
        ends = np.append(low[1:], len(at))
        sizes = ends[chosen] - low[chosen]
        rows = np.repeat(low[chosen] - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
        activations = np.zeros((len(chosen), WINDOW), np.float32)
        activations[np.repeat(np.arange(len(chosen)), sizes), at[rows] % WINDOW] = value[rows]
        fires = np.zeros(len(tokens), bool)
        fires[windows] = True
        silent = np.zeros(0, np.int64)
        while len(silent) < 50:
            more = random.integers(0, len(tokens), 100)
            silent = np.unique(np.concatenate([silent, more[~fires[more]]]))
        silent = random.permutation(silent)[:50]
        strings = words[tokens[np.concatenate([windows[chosen], silent])]].tolist()
        yield latent, len(strings)


READERS: dict[str, Callable[[Path, Path, Wanted], Iterator[tuple[int, int]]]] = {
    "ours": ours, "ours_same_work": ours_same_work, "delphi": delphi, "floor": floor,
}  # fmt: skip


def flatten(path: Path, exported: Path) -> None:
    """Write what the floor reads: positions and values by latent, where each latent starts, tokens, words."""
    store = open_store(path)
    reader = store.coder("sae")
    shape = (reader.num_activations,)
    positions, values = (
        np.lib.format.open_memmap(exported / f"{name}.npy", "w+", kind, shape)
        for name, kind in (("positions", np.uint32), ("values", np.float16))
    )
    low = 0
    for latents, at, value in reader.blocks():
        rows = slice(low, low + len(latents))
        positions[rows], values[rows] = at, value
        low = rows.stop
    np.save(exported / "starts.npy", np.append(0, np.cumsum(reader.latents["count"], dtype=np.int64)))
    np.save(exported / "tokens.npy", store.tokens.astype(np.uint16))
    (exported / "words.json").write_text(json.dumps(words_of(store)))


def child(kind: str, path: Path, exported: Path, wanted: Wanted) -> None:
    """Time one reader in this process; print the figures as JSON."""
    if kind == "delphi":
        import delphi.latents  # noqa: F401  # imports are not timed
        import transformers.models.auto  # noqa: F401
    base = peak_mb()
    latents, windows, cpus, walls = [], [], [time.process_time()], [time.perf_counter()]
    for latent, count in READERS[kind](path, exported, wanted):
        cpus.append(time.process_time())
        walls.append(time.perf_counter())
        latents.append(latent)
        windows.append(count)
    figures: dict[str, Any] = {"latents": latents, "windows": windows, "base_mb": base, "peak_mb": peak_mb()}
    for name, ticks in (("cpu", cpus), ("wall", walls)):
        first, *each = np.diff(ticks).tolist()
        figures[name] = {"first": first, "each": [1e3 * seconds for seconds in each]}
    print(json.dumps(figures))


# What the parent does -------------------------------------------------------------------------------------------------


def measure(environment: Environment, kind: str, path: Path, wanted: Wanted, exported: Path = Path()) -> dict[str, Any]:
    """Return the figures of one fresh process."""
    return environment.figures("reading", "--child", kind, path, exported, json.dumps(wanted))


def own_rows(environment: Environment, path: Path, latents: int) -> list[str]:
    """Measure the default selection of one store with a cold and with a warm page cache."""
    rows = []
    for cold in (True, False):
        shutil.rmtree(path / FOLDER, ignore_errors=True)
        found = []
        for wanted in (1, latents):
            if cold:
                drop_from_page_cache(path)
            found.append(measure(environment, "ours", path, wanted))
        ever, later = found
        cells = [f"{median:.2f} / {p95:.2f}" for median, p95 in (spread(later, clock) for clock in ("cpu", "wall"))]
        cells += [f"{figures['cpu']['first']:.2f} / {figures['wall']['first']:.2f}" for figures in (later, ever)]
        rows.append(" | ".join(["cold" if cold else "warm", str(len(later["cpu"]["each"])), *cells]))
    return rows


def spread(figures: dict[str, Any], clock: str) -> tuple[float, float]:
    """Return median and 95th percentile of the milliseconds per latent."""
    median, p95 = np.percentile(figures[clock]["each"], (50, 95)).tolist()
    return median, p95


def per_record(figures: dict[str, Any], clock: str = "cpu") -> float:
    """Return milliseconds per latent that got examples, after the first; the time spent on others counts."""
    return float(sum(figures[clock]["each"]) / np.count_nonzero(figures["windows"][1:]))


Found = dict[str, list[dict[str, Any]]]


def compare(
    environment: Environment, path: Path, exported: Path, *, latents: int, records: int, rounds: int, delphi_rounds: int
) -> list[str]:
    """Measure delphi, ours and the floor on one store in interleaved rounds; return their table."""
    if not (exported / "words.json").exists():
        environment.export(path, "sae", exported, splits=[SPLIT])
        environment.run("reading", "--child", "flatten", path, exported)
    counts = open_store(path).coder("sae").latents["count"]
    found: Found = {}
    failed = ""
    yielded: list[int] = []
    for number in range(rounds):
        if not failed and number < delphi_rounds:
            try:
                figures = measure(environment, "delphi", path, records, exported)
                found.setdefault("delphi", []).append(figures)
                first, *others = figures["latents"]
                yielded = [first, *np.random.default_rng(0).permutation(others).tolist()]
            except ChildFailed as error:
                failed = str(error)
        runs: list[tuple[str, str, Wanted]] = [
            (f"{name}, drawn uniformly", kind, latents)
            for name, kind in (("ours, same work", "ours_same_work"), ("floor", "floor"), ("ours, default selection", "ours"))
        ]
        if yielded:
            runs += [
                ("ours, same work, delphi's latents", "ours_same_work", yielded),
                ("floor, delphi's latents", "floor", yielded),
            ]
        for name, kind, wanted in runs:
            found.setdefault(name, []).append(measure(environment, kind, path, wanted, exported))
        print(f"{path.name} round {number + 1}", file=sys.stderr, flush=True)
    lines = [
        "| | latents read | records | windows per record | CPU ms per record (range) | wall ms | CPU ms per latent, median / p95 "
        "| first record, CPU / wall s | peak MB (base) | incumbent over it | it over the floor |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (figures, *_) in found.items():
        first, *others = figures["latents"]
        # delphi meets every live latent up to the last that it yields.
        read = int(np.count_nonzero(counts[first + 1 : others[-1] + 1])) if name == "delphi" else len(others)
        lines.append(row(name, read, found))
    return [*lines, "", "delphi failed:", "", "```", failed, "```"] if failed else lines


def row(name: str, read: int, found: Found) -> str:
    """Return the line of one kind: medians over rounds, and ratios of CPU time per record within a round."""
    all_figures = found[name]

    def median(value: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(map(value, all_figures))

    def ratio(over: str, under: str) -> str:
        # Rounds in which one of the two did not run have no ratio.
        values = [per_record(a) / per_record(b) for a, b in zip(found.get(over, []), found.get(under, []), strict=False)]
        return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})" if values else "-"

    windows = np.array(all_figures[0]["windows"][1:])
    costs = [per_record(figures) for figures in all_figures]
    each = "-" if name == "delphi" else " / ".join(f"{median(lambda f, i=i: spread(f, 'cpu')[i]):.2f}" for i in (0, 1))
    first = " / ".join(f"{median(lambda f, clock=clock: f[clock]['first']):.2f}" for clock in ("cpu", "wall"))
    under = "floor, delphi's latents" if "delphi" in name else "floor, drawn uniformly"
    return (
        f"| {name} | {read:,} | {np.count_nonzero(windows):,} | {windows[windows > 0].mean():.0f} "
        f"| {statistics.median(costs):.2f} ({min(costs):.2f}-{max(costs):.2f}) | {median(lambda f: per_record(f, 'wall')):.2f} "
        f"| {each} | {first} | {median(lambda f: f['peak_mb']):.0f} ({median(lambda f: f['base_mb']):.0f}) "
        f"| {ratio('delphi', name)} | {ratio(name, under)} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", nargs="+", type=int, default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--widths", nargs="+", type=int, default=[16384, 65536])
    parser.add_argument("--latents", type=int, default=1000)
    parser.add_argument("--python", help="python of the environment that has delphi too: compare with it")
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison; of delphi one from 10M tokens on")
    parser.add_argument("--stores", type=Path, help="folder to build the stores in and to keep them; used again when there")
    parser.add_argument("--no-build", action="store_true", help="leave out the stores that are not there yet")
    parser.add_argument("--write", action="store_true", help="leave a dated report")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, path, exported, *wanted = args.child
        if kind == "flatten":
            flatten(Path(path), Path(exported))
        else:
            child(kind, Path(path), Path(exported), json.loads(wanted[0]))
        return
    rows, tables = [], []
    versions = ""
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.stores or Path(temporary)
        environment = Environment(args.python or sys.executable, Path(temporary))
        if args.python:
            versions = f"Environment: {environment.versions()}. "
        for width in args.widths:
            for tokens in args.tokens:
                path = folder / f"store-{width}-{tokens}"
                if not (path / "manifest.json").exists():
                    if args.no_build:
                        continue
                    make = zipf_tokens(VOCABULARY)
                    vocabulary = word_vocabulary(VOCABULARY)
                    build(path, num_tokens=tokens, width=width, next_tokens=make, vocabulary=vocabulary)
                for cells in own_rows(environment, path, args.latents):
                    rows.append(f"| {tokens:,} | {width} | {cells} |")
                    print(rows[-1], file=sys.stderr, flush=True)
                if args.python:
                    records, delphi_rounds = (20, 1) if tokens >= LARGE else (60, args.rounds)
                    table = compare(
                        environment,
                        path,
                        folder / f"exported-{width}-{tokens}",
                        latents=args.latents,
                        records=records,
                        rounds=args.rounds,
                        delphi_rounds=delphi_rounds,
                    )
                    tables += ["", f"## {tokens:,} tokens, width {width}, beside delphi 0.1.3", "", *table]
                    print("\n".join(table), file=sys.stderr, flush=True)
    paragraphs = __doc__.split("\n\n")[1 : 3 if args.python else 2]
    lines = [line for paragraph in paragraphs for line in (" ".join(paragraph.split()), "")]
    lines += [f"{versions}Load average at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.", ""]
    lines += [
        "| tokens | width | page cache | latents | CPU ms, median / p95 | wall ms, median / p95 | first latent, CPU / wall s "
        "| where `derived/` was removed, CPU / wall s |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        *tables,
    ]
    print("\n".join(lines))
    if args.write:
        print(write_report("reading", "\n".join(lines)))


if __name__ == "__main__":
    main()
