"""Invariant 1 on the real command line: SIGKILL anywhere, start again, and every table is equal.

`AUTOINTERP_KILL_SEEDS` sets how many kills are drawn per stage (20 for a release; 4 here).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.kill_commands import CONCURRENCY, MIN_RUNS, MIN_SHARDS

SEEDS = int(os.environ.get("AUTOINTERP_KILL_SEEDS", "4"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stage", ["cache", "explain", "score"])
def test_a_killed_stage_ends_with_equal_tables(stage, tmp_path):
    args = [sys.executable, "-m", "tests.integration.kill_commands", tmp_path, "--stage", stage, "--seeds", str(SEEDS)]
    done = subprocess.run(args, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    outcomes = found["outcomes"]
    if stage == "cache":
        assert found["num_runs"] >= MIN_RUNS
    else:
        assert found["num_shards"] >= MIN_SHARDS
    assert sum(outcome["killed"] for outcome in outcomes) >= 0.75 * len(
        outcomes
    )  # a run may end before it is seen to reach its last request
    for outcome in outcomes:
        assert outcome["exit"] in ((0,) if stage == "cache" else (0, 3)), outcome
        assert outcome["different"] == [], outcome
        assert outcome.get("sent_again", 0) <= CONCURRENCY, outcome
        assert outcome.get("never_sent", 0) == 0, outcome
