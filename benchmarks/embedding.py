"""Time per latent of embedding-hard negatives with the index built once, on stores of several sizes.

Vectors are random (search is exact, so what they say does not change its cost) and so are activations; the grid, the pools and the
choice are the real ones. What is timed is the choice of 50 negatives by one source, beside that of random ones.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.neighbours import make_store
from benchmarks.reporting import write_report

SIZES = (98_304, 1_000_000)
WIDTH, L0, DIM, LATENTS = 4096, 8, 384, 40


def measure(path: Path, num_tokens: int) -> dict[str, float]:
    """Return milliseconds of CPU per latent by source, windows, and the CPU seconds until the first latent."""
    from autointerp.examples.selection import SelectionConfig, Selector
    from autointerp.store import open_store
    from autointerp.store.embeddings import IndexRecord, index_folder, write_index

    if not (path / "manifest.json").exists():
        make_store(path, width=WIDTH, num_tokens=num_tokens, l0=L0)
    store = open_store(path)
    grid = Selector(store, SelectionConfig()).grid
    rng = np.random.default_rng(0)
    record = IndexRecord(
        store_id=store.store_id,
        embedder="random",
        embedder_id="random",
        window=32,
        min_window=8,
        num_windows=len(grid),
        dim=DIM,
    )

    def blocks():
        for low in range(0, len(grid), 4096):
            vectors = rng.normal(size=(min(4096, len(grid) - low), DIM))
            yield vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    write_index(path / index_folder("random", window=32, min_window=8), record, blocks())
    latents = rng.choice(np.flatnonzero(store.coder("sae").latents["count"] > 100), LATENTS + 1, replace=False).tolist()
    figures: dict[str, float] = {"windows": len(grid)}
    for source in ("random", "embedding"):
        selector = Selector(store, SelectionConfig(negatives=(source,), embedder="random"))
        start = time.process_time()
        selector.select("sae", latents[0])
        figures[f"{source} first"] = time.process_time() - start
        start = time.process_time()
        chosen = [selector.select("sae", latent) for latent in latents[1:]]
        figures[source] = 1000 * (time.process_time() - start) / LATENTS
        assert all(latent.status == "ok" and len(latent.negatives) == 50 for latent in chosen)
    return figures


def main() -> None:
    if os.environ.get("OMP_NUM_THREADS") != "1":  # numpy reads it when it is imported
        os.execve(
            sys.executable, [sys.executable, "-m", "benchmarks.embedding", *sys.argv[1:]], os.environ | {"OMP_NUM_THREADS": "1"}
        )
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stores", type=Path, help="keep the synthetic stores here, and use those that are there")
    parser.add_argument("--write", action="store_true", help="leave a dated report")
    args = parser.parse_args()
    lines = [
        "| tokens | windows | CPU-ms per latent, embedding | of which not with random negatives | first latent, CPU-s |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as temporary:
        for num_tokens in SIZES:
            found = measure((args.stores or Path(temporary)) / f"embedding-{num_tokens}", num_tokens)
            lines.append(
                f"| {num_tokens:,} | {found['windows']:,.0f} | {found['embedding']:.1f} | {found['embedding'] - found['random']:.1f} | "
                f"{found['embedding first']:.1f} |"
            )
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    lines += [
        "",
        f"Goal: at most 50 ms per latent with the index built once. {LATENTS} latents, 50 negatives each, {DIM} dimensions, synthetic stores",
        f"and vectors, one thread (OMP_NUM_THREADS=1). Load averages at the end: {load} on {os.cpu_count()} cores.",
    ]
    print("\n".join(lines))
    if args.write:
        print(write_report("embedding", "\n".join(lines), packages=("pyarrow", "numpy")))


if __name__ == "__main__":
    main()
