"""Leases: one owner at a time, dead owners give way, and two stealers cannot both win."""

import os
import threading
import time

import pytest

from autointerp.digest import canonical_json
from autointerp.errors import ConfigError, ResourceError
from autointerp.jobs.shards import Leases, host
from autointerp.worker import Worker

NAME = "explain/x/shard-000000"


@pytest.fixture
def make(tmp_path):
    made = []

    def build(**options):
        made.append(Leases(tmp_path / "leases", **options))
        return made[-1]

    yield build
    for leases in made:
        leases.close()


def abandon(tmp_path, *, owner=None, age_s=0.0, generation=0):
    path = tmp_path / "leases" / f"{NAME}.g{generation}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(canonical_json({"token": "old", **(owner or {"host": "elsewhere", "pid": 1, "born": None})}))
    os.utime(path, (time.time() - age_s, time.time() - age_s))


def test_one_owner(make):
    mine, theirs = make(), make()
    assert mine.acquire(NAME)
    assert theirs.acquire(NAME) is None
    assert theirs.held_by_others(NAME) and not mine.held_by_others(NAME)
    mine.release(NAME, is_done=False)
    assert theirs.acquire(NAME)
    assert mine.is_lost(NAME)


def test_release_of_a_done_shard_leaves_no_file(make, tmp_path):
    leases = make()
    leases.acquire(NAME)
    leases.release(NAME, is_done=True)
    assert not list((tmp_path / "leases").rglob("*.g*"))


def test_a_live_lease_of_another_host_holds_until_it_expires(make, tmp_path):
    abandon(tmp_path, age_s=5)
    assert make(expiry_s=60).acquire(NAME) is None
    assert make(expiry_s=2).acquire(NAME)


def test_a_dead_owner_on_this_host_gives_way_at_once(make, tmp_path):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    abandon(tmp_path, owner={"host": host(), "pid": pid, "born": "1"})
    assert make().acquire(NAME)


def test_a_reused_pid_is_not_taken_for_the_owner(make, tmp_path):
    abandon(tmp_path, owner={"host": host(), "pid": os.getpid(), "born": "long ago"})
    assert make().acquire(NAME)


def test_many_stealers_one_winner(make, tmp_path):
    for attempt in range(20):
        name = f"explain/x/shard-{attempt:06d}"
        path = tmp_path / "leases" / f"{name}.g0"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(canonical_json({"token": "old", "host": "elsewhere", "pid": 1, "born": None}))
        os.utime(path, (0, 0))
        stealers = [make() for _ in range(4)]
        barrier, won = threading.Barrier(4), []

        def steal(leases, name=name, barrier=barrier, won=won):
            barrier.wait()
            if leases.acquire(name):
                won.append(leases)

        threads = [threading.Thread(target=steal, args=(leases,)) for leases in stealers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert not won[0].is_lost(name)


def test_a_slow_stealer_loses_to_whoever_was_faster(make, tmp_path):
    """It saw generation 0 stale; by the time it links generation 1 there has been a 1 and is a 2."""
    abandon(tmp_path, age_s=1000, generation=0)
    slow, fast = make(), make()
    is_alive = slow._is_alive

    def late(path, now):
        assert fast.acquire(NAME)
        fast.release(NAME, is_done=False)
        assert fast.acquire(NAME)
        return is_alive(path, now)

    slow._is_alive = late
    assert slow.acquire(NAME) is None
    assert not fast.is_lost(NAME)


def test_a_suspended_owner_learns_that_it_lost(make):
    mine, theirs = make(), make(expiry_s=0.05)
    lease = mine.acquire(NAME)
    os.utime(lease.path, (1, 1))
    assert theirs.acquire(NAME)
    assert mine.is_lost(NAME)
    mine.release(NAME, is_done=True)
    assert not theirs.is_lost(NAME)


def test_heartbeat_keeps_a_lease(make):
    mine = make(expiry_s=0.4)
    mine.acquire(NAME)
    time.sleep(0.7)
    assert make(expiry_s=0.4).acquire(NAME) is None


def test_waiting(make):
    mine, theirs = make(), make()
    with (
        mine.waiting(NAME),
        pytest.raises(ResourceError, match=r"another process has held .* for 0 s"),
        theirs.waiting(NAME, timeout_s=0.1),
    ):
        pass
    with theirs.waiting(NAME, timeout_s=1):
        pass


def test_workers_take_their_own_first():
    shards = list(range(7))
    assert Worker(0, 1).order(shards) == shards
    assert Worker(1, 3).order(shards) == [1, 4, 2, 3, 5, 6, 0]
    assert all(sorted(Worker(i, 4).order(shards)) == shards for i in range(4))


def test_worker_of_a_slurm_array():
    assert Worker.from_environment({}) == Worker(0, 1)
    found = Worker.from_environment(
        {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_STEP": "1"}
    )
    assert found == Worker(2, 4)


@pytest.mark.parametrize("text", ["4/4", "x", "1", "-1/3"])
def test_worker_sentence(text):
    with pytest.raises(ConfigError, match="expected I/N with I from 0"):
        Worker.parse(text)
    assert Worker.parse("3/4") == Worker(3, 4)
