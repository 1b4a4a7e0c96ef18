"""Peak memory of ``autointerp cache`` against the number of tokens, each in a fresh process.

The memory budget is small enough that the smaller corpus already spills several runs; what is reported is the growth of the peak
resident set from the smaller corpus to the larger, which must not depend on the number of tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

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


def measure(tokens: int, budget: str, folder: Path) -> dict[str, float]:
    """Cache `tokens` tokens of the standard library with the bundled coders; return peak MB and seconds."""
    out = folder / f"store-{tokens}"
    result = folder / f"{tokens}.json"
    command = ["-q", "cache", "--subject", "bundled:model", "--coder", "sae=bundled:sae"]
    command += ["--coder", "skip-transcoder=bundled:skip-transcoder", "--tokens", str(tokens)]
    command += ["--memory-budget", budget, "--out", str(out)]
    environment = os.environ | {"MALLOC_ARENA_MAX": "2"}
    subprocess.run([sys.executable, "-c", CHILD, str(result), *command], check=True, env=environment)
    figures: dict[str, float] = json.loads(result.read_text())
    if figures["code"]:
        raise SystemExit(f"cache ended with exit code {figures['code']}")
    figures["runs"] = json.loads((out / "manifest.json").read_text())["provenance"]["num_runs"]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", type=int, default=200_000)
    parser.add_argument("--large", type=int, default=2_000_000)
    parser.add_argument("--budget", default="100MB")
    parser.add_argument("--write", action="store_true", help="leave a dated report")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for tokens in (args.small, args.large):
            figures = measure(tokens, args.budget, Path(folder))
            rows.append((tokens, figures["runs"], figures["peak_mb"], figures["seconds"]))
    growth = rows[1][2] - rows[0][2]
    lines = ["| tokens | runs spilled | peak resident MB | seconds |", "|---|---|---|---|"]
    lines += [f"| {tokens:,} | {runs} | {peak:.1f} | {seconds:.1f} |" for tokens, runs, peak, seconds in rows]
    lines += ["", f"Growth of peak memory: {growth:+.1f} MB (goal: at most 20 MB). Budget {args.budget}."]
    print("\n".join(lines))
    if args.write:
        print(write_report("memory", "\n".join(lines)))


if __name__ == "__main__":
    main()
