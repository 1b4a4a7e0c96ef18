"""Time per latent of embedding-hard negatives with the index built once, on stores of several sizes; and of building an index.

Vectors are random (search is exact, so what they say does not change its cost) and so are activations; the grid, the pools and the
choice are the real ones. What is timed is the choice of 50 negatives by one source, beside that of random ones: one latent after the
other, and announced beforehand as explain and score do. The index that is built is of English text by the packaged embedder.

``--python`` names an environment that has delphi 0.1.3 too (see `incumbent`) and compares with its FAISS negatives in place of the
rest: the standard library's source in tokens of the bundled model, made-up activations (16384 latents, 32 to a token), windows of 32
tokens, all-MiniLM-L6-v2 of the same files on both sides, all in that environment and of one thread. What is counted is CPU time once
packages and embedder are loaded: ours to build the index once, and from opening the store to the examples and 50 negatives of each
latent; delphi's from opening its cache to the record of one latent, with 50 negatives. delphi embeds all windows on which a latent is
silent, for each latent anew (device patched to cpu, since it asks for cuda); the index that it keeps serves the same latent only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.incumbent import Environment, cpu_seconds, export_store
from benchmarks.limits import disk_bytes
from benchmarks.neighbours import make_store
from benchmarks.reporting import write_report

SIZES = {98_304: 8, 1_000_000: 8, 10_000_000: 1}
"""Activations per token by tokens: fewer in the largest, which is built sooner and searched no faster."""
WIDTH, DIM, LATENTS, ALONE = 4096, 384, 48, 8
WORDS = (
    "the of and a to in is that it was for on with as his he be at by this had not are but from or have an they which".split()
)
WINDOWS = 2048
COMPARED_TOKENS, COMPARED_WIDTH = 98_304, 16_384
LEAST, MOST = 300, 1200
"""Activations of a latent that is compared: delphi leaves out those that fire in fewer than 200 windows."""


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


def stdlib_tokens(tokenizer: Any) -> Callable[[int], np.ndarray]:
    """Return a function that gives the next n token ids of the standard library's source."""
    from benchmarks.corpus import texts

    source, rest = texts(), np.zeros(0, np.uint32)

    def take(num: int) -> np.ndarray:
        nonlocal rest
        while len(rest) < num:
            ids = tokenizer(next(source)[1], add_special_tokens=False)["input_ids"]
            rest = np.concatenate([rest, np.array(ids, np.uint32)])
        taken, rest = rest[:num], rest[num:]
        return taken

    return take


def prepare(folder: Path, num_tokens: int) -> dict[str, Any]:
    """Write the store, the same in delphi's format, and the tokenizer; return latents to compare on."""
    from autointerp.demo import bundled
    from autointerp.store import open_store
    from autointerp.subject.vocabulary import load_tokenizer, token_bytes
    from benchmarks.synthetic import build

    tokenizer = load_tokenizer(str(bundled("model")))
    tokenizer.save_pretrained(folder / "tokenizer")
    next_tokens, vocabulary = stdlib_tokens(tokenizer), token_bytes(tokenizer)
    build(folder / "store", num_tokens=num_tokens, width=COMPARED_WIDTH, next_tokens=next_tokens, vocabulary=vocabulary)
    store = open_store(folder / "store")
    export_store(store, "sae", folder)
    counts = store.coder("sae").latents["count"]
    chosen = np.random.default_rng(0).permutation(np.flatnonzero((counts >= LEAST) & (counts <= MOST)))
    return {"latents": chosen[:LATENTS].tolist()}


def measure_ours(folder: Path, latents: list[int]) -> dict[str, Any]:
    """Return CPU seconds: of the index where it is not there, and per latent, announced and one at a time."""
    from autointerp.embed import DEFAULT_EMBEDDER, open_embedder
    from autointerp.examples.selection import SelectionConfig, Selector
    from autointerp.jobs.tables import build_embeddings
    from autointerp.store import open_store

    config = SelectionConfig(negatives=("embedding",), embedder=DEFAULT_EMBEDDER)
    embedder = open_embedder(DEFAULT_EMBEDDER, device="cpu")
    embedder.embed(["a"])
    start = cpu_seconds()
    is_new = build_embeddings(open_store(folder / "store"), DEFAULT_EMBEDDER, opened=embedder, progress=False)
    built = cpu_seconds() - start
    figures: dict[str, Any] = {"index_bytes": disk_bytes(folder / "store" / "embeddings"), "built": built if is_new else None}
    Selector(open_store(folder / "store"), config).select("sae", latents[0])  # what is imported when it is first needed
    for name in ("announced", "alone"):
        start = cpu_seconds()
        selector = Selector(open_store(folder / "store"), config)
        if name == "announced":
            selector.expect([("sae", latent) for latent in latents])
        chosen = [selector.select("sae", latent) for latent in latents]
        figures[name] = (cpu_seconds() - start) / len(latents)
        if any(latent.status != "ok" or len(latent.negatives) != 50 for latent in chosen):
            raise SystemExit("a latent has fewer than 50 negatives")
    return figures | {"windows": len(selector.grid)}


def measure_delphi(folder: Path, latent: int) -> dict[str, Any]:
    """Return the CPU seconds of one latent's record, the windows embedded for it and the bytes of its index."""
    from importlib.util import find_spec

    import torch
    from delphi.config import ConstructorConfig, SamplerConfig
    from delphi.latents import LatentDataset, constructors
    from transformers import AutoTokenizer

    from autointerp.embed.sentence import PACKAGE

    package = find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise SystemExit(f"{PACKAGE} is not installed")
    name = str(Path(package.origin).parent / "model")
    constructors.get_model = partial(constructors.get_model, device="cpu")
    constructors.get_model(name).encode(["a"], show_progress_bar=False)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    with tempfile.TemporaryDirectory() as index:
        os.environ["DELPHI_CACHE_DIR"] = index
        start = cpu_seconds()
        dataset = LatentDataset(
            str(folder / "latents"),
            SamplerConfig(),
            ConstructorConfig(non_activating_source="FAISS", faiss_embedding_model=name),
            tokenizer=tokenizer,
            modules=["sae"],
            latents={"sae": torch.tensor([latent])},
        )
        (record,) = dataset
        cpu = cpu_seconds() - start
        if len(record.not_active) != 50 or len(record.not_active[0].str_tokens) != 32:
            raise SystemExit(f"delphi gave {len(record.not_active)} negatives; expected 50 of 32 tokens")
        silent = dataset.tokens.numel() // 32 - len(record.examples)
        return {"cpu": cpu, "windows": silent, "index_bytes": disk_bytes(Path(index))}


def compare(python: str, num_tokens: int, num_latents: int, rounds: int) -> list[str]:
    """Measure both packages round by round; return the lines of the report."""
    with tempfile.TemporaryDirectory() as name:
        folder, environment = Path(name), Environment(python, Path(name))
        latents = environment.figures("embedding", "--child", "prepare", folder, num_tokens)["latents"]
        if len(latents) < max(num_latents, rounds):
            raise SystemExit(f"only {len(latents)} latents fire {LEAST} to {MOST} times; {max(num_latents, rounds)} are wanted")
        versions = environment.versions()
        ours, theirs = [], []
        for number in range(rounds):
            ours.append(environment.figures("embedding", "--child", "ours", folder, *latents[:num_latents]))
            theirs.append(environment.figures("embedding", "--child", "delphi", folder, latents[number]))
            print(ours[-1], theirs[-1], file=sys.stderr, flush=True)
    built, windows, size = ours[0]["built"], ours[0]["windows"], ours[0]["index_bytes"]

    def middle(values: list[float], form: str) -> str:
        low, median, high = (format(value, form) for value in (min(values), statistics.median(values), max(values)))
        return f"{median} ({low}-{high})"

    announced, alone = ([1000 * row[kind] for row in ours] for kind in ("announced", "alone"))
    cpu = [row["cpu"] for row in theirs]
    ratios = {
        "announced": [b["cpu"] / a["announced"] for a, b in zip(ours, theirs, strict=True)],
        "alone": [b["cpu"] / a["alone"] for a, b in zip(ours, theirs, strict=True)],
        "with the index": [
            num_latents * b["cpu"] / (built + num_latents * a["announced"]) for a, b in zip(ours, theirs, strict=True)
        ],
    }
    embedded = middle([row["windows"] for row in theirs], ",.0f")
    return [
        "| | once per store, CPU-s | CPU-ms per latent | delphi over it | windows embedded | index, MB |",
        "|---|---|---|---|---|---|",
        f"| ours, {num_latents} latents announced | {built:.1f} | {middle(announced, ',.1f')} | {middle(ratios['announced'], ',.0f')} | {windows:,} once | {size / 1e6:.2f} once |",
        f"| ours, {num_latents} latents one at a time | the same | {middle(alone, ',.1f')} | {middle(ratios['alone'], ',.0f')} | the same | the same |",
        f"| ours, {num_latents} latents announced and the index | 0 | {1000 * built / num_latents + statistics.median(announced):,.0f} | {middle(ratios['with the index'], ',.1f')} | the same | the same |",
        f"| delphi, one latent | 0 | {middle([1000 * value for value in cpu], ',.0f')} | 1 | {embedded} per latent | {middle([row['index_bytes'] / 1e6 for row in theirs], '.2f')} per latent |",
        "",
        f"{num_tokens:,} tokens. Median of {rounds} rounds (least-most), each with another latent for delphi; ratios are taken within a round. "
        f"Our index costs as much as {built / statistics.median(cpu):.2f} latents of delphi's.",
        "",
        " ".join(__doc__.split("\n\n")[2].split()),
        "",
        f"Environment: {versions}.",
    ]


def child(kind: str, folder: str, *numbers: str) -> dict[str, Any]:
    if kind == "prepare":
        return prepare(Path(folder), int(numbers[0]))
    if kind == "ours":
        return measure_ours(Path(folder), [int(number) for number in numbers])
    return measure_delphi(Path(folder), int(numbers[0]))


def main() -> None:
    if os.environ.get("OMP_NUM_THREADS") != "1":  # numpy reads it when it is imported
        os.execve(
            sys.executable, [sys.executable, "-m", "benchmarks.embedding", *sys.argv[1:]], os.environ | {"OMP_NUM_THREADS": "1"}
        )
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stores", type=Path, help="keep the synthetic stores here, and use those that are there")
    parser.add_argument("--python", help="python of an environment that has delphi too: compare with it, in place of the rest")
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison")
    parser.add_argument("--tokens", type=int, default=COMPARED_TOKENS, help="of the comparison")
    parser.add_argument("--latents", type=int, default=LATENTS, help=f"of ours in the comparison, at most {LATENTS}")
    parser.add_argument("--write", action="store_true", help="leave a dated report")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(*args.child)))
        return
    lines = compare(args.python, args.tokens, args.latents, args.rounds) if args.python else alone(args.stores)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    lines += ["", f"Load averages at the end: {load} on {os.cpu_count()} cores."]
    print("\n".join(lines))
    if args.write:
        suffix = "-incumbent" if args.python else ""
        print(write_report("embedding", "\n".join(lines), suffix=suffix, packages=("pyarrow", "numpy")))


def alone(stores: Path | None) -> list[str]:
    """Measure this package on several sizes; return the lines of the report."""
    lines = [
        "| tokens | windows | CPU-ms per latent, random negatives | embedding, announced | embedding, one at a time | first latent, CPU-s |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as temporary:
        for num_tokens in SIZES:
            found = measure((stores or Path(temporary)) / f"embedding-{num_tokens}", num_tokens)
            lines.append(
                f"| {num_tokens:,} | {found['windows']:,.0f} | {found['random']:.1f} | {found['embedding']:.1f} | {found['alone']:.1f} | "
                f"{found['alone first']:.1f} |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
        rate = measure_build(Path(temporary) / "words")
    return [
        *lines,
        "",
        f"Goal: at most 50 ms per latent with the index built once. {LATENTS} latents ({ALONE} one at a time), 50 negatives each, {DIM} dimensions,",
        "synthetic stores and random vectors, one thread (OMP_NUM_THREADS=1).",
        "",
        f"Building an index with all-MiniLM-L6-v2: {rate:.0f} windows of 32 words per CPU-second ({WINDOWS:,} windows of English words); "
        f"the 312,500 of 10M tokens would take {312_500 / rate / 3600:.1f} CPU-hours.",
    ]


if __name__ == "__main__":
    main()
