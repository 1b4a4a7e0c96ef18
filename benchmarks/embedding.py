"""Time per latent of embedding-hard negatives with the index built once, on stores of several sizes; and of building an index.

Vectors are random (search is exact, so what they say does not change its cost) and so are activations; the grid, the pools and the
choice are the real ones. What is timed is the choice of 50 negatives by one source, beside that of random ones: one latent after the
other, and announced beforehand as explain and score do. The index that is built is of English text by the packaged embedder.
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

SIZES = {98_304: 8, 1_000_000: 8, 10_000_000: 1}
"""Activations per token by tokens: fewer in the largest, which is built sooner and searched no faster."""
WIDTH, DIM, LATENTS, ALONE = 4096, 384, 48, 8
WORDS = (
    "the of and a to in is that it was for on with as his he be at by this had not are but from or have an they which".split()
)
WINDOWS = 2048


def measure(path: Path, num_tokens: int) -> dict[str, float]:
    """Return milliseconds of CPU per latent by source, windows, and the CPU seconds until the first latent."""
    from autointerp.examples.selection import SelectionConfig, Selector
    from autointerp.store import open_store
    from autointerp.store.embeddings import IndexRecord, index_folder, write_index

    if not (path / "manifest.json").exists():
        make_store(path, width=WIDTH, num_tokens=num_tokens, l0=SIZES[num_tokens])
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
    for name, source, count in (
        ("random", "random", LATENTS),
        ("alone", "embedding", ALONE),
        ("embedding", "embedding", LATENTS),
    ):
        selector = Selector(store, SelectionConfig(negatives=(source,), embedder="random"))
        start = time.process_time()
        selector.select("sae", latents[0])
        figures[f"{name} first"] = time.process_time() - start
        if name == "embedding":
            selector.expect([("sae", latent) for latent in latents[1:]])
        start = time.process_time()
        chosen = [selector.select("sae", latent) for latent in latents[1 : count + 1]]
        figures[name] = 1000 * (time.process_time() - start) / count
        assert all(latent.status == "ok" and len(latent.negatives) == 50 for latent in chosen)
    return figures


def measure_build(path: Path) -> float:
    """Return windows embedded per second of one processor core, committing them included."""
    from autointerp.embed import DEFAULT_EMBEDDER, open_embedder
    from autointerp.jobs.tables import build_embeddings
    from autointerp.store import open_store
    from benchmarks.synthetic import build, zipf_tokens

    words = [f" {word}".encode() for word in WORDS]
    build(
        path, num_tokens=32 * WINDOWS, width=64, next_tokens=zipf_tokens(len(words)), vocabulary=(words, [False] * len(words))
    )
    embedder = open_embedder(DEFAULT_EMBEDDER, device="cpu")
    embedder.embed(["a"])
    start = time.process_time()
    build_embeddings(open_store(path), DEFAULT_EMBEDDER, opened=embedder, progress=False)
    return WINDOWS / (time.process_time() - start)


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
        "| tokens | windows | CPU-ms per latent, random negatives | embedding, announced | embedding, one at a time | first latent, CPU-s |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as temporary:
        for num_tokens in SIZES:
            found = measure((args.stores or Path(temporary)) / f"embedding-{num_tokens}", num_tokens)
            lines.append(
                f"| {num_tokens:,} | {found['windows']:,.0f} | {found['random']:.1f} | {found['embedding']:.1f} | {found['alone']:.1f} | "
                f"{found['alone first']:.1f} |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
        rate = measure_build(Path(temporary) / "words")
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    lines += [
        "",
        f"Goal: at most 50 ms per latent with the index built once. {LATENTS} latents ({ALONE} one at a time), 50 negatives each, {DIM} dimensions,",
        "synthetic stores and random vectors, one thread (OMP_NUM_THREADS=1).",
        "",
        f"Building an index with all-MiniLM-L6-v2: {rate:.0f} windows of 32 words per CPU-second ({WINDOWS:,} windows of English words); "
        f"the 312,500 of 10M tokens would take {312_500 / rate / 3600:.1f} CPU-hours.",
        f"Load averages at the end: {load} on {os.cpu_count()} cores.",
    ]
    print("\n".join(lines))
    if args.write:
        print(write_report("embedding", "\n".join(lines), packages=("pyarrow", "numpy")))


if __name__ == "__main__":
    main()
