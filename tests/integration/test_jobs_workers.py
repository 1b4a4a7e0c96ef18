"""Invariant 2: any number of workers gives the same rows, no latent and no request twice; signals end a run cleanly."""

import asyncio
import hashlib
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
import jobs_standins as standins

from autointerp.errors import Interrupted
from autointerp.jobs.explain import ExplainConfig, explain_from
from autointerp.jobs.score import ScoreConfig, score_from
from autointerp.jobs.signals import run_sync
from autointerp.jobs.status import status
from autointerp.jobs.verify import verify
from autointerp.results.load import load_explanations, load_scores, load_verdicts

SPAWN = multiprocessing.get_context("spawn")


class Recording(standins.FakeEngine):
    """Its requests are on disk, for counting over processes."""

    def __init__(self, record, delay_s):
        super().__init__(standins.script, max_delay_s=delay_s)
        self._fd = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    async def complete(self, request, /):
        os.write(self._fd, (hashlib.sha256(request.prompt.messages[0][1].encode()).hexdigest() + "\n").encode())
        return await super().complete(request)


def work(folder, worker, latents, delay_s=0.02, ready=None):
    """Run both stages as one worker; explanations of other workers are waited for."""
    source, engine = standins.Source(coders=("a",)), Recording(folder / "sent", delay_s)
    common = {"worker": worker, "concurrency": 4, "threads": 1}
    results = folder / "results"
    if ready is not None:
        ready.wait()
    explain = ExplainConfig(store="x", results=results, latents=latents, controls=("shuffled",), shard_latents=3, **common)
    # A worker that holds a shard does what itself was asked for; what others asked of that shard they take when it is free.
    while run_sync(
        lambda stop: explain_from(explain, source, standins.Explainer(), engine, progress=False, stop=stop)
    ).num_held:
        time.sleep(0.05)
    score = ScoreConfig(results=results, controls=("shuffled",), **common)
    while True:
        run_sync(lambda stop: score_from(score, source, [standins.Scorer()], engine, progress=False, stop=stop))
        if status(results).is_complete:
            return
        time.sleep(0.05)


def start(*arguments):
    process = SPAWN.Process(target=work, args=arguments)
    process.start()
    return process


def tables(folder):
    return [load(folder / "results") for load in (load_explanations, load_verdicts, load_scores)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    work(folder, "0/1", "0-17", 0.0)
    return folder


def assert_like(folder, alone):
    for found, expected in zip(tables(folder), tables(alone), strict=True):
        pd.testing.assert_frame_equal(found, expected)
    assert verify(folder / "results") == []
    sent = (folder / "sent").read_text().split()
    assert len(sent) == len(set(sent))
    assert set(sent) == set((alone / "sent").read_text().split())


def test_four_workers(tmp_path, alone):
    ready = SPAWN.Barrier(4)
    workers = [start(tmp_path, f"{i}/4", "0-17", 0.03, ready) for i in range(4)]
    for process in workers:
        process.join(120)
        assert process.exitcode == 0
    assert_like(tmp_path, alone)


def test_two_workers_after_a_dead_one(tmp_path, alone):
    """The first is killed while it holds shards; two others start at once, and one of them gets each stale lease."""
    dead = start(tmp_path, "0/1", "0-17", 0.5)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "results" / "leases" / "explain").rglob("*.g0")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    os.kill(dead.pid, signal.SIGKILL)
    dead.join()
    sent_before = set((tmp_path / "sent").read_text().split())
    ready = SPAWN.Barrier(2)
    workers = [start(tmp_path, f"{i}/2", "0-17", 0.01, ready) for i in range(2)]
    for process in workers:
        process.join(120)
        assert process.exitcode == 0
    for found, expected in zip(tables(tmp_path), tables(alone), strict=True):
        pd.testing.assert_frame_equal(found, expected)
    sent = (tmp_path / "sent").read_text().split()
    assert len(sent) - len(set(sent)) <= min(4, len(sent_before))
    assert verify(tmp_path / "results") == []


def test_workers_grow_one_folder(tmp_path, alone):
    """Overlapping parts asked for by workers at the same time, then the whole."""
    ready = SPAWN.Barrier(3)
    parts = ["0-7", "5-12", "random:9"]
    workers = [start(tmp_path, "0/1", part, 0.01, ready) for part in parts]
    for process in workers:
        process.join(120)
        assert process.exitcode == 0
    explanations = load_explanations(tmp_path / "results")
    assert explanations["latent"].is_unique
    work(tmp_path, "0/1", "0-17", 0.0)
    sent = (tmp_path / "sent").read_text().split()
    assert len(sent) == len(set(sent))
    ours = load_scores(tmp_path / "results").query("latent <= 17").reset_index(drop=True)
    pd.testing.assert_frame_equal(ours, load_scores(alone / "results"))


def stop_me(folder, delay_s, outcome):
    async def run(stop):
        config = ExplainConfig(
            store="x", results=folder / "results", latents="0-49", coders=("a",), shard_latents=5, concurrency=2
        )
        engine = Recording(folder / "sent", delay_s)
        return await explain_from(config, standins.Source(), standins.Explainer(), engine, progress=False, stop=stop)

    try:
        run_sync(run)
    except Interrupted as error:
        outcome.put((error.exit_code, str(error)))
        return
    outcome.put((0, ""))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals(tmp_path, number):
    outcome = SPAWN.Queue()
    process = SPAWN.Process(target=stop_me, args=(tmp_path, 0.1, outcome))
    process.start()
    deadline = time.monotonic() + 60
    while not list((tmp_path / "results" / "state" / "explain").rglob("shard-*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, number)
    code, text = outcome.get(timeout=60)
    process.join(60)
    assert code == 130 and signal.Signals(number).name in text
    sent = (tmp_path / "sent").read_text().split()
    rows = load_explanations(tmp_path / "results")
    assert 0 < len(rows) < 50
    assert len(rows) - len(sent) in (0, 1)  # latent 7 needs no request; all that was paid is there
    config = ExplainConfig(store="x", results=tmp_path / "results", latents="0-49", coders=("a",))
    asyncio.run(
        explain_from(config, standins.Source(), standins.Explainer(), Recording(tmp_path / "sent", 0.0), progress=False)
    )
    sent = (tmp_path / "sent").read_text().split()
    assert len(sent) == len(set(sent)) == 49
