"""Several processes record one store: each its share of the runs, and the result is the store that one process makes."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from autointerp.errors import ConfigError, IdentityError, StoreError
from autointerp.jobs import cache as module
from autointerp.jobs.cache import cache
from autointerp.store.lock import WriterLock
from autointerp.store.reader import open_store
from autointerp.store.verify import verify_store
from autointerp.worker import Worker
from tests.integration.test_cache_extend import everything, settings  # noqa: F401  a fixture

_PROCESS = "import sys; from autointerp.jobs.cache import *; cache(CacheConfig.model_validate_json(sys.argv[1]))"


@pytest.fixture
def ran(monkeypatch):
    """The contexts that the subject saw in this process beyond the first few, which are looked at before the store is opened."""
    contexts, batches = [], module.Recorder.batches

    def recorded(recorder, given):
        contexts.extend(" ".join(map(str, context.tokens)) for context in given)
        return batches(recorder, given)

    monkeypatch.setattr(module.Recorder, "batches", recorded)
    return contexts


@pytest.mark.slow
def test_two_processes_at_once_and_a_third_that_is_killed(settings, tmp_path):  # noqa: F811
    config = settings(corpus={"num_tokens": 2000}, contexts_per_run=4)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(index):
        text = config.model_copy(update={"worker": f"{index}/3"}).model_dump_json()
        return subprocess.Popen([sys.executable, "-c", _PROCESS, text], stderr=subprocess.PIPE, text=True, env=environment)

    processes = [start(index) for index in (1, 2, 3)]
    while not (tmp_path / "store/building/runs/run-00002.json").exists() and processes[2].poll() is None:
        time.sleep(0.01)
    processes[2].send_signal(signal.SIGKILL)
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes[:2]] == [0, 0], said
    with pytest.raises(StoreError, match="is not finished"):
        open_store(tmp_path / "store")
    again = start(3)
    said = again.communicate()[1]
    assert again.returncode == 0, said
    cache(config)
    at_once = cache(settings(corpus={"num_tokens": 2000}, contexts_per_run=4, out=tmp_path / "at_once"))
    assert everything(tmp_path / "store") == everything(at_once) and verify_store(at_once) == []
    assert not (tmp_path / "store/building").exists()


@pytest.mark.parametrize("what", ["new", "added", "extended"])
def test_each_runs_the_subject_on_its_share_only(settings, tmp_path, ran, caplog, monkeypatch, what):  # noqa: F811
    monkeypatch.setattr("autointerp.jobs.cache.logger.propagate", True)
    caplog.set_level("INFO", "autointerp")
    both = settings().coders
    changes = {"new": {}, "added": {}, "extended": {"extend_tokens": 2000}}[what]
    if what != "new":
        cache(settings(coders=both if what == "extended" else both[:1]))
    for index in (1, 0):
        ran.clear()
        cache(settings(worker=f"{index}/2", **changes))
        ran[:4] = []
        shares = len(ran)
        assert shares and len(set(ran)) == len(ran)
    if what == "extended":  # three full runs of 8 were there; the rest of 63 contexts are runs 3 to 7
        assert "all runs are there (8): run the same command without --worker to merge them" in caplog.text
        assert "still missing: 3 of worker 0" not in caplog.text
    else:
        assert "worker 1 of 2 is done; runs still missing: 2 of worker 0" in caplog.text
        assert "worker 0 of 2 is done; all runs are there (4): run the same command without --worker" in caplog.text
    ran.clear()
    path = cache(settings(**changes))
    assert len(ran) <= 4 + 1 * 32
    number = {"corpus": {"num_tokens": 2000}} if what == "extended" else {}
    at_once = cache(settings(out=tmp_path / "at_once", **number))
    assert everything(path) == everything(at_once)


def test_what_a_worker_left_out_is_recorded_by_the_last_call(settings, tmp_path):  # noqa: F811
    cache(settings(worker="1/3"))
    path = cache(settings())
    assert everything(path) == everything(cache(settings(out=tmp_path / "at_once")))


def test_folders_that_were_copied_together(settings, tmp_path):  # noqa: F811
    for index in (1, 2):
        cache(settings(worker=f"{index}/2", out=tmp_path / f"machine{index}"))
    for index in (1, 2):
        shutil.copytree(
            tmp_path / f"machine{index}", tmp_path / "store", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*lock")
        )
    assert everything(cache(settings())) == everything(cache(settings(out=tmp_path / "at_once")))


class TestRefusals:
    def test_other_settings(self, settings, tmp_path):  # noqa: F811
        cache(settings(worker="0/2"))
        with pytest.raises(IdentityError, match="token_filter = 'bos' and 'none' is wanted now"):
            cache(settings(worker="1/2", token_filter="none"))
        cache(settings(worker="1/2", contexts_per_run=5, out=tmp_path / "elsewhere"))
        shutil.copytree(tmp_path / "elsewhere/building/runs", tmp_path / "store/building/runs", dirs_exist_ok=True)
        with pytest.raises(IdentityError, match=r"run 1 of .* was recorded with other settings than building/state.json says"):
            cache(settings())

    def test_who_may_write_beside_whom(self, settings, tmp_path):  # noqa: F811
        cache(settings(worker="0/2"))
        store = tmp_path / "store"
        first = WriterLock(store / "building/lock", store=store, worker=Worker(0, 2))
        first.share()
        with pytest.raises(StoreError, match=r"is being written by worker 0, process \d+ on "):
            cache(settings(worker="0/2"))
        with pytest.raises(StoreError, match=r"is being written by process \d+ on "):
            cache(settings())
        with pytest.raises(IdentityError, match="written by workers of 2, and this is one of 3; give every worker the same N"):
            cache(settings(worker="1/3"))
        cache(settings(worker="1/2"))
        first.release()
        alone = WriterLock(store / "building/lock", store=store)
        with pytest.raises(StoreError, match="is being written by process"):
            cache(settings(worker="1/2"))
        alone.release()
        cache(settings(worker="2/3"))  # nobody else is at work, so the number may change

    @pytest.mark.parametrize("text", ["2/2", "3/2", "1", "a/b", "0/0"])
    def test_no_worker(self, settings, text):  # noqa: F811
        with pytest.raises(ConfigError, match=rf"--worker {text}: expected I/N with I from 0 to N-1, such as 0/4"):
            cache(settings(worker=text))

    def test_passes(self, settings):  # noqa: F811
        with pytest.raises(ConfigError, match="--worker and --coders-per-pass cannot be used together"):
            cache(settings(worker="0/2", coders_per_pass=1))
