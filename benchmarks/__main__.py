"""Runs every benchmark and leaves the dated reports."""

import subprocess
import sys

for name in ("disk", "embedding", "interval_coverage", "judge_coverage", "memory", "neighbours"):
    print(f"== {name}", flush=True)
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}", "--write"], check=True)
