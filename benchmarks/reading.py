"""Time to choose the examples of one latent, and to the first latent of a process, on stores of synthetic activations.

The stores are built by the store's own writer (see `synthetic`): i.i.d. Zipf tokens, 32 activations per token, firing rates
log-normal over latents. Live latents are drawn uniformly without replacement; their examples are the default selection (40 to
explain, 50 + 50 to score, 200 + 200 for statistics, 40 contrasts). The first latent is timed in a fresh process, imports apart:
open, corpus, window grid, and one selection; with ``derived/`` in the store, as ``cache`` leaves it, and once without it, in a
process that makes it. Cold: every file of the store was dropped from the page cache with posix_fadvise before.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from autointerp.examples.selection import SelectionConfig, Selector
from autointerp.store.derived import FOLDER
from autointerp.store.reader import open_store
from benchmarks.reporting import write_report
from benchmarks.synthetic import build, word_vocabulary, zipf_tokens

VOCABULARY = 50304


def drop_from_page_cache(path: Path) -> None:
    """Ask the kernel to forget the store's files; nothing in them is dirty once synced."""
    for file in path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def child(path: Path, latents: int) -> None:
    """Time one store in this process; print the figures as JSON."""
    cpu, wall = time.process_time(), time.perf_counter()
    store = open_store(path)
    selector = Selector(store, SelectionConfig())
    live = np.flatnonzero(store.coder("sae").latents["count"])
    selector.select("sae", int(live[0]))
    first = [time.process_time() - cpu, time.perf_counter() - wall]
    chosen = np.random.default_rng(0).choice(live, min(latents, len(live)), replace=False)
    cpus, walls = [], []
    for latent in chosen.tolist():
        cpu, wall = time.process_time(), time.perf_counter()
        selector.select("sae", latent)
        cpus.append(1e3 * (time.process_time() - cpu))
        walls.append(1e3 * (time.perf_counter() - wall))
    figures = [*first, *(float(np.percentile(column, q)) for column in (cpus, walls) for q in (50, 95))]
    print(json.dumps({"latents": len(chosen), "figures": figures}))


def measure(path: Path, latents: int, *, cold: bool) -> tuple[int, list[float]]:
    """Return how many latents were read, and the figures of one fresh process."""
    if cold:
        drop_from_page_cache(path)
    command = [sys.executable, "-m", "benchmarks.reading", "--child", str(path), "--latents", str(latents)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    return found["latents"], found["figures"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", nargs="+", type=int, default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--widths", nargs="+", type=int, default=[16384, 65536])
    parser.add_argument("--latents", type=int, default=1000)
    parser.add_argument("--stores", type=Path, help="folder to build the stores in and to keep them; used again when there")
    parser.add_argument("--no-build", action="store_true", help="leave out the stores that are not there yet")
    parser.add_argument("--write", action="store_true", help="leave a dated report")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.latents)
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.stores or Path(temporary)
        for width in args.widths:
            for tokens in args.tokens:
                path = folder / f"store-{width}-{tokens}"
                if not (path / "manifest.json").exists():
                    if args.no_build:
                        continue
                    make = zipf_tokens(VOCABULARY)
                    vocabulary = word_vocabulary(VOCABULARY)
                    build(path, num_tokens=tokens, width=width, next_tokens=make, vocabulary=vocabulary)
                for cold in (True, False):
                    shutil.rmtree(path / FOLDER, ignore_errors=True)
                    _, (ever, ever_wall, *_) = measure(path, 1, cold=cold)
                    count, figures = measure(path, args.latents, cold=cold)
                    first, first_wall, median, p95, wall, wall_p95 = figures
                    rows.append(
                        f"| {tokens:,} | {width} | {'cold' if cold else 'warm'} | {count} | {median:.2f} / {p95:.2f} "
                        f"| {wall:.2f} / {wall_p95:.2f} | {first:.2f} / {first_wall:.2f} | {ever:.2f} / {ever_wall:.2f} |"
                    )
                    print(rows[-1], file=sys.stderr, flush=True)
    lines = [" ".join(__doc__.split("\n\n")[1].split()), ""]
    lines += [f"Load average at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.", ""]
    lines += [
        "| tokens | width | page cache | latents | CPU ms, median / p95 | wall ms, median / p95 | first latent, CPU / wall s "
        "| where `derived/` was removed, CPU / wall s |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
    ]
    print("\n".join(lines))
    if args.write:
        print(write_report("reading", "\n".join(lines)))


if __name__ == "__main__":
    main()
