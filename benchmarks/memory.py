"""Peak memory of ``autointerp cache`` against the number of tokens, each in a fresh process.

The memory budget is small enough that the smallest corpus already spills several runs; what is reported is the growth of the peak
resident set from the smallest corpus to the largest, which must not depend on the number of tokens.

``--tiny`` is for corpora beyond the standard library, whose source has some 4M tokens: a random subject (2 layers, d 32) and a
random coder of 4096 latents (JumpReLU, about 16 active), over the library's source and more of it with identifiers permuted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.billion import HOOKPOINT
from benchmarks.reporting import write_report

CHILD = """
import json, resource, sys, time
start = time.monotonic()
from autointerp.cli.main import main
try:
    main(sys.argv[2:])
except SystemExit as stop:
    code = stop.code
usage = resource.getrusage(resource.RUSAGE_SELF)
seconds = time.monotonic() - start
open(sys.argv[1], "w").write(json.dumps({"code": code, "peak_mb": usage.ru_maxrss / 1024, "seconds": seconds}))
"""


BUNDLED = ["--subject", "bundled:model", "--coder", "sae=bundled:sae", "--coder", "skip-transcoder=bundled:skip-transcoder"]


def tiny(folder: Path, tokens: int) -> list[str]:
    """Write corpus, subject and coder, in another process; return what names them."""
    command = [sys.executable, "-m", "benchmarks.billion", "--child", "prepare", str(folder)]
    subprocess.run([*command, "--tokens", str(tokens), "--width", "4096", "--l0", "16"], check=True)
    corpus = ["--corpus", str(folder / "corpus.jsonl"), "--force"]
    return [*corpus, "--subject", str(folder / "subject"), "--coder", f"sae={folder / 'coder'}@@{HOOKPOINT}"]


def measure(tokens: int, budget: str, inputs: list[str], folder: Path) -> dict[str, float]:
    """Cache `tokens` tokens; return peak MB, seconds and the number of runs."""
    out = folder / f"store-{tokens}"
    result = folder / f"{tokens}.json"
    command = ["-q", "cache", *inputs, "--tokens", str(tokens), "--memory-budget", budget, "--out", str(out)]
    environment = os.environ | {"MALLOC_ARENA_MAX": "2"}
    subprocess.run([sys.executable, "-c", CHILD, str(result), *command], check=True, env=environment)
    figures: dict[str, float] = json.loads(result.read_text())
    if figures["code"]:
        raise SystemExit(f"cache ended with exit code {figures['code']}")
    figures["runs"] = json.loads((out / "manifest.json").read_text())["provenance"]["num_runs"]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", nargs="+", type=int, default=[200_000, 2_000_000])
    parser.add_argument("--tiny", action="store_true", help="a tiny random subject and as much text as is wanted")
    parser.add_argument("--budget", default="100MB")
    parser.add_argument("--write", action="store_true", help="leave a dated report")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        inputs = tiny(Path(folder) / "inputs", max(args.tokens)) if args.tiny else BUNDLED
        for tokens in args.tokens:
            figures = measure(tokens, args.budget, inputs, Path(folder))
            rows.append((tokens, figures["runs"], figures["peak_mb"], figures["seconds"]))
            print(rows[-1], file=sys.stderr, flush=True)
    growth, millions = rows[-1][2] - rows[0][2], (rows[-1][0] - rows[0][0]) / 1e6
    lines = ["| tokens | runs spilled | peak resident MB | seconds |", "|---|---|---|---|"]
    lines += [f"| {tokens:,} | {runs} | {peak:.1f} | {seconds:.1f} |" for tokens, runs, peak, seconds in rows]
    lines += [
        "",
        f"Growth of peak memory: {growth:+.1f} MB over {millions:.1f}M tokens, {growth / millions:+.2f} MB per million "
        f"(goal: at most 20). Budget {args.budget}; load average at the end {os.getloadavg()[1]:.1f} on {os.cpu_count()} cores.",
    ]
    if args.tiny:
        lines += ["", " ".join(__doc__.split("\n\n")[2].split())]
    print("\n".join(lines))
    if args.write:
        print(write_report("memory", "\n".join(lines), suffix="-tiny" if args.tiny else ""))


if __name__ == "__main__":
    main()
