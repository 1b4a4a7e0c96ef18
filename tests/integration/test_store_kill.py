"""A build, or one that grows, killed by SIGKILL at any commit point, ends byte for byte as one never killed.

The work is done by this file run as a script, so that the children it forks inherit a process without threads: each child
counts the calls that commit or remove something (and the writes of row groups) and kills itself before the n-th.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from autointerp.errors import StoreError
from autointerp.store import CoderRecord, Document, Identity, StoreWriter, open_store, verify_store, write_vocabulary
from autointerp.worker import Worker

CTX_LEN = 16
NUM_CONTEXTS = 34
NUM_BEFORE = 19  # in the middle of a run, and of a document
CONTEXTS_PER_RUN = 4
IDENTITY = Identity(ctx_len=CTX_LEN, subject_digest="sha256:subject", packing="fill")
CODERS = {
    name: CoderRecord(digest=f"sha256:{name}", width=width, hookpoints=("model.layers.1@out",), activation="topk", k=3)
    for name, width in (("first", 60), ("second", 9))
}


@pytest.mark.slow
def test_killed_at_every_commit_point(tmp_path):
    figures = run("build", tmp_path)
    assert figures["num_runs"] >= 8
    assert figures["wrong"] == []
    assert figures["new"] > 100 and figures["added"] > 40 and figures["several"] == 20


@pytest.mark.slow
def test_growth_killed_at_many_commit_points(tmp_path):
    figures = run("grow", tmp_path)
    assert figures["wrong"] == [] and figures["killed"] > 120
    assert figures["states"]["small"] > 50 and figures["states"]["moving"] > 10 and figures["states"]["large"] > 2


@pytest.mark.parametrize("seed", [0, 1])
def test_growth_killed_at_random_commit_points(tmp_path, seed):
    figures = run("grow", tmp_path, seed)
    assert figures["wrong"] == [] and figures["killed"] >= 2


@pytest.mark.slow
def test_many_runs_killed_while_they_are_merged(tmp_path):
    """More runs than the budget can hold a row group of, so that neighbouring ones are merged beforehand."""
    figures = run("merge", tmp_path)
    assert figures["wrong"] == [] and figures["killed"] == 40 and figures["premerged"] > 3


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_workers_at_once_killed_at_random(tmp_path, seed):
    """Three processes on one new store, then on one that grows; each is killed now and then and started again."""
    figures = run("workers", tmp_path, seed)
    assert figures["wrong"] == [] and figures["killed"] >= 3


def run(*arguments):
    done = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def build(path, coders, *, num_contexts=NUM_CONTEXTS, grows=False, worker=None, **options):
    """Write the whole store, as the caching job does."""
    with StoreWriter.create_or_resume(
        path,
        identity=IDENTITY,
        coders=coders,
        is_growing=grows,
        worker=worker,
        **({"contexts_per_run": CONTEXTS_PER_RUN, "row_group_rows": 256, "part_rows": 900} | options),
    ) as writer:
        if writer.is_finished:
            return
        if not grows and worker is None and not writer.has_tokenizer:
            write_vocabulary(path / "tokenizer", [b"a", b"b"], [False, True])
        context = 0
        while not writer.has_all_runs and context < num_contexts:
            rng = np.random.default_rng(context)
            length = CTX_LEN if context % 5 else 7
            document = Document(document=context // 3, source_row=context)
            assert context == writer.add_contexts([rng.integers(0, 2, length)], [[(context // 3, 0)]], documents=[document])
            for coder in writer.coder_names:
                rng = np.random.default_rng([context, len(coder)])
                fires = rng.random((CODERS[coder].width, length)) < 0.1
                latents, offsets = np.nonzero(fires[:, ::-1])
                values = rng.normal(size=len(latents)).astype(np.float32)
                writer.add_activations(coder, latents, context * CTX_LEN + offsets, values)
            context += 1
            if not writer.room:
                writer.close_run()
        if worker is None:
            writer.finish()
        else:
            writer.close_run()


def kill_before(number):
    """Wrap what changes the disk; return the number of calls so far in a list of one."""
    calls = [0]

    def wrap(owner, name):
        real = getattr(owner, name)

        def counted(*args, **kwargs):
            calls[0] += 1
            if calls[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(owner, name, counted)

    for owner, name in [(os, "replace"), (os, "link"), (os, "unlink"), (os, "rmdir"), (pq.ParquetWriter, "write_table")]:
        wrap(owner, name)
    # A killed process loses nothing that it wrote, flushed or not, so flushing would only take time.
    os.fsync = lambda handle: None
    return calls


def in_child(path, coders, number, **options):
    """Build in a forked child that is killed before its call `number`; return (was it killed, its calls)."""
    return wait(*start(path, coders, number, **options), f"call {number} of {path}")


def start(path, coders, number, **options):
    """Fork a child that builds; return its process id and where it says how many calls it made."""
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        os.close(receive)
        code = 1
        try:
            calls = kill_before(number)
            build(path, coders, **options)
            os.write(send, str(calls[0]).encode())
            code = 0
        except BaseException:  # noqa: BLE001  told, and then the child ends as any other
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(send)
    return child, receive


def wait(child, receive, what):
    status = os.waitpid(child, 0)[1]
    with os.fdopen(receive) as file:
        calls = int(file.read() or 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if not killed and status:
        raise SystemExit(f"the child failed before {what}")
    return killed, calls


def tree(path):
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def main(folder):
    build(folder / "warm", CODERS)  # what is loaded once here is not loaded again in every child
    whole, wrong = folder / "whole", []
    num_events = in_child(whole, CODERS, 0)[1]
    expected = tree(whole)
    path = folder / "killed"
    for number in range(1, num_events + 1):
        killed, _ = in_child(path, CODERS, number)
        in_child(path, CODERS, 0)
        if not killed or tree(path) != expected:
            wrong.append(["new", number])
        shutil.rmtree(path)

    first = {"first": CODERS["first"]}
    in_child(folder / "one", first, 0)
    shutil.copytree(folder / "one", folder / "grown")
    num_added = in_child(folder / "grown", CODERS, 0)[1]
    grown = tree(folder / "grown")
    for number in range(1, num_added + 1):
        shutil.copytree(folder / "one", path)
        killed, _ = in_child(path, CODERS, number)
        in_child(path, CODERS, 0)
        if not killed or tree(path) != grown:
            wrong.append(["added", number])
        shutil.rmtree(path)

    several = 0
    for seed in range(20):
        rng = random.Random(seed)
        while in_child(path, CODERS, rng.randint(1, num_events // 3))[0]:
            pass
        several += 1
        if tree(path) != expected:
            wrong.append(["several", seed])
        shutil.rmtree(path)
    wrong += verify_store(whole) + verify_store(folder / "grown")
    num_runs = open_store(whole).manifest.provenance["num_runs"]
    json.dump({"new": num_events, "added": num_added, "several": several, "num_runs": num_runs, "wrong": wrong}, sys.stdout)


def main_merge(folder):
    options = {"contexts_per_run": 1, "memory_budget_bytes": 1}
    build(folder / "warm", CODERS)
    in_child(folder / "spilled", CODERS, 0, worker=Worker(0, 1), **options)
    shutil.copytree(folder / "spilled", folder / "whole")
    num_events = in_child(folder / "whole", CODERS, 0, **options)[1]
    expected, path, wrong, num_killed, premerged = (
        tree(folder / "whole"),
        folder / "killed",
        verify_store(folder / "whole"),
        0,
        0,
    )
    for number in random.Random(0).sample(range(1, num_events + 1), 40):
        shutil.copytree(folder / "spilled", path)
        num_killed += in_child(path, CODERS, number, **options)[0]
        premerged += any(path.rglob("building/runs/*/merged-*"))
        in_child(path, CODERS, 0, **options)
        if tree(path) != expected:
            wrong.append(["merge", number])
        shutil.rmtree(path)
    json.dump({"killed": num_killed, "premerged": premerged, "wrong": wrong}, sys.stdout)


def grow(path, number=0):
    """Extend the store coder by coder where that is not done; return (was it killed, its calls) of the last child."""
    StoreWriter.complete(path)
    calls = 0
    for name, record in CODERS.items():
        if open_store(path).num_contexts < NUM_CONTEXTS:
            killed, found = in_child(path, {name: record}, max(0, number - calls), grows=True)
            if killed:
                return True, calls
            calls += found
    in_child(path, CODERS, 0)  # has nothing to do but to tidy up
    return False, calls


def state_of(path, small):
    """Return which store a reader finds: the small one as it was, the large one, or a sentence."""
    try:
        store = open_store(path)
    except StoreError as error:
        return "moving" if "are moving into place: try again in a moment" in str(error) else str(error)
    if store.num_contexts == NUM_CONTEXTS:
        return "large" if not verify_store(path) else "a damaged store"
    return "small" if {name: (path / name).read_bytes() for name in small} == small else "another store"


def main_grow(folder, seed=None):
    build(folder / "warm", CODERS)
    in_child(folder / "at_once", CODERS, 0)
    in_child(folder / "small", CODERS, 0, num_contexts=NUM_BEFORE)
    small, path = tree(folder / "small"), folder / "killed"
    shutil.copytree(folder / "small", folder / "whole")
    num_events = grow(folder / "whole")[1]
    expected = tree(folder / "whole")
    at_once = tree(folder / "at_once")
    wrong = [name for name in at_once if name != "manifest.json" and at_once[name] != expected.get(name)]
    states, num_killed = {}, 0
    points = [point for point in range(1, num_events + 1) if point % 3 == 0 or point > num_events - 90]
    for first in points if seed is None else random.Random(int(seed)).sample(points, 2):
        shutil.copytree(folder / "small", path)
        kill_at, rng = first, random.Random(first)
        # Once at this point; with a seed, again and again.
        while grow(path, kill_at)[0]:
            num_killed += 1
            state = state_of(path, small)
            states[state] = states.get(state, 0) + 1
            kill_at = 0 if seed is None else rng.randint(1, num_events)
        if tree(path) != expected:
            wrong.append(["grown", first])
        shutil.rmtree(path)
    wrong += [state for state in states if state not in ("small", "moving", "large")]
    json.dump({"events": num_events, "killed": num_killed, "states": states, "wrong": wrong}, sys.stdout)


def main_workers(folder, seed):
    build(folder / "warm", CODERS)
    in_child(folder / "at_once", CODERS, 0)
    in_child(folder / "grown", CODERS, 0, num_contexts=NUM_BEFORE)
    in_child(folder / "grown", CODERS, 0, grows=True)
    in_child(folder / "small", CODERS, 0, num_contexts=NUM_BEFORE)
    rng, num_killed, wrong = random.Random(int(seed)), 0, []
    for name, grows in (("at_once", False), ("grown", True)):
        path = folder / f"{name}-by-workers"
        if grows:
            shutil.copytree(folder / "small", path)
        waiting = {Worker(index, 3): 2 for index in range(3)}  # how often each will be killed
        while waiting:
            children = {
                worker: start(path, CODERS, rng.randint(1, 40) if kills else 0, worker=worker, grows=grows)
                for worker, kills in waiting.items()
            }
            for worker, child in children.items():
                killed, _ = wait(*child, f"the end of {worker}")
                num_killed += killed
                waiting[worker] -= 1
                if not killed:
                    del waiting[worker]
        in_child(path, CODERS, 0, grows=grows)
        found, expected = tree(path), tree(folder / name)
        wrong += [[name, file] for file in sorted(set(found) | set(expected)) if found.get(file) != expected.get(file)]
    json.dump({"killed": num_killed, "wrong": wrong}, sys.stdout)


if __name__ == "__main__":
    {"build": main, "grow": main_grow, "merge": main_merge, "workers": main_workers}[sys.argv[1]](
        Path(sys.argv[2]), *sys.argv[3:]
    )
