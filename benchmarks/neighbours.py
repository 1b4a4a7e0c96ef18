"""CPU time and peak memory of the co-occurrence neighbours, each in a fresh process, on synthetic sparse data.

The data are random: every token fires a fixed number of latents, a quarter of them drawn from a topic of 64 tokens, the others by a
power law. Real activations are more clustered, so they have fewer distinct pairs. Counts of sampled latents are compared with those
that sets of positions give.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

CTX_LEN = 256
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
        write_vocabulary(path / "tokenizer", [b"%d" % i for i in range(256)], [False] * 256)
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
    """Return how many of `num` sampled latents have the neighbours, counts and similarities that sets give; all, or it is a bug."""
    import pyarrow.parquet as pq

    from autointerp.store import open_store

    reader = open_store(path).coder("sae")
    chosen = np.random.default_rng(1).choice(np.flatnonzero(reader.latents["count"]), num, replace=False)
    table = pq.ParquetFile(path / "coders/coder=sae/neighbours-cooccurrence.parquet").read()
    counts = np.asarray(reader.latents["count"])
    both = np.zeros((num, reader.width), np.int64)
    row_of = np.full((open_store(path).num_contexts * CTX_LEN,), -1)
    fires = [reader.activations(int(latent))[0] for latent in chosen]
    for latents, positions, _ in reader.blocks():
        for row, mine in enumerate(fires) if len(fires) <= 20 else ():
            both[row] += np.bincount(latents[np.isin(positions, mine)], minlength=reader.width)
    if len(fires) > 20:
        # Which of the sampled latents fire on a position, as lists; then every activation there counts for each of them.
        both = _count(reader, fires, len(row_of))
    right = 0
    for row, latent in enumerate(chosen):
        similarity = (both[row] / (counts[latent] + counts - both[row])).astype(np.float32)
        similarity[latent] = 0
        order = np.lexsort((np.arange(reader.width), -similarity))[: np.count_nonzero(similarity)][:250]
        found = table.slice(int(latent), 1).to_pylist()[0]
        right += found["neighbours"] == order.tolist() and found["counts"] == both[row][order].tolist()
    return right


def _count(reader, fires, num_positions):
    both = np.zeros((len(fires), reader.width), np.int64)
    flags = np.zeros(num_positions, bool)
    for row, mine in enumerate(fires):
        flags[:] = False
        flags[mine] = True
        both[row] = 0
    sampled = np.concatenate([np.stack([mine, np.full(len(mine), row)], axis=1) for row, mine in enumerate(fires)])
    order = np.argsort(sampled[:, 0], kind="stable")
    at, rows = sampled[order, 0], sampled[order, 1]
    for latents, positions, _ in reader.blocks():
        low, high = np.searchsorted(at, positions), np.searchsorted(at, positions, side="right")
        for offset in range(int((high - low).max(initial=0))):
            has = low + offset < high
            np.add.at(both, (rows[low[has] + offset], latents[has]), 1)
    return both
