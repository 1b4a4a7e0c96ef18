"""CPU time and peak memory of the co-occurrence neighbours, each in a fresh process, on synthetic sparse data.

The data are random: every token fires a fixed number of latents, a quarter of them drawn from a topic of 64 tokens, the others by a
power law. Real activations are more clustered, so they have fewer distinct pairs. Counts of sampled latents are compared with those
that sets of positions give.

With ``--python ENV`` delphi 0.1.3 computes its own from the same activations in the same run, written in its format (all splits, see
`incumbent`), as its command line does: 250 neighbours, saved as JSON. Its similarities are compared with ours. It moves a matrix to a GPU, which is patched to do nothing.
All run in that environment on one thread, each in a fresh process; rounds are interleaved and ratios are medians of those within one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.incumbent import Environment, cpu_seconds, peak_mb
from benchmarks.reporting import write_report

CTX_LEN = 256
CHECKED = 1000
GOALS = ((16_384, 98_304, 32, "at most 4 CPU-s, 0.5 GB"), (131_072, 1_000_000, 50, "under 4 GB, counts exact"))
TABLE = "coders/coder=sae/neighbours-cooccurrence.parquet"
DENSE_LIMIT_BYTES = 16 << 30
"""delphi is left out where its matrix of counts, 8 bytes for each pair of latents, takes more by itself."""


def ours(store: Path, exported: Path) -> Callable[[], object]:
    """Return what builds our table."""
    from autointerp.store import open_store
    from autointerp.store.tables import build_cooccurrence

    return lambda: build_cooccurrence(open_store(store), "sae")


def delphi(store: Path, exported: Path) -> Callable[[], object]:
    """Return what computes and saves delphi's neighbours, as its ``create_neighbours`` does."""
    import torch
    from delphi.latents.neighbours import NeighbourCalculator

    torch.Tensor.cuda = lambda tensor: tensor

    def work() -> None:
        calculator = NeighbourCalculator(cache_dir=exported / "latents" / "sae", number_of_neighbours=250)
        calculator.populate_neighbour_cache("co-occurrence")
        calculator.save_neighbour_cache(str(exported / "sae"))

    return work


KINDS = {"ours": ours, "delphi": delphi}


def child(kind: str, store: Path, exported: Path) -> None:
    """Compute the neighbours in this process; print CPU seconds, of the work and of the whole process, and peak MB."""
    work = KINDS[kind](store, exported)
    before = cpu_seconds()
    work()
    print(json.dumps({"cpu_s": cpu_seconds() - before, "whole_s": cpu_seconds(), "peak_mb": peak_mb()}))


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
    file = pq.ParquetFile(path / TABLE)
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


def compare(environment: Environment, path: Path, exported: Path, *, repeats: int, with_delphi: bool) -> dict[str, list[dict]]:
    """Return the figures of each kind in each of the interleaved rounds."""
    found: dict[str, list[dict]] = {}
    for number in range(repeats):
        for kind in ("delphi", "ours") if with_delphi else ("ours",):
            found.setdefault(kind, []).append(figures := environment.figures("neighbours", "--child", kind, path, exported))
            print(f"{path.name} round {number + 1} {kind}: {figures}", file=sys.stderr, flush=True)
    return found


def row(kind: str, found: dict[str, list[dict]]) -> str:
    """Return the cells of one kind: CPU seconds of every round, the largest peak, and ratios within a round."""
    cells = [", ".join(f"{each[name]:.1f}" for each in found[kind]) for name in ("cpu_s", "whole_s")]
    cells.append(f"{max(each['peak_mb'] for each in found[kind]):.0f}")
    for name in ("cpu_s", "peak_mb"):
        values = [a[name] / b[name] for a, b in zip(found.get("delphi", []), found[kind], strict=False)]
        cells.append(f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})" if values else "-")
    return " | ".join(cells)


def check_delphi(path: Path, exported: Path, *, num: int) -> int:
    """Return how many of the first `num` latents have the same similarities, in order, in delphi's lists and in ours."""
    import pyarrow.parquet as pq

    theirs = json.loads((exported / "sae-co-occurrence.json").read_text())
    table = next(pq.ParquetFile(path / TABLE).iter_batches(num, columns=["latent", "similarities"])).to_pylist()
    right = 0
    for ours in table:
        similarities = [similarity for similarity, _ in theirs[str(ours["latent"])]]
        # Where fewer latents fire together with it, delphi fills its list up with zeros.
        own = ours["similarities"] + [0.0] * (len(similarities) - len(ours["similarities"]))
        right += np.allclose(own, similarities, rtol=1e-6, atol=0)
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=len(GOALS), help="how many of the sizes to measure, from the smallest")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--python", help="python of the environment that has delphi too: compare with it")
    parser.add_argument("--stores", type=Path, help="keep the synthetic stores here, and use those that are there")
    parser.add_argument("--write", action="store_true", help="leave a dated report")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, store, exported = args.child
        child(kind, Path(store), Path(exported))
        return
    lines = [
        "| width | tokens | active per token | | CPU-s, imports apart | CPU-s, whole process | peak resident MB "
        "| incumbent's CPU-s over it | incumbent's peak over it | right | goal |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    with tempfile.TemporaryDirectory() as temporary:
        environment = Environment(args.python or sys.executable, Path(temporary))
        if args.python:
            notes.append(f"Environment: {environment.versions()}.")
        for width, num_tokens, l0, goal in GOALS[: args.rows]:
            path = (args.stores or Path(temporary)) / f"store-{width}-{num_tokens}-{l0}"
            if not (path / "manifest.json").exists():
                make_store(path, width=width, num_tokens=num_tokens, l0=l0)
            exported = Path(temporary) / f"exported-{width}"
            dense = 8 * width**2
            with_delphi = bool(args.python) and dense <= DENSE_LIMIT_BYTES
            if with_delphi:
                environment.export(path, "sae", exported)
            elif args.python:
                notes.append(
                    f"delphi was not run at width {width:,}: its int64 matrix of counts alone takes {width:,}² x 8 bytes = "
                    f"{dense / 1e9:.0f} GB."
                )
            found = compare(environment, path, exported, repeats=args.repeats, with_delphi=with_delphi)
            right = {"ours": check_counts(path, num=CHECKED)}
            if with_delphi:
                right["delphi"] = check_delphi(path, exported, num=CHECKED)
            for kind in found:
                ends = f"{right[kind]:,} of {CHECKED:,} | {goal if kind == 'ours' else '-'}"
                lines.append(f"| {width:,} | {num_tokens:,} | {l0} | {kind} | {row(kind, found)} | {ends} |")
                print(lines[-1], flush=True)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    lines += [
        "",
        "Top 250 by Jaccard similarity, exact; right: counts as sets give them, for delphi similarities as ours. Synthetic activations (see the script). CPU seconds are user and system, reading and writing",
        "included, with and without the start and the imports of the process; one thread (OMP_NUM_THREADS=1); ratios are of those",
        f"without. Load averages at the end: {load} on {os.cpu_count()} cores; a busy machine shares its cores between threads, which makes",
        "CPU seconds larger too.",
        *notes,
    ]
    if args.python:
        lines += ["", " ".join(__doc__.split("\n\n")[2].split())]
    print("\n".join(lines))
    if args.write:
        print(write_report("neighbours", "\n".join(lines), packages=("scipy", "pyarrow", "numpy")))


if __name__ == "__main__":
    main()
