"""Invariant 2 on the real command line: a folder grown in steps, by one worker or four, holds the rows of one made at once.

``python -m tests.integration.grow_folder FOLDER STORE`` runs `explain` and `score` with their shuffled control against a scripted server that
records requests: all latents at once by one worker; 300, then 500, then an overlapping 200 by one worker; all at once by four workers
with random delays; and by two workers of which one finds a lease that a dead worker left. Prints what was found as JSON.
"""

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from autointerp.digest import generator
from tests.killing import scripted_server

KEYS = {
    "explanations": ["coder", "latent", "sample"],
    "scores": ["coder", "latent", "scorer_id", "explanation_id", "metric", "negatives", "quantile", "control"],
    "verdicts": ["coder", "latent", "scorer_id", "explanation_id", "example_idx", "control"],
}


def rows(results, table):
    """All rows of a table as a sorted list of tuples."""
    found = []
    for path in (results / table).rglob("*.parquet"):
        if not path.name.startswith("."):
            with pq.ParquetFile(path) as file:
                found += [json.dumps(row, sort_keys=True, default=str) for row in file.read().to_pylist()]
    return sorted(found)


def run(*commands):
    """Run commands side by side; return their exit codes."""
    started = [
        subprocess.Popen([sys.executable, "-m", "autointerp.cli.main", "-q", *map(str, c)], stdout=subprocess.DEVNULL)
        for c in commands
    ]
    return [process.wait() for process in started]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("--sizes", type=int, nargs=3, default=[300, 500, 200])
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    first, second, third = args.sizes
    order = generator("grow").permutation(2560)
    steps = [order[:first], order[: first + second], order[first // 2 : first // 2 + third]]
    lists = []
    for number, step in enumerate([*steps, np.unique(np.concatenate(steps))]):
        lists.append(args.folder / f"latents-{number}.txt")
        lists[-1].write_text("\n".join(map(str, step)) + "\n")
    found = {}
    with scripted_server(args.folder, latency_s=[0.0, 0.02], answer="tests.answers:answer") as (url, requests):
        engine = ["--engine", f"openai:scripted@{url}", "--coder", "sae"]
        few = ["--set", "selection.num_positives=5", "--set", "selection.num_negatives=5", "--set", "selection.num_explain=5"]
        few += ["--set", "shard_latents=50"]

        def explain(name, latents, *more):
            return ["explain", args.store, "--out", args.folder / name, "--latents", latents, *few, *engine, *more]

        def score(name, *more):
            return ["score", args.folder / name, "--scorer", "detection", *engine, *more]

        def stale(name, stage):
            """Leave what a worker killed in the middle of a shard leaves."""
            workers = [
                subprocess.Popen(
                    [sys.executable, "-m", "autointerp.cli.main", "-q", *map(str, stage)], stdout=subprocess.DEVNULL
                )
            ]
            time.sleep(8)
            workers[0].kill()
            workers[0].wait()

        def whole(name):
            return run(explain(name, lists[3])) + run(score(name))

        def grown(name):
            codes = []
            for latents in lists[:3]:
                codes += run(explain(name, latents)) + run(score(name))
            return codes

        def four(name):
            workers = [f"{i}/4" for i in range(4)]
            codes = run(*(explain(name, lists[3], "--worker", w) for w in workers))
            return codes + run(*(score(name, "--worker", w) for w in workers))

        def two(name):
            stale(name, explain(name, lists[3]))
            codes = run(*(explain(name, lists[3], "--worker", f"{i}/2") for i in range(2)))
            return codes + run(*(score(name, "--worker", f"{i}/2") for i in range(2)))

        for name, make in {"whole": whole, "grown": grown, "four": four, "two": two}.items():
            before, started = len(requests()), time.monotonic()
            codes = make(name)
            sent = Counter(json.dumps(body, sort_keys=True) for body in requests()[before:])
            found[name] = {
                "exit": codes, "seconds": round(time.monotonic() - started), "requests": sum(sent.values()),
                "sent_more_than_once": sum(number > 1 for number in sent.values()),
                "rows": {table: len(rows(args.folder / name, table)) for table in KEYS},
                "equal": {table: rows(args.folder / name, table) == rows(args.folder / "whole", table) for table in KEYS},
            }  # fmt: skip
            print(json.dumps({name: found[name]}), flush=True)


if __name__ == "__main__":
    main()
