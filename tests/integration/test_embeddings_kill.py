"""The build of an index of embeddings, killed by SIGKILL at every event of the disk, ends byte for byte as one never killed.

The work is done by this file run as a script, so that the children it forks inherit a process without threads.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from autointerp.store import embeddings
from autointerp.store.embeddings import IndexRecord, build_index
from tests.killing import fork

NUM, DIM, WINDOWS = 70, 8, 16
BLOCKS = 5


def test_killed_at_every_event_of_the_disk(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.test_embeddings_kill", tmp_path],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = json.loads(done.stdout)
    assert len(outcomes) > 4 * BLOCKS
    for outcome in outcomes:
        assert outcome["killed"] == -9 and outcome["exit"] == 0, outcome
        assert outcome["is_equal"], outcome
        # Of the blocks that were begun, the one that was not committed is embedded again at most.
        assert BLOCKS <= outcome["embedded"] <= BLOCKS + 1, outcome
    assert {outcome["embedded"] for outcome in outcomes} == {BLOCKS, BLOCKS + 1}


def build(path):
    """Embed windows as numbers, and note each block that was embedded."""
    embeddings.WINDOWS_PER_BLOCK = WINDOWS
    record = IndexRecord(store_id="s", embedder="e", embedder_id="e@1", window=32, min_window=8, num_windows=NUM, dim=DIM)
    note = os.open(path.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def embed(low, high):
        os.write(note, f"{low}\n".encode())
        vectors = np.random.default_rng(low).normal(size=(high - low, DIM))
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    build_index(path, record, embed, advance=lambda count, is_new: None)


def content(path):
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def main(folder):
    code, events, output = fork(lambda: build(folder / "whole"))
    assert code == 0, output
    whole = content(folder / "whole")
    assert set(whole) == {"vectors.npy", "index.json"}
    outcomes = []
    for point in range(len(events)):
        path = folder / f"killed-{point}"
        killed, _, _ = fork(lambda path=path: build(path), kill_at=point)
        code, _, output = fork(lambda path=path: build(path))
        embedded = len(path.with_suffix(".log").read_text().split())
        outcomes.append(
            {"event": events[point], "killed": killed, "exit": code, "output": output, "is_equal": content(path) == whole,
             "embedded": embedded}
        )  # fmt: skip
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
