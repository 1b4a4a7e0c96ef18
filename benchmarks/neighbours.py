"""CPU time and peak memory of the co-occurrence neighbours, each in a fresh process, on synthetic sparse data.

The data are random: every token fires a fixed number of latents, a quarter of them drawn from a topic of 64 tokens, the others by a
power law. Real activations are more clustered, so they have fewer distinct pairs. Counts of sampled latents are compared with those
that sets of positions give.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.reporting import write_report

CTX_LEN = 256
CHECKED = 1000
GOALS = ((16_384, 98_304, 32, "at most 4 CPU-s, 0.5 GB"), (131_072, 1_000_000, 50, "under 4 GB, counts exact"))

CHILD = """
import json, resource, sys, time
from autointerp.store import open_store
from autointerp.store.tables import build_cooccurrence
store, result = sys.argv[1:]
build_cooccurrence(open_store(store), "sae")
usage = resource.getrusage(resource.RUSAGE_SELF)
figures = {"cpu_s": usage.ru_utime + usage.ru_stime, "peak_mb": usage.ru_maxrss / 1024}
open(result, "w").write(json.dumps(figures))
"""


def make_store(path: Path, *, width: int, num_tokens: int, l0: int) -> None:
    """Write a store of random activations."""
    from autointerp.store import CoderRecord, Document, Identity, StoreWriter, write_vocabulary

    record = CoderRecord(digest="sha256:synthetic", width=width, hookpoints=("layers.0@out",), activation="topk", k=l0)
    identity = Identity(ctx_len=CTX_LEN, subject_digest="sha256:synthetic", packing="fill")
    rng = np.random.default_rng(0)
    latent_of = rng.permutation(width)
    with StoreWriter.create_or_resume(path, identity=identity, coders={"sae": record}) as writer:
        write_vocabulary(path / "tokenizer", [b" w%d" % i for i in range(256)], [False] * 256)
        context = 0
        while context * CTX_LEN < num_tokens:
            if not writer.room:
                writer.close_run()
            size = min(16, writer.room)
            tokens = rng.integers(0, 256, (size, CTX_LEN))
            rows = range(context, context + size)
            documents = [Document(document=row, source_row=row) for row in rows]
            writer.add_contexts(list(tokens), [[(row, 0)] for row in rows], documents=documents)
            num = size * CTX_LEN
            topics = np.repeat(rng.integers(0, width, (num // 64, 4 * l0)), 64, axis=0)
            local = np.take_along_axis(topics, rng.integers(0, 4 * l0, (num, l0 // 4)), axis=1)
            free = (width * rng.random((num, l0 - l0 // 4)) ** 2).astype(np.int64)
            pairs = np.unique(np.arange(num)[:, None] * width + latent_of[np.concatenate([local, free], axis=1)])
            writer.add_activations("sae", pairs % width, context * CTX_LEN + pairs // width, rng.random(len(pairs)) + 0.5)
            context += size
        writer.finish()


def check_counts(path: Path, *, num: int) -> int:
    """Return how many of `num` sampled latents have the counts, similarities and order that sets of positions give."""
    import pyarrow.parquet as pq

    from autointerp.store import open_store

    store = open_store(path)
    reader = store.coder("sae")
    chosen = np.random.default_rng(1).choice(np.flatnonzero(reader.latents["count"]), num, replace=False)
    # Which of the sampled latents fire on a position; every activation there then counts for each of them.
    fires = [reader.activations(int(latent))[0] for latent in chosen]
    order = np.argsort(np.concatenate(fires), kind="stable")
    rows = np.repeat(np.arange(num), [len(mine) for mine in fires])[order]
    at = np.concatenate(fires)[order]
    both = np.zeros((num, reader.width), np.int32)
    for latents, positions, _ in reader.blocks():
        low, high = np.searchsorted(at, positions), np.searchsorted(at, positions, side="right")
        for offset in range(int((high - low).max(initial=0))):
            has = low + offset < high
            np.add.at(both, (rows[low[has] + offset], latents[has]), 1)
    counts = reader.latents["count"]
    file = pq.ParquetFile(path / "coders/coder=sae/neighbours-cooccurrence.parquet")
    ends = np.cumsum([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)])
    right = 0
    for row, latent in enumerate(chosen.tolist()):
        similarity = (both[row] / (counts[latent] + counts - both[row])).astype(np.float32)
        similarity[latent] = 0
        expected = np.lexsort((np.arange(reader.width), -similarity))[: np.count_nonzero(similarity)][:250]
        group = int(np.searchsorted(ends, latent, side="right"))
        table = file.read_row_group(group)
        found = table.slice(latent - (int(ends[group - 1]) if group else 0), 1).to_pylist()[0]
        right += found["neighbours"] == expected.tolist() and found["counts"] == both[row][expected].tolist()
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=len(GOALS), help="how many of the sizes to measure, from the smallest")
    parser.add_argument("--repeats", type=int, default=3, help="of the smallest; the others are measured once")
    parser.add_argument("--stores", type=Path, help="keep the synthetic stores here, and use those that are there")
    parser.add_argument("--write", action="store_true", help="leave a dated report")
    args = parser.parse_args()
    lines = [
        "| width | tokens | active per token | CPU-s | peak resident MB | counts right | goal |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as temporary:
        for number, (width, num_tokens, l0, goal) in enumerate(GOALS[: args.rows]):
            path = (args.stores or Path(temporary)) / f"store-{width}-{num_tokens}-{l0}"
            if not (path / "manifest.json").exists():
                make_store(path, width=width, num_tokens=num_tokens, l0=l0)
            figures = [measure(path, Path(temporary)) for _ in range(args.repeats if number == 0 else 1)]
            cpu = ", ".join(f"{each['cpu_s']:.1f}" for each in figures)
            peak = max(each["peak_mb"] for each in figures)
            right = check_counts(path, num=CHECKED)
            lines.append(f"| {width:,} | {num_tokens:,} | {l0} | {cpu} | {peak:.0f} | {right} of {CHECKED} | {goal} |")
            print(lines[-1], flush=True)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    lines += [
        "",
        "Top 250 by Jaccard similarity, exact. Synthetic activations (see the script). CPU seconds are of the whole process (user and",
        f"system, imports and reading and writing included), one thread (OMP_NUM_THREADS=1). Load averages at the end: {load} on "
        f"{os.cpu_count()} cores; a busy machine shares its cores between threads, which makes CPU seconds larger too.",
    ]
    print("\n".join(lines))
    if args.write:
        print(write_report("neighbours", "\n".join(lines), packages=("scipy", "pyarrow", "numpy")))


def measure(store: Path, folder: Path) -> dict[str, float]:
    """Compute the neighbours in a fresh process; return CPU seconds and peak MB."""
    result = folder / "result.json"
    subprocess.run(
        [sys.executable, "-c", CHILD, str(store), str(result)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    figures: dict[str, float] = json.loads(result.read_text())
    return figures


if __name__ == "__main__":
    main()
