"""Invariant 1: killed by SIGKILL at any event and started again, the folder ends byte for byte like an uninterrupted run's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).with_name("jobs_killer.py")
CONCURRENCY = 3


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, 5])
def test_kill_at_many_events(tmp_path, offset):
    """Every tenth of about 260 events each time; all of them when the harness is called with a step of 1."""
    command = [sys.executable, str(HARNESS), str(tmp_path), "0-5", "20", str(offset)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["events"] > 200 and found["sent"] == found["unique"] == 31
    for outcome in found["outcomes"]:
        assert outcome["killed"], outcome
        assert outcome["resumed"] == 0, outcome
        assert outcome["equal"], outcome
        assert outcome["missing"] == 0, outcome
        assert outcome["again"] <= CONCURRENCY, outcome
        assert outcome["problems"] == [], outcome
        assert outcome["leftovers"] == 0, outcome
