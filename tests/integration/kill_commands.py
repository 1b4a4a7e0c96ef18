"""Kills `cache`, `explain` and `score` again and again and says what came of it; run by test_kill_commands.py, or by hand::

    python -m tests.integration.kill_commands FOLDER --stage cache --seeds 20

The real command line on a random tiny subject, and a scripted server in a process of its own that records every request. `cache` is
killed at events of the disk, drawn uniformly, and at every event of merge and commit; `explain` and `score` at such events and after
requests, half and half. Each killed run is started again; its tables must equal an uninterrupted run's, and at most `CONCURRENCY`
requests may be sent again. With fewer than 20 seeds only every fifth event of merge and commit is tried.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny

from autointerp.cli.main import main as autointerp
from autointerp.jobs import cache as _cache  # noqa: F401  imported before forking, so that children start at once
from autointerp.jobs import explain as _explain  # noqa: F401
from autointerp.jobs import score as _score  # noqa: F401
from autointerp.llm import openai as _openai  # noqa: F401
from tests.killing import different, fork, fork_until, parquet_tables, scripted_server

CONCURRENCY = 4
MIN_RUNS, MIN_SHARDS = 8, 20


def prepare(root):
    """Write subject, coders and a corpus of many small documents."""
    subject = tiny.tiny_subject(root / "subject")
    sae = tiny.tiny_sparsify(root / "sae")
    transcoder = tiny.tiny_sparsify(root / "tc", width=48, k=3, hookpoint="layers.1.mlp", seed=1, skip=True, transcode=True)
    rng = random.Random(0)
    words = " ".join(tiny.TEXTS).split(" ")
    lines = [json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(40, 160)))}) for _ in range(150)]
    (root / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    return ["cache", "--subject", subject, "--corpus", root / "corpus.jsonl", "--ctx-len", "64", "--tokens", "16k",
            "--coder", f"sae={sae}", "--coder", f"tc={transcoder}", "--set", "contexts_per_run=25", "--set", "batch_tokens=2048",
            "--force"]  # fmt: skip


def command(*args):
    return lambda: autointerp(["-q", *(str(arg) for arg in args)])


def kill_cache(root, seeds):
    base = prepare(root)
    code, events, output = fork(command(*base, "--out", root / "whole"))
    assert code == 0, output
    whole = parquet_tables(root / "whole")
    num_runs = json.loads((root / "whole" / "manifest.json").read_text())["provenance"].get("num_runs")
    first_merge = next((i for i, name in enumerate(events) if "activations" in name and "part-" in name), len(events))
    rng = random.Random(1)
    points = [("uniform", rng.randrange(len(events))) for _ in range(seeds)]
    every = 1 if seeds >= 20 else 5
    points += [("merge or commit", point) for point in range(first_merge, len(events), every)]
    outcomes = []
    for number, (kind, point) in enumerate(points):
        out = root / f"killed-{number}"
        code, _, _ = fork(command(*base, "--out", out), kill_at=point)
        second, again, output = fork(command(*base, "--out", out))
        runs_redone = sum("runs" in name and "os.rename" in name for name in again)
        outcomes.append(
            {"kind": kind, "point": point, "killed": code == -9, "exit": second, "output": output[-300:] if second else "",
             "different": different(parquet_tables(out), whole), "renames_after": runs_redone}
        )  # fmt: skip
    return {"stage": "cache", "num_events": len(events), "num_runs": num_runs, "outcomes": outcomes}


def kill_stage(root, stage, seeds, explainer="default"):
    base = prepare(root)
    code, _, output = fork(command(*base, "--out", root / "store"))
    assert code == 0, output
    rng = random.Random(2)
    outcomes = []
    with scripted_server(root, latency_s=[0.002, 0.02], answer="tests.answers:answer") as (url, requests):
        engine = ["--engine", f"openai:scripted@{url}", "--concurrency", CONCURRENCY, "--no-control"]
        few = ["--set", "selection.num_positives=10", "--set", "selection.num_negatives=10"]
        explain = [
            "explain",
            root / "store",
            "--explainer",
            explainer,
            "--latents",
            "random:55",
            "--set",
            "shard_latents=5",
            *few,
            *engine,
        ]
        score = ["score", *engine]

        def stages(out):
            return command(*explain, "--out", out) if stage == "explain" else command(*score[:1], out, *score[1:])

        def fresh(out):
            if stage == "score":
                code, _, output = fork(command(*explain, "--out", out))
                assert code in (0, 3), output
            return len(requests())

        before = fresh(root / "whole")
        code, events, output = fork(stages(root / "whole"))
        assert code in (0, 3), output
        whole, expected = parquet_tables(root / "whole"), requests()[before:]
        num_shards = len(list((root / "whole" / "state" / stage).rglob("shard-*.json")))
        for number in range(seeds):
            out = root / f"killed-{number}"
            before = fresh(out)
            if number % 2:
                point = rng.randrange(len(expected))
                killed = fork_until(stages(out), lambda point=point, before=before: requests.count() - before > point)
            else:
                point = rng.randrange(len(events))
                killed, _, _ = fork(stages(out), kill_at=point)
            second, _, output = fork(stages(out))
            sent = Counter(map(key, requests()[before:]))
            once = Counter(map(key, expected))
            outcomes.append(
                {"kind": "request" if number % 2 else "event", "point": point, "killed": killed == -9, "exit": second,
                 "output": output[-300:] if second not in (0, 3) else "", "different": different(parquet_tables(out), whole),
                 "sent_again": sum((sent - once).values()), "never_sent": sum((once - sent).values())}
            )  # fmt: skip
    return {
        "stage": stage,
        "num_events": len(events),
        "num_requests": len(expected),
        "num_shards": num_shards,
        "outcomes": outcomes,
    }


def key(body):
    return json.dumps(body, sort_keys=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stage", choices=["cache", "explain", "score"], required=True)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--explainer", default="default")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    if args.stage == "cache":
        found = kill_cache(args.folder, args.seeds)
    else:
        found = kill_stage(args.folder, args.stage, args.seeds, args.explainer)
    found["seconds"] = time.monotonic() - started
    print(json.dumps(found))


if __name__ == "__main__":
    main()
